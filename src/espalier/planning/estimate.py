"""Peak memory by part and the cost of a step, from configuration alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from espalier.errors import SettingError
from espalier.planning.rehearsal import Rehearsal
from espalier.planning.setup import Setup, checked, of_model, of_name, task_named
from espalier.recipes import recipe
from espalier.training import models

if TYPE_CHECKING:
    from espalier.planning.fit import Way

PARTS = (
    "weights", "adapter", "optimiser", "gradients", "activations", "logits", "workspace",
    "libraries",
)  # fmt: skip
MOMENTS_BLOCK, LEAST = 256, 4096  # numbers to a scale of 8-bit moments; smaller tensors keep fp32


@dataclass(frozen=True, slots=True)
class Plan:
    """What a training step takes.

    Attributes:
        setup: What was planned.
        parts: Bytes by part at the moment of the peak.
        saved: Bytes that the forward pass leaves to the backward.
        evaluation: Most bytes in an evaluation with twice the batch.
        flops: Floating-point operations of an optimiser step, a multiply-add as two.
        moved: Bytes that an optimiser step's operations read and write.
        trained: Numbers that train.
        total: Numbers of the base.
        ways: What to change to fit the memory that was asked for, and what that takes.
    """

    setup: Setup
    parts: dict[str, int]
    saved: int
    evaluation: int
    flops: int
    moved: int
    trained: int
    total: int
    memory: int | None = None
    ways: tuple[Way, ...] = ()

    @property
    def peak(self) -> int:
        """Most bytes in a training step."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """Most bytes in training and in the evaluations between."""
        return max(self.peak, self.evaluation)

    @property
    def tokens(self) -> int:
        """Tokens of an optimiser step, padding included."""
        return self.setup.batch * self.setup.accumulate * self.setup.length

    def to_json(self) -> dict[str, Any]:
        """All numbers, and what was asked, as JSON values."""
        own = self.setup
        return {
            "model": own.model, "method": str(own.recipe), "task": own.task.name,
            "batch": own.batch, "accumulate": own.accumulate, "length": own.length,
            "precision": own.precision, "quantize": own.storage and own.storage.kind,
            "checkpointing": own.checkpointing, "optimizer": own.optimizer,
            "device": own.device.type, "peak": self.peak, "parts": self.parts,
            "saved": self.saved, "evaluation": self.evaluation, "flops": self.flops,
            "bytes_moved": self.moved, "tokens": self.tokens, "trained": self.trained,
            "parameters": self.total, "memory": self.memory,
            "ways": [way.to_json() for way in self.ways],
        }  # fmt: skip


def plan(
    model: Any,
    method: Any = "LoRA()",
    *,
    batch: int = 16,
    length: int = 512,
    target_length: int | None = None,
    task: str | None = None,
    accumulate: int = 1,
    precision: str = "auto",
    quantize: str | None = None,
    double_quantization: bool = True,
    checkpointing: bool = False,
    optimizer: str = "adamw",
    head: Any = "auto",
    keep: str = "best",
    device: str | torch.device | None = None,
    memory: int | str | None = None,
) -> Plan:
    """Peak memory by part and the cost of a training step; nothing is downloaded or allocated.

    Args:
        model: A folder, a `config.json`, a run folder (its base), a name on the hub whose files
            are here, or a model in hand, whose weights are left alone.
        method: What trains.
        batch: Rows per micro-batch.
        length: Tokens per row.
        target_length: Tokens per answer of an encoder-decoder; `length` if left out.
        task: The task; writing for a model that writes, else classification.
        accumulate: Micro-batches per optimiser step.
        precision: "fp32", "bf16", or "auto" for what the device has.
        quantize: "nf4", "fp4" or "int8".
        double_quantization: Whether the scales of 4-bit weights are quantised too.
        checkpointing: Whether activations are computed again in the backward pass.
        optimizer: As in `RunConfig`.
        head: As in `attach`.
        keep: "best" keeps a copy of the best numbers in the CPU's memory.
        device: "cpu" or "cuda"; a GPU where there is one, if left out.
        memory: Bytes, or text such as "24GB": what is to be kept within. Adds what to change.

    Raises:
        CheckpointError: There is no such model.
        SettingError: A setting is wrong.
        SiteError: The method cannot stand in this model.
    """
    from espalier.planning.fit import bytes_of, ways
    from espalier.training.config import RunConfig

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    parts = recipe(method)
    # The rules of a run hold for its plan.
    told = RunConfig(
        model="model", train="data", precision=precision, quantize=quantize, task=task,
        double_quantization=double_quantization, optimizer=optimizer, keep=keep,
    )  # fmt: skip
    limit = None if memory is None else bytes_of(memory)
    if isinstance(model, str):
        known = of_name(model, task_name=task)
    else:
        known = of_model(model, task_named(task, model.config))
    _check_positions(known["config"], length)
    setup = Setup(
        **{"storage": told.storage, **known},
        recipe=parts,
        batch=checked(batch, "batch"),
        length=checked(length, "length"),
        target_length=checked(length if target_length is None else target_length, "target_length"),
        accumulate=checked(accumulate, "accumulate"),
        precision=models.precision_of(precision, where, known["config"]),
        checkpointing=checkpointing,
        optimizer=optimizer,
        head=head,
        keeps=keep == "best" and where.type == "cpu",
        device=where,
    )
    rehearsal = Rehearsal(setup)
    found = of_step(rehearsal, setup)
    if limit is None:
        return found
    return dataclasses.replace(found, memory=limit, ways=tuple(ways(rehearsal, found, limit)))


def of_step(rehearsal: Rehearsal, setup: Setup) -> Plan:
    """The plan of a setup, which the rehearsal's model and adapter serve."""
    if setup.step not in rehearsal.plans:
        rehearsal.plans[setup.step] = _watched(rehearsal, setup)
    return dataclasses.replace(rehearsal.plans[setup.step], setup=setup)


