"""The attention port: keys and values of deltas, put before those of the text.

transformers sends the attention of nearly every model through one table of functions, under the
name that the attention module's config gives. While deltas that attend are live there, a stand-in
takes that config's place in the module (and there only, so that masks are made as ever); it gives
our name, and our function adds the keys, widens mask and bias, and calls the function that the
model would have called. All this happens outside the cache and after rotary embedding: positions,
caches, padding and generation are the model's own and know nothing of the extra keys.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier import hosts
from espalier.errors import SiteError
from espalier.fast.attention import in_training, suits

if TYPE_CHECKING:
    from espalier.deltas import Delta
    from espalier.graft import Graft
    from espalier.places import Site

NAME = "espalier"  # ours in the table
_TABLE, _EAGER = "ALL_ATTENTION_FUNCTIONS", "eager_attention_forward"


class StandIn:
    """Stands in for the config of one attention module and takes its calls."""

    _attn_implementation = NAME

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.config: Any = module.config
        scope, name = _scope(type(module))
        self.table, self.eager = scope[_TABLE], scope[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copying and pickling ask for these before there is a config
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.table.register(NAME, _attention)  # another process does not know the name

    def enter(self) -> None:
        """Take the config's place."""
        self.table.register(NAME, _attention)
        self.module.__dict__["config"] = self

    def leave(self) -> None:
        """Give the module its config back."""
        self.module.__dict__["config"] = self.config

    def own(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """What the model's own attention function gives."""
        name = self.config._attn_implementation
        if name == "sdpa" and (out := in_training(self.module, q, k, v, mask, kwargs)) is not None:
            return out, None
        function = self.table.get_interface(name, self.eager)
        if not self.flash:
            return function(self.module, q, k, v, mask, **kwargs)
        self.module.config = self.config  # where flash functions read the implementation's name
        try:
            return function(self.module, q, k, v, mask, **kwargs)
        finally:
            self.module.config = self  # type: ignore[assignment]

    @property
    def flash(self) -> bool:
        """Whether the model's own function is a flash attention, which knows no masks of scores."""
        return "flash" in (self.config._attn_implementation or "")

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """Attention (B, T, h, d_h) of queries (B, h, T, d_h) to keys and values; its shares."""
        raise NotImplementedError


class Batched(StandIn):
    """An attention without deltas, by batched products in training where they pay."""

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """Attention as the model's own."""
        return self.own(q, k, v, mask, kwargs)


class Attention(StandIn):
    """One attention module with the deltas that it attends to besides the text, by adapter."""

    def __init__(self, module: nn.Module, graft: Graft) -> None:
        super().__init__(module)
        self.graft = graft
        self.deltas: dict[str, list[Delta]] = {}

    def refresh(self) -> None:
        """Stand in while a delta here is live, and only then."""
        live = () if self.graft.merged else self.graft.live
        if any(weight and name in self.deltas for name, weight in live) or (live and self.batches):
            self.enter()
        else:
            self.leave()

    @property
    def batches(self) -> bool:
        """Whether it stands in also where no delta attends, to train faster."""
        return self.config._attn_implementation == "sdpa" and suits(self.module)

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """Attention to the live deltas' keys and the text's.

        An adapter's weight w multiplies the share of attention that its keys get before all
        shares are scaled to sum to 1: log w is added to their scores.
        """
        found = self._found(q, k, v)
        if found is None:
            return self.own(q, k, v, mask, kwargs)
        more, their, scores = found
        length, even = more.shape[2], scores is None
        self._refuse(q, length + k.shape[2], even, kwargs)
        keys, values = torch.cat([more, k], 2), torch.cat([their, v], 2)
        causal = mask is None and q.shape[2] > 1 and self._causal(kwargs)
        # A causal attention without a mask lets query i see keys 0 to i. So that query i of the
        # text sees as many more as there are extra ones, as many rows stand before it.
        rows = length if causal and even else 0
        if kwargs.get("position_bias") is not None:
            wider = F.pad(kwargs["position_bias"], (length, 0, rows, 0))
            kwargs = {**kwargs, "position_bias": wider}
        if mask is not None or not even:
            mask = _widened(mask, q, k, causal, length, scores)
        if not rows:
            return self.own(q, keys, values, mask, kwargs)
        out, shares = self.own(F.pad(q, (0, 0, rows, 0)), keys, values, mask, kwargs)
        return out[:, rows:], None if shares is None else shares[:, :, rows:]

    def _found(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """All extra keys and values, and what is added to their scores (… , L); None without any.

        The scores are None where nothing is added to any of them.
        """
        if self.graft.rows is not None:
            return self.graft.rows.attend(self, q, k, v)
        extra = list(self.extra(q, k, v))
        if not extra:
            return None
        keys = torch.cat([own for own, _, _ in extra], 2)
        values = torch.cat([own for _, own, _ in extra], 2)
        if all(weight == 1 for _, _, weight in extra):
            return keys, values, None
        logs = [q.new_full((own.shape[2],), math.log(weight)) for own, _, weight in extra]
        return keys, values, torch.cat(logs)

    def extra(self, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Keys and values (B, h_kv, L, d_h) of each live delta, and its adapter's weight."""
        for name, weight in self.graft.live:
            for delta in self.deltas.get(name, ()) if weight else ():
                x = delta.seen[str(delta.site.enter)].x if delta.watches else q
                delta.seen.clear()
                t = hosts.tensors(delta, k, self.module)
                keys, values = delta.attend(t, x, self.module.training)
                yield _heads(keys, k, delta), _heads(values, v, delta), weight

    def _causal(self, kwargs: dict[str, Any]) -> bool:
        stated = kwargs.get("is_causal")
        return getattr(self.module, "is_causal", True) if stated is None else stated

    def _refuse(self, q: Tensor, keys: int, even: bool, kwargs: dict[str, Any]) -> None:
        """Raise where the model's own function could not be told of the extra keys."""
        name, why = self.config._attn_implementation or "", ""
        if kwargs.get("cache") is not None:
            why = "extra keys do not fit into a paged cache"
        elif not even and (self.flash or name.startswith("flex")):
            why = "an adapter's weight other than 1, or for some rows only, changes scores, which "
            why += "this function hides"
        elif self.flash and keys > (kwargs.get("sliding_window") or keys):
            why = "its sliding window would hide the extra keys"
        elif self.flash and _packed(q, kwargs):
            why = "in packed texts it gives the extra keys to the first only"
        if why:
            raise SiteError(
                f"attention {name!r}: {why}; load the model with attn_implementation='sdpa'"
            )


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """What transformers finds under our name."""
    return module.config.call(query, key, value, attention_mask, kwargs)


def callers(modules: Mapping[str, nn.Module], places: Iterable[Site]) -> dict[str, nn.Module]:
    """The modules that compute attention through transformers' table, by path."""
    found = {}
    for site in places:
        if site.role in ("attention", "cross") and site.span:
            with suppress(SiteError):
                path, module = caller(modules, site)
                found[path] = module
    return found


def calls(module: nn.Module) -> bool:
    """Whether a module's forward computes attention through transformers' table."""
    return bool(_scope(type(module))[1]) and "config" in module.__dict__


def caller(modules: Mapping[str, nn.Module], site: Site) -> tuple[str, nn.Module]:
    """The module that computes a span's attention, with its path.

    Raises:
        SiteError: It does not go through transformers' table, or is no attention at all.
    """
    path = str(site.enter)
    if site.role not in ("attention", "cross"):
        raise SiteError(
            f"{site.role!r} at {site.path} is no whole attention, so nothing there has keys and "
            "values; select 'attention', 'cross' or 'all-attention'"
        )
    while path := path.rpartition(".")[0]:
        if calls(modules[path]):
            return path, modules[path]
    owner = type(modules[str(site.enter).rpartition(".")[0]]).__name__
    raise SiteError(
        f"{owner} ({site.enter}) computes its attention itself, not by transformers' table of "
        "attention functions, so no keys can be put before its own; leave it out of `sites`"
    )


def _scope(owner: type) -> tuple[dict[str, Any], str]:
    """The globals of a class's forward and its eager function's name there; "" if it has none."""
    forward: Callable[..., Any] | None = inspect.unwrap(getattr(owner, "forward", len))
    code = getattr(forward, "__code__", None)
    names = () if code is None or _TABLE not in code.co_names else code.co_names
    eager = next((name for name in names if name.endswith(_EAGER)), "")
    return getattr(forward, "__globals__", {}), eager


def _heads(rows: Tensor, text: Tensor, delta: Delta) -> Tensor:
    """Rows (1 or B, L, h_kv·d_h) as heads (B, h_kv, L, d_h), as the text's."""
    batch, heads, _, width = text.shape
    if rows.shape[-1] != heads * width:
        raise SiteError(
            f"{type(delta).__name__} at {delta.site.path} brings keys or values of "
            f"{rows.shape[-1]} numbers where the text's have {heads} heads of {width}"
        )
    split = rows.to(text.dtype).unflatten(-1, (heads, width))
    return split.transpose(1, 2).expand(batch, -1, -1, -1)


def _widened(
    mask: Any, q: Tensor, k: Tensor, causal: bool, length: int, scores: Tensor | None
) -> Any:
    """The mask with columns for the extra keys; the given one stays.

    All queries see them, or by `scores` (L,) or (B, 1, 1, L), which are added to theirs.
    """
    if mask is None:
        seen = q.new_ones(q.shape[2], k.shape[2], dtype=torch.bool)
        mask = (seen.tril() if causal else seen)[None, None]
    if not isinstance(mask, Tensor):
        return _widened_blocks(mask, length)
    if scores is None:
        seen = mask.new_full((), 0 if mask.is_floating_point() else 1)
        return torch.cat([seen.expand(*mask.shape[:-1], length), mask], -1)
    if mask.dtype == torch.bool:
        hidden = torch.finfo(q.dtype).min
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, hidden)
    mask = mask.expand(len(scores), *mask.shape[1:]) if scores.dim() > 1 else mask
    columns = scores.to(mask.dtype).expand(*mask.shape[:-1], length)
    return torch.cat([columns, mask], -1)


def _widened_blocks(mask: Any, length: int) -> Any:
    """A flex attention's BlockMask with columns before its own."""
    from torch.nn.attention.flex_attention import create_block_mask

    own = mask.mask_mod
    batch, heads, queries, keys = mask.shape

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k < length) | own(b, h, q, (k - length).clamp(min=0))

    size = mask.BLOCK_SIZE
    device = mask.kv_num_blocks.device
    return create_block_mask(visible, batch, heads, queries, keys + length, device, size)


def _packed(q: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether several texts stand in one row, as flash attention may be told."""
    positions = kwargs.get("position_ids")
    if kwargs.get("cu_seq_lens_q") is not None:
        return True
    if not isinstance(positions, Tensor) or len(q) > 1 or q.shape[2] == 1:
        return False
    return bool((positions.diff(dim=-1) != 1).any())
