"""A run from settings to result: data, model, adapter, loop, evaluation, run folder.

    config → data (read and checked) → tokenizer → examples → run folder → model → adapter → loop

What can be wrong is found in this order, so that a person's mistake shows before the long waits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from espalier.deltas import Method, Recipe, recipe
from espalier.training import folders, models, randomness
from espalier.training.config import RunConfig
from espalier.training.course import go
from espalier.training.logs import quiet
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
from espalier.training.record import check_tensorboard
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
        accelerator = Accelerator()
        data = read_data(config)
        tokenizer = models.load_tokenizer(config.model)
        config = fitting(config, models.longest_input(config.model, tokenizer))
        encoded = encode(data, tokenizer, config)
    with _open(folder, config):
        half = precision_of(config, accelerator.device) == "bf16" and not parts.trains_base
        dtype = torch.bfloat16 if half else torch.float32
        randomness.seed_all(config.seed)  # the new head starts the same in every process
        model, new = models.load_model(config.model, data.task, tokenizer, dtype)
        at = Material(start, config, model, tokenizer, data, encoded, accelerator, screen, folder)
        return go(at, parts, "default", new)


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
        accelerator = Accelerator()
        read = read_data(config, data, validation, test)
        config = fitting(config, models.limit_of(model.config, tokenizer))
        encoded = encode(read, tokenizer, config)
    with _open(folder, config):
        models.set_padding(model, tokenizer)
        at = Material(start, config, model, tokenizer, read, encoded, accelerator, screen, folder)
        return go(at, parts, name)


@contextlib.contextmanager
def _open(folder: Path | None, config: RunConfig) -> Iterator[None]:
    """The run folder made, and library noise sent to its log."""
    if folder:
        folders.create(folder, config)
    with quiet(folder / "log.txt" if folder else None):
        yield


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
