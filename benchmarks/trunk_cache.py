"""An epoch on kept states of the frozen trunk, beside the epoch of peft's LoRA on all linears.

    python benchmarks/trunk_cache.py --data FOLDER              train.jsonl with text and label
    python benchmarks/trunk_cache.py --random --length 128 --limit 64 --markdown out.md

All contenders adapt the same encoder (the shipped one unless --model says otherwise) to the same
rows in one process, an epoch each in turn: ours through the trainer's own loop, peft's through a
plain one on the same batches. What is timed is a whole epoch after the first, batches made and
records written, then the same with the evaluation at its end. Filling, done once before the first
epoch, is timed by itself. With --random the encoder is the BERT-like one of bases.py, its weights
are random, and every row has the same number of tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

import bases
import espalier as esp
import measure
from espalier.accounting import account
from espalier.recipes import recipe
from espalier.shipped import located
from espalier.training import course, models, run
from espalier.training.config import RunConfig
from espalier.training.evaluate import evaluate, inputs
from espalier.training.logs import quiet
from espalier.training.loop import Loop
from espalier.training.prefetch import ahead
from espalier.training.prepare import Material, encode, fitting, read_data
from espalier.training.trunk_cache import TrunkCache

BASE, OURS = "peft's LoRA, all layers", "LoRA, all layers"
COLUMNS = ("", "trained", "kept states", "fill / peft's epoch", "epoch / peft's", "with evaluation")


class Contender(Protocol):
    """Trains an epoch at a time.

    Attributes:
        trained: Numbers that train.
        kept: Bytes of kept states.
        filling: Seconds that it took to make them, once.
    """

    trained: int
    kept: int
    filling: float

    def epoch(self) -> None:
        """One epoch, no evaluation."""

    def whole(self) -> None:
        """One epoch with the evaluation at its end."""


@dataclass(slots=True)
class Ours:
    """The trainer's loop."""

    loop: Loop
    trained: int
    kept: int
    filling: float

    def epoch(self) -> None:
        """As the trainer's own, without what it does at the end."""
        loop = self.loop
        with contextlib.closing(ahead(loop._prepared, loop.epoch(loop.at.epoch))) as coming:
            for step, made in coming:
                loop._step(step, made)
                loop.at.step += 1
        loop.at.epoch += 1

    def whole(self) -> None:
        """With the evaluation that the trainer makes."""
        self.epoch()
        self.loop._check()


class Peft:
    """peft's LoRA with the same settings, in a plain loop over another contender's batches."""

    kept, filling = 0, 0.0

    def __init__(self, like: Loop) -> None:
        import peft
        from transformers import AutoModelForSequenceClassification

        base = AutoModelForSequenceClassification.from_pretrained(
            located(like.config.model), **like.job.task.model_settings()
        )
        own = peft.LoraConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
        self.model: Any = peft.get_peft_model(base, own).train()
        self.like, self.number = like, 0
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in self.parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4)

    def epoch(self) -> None:
        """The same batches in the same order."""
        job = self.like.job
        for step in self.like.epoch(self.number):
            for batch in self.like._prepared(step).batches:
                given = inputs(job.task, batch, job.accelerator.device)
                job.task.loss(self.model(**given), batch).backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.number += 1

    def whole(self) -> None:
        """With the same evaluation."""
        self.epoch()
        job, rows = self.like.job, self.like.config.batch_in_evaluation
        evaluate(self.model, job.task, job.tokenizer, job.validation, rows, job.accelerator)


def contenders(high: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Method and settings of each, by name; `high` is the number of top layers."""
    memory = {"trunk_cache": "memory"}
    top = f"LoRA(sites='all-linear@last{high}')"
    return {
        OURS: ("LoRA()", {}),
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


def contender(method: str, settings: dict[str, Any]) -> Ours:
    """A loop as `espalier train` makes it, its trunk cache filled, before its first step."""
    config = RunConfig(method=method, epochs=1000, quiet=True, precision="fp32", **settings)
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
    return Ours(loop, counted.trained + counted.head, kept, filling)


def compare(settings: dict[str, Any], high: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """Ratios of every contender's epochs to those of peft's LoRA, by name."""
    every = contenders(high)
    wanted = {name: how for name, how in every.items() if name in (names or every) or name == OURS}
    ours = {name: contender(method, settings | more) for name, (method, more) in wanted.items()}
    field: dict[str, Contender] = {BASE: Peft(ours[OURS].loop), **ours}
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


@contextlib.contextmanager
def randomly(size: bases.Size, limit: int) -> Iterator[dict[str, Any]]:
    """A random encoder and rows of random words, four classes of them, as settings of a run."""
    tokenizer = models.load_tokenizer("demo-encoder")
    size = replace(size, vocabulary=max(size.vocabulary, len(tokenizer)))
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bases.bert(size, torch.float32).bert.save_pretrained(folder / "base")  # type: ignore[operator]
        tokenizer.save_pretrained(folder / "base")
        for split, count in (("train", limit), ("validation", limit // 4)):
            made = [
                {"text": " ".join(draw.choices(words, k=size.length - 2)), "label": str(i % 4)}
                for i in range(count)
            ]  # beside the two marks that stand around a text
            lines = [json.dumps(row) for row in made]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))
        yield {"model": str(folder / "base"), **_files(folder), "max_length": size.length}


def _files(folder: Path) -> dict[str, str]:
    splits = ("train", "validation")
    files = {split: folder / f"{split}.jsonl" for split in splits}
    return {split: str(file) for split, file in files.items() if file.is_file()}


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
    parser = argparse.ArgumentParser(description="Epochs on kept states beside peft's epochs.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="a folder with train.jsonl")
    source.add_argument("--random", action="store_true", help="random weights, random words")
    parser.add_argument("--model", default="demo-encoder", help="with --data")
    parser.add_argument("--size", choices=bases.SIZES, default="default", help="with --random")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row, with --random")
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
    start = time.monotonic()
    facts = measure.setting() | {"precision": "fp32", "rows": asked.limit, "batch": asked.batch}
    with contextlib.ExitStack() as stack:
        if asked.random:
            size = replace(bases.SIZES[asked.size], length=asked.length)
            given = stack.enter_context(randomly(size, asked.limit))
            what = f"BERT-like, {size.layers} layers of {size.hidden}, random"
            facts |= {"length": size.length, "model": what}
        else:
            given = {"model": asked.model, **_files(asked.data)}
            facts |= {"model": asked.model}
        settings = given | {"limit": asked.limit, "batch": asked.batch}
        found = compare(settings, asked.top, asked.rounds, asked.only)
    report = measure.Report("Epochs on kept states", facts)
    report.table("After the first epoch", COLUMNS, rows(found))
    report.write(asked.markdown)
    measure.write_json(asked.json, {"setting": facts, **found})
    print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
