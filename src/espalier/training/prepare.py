"""From settings to what a run works on: data read and checked, examples encoded, limits fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from espalier.errors import SettingError
from espalier.recipes import Recipe
from espalier.shipped import located
from espalier.training import models
from espalier.training.config import RunConfig
from espalier.training.progress import Screen
from espalier.training.result import RunResult
from espalier.wording import setting

if TYPE_CHECKING:
    from accelerate import Accelerator

    from espalier.data import TaskData

IN_MEMORY = "(rows in memory)"  # in the place of a path
Rows: TypeAlias = "Sequence[Mapping[str, Any]] | str | Path"


@dataclass(frozen=True)
class Encoded:
    """Examples by split, where each training example came from, and what was cut."""

    examples: dict[str, list[dict[str, Any]]]
    sources: list[str]
    note: str | None


@dataclass(frozen=True)
class Outset:
    """Where a run begins.

    Attributes:
        started: When, on `time.perf_counter`'s clock.
        accelerator: Device and processes.
        screen: What a person reads; silent in all processes but the main one.
        folder: The run folder, or None when nothing is to be written.
        done: The result, when the run to resume is finished already.
    """

    started: float
    accelerator: Accelerator
    screen: Screen
    folder: Path | None
    done: RunResult | None

    @property
    def main_folder(self) -> Path | None:
        """The run folder in the main process, None in others: where files of all are written."""
        return self.folder if self.accelerator.is_main_process else None


@dataclass(frozen=True)
class Material:
    """All that a run works on."""

    config: RunConfig
    model: Any
    tokenizer: Any
    data: TaskData
    encoded: Encoded
    out: Outset

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.out.accelerator.device

    @property
    def precision(self) -> str:
        """fp32 or bf16; a base in bf16 computes in bf16, whatever the settings are."""
        if self.model.dtype == torch.bfloat16:
            return "bf16"
        return models.precision_of(self.config.precision, self.device, self.model.config)


def read_data(
    config: RunConfig,
    train: Rows | TaskData | None = None,
    validation: Rows | None = None,
    test: Rows | None = None,
    base: Any = None,
) -> TaskData:
    """The task's data, from the config's sources or those given in their place.

    Where columns allow several tasks, the base's configuration decides: `base`, or that of a
    local model folder.
    """
    from espalier.data import TaskData, read_task

    if isinstance(train, TaskData):
        return train
    here = Path(located(config.model)).expanduser().is_dir()
    if base is None and (config.task == "choices" or (config.task is None and here)):
        base = models.load_config(config.model)
    return read_task(
        train if train is not None else config.train,
        validation if validation is not None else config.validation,
        test if test is not None else config.test,
        task=config.task,
        prefer=None if base is None else models.writing_task(base),
        columns=config.columns,
        limit=config.limit,
        validation_share=config.validation_share,
        seed=config.seed,
        system=config.system,
        chat_template=config.chat_template,
        prefix=config.prefix,
        documents=config.documents,
    )


def fitting(config: RunConfig, limit: int | None, words: int = 0) -> RunConfig:
    """The config with a max_length that the model can take; `limit` None means any.

    `words` of the model's positions, which `limit` leaves out, are a prompt's.
    """
    if limit is not None and limit < 2:
        raise SettingError(
            f"a prompt of {words} words leaves no room for text: the model has "
            f"{limit + words} positions. Choose a smaller length."
        )
    if config.max_length is None:
        return config.replace(max_length=min(512, limit or 512))
    if limit is not None and config.max_length > limit:
        beside = f" beside the {words} words of the prompt" if words else ""
        raise SettingError(
            f"{setting('max_length', config.max_length)}: the model takes at most {limit} tokens"
            f"{beside}."
        )
    return config


def encode(data: TaskData, tokenizer: Any, config: RunConfig) -> Encoded:
    """Every split as examples; training examples packed when asked for."""
    examples = {
        split: data.task.encode(rows, tokenizer, config.max_length)
        for split, rows in data.splits.items()
    }
    rows, train = data.splits["train"], examples["train"]
    sources = [row.where for row in rows]
    if len(train) != len(rows):
        sources = [f"block {i} of {config.train}" for i in range(1, len(train) + 1)]
    note = _truncation(train, config.max_length)
    if config.batching == "pack":
        from espalier.data.packing import best_fit, pack

        assert config.max_length is not None
        examples["train"] = pack(train, config.max_length)
        packed = best_fit(train, config.max_length)
        sources = [", ".join(sources[i] for i in some) for some in packed]
    return Encoded(examples, sources, note)


def _truncation(examples: Sequence[Mapping[str, Any]], max_length: int | None) -> str | None:
    """How many rows and answers lose tokens to max_length, or None when none does."""
    cut = sum(e.get("full", 0) > len(e["input_ids"]) for e in examples)
    if not cut:
        return None
    answers = sum(bool(e.get("cut")) for e in examples)
    also = f"; {answers / len(examples):.1%} of the answers lose words" if answers else ""
    return f"{cut / len(examples):.1%} of the training rows are cut to {max_length} tokens{also}"


def config_in_hand(
    model: Any,
    sources: Mapping[str, Any],
    parts: Recipe | None,
    settings: Mapping[str, Any],
) -> RunConfig:
    """The settings of a run on objects in hand; `sources` are train, validation and test."""
    if settings.get("quantize") not in (None, "none"):
        raise SettingError(
            f"{setting('quantize', settings['quantize'])} loads a base in few bits, and this model "
            f"is loaded: call esp.quantize(model, {settings['quantize']!r}) before esp.fit."
        )

    def named(source: Any) -> str | None:
        if source is None:
            return None
        return str(source) if isinstance(source, str | Path) else IN_MEMORY

    return RunConfig(
        model=getattr(model.config, "_name_or_path", "") or type(model).__name__,
        method=parts.to_json() if parts is not None else "(the active adapter)",
        **{split: named(source) for split, source in sources.items()},
        **settings,
    )
