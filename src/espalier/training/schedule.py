"""The course of a run in steps: how many there are, and the learning rate at each.

    factor(s) = (s + 1) / w                              in the warm-up, s < w
                1 - p | (1 + cos πp) / 2 | 1             after it, p = (s - w) / (S - w)

for step s of S counted from 0 and w warm-up steps. The rate is a function of the step alone, so
that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math


def total_steps(epochs: float, steps: int | None, per_epoch: int) -> int:
    """Optimiser steps of the whole run: `steps` when given, else `epochs` passes."""
    return steps if steps is not None else max(1, math.ceil(epochs * per_epoch - 1e-9))


def warmup_steps(warmup: float, total: int) -> int:
    """Warm-up in steps, from a share of the run (below 1) or a number of steps."""
    return round(warmup * total) if warmup < 1 else int(warmup)


def factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of the highest learning rate to use at `step` (0 .. total-1); never 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
