"""A run from settings to result: data, model, adapter, loop, evaluation, run folder.

    config → data (read and checked) → tokenizer → examples → run folder → model → adapter → loop

What can be wrong is found in this order, so that a person's mistake shows before the long waits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.accounting import account
from espalier.deltas import Method, Recipe, recipe
from espalier.errors import SettingError
from espalier.graft import active, attach, detach, get
from espalier.training import finish, folders, models, report, state, threads
from espalier.training.config import RunConfig
from espalier.training.logs import quiet
from espalier.training.loop import Job, Loop
from espalier.training.memory import in_words, used
from espalier.training.prepare import (
    Material,
    Rows,
    config_in_hand,
    encode,
    fitting,
    precision_of,
    read_data,
)
from espalier.training.progress import Screen
from espalier.training.record import Record, check_tensorboard
from espalier.training.result import RunResult

if TYPE_CHECKING:
    from espalier.data import TaskData


def train(config: RunConfig) -> RunResult:
    """Everything from files: read data, load and adapt the model, train, evaluate, save.

    Args:
        config: The settings. With `dry_run` all happens up to one step, and nothing is written.

    Returns:
        What came of it; `folder` is the run folder.

    Raises:
        EspalierError: something cannot be done, as early as it can be known.
    """
    from accelerate import Accelerator

    start = time.perf_counter()
    parts = recipe(config.method)
    config = config.replace(method=parts.to_json())  # in full, however it was written
    screen = Screen(config.quiet)
    folder = None if config.dry_run else folders.choose(config, str(parts))
    done = _begin(folder, config, screen)
    if done:
        return done
    with quiet(None):
        data = read_data(config)
        tokenizer = models.load_tokenizer(config.model)
        config = fitting(config, models.longest_input(config.model, tokenizer))
        encoded = encode(data, tokenizer, config)
    if folder:
        folders.create(folder, config)
    with quiet(folder / "log.txt" if folder else None):
        accelerator = Accelerator()
        precision = precision_of(config, accelerator.device)
        half = precision == "bf16" and not parts.trains_base
        state.seed_all(config.seed)  # the new head starts the same in every process
        model, new = models.load_model(
            config.model, data.task, tokenizer, torch.bfloat16 if half else torch.float32
        )
        at = Material(
            config, model, tokenizer, data, encoded, accelerator, precision, screen, folder
        )
        return _go(at, parts, "default", new, start)


def fit(
    model: Any,
    tokenizer: Any,
    data: TaskData | Rows,
    method: Method | Recipe | str | Mapping[str, Any] | Sequence[Any] | None = "LoRA()",
    *,
    name: str = "default",
    validation: Rows | None = None,
    test: Rows | None = None,
    **settings: Any,
) -> RunResult:
    """Train an adapter on a model in hand; it stays attached under `name`, active, in eval mode.

    Args:
        model: A transformers model; it is moved to the accelerator and keeps its dtype.
        tokenizer: Its tokenizer.
        data: Rows, a path, or what `espalier.data.read_task` gave.
        method: What to attach, or None to go on training the active adapter.
        name: The adapter's name.
        validation: Rows or a path; a share of `data` is held out if left out.
        test: Rows or a path, evaluated once at the end.
        **settings: Fields of `RunConfig`; without `out` nothing is written.

    Raises:
        EspalierError: something cannot be done, as early as it can be known.
    """
    from accelerate import Accelerator

    start = time.perf_counter()
    parts = recipe(method) if method is not None else None
    sources = {"train": data, "validation": validation, "test": test}
    config = config_in_hand(model, sources, parts, settings)
    screen = Screen(config.quiet)
    folder = None if config.dry_run else config.out
    done = _begin(folder, config, screen)
    if done:
        return done
    with quiet(None):
        read = read_data(config, data, validation, test)
        config = fitting(config, models.limit_of(model.config, tokenizer))
        encoded = encode(read, tokenizer, config)
    if folder:
        folders.create(folder, config)
    with quiet(folder / "log.txt" if folder else None):
        accelerator = Accelerator()
        precision = precision_of(config, accelerator.device)
        models.set_padding(model, tokenizer)
        at = Material(
            config, model, tokenizer, read, encoded, accelerator, precision, screen, folder
        )
        return _go(at, parts, name, None, start)


def _begin(folder: Path | None, config: RunConfig, screen: Screen) -> RunResult | None:
    """Checks that need no data; the result, if the run to resume is finished already."""
    if config.tensorboard:
        check_tensorboard()
    if folder is None:
        return None
    folders.check(folder, config)
    if config.resume and (folder / "result.json").is_file():
        screen.say(f"The run in {folder} is finished; there is nothing to resume.")
        return RunResult.read(folder)
    return None


def _go(
    at: Material, parts: Recipe | None, name: str, new: list[str] | None, start: float
) -> RunResult:
    """Attach, train, evaluate, save; `new` are the modules that no checkpoint filled."""
    model, config = at.model, at.config
    models.to_device(model, at.accelerator.device)
    _check_packing(at)
    state.seed_all(config.seed)
    attached = parts is not None
    if parts is not None:
        attach(model, parts, name, head=_head(config, new))
    else:
        name, parts = _active_one(model)
    counted = dataclasses.asdict(account(model, name))
    with _threads(at) as number, models.checkpointed(model, config.checkpointing):
        loop = Loop(_job(at, number, parts))
        _say_plan(at, loop, parts, counted)
        if config.dry_run:
            result = _trial(at, loop, counted, start)
            if attached:
                detach(model, name)
            return result
        _check_space(at, loop)
        state.seed_all(config.seed + at.accelerator.process_index)
        loop.run()
        metrics = finish.measure(at, loop)
    model.eval()
    if at.folder and at.accelerator.is_main_process:
        finish.keep(at, loop, name, parts, metrics, counted)
    loop.job.record.close()
    return _result(at, loop, metrics, counted, time.perf_counter() - start)


def _job(at: Material, number: int, parts: Recipe) -> Job:
    # A base in bf16 computes in bf16 by itself; over an fp32 base autocast does.
    mixed = at.precision == "bf16" and at.model.dtype == torch.float32
    device = at.accelerator.device.type
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
        accelerator=at.accelerator,
        autocast=functools.partial(torch.autocast, device, torch.bfloat16)
        if mixed
        else contextlib.nullcontext,
        precision=at.precision,
        screen=at.screen,
        record=Record(at.folder, at.config.tensorboard),
        folder=at.folder,
        threads=number,
    )


@contextlib.contextmanager
def _threads(at: Material) -> Iterator[int]:
    """The number of CPU threads of the run, set while it lasts."""
    before, number = torch.get_num_threads(), at.config.threads
    if number == "auto" and at.config.resume and at.folder:
        number = state.threads_before(at.folder) or "auto"
    if number == "auto" and at.accelerator.device.type == "cpu" and not at.config.dry_run:
        tokens = at.config.batch * min(128, at.config.max_length or 128)
        number = threads.probe(models.width(at.model), tokens)
    number = before if number == "auto" else number
    torch.set_num_threads(number)
    try:
        yield number
    finally:
        torch.set_num_threads(before)


def _say_plan(at: Material, loop: Loop, parts: Recipe, counted: Mapping[str, Any]) -> None:
    if not at.accelerator.is_main_process:
        at.screen.console.quiet = True
    for line in report.plan(loop, at.data, parts, counted):
        at.screen.say(line)
    if at.encoded.note:
        at.screen.say(at.encoded.note)


def _check_packing(at: Material) -> None:
    if at.config.batching == "pack":
        from espalier.data import packing_refusal

        why = packing_refusal(at.model)
        if why:
            raise SettingError(f"batching: pack does not suit this model: {why}. Use bucket.")


def _check_space(at: Material, loop: Loop) -> None:
    if at.folder:
        size = sum(p.numel() * p.element_size() for p in loop.parameters)
        # The adapter, and twice (old and new state) buffers, best buffers and two moments.
        folders.check_space(at.folder, 9 * size + 2_000_000)


def _trial(at: Material, loop: Loop, counted: dict[str, Any], start: float) -> RunResult:
    loss = loop.trial()
    at.screen.say(
        f"One step on the largest batch: loss {loss:.4f}, "
        f"{in_words(used(at.accelerator.device))} in use. "
        "Nothing was written; leave dry_run out to train."
    )
    seconds = time.perf_counter() - start
    return RunResult(None, {"train": {"loss": loss}}, {}, [], seconds, counted, 0)


def _result(
    at: Material,
    loop: Loop,
    metrics: finish.Metrics,
    counted: dict[str, Any],
    seconds: float,
) -> RunResult:
    best = {"step": float(loop.at.best_step), **loop.at.best} if loop.at.best else {}
    lines = loop.job.record.lines
    result = RunResult(at.folder, metrics, best, lines, seconds, counted, loop.at.step)
    if at.folder and at.accelerator.is_main_process:
        result.write(at.folder)
        shutil.rmtree(at.folder / "state", ignore_errors=True)
    text = at.data.splits["train"][0].values.get("text")
    report.end(at.screen, result, text if isinstance(text, str) else None)
    return result


def _head(config: RunConfig, new: list[str] | None) -> Any:
    if config.head == "auto":
        return "auto" if new is None else (new or False)
    return False if config.head == "none" else config.head


def _active_one(model: nn.Module) -> tuple[str, Recipe]:
    names = list(active(model))
    if len(names) != 1:
        raise SettingError(f"method=None trains the one active adapter; active are: {names}.")
    return names[0], get(model, names[0]).recipe
