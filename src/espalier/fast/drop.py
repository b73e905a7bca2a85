"""Dropout that keeps a seed and no mask; what reads the same tensor shares one.

On a CPU torch draws a number for each decision, and keeps a mask as large as x: the mask made here,
four decisions of one draw, takes a sixth of the time, so that it may be made twice.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SMALL = 1 << 16  # numbers below which making the generator costs more than is saved
_STEPS = 1 << 15
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Drop:
    """Draws a seed for each tensor that is dropped, and remembers the latest, and its mask.

    The linears that read one tensor come one after another, forward and backward: they share a
    mask, which is made once each way.
    """

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._seed = 0
        self._asked: set[object] = set()
        self._key: object = None
        self._keeps: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Drop:
        return Drop()

    def __reduce__(self) -> tuple[type[Drop], tuple[()]]:
        return Drop, ()

    def seed(self, x: Tensor, asker: object) -> int:
        """The seed of x's mask; drawn from torch's own generator unless x was the latest.

        Whoever asks for it again, in another pass, gets another.
        """
        if self._of is None or self._of() is not x or asker in self._asked:
            self._of = weakref.ref(x)
            self._asked = set()
            self._seed = drawn()
        self._asked.add(asker)
        return self._seed

    def __call__(self, x: Tensor, share: float, seed: int) -> Tensor:
        """X (…) with a share of its numbers set to zero and the rest scaled up; x stays."""
        if not share:
            return x
        key = (seed, share, x.shape, x.device)
        if self._keeps is None or self._key != key:
            self._key, self._keeps = key, keeps(x, share, seed)
        return left(x, self._keeps).mul_(gain(share))

    def rest(self) -> None:
        """Forget the latest mask."""
        self._key = self._keeps = None


class _Dropped(torch.autograd.Function):
    """(x, share, seed) → x with a share of its numbers set to zero and the rest scaled up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float, seed: int) -> Tensor:
        ctx.how = share, seed
        return _drop(x, share, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _drop(g, *ctx.how), None, None


def _drop(x: Tensor, share: float, seed: int) -> Tensor:
    return left(x, keeps(x, share, seed)).mul_(gain(share))


def dropped(x: Tensor, share: float) -> Tensor:
    """X (…) with a share of its numbers set to zero and the rest scaled up; keeps a seed."""
    return _Dropped.apply(x, share, drawn())  # type: ignore[return-value]


def drawn() -> int:
    """A seed, from torch's own generator: checkpoints and resumed runs draw the same again."""
    seed = torch.randint(1 << 32, (), device="cpu")
    return int(seed) if type(seed) is Tensor else 0  # a plan's tensors have no values


def gain(share: float) -> float:
    """What the numbers that stay are multiplied with."""
    return _STEPS / _kept(share)


def left(x: Tensor, keeps: Tensor) -> Tensor:
    """X (…) with zeros where a mask, −1 or 0, says so; x stays."""
    return (x.contiguous().view(_BITS[x.element_size()]) & keeps).view(x.dtype)


def keeps(x: Tensor, share: float, seed: int) -> Tensor:
    """−1 where a number stays, else 0; one draw of 64 bits decides four, to 1/32768 of a share."""
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    # `random_` leaves the highest bit 0, and each of the four its own: 15 bits are asked for.
    bits = draws.random_(generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    return bits.bitwise_and_(_STEPS - 1).sub_(_kept(share)).bitwise_right_shift_(15)


def _kept(share: float) -> int:
    return max(1, round((1 - share) * _STEPS))
