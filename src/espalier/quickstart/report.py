"""The quickstarts' tables for the terminal and their README files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from espalier.training.memory import in_words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from espalier.quickstart.apart import Measured
    from espalier.quickstart.decoder import Adaptation
    from espalier.quickstart.encoder import Comparison

COLUMNS = ("", "accuracy", "trained", "of all", "kept", "step", "× full", "memory")


def encoder_rows(found: Comparison) -> list[tuple[str, ...]]:
    """The table's rows as text, the baselines last."""
    from espalier.quickstart.encoder import accuracy_of

    full = found.runs[-1].step_seconds
    rows: list[tuple[str, ...]] = [
        (
            run.name,
            _accuracy(accuracy_of(run), found.tested),
            f"{run.trained:,}",
            percent(run.share),
            size_of(run.kept),
            f"{run.step_seconds:.2f} s",
            f"{run.step_seconds / full:.2f}",
            "–" if run.peak is None else size_of(run.peak),
        )
        for run in found.runs
    ]
    blank = ("",) * (len(COLUMNS) - 2)
    rows.append(("tf-idf", _accuracy(found.tfidf, found.tested), *blank))
    rows.append(("majority", _accuracy(found.majority, found.tested), *blank))
    return rows


def _accuracy(share: float, count: int) -> str:
    from espalier.quickstart.encoder import margin

    return f"{share:.3f} ± {margin(share, count):.3f}".replace("± 0.", "± .")


def size_of(count: float) -> str:
    """Bytes with a unit and, from a megabyte on, one decimal below 10."""
    return f"{count / 1e6:.1f} MB" if 1e6 <= count < 1e7 else in_words(count)


def percent(share: float) -> str:
    """A share in percent, short."""
    return "100 %" if share >= 0.9995 else f"{100 * share:.{2 if share < 0.001 else 1}f} %"


def encoder_table(found: Comparison) -> Table:
    """The comparison for the terminal; fits 80 columns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.title_justify, table.title_style = "left", "bold"
    table.title = (
        f"Subject of a docstring, {found.labels} subjects, {found.sizes['train']} training rows"
    )
    table.caption_justify = "left"
    table.caption = (
        f"Accuracy on {found.tested} rows of modules not trained on, ± half of a 95 % interval for "
        "the choice of rows; one seed. tf-idf: with logistic regression, on the same rows. Step: "
        "median time, and its ratio to full tuning's. Memory: peak of the whole process, Python "
        "and torch included."
    )
    for i, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    rows = encoder_rows(found)
    for i, row in enumerate(rows):
        table.add_row(*row, end_section=i == len(found.runs) - 1, style="" if row[2] else "dim")
    return table


def markdown(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in [columns, *rows]]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(columns) - 1), *lines[1:]])


def encoder_readme(found: Comparison) -> str:
    """The README of the run folder."""
    lora = found.folder / "lora"
    return f"""# Quickstart: three ways to adapt one model

all-MiniLM-L6-v2 learned to tell what a docstring is about ({found.labels} subjects) from
{found.sizes["train"]} docstrings of Python's standard library and installed packages. No module is
in both training and test; names that give the subject away are masked.

{markdown(COLUMNS, encoder_rows(found))}

Accuracy on {found.tested} test rows, ± half of a 95 % interval for the choice of rows; one seed.
Same rows, order and number of steps for each method; learning rates found with as many tries each.
tf-idf: with logistic regression, on the same rows. Step: median time of a training step on this
machine, and its ratio to full tuning's. Memory: peak of the whole process, with Python and torch.

![accuracy and learning curves](quickstart.png)

Each folder is an ordinary run: `config.yaml` (settings), `metrics.jsonl` (every step), `adapter/`.
`data/` holds the rows.

```sh
{chr(10).join(next_steps(lora))}
```
"""


def next_steps(lora: Path) -> list[str]:
    """What to type next: this adapter first, then one's own data."""
    return [
        f'espalier predict {lora} "Send a request and return the response."',
        f"espalier inspect {lora}",
        "espalier data check reviews.csv          # your file: text and label columns",
        "espalier train --train reviews.csv --method lora --model demo-encoder",
    ]


def loss_of(run: Measured, weight: float = 0.9) -> tuple[list[int], list[float]]:
    """Steps and the smoothed loss of a run's training."""
    steps, values = [], []
    mean, norm = 0.0, 0.0
    for line in run.steps:
        mean, norm = weight * mean + (1 - weight) * line["loss"], weight * norm + (1 - weight)
        steps.append(line["step"])
        values.append(mean / norm)
    return steps, values


# ------------------------------------------------------------------------------------- decoder

BITS = ("bits per character", "before", "after", "change")


def bits_rows(found: Adaptation) -> list[tuple[str, ...]]:
    """Bits per character on both kinds of text, before and after."""
    kinds = (
        (f"docstrings ({found.sizes['test']} functions)", found.docstrings),
        (f"source code ({found.source_chars:,} characters)", found.source),
    )
    return [
        (kind, f"{before:.3f}", f"{after:.3f}", f"{100 * (after / before - 1):+.1f} %")
        for kind, (before, after) in kinds
    ]


def effort(found: Adaptation) -> str:
    """What the adaptation took, in one sentence."""
    run = found.run
    peak = "" if run.peak is None else f", peak memory {in_words(run.peak)}"
    return (
        f"LoRA trains {run.trained:,} parameters ({percent(run.share)} of the model), keeps "
        f"{size_of(run.kept)}; {len(run.steps)} steps at {found.training_speed:,.0f} tokens/s"
        f"{peak}; writes {found.writing_speed:,.0f} tokens/s."
    )


def decoder_tables(found: Adaptation) -> list[RenderableType]:
    """The comparison and the samples for the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    bits = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    bits.title = f"Signature → first line of the docstring, {found.sizes['train']} training rows"
    for i, name in enumerate(BITS):
        bits.add_column(name, justify="right" if i else "left", no_wrap=bool(i))
    for row in bits_rows(found):
        bits.add_row(*row)
    parts: list[RenderableType] = [bits, Text(effort(found)), Text()]
    for sample in found.samples:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True, min_width=8)
        grid.add_column(overflow="fold")
        grid.add_row("", Text(_signature(sample.prompt), style="bold"))
        grid.add_row("human", sample.human)
        grid.add_row("before", Text(sample.before or "(nothing)", style="yellow"))
        grid.add_row("after", Text(sample.after or "(nothing)", style="green"))
        parts += [grid, Text()]
    return parts


def _signature(prompt: str) -> str:
    return prompt.split("\n")[0].strip()


def decoder_readme(found: Adaptation) -> str:
    """The README of the run folder."""
    samples = "\n\n".join(
        f"`{_signature(s.prompt)}`\n\n- human: {s.human}\n- before: {s.before or '(nothing)'}\n"
        f"- after: {s.after or '(nothing)'}"
        for s in found.samples
    )
    return f"""# Quickstart: a decoder learns to write docstrings

Espalier's small decoder read Python source code; LoRA then learned, from {found.sizes["train"]}
functions of installed packages, to write the first line of a docstring after a signature, with the
loss on that line alone. Test functions are of other modules; the source code measured is of modules
that the base never read, and shows what the adapter forgets while it is active (switched off, the
base is unchanged).

{markdown(BITS, bits_rows(found))}

{effort(found)} Speeds are of this machine.

![bits per character and learning curve](quickstart.png)

{samples}

`lora/` is an ordinary run: `config.yaml`, `metrics.jsonl`, `adapter/`. `data/` holds the rows.
"""
