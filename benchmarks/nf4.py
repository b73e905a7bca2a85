"""Quantising a base to 4 bits on the CPU: ours beside bitsandbytes, the codes compared bit for bit.

    python benchmarks/nf4.py                Llama-like, hidden 1024, 4 layers, fp32 and bf16
    python benchmarks/nf4.py --json out.json

Timed is the quantisation of every linear weight of the layers, one after the other, as a base is
quantised; what bitsandbytes makes of each is kept, and compared with ours before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn

import bases
import measure
from espalier.fast import nf4
from measure import Trial

OURS, THEIRS = "ours", "bitsandbytes"
BOUND = 0.4
COLUMNS = ("weights", "ours / bitsandbytes", "bound", "ns a number: ours, theirs", "codes")
SIZES = {**bases.SIZES, "default": bases.Size(hidden=1024, layers=4, intermediate=2816)}
Quantiser = Callable[[Tensor], tuple[Tensor, Any]]


def weights(size: bases.Size, dtype: torch.dtype) -> list[Tensor]:
    """The linear weights of a model's layers."""
    return [
        module.weight.detach()
        for path, module in bases.llama(size, dtype).named_modules()
        if isinstance(module, nn.Linear) and path != "lm_head"
    ]


def ours(kind: str, double: bool) -> Quantiser:
    """Our quantiser, for weights that are finite."""

    def made(weight: Tensor) -> tuple[Tensor, Any]:
        found = nf4.quantized(weight, kind, double)
        assert found is not None
        return found

    return made


def theirs(kind: str, double: bool) -> Quantiser:
    """Bitsandbytes' quantiser."""
    return lambda w: functional.quantize_4bit(w, quant_type=kind, compress_statistics=double)


def equal(weight: Tensor, one: Quantiser, other: Quantiser) -> bool:
    """Whether codes and scales are equal bit for bit."""
    (codes, state), (codes_too, state_too) = one(weight), other(weight)
    return torch.equal(codes, codes_too) and torch.equal(state.absmax, state_too.absmax)


def run(size: bases.Size, kind: str, double: bool, dtype: torch.dtype, rounds: int) -> dict:
    """The ratio of the two, the time a number takes, and whether all codes are equal."""
    held = weights(size, dtype)
    count = sum(weight.numel() for weight in held)
    makers = {OURS: ours(kind, double), THEIRS: theirs(kind, double)}
    same = all(equal(weight, *makers.values()) for weight in held)
    trials = {
        name: Trial(lambda make=make: [make(w) for w in held]) for name, make in makers.items()
    }
    seconds = measure.interleave(trials, rounds)
    return {
        "ours_over_theirs": asdict(measure.ratio(seconds[OURS], seconds[THEIRS])),
        "nanoseconds": {name: 1e9 * min(found) / count for name, found in seconds.items()},
        "equal": same,
    }


def row(name: str, one: dict[str, Any]) -> list[str]:
    """One line of the table."""
    ratio = measure.Ratio(**one["ours_over_theirs"])
    missed = "" if ratio.median <= BOUND else " (missed)"
    each = ", ".join(f"{found:.1f}" for found in one["nanoseconds"].values())
    return [name, str(ratio), f"{BOUND}{missed}", each, "equal" if one["equal"] else "DIFFERENT"]


def main(argv: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Quantising to 4 bits, beside bitsandbytes.")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.set_defaults(size="default")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    size, found = SIZES[asked.size], {}
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("nf4", "fp4"):
            for double in (False, True):
                scales = ", scales in 8 bits" if double else ""
                name = f"{kind}{scales}, from {str(dtype).removeprefix('torch.')}"
                found[name] = run(size, kind, double, dtype, asked.rounds)
    facts = measure.setting("bitsandbytes")
    report = measure.Report("Quantising to 4 bits on the CPU", facts)
    report.table(
        "Every linear weight of a Llama-like model's layers",
        COLUMNS,
        [row(*i) for i in found.items()],
    )
    report.write(asked.markdown)
    measure.write_json(asked.json, {"setting": facts, "size": asdict(size), **found})


if __name__ == "__main__":
    main()
