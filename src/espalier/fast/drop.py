"""Dropout that keeps a seed and no mask; what reads the same tensor shares one."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

_STEPS = 1 << 15


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
            self._seed = int(torch.randint(1 << 62, ()))
        self._asked.add(asker)
        return self._seed

    def __call__(self, x: Tensor, share: float, seed: int) -> Tensor:
        """X (…) with a share of its numbers set to zero and the rest scaled up; x stays."""
        if not share:
            return x
        kept = max(1, round((1 - share) * _STEPS))
        key = (seed, kept, x.shape, x.device)
        if self._keeps is None or self._key != key:
            self._key, self._keeps = key, _keeps(x, kept, seed)
        if x.element_size() == 2:
            left = (x.contiguous().view(torch.int16) & self._keeps).view(x.dtype)
        else:
            left = x * self._keeps.neg()
        return left.mul_(_STEPS / kept)

    def rest(self) -> None:
        """Forget the latest mask."""
        self._key = self._keeps = None


def _keeps(x: Tensor, kept: int, seed: int) -> Tensor:
    """−1 where a number stays, else 0; one draw of 64 bits decides four, to 1/32768 of a share."""
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    # `random_` leaves the highest bit 0, and each of the four its own: 15 bits are asked for.
    bits = draws.random_(generator=generator).view(torch.int16)[: x.numel()].view(x.shape)
    return bits.bitwise_and_(_STEPS - 1).sub_(kept).bitwise_right_shift_(15)
