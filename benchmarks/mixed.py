"""Rows of one batch on different adapters, and one unmerged adapter writing word by word.

    python benchmarks/mixed.py                     a layer of 1024 × 1024; hidden 512, 8 layers
    python benchmarks/mixed.py --small --json out.json

LoRA of rank 8. The layer alone: 128 rows of one word on 1, 8, 32 and 128 adapters. A model, all
linears adapted: 8 rows on 8 adapters, a word at a time with a cache, and 64 words at once; one row,
one adapter, writing with a cache. The floor is the same model without adapters, frozen as the
others are; the rival is peft with `adapter_names`. Ratios are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
import copy
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bases
import espalier as esp
import measure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RANK = 8
BASE, OURS, PEFT = "base", "ours", "peft"
COLUMNS = ("", "ours / base", "peft / base", "ours / peft")


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: its name, and the work of each contender."""

    name: str
    work: Mapping[str, Callable[[], object]]
    times: int


class Layer(nn.Module):
    """A model that is one linear layer."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(width, width, bias=False, dtype=dtype)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        """States (B, T, D) to states."""
        return self.up(inputs_embeds)


def _ours(model: nn.Module, names: list[str], where: str) -> Any:
    for name in names:
        esp.attach(model, esp.LoRA(rank=RANK, sites=where), name)
        with torch.no_grad():
            for p in esp.parameters(model):
                p.normal_(std=0.02)
    return model


def _peft(model: nn.Module, names: list[str], where: str | list[str]) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, target_modules=where, init_lora_weights=False)
    wrapped: Any = peft.get_peft_model(model, config, names[0])  # type: ignore[arg-type]
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    return wrapped.eval()


def layer_cases(width: int, rows: int, dtype: torch.dtype) -> Iterator[Case]:
    """One linear layer, called as a model calls it: the rows are resolved once, outside."""
    torch.manual_seed(0)
    base: Any = Layer(width, dtype).eval()
    x = torch.randn(rows, 1, width).to(dtype)
    for count in sorted({1, min(8, rows), min(32, rows), rows}):
        names = [str(index) for index in range(count)]
        choices = [names[row % count] for row in range(rows)]
        ours = _ours(copy.deepcopy(base), names, "other")
        theirs = _peft(copy.deepcopy(base), names, ["up"])
        with esp.rows(ours, choices):
            yield Case(
                f"layer of {width}, {rows} rows, {count} adapters",
                {
                    BASE: lambda: base.up(x),
                    OURS: lambda ours=ours: ours.up(x),
                    PEFT: _named(theirs, choices, x),
                },
                10,
            )


def _named(model: Any, choices: list[str], x: Tensor) -> Callable[[], object]:
    """Peft's layer with the rows' adapters, as its model would call it."""
    layer = model.base_model.model.up
    return lambda: layer(x, adapter_names=choices)


def model_cases(size: bases.Size, dtype: torch.dtype) -> Iterator[Case]:
    """A whole model: a word of each row after a cache, many words, and one row writing."""
    base: Any = bases.llama(size, dtype).eval().requires_grad_(False)
    names = [str(index) for index in range(8)]
    ours: Any = _ours(copy.deepcopy(base), names, "all-linear")
    theirs: Any = _peft(copy.deepcopy(base), names, "all-linear")
    torch.manual_seed(1)
    for words in (1, min(64, size.length)):
        ids = torch.randint(0, size.vocabulary, (8, words))
        with esp.rows(ours, names):
            yield Case(
                f"model, 8 rows of {words} on 8 adapters",
                {
                    BASE: lambda ids=ids: base(ids),
                    OURS: lambda ids=ids: ours(ids),
                    PEFT: lambda ids=ids: theirs(input_ids=ids, adapter_names=names),
                },
                3 if words == 1 else 1,
            )
    prompt = torch.randint(3, size.vocabulary, (1, 8))
    esp.activate(ours, names[0])
    theirs.set_adapter(names[0])
    yield Case("one row writing 8 words", {
        BASE: _writing(base, prompt), OURS: _writing(ours, prompt), PEFT: _writing(theirs, prompt)
    }, 1)  # fmt: skip


def _writing(model: Any, prompt: Tensor) -> Callable[[], object]:
    how = {"max_new_tokens": 8, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    return lambda: model.generate(input_ids=prompt, attention_mask=mask, eos_token_id=None, **how)


def run(cases: Iterator[Case], rounds: int) -> dict[str, Any]:
    """Ratios of each case."""
    found: dict[str, Any] = {}
    for case in cases:
        trials = {name: measure.Trial(work, times=case.times) for name, work in case.work.items()}
        gc.freeze()  # collections between the trials need not look through what is there already
        with torch.no_grad():
            seconds = measure.interleave(trials, rounds)
        gc.unfreeze()
        found[case.name] = {
            "ours_over_base": asdict(measure.ratio(seconds[OURS], seconds[BASE])),
            "peft_over_base": asdict(measure.ratio(seconds[PEFT], seconds[BASE])),
            "ours_over_peft": asdict(measure.ratio(seconds[OURS], seconds[PEFT])),
            "base_seconds": min(seconds[BASE]),
        }
    return found


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures as a table's rows."""
    keys = ("ours_over_base", "peft_over_base", "ours_over_peft")
    return [[name, *(str(measure.Ratio(**one[k])) for k in keys)] for name, one in found.items()]


def main(argv: list[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="hidden 256, 4 layers")
    parser.add_argument("--tiny", action="store_true", help="for trying the script out")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    size = bases.SIZES["tiny" if arguments.tiny else "small" if arguments.small else "default"]
    width, many = (32, 16) if arguments.tiny else (1024, 128)
    report = measure.Report("Rows on different adapters", measure.setting())
    figures: dict[str, Any] = {"setting": measure.setting()}
    for name, dtype in DTYPES.items():
        found = run(layer_cases(width, many, dtype), arguments.rounds)
        found |= run(model_cases(size, dtype), arguments.rounds)
        figures[name] = found
        report.table(name, COLUMNS, rows(found))
    measure.write_json(arguments.json, figures)
    report.write(arguments.markdown)


if __name__ == "__main__":
    main()
