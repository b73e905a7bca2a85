"""The head and its loss alone, forward and backward: whole logits against chunks of them.

    python benchmarks/loss.py                     hidden 512, 32,000 words, 1,024 tokens
    python benchmarks/loss.py --hidden 2048 --words 128000

The head is frozen and the gradient is that of the hidden states. "products" are the two matrix
products alone, which no way of computing the loss can do without.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import measure
from counting import Counts, count
from espalier.fast.loss import chunked_sum

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = ("", "kernels", "MB moved", "MB saved", "time / products", "time / whole logits")
PRODUCTS, WHOLE, CHUNKS = "products", "whole logits", "chunks"


def ways(
    hidden: Tensor, weight: Tensor, labels: Tensor
) -> dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], object]]]:
    """Each way's forward, and what follows it: hidden (N, D), weight (V, D), labels (N,)."""

    def whole() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def chunks() -> Tensor:
        head = len(weight)
        return chunked_sum(lambda x: F.linear(x, weight), hidden, labels, head) / len(labels)

    def back(loss: Tensor) -> object:
        return torch.autograd.grad(loss, hidden)

    def products() -> Tensor:
        return F.linear(hidden.detach(), weight)

    return {
        PRODUCTS: (products, lambda logits: logits @ weight),
        WHOLE: (whole, back),
        CHUNKS: (chunks, back),
    }


def run(tokens: int, width: int, words: int, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Counts and time ratios of every way, by name."""
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = (0.05 * torch.randn(words, width)).to(dtype)
    labels = torch.randint(0, words, (tokens,))
    field = ways(hidden, weight, labels)
    counts: dict[str, Counts] = {}
    for name, (forward, finish) in field.items():
        counts[name] = count(forward, finish, [hidden, weight, labels])
    trials = {name: measure.Trial(_step(*both)) for name, both in field.items()}
    seconds = measure.interleave(trials, rounds)
    return {
        name: {
            **asdict(counts[name]),
            "over_products": asdict(measure.ratio(seconds[name], seconds[PRODUCTS])),
            "over_whole": asdict(measure.ratio(seconds[name], seconds[WHOLE])),
        }
        for name in field
    }


def _step(forward: Callable[[], Tensor], finish: Callable[[Tensor], object]) -> measure.Step:
    return lambda: finish(forward())


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures as text, one row per way."""
    return [
        [
            name,
            f"{one['kernels']:,}",
            f"{one['moved'] / 1e6:,.4g}",
            f"{one['saved'] / 1e6:,.4g}",
            str(measure.Ratio(**one["over_products"])),
            str(measure.Ratio(**one["over_whole"])),
        ]
        for name, one in found.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="Work and time of the head and its loss.")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--words", type=int, default=32_000)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    asked = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = (16, 8, 64) if asked.tiny else (asked.tokens, asked.hidden, asked.words)
    results: dict[str, Any] = {"setting": measure.setting()}
    report = measure.Report("The head and its loss", results["setting"])
    for kind in asked.dtype:
        found = results[kind] = run(*size, DTYPES[kind], asked.rounds)
        tokens, width, words = size
        title = f"{tokens:,} tokens, hidden {width:,}, {words:,} words, {kind}"
        report.table(title, COLUMNS, rows(found))
    report.write(asked.markdown)
    measure.write_json(asked.json, results)


if __name__ == "__main__":
    main()
