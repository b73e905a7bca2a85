"""Quickstart with a decoder: from a function's signature to the first line of its docstring.

The base read Python source and nothing else. LoRA, with the loss on the docstring alone, makes it
better at docstrings; what it forgets of source code is measured on modules it never saw.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.quickstart.apart import Measured, free_folder, train_apart
from espalier.quickstart.bits import docstring_bits, held_out_source, source_bits, writing_speed
from espalier.quickstart.encoder import write_rows
from espalier.quickstart.report import decoder_readme, decoder_tables, loss_of
from espalier.training.folders import write_text

if TYPE_CHECKING:
    from rich.console import Console

Rows = dict[str, list[dict[str, str]]]
METHOD = "LoRA(rank=16, alpha=32)"
LR = 2e-3  # the base is small: its best rate is above the default
MODEL = "demo-decoder"
SHOWN = 4  # samples before and after


@dataclass(frozen=True)
class Size:
    """How much the quickstart does: enough to show something within 4 minutes on 2 cores."""

    rows: int = 2400
    test: int = 200
    validation: int = 100
    epochs: float = 2
    source_chars: int = 60_000


QUICK = Size(rows=40, test=12, validation=8, epochs=1, source_chars=2_000)


@dataclass(frozen=True)
class Sample:
    """One prompt of the test modules: the human's words, and the model's before and after."""

    prompt: str
    human: str
    before: str
    after: str


@dataclass(frozen=True)
class Adaptation:
    """What came of it; bits are per character, (before, after)."""

    folder: Path
    run: Measured
    sizes: dict[str, int]
    docstrings: tuple[float, float]
    source: tuple[float, float]
    source_chars: int
    samples: list[Sample]
    writing_speed: float
    """Tokens a second when writing, one prompt at a time."""

    @property
    def training_speed(self) -> float:
        """Tokens a second in training, prompts among them."""
        times = sorted(step["tokens_per_second"] for step in self.run.steps)
        return times[len(times) // 2]


def quickstart(
    size: Size, out: Path | None, seed: int, base: Path | None, screen: Console
) -> Adaptation:
    """Train, compare before and after on both kinds of text, and write down what came of it.

    Raises:
        CheckpointError: The base is missing or damaged.
        DataError: Too little source is installed.
    """
    from espalier.base import verify

    verify(base)
    model = MODEL if base is None else str(base)
    folder = free_folder(out, "quickstart-generate")
    screen.print("Reading signatures and docstrings of installed packages ...")
    rows = chosen_rows(size, seed)
    sizes = {split: len(some) for split, some in rows.items()}
    files = write_rows(rows, folder / "data")
    screen.print(
        f"{sizes['train']} functions to train on, {sizes['test']} of other modules to test on.",
        soft_wrap=True,
    )
    screen.print("[bold]LoRA[/bold]")
    settings = settings_of(size, seed, model, files) | {"out": str(folder / "lora")}
    run = train_apart("LoRA", settings, screen)
    found = _compare(folder, run, rows, size)
    _write_down(found)
    return found


def chosen_rows(size: Size, seed: int) -> Rows:
    """Rows of each split; which ones of many is up to the seed."""
    from espalier.base.signatures import signature_examples

    most = {"train": size.rows, "validation": size.validation, "test": size.test}
    splits = signature_examples()
    dice = random.Random(seed)
    return {
        split: dice.sample(splits[split], min(count, len(splits[split])))
        for split, count in most.items()
    }


def settings_of(size: Size, seed: int, model: str, files: dict[str, Path]) -> dict[str, Any]:
    """The run's settings, as they would stand in a config file."""
    return {
        "model": model,
        **{split: str(path) for split, path in files.items()},
        "task": "causal",
        "columns": {"prompt": "prompt", "completion": "completion"},
        "method": METHOD,
        "lr": LR,
        "epochs": size.epochs,
        "max_length": 160,
        "max_new_tokens": 40,
        "batch": 16,
        "seed": seed,
    }


def _compare(folder: Path, run: Measured, rows: Rows, size: Size) -> Adaptation:
    """Bits per character on both kinds and samples, without and with the adapter."""
    import espalier as esp
    from espalier.commands.noise import aside
    from espalier.generation import Writing, open_adapter, write

    with aside():
        at = open_adapter(run.folder)
        source = held_out_source(size.source_chars)
        asked = rows["test"][:SHOWN]
        how = Writing.saved(at.extras)
        bits: list[tuple[float, float]] = []
        answers: list[list[str]] = []
        for active in (None, "adapter"):
            esp.activate(at.model, active)
            bits.append((docstring_bits(at, rows["test"]), source_bits(at, source)))
            answers.append(write(at, asked, how))
        speed = writing_speed(at, asked[0]["prompt"])
    samples = [
        Sample(row["prompt"], row["completion"], _line(before), _line(after))
        for row, before, after in zip(asked, *answers, strict=True)
    ]
    return Adaptation(
        folder,
        run,
        {split: len(some) for split, some in rows.items()},
        (bits[0][0], bits[1][0]),
        (bits[0][1], bits[1][1]),
        len(source),
        samples,
        speed,
    )


def _line(text: str) -> str:
    """What a docstring's first line would be: up to its end, on one line."""
    return " ".join(text.split('"""')[0].split())


def _write_down(found: Adaptation) -> None:
    """figures.json, samples.jsonl, README.md and, with matplotlib, quickstart.png."""
    from espalier.quickstart import picture

    figures = found.run.to_dict() | {
        "rows": found.sizes,
        "docstrings_bits_per_character": found.docstrings,
        "source_bits_per_character": found.source,
        "training_tokens_per_second": found.training_speed,
        "writing_tokens_per_second": found.writing_speed,
    }
    write_text(found.folder / "figures.json", json.dumps(figures, indent=1) + "\n")
    lines = (json.dumps(vars(sample)) + "\n" for sample in found.samples)
    write_text(found.folder / "samples.jsonl", "".join(lines))
    write_text(found.folder / "README.md", decoder_readme(found))
    bars = [("docstrings", *found.docstrings), ("source code", *found.source)]
    steps, losses = loss_of(found.run)
    picture.decoder_picture(steps, losses, bars, found.folder / "quickstart.png")


def show(found: Adaptation, screen: Console) -> None:
    """Print the tables."""
    screen.print()
    for part in decoder_tables(found):
        screen.print(part)


def next_steps(found: Adaptation) -> list[str]:
    """What to type next: this adapter first, then one's own data."""
    lora = found.folder / "lora"
    # As bash reads it: quotes, new lines and backslashes of Python would not pass otherwise.
    prompt = found.samples[0].prompt.replace("\\", r"\\").replace("'", r"\'").replace("\n", r"\n")
    base = found.run.settings["model"]
    return [
        f"espalier generate {lora} --data {found.folder / 'data' / 'test.jsonl'}",
        f"espalier generate {lora} --prompt $'{prompt}'",
        "espalier data check mine.jsonl          # yours: prompt and completion, or messages",
        f"espalier train --train mine.jsonl --method lora --model {base}",
    ]
