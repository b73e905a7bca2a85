"""The model card of a run: what was adapted to what, how well, and how to use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from espalier.recipes import Recipe
from espalier.shipped import located
from espalier.training.config import RunConfig
from espalier.wording import quoted

if TYPE_CHECKING:
    from espalier.tasks import Row, Task

_CARD = """\
---
{header}
---

# {name} adapted to {task}

{methods}

Base: `{base}`. {trained:,} of {total:,} parameters trained.
Data: `{data}` ({rows} rows).{labels}

{table}

Settings are in `config.yaml`, every step in `metrics.jsonl`.

## Use

```sh
{commands}
```

```python
import espalier as esp
from transformers import {auto}

model = {auto}.from_pretrained({base!r}{settings})
esp.load(model, {adapter!r})
```
"""


def _said(recipe: Recipe) -> list[str]:
    """A line per method: how it is written, and what it does."""
    lines = []
    for method in recipe.methods:
        said = (type(method).__doc__ or "").strip().split("\n")[0]
        lines.append(f"`{Recipe((method,))}`: {said}")
    return lines


_ANSWERS = ("label", "labels", "tags", "target", "score")


def commands(task: Task, row: Row, folder: Path, merges: bool) -> list[str]:
    """What to type to use the adapter in a run folder, with an input like `row`."""
    run, values = shlex.quote(str(folder)), row.values
    if "messages" in values:
        use = f"espalier chat {run}"
    elif "prompt" in values:
        use = f"espalier generate {run} --prompt {_quoted(values['prompt'])}"
    elif task.name == "causal":
        use = f"espalier generate {run} --prompt {_quoted(values['text'])}"
    elif set(values) <= {"text", "label"} and "text" in values:
        use = f"espalier predict {run} {_quoted(values['text'])}"
    else:
        own = {task.columns.get(key, key): v for key, v in values.items() if key not in _ANSWERS}
        row_text = shlex.quote(json.dumps(own, ensure_ascii=False))
        use = f"echo {row_text} | espalier predict {run} --data -"
    merge = [f"espalier merge {run} --out merged"] if merges else []
    return [use, f"espalier eval {run}", *merge]


def card_text(
    config: RunConfig,
    recipe: Recipe,
    task: Task,
    rows: Mapping[str, list[Row]],
    metrics: Mapping[str, Mapping[str, float]],
    account: Mapping[str, Any],
    folder: Path,
) -> str:
    """The card's text, in Markdown with the usual header."""
    header = {"library_name": "espalier", "base_model": located(config.model)}
    header |= {"tags": ["espalier", "peft", task.name]}
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        name=Path(config.model).name,
        task=task.name,
        methods="\n".join(f"- {line}" for line in _said(recipe)),
        base=located(config.model),
        trained=account["trained"] + account["head"],
        total=account["total"],
        data=config.train,
        rows=", ".join(f"{len(some):,} {split}" for split, some in rows.items()),
        labels=f"\nLabels: {', '.join(task.labels)}." if task.labels else "",
        table=_table(metrics),
        commands="\n".join(commands(task, rows["train"][0], folder, account["mergeable"])),
        auto=task.auto_model,
        settings=f", num_labels={len(task.labels)}" if task.labels else "",
        adapter=str(folder / "adapter"),
    )


def _table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    """Metrics by split, in Markdown."""
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = [["", *metrics], *([n, *(_shown(v.get(n)) for v in metrics.values())] for n in names)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _quoted(text: str) -> str:
    return quoted(" ".join(text.split())[:60])
