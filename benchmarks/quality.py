"""Does a small part reach what full tuning reaches? Test accuracy on real text, several seeds.

    python benchmarks/quality.py --model DIR --data FOLDER [FOLDER ...]

Each FOLDER holds train, validation and test as jsonl. Every method gets the same number of
learning rates: they are compared on the validation data with the first seed, the best one is run
with the other seeds, and the test data is looked at once per run. Results are kept line by line in
--out, so that a stopped benchmark goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import espalier as esp

METHODS = {
    "head only": ("HeadOnly()", (2e-3, 1e-2)),
    "LoRA r=8": ("LoRA(rank=8, alpha=16)", (5e-4, 1.5e-3)),
    "full": ("FullTuning()", (5e-5, 2e-4)),
}


def run(arguments: argparse.Namespace, data: Path, method: str, lr: float, seed: int) -> dict:
    """One training run's validation and test accuracy, from the notes if it is there already."""
    key = {"data": data.name, "method": method, "lr": lr, "seed": seed}
    notes = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    for line in map(json.loads, notes):
        if {name: line[name] for name in key} == key:
            return line
    config = esp.RunConfig(
        model=str(arguments.model),
        method=METHODS[method][0],
        **{split: str(data / f"{split}.jsonl") for split in ("train", "validation", "test")},
        out=arguments.out.parent / "runs" / f"{data.name}-{method}-{lr:g}-{seed}".replace(" ", "-"),
        overwrite=True,
        lr=lr,
        seed=seed,
        epochs=arguments.epochs,
        batch=32,
        max_length=128,
        limit=arguments.limit,
        threads=arguments.threads,
        quiet=True,
    )
    result = esp.train(config)
    line = key | {
        "validation": result.metrics["validation"]["accuracy"],
        "test": result.metrics["test"]["accuracy"],
        "trained": result.account["trained"],
    }
    with arguments.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def rows(arguments: argparse.Namespace, data: Path) -> Iterator[list[Any]]:
    """One table row per method: chosen rate, mean and spread of the test accuracy."""
    for method, (_, rates) in METHODS.items():
        first = [run(arguments, data, method, lr, 0) for lr in rates]
        best = max(first, key=lambda line: line["validation"])
        seeds = range(1, arguments.seeds)
        lines = [best, *(run(arguments, data, method, best["lr"], seed) for seed in seeds)]
        scores = [100 * line["test"] for line in lines]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        yield [data.name, method, f"{best['trained']:,}", f"{best['lr']:g}",
               f"{statistics.mean(scores):.1f} ± {spread:.1f}"]  # fmt: skip


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/quality/notes.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print("| data | method | trained | rate | test accuracy, % |\n|---|---|---|---|---|")
    for data in arguments.data:
        for row in rows(arguments, data):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
