"""Memory: how much a run takes, and what to change when there is not enough."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from espalier.errors import TrainingError
from espalier.training.config import RunConfig
from espalier.wording import setting

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def used(device: torch.device) -> int:
    """Bytes in use: the peak on a GPU since the start, the process's resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return psutil.Process().memory_info().rss


def in_words(count: float) -> str:
    """Bytes as text with a unit, like 1.4 GB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def advice(config: RunConfig, longest: int) -> str:
    """Up to three changes that lower the memory a step takes, the most useful first."""
    changes = []
    if config.rows > 1:
        batch = max(1, config.rows // 4)
        accumulate = config.rows_per_step // batch
        changes.append(
            f"{setting('batch', batch)} with {setting('accumulate', accumulate)} (the same step, "
            f"about {config.rows / batch:.0f} times less for activations)"
        )
    if not config.checkpointing:
        changes.append(f"{setting('checkpointing', True)} (about 1/3 slower)")
    if config.precision != "bf16":
        changes.append(f"{setting('precision', 'bf16')} (half for the base)")
    if longest > 64:
        shorter = setting("max_length", longest // 2)
        changes.append(f"{shorter} (now up to {longest} tokens; data is cut)")
    changes.append("a smaller base model, or a method that trains less")
    return "\n".join(f"  {i}. {change}" for i, change in enumerate(changes[:3], 1))


@contextlib.contextmanager
def explained(
    config: RunConfig, longest: int, planned: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Turn an out-of-memory error into a TrainingError that ranks the ways out.

    `planned` tells them with what each comes to; where it has nothing to say they are told
    without numbers.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            sign in str(error).lower() for sign in _SIGNS
        )
        if not out_of_memory:
            raise
        told = planned() or f"What helps, most first:\n{advice(config, longest)}"
        raise TrainingError(
            f"Out of memory with {setting('batch', config.batch)} and up to {longest} tokens per "
            f"example. {told}"
        ) from error