def _watched(rehearsal: Rehearsal, setup: Setup) -> Plan:
    course = rehearsal.step(setup)
    line = course.line()
    moment = max(range(len(line)), key=line.__getitem__)
    found = course.parts(moment)
    found["optimiser"], best = held(rehearsal, setup)
    found["adapter"] = found.get("adapter", 0) + best
    found["libraries"] = course.panels.bytes  # from the first step on
    parts = {name: found.get(name, 0) for name in PARTS}
    looking = rehearsal.look(setup, setup.eval_batch or 2 * setup.batch)
    looked = max(looking.line()) + max(course.panels.bytes, looking.panels.bytes)
    trained, work = rehearsal.trained, course.work
    return Plan(
        setup=setup,
        parts=parts,
        saved=course.saved(),
        evaluation=looked + parts["optimiser"] + best,
        flops=work.flops * setup.accumulate,
        # AdamW reads and writes numbers and moments and reads gradients.
        moved=(work.moved + work.fed) * setup.accumulate + 2 * parts["optimiser"] + 12 * trained,
        trained=trained,
        total=rehearsal.numbers,
    )


def held(rehearsal: Rehearsal, setup: Setup) -> tuple[int, int]:
    """Bytes of the optimiser's moments, and of the copy of the best numbers."""
    numbers = [flat.numel() for flat in rehearsal.adapter.flat.values()]
    return moments(numbers, setup.optimizer), 4 * sum(numbers) if setup.keeps else 0


def moments(numbers: list[int], optimizer: str) -> int:
    """Bytes that an optimiser remembers of flat buffers with so many numbers each."""
    if not optimizer.endswith("8bit"):
        return 8 * sum(numbers)
    tables = 2 * 4 * 256
    total = 0
    for count in numbers:
        scales = 2 * 4 * -(-count // MOMENTS_BLOCK)
        total += 8 * count if count < LEAST else 2 * count + scales
    return total + (tables if max(numbers, default=0) >= LEAST else 0)


def _check_positions(config: Any, length: int) -> None:
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < length:
        raise SettingError(f"length must be at most {most}, the model's positions; got {length}.")
