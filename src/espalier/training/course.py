"""The course of a run whose data and model are at hand: attach, train, measure, keep."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from espalier.accounting import account
from espalier.errors import SettingError
from espalier.graft import find, get
from espalier.recipes import Recipe
from espalier.training import (
    finish,
    folders,
    models,
    processes,
    randomness,
    report,
    state,
    threads,
)
from espalier.training.choosing import choose
from espalier.training.compiling import compiled
from espalier.training.config import RunConfig
from espalier.training.evaluate import evaluating, inputs
from espalier.training.job import Job
from espalier.training.loop import Loop
from espalier.training.memory import explained, in_words, used
from espalier.training.offload import offloaded, store_for
from espalier.training.prepare import Material
from espalier.training.record import Record
from espalier.training.result import RunResult
from espalier.training.trunk_cache import trunk_cache
from espalier.verbs import attach, detach, only_active
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.data.separation import Separation

_LONG = 500  # examples to train on


def go(at: Material, parts: Recipe | None, name: str, new: list[str] | None = None) -> RunResult:
    """Attach, train, evaluate, save; `new` are the modules that no checkpoint filled.

    Without `parts` the active adapter goes on training. A dry run stops after one step. An adapter
    whose training failed is taken out again, so that the next try finds its name free.
    """
    if processes.shares_base(at.config, at.out.accelerator):
        processes.spread(at.model, at.config, at.out.accelerator)
    else:
        models.to_device(at.model, at.device)
    _check_packing(at, find(at.model).words if parts is None else parts.words)
    store_for(at.config.offload, at.device)  # refused before anything is attached
    randomness.seed_all(at.config.seed)
    if parts is None:
        name = only_active(at.model)
        return _train(at, name, get(at.model, name).recipe)
    attach(at.model, parts, name, head=_head(at.config, new))
    processes.agree(at.model, name, at.out.accelerator)
    try:
        choose(at, name)
        result = _train(at, name, parts)
    except Exception:
        detach(at.model, name)
        raise
    if at.config.dry_run:
        detach(at.model, name)
    return result


def _train(at: Material, name: str, parts: Recipe) -> RunResult:
    model, config = at.model, at.config
    counted = dataclasses.asdict(account(model, name))
    longest = max(len(example["input_ids"]) for example in at.encoded.examples["train"])
    with (
        _threads(at) as number,
        models.checkpointed(model, config.checkpointing),
        explained(config, longest, functools.partial(_needed, at, parts, longest)),
    ):
        loop = Loop(_job(at, number, parts, longest))
        with (
            trunk_cache(loop.job) as trunk,
            offloaded(model, store_for(config.offload, at.device)),
            compiled(model, config.compile, functools.partial(_traced, loop.job)),
        ):
            _say_plan(at, loop, parts, counted)
            if config.dry_run:
                return _trial(at, loop, counted)
            _check_space(at, loop)
            if trunk:
                trunk.fill()
            randomness.seed_all(config.seed + at.out.accelerator.process_index)
            loop.run()
        if finish.settle(at.model, name, at.out.main_folder):  # what training settled counts now
            served = dataclasses.asdict(account(model, name))
            counted |= {key: served[key] for key in ("changed", "rank", "kept", "bytes")}
        metrics, doubt = finish.measure(at, loop)
    model.eval()
    if at.out.main_folder:
        finish.keep(at, loop, name, parts, metrics, counted)
    at.out.accelerator.wait_for_everyone()
    loop.job.record.close()
    return _result(at, loop, metrics, doubt, counted)


def _needed(at: Material, parts: Recipe, longest: int) -> str:
    """What a step takes in memory, and what to change, by a plan of this run."""
    from espalier.planning import auto

    return auto.out_of_memory(at.config, longest, parts, at.model, at.data.task, at.device)


def _job(at: Material, number: int, parts: Recipe, longest: int) -> Job:
    # A base in bf16 computes in bf16 by itself; over an fp32 base autocast does.
    mixed = at.precision == "bf16" and at.model.dtype == torch.float32
    device = at.device.type
    return Job(
        model=at.model,
        tokenizer=at.tokenizer,
        task=at.data.task,
        train=at.encoded.examples["train"],
        validation=at.encoded.examples.get("validation", []),
        sources=at.encoded.sources,
        config=at.config,
        recipe=parts,
        lr=at.config.lr or parts.learning_rate,
        accelerator=at.out.accelerator,
        autocast=functools.partial(torch.autocast, device, torch.bfloat16)
        if mixed
        else contextlib.nullcontext,
        precision=at.precision,
        screen=at.out.screen,
        record=Record(at.out.main_folder, at.config.tensorboard),
        folder=at.out.folder,
        threads=number,
        separation=_separation(at, longest),
    )


@contextlib.contextmanager
def _threads(at: Material) -> Iterator[int]:
    """The number of CPU threads of the run, set while it lasts."""
    before, number = torch.get_num_threads(), at.config.threads
    if number == "auto" and at.config.resume and at.out.folder:
        number = state.threads_before(at.out.folder) or "auto"
    if number == "auto" and _is_long(at):
        tokens = at.config.rows * min(128, at.config.max_length or 128)
        number = threads.probe(models.width(at.model.config), tokens)
    number = before if number == "auto" else number
    torch.set_num_threads(number)
    try:
        yield number
    finally:
        torch.set_num_threads(before)


def _is_long(at: Material) -> bool:
    """Whether a second for probing threads is well spent."""
    config, rows = at.config, len(at.encoded.examples["train"])
    steps = (config.steps or 0) * config.rows_per_step
    examples = steps or rows * config.epochs
    return at.device.type == "cpu" and not config.dry_run and examples >= _LONG


def _say_plan(at: Material, loop: Loop, parts: Recipe, counted: Mapping[str, Any]) -> None:
    trunk = loop.job.trunk.plan if loop.job.trunk else []
    for line in [*report.plan(loop, at.data, parts, counted), *trunk]:
        at.out.screen.say(line)
    if at.encoded.note:
        at.out.screen.say(at.encoded.note)


def _check_packing(at: Material, words: int) -> None:
    if at.config.batching == "pack" and words:
        raise SettingError(
            f"{setting('batching', 'pack')} does not suit this model: the words of a prompt would "
            "stand before the first of several texts alone. Use bucket."
        )


def _separation(at: Material, longest: int) -> Separation | None:
    """How the adapted model keeps the texts of packed rows apart, where there are any."""
    if at.config.batching != "pack":
        return None
    from espalier.data.separation import separation

    found = separation(at.model, longest, whole_graphs=at.config.compile != "none")
    if isinstance(found, str):
        pack = setting("batching", "pack")
        raise SettingError(f"{pack} does not suit this model: {found}. Use bucket.")
    return found


def _traced(job: Job) -> None:
    """A training and an evaluation pass over a small batch, for what looks at their graphs."""
    few = sorted(job.train, key=lambda example: len(example["input_ids"]))[:2]
    given = inputs(job.task, job.collate(few), job.accelerator.device, job.model.dtype)
    job.model.train()
    with job.autocast(), job.apart(few):
        job.model(**given)
        with evaluating(job.model):
            job.model(**given)


def _check_space(at: Material, loop: Loop) -> None:
    if at.out.folder:
        size = sum(p.numel() * p.element_size() for p in loop.parameters)
        # The adapter, and twice (old and new state) buffers, best buffers and two moments.
        folders.check_space(at.out.folder, 9 * size + 2_000_000)


def _trial(at: Material, loop: Loop, counted: dict[str, Any]) -> RunResult:
    loss = loop.trial()
    at.out.screen.say(
        f"One step on the largest batch: loss {loss:.4f}, "
        f"{in_words(used(at.device))} in use. "
        f"Nothing was written; leave {setting('dry_run')} out to train."
    )
    seconds = time.perf_counter() - at.out.started
    metrics, by = {"train": {"loss": loss}}, at.data.task.best[0]
    return RunResult(None, metrics, {}, by, None, [], seconds, counted, 0)


def _result(
    at: Material,
    loop: Loop,
    metrics: finish.Metrics,
    doubt: str | None,
    counted: dict[str, Any],
) -> RunResult:
    seconds = time.perf_counter() - at.out.started
    best = {"step": float(loop.at.best_step), **loop.at.best} if loop.at.best else {}
    lines, by = loop.job.record.lines, at.data.task.best[0]
    found = (at.out.folder, metrics, best, by, doubt, lines)
    result = RunResult(*found, seconds, counted, loop.at.step)
    if at.out.main_folder:
        result.write(at.out.main_folder)
        shutil.rmtree(at.out.main_folder / "state", ignore_errors=True)
    if at.out.accelerator.is_main_process:
        report.end(at.out.screen, result, at.data, at.config.keep)
    return result


def _head(config: RunConfig, new: list[str] | None) -> Any:
    if config.head == "auto":
        return "auto" if new is None else (new or False)
    return False if config.head == "none" else config.head
