"""The next steps' batches made while the current one computes: one thread, in order, pinned.

What is made of a step depends on the step alone, so that a run with and without this, resumed or
not, meets the same batches. An error in the thread is raised where its step would have come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from torch import Tensor

from espalier.errors import EspalierError, TrainingError
from espalier.training.evaluate import targets

if TYPE_CHECKING:
    from espalier.training.job import Job

Item = TypeVar("Item")
Made = TypeVar("Made")
AHEAD = 2
"""Steps made before they are asked for."""


class Prepared(NamedTuple):
    """The micro-batches of a step in one process, their targets, and the step's real tokens."""

    batches: list[dict[str, Tensor]]
    counts: list[int]
    tokens: int


def ahead(make: Callable[[Item], Made], items: Iterable[Item]) -> Generator[tuple[Item, Made]]:
    """Each item with what `make` gives for it; close the iterator to end the thread early.

    Raises:
        Exception: what `make` raised, at the item that it raised it for.
    """
    waiting: deque[tuple[Item, Future[Made]]] = deque()
    pool = ThreadPoolExecutor(1, thread_name_prefix="espalier-batches")
    try:
        for item in items:
            waiting.append((item, pool.submit(make, item)))
            if len(waiting) > AHEAD:
                first, made = waiting.popleft()
                yield first, made.result()
        while waiting:
            first, made = waiting.popleft()
            yield first, made.result()
    finally:
        pool.shutdown(cancel_futures=True)


def prepare(job: Job, micros: Iterable[list[int]]) -> Prepared:
    """Micro-batches of these indices, in pinned memory where a GPU is to read them.

    Raises:
        TrainingError: a row cannot be put into a batch; names it.
    """
    micros = list(micros)
    batches = [collated(job, micro) for micro in micros]
    counts = [targets(batch, job.task.name == "causal") for batch in batches]
    tokens = sum(len(job.train[i]["input_ids"]) for micro in micros for i in micro)
    if job.accelerator.device.type == "cuda":
        batches = [{key: one.pin_memory() for key, one in batch.items()} for batch in batches]
    return Prepared(batches, counts, tokens)


def collated(job: Job, micro: list[int]) -> dict[str, Tensor]:
    """One micro-batch.

    Raises:
        TrainingError: a row cannot be put into a batch; names it.
    """
    try:
        return job.collate([job.train[i] for i in micro])
    except EspalierError:
        raise
    except Exception as error:
        rows = ", ".join(job.sources[i] for i in micro if _broken(job, i)) or ", ".join(
            job.sources[i] for i in micro
        )
        raise TrainingError(f"No batch can be made of {rows}: {error}") from error


def _broken(job: Job, index: int) -> bool:
    try:
        job.collate([job.train[index]])
    except Exception:
        return True
    return False
