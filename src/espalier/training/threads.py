"""How many CPU threads to train with: probed for about a second.

On shared machines two threads can be far slower than one, and more threads than free cores make
each of them wait. The probe times a small matrix product with its backward pass at the model's
width, numbers of threads taking turns so that a busy moment hurts all alike.
"""

from __future__ import annotations

import os
import time


def usable_cores() -> int:
    """CPU cores that this process may use; its share, where a launcher started several here."""
    has = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def candidates(cores: int) -> list[int]:
    """Numbers of threads worth trying: powers of two up to `cores`, and `cores` itself."""
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


def probe(width: int, rows: int, seconds: float = 1.0) -> int:
    """The fastest number of threads for layers of this width and batches of `rows` tokens.

    More threads must be at least 5 % faster to be chosen. Leaves the number of threads as it was.
    """
    import torch

    numbers = candidates(usable_cores())
    if len(numbers) == 1:
        return 1
    before = torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)  # the global random state stays untouched
    x = torch.randn(min(rows, 2048), width, generator=generator, requires_grad=True)
    w = torch.randn(4 * width, width, generator=generator, requires_grad=True)
    best = dict.fromkeys(numbers, float("inf"))
    end, rounds = time.perf_counter() + seconds, 0
    try:
        while rounds < 2 or time.perf_counter() < end:
            for number in numbers:
                torch.set_num_threads(number)
                start = time.perf_counter()
                torch.autograd.grad(torch.nn.functional.linear(x, w).square().sum(), [x, w])
                # The first round warms the thread pools up and is not counted.
                if rounds:
                    best[number] = min(best[number], time.perf_counter() - start)
            rounds += 1
    finally:
        torch.set_num_threads(before)
    return next(n for n in numbers if best[n] <= min(best.values()) * 1.05)
