"""Espalier: parameter-efficient fine-tuning, every method freely combined.

    import espalier as esp
    esp.attach(model, esp.LoRA(rank=8), name="mail")     # the base is frozen, the adapter trains
    optimiser = torch.optim.AdamW(esp.parameters(model))
    esp.save(model, "mail", "out/mail")

Importing this package is light: torch and transformers load when a name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from espalier import errors

if TYPE_CHECKING:
    from espalier.accounting import account
    from espalier.calibration import calibrate
    from espalier.checkpoint import load, read_card, save
    from espalier.deltas import Batch, Call, Delta, Kept, Regime, Tensors, Trained
    from espalier.errors import EspalierError
    from espalier.fast.head import deferred_logits
    from espalier.fast.switch import plain_paths
    from espalier.folding import merge, unmerge
    from espalier.from_text import prefix_from_text
    from espalier.incontext import InContext, in_context
    from espalier.lifecycle import Lifecycle
    from espalier.methods.adalora import AdaLoRA
    from espalier.methods.bitfit import BitFit
    from espalier.methods.compacter import Compacter
    from espalier.methods.diffpruning import DiffPruning
    from espalier.methods.full import FullTuning
    from espalier.methods.head import HeadOnly
    from espalier.methods.ia3 import IA3
    from espalier.methods.ladder import LadderSideTuning
    from espalier.methods.lora import LoRA
    from espalier.methods.parallel import ParallelAdapter
    from espalier.methods.partial import PartialTuning
    from espalier.methods.prefix import PrefixTuning, PTuningV2
    from espalier.methods.prompt import PromptTuning
    from espalier.methods.ptuning import PTuning
    from espalier.methods.said import IntrinsicSAID
    from espalier.methods.serial import SerialAdapter
    from espalier.methods.spot import SPoT
    from espalier.places import Site, Sites, sites
    from espalier.plain.transfer import prompt_similarity, rank_prompts, read_prompt
    from espalier.planning import Plan, plan
    from espalier.quantised import dequantize, quantize
    from espalier.reading import gates, ranks
    from espalier.recipes import Method, Recipe, recipe
    from espalier.rows import rows
    from espalier.sharding import average_gradients, shard
    from espalier.streaming import write_merged
    from espalier.training import RunConfig, RunResult, fit, train
    from espalier.training.dimension import intrinsic_dimension
    from espalier.verbs import (
        activate,
        active,
        attach,
        dead_sites,
        detach,
        freeze,
        groups,
        parameters,
        skip_layers,
        thaw,
        to_plain,
    )

__version__ = "0.1.0"

# Public names by the module that holds them; methods are found by their files.
_MODULES = {
    "accounting": ("account",),
    "calibration": ("calibrate",),
    "checkpoint": ("load", "read_card", "save"),
    "deltas": ("Batch", "Call", "Delta", "Kept", "Regime", "Tensors", "Trained"),
    "errors": ("EspalierError",),
    "fast.head": ("deferred_logits",),
    "fast.switch": ("plain_paths",),
    "folding": ("merge", "unmerge"),
    "from_text": ("prefix_from_text",),
    "incontext": ("InContext", "in_context"),
    "lifecycle": ("Lifecycle",),
    "verbs": (
        *("activate", "active", "attach", "dead_sites", "detach"),
        *("freeze", "groups", "parameters", "skip_layers", "thaw", "to_plain"),
    ),
    "planning": ("Plan", "plan"),
    "quantised": ("dequantize", "quantize"),
    "reading": ("gates", "ranks"),
    "plain.transfer": ("prompt_similarity", "rank_prompts", "read_prompt"),
    "places": ("Site", "Sites", "sites"),
    "recipes": ("Method", "Recipe", "recipe"),
    "rows": ("rows",),
    "sharding": ("average_gradients", "shard"),
    "streaming": ("write_merged",),
    "training": ("RunConfig", "RunResult", "fit", "train"),
    "training.dimension": ("intrinsic_dimension",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "IA3", "AdaLoRA", "Batch", "BitFit", "Call", "Compacter", "Delta", "DiffPruning",
    "EspalierError", "FullTuning", "HeadOnly", "InContext", "IntrinsicSAID", "Kept",
    "LadderSideTuning", "Lifecycle", "LoRA", "Method", "PTuning", "PTuningV2", "ParallelAdapter",
    "PartialTuning", "Plan", "PrefixTuning", "PromptTuning", "Recipe", "Regime", "RunConfig",
    "RunResult", "SPoT", "SerialAdapter", "Site", "Sites", "Tensors", "Trained", "account",
    "activate", "active", "attach", "average_gradients", "calibrate", "dead_sites",
    "deferred_logits", "dequantize", "detach", "errors", "fit", "freeze", "gates", "groups",
    "in_context", "intrinsic_dimension", "load", "merge", "parameters", "plain_paths", "plan",
    "prefix_from_text", "prompt_similarity", "quantize", "rank_prompts", "ranks", "read_card",
    "read_prompt", "recipe", "rows", "save", "shard", "sites", "skip_layers", "thaw", "to_plain",
    "train", "unmerge", "write_merged",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"espalier.{_HOME[name]}"), name)
    elif name[:1].isupper():
        from espalier.recipes import NAMED_SUMS, methods

        known = {**methods(), **NAMED_SUMS}
        if name not in known:
            raise AttributeError(f"espalier has no {name!r}")
        value = known[name]
    else:
        raise AttributeError(f"espalier has no {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
