"""`batch: auto`, and what a run that ran out of memory is told."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from espalier.errors import EspalierError, SettingError
from espalier.graft import get
from espalier.planning.estimate import of_step
from espalier.planning.fit import flags, largest, ways
from espalier.planning.rehearsal import Rehearsal
from espalier.planning.setup import Setup, of_model, of_name, of_run
from espalier.training.config import RunConfig
from espalier.training.memory import in_words
from espalier.verbs import only_active
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.recipes import Recipe
    from espalier.tasks import Task

Known = Callable[[], Mapping[str, Any]]
OF_GPU, OF_RAM = 0.9, 0.8  # shares of what is free that a run may take


def available(device: torch.device, processes: int = 1) -> int:
    """Bytes that a run may take on a device, some of what is free being left alone."""
    if device.type == "cuda":
        return int(OF_GPU * torch.cuda.mem_get_info(device)[0])
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in _CONTAINER:
        with contextlib.suppress(OSError, ValueError):  # "max" where there is none
            free = min(free, int(limit.read_text()) - int(used.read_text()))
    return int(OF_RAM * free / processes)


# A container's own limit and what it has taken, in both forms of Linux's control groups.
_CONTAINER = [
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
]


def lengths(examples: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[int, int | None]:
    """Tokens of the longest example and of the longest answer, over all splits."""
    every = [example for split in examples.values() for example in split]
    longest = max(len(example["input_ids"]) for example in every)
    answers = [len(e["labels"]) for e in every if isinstance(e.get("labels"), list)]
    return longest, max(answers, default=None)


def settle(
    config: RunConfig,
    parts: Recipe,
    known: Known,
    examples: Mapping[str, Sequence[Mapping[str, Any]]],
    accelerator: Any,
    held: int = 0,
) -> tuple[RunConfig, str | None]:
    """The config with a batch in place of "auto", and what to say of it.

    Args:
        config: The run's settings; one whose batch is a number comes back as it is.
        parts: What trains.
        known: Gives what `of_name` or `of_model` gives, when asked.
        examples: Encoded, by split.
        accelerator: Device and processes; all take what the first one finds.
        held: Bytes of the model that lie on the device already.

    Raises:
        SettingError: Not even one example fits, or the recipe cannot be planned.
    """
    if config.batch != "auto":
        return config, None
    if config.resume and config.out and (before := Path(config.out) / "config.yaml").is_file():
        begun = RunConfig.from_yaml(before)
        return config.replace(batch=begun.batch, accumulate=begun.accumulate), None
    longest, answer = lengths(examples)
    setup = of_run(config, longest, accelerator.device, parts, dict(known()), answer)
    memory = available(accelerator.device, accelerator.num_processes) + held
    rehearsal = Rehearsal(setup)
    batch = largest(rehearsal, setup, memory)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        batch = broadcast_object_list([batch])[0]
    if batch is None:
        told = shortage(setup, memory, rehearsal)
        none = f"{setting('batch', 'auto')} finds no room for one example of {longest} tokens."
        raise SettingError(f"{none} {told}")
    accumulate = setup.batch // batch
    said = (
        f"{setting('batch', 'auto')} is {batch} with {setting('accumulate', accumulate)}, for "
        f"{in_words(memory)} of memory and up to {longest} tokens per example"
    )
    return config.replace(batch=batch, accumulate=accumulate), said


def known_of(model: Any, task: Task) -> Known:
    """What a run knows of its base, by name or in hand."""
    return lambda: of_name(model, task) if isinstance(model, str) else of_model(model, task)


def recipe_of(model: Any) -> Recipe:
    """The recipe of the active adapter of a model in hand."""
    return get(model, only_active(model)).recipe


def taken(model: Any) -> int:
    """Bytes of a model's parameters where they lie."""
    own = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(own.values())


def out_of_memory(
    config: RunConfig, longest: int, parts: Recipe, model: Any, task: Task, device: torch.device
) -> str:
    """What a step of a run takes and what to change, for a run that did not get it; or nothing."""
    try:
        setup = of_run(config, longest, device, parts, of_model(model, task))
        rehearsal = Rehearsal(setup)
        memory = available(device) + taken(model)
        plan = of_step(rehearsal, setup)
        return shortage(setup, min(memory, int(OF_RAM * plan.needed)), rehearsal)
    except (EspalierError, RuntimeError, MemoryError, TypeError, AttributeError):
        return ""  # the run's own error is what must be told, also where it cannot be planned


def shortage(setup: Setup, memory: int, rehearsal: Rehearsal) -> str:
    """The parts of a plan that does not fit, up to three ways out with numbers, and a command."""
    plan = of_step(rehearsal, setup)
    large = sorted(plan.parts.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in large if size > 0.02 * plan.peak)
    lines = [
        f"A step takes {in_words(plan.peak)} ({parts}), an evaluation {in_words(plan.evaluation)}. "
        "What helps, each on top of those before:"
    ]
    found = list(ways(rehearsal, plan, memory))
    for number, way in enumerate(found[:2] + found[2:][-1:], 1):
        changes = "; ".join(way.changes)
        lines.append(f"  {number}. {changes}: {in_words(way.plan.needed)}")
    again = " ".join(["espalier plan", *flags(setup), "--length", str(setup.length)])
    lines.append(f"More: {again} --memory {memory // 10**6}MB")
    return "\n".join(lines)
