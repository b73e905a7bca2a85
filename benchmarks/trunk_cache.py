"""An epoch on kept states of the frozen trunk, beside LoRA's epoch on all layers.

    python benchmarks/trunk_cache.py --data FOLDER              train.jsonl with text and label
    python benchmarks/trunk_cache.py --data FOLDER --limit 400 --markdown out.md

All contenders adapt the same encoder (the shipped one unless --model says otherwise) to the same
rows through the trainer's own loop, in one process, an epoch each in turn; what is timed is a whole
epoch after the first, batches made and records written, then the same with the evaluation at its
end. Filling, done once before the first epoch, is timed by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import espalier as esp
import measure
from espalier.accounting import account
from espalier.recipes import recipe
from espalier.training import course, models, run
from espalier.training.config import RunConfig
from espalier.training.logs import quiet
from espalier.training.loop import Loop
from espalier.training.prefetch import ahead
from espalier.training.prepare import Material, encode, fitting, read_data
from espalier.training.trunk_cache import TrunkCache

BASE = "LoRA, all layers"
COLUMNS = ("", "trained", "kept states", "fill / LoRA's epoch", "epoch / LoRA's", "with evaluation")


@dataclass(slots=True)
class Contender:
    """A loop that trains an epoch at a time."""

    loop: Loop
    trained: int
    kept: int  # bytes
    filling: float  # seconds, once

    def epoch(self) -> None:
        """One epoch, no evaluation."""
        loop = self.loop
        with contextlib.closing(ahead(loop._prepared, loop.epoch(loop.at.epoch))) as coming:
            for step, made in coming:
                loop._step(step, made)
                loop.at.step += 1
        loop.at.epoch += 1

    def whole(self) -> None:
        """One epoch with the evaluation at its end."""
        self.epoch()
        self.loop._check()


def contenders(high: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and settings of each, by name; `high` is the number of top layers."""
    memory = {"trunk_cache": "memory"}
    top = f"LoRA(sites='all-linear@last{high}')"
    return {
        BASE: ("LoRA()", {}),
        f"LoRA, top {high} layers": (top, {}),
        f"LoRA, top {high} layers, cached": (top, memory),
        f"top {high} layers themselves, cached": (
            f"PartialTuning(sites='block@last{high}')",
            memory,
        ),
        "head alone, cached": ("HeadOnly()", memory),
        "ladder": ("LadderSideTuning()", {}),
        "ladder, cached": ("LadderSideTuning()", memory),
        "ladder, cached in fp32": ("LadderSideTuning()", memory | {"trunk_dtype": "fp32"}),
    }


def contender(method: str, settings: dict[str, Any]) -> Contender:
    """A loop as `espalier train` makes it, its trunk cache filled, before its first step."""
    config = RunConfig(method=method, epochs=1000, quiet=True, **settings)
    parts, out = recipe(config.method), run._set_out(config, None)
    data = read_data(config)
    tokenizer = models.load_tokenizer(config.model)
    limit = models.limit_of(models.load_config(config.model), tokenizer, parts.words)
    config = fitting(config.replace(task=data.task.name), limit, parts.words)
    with quiet(None):
        model, new = models.load_model(config.model, data.task, tokenizer, torch.float32)
    esp.attach(model, parts, head=new or "auto")
    material = Material(config, model, tokenizer, data, encode(data, tokenizer, config), out)
    longest = max(len(example["input_ids"]) for example in material.encoded.examples["train"])
    loop = Loop(course._job(material, torch.get_num_threads(), parts, longest))
    kept, filling = 0, 0.0
    if config.trunk_cache != "none":
        trunk = loop.job.trunk = TrunkCache(loop.job)
        now = measure.clock()
        start = now()
        trunk.fill()
        filling = now() - start
        kept = sum(layout.bytes for _, layout in trunk.layouts)
    model.train()
    counted = account(model, "default")
    return Contender(loop, counted.trained + counted.head, kept, filling)


def compare(settings: dict[str, Any], high: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """Ratios of every contender's epochs to LoRA's, by name."""
    wanted = {name: how for name, how in contenders(high).items() if not names or name in names}
    field = {name: contender(method, settings | more) for name, (method, more) in wanted.items()}
    bare = measure.interleave({n: measure.Trial(one.epoch) for n, one in field.items()}, rounds)
    whole = measure.interleave(
        {n: measure.Trial(one.whole) for n, one in field.items()}, rounds, warmup=0
    )
    return {
        name: {
            "trained": one.trained,
            "kept_bytes": one.kept,
            "filling": measure.ratio([one.filling] * rounds, bare[BASE]).median,
            "epoch": asdict(measure.ratio(bare[name], bare[BASE])),
            "with_evaluation": asdict(measure.ratio(whole[name], whole[BASE])),
        }
        for name, one in field.items()
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures as text, one row per contender."""
    return [
        [
            name,
            f"{one['trained']:,}",
            f"{one['kept_bytes'] / 1e6:,.3g} MB" if one["kept_bytes"] else "",
            f"{one['filling']:.2g}" if one["kept_bytes"] else "",
            str(measure.Ratio(**one["epoch"])),
            str(measure.Ratio(**one["with_evaluation"])),
        ]
        for name, one in found.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="Epochs on kept states beside LoRA's epochs.")
    parser.add_argument("--data", type=Path, required=True, help="a folder with train.jsonl")
    parser.add_argument("--model", default="demo-encoder")
    parser.add_argument("--limit", type=int, default=400, help="rows of each split")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--top", type=int, default=2, help="how many top layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], help="contenders by name, LoRA besides")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    settings = {
        "model": asked.model, "train": str(asked.data / "train.jsonl"), "limit": asked.limit,
        "batch": asked.batch,
    }  # fmt: skip
    given = asked.data / "validation.jsonl"
    settings |= {"validation": str(given)} if given.is_file() else {}
    start = time.monotonic()
    names = [BASE, *asked.only] if asked.only else []
    found = compare(settings, asked.top, asked.rounds, names)
    facts = measure.setting() | {"rows": asked.limit, "batch": asked.batch, "model": asked.model}
    report = measure.Report("Epochs on kept states", facts)
    report.table("After the first epoch", COLUMNS, rows(found))
    report.write(asked.markdown)
    measure.write_json(asked.json, {"setting": facts, **found})
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
