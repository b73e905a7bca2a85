"""Attention as batched products, on a CPU, for bf16 and for dropout.

    O = drop(softmax(s · Q Kᵀ + M)) V,   Q (B, h, T, d), K and V (B, h_kv, S, d),
                                         M (T, S) or (B, 1, T, S)

In bf16 they take half of a flash kernel's time, and a fifth of it for narrow heads. With dropout
torch has no flash kernel there: it keeps shares, mask and what is left for backward.

Queries are taken in blocks: a causal block meets no keys after its last query, and no matrix is
larger than a block's scores. Backward keeps Q, K and V and makes the shares again. Scores are
rounded to the type of Q, as in transformers' eager attention.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from espalier.fast import drop
from espalier.fast.switch import enabled, ordinary

_KNOWN = frozenset(("scaling", "dropout", "is_causal", "sliding_window", "position_ids"))

BLOCK = 256  # queries


class _How(NamedTuple):
    """The factor s on scores, whether queries see no later key, the share dropped and its seed."""

    scale: float
    causal: bool
    dropout: float = 0.0
    seed: int = 0

    def keeps(self, shares: Tensor, rows: slice) -> Tensor:
        """Which shares of a block of queries dropout leaves."""
        return drop.keeps(shares, self.dropout, self.seed + rows.start)


class _Batched(torch.autograd.Function):
    """(q, keys, values) → (B, T, h, d)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *how: Any
    ) -> Tensor:
        ctx.save_for_backward(q, keys, values, mask)
        ctx.how = how
        with torch.autocast("cpu", enabled=False):  # as in backward
            return _attend(q, keys, values, mask, *how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_back(g, *ctx.saved_tensors, *ctx.how), *[None] * (1 + len(ctx.how))


def _attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *given: Any) -> Tensor:
    """What queries (B, h, T, d) take from keys and values (B·h_kv, S, d): (B, T, h, d)."""
    how = _How(*given)
    batch, heads, length, _ = q.shape
    out = q.new_empty(batch, length, heads, values.shape[-1])
    for rows, seen in _blocks(length, keys.shape[1], how.causal):
        shares = _shares(q, keys, mask, how, rows, seen)
        if how.dropout:
            shares = drop.left(shares, how.keeps(shares, rows))
        block = torch.bmm(shares, values[:, :seen])
        out[:, rows] = _apart(block, q, rows).transpose(1, 2)
    return out.mul_(drop.gain(how.dropout)) if how.dropout else out


