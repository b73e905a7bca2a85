"""What is planned: a base, a recipe, a task, and the settings of a run that decide its memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.errors import SettingError
from espalier.planning import base
from espalier.recipes import Recipe
from espalier.storage import Storage, stored
from espalier.training import models

if TYPE_CHECKING:
    from espalier.heads import Head
    from espalier.tasks import Task
    from espalier.training.config import RunConfig

CPU = torch.device("cpu")
CLASSES = ("0", "1")  # where no data says how many there are
CHOICES = 4  # answers to a question, likewise


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings of one plan.

    Attributes:
        model: The base's name.
        make: Builds it on "meta", in a type, and in few bits where asked.
        recipe: What trains.
        task: What for: it makes the loss.
        config: The model's own settings.
        batch: Rows per micro-batch.
        length: Tokens per row, a prompt's words not among them.
        target_length: Tokens of an answer, where the decoder is a stack of its own.
        accumulate: Micro-batches per optimiser step.
        precision: "fp32" or "bf16".
        storage: How the base is quantised, if it is.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: As in a run.
        head: What of the model trains as the task's head.
        eval_batch: Rows per batch in evaluation; twice `batch` if None.
        keeps: Whether a copy of the best numbers is kept in the same memory.
        device: Where it runs.
    """

    model: str
    make: Callable[[torch.dtype, Storage | None], nn.Module]
    recipe: Recipe
    task: Task
    config: Any
    batch: int = 16
    length: int = 512
    target_length: int = 512
    accumulate: int = 1
    precision: str = "fp32"
    storage: Storage | None = None
    checkpointing: bool = False
    optimizer: str = "adamw"
    head: Head = "auto"
    eval_batch: int | None = None
    keeps: bool = False
    device: torch.device = CPU

    @property
    def dtype(self) -> torch.dtype:
        """The base's type: bf16 means autocast over fp32 where the base's own weights train."""
        half = self.precision == "bf16" and not self.recipe.trains_base
        return torch.bfloat16 if half else torch.float32

    @property
    def step(self) -> tuple[object, ...]:
        """What decides a step of the model that is built."""
        sizes = (self.batch, self.accumulate, self.length, self.target_length, self.eval_batch)
        return (*sizes, self.checkpointing, self.optimizer)

    @property
    def same_base(self) -> tuple[object, ...]:
        """What decides the model that is built, apart from what one step of it is given."""
        return (self.model, self.recipe, self.task, self.dtype, self.storage, self.head)


def task_named(name: str | None, config: Any) -> Task:
    """A task by name, with as many classes as the configuration has; by default the model's own.

    Raises:
        SettingError: There is no such task.
    """
    from espalier.tasks import task_from_extras

    name = name or models.writing_task(config) or "classification"
    columns = {"text": "text", "label": "label", "source": "source", "target": "target"}
    count = getattr(config, "num_labels", None) or len(CLASSES)
    labels = tuple(str(n) for n in range(count)) if count > 1 else CLASSES
    extras: dict[str, Any] = {"task": name, "columns": columns}
    if name in ("classification", "multilabel", "tokens"):
        extras["labels"] = labels
    if name == "choices":
        extras["writer"] = models.writing_task(config) or "causal"
    return task_from_extras(extras)


def of_name(name: str, task: Task | None = None, task_name: str | None = None) -> dict[str, Any]:
    """The fields of a setup that a model's name decides: model, make, task, config.

    Raises:
        CheckpointError: There is no such model, here or on the hub.
    """
    name, config = base.configuration(name)
    task = task or task_named(task_name, config)

    def make(dtype: torch.dtype, storage: Storage | None) -> nn.Module:
        return base.skeleton(copy.deepcopy(config), task, dtype, storage)

    return {"model": name, "make": make, "task": task, "config": config}


def of_model(model: Any, task: Task) -> dict[str, Any]:
    """The same of a model in hand, whose weights are left alone."""
    storage = stored(model)

    def make(dtype: torch.dtype, asked: Storage | None) -> nn.Module:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            made = type(model)(copy.deepcopy(model.config))
        return base.shaped(made, model.dtype, storage or asked)

    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    known = {"model": name, "make": make, "task": task, "config": model.config}
    return known if storage is None else {**known, "storage": storage}


def of_run(
    config: RunConfig,
    longest: int,
    device: torch.device,
    parts: Recipe,
    known: dict[str, Any],
    answer: int | None = None,
) -> Setup:
    """The setup of a run whose longest example has `longest` tokens.

    Args:
        config: The run's settings; where batch is "auto" the most that a step may take is meant.
        longest: Tokens of the longest example.
        device: Where it runs.
        parts: What trains.
        known: What `of_name` or `of_model` gave.
        answer: Tokens of the longest answer.
    """
    rows = config.rows_per_step if config.batch == "auto" else config.rows
    return Setup(
        **{"storage": config.storage, **known},
        recipe=parts,
        batch=rows,
        length=longest,
        target_length=answer or longest,
        accumulate=1 if config.batch == "auto" else config.accumulate,
        precision=models.precision_of(config.precision, device, known["config"]),
        checkpointing=config.checkpointing,
        optimizer=config.optimizer,
        head=config.head if config.head == "auto" or isinstance(config.head, list) else False,
        eval_batch=config.eval_batch,
        keeps=device.type == "cpu" and config.keep == "best",
        device=device,
    )


def checked(value: object, name: str, least: int = 1) -> int:
    """A whole number of at least `least`.

    Raises:
        SettingError: It is another thing.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingError(f"{name} is a whole number of at least {least}; got {value!r}")
    return value
