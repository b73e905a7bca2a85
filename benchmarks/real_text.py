"""An epoch on texts of real lengths: our length buckets and packed rows beside peft's padding.

    python benchmarks/real_text.py --data FOLDER     lengths of FOLDER/train.jsonl
    python benchmarks/real_text.py                   drawn from a log-normal like instructions'

One round is an epoch over a sample of the lengths, every contender on the same texts: forward,
backward, clipping and a fused AdamW step for each batch. peft pads random batches to their longest
text, as transformers' Trainer does; ours takes batches as a run makes them. The tokens computed for
each real token come from the batches alone and are the same on every machine. The optimiser's step
over 448 adapter tensors, clipping with it, is timed beside torch's default AdamW.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bases
import espalier as esp
import measure
from espalier.data import batches, pack
from espalier.data.separation import Separation, separation, sizes_of
from espalier.tasks.causal import Causal
from measure import Trial

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PEFT = "peft, random batches"
CAP, TENSORS = 512, 448
COLUMNS = ("", "steps", "tokens / real", "time / peft's")
Example = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contender:
    """An epoch: its batches, the model they go through, and how packed texts are kept apart."""

    model: nn.Module
    examples: list[Example]
    groups: list[list[int]]
    parameters: list[nn.Parameter]
    optimiser: torch.optim.Optimizer
    apart: Separation | None = None

    def epoch(self) -> None:
        """Every batch once."""
        self.model.train()
        for group in self.groups:
            some = [self.examples[i] for i in group]
            batch = Causal().collate(some, Padding())  # type: ignore[arg-type]
            if self.apart is None:
                self._step(batch)
                continue
            sizes = sizes_of(some)
            with self.apart.holding(self.model, sizes):
                self._step(self.apart.batch(batch, sizes))

    def _step(self, batch: dict[str, Tensor]) -> None:
        self.model(**Causal().inputs(batch)).loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)

    @property
    def computed(self) -> int:
        """Tokens of all batches with their padding."""
        widths = [max(len(self.examples[i]["input_ids"]) for i in group) for group in self.groups]
        return sum(w * len(g) for w, g in zip(widths, self.groups, strict=True))


class Padding:
    """All that a batch needs of a tokenizer."""

    pad_token_id = 0
    eos_token_id = 0


def lengths(data: Path | None, count: int, cap: int) -> list[int]:
    """Tokens of each text, four characters to a token; from files or a seeded log-normal."""
    rng = random.Random(0)
    if data is None:
        return [max(8, min(cap, int(rng.lognormvariate(4.3, 0.75)))) for _ in range(count)]
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    sizes = [sum(len(text) for text in row.values() if isinstance(text, str)) for row in rows]
    return [max(8, min(cap, size // 4)) for size in rng.sample(sizes, min(count, len(sizes)))]


def texts(sizes: list[int], vocabulary: int) -> list[Example]:
    """Random words of these lengths, as examples of causal language modelling."""
    rng = random.Random(1)
    made = [[rng.randrange(1, vocabulary) for _ in range(size)] for size in sizes]
    return [{"input_ids": i, "labels": i, "full": len(i), "cut": 0, "chars": 1} for i in made]


def contenders(
    size: bases.Size, dtype: torch.dtype, sizes: list[int], batch: int, cap: int
) -> Iterator[tuple[str, Contender]]:
    """Everyone's epoch over the same texts."""
    rows = texts(sizes, size.vocabulary)
    shuffled = batches(rows, batch, how="random")
    yield PEFT, _contender(_peft(bases.llama(size, dtype)), rows, shuffled)
    for how in ("random", "bucket", "pack"):
        model = bases.llama(size, dtype)
        esp.attach(model, "LoRA(rank=8)")
        parameters = esp.parameters(model)
        if how != "pack":
            groups = batches(rows, batch, how=how)  # type: ignore[arg-type]
            yield f"ours, {how}", _contender(model, rows, groups, parameters)
            continue
        packed = pack(rows, cap)
        # As many tokens to a step as batches of texts have.
        row = max(1, round(batch * len(packed) / len(rows)))
        apart = separation(model, cap)  # type: ignore[arg-type]
        assert isinstance(apart, Separation)
        groups = batches(packed, row, how="pack")
        yield f"ours, pack ({apart.way})", _contender(model, packed, groups, parameters, apart)


