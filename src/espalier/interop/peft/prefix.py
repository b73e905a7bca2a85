"""Peft's PREFIX_TUNING: keys and values of every layer in one tensor, (L, 2 · layers · K).

Layer i's keys are the 2i-th part of K = h_kv·d_h numbers, its values the next. Peft hands them over
as a cache, so that the text's first position is L there and 0 here. Between words of the text a
rotary embedding tells distances only, but keys of a prefix are not turned: what a query at L + i
has of the key k, one at i has of k turned back by L positions. So keys are turned on the way in and
out, which is exact; where positions act in any other way nothing is, and that is refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.attention import caller
from espalier.deltas import Delta
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.foreign import Foreign, fill
from espalier.interop.peft.files import PROMPT_PREFIX, Kind, task_of
from espalier.interop.peft.prompt import KEY, SIZES, heads_beside, length_of
from espalier.interop.peft.whole import head_tensors, numbers
from espalier.methods.prefix import PrefixTuning
from espalier.modules import base_modules
from espalier.places import sites
from espalier.recipes import Recipe
from espalier.routes import names
from espalier.verbs import prepare

_TURN = "apply_rotary_pos_emb"  # in transformers' files, of half and of interleaved pairs alike
_STEADY = ("default", "linear", "llama3", "yarn")  # the same turn however long the text is


def _fits(adapter: Adapter) -> bool:
    """Whether all changes of an adapter are keys and values, made by a network or not."""
    changes = [delta for delta in adapter.deltas if not delta.replaces]
    return bool(changes) and all(
        delta.attends and set(numbers(delta)) == {"keys", "values"} for delta in changes
    )


def _write(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Tensor]]:
    heads = head_tensors(adapter, "PREFIX_TUNING")
    found = _by_layer(model, adapter)
    keys, values = (
        [torch.cat([numbers(delta)[name] for delta in here]) for here in found]
        for name in ("keys", "values")
    )
    shapes = {part.shape for part in (*keys, *values)}
    if len(shapes) > 1:
        raise CheckpointError(
            "peft's prefixes are as long and as wide in every layer; these have the shapes "
            + ", ".join(str(tuple(shape)) for shape in sorted(shapes))
        )
    length, width = keys[0].shape
    head = _head_width(model, found[0][0])
    turned = [_turned(model, here[0], k, length) for here, k in zip(found, keys, strict=True)]
    parts = [part for pair in zip(turned, values, strict=True) for part in pair]
    config = {
        "encoder_hidden_size": width,
        "num_attention_heads": width // head,
        "num_layers": len(found),
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "prefix_projection": False,
        "token_dim": width,
    }
    tensors = {PROMPT_PREFIX + name: value for name, value in heads.items()}
    return config, {KEY: torch.cat(parts, 1), **tensors}


def _read(model: nn.Module, foreign: Foreign, name: str) -> tuple[Graft, Adapter]:
    whole = heads_beside(foreign)
    whole.refuse_strangers(model, base_modules(model))
    length = length_of(foreign)
    _refuse_others(model)
    recipe = Recipe((PrefixTuning(length=length, reparametrize=False, sites="attention"),))
    graft, adapter = prepare(
        model, recipe, name, head=whole.heads() or False, dtype=torch.float32, fresh=False
    )
    order = {id(here[0]): layer for layer, here in enumerate(_by_layer(model, adapter))}
    shape, width = foreign.file.entries[KEY].shape, (adapter.deltas[0].site.kv or (0, 0))[0]
    if shape != (length, 2 * len(order) * width):
        raise CheckpointError(
            f"{foreign.file.path}: {KEY} has shape {tuple(shape)}, this model's {len(order)} "
            f"layers need {(length, 2 * len(order) * width)}"
        )

    def give(delta: Delta, key: str) -> Tensor | None:
        if delta.replaces:
            return whole.value(f"{delta.site.path}.{key}")
        parts = foreign.take(KEY).float().split(width, 1)
        at = 2 * order[id(delta)]
        return _turned(model, delta, parts[at], -length) if key == "keys" else parts[at + 1]

    fill(adapter, foreign, give)
    return graft, adapter


# ------------------------------------------------------------------------------ where it is exact


def _refuse_others(model: nn.Module) -> None:
    """Raise CheckpointError for models in which peft's prefixes act otherwise."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    windows = getattr(text, "layer_types", None) or (
        ["a sliding window"] if getattr(text, "sliding_window", None) else []
    )
    window = next((kind for kind in windows if kind != "full_attention"), None)
    task, name = task_of(model), type(model).__name__
    why = ""
    if task == "SEQ_2_SEQ_LM" or len(sites(model).notes.stacks) > 1:
        why = "its prefix of an encoder-decoder reaches the decoder's own attention alone"
    elif task is None or not {"cache", "past_key_values"} & set(names(model)):
        why = f"it hands over a prefix as a cache of its tasks' models, and {name} takes none"
    elif window is not None:
        why = f"in {name} the text leaves a prefix behind by {window}"
    if why:
        raise _refusal(why)


