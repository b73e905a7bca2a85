"""The training loop: AdamW over an adapter's flat buffers.

A step takes `accumulate` micro-batches in each process. The model gives a mean over a micro-batch's
targets (labelled tokens or rows); each mean is weighted by its share n_i / N of the step's targets,
N counted over all micro-batches and processes, so the step's gradient is that of one big batch
however unevenly the targets are spread. What trains is one or two flat tensors, which processes
add with one all-reduce: no wrapper around the model is needed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.errors import TrainingError
from espalier.graft import get
from espalier.lifecycle import Lifecycle
from espalier.modules import is_sharded
from espalier.training import state
from espalier.training.config import RunConfig
from espalier.training.evaluate import Measured, evaluate, inputs, targets
from espalier.training.guard import Places, check_finite
from espalier.training.job import Job
from espalier.training.memory import used
from espalier.training.optimizers import optimizer
from espalier.training.prefetch import Prepared, ahead, collated, prepare
from espalier.training.schedule import factor, total_steps, warmup_steps
from espalier.verbs import activate, active, constants, groups, only_active


class Loop:
    """Trains the active adapter of a job's model.

    Raises:
        TrainingError: a non-finite loss or gradient, or a place without gradient.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.config = job, job.config
        config = job.config
        self.head_lr = config.head_lr or head_rate(job)
        parts = groups(job.model, config.weight_decay, job.lr, self.head_lr)
        self.rates = [group["lr"] for group in parts]
        self.parameters: list[nn.Parameter] = [p for group in parts for p in group["params"]]
        self.optimizer, self.note = optimizer(config.optimizer, parts, job.lr)
        self.constants = constants(job.model)
        self.sharded = is_sharded(job.model)
        self.at = state.Position()
        self.per_epoch = len(self.epoch(0))
        self.total = total_steps(self.config.epochs, self.config.steps, self.per_epoch)
        self.warmup = warmup_steps(self.config.warmup, self.total)
        self.life = Lifecycle(job.model, self.total)
        self.best: list[Tensor] | None = None
        self.places = Places(job)
        self.fixed = state.Fixed(
            self.config,
            job.threads,
            job.accelerator.num_processes,
            state.fingerprint(job.train) if job.folder else "",
            self.total,
        )

    def epoch(self, number: int) -> list[list[list[int]]]:
        """An epoch's steps, each a list of micro-batches (indices), alike in every process."""
        from espalier.data import batches

        micro = batches(
            self.job.train,
            self.config.rows,
            how=self.config.batching,
            seed=self.config.seed,
            epoch=number,
        )
        size = self.config.accumulate * self.job.accelerator.num_processes
        return [micro[at : at + size] for at in range(0, len(micro), size)]

    def run(self) -> None:
        """Train to the end, from the state in the run folder when resuming."""
        if self.config.resume and self.job.folder:
            self._restore(self.job.folder)
        self.life = Lifecycle(self.job.model, self.total, self.at.step)
        self.job.screen.start(self.total, self.at.step)
        self.job.model.train()
        try:
            while self.at.step < self.total and not self.at.stopped:
                self._epoch()
        finally:
            self.job.screen.stop()
        if self.best is not None:
            with torch.no_grad():
                for parameter, tensor in zip(self.parameters, self.best, strict=True):
                    parameter.copy_(tensor)

    def trial(self) -> float:
        """The loss of the largest step of the first epoch, after its backward; changes nothing."""

        def weight(step: list[list[int]]) -> int:
            return max(len(m) * max(len(self.job.train[i]["input_ids"]) for i in m) for m in step)

        self.job.model.train()
        step = max(self.epoch(0), key=weight)
        loss, norm, _ = self._gradients(step, self._prepared(step))
        self.places.check(0, self.total, float(norm))
        self._forget()
        return float(loss)

    def evaluate(self, examples: Sequence[dict[str, Any]]) -> Measured:
        """Loss and the task's metrics of the adapter as it is now."""
        job, batch = self.job, self.config.batch_in_evaluation
        giving = functools.partial(job.giving, examples)
        how = (batch, job.accelerator, job.autocast, giving)
        return evaluate(job.model, job.task, job.tokenizer, examples, *how)

    @property
    def kept(self) -> tuple[int, Measured]:
        """Step and validation of the adapter that is kept at the end."""
        at = self.at
        if self.config.keep == "best":
            return at.best_step if at.best else at.step, Measured(at.best, at.best_doubt)
        return at.step, Measured(at.latest, at.latest_doubt)

    def _restore(self, folder: Path) -> None:
        found = state.latest(folder)
        if found is None:  # stopped before the first state: the start is the state
            begun = RunConfig.from_yaml(folder / "config.yaml")
            state.refuse_changed(begun.to_dict(), self.config)
            self.job.screen.say("Nothing was saved before the stop: the run begins anew.")
            self.job.record.rewind(0)
            return
        self.at, offset = state.read_position(found, self.fixed)
        process = self.job.accelerator.process_index
        numbers = (self.parameters, self.constants)
        self.best = state.restore(found, *numbers, self.optimizer, process, self.config.seed)
        activate(self.job.model, active(self.job.model))  # deltas that keep numbers read them anew
        self.job.record.rewind(offset)

    def _epoch(self) -> None:
        steps = self.epoch(self.at.epoch)
        with contextlib.closing(ahead(self._prepared, steps[self.at.index :])) as coming:
            for step, made in coming:
                self._step(step, made)
                self.at.step += 1
                self.at.index += 1
                ended = self.at.index == len(steps)
                last = self.at.step == self.total
                if last or self._due(self.config.evaluate_every, ended):
                    self._report()
                    self._check()
                if ended:
                    self.at.epoch, self.at.index = self.at.epoch + 1, 0
                if last or self.at.stopped or self._due(self.config.save_every, ended):
                    self._save()
                if last or self.at.stopped:
                    return

    def _due(self, every: int | None, ended: bool) -> bool:
        return ended if every is None else self.at.step % every == 0

    def _step(self, step: list[list[int]], made: Prepared) -> None:
        start = time.perf_counter()
        share = factor(self.at.step, self.total, self.warmup, self.config.schedule)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share
        loss, norm, tokens = self._gradients(step, made)
        loss, norm = torch.stack([loss, norm]).tolist()  # the step's one wait for the device
        check_finite(self.job, loss, norm, self.at.step + 1, step)
        self.places.check(self.at.step, self.total, norm)
        self.life.before()
        self.optimizer.step()
        self.life.after()
        self._forget()
        self.at.tokens += tokens
        seconds = time.perf_counter() - start
        rows = sum(len(micro) for micro in step)
        memory = used(self.job.accelerator.device)
        self.job.record.add(
            "train",
            step=self.at.step + 1,
            epoch=round(self.at.epoch + (self.at.index + 1) / self.per_epoch, 4),
            loss=loss,
            lr=self.job.lr * share,
            grad_norm=norm,
            tokens=self.at.tokens,
            seconds=round(seconds, 4),
            tokens_per_second=round(tokens / seconds, 1),
            examples_per_second=round(rows / seconds, 2),
            memory=memory,
        )
        self.job.screen.step(self.at.step + 1, self.total, loss, seconds, rows, tokens, memory)

    def _gradients(self, step: list[list[int]], made: Prepared) -> tuple[Tensor, Tensor, int]:
        """Loss and gradient norm (before clipping) of a step, and its tokens in all processes."""
        job, accelerator = self.job, self.job.accelerator
        device = accelerator.device
        mine, (batches, counts, tokens) = self._mine(step), made
        total = sum(counts)
        if accelerator.num_processes > 1:
            sums = torch.tensor([total, tokens], device=device)
            total, tokens = accelerator.reduce(sums, "sum").tolist()  # type: ignore[union-attr]
        if not total:
            rows = ", ".join(job.sources[i] for micro in step for i in micro)
            raise TrainingError(f"No target in a whole step: {rows}.")
        if self.sharded:
            self._keep_pace(step, mine, batches, counts)
        loss = torch.zeros((), device=device)
        for some, batch, count in zip(mine, batches, counts, strict=True):
            if not count and not self.sharded:  # the mean over no target is not a number
                continue
            with job.giving(job.train, some):
                with job.autocast():
                    given = inputs(job.task, batch, device, job.model.dtype)
                    part = job.task.loss(job.model(**given), batch) * (count / total)
                part.backward()
            loss += part.detach().float()
        if accelerator.num_processes > 1:
            self._add_up()
            loss = accelerator.reduce(loss, "sum")
        self.places.look(self.at.step)
        self.life.penalise()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        return loss, norm, tokens  # type: ignore[return-value]

    def _mine(self, step: list[list[int]]) -> list[list[int]]:
        """The micro-batches of this process."""
        accelerator = self.job.accelerator
        return step[accelerator.process_index :: accelerator.num_processes]

    def _prepared(self, step: list[list[int]]) -> Prepared:
        return prepare(self.job, self._mine(step))

    def _keep_pace(
        self,
        step: list[list[int]],
        mine: list[list[int]],
        batches: list[dict[str, Tensor]],
        counts: list[int],
    ) -> None:
        """Give this process as many passes as any other has; those that count nothing weigh 0.

        A pass over a sharded base is one of all processes. What stands in for a micro-batch that
        is missing, or has no target, is the step's first one that has some.
        """
        passes = math.ceil(len(step) / self.job.accelerator.num_processes)
        mine += [[]] * (passes - len(mine))
        counts += [0] * (passes - len(counts))
        batches += [{}] * (passes - len(batches))
        if all(counts):
            return
        causal = self.job.task.name == "causal"
        found = ((micro, collated(self.job, micro)) for micro in step)
        some, batch = next(pair for pair in found if targets(pair[1], causal))
        for at, count in enumerate(counts):
            if not count:
                mine[at], batches[at] = some, batch

    def _add_up(self) -> None:
        for parameter in self.parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = self.job.accelerator.reduce(gradient, "sum")  # type: ignore[assignment]

    def _forget(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _check(self) -> None:
        job, config = self.job, self.config
        if not job.validation:
            return
        start = time.perf_counter()
        metrics, doubt = self.evaluate(job.validation)
        self.at.latest, self.at.latest_doubt = metrics, doubt
        settled = self.life.settled  # what a method has not settled yet is never kept
        gained = settled and _gained(metrics, self.at.best, job.task.best)
        better = gained or (settled and _closer(metrics, self.at.best, job.task.best))
        if better:
            self.at.best, self.at.best_doubt = metrics, doubt
            self.at.best_step = self.at.step
            if config.keep == "best":
                self.best = [p.detach().cpu().clone() for p in self.parameters]
        if settled:
            self.at.stale = 0 if gained else self.at.stale + 1
            self.at.stopped = config.patience is not None and self.at.stale >= config.patience
        seconds = round(time.perf_counter() - start, 4)
        where = {"step": self.at.step, "epoch": self._epochs_done}
        job.record.add("validation", **where, **metrics, seconds=seconds)
        job.screen.checked(self.at.step, metrics, job.task.best[0] if better else None)

    @property
    def _epochs_done(self) -> float:
        return round(self.at.epoch + self.at.index / self.per_epoch, 4)

    def _report(self) -> None:
        if found := self.life.report():
            self.job.record.add("places", step=self.at.step, epoch=self._epochs_done, **found)

    def _save(self) -> None:
        if self.job.folder:
            what = (self.parameters, self.constants, self.best, self.optimizer)
            offset, accelerator = self.job.record.offset, self.job.accelerator
            state.write(self.job.folder, self.at, self.fixed, offset, *what, accelerator)


def head_rate(job: Job) -> float:
    """The learning rate of a new task head, where none was given.

    Its numbers start at random and learn slowly at a rate that suits an adapter or a pretrained
    weight. A step of Adam moves an output by up to the rate times the inputs' sizes added up, so
    the rate falls with the width of what the head reads. Alone, the head is what `lr` is for.
    """
    adapter = get(job.model, only_active(job.model))
    if all("head" in kind for kind in adapter.flat):
        return job.lr
    slots = (slot for kind, found in adapter.slots.items() for slot in found if "head" in kind)
    width = max((slot.shape[-1] for slot in slots if len(slot.shape) == 2), default=0)
    return max(job.lr, min(2e-2, 8 / width)) if width else job.lr


def _gained(found: Mapping[str, float], best: Mapping[str, float], goal: tuple[str, str]) -> bool:
    """Whether an evaluation beats the best so far by the task's metric."""
    name, way = goal
    if not best or math.isnan(best[name]):
        return True
    return found[name] > best[name] if way == "max" else found[name] < best[name]


def _closer(found: Mapping[str, float], best: Mapping[str, float], goal: tuple[str, str]) -> bool:
    """Whether an evaluation equals the best so far in the task's metric, with a lower loss."""
    return found[goal[0]] == best[goal[0]] and found["loss"] < best["loss"]
