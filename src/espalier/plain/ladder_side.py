"""Narrow copies of a stack's blocks, and what they are given when they run.

A side block is of the trunk block's own class, made from its configuration with smaller widths: the
stream's divided by r, the feed-forward's and (where it is a number of its own) the heads' divided
by r and rounded up, as many heads as before. It holds no numbers: they come with each call.
"""

from __future__ import annotations

import inspect
import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from espalier.attention import Batched, calls
from espalier.deltas import Call
from espalier.errors import AdapterError, SiteError
from espalier.routes import names

# Names that configurations give to widths besides the stream's, which transformers maps itself.
_FFN = (
    *("intermediate_size", "d_ff", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "n_inner"),
    *("hidden_dim", "ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
)
_HEAD = ("head_dim", "d_kv", "rotary_dim")
_HEADS_SAY = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")
_LAYER = ("layer_idx", "layer_id", "layer_index", "block_idx", "idx")
# What blocks are given that is as wide as the trunk, besides states and angles.
_WIDE = (
    *("rel_embeddings", "freqs_cis", "object_queries_position_embeddings"),
    *("spatial_position_embeddings", "per_layer_input", "output_g"),
)
# What the first block of a stack makes for those after it, and its place among what a block gives.
_HANDED_ON = {"position_bias": 1, "encoder_decoder_position_bias": 2}


def width_of_heads(block: nn.Module) -> int | None:
    """How wide a head of the block's attention is."""
    for module in block.modules():
        for name in _HEADS_SAY:
            if isinstance(width := module.__dict__.get(name), int):
                return width
    return None


def config_of(modules: Mapping[str, nn.Module], path: str) -> Any:
    """The configuration that a block was made from. Raises SiteError where there is none."""
    around = path
    while around:
        around = around.rpartition(".")[0]
        config = getattr(modules[around], "config", None)
        if hasattr(config, "to_dict"):
            return config
    raise SiteError(f"{path} stands in no model of transformers with a configuration")


def narrowed(config: Any, path: str, block: nn.Module, reduction: int) -> Any:
    """A copy of the configuration with smaller widths, and without dropout of attention.

    Raises:
        SiteError: The stream's width cannot be divided so; says by what it can.
    """
    wide, heads = int(config.hidden_size), _heads(config, block)
    fits = [r for r in range(2, wide + 1) if wide % r == 0 and wide // r % heads == 0]
    if reduction not in fits:
        over = f" and split over {heads} heads" if heads > 1 else ""
        raise SiteError(
            f"reduction={reduction} does not divide the width {wide} of {path}{over}; reductions "
            f"that do: {', '.join(map(str, fits)) or 'none'}"
        )
    small = deepcopy(config)
    small.hidden_size = wide // reduction
    for name in (*_FFN, *_HEAD):
        value = config.__dict__.get(name)
        if isinstance(value, int) and name != config.attribute_map.get("hidden_size"):
            even = name in _HEAD and value % 2 == 0  # halves of a head turn against each other
            setattr(small, name, _divided(value, reduction, 2 if even else 1))
    for name in (*small.__dict__, *small.attribute_map):
        # Scores (h, T, T) are as large as the trunk's, and dropping some keeps all for backward.
        if re.search(r"(attention|attn).*drop", name):
            setattr(small, name, 0.0)
    return small


def _heads(config: Any, block: nn.Module) -> int:
    """Into how many heads the stream's width is split; 1 where their width is a number apart."""
    if any(isinstance(config.__dict__.get(name), int) for name in _HEAD[:2]):
        return 1
    head = width_of_heads(block)
    return 1 if head is None else int(config.hidden_size) // head


def _divided(value: int, by: int, step: int) -> int:
    """The quotient, rounded up to a multiple of `step`."""
    return -(-value // (by * step)) * step


def made(
    block: nn.Module, first: nn.Module | None, config: Any, layer: int, path: str
) -> nn.Module:
    """A block like this one from a narrower configuration, on the current default device.

    Args:
        block: The trunk's.
        first: The stack's first block, for the first side block, which makes what that one makes.
        config: The narrower configuration.
        layer: The block's number.
        path: Where it stands.

    Raises:
        SiteError: The class is not made from a configuration, or not at these widths.
    """
    kind, given = type(block), {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        own = _attribute(block, name)
        if name == "config":
            given[name] = config
        elif name in _LAYER:
            given[name] = layer
        elif isinstance(own, bool | int | float | str):
            also = first is not None and isinstance(own, bool) and _attribute(first, name)
            given[name] = bool(own or also) if isinstance(own, bool) else own
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            raise SiteError(f"{path}: how {kind.__name__} is made at another width is not known")
    if "config" not in given:
        raise SiteError(f"{path}: {kind.__name__} is not made from a configuration")
    try:
        return kind(**given)
    except (ValueError, RuntimeError, TypeError) as error:
        raise SiteError(f"{path}: {kind.__name__} cannot be made narrower: {error}") from error


def _attribute(block: nn.Module, name: str) -> Any:
    return next((m.__dict__[name] for m in block.modules() if name in m.__dict__), None)


def narrow_norm(norm: nn.Module, width: int) -> nn.Module:
    """A norm like this one over `width` numbers, without numbers of its own."""
    small: Any = copy(norm)
    for name in ("forward", *norm._parameters):  # a seat, and trained copies that stand in
        small.__dict__.pop(name, None)
    small._forward_hooks, small._forward_pre_hooks = OrderedDict(), OrderedDict()
    small._parameters = {
        name: None if p is None else nn.Parameter(torch.empty(width, device="meta"))
        for name, p in norm._parameters.items()
    }
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (width,)
    return small


class SideBlock:
    """One narrow block: its structure, and how it is called as the trunk's block was.

    Args:
        module: The block, whose parameters give shapes alone.
        head: Widths of a head here and in the trunk.
        prefix: Before the names of its numbers among the ladder's.
    """

    def __init__(self, module: nn.Module, head: tuple[int, int], prefix: str) -> None:
        self.buffers = dict(module.named_buffers())
        self.module = module.to("meta").requires_grad_(False).eval()
        self.shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        self.keys = {name: prefix + name for name in self.shapes}
        self.owners: dict[str, tuple[nn.Module, str]] = {}  # the module of each number, its name
        for name in (*self.keys, *self.buffers):
            path, _, own = name.rpartition(".")
            self.owners[name] = (module.get_submodule(path), own)
        self.takes = names(module)
        self.head = head
        inner = list(module.modules())
        for attention in filter(calls, inner):
            Batched(attention).enter()
        self.counted = [(m, name) for m in inner for name in _LAYER if name in m.__dict__]
        if wide := [name for name in self.takes if name in _WIDE]:
            raise SiteError(
                f"{type(module).__name__} is given {wide[0]}, as wide as the trunk, which no "
                "narrower block can read"
            )

    def turned(self, owner: str) -> bool:
        """Whether a layer keeps its weight as (in, out); the trunk's, in few bits, may not."""
        return not isinstance(self.module.get_submodule(owner), nn.Linear)

    def run(
        self, t: Mapping[str, Tensor], call: Call, v: Tensor, instead: Mapping[str, Any], at: int
    ) -> Any:
        """What the block gives for v (B, T, d/r).

        Args:
            t: The ladder's numbers.
            call: The trunk block's call.
            v: The input.
            instead: Arguments that differ from those of the trunk's, by name.
            at: Where in the cache its keys lie.
        """
        given = {**dict(zip(self.takes, call.args, strict=False)), **call.kwargs, **instead}
        given[self.takes[0]] = v
        if given.get("position_embeddings") is not None:
            given["position_embeddings"] = self._angles(given["position_embeddings"])
        for module, name in self.counted:
            if getattr(module, name) != at:
                setattr(module, name, at)
        held = {name: t[key] for name, key in self.keys.items()}
        held.update({name: b.to(v.device) for name, b in self.buffers.items()})
        if torch.compiler.is_compiling():
            return functional_call(self.module, held, (), given)
        try:  # the same, without its search for tied parameters in every call
            for name, tensor in held.items():
                owner, own = self.owners[name]
                owner.__dict__[own] = tensor
            return self.module(**given)
        finally:
            for owner, own in self.owners.values():
                owner.__dict__.pop(own, None)

    def _angles(self, given: Any) -> Any:
        """Cosines and sines (…, R) of the frequencies that the narrow heads have."""
        if not isinstance(given, Tensor):
            return tuple(self._angles(part) for part in given)
        small, wide = self.head
        half = given.shape[-1] // 2
        kept = spread(half, max(1, half * small // wide), given.device)
        return given[..., torch.cat((kept, half + kept))]


def spread(count: int, kept: int, device: torch.device | None = None) -> Tensor:
    """Places of `kept` out of `count`, as far apart as can be; every r-th where r divides."""
    return torch.arange(kept, device=device) * count // kept


def handed_on(trunk: Call, takes: Sequence[str], last: Any) -> dict[str, Any]:
    """What the side's first block made for those after it, in place of the trunk's.

    Args:
        trunk: The call of the trunk's first block, which was given none if it makes them.
        takes: The names of what blocks take.
        last: What the side block before gave; None at the first.
    """
    given = {**dict(zip(takes, trunk.args, strict=False)), **trunk.kwargs}
    handed: dict[str, Any] = {}
    for name, at in _HANDED_ON.items():
        if name in takes and given.get(name) is None:
            handed[name] = last[at] if isinstance(last, tuple) and len(last) > at else None
    return handed


def places_in(cache: Any, mark: str, kept: Sequence[int], tokens: int) -> int:
    """Where in a cache the keys of the side blocks lie: the first one's index.

    They lie behind the trunk's in the same cache, so that beams, crops and copies take them along.

    Args:
        cache: The trunk's, which its blocks have filled already.
        mark: Tells this ladder's layers from others'.
        kept: The numbers of the trunk blocks beside which side blocks stand.
        tokens: How many tokens this pass brings.

    Raises:
        AdapterError: The cache is of fixed size, or holds a text that the side never saw.
    """
    parts = [cache]
    if hasattr(cache, "self_attention_cache"):
        parts = [cache.self_attention_cache, cache.cross_attention_cache]
    layers = parts[0].layers
    for at, layer in enumerate(layers):
        if getattr(layer, "espalier", None) == mark:
            return at
    if layers[kept[0]].get_seq_length() > tokens:
        raise AdapterError(
            "the cache holds a text that was read without this ladder beside the model; start "
            "with a new cache"
        )
    start = len(layers)
    for part in parts:
        while len(part.layers) < start:
            part.layers.append(_like(part.layers[0], ""))
        part.layers.extend([_like(part.layers[at], mark) for at in kept])
    return start


def _like(layer: Any, mark: str) -> Any:
    """An empty layer of a cache, of the same kind."""
    kind = type(layer).__name__
    if kind not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
        raise AdapterError(
            f"a ladder keeps its keys in the model's cache, and cannot in one with {kind}s; "
            "generate with the default cache (no cache_implementation)"
        )
    window = (layer.sliding_window,) if layer.is_sliding else ()
    new = type(layer)(*window)
    new.espalier = mark
    return new


def buffered(blocks: Iterable[SideBlock], device: torch.device) -> None:
    """Move what side blocks hold besides trained numbers to a device."""
    for block in blocks:
        block.buffers = {name: b.to(device) for name, b in block.buffers.items()}
