"""The watch on a run: numbers that are not finite, and places that never get a gradient.

Training stops at the first loss or gradient norm that is not finite; only then the step's
micro-batches are run once more, to tell which rows and which module it came from.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.training.evaluate import inputs
from espalier.verbs import dead_sites
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.training.job import Job


_WATCHED = 8  # first steps; in one alone an expert that no token was sent to has no gradient


class Places:
    """The places of the adapter that have not had a gradient yet."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.dead = set(dead_sites(job.model))  # all of them, before the first backward pass

    def look(self, step: int) -> None:
        """Look at the gradients of the loss alone, in step number `step` (from 0)."""
        if self.dead and step < _WATCHED:
            self.dead &= set(dead_sites(self.job.model))

    def check(self, step: int, total: int, norm: float) -> None:
        """Judge what was looked at up to step number `step` of `total`.

        Raises:
            TrainingError: no place had a gradient in this step, or some had none in all of the
                first steps; where the whole base trains, unused parts of it are only named.
        """
        if not self.dead or step >= _WATCHED:
            return
        if norm != 0 and step + 1 < min(_WATCHED, total):
            return
        names = sorted(self.dead)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        found = f"{len(names)} places of the adapter never had a gradient: "
        found += ", ".join(names[:8]) + more + "."
        if norm == 0 or not self.job.recipe.trains_base:
            raise TrainingError(
                f"{found} They would never learn. Leave them out with {setting('sites')}, or "
                "check that the model uses them."
            )
        self.job.screen.say(found)


def check_finite(job: Job, loss: float, norm: float, number: int, step: list[list[int]]) -> None:
    """Raise TrainingError when a step's loss or gradient norm is not finite."""
    if math.isfinite(loss) and math.isfinite(norm):
        return
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    batch, place = _culprit(job, step)
    rows = [job.sources[i] for i in batch]
    shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    dtype = str(next(job.model.parameters()).dtype).removeprefix("torch.")
    raise TrainingError(
        f"Training stopped at step {number}: {what}. Rows: {shown}. "
        f"First non-finite value: {place}. The base is in {dtype}, lr is {job.lr:g}. "
        f"What helps, most first: a lower {setting('lr')}, {setting('precision', 'fp32')}, "
        f"a smaller {setting('clip')}, checking these rows."
    )


def _culprit(job: Job, step: list[list[int]]) -> tuple[list[int], str]:
    """The micro-batch whose forward pass shows it, with the module; else all and the backward."""
    for micro in step:
        place = _first_bad(job, micro)
        if place:
            return micro, place
    return [i for micro in step for i in micro], "in the backward pass"


def _first_bad(job: Job, micro: list[int]) -> str | None:
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and _broken(output):
                found.append(f"in the output of {name} ({type(module).__name__})")

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in job.model.named_modules() if n]
    try:
        with torch.no_grad(), job.autocast(), job.apart([job.train[i] for i in micro]):
            batch = job.collate([job.train[i] for i in micro])
            given = inputs(job.task, batch, job.accelerator.device, job.model.dtype)
            loss = job.task.loss(job.model(**given), batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ("in the loss" if _broken(loss) else None)


def _broken(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor.detach()).all())