def _refusal(why: str) -> CheckpointError:
    return CheckpointError(f"no prefix of peft's is equal here: {why}")


def _by_layer(model: nn.Module, adapter: Adapter) -> list[list[Delta]]:
    """The prefixes of each layer in order, all layers having some.

    Raises:
        CheckpointError: Peft's prefixes act otherwise in this model, or one layer has none.
    """
    _refuse_others(model)
    places = sites(model).whole
    layers = [site.layer for site in places if site.role == "block"]
    found: dict[int | None, list[Delta]] = {layer: [] for layer in layers}
    for delta in adapter.deltas:
        if not delta.replaces:
            found.setdefault(delta.site.layer, []).append(delta)
    lacking = [layer for layer, here in found.items() if not here]
    if lacking:
        raise _refusal(f"it has one in every layer, this adapter has none in layer {lacking[0]}")
    return list(found.values())


def _turned(model: nn.Module, delta: Delta, keys: Tensor, by: int) -> Tensor:
    """Keys (L, K) of one layer, turned by so many positions as the model turns its own."""
    width = _head_width(model, delta)
    rotary = _rotary(model)
    module = caller(base_modules(model), delta.site)[1]
    turn = inspect.unwrap(type(module).forward).__globals__[_TURN]
    heads = keys.float().unflatten(-1, (-1, width)).transpose(0, 1)[None]
    at = torch.tensor([[abs(by)]], device=keys.device)
    with torch.no_grad():
        cos, sin = (part / getattr(rotary, "attention_scaling", 1.0) for part in rotary(heads, at))
        found = turn(heads, heads, cos, sin if by > 0 else -sin)[1]
    return found[0].transpose(0, 1).flatten(1).to(keys.dtype)


def _rotary(model: nn.Module) -> Any:
    """The one module that gives a model its rotary embedding."""
    found = [m for m in base_modules(model).values() if hasattr(m, "inv_freq")]
    if len(found) != 1 or getattr(found[0], "rope_type", None) not in _STEADY:
        raise _refusal(
            "it counts the text's positions from the prefix's length on, which only one rotary "
            f"embedding for all lengths can take back; {type(model).__name__} has "
            + (f"{len(found)}, or a changing one" if found else "none")
        )
    return found[0]


def _head_width(model: nn.Module, delta: Delta) -> int:
    """D_h of an attention that turns all of its keys' numbers, as the model's rotary does."""
    rotary = _rotary(model)
    path, module = caller(base_modules(model), delta.site)
    forward = inspect.unwrap(type(module).forward)
    width = getattr(module, "head_dim", None)
    whole = width is not None and 2 * rotary.inv_freq.numel() == width
    if not whole or _TURN not in forward.__code__.co_names or not getattr(module, "use_rope", True):
        raise _refusal(
            f"it counts the text's positions from the prefix's length on, and {path} does not turn "
            "all of its keys by a rotary embedding, which could take that back"
        )
    return int(width)  # type: ignore[arg-type]


KIND = Kind(
    SIZES | {"encoder_hidden_size", "init_weights", "prefix_projection"},
    _fits,
    _write,
    _read,
    PROMPT_PREFIX,
)