def _back(
    g: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *given: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, keys and values for that of the result, g (B, T, h, d)."""
    how, heads = _How(*given), len(keys) // len(q)
    g = g * drop.gain(how.dropout) if how.dropout else g
    dq = torch.empty_like(q)
    dk = dv = None
    for rows, seen in reversed(list(_blocks(q.shape[2], keys.shape[1], how.causal))):
        shares = _shares(q, keys, mask, how, rows, seen)
        go = _together(g[:, rows].transpose(1, 2), heads)
        gs = torch.bmm(go, values[:, :seen].transpose(1, 2))
        taken = shares
        if how.dropout:
            keeps = how.keeps(shares, rows)
            taken, gs = drop.left(shares, keeps), drop.left(gs, keeps)
        more = torch.bmm(go.transpose(1, 2), taken).transpose(1, 2)
        gs = torch._softmax_backward_data(gs, shares, -1, shares.dtype)
        more_k = torch.bmm(_together(q[:, :, rows], heads).transpose(1, 2), gs).transpose(1, 2)
        if dk is None or dv is None:  # the last block: it has seen every key
            dk, dv = more_k, more
        else:
            dk[:, :seen] += more_k
            dv[:, :seen] += more
        dq[:, :, rows] = _apart(torch.bmm(gs, keys[:, :seen]).mul_(how.scale), q, rows)
    assert dk is not None
    assert dv is not None
    return dq, dk.mul_(how.scale), dv


# For torch.compile the same is two operations: a loop over blocks would be unrolled for one length.
_GIVEN = "Tensor q, Tensor keys, Tensor values, Tensor? mask, float scale, bool causal"
_op = torch.library.custom_op(
    "espalier::attend", _attend, mutates_args=(), schema=f"({_GIVEN}) -> Tensor"
)
_back_op = torch.library.custom_op(
    "espalier::attend_back",
    _back,
    mutates_args=(),
    schema=f"(Tensor g, {_GIVEN}) -> (Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], values.shape[-1])


@_back_op.register_fake
def _(g: Tensor, q: Tensor, keys: Tensor, values: Tensor, *_: Any) -> tuple[Tensor, ...]:
    turned = (
        x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2) for x in (keys, values)
    )
    return torch.empty_like(q), *turned


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.how = inputs[4:]


def _graded(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return *_back_op(g, *ctx.saved_tensors, *ctx.how), None, None, None


_op.register_autograd(_graded, setup_context=_keep)


def suits(module: nn.Module) -> bool:
    """Whether an attention computes where batched products pay: on a CPU, bf16 or dropout."""
    own = next(module.parameters(), None)
    if own is None or own.device.type != "cpu":
        return False
    return own.dtype == torch.bfloat16 or (own.dtype == torch.float32 and _drops(module))


def _drops(module: nn.Module) -> bool:
    """Whether an attention has a dropout, as a module or a number of its own."""
    own = {**module.__dict__, **module._modules}
    return any(
        value.p > 0 if isinstance(value, nn.Dropout) else isinstance(value, float) and value > 0
        for name, value in own.items()
        if "drop" in name
    )


def in_training(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, given: Mapping[str, Any]
) -> Tensor | None:
    """What transformers' sdpa attention would give, (B, T, h, d); None where it had better."""
    if not enabled():
        return None
    if not (torch.is_grad_enabled() or module.training):  # reentrant checkpoints start without
        return None
    given = {name: value for name, value in given.items() if value is not None}
    odd = any(value is not False and name not in _KNOWN for name, value in given.items())
    dropout = given.get("dropout", 0.0)
    if odd or q.device.type != "cpu" or (dropout and torch.compiler.is_compiling()):
        return None
    if q.dtype != torch.bfloat16 and not (dropout and q.dtype == torch.float32):
        return None
    shares = q.shape[:3].numel() * k.shape[2]
    if dropout and (dropout >= 1 or shares < drop.SMALL or not ordinary(q)):
        return None
    causal = given.get("is_causal", getattr(module, "is_causal", True))
    causal = bool(causal) and mask is None and q.shape[2] > 1
    if (causal and q.shape[2] != k.shape[2]) or k.shape[-1] != v.shape[-1]:
        return None
    if mask is not None and not _one_for_all_heads(mask, q.dtype):
        return None
    return batched(q, k, v, mask, given.get("scaling", q.shape[-1] ** -0.5), causal, dropout)


def batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of queries (B, h, T, d) to keys and values (B, h_kv, S, d): (B, T, h, d).

    Args:
        q: The queries.
        k: The keys; each head of them serves h / h_kv heads of queries.
        v: The values.
        mask: Added to the scores, or True where a key is seen: (1 or B, 1, 1 or T, S).
        scale: What scores are multiplied with.
        causal: Query i sees the keys 0 to i; T is S then.
        dropout: Share of the shares that is set to zero; not while compiling.
    """
    compiling = torch.compiler.is_compiling()
    blind = None  # queries that see no key: they take nothing
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        blind = mask.amax(-1, keepdim=True) == -torch.inf
        if compiling or (type(mask) is Tensor and bool(blind.any())):  # a plan's has no values
            mask = mask.masked_fill(blind, 0)
        else:
            blind = None
    given = q.contiguous(), _flat(k), _flat(v), mask, scale, causal
    if compiling:
        out: Any = _op(*given)
    else:
        out = _Batched.apply(*given, dropout, drop.drawn() if dropout else 0)
    return out if blind is None else out.masked_fill(blind.transpose(1, 2), 0)


def _one_for_all_heads(mask: Any, dtype: torch.dtype) -> bool:
    """Whether a mask is one that `batched` adds: of these scores' type or bool, and frozen."""
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        return False
    return mask.dtype in (torch.bool, dtype) and not mask.requires_grad


def _blocks(queries: int, keys: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Ranges of queries, and how many keys they can see."""
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        yield slice(start, stop), stop if causal else keys


def _shares(
    q: Tensor, keys: Tensor, mask: Tensor | None, how: _How, rows: slice, seen: int
) -> Tensor:
    """What a block of queries takes of each key it can see: (B·h_kv, h/h_kv · rows, seen)."""
    batch, heads = len(q), len(keys) // len(q)
    queries = _together(q[:, :, rows], heads)
    count = rows.stop - rows.start
    if how.causal:
        added = _later(count, seen, q.shape[1] // heads, q.dtype)
    elif mask is not None:
        part = mask if mask.shape[2] == 1 else mask[:, :, rows]
        part = part.expand(batch, heads, count, seen).repeat(1, 1, q.shape[1] // heads, 1)
        added = part.flatten(0, 1)
    else:
        return torch.bmm(queries, keys.transpose(1, 2)).mul_(how.scale).softmax(-1)
    scores = torch.baddbmm(added, queries, keys[:, :seen].transpose(1, 2), alpha=how.scale)
    return scores.softmax(-1)


@functools.lru_cache(8)
def _later(queries: int, keys: int, times: int, dtype: torch.dtype) -> Tensor:
    """−∞ where the last `queries` of `keys` positions would look ahead, else 0; so many times."""
    hidden = torch.full((queries, keys), -torch.inf, dtype=dtype)
    return hidden.triu_(keys - queries + 1).repeat(times, 1)


def _flat(x: Tensor) -> Tensor:
    """(B, h, S, d) as (B·h, S, d)."""
    return x.reshape(-1, *x.shape[2:])


def _together(q: Tensor, heads: int) -> Tensor:
    """Heads of queries (B, h, T, d) that share one of `heads` of keys in one matrix each."""
    return q.reshape(len(q) * heads, -1, q.shape[-1])


def _apart(block: Tensor, q: Tensor, rows: slice) -> Tensor:
    """The inverse of `_together`, for a block of queries: (B, h, rows, d)."""
    return block.view(len(q), q.shape[1], rows.stop - rows.start, -1)
