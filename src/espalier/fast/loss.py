"""Cross-entropy over chunks of the vocabulary product: logits never exist whole.

The head runs on a few hundred rows of hidden states at a time. From these logits come at once the
loss and its slope, and through the head the gradient of the hidden states and of whatever trains in
it: all gradients are made in the forward pass, and logits are gone when the next chunk is computed.
Kept for backward are gradients alone, one as large as the hidden states and one for each tensor of
the head that trains. The head may be anything that treats every row by itself: a frozen weight, one
with deltas, a trained copy. Sums over the vocabulary are taken in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Measured on a CPU, widths of 256 to 2048 and 8,000 to 256,000 words: fewer rows make the products
# slow, more save nothing.
ROWS, NUMBERS = 256, 1 << 22
GPU_NUMBERS = 1 << 26  # a GPU needs larger products; an assumption, not measured


def chunked_sum(
    run: Callable[[Tensor], Tensor],
    hidden: Tensor,
    labels: Tensor,
    width: int,
    trained: Sequence[Tensor] = (),
    smoothing: float = 0.0,
) -> Tensor:
    """The summed cross-entropy of the logits run(hidden), a scalar of at least fp32.

    Args:
        run: Gives logits (1, n, V) for hidden states (1, n, D), each row by itself.
        hidden: (N, D).
        labels: (N,), ids of words; none is to be ignored.
        width: V.
        trained: The tensors besides its input that `run` needs gradients for.
        smoothing: The share of the target that is spread over all words.
    """
    plan = _Plan(run, width, smoothing, torch.is_grad_enabled())
    return _Sum.apply(hidden, labels, plan, *trained)  # type: ignore[return-value]


def rows_at_once(width: int, device: torch.device) -> int:
    """How many rows a chunk has, for so many words."""
    numbers = NUMBERS if device.type == "cpu" else GPU_NUMBERS
    return max(ROWS, numbers // max(width, 1))


@dataclass(slots=True)
class _Plan:
    run: Callable[[Tensor], Tensor]
    width: int
    smoothing: float
    sloped: bool  # whether gradients are wanted


class _Sum(torch.autograd.Function):
    """(hidden, labels, plan, trained…) → the sum of the losses; the gradients are ready then."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, plan: _Plan, *trained: Tensor) -> Tensor:
        needs, _, _, *wanted = ctx.needs_input_grad
        numbers = [t for t, want in zip(trained, wanted, strict=True) if want and plan.sloped]
        sums: list[Tensor | None] = [None] * len(numbers)
        slope = torch.empty_like(hidden) if needs and plan.sloped else None
        nats = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        rows = rows_at_once(plan.width, hidden.device)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            x = hidden[part].detach()
            found = _chunk(x, labels[part], plan, nats[part], slope is not None, numbers)
            if slope is not None:
                gradient = found.pop(0)
                slope[part] = 0 if gradient is None else gradient
            for index, gradient in enumerate(found):
                sums[index] = _added(sums[index], gradient)
        ctx.wanted = wanted
        ctx.save_for_backward(slope, *sums)
        return nats.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        slope, *sums = (None if s is None else _times(s, g) for s in ctx.saved_tensors)
        rest = iter(sums)
        return slope, None, None, *(next(rest) if want else None for want in ctx.wanted)


def _chunk(
    x: Tensor,
    labels: Tensor,
    plan: _Plan,
    nats: Tensor,
    needs: bool,
    numbers: Sequence[Tensor],
) -> list[Tensor | None]:
    """Fills in the losses of a chunk; the gradients of its x (n, D), if needed, and the numbers."""
    if not needs and not numbers:
        logits = plan.run(x[None])[0]
        _slope(logits, labels, torch.empty_like(logits), nats, plan.smoothing)
        return []
    held = {x.untyped_storage()._cdata}

    def keep(tensor: Tensor) -> Tensor:
        held.add(tensor.untyped_storage()._cdata)
        return tensor

    # Nobody else's hooks: what this graph keeps is used at once, there is nothing to move or count.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, _same):
        x.requires_grad_(needs)
        logits = plan.run(x[None])
    own = logits.data  # no version of it is kept: what nobody holds may be written over
    spare = not own.is_cuda and own.is_contiguous() and own.untyped_storage()._cdata not in held
    into = own if spare else torch.empty_like(own, memory_format=torch.contiguous_format)
    _slope(own[0], labels, into[0], nats, plan.smoothing)
    wanted = [x, *numbers] if needs else [*numbers]
    return list(torch.autograd.grad(logits, wanted, into, allow_unused=True))


def _slope(logits: Tensor, labels: Tensor, into: Tensor, nats: Tensor, smoothing: float) -> None:
    """Losses (n,) of the logits (n, V), and their slopes, which may take the logits' own place.

    The softmax is rounded to the logits' type, as their gradient must be. Its largest share p, by
    which the sum of exponentials is known, is so taken from the other shares where it is near 1:
    the loss of a word that is all but certain has the precision of its own size.
    """
    width, wide, at = logits.shape[1], nats.dtype, labels[:, None]
    right = logits.gather(1, at)[:, 0].to(wide)
    mean = logits.mean(1, dtype=wide) if smoothing else right
    top = logits.amax(1).to(wide)
    torch.softmax(logits, 1, out=into)
    most = into.amax(1).to(wide)
    others = into.sum(1, dtype=wide).sub_(most)
    total = top - torch.where(most > 0.5, torch.log1p(-others), most.log())
    nats.copy_(total - torch.lerp(right, mean, smoothing))
    if smoothing:
        into.sub_(smoothing / width)
    slope = torch.expm1(right - total).add_(smoothing - smoothing / width)
    into[torch.arange(len(labels), device=labels.device), labels] = slope.to(into.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _times(gradient: Tensor, g: Tensor) -> Tensor:
    """The product with a scalar, which is not rounded to the gradient's type before."""
    return (gradient.to(g.dtype) * g).to(gradient.dtype)


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    if more is None:
        return total
    return more.contiguous() if total is None else total.add_(more)


def _same(tensor: Tensor) -> Tensor:
    return tensor
