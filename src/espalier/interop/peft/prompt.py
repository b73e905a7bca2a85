"""Peft's PROMPT_TUNING and P_TUNING: rows of a soft prompt, where words leave their embedding.

Both keep the rows alone: P_TUNING's network is gone once saved, so that either is read as a plain
prompt, and what is written is PROMPT_TUNING. On the text's own tokens outputs are equal; peft's
begin with those of its virtual tokens. A first token that a head pools is one of these there, the
text's own here, so that such models are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill
from espalier.interop.peft.files import PROMPT_PREFIX, Kind, task_of
from espalier.interop.peft.whole import Whole, head_tensors, numbers
from espalier.methods.prompt import PromptTuning
from espalier.modules import base_modules
from espalier.places import sites
from espalier.recipes import Recipe
from espalier.routes import route
from espalier.verbs import prepare

SIZES = {
    "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens",
    "token_dim",
}  # fmt: skip
# How rows started, which their values do not tell.
_PROMPT = {
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
# The network that made them, which is gone.
_NETWORK = {
    "encoder_dropout", "encoder_hidden_size", "encoder_num_layers",
    "encoder_reparameterization_type",
}  # fmt: skip
KEY = "prompt_embeddings"


def _fits(adapter: Adapter) -> bool:
    """Whether all changes of an adapter are soft prompts, made by a network or not."""
    changes = [delta for delta in adapter.deltas if not delta.replaces]
    return bool(changes) and all(
        delta.embeds and set(numbers(delta)) == {"prompt"} for delta in changes
    )


def _never(adapter: Adapter) -> bool:
    return False


def _write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    heads = head_tensors(adapter, "PROMPT_TUNING")
    changes = [delta for delta in adapter.deltas if not delta.replaces]
    for delta in changes:
        _refuse_others(model, delta)
        if delta.gaps[1:] != (0, 0):
            raise CheckpointError(
                f"peft's prompts stand before the text; this one has a template {delta.gaps}. "
                "Save it in Espalier's own format"
            )
    rows = torch.cat([numbers(delta)["prompt"] for delta in changes])
    own: Any = model.config
    config = {
        # Peft asks for these also where, as here, it has no use for them.
        "num_attention_heads": getattr(own, "num_attention_heads", 1),
        "num_layers": getattr(own, "num_hidden_layers", 1),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(rows),
        "prompt_tuning_init": "RANDOM",
        "token_dim": rows.shape[1],
    }
    return config, {KEY: rows, **{PROMPT_PREFIX + name: value for name, value in heads.items()}}


def _refuse_others(model: nn.Module, delta: Delta) -> None:
    """Raise CheckpointError where a prompt acts in another way, or not at all, in peft's models."""
    task, name = task_of(model), type(model).__name__
    way = route(model, sites(model), delta)
    why = ""
    if delta.site.kind != "embedding" or task is None:
        why = f"peft lets prompts act in models of its tasks, of which {name} is none"
    elif getattr(base_modules(model)[way.stack], "embed_scale", 1) != 1:
        why = f"peft embeds the text itself, without the scale that {name} gives its words"
    elif (task == "SEQ_2_SEQ_LM") != (way.reader is not None):
        why = f"peft's {task} does not take prompts to {name} as its encoder and decoder need"
    elif task == "SEQ_CLS" and delta.site.stack != "decoder":
        why = f"peft's {name} pools the first of its virtual tokens, ours the text's first token"
    if why:
        raise CheckpointError(f"no prompt of peft's is equal here: {why}")


def _read(model: nn.Module, foreign: Foreign, name: str) -> tuple[Graft, Adapter]:
    config, whole = foreign.config, heads_beside(foreign)
    whole.refuse_strangers(model, base_modules(model))
    length = length_of(foreign)
    rows = foreign.file.entries[KEY].shape[0]
    # Of an encoder-decoder peft keeps rows for both, but uses the encoder's alone.
    if rows != length and (rows != 2 * length or task_of(model) != "SEQ_2_SEQ_LM"):
        raise CheckpointError(
            f"{foreign.file.path}: {KEY} has {rows} rows for num_virtual_tokens="
            f"{config['num_virtual_tokens']}"
        )
    recipe = Recipe((PromptTuning(length=length),))
    graft, adapter = prepare(
        model, recipe, name, head=whole.heads() or False, dtype=torch.float32, fresh=False
    )
    for delta in adapter.deltas:
        if delta.embeds:
            _refuse_others(model, delta)

    def give(delta: Delta, key: str) -> Tensor | None:
        if delta.replaces:
            return whole.value(f"{delta.site.path}.{key}")
        return foreign.take(KEY)[:length]

    fill(adapter, foreign, give)
    return graft, adapter


def heads_beside(foreign: Foreign) -> Whole:
    """What a folder keeps beside the one tensor of a prompt."""
    whole = Whole(foreign, PROMPT_PREFIX)
    for key in foreign.file.entries:
        if key != KEY:
            whole.add(key)
    return whole


def length_of(foreign: Foreign) -> int:
    """How many virtual tokens a folder has.

    Raises:
        CheckpointError: It does not say, or has no tensor of them.
    """
    length = foreign.config.get("num_virtual_tokens")
    if KEY not in foreign.file.entries:
        raise CheckpointError(f"{foreign.file.path} lacks {KEY}")
    if type(length) is not int or length < 1 or len(foreign.file.entries[KEY].shape) != 2:
        raise CheckpointError(
            f"{foreign.folder}: {KEY} of shape {tuple(foreign.file.entries[KEY].shape)} makes no "
            f"prompt of num_virtual_tokens={length!r}"
        )
    return length


KIND = Kind(SIZES | _PROMPT, _fits, _write, _read, PROMPT_PREFIX)
MADE_BY_NETWORK = Kind(SIZES | _NETWORK, _never, _write, _read, PROMPT_PREFIX)
