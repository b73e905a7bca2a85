"""How many CPU threads to train with: probed for about a second.

On shared machines two threads can be far slower than one, and more threads than free cores make
each of them wait. The probe computes a small matrix product with its backward pass at the model's
width, numbers of threads taking turns so that a busy moment hurts all alike. What counts is the
time that three rounds in four stay below: the best one is that of a moment when nobody else
worked, and a run lasts longer. Threads that did not get their cores are no choice at all.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

ROUNDS = 4  # at least, however long one takes
GAIN = 0.9  # share of the time of fewer threads that more may take at most
BUSY = 0.7  # share of the time that each thread must have had a core


class Spent(NamedTuple):
    """Seconds that one probe took: on the clock, and on all processors together."""

    wall: float
    cpu: float


Timed = Callable[[int], Spent]


def usable_cores() -> int:
    """CPU cores that this process may use; its share, where a launcher started several here."""
    has = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def candidates(cores: int) -> list[int]:
    """Numbers of threads worth trying: powers of two up to `cores`, and `cores` itself."""
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


def probe(width: int, rows: int, seconds: float = 1.0, timed: Timed | None = None) -> int:
    """The fastest number of threads for layers of this width and batches of `rows` tokens.

    Leaves the number of threads as it was.

    Args:
        width: Of the model.
        rows: Tokens of a batch.
        seconds: How long to try.
        timed: Does the work once with so many threads; a product of that size, if left out.
    """
    import torch

    numbers = candidates(usable_cores())
    if len(numbers) == 1:
        return 1
    before = torch.get_num_threads()
    once = timed or _product(width, rows)
    found: dict[int, list[Spent]] = {number: [] for number in numbers}
    try:
        for number in numbers:  # warms the thread pools up
            once(number)
        while len(found[1]) < ROUNDS or _total(found) < seconds:
            for number in numbers:
                found[number].append(once(number))
    finally:
        torch.set_num_threads(before)
    return chosen(found)


def chosen(found: Mapping[int, Sequence[Spent]]) -> int:
    """The number of threads that these rounds speak for: more only where the gain is clear."""
    best, *more = sorted(found)
    for number in more:
        rounds = found[number]
        if _busy(number, rounds) >= BUSY and _slow(rounds) <= GAIN * _slow(found[best]):
            best = number
    return best


def _slow(rounds: Sequence[Spent]) -> float:
    """The time that three rounds in four stay below."""
    return statistics.quantiles((one.wall for one in rounds), n=4, method="inclusive")[2]


def _busy(number: int, rounds: Sequence[Spent]) -> float:
    """The share of the time in which each of so many threads had a core."""
    return sum(one.cpu for one in rounds) / (number * sum(one.wall for one in rounds))


def _total(found: Mapping[int, Sequence[Spent]]) -> float:
    return sum(one.wall for rounds in found.values() for one in rounds)


def _product(width: int, rows: int) -> Timed:
    """A product at the model's width and its backward pass, to be timed."""
    import torch

    generator = torch.Generator().manual_seed(0)  # the global random state stays untouched
    x = torch.randn(min(rows, 2048), width, generator=generator, requires_grad=True)
    w = torch.randn(4 * width, width, generator=generator, requires_grad=True)

    def timed(number: int) -> Spent:
        torch.set_num_threads(number)
        wall, cpu = time.perf_counter(), time.process_time()
        torch.autograd.grad(torch.nn.functional.linear(x, w).square().sum(), [x, w])
        return Spent(time.perf_counter() - wall, time.process_time() - cpu)

    return timed