def _contender(
    model: nn.Module,
    rows: list[Example],
    groups: list[list[int]],
    parameters: list[nn.Parameter] | None = None,
    apart: Separation | None = None,
) -> Contender:
    parameters = parameters or [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    return Contender(model, rows, groups, parameters, optimiser, apart)


def _peft(model: nn.Module) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def run(
    size: bases.Size, dtype: torch.dtype, sizes: list[int], batch: int, cap: int, rounds: int
) -> dict[str, Any]:
    """Steps, tokens and time of everyone's epoch."""
    field = dict(contenders(size, dtype, sizes, batch, cap))
    seconds = measure.interleave({name: Trial(one.epoch) for name, one in field.items()}, rounds, 0)
    return {
        name: {
            "steps": len(one.groups),
            "tokens_per_real": one.computed / sum(sizes),
            "over_peft": asdict(measure.ratio(seconds[name], seconds[PEFT])),
        }
        for name, one in field.items()
    }


def optimiser(rounds: int, width: int = 512) -> dict[str, Any]:
    """Clipping and a step of AdamW over 448 adapter tensors, and over one flat buffer of them."""

    def trial(flat: bool, **how: Any) -> Trial:
        numbers = torch.randn(TENSORS * 8 * width)
        parts = [numbers] if flat else [x.clone() for x in numbers.split(8 * width)]
        parameters = [nn.Parameter(x) for x in parts]
        made = torch.optim.AdamW(parameters, lr=1e-4, **how)

        def step() -> None:
            for p in parameters:
                p.grad = p.data  # no copy: its numbers are random as well
            nn.utils.clip_grad_norm_(parameters, math.inf)
            made.step()

        return Trial(step, times=3)

    default, ours = f"{TENSORS} tensors, torch's default", "one flat buffer, fused (ours)"
    seconds = measure.interleave(
        {
            default: trial(False),
            f"{TENSORS} tensors, fused": trial(False, fused=True),
            ours: trial(True, fused=True),
        },
        rounds,
    )
    return {name: asdict(measure.ratio(own, seconds[default])) for name, own in seconds.items()}


def _shown(found: dict[str, float]) -> str:
    return str(measure.Ratio(**found))


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="An epoch on texts of real lengths.")
    preset = parser.add_mutually_exclusive_group()
    for name in ("small", "tiny"):
        preset.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.add_argument(
        "--data", type=Path, help="a folder with train.jsonl, whose lengths to take"
    )
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.set_defaults(size="default")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    size = bases.SIZES[asked.size]
    cap = CAP if size.length * 2 >= CAP else 2 * size.length
    sizes = lengths(asked.data, asked.texts, cap)
    source = str(asked.data.name) if asked.data else "log-normal"
    results: dict[str, Any] = {"setting": measure.setting() | {"lengths": source}}
    report = measure.Report("An epoch on texts of real lengths", results["setting"])
    for kind in asked.dtype:
        found = run(size, DTYPES[kind], sizes, asked.batch, cap, asked.rounds)
        results[kind] = found
        rows = [
            [name, str(one["steps"]), f"{one['tokens_per_real']:.3f}", _shown(one["over_peft"])]
            for name, one in found.items()
        ]
        report.table(f"{kind}: {len(sizes)} texts, {sum(sizes):,} tokens", COLUMNS, rows)
    results["optimiser"] = found = optimiser(asked.rounds)
    rows = [[name, _shown(one)] for name, one in found.items()]
    report.table("Clipping and a step of AdamW", ("", "time / default"), rows)
    report.write(asked.markdown)
    measure.write_json(asked.json, results)


if __name__ == "__main__":
    main()
