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

from espalier.errors import CheckpointError, SettingError, SiteError
from espalier.graft import find
from espalier.recipes import Method, Recipe, recipe
from espalier.sharding import shard
from espalier.training import folders, models, processes, randomness
from espalier.training.config import RunConfig
from espalier.training.course import go
from espalier.training.logs import quiet
from espalier.training.prepare import (
    Encoded,
    Material,
    Outset,
    Rows,
    config_in_hand,
    encode,
    fitting,
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
    parts = recipe(config.method)
    config = config.replace(method=parts.to_json())  # in full, however it was written
    out = _set_out(config, None if config.dry_run else folders.choose(config, parts))
    if out.done:
        return out.done
    with quiet(None):
        data = read_data(config)
        config = config.replace(task=data.task.name)  # its rules again, now that it is known
        tokenizer = models.load_tokenizer(config.model)
        base = models.load_config(config.model)
        limit = models.limit_of(base, tokenizer, parts.words)
        config = fitting(config, limit, parts.words)
        encoded = encode(data, tokenizer, config)
        config = _batch_settled(config, parts, config.model, data, encoded, out)
    with _folder_open(out, config):
        precision = models.precision_of(config.precision, out.accelerator.device, base)
        half = precision == "bf16" and not parts.trains_base
        dtype = torch.bfloat16 if half else torch.float32
        randomness.seed_all(config.seed)  # the new head starts the same in every process
        mesh = processes.mesh(config, out.accelerator)
        with processes.in_turn(out.accelerator, mesh is not None):
            load = (config.model, data.task, tokenizer, dtype, config.storage)
            model, new = models.load_model(*load)
            if mesh is not None:
                shard(model, mesh)
        return go(Material(config, model, tokenizer, data, encoded, out), parts, "default", new)


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
    parts = recipe(method) if method is not None else None
    sources = {"train": data, "validation": validation, "test": test}
    config = config_in_hand(model, sources, parts, settings)
    out = _set_out(config, None if config.dry_run else config.out)
    if out.done:
        return out.done
    with quiet(None):
        read = read_data(config, data, validation, test, model.config)
        config = config.replace(task=read.task.name)
        taken = parts.words if parts is not None else find(model).words
        config = fitting(config, models.limit_of(model.config, tokenizer, taken), taken)
        encoded = encode(read, tokenizer, config)
        config = _batch_settled(config, parts, model, read, encoded, out)
    with _folder_open(out, config):
        models.set_padding(model, tokenizer)
        return go(Material(config, model, tokenizer, read, encoded, out), parts, name)


def _batch_settled(
    config: RunConfig,
    parts: Recipe | None,
    model: Any,
    data: TaskData,
    encoded: Encoded,
    out: Outset,
) -> RunConfig:
    """The config with the batch that fits in memory where it is "auto"; `model` may be a name."""
    if config.batch != "auto":
        return config
    from espalier.planning import auto

    here = not isinstance(model, str) and model.device.type == out.accelerator.device.type
    config, said = auto.settle(
        config,
        parts or auto.recipe_of(model),
        auto.known_of(model, data.task),
        encoded.examples,
        out.accelerator,
        auto.taken(model) if here else 0,
    )
    if said:
        out.screen.say(said)
    return config


def _set_out(config: RunConfig, folder: Path | None) -> Outset:
    """Checks that need no data; with several processes the main one alone looks at the folder."""
    start = time.perf_counter()
    if config.tensorboard:
        check_tensorboard()
    with quiet(None):
        accelerator = processes.accelerator(config)
        from accelerate.utils import broadcast_object_list
    if folder and accelerator.is_main_process:
        folders.check(folder, config)
    if accelerator.num_processes > 1:
        folder = broadcast_object_list([folder])[0]
    screen = Screen(config.quiet or not accelerator.is_main_process)
    done = None
    if folder and config.resume and (folder / "result.json").is_file():
        screen.say(f"The run in {folder} is finished; there is nothing to resume.")
        done = RunResult.read(folder)
    return Outset(start, accelerator, screen, folder, done)


@contextlib.contextmanager
def _folder_open(out: Outset, config: RunConfig) -> Iterator[None]:
    """The run folder made, and library noise sent to its log."""
    if out.main_folder:
        folders.create(out.main_folder, config)
    out.accelerator.wait_for_everyone()
    try:
        log = out.main_folder / "log.txt" if out.main_folder else None
        with processes.together(out.accelerator), quiet(log):
            yield
    except (SettingError, SiteError, CheckpointError):
        if out.main_folder and not config.resume:
            folders.drop_unstarted(out.main_folder)
        raise
