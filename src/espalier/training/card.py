"""The model card of a run: what was adapted to what, how well, and how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from espalier.deltas import Recipe
from espalier.training.config import RunConfig

if TYPE_CHECKING:
    from espalier.tasks import Task


def in_words(recipe: Recipe) -> list[str]:
    """A line per method: how it is written, and what it does."""
    lines = []
    for method in recipe.methods:
        said = (type(method).__doc__ or "").strip().split("\n")[0]
        lines.append(f"`{Recipe((method,))}`: {said}")
    return lines


def table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by split as a Markdown table."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["", *metrics], *([n, *(_shown(v.get(n)) for v in metrics.values())] for n in names)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def write_card(
    config: RunConfig,
    recipe: Recipe,
    task: Task,
    sizes: Mapping[str, int],
    metrics: Mapping[str, Mapping[str, float]],
    account: Mapping[str, Any],
    folder: Path,
) -> str:
    """The card's text, in Markdown with the usual header."""
    header = {
        "library_name": "espalier",
        "base_model": config.model,
        "tags": ["espalier", "peft", task.name],
    }
    rows = ", ".join(f"{count:,} {split}" for split, count in sizes.items())
    methods = "\n".join(f"- {line}" for line in in_words(recipe))
    trained = f"{account['trained']:,} of {account['total']:,} parameters trained"
    named = f"\nLabels: {', '.join(task.labels)}.\n" if task.labels else ""
    settings = f", num_labels={len(task.labels)}" if task.labels else ""
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# {Path(config.model).name} adapted to {task.name}

{methods}

Base: `{config.model}`. {trained}. Data: `{config.train}` ({rows} rows).
{named}
{table(metrics)}

Settings are in `config.yaml`, every step in `metrics.jsonl`.

## Use

```sh
espalier eval {folder} --data {config.test or config.validation or config.train}
espalier predict {folder} --data rows.jsonl
espalier merge {folder} --out merged
```

```python
import espalier as esp
from transformers import {task.auto_model}

model = {task.auto_model}.from_pretrained({config.model!r}{settings})
esp.load(model, {str(folder / "adapter")!r})
```
"""
