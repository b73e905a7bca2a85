"""Where a run stands, on disk: resumed after a kill at any moment, it goes on bit for bit.

    state/step-120/run.json             position, best result, settings, length of metrics.jsonl
                   tensors.safetensors  the adapter's buffers, constants too, the best ones, and
                                        AdamW's moments
                   random-0.safetensors random states of python, numpy and torch, one per process

A run may go on with another number of processes where `accumulate` makes up for it: the steps are
dealt out of the same micro-batches in the same order.

A state is written under a temporary name and renamed when complete; only then the one before is
removed. No pickle is written or read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from espalier.errors import CheckpointError, SettingError
from espalier.training import randomness
from espalier.training.config import DECISIVE, RunConfig
from espalier.training.optimizers import moments, put_moments
from espalier.wording import setting

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Position:
    """How far a run has come, and what it has found."""

    step: int = 0  # optimiser steps done
    epoch: int = 0
    index: int = 0  # steps done in this epoch
    stale: int = 0  # evaluations since the task's metric was last bettered
    stopped: bool = False  # ended early
    best: dict[str, float] = field(default_factory=dict)  # metrics of the best evaluation
    best_doubt: str | None = None  # see `Task.doubt`
    best_step: int = 0
    latest: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation
    latest_doubt: str | None = None
    tokens: int = 0


@dataclass(frozen=True)
class Fixed:
    """What must be the same when a run is resumed; of processes, their number × accumulate."""

    config: RunConfig
    threads: int
    processes: int
    data: str  # hash of the encoded training examples
    total: int  # optimiser steps of the whole run


def fingerprint(examples: Sequence[dict[str, Any]]) -> str:
    """A hash of encoded examples, to notice data that changed between start and resume."""
    import hashlib

    digest = hashlib.sha256()
    for example in examples:
        for key in sorted(example):
            digest.update(key.encode())
            digest.update(np.asarray(example[key]).tobytes())
    return digest.hexdigest()[:16]


def latest(folder: Path) -> Path | None:
    """The newest complete state in a run folder, or None."""
    states = [p for p in (folder / "state").glob("step-*") if (p / "run.json").is_file()]
    return max(states, key=lambda p: int(p.name[5:]), default=None)


def write(
    folder: Path,
    position: Position,
    fixed: Fixed,
    offset: int,
    parameters: Sequence[nn.Parameter],
    constants: Sequence[Tensor],
    best: Sequence[Tensor] | None,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
) -> None:
    """Write the run's state and drop older ones; called by every process.

    `offset` is the length of metrics.jsonl in bytes at this moment.

    Raises:
        CheckpointError: the folder cannot be written or the disk is full.
    """
    new = folder / "state" / f"writing-{position.step}"
    target = folder / "state" / f"step-{position.step}"
    main = accelerator.is_main_process
    try:
        if main:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        accelerator.wait_for_everyone()
        randomness.write(new / f"random-{accelerator.process_index}.safetensors")
        accelerator.wait_for_everyone()
        if main:
            save_file(_tensors(parameters, constants, best, optimizer), new / "tensors.safetensors")
            _write_json(new / "run.json", position, fixed, offset)
            _flush(new)
            shutil.rmtree(target, ignore_errors=True)
            os.replace(new, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The state of the run cannot be written to {new}: {error}"
        ) from error
    for old in (folder / "state").iterdir() if main else ():
        if old != target:
            shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, position: Position, fixed: Fixed, offset: int) -> None:
    run = {
        "format": 1,
        "position": dataclasses.asdict(position),
        "offset": offset,
        "fixed": {**_plain(fixed), "config": fixed.config.to_dict()},
    }
    path.write_text(json.dumps(run, indent=1), encoding="utf-8")


def read_position(state: Path, fixed: Fixed) -> tuple[Position, int]:
    """Position and length of metrics.jsonl in a state; checks that settings and data are the same.

    Raises:
        SettingError: a setting that matters differs from the stopped run's.
        CheckpointError: the state cannot be read.
    """
    run = _read_json(state)
    was = run["fixed"]
    refuse_changed(was["config"], fixed.config, but="accumulate")
    if was["data"] != fixed.data:
        raise SettingError(
            "The run cannot be resumed: the training data changed since it was started."
        )
    _refuse_other_steps(was["config"]["accumulate"], was["processes"], fixed)
    return Position(**run["position"]), int(run["offset"])


def _refuse_other_steps(accumulate: int, processes: int, fixed: Fixed) -> None:
    """Raise SettingError where a step had another number of micro-batches, dealt as they may be."""
    before, now = accumulate * processes, fixed.config.accumulate * fixed.processes
    if before == now:
        return
    fits = before % fixed.processes == 0
    raise SettingError(
        f"A step had {before} micro-batches (accumulate {accumulate}, in each of {processes} "
        f"processes), and would now have {now} (accumulate {fixed.config.accumulate} in "
        f"{fixed.processes}). "
        + (
            f"Write {setting('accumulate', before // fixed.processes)} and the run goes on with "
            "the same steps."
            if fits
            else f"Resume on a number of processes that divides {before}, with "
            f"{setting('accumulate')} the rest."
        )
    )


def refuse_changed(was: Mapping[str, Any], config: RunConfig, but: str = "") -> None:
    """Raise SettingError where a setting that matters, `but` one, is not the stopped run's."""
    now = config.to_dict()
    changed = [key for key in DECISIVE if key != but and was.get(key) != now[key]]
    if changed:
        lines = [line for key in changed for line in _differences(key, was.get(key), now[key])]
        raise SettingError(
            "A run is resumed with the settings it was started with; these differ:\n"
            + "\n".join(lines)
            + f"\nWrite them as they were, or start anew with {setting('overwrite', True)}."
        )


