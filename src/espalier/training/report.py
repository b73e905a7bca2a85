"""What a run says at its beginning and its end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from espalier.quantised import measure
from espalier.recipes import Recipe
from espalier.training.card import commands
from espalier.training.loop import Loop
from espalier.training.memory import in_words
from espalier.training.processes import described
from espalier.training.progress import Screen, duration
from espalier.training.result import RunResult

if TYPE_CHECKING:
    from espalier.data import TaskData


def plan(loop: Loop, data: TaskData, parts: Recipe, account: Mapping[str, Any]) -> list[str]:
    """What is about to happen, in a few lines."""
    config, task = loop.config, data.task
    rows = ", ".join(f"{len(rows):,} {split}" for split, rows in data.splits.items())
    labels = f" · {len(task.labels)} labels" if task.labels else ""
    trained = account["trained"] + account["head"]
    share = trained / max(1, account["total"])
    size = config.rows_per_step * loop.job.accelerator.num_processes
    device = loop.job.accelerator.device
    threads = f", {loop.job.threads} CPU threads" if device.type == "cpu" else ""
    length = (
        f"{config.steps} steps"
        if config.steps
        else f"{loop.total} steps ({config.epochs:g} epochs)"
    )
    head = "" if loop.head_lr == loop.job.lr else f" (head {loop.head_lr:.3g})"
    rate = f"lr {loop.job.lr:g}{head} · {loop.job.precision} · {device}{threads}"
    return [
        f"{task.name} · {rows} rows{labels}",
        *data.notes,
        f"{parts} · trains {trained:,} of {account['total']:,} parameters ({share:.2%})",
        f"{length} of {size} examples · {rate}",
        *([] if loop.note is None else [loop.note]),
        *described(config, loop.job.accelerator),
        *in_few_bits(loop.job.model),
    ]


def in_few_bits(model: Any) -> list[str]:
    """A line on what a quantised base takes, by arithmetic and measured; none for others."""
    found = measure(model)
    if found is None:
        return []
    packed, rest = found.numbers
    dtype = "fp32" if model.dtype == torch.float32 else "bf16 (norms in fp32)"
    taken, counted, dense = (
        f"{size / 1e6:,.1f} MB" for size in (found.total, found.measured or 0, found.dense)
    )
    return [
        f"base in {found.storage}: {packed:,} numbers at {found.storage.bits:.3f} bits and "
        f"{rest:,} in {dtype}: {taken} by arithmetic, {counted} measured ({dense} unquantised)"
    ]


def end(screen: Screen, result: RunResult, data: TaskData, keep: str) -> None:
    """What was made, how good it is, and what to type next."""
    table = Table(show_edge=False, pad_edge=False)
    table.add_column("")
    names = list(dict.fromkeys(name for values in result.metrics.values() for name in values))
    for split in result.metrics:
        table.add_column(split, justify="right")
    for name in names:
        values = [values.get(name) for values in result.metrics.values()]
        table.add_row(name, *("" if value is None else f"{value:.4g}" for value in values))
    screen.say("")
    screen.console.print(table)
    screen.say(f"\n{result.steps} steps in {duration(result.seconds)}{_kept(result, keep)}.")
    if result.doubt:
        screen.say(result.doubt)
    if result.folder is None:
        return
    screen.say(f"The adapter is in {result.folder / 'adapter'} ({_size(result.folder)}).")
    screen.say("What to type next:")
    merges = result.account["mergeable"]
    for command in commands(data.task, data.splits["train"][0], result.folder, merges):
        screen.say(f"  {command}")


def _kept(result: RunResult, keep: str) -> str:
    """Which evaluation's adapter is kept, and by what it was the best."""
    if not result.best:
        return ""
    best = f"the best {result.metric} on validation data ({result.best[result.metric]:.4g})"
    step = f"step {result.best['step']:.0f}"
    kept = f"kept from {step}:" if keep == "best" else f"the last is kept, {step} had"
    return f"; {kept} {best}"


def _size(folder: Path) -> str:
    return in_words(sum(p.stat().st_size for p in (folder / "adapter").iterdir()))
