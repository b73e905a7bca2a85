"""The settings of a run: one frozen object behind flags, YAML files and `esp.fit`.

Every field says in its description what it does (the command shows it as help), is checked when
the object is made, and together they are checked for contradictions. Wrong or unknown settings
raise `SettingError` with one sentence each. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from espalier.errors import SettingError
from espalier.training.aliases import sentences
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.storage import Storage

# Settings that must be the same for a resumed run to equal a run never stopped.
# fmt: off
DECISIVE = (
    "model", "method", "head", "task", "train", "validation", "columns", "limit",
    "validation_share", "system", "chat_template",
    "prefix", "documents", "max_length", "epochs", "steps", "batch", "eval_batch", "accumulate",
    "batching", "lr", "head_lr", "schedule", "warmup", "weight_decay", "clip", "precision",
    "quantize", "double_quantization", "compile", "optimizer",
    "evaluate_every", "patience", "keep", "seed", "generate", "max_new_tokens", "trunk_cache",
    "trunk_dtype",
)
# fmt: on

TaskName = Literal[
    "classification", "multilabel", "regression", "tokens", "causal", "seq2seq", "choices"
]


class RunConfig(BaseModel):
    """Everything that decides a run: the same keys for flags, YAML files and `esp.fit`.

    Raises:
        SettingError: a key is unknown, missing or has a wrong value, or two contradict.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="Base model: a local folder, a name on the hub, demo-encoder or demo-decoder.",
        min_length=1,
    )
    train: str = Field(
        description="Training data: a file (jsonl, csv, parquet, txt), a folder, a data set name.",
        min_length=1,
    )
    validation: str | None = Field(None, description="Validation data, as for train.")
    test: str | None = Field(None, description="Test data, evaluated once at the end.")
    task: TaskName | None = Field(None, description="The task; found from the columns if left out.")
    columns: dict[str, str] | None = Field(
        None, description="Which column plays which part, like {text: review, label: stars}."
    )
    limit: int | None = Field(
        None,
        ge=1,
        description="Use at most this many rows of each split, chosen by seed: of train the same "
        "ones whether validation data is given or set aside.",
    )
    validation_share: float = Field(
        0.1, ge=0, lt=1, description="Share of train held out when no validation data is given."
    )
    system: str | None = Field(
        None, description="System text for conversations that bring none; saved with the adapter."
    )
    chat_template: str | None = Field(
        None, description="Chat template (Jinja) in place of the tokenizer's; saved as well."
    )
    prefix: str = Field(
        "", description="Text put before each source or question (seq2seq, choices)."
    )
    documents: Literal["file", "paragraphs"] = Field(
        "file", description="Whether a .txt file is one text or one per paragraph."
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Longest input in tokens, the rest is cut off; the model's own limit, "
        "at most 512, if left out.",
    )

    method: str | dict[str, Any] | list[Any] = Field(
        "LoRA()", description="Method or sum of methods, like 'LoRA(rank=8) + HeadOnly()'."
    )
    head: Literal["auto", "none"] | list[str] = Field(
        "auto", description="Modules trained whole with the adapter: auto, none or a list of names."
    )
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic; auto is bf16 on GPUs and CPUs with units for it (on a CPU for "
        "models at least 256 wide), fp32 elsewhere.",
    )
    quantize: Literal["nf4", "fp4", "int8", "none"] | None = Field(
        None, description="Load the base's layers in 4 or 8 bits; needs bitsandbytes."
    )
    double_quantization: bool = Field(
        True, description="Quantise the scales of 4-bit weights too: 4.127 bits each, not 4.5."
    )
    checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, about 1/3 slower.",
    )
    offload: Literal["none", "cpu"] = Field(
        "none",
        description="Keep activations in the host's memory (cpu) between a GPU's forward and "
        "backward pass.",
    )
    compile: Literal["none", "layers", "model"] = Field(
        "none",
        description="torch.compile: each repeated block (layers), or all in one graph (model); "
        "pays in long runs.",
    )

    sharding: Literal["none", "fsdp", "hybrid", "zero3"] = Field(
        "none",
        description="Spread the frozen base over processes: fsdp (torch's FSDP2) over all, hybrid "
        "within each machine, zero3 by DeepSpeed; none keeps it whole in each.",
    )

    epochs: float = Field(3.0, gt=0, description="Passes over the training data.")
    steps: int | None = Field(None, ge=1, description="Optimiser steps, in place of epochs.")
    batch: Literal["auto"] | int = Field(
        16,
        description="Examples per micro-batch and device; auto is the most that fits in memory, "
        "accumulated to steps of 16 (times accumulate).",
    )
    accumulate: int = Field(1, ge=1, description="Micro-batches per optimiser step.")
    batching: Literal["bucket", "pack", "random"] = Field(
        "bucket",
        description="bucket: like lengths together; pack: fill max_length; random: shuffled.",
    )
    lr: float | None = Field(
        None, gt=0, description="Highest learning rate; the method's if left out."
    )
    head_lr: float | None = Field(
        None,
        gt=0,
        description="Highest learning rate of the task head; if left out lr, or 8 / its input "
        "width (at most 0.02) where that is more.",
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Course of the learning rate after the warm-up."
    )
    warmup: float = Field(
        0.06, ge=0, description="Warm-up: a share of the steps if below 1, else steps."
    )
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="AdamW; its moments in 8 bits, or in memory paged out of a GPU."
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    clip: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of every random number.")
    threads: Literal["auto"] | int = Field(
        "auto", description="CPU threads: a number from 1, or auto to probe for a second."
    )
    trunk_cache: Literal["none", "memory", "disk"] = Field(
        "none",
        description="Where to keep the states of blocks below all that trains, so that they run "
        "once: none, memory or disk.",
    )
    trunk_dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="Type of the kept states: bf16 takes half the room of fp32."
    )
    trunk_limit: float = Field(8.0, gt=0, description="Most room for kept states, in GB.")
    trunk_folder: Path | None = Field(
        None, description="Folder of states kept on disk; ~/.cache/espalier/trunk if left out."
    )

    evaluate_every: int | None = Field(
        None, ge=1, description="Steps between evaluations; each epoch if left out."
    )
    eval_batch: int | None = Field(
        None, ge=1, description="Examples per batch in evaluation; twice batch if left out."
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between saves for resuming; each epoch if left out."
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Stop after this many evaluations in which the task's metric is not bettered; "
        "a lower loss alone does not count.",
    )
    keep: Literal["best", "last"] = Field(
        "best",
        description="Adapter kept: the best on validation data (by the task's metric, among equals "
        "by loss), or the last.",
    )
    generate: bool = Field(
        False, description="Also generate in the last evaluation: exact match, BLEU and ROUGE-L."
    )
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer in tokens.")

    out: Path | None = Field(None, description="Run folder; runs/<data>-<method> if left out.")
    resume: bool = Field(False, description="Go on with the stopped run in the run folder.")
    overwrite: bool = Field(False, description="Replace what stands in the run folder.")
    tensorboard: bool = Field(False, description="Also write events for tensorboard.")
    dry_run: bool = Field(
        False, description="Do everything up to one step, print the plan, write nothing."
    )
    quiet: bool = Field(False, description="Print nothing while training.")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise SettingError(_message(error)) from None

    @field_validator("quantize")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        if isinstance(self.threads, int) and self.threads < 1:
            raise ValueError(
                f"{setting('threads')} must be at least 1 or auto; got {self.threads}."
            )
        if isinstance(self.batch, int) and self.batch < 1:
            raise ValueError(f"{setting('batch')} must be at least 1 or auto; got {self.batch}.")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(
                f"{setting('warmup')} is a share below 1 or a whole number of steps; got "
                f"{self.warmup:g}."
            )
        if self.steps is not None and self.warmup >= max(1, self.steps):
            raise ValueError(
                f"{setting('warmup')} takes {self.warmup:g} steps but the run has only "
                f"{self.steps}."
            )
        if self.trunk_folder and self.trunk_cache != "disk":
            raise ValueError(
                f"{setting('trunk_folder')} is for {setting('trunk_cache', 'disk')}; now it is "
                f"{self.trunk_cache}."
            )
        if self.compile != "none" and self.trunk_cache != "none":
            raise ValueError(
                f"{setting('compile', self.compile)} and "
                f"{setting('trunk_cache', self.trunk_cache)}: choose one; the cached blocks do not "
                "run, and what is left is short."
            )
        if self.sharding != "none":
            _check_sharding(self)
        if self.patience and not self.validation and self.validation_share == 0:
            raise ValueError(
                f"{setting('patience')} needs validation data: give {setting('validation')} or a "
                f"{setting('validation_share')} above 0."
            )
        if self.batching == "pack" and self.task not in (None, "causal"):
            pack = setting("batching", "pack")
            raise ValueError(f"{pack} is for causal language models; the task is {self.task}.")
        if self.generate and self.task not in (None, "causal", "seq2seq"):
            what = f"{setting('generate')} is for the tasks causal and seq2seq"
            raise ValueError(f"{what}; the task is {self.task}.")
        if self.resume and self.overwrite:
            raise ValueError(
                f"{setting('resume')} goes on with a run and {setting('overwrite')} discards it: "
                "choose one."
            )
        if self.resume and self.out is None:
            need = f"{setting('resume')} needs {setting('out')}"
            raise ValueError(f"{need}: the folder of the run to go on with.")
        if self.resume and self.dry_run:
            raise ValueError(
                f"{setting('dry_run')} starts nothing that {setting('resume')} could go on with: "
                "choose one."
            )
        return self

    @property
    def storage(self) -> Storage | None:
        """How the base is to be quantised, if it is."""
        from espalier.storage import Storage

        return None if self.quantize is None else Storage(self.quantize, self.double_quantization)

    @property
    def rows(self) -> int:
        """Examples per micro-batch, once that of `batch: auto` is known."""
        if self.batch == "auto":
            auto = setting("batch", "auto")
            raise SettingError(f"{auto} is settled by a run when its data is read")
        return self.batch

    @property
    def rows_per_step(self) -> int:
        """Examples of an optimiser step in each process."""
        batch = RunConfig.model_fields["batch"].default if self.batch == "auto" else self.batch
        return batch * self.accumulate

    @property
    def batch_in_evaluation(self) -> int:
        """Examples per batch where no gradients are kept."""
        return self.eval_batch or 2 * self.rows

    def replace(self, **changes: Any) -> RunConfig:
        """This config with some settings changed, checked anew."""
        return RunConfig(**(self.model_dump() | changes))

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values, in the order of the fields."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """All settings, defaults too, as YAML that `from_yaml` reads back."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    @classmethod
    def from_yaml(
        cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
    ) -> RunConfig:
        """The settings in a YAML file, with `overrides` (flags) in place of the file's values.

        Raises:
            SettingError: the file is missing or no YAML mapping, or a setting is wrong.
        """
        return cls(**(_read_yaml(Path(path)) | dict(overrides or {})))