def _differences(name: str, was: Any, now: Any) -> list[str]:
    """A line for everything within a setting that is not what it was."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        if was.get("method") != now.get("method"):  # their settings have nothing in common
            was, now = {"method": was.get("method")}, {"method": now.get("method")}
        inner = [(f"{name}.{key}", was.get(key), now.get(key)) for key in {**was, **now}]
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        pairs = enumerate(zip(was, now, strict=True), 1)
        inner = [(f"{name} {at}", *pair) for at, pair in pairs]
    else:
        return [f"  {name}: was {was!r}, now {now!r}"]
    return [line for part in inner if part[1] != part[2] for line in _differences(*part)]


def threads_before(folder: Path) -> int | None:
    """The number of threads the stopped run used: another number may change the last bits."""
    state = latest(folder)
    return int(_read_json(state)["fixed"]["threads"]) if state else None


def restore(
    state: Path,
    parameters: Sequence[nn.Parameter],
    constants: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    process: int = 0,
    seed: int = 0,
) -> list[Tensor] | None:
    """Put a state's adapter, optimiser and random states back; the best adapter's tensors come out.

    A process that the stopped run did not have draws from a random state of its own.

    Raises:
        CheckpointError: a file is broken or does not fit this adapter.
    """
    try:
        tensors = load_file(state / "tensors.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The state {state} cannot be read: {error}") from error
    with torch.no_grad():
        for kind, own in (("adapter", parameters), ("constant", constants)):
            for i, tensor in enumerate(own):
                saved = tensors.get(f"{kind}.{i}")
                if saved is None or saved.shape != tensor.shape:
                    raise CheckpointError(f"The state {state} was written for another adapter.")
                tensor.copy_(saved)
    mark = "optimizer."
    remembered = {k.removeprefix(mark): t for k, t in tensors.items() if k.startswith(mark)}
    put_moments(optimizer, remembered)
    drawn = state / f"random-{process}.safetensors"
    if drawn.is_file():
        randomness.read(drawn)
    else:
        randomness.seed_all(seed + process + int(state.name[5:]) * 1_000_003)
    best = [tensors[f"best.{i}"] for i in range(len(parameters)) if f"best.{i}" in tensors]
    return best or None


def _plain(fixed: Fixed) -> dict[str, Any]:
    return {
        "threads": fixed.threads,
        "processes": fixed.processes,
        "data": fixed.data,
        "total": fixed.total,
    }


def _tensors(
    parameters: Sequence[nn.Parameter],
    constants: Sequence[Tensor],
    best: Sequence[Tensor] | None,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Tensor]:
    out = {f"adapter.{i}": p.detach() for i, p in enumerate(parameters)}
    out |= {f"constant.{i}": tensor for i, tensor in enumerate(constants)}
    out |= {f"best.{i}": tensor for i, tensor in enumerate(best or ())}
    out |= {f"optimizer.{label}": tensor for label, tensor in moments(optimizer).items()}
    return {key: tensor.cpu().contiguous() for key, tensor in out.items()}


def _read_json(state: Path) -> dict[str, Any]:
    try:
        return json.loads((state / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"The state {state} cannot be read: {error}") from error


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