def _check_sharding(config: RunConfig) -> None:
    what = setting("sharding", config.sharding)
    if config.quantize:
        raise ValueError(
            f"{what} spreads weights in full precision, and "
            f"{setting('quantize', config.quantize)} packs them with scales that no shard keeps: "
            "choose one (70 billion numbers in nf4 take 36 GB)."
        )
    other = {"trunk_cache": config.trunk_cache, "compile": config.compile}
    for name, value in {**other, "offload": config.offload}.items():
        if value != "none":
            raise ValueError(
                f"{what} gathers and frees each block as it runs, which {setting(name, value)} "
                "does not follow: choose one."
            )
    if config.batch == "auto":
        auto = setting("batch", "auto")
        raise ValueError(f"{auto} reckons with a whole base, {what} cuts it: give a number.")
    if config.generate and config.task == "seq2seq":
        raise ValueError(
            f"{setting('generate')} calls the encoder alone, which {what} does not allow: leave it "
            "out, and write with the trained adapter in one process (`espalier generate`)."
        )


def _message(error: ValidationError) -> str:
    descriptions = {name: f.description or "" for name, f in RunConfig.model_fields.items()}
    return "\n".join(sentences(error.errors(), descriptions))  # pyright: ignore[reportArgumentType]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"There is no config file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"The config file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise SettingError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SettingError(f"{path} must hold lines like `batch: 16`; found something else.")
    return content
