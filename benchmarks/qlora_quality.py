"""What does a base in few bits cost in quality? The same LoRA on the same rows, several seeds.

    python benchmarks/qlora_quality.py --model DIR --data FOLDER [--quantize none nf4 int8]

FOLDER holds train, validation and test as jsonl. Every run has the same settings; only how the
base's layers are stored differs. The test data is looked at once per run.
"""

from __future__ import annotations

import argparse
import math
import statistics
from pathlib import Path

import espalier as esp


def run(given: argparse.Namespace, stored: str, seed: int) -> float:
    """Test accuracy in %, or perplexity, of one run."""
    config = esp.RunConfig(
        model=given.model,
        method=given.method,
        **{split: str(given.data / f"{split}.jsonl") for split in ("train", "validation", "test")},
        out=given.out / f"{Path(given.model).name}-{given.data.name}-{stored}-{seed}",
        overwrite=True,
        quantize=stored,
        seed=seed,
        lr=given.lr,
        epochs=given.epochs,
        batch=given.batch,
        max_length=given.max_length,
        limit=given.limit,
        threads=given.threads,
        precision="fp32",
        quiet=True,
    )
    scores = esp.train(config).metrics["test"]
    return 100 * scores["accuracy"] if "accuracy" in scores else math.exp(scores["loss"])


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quantize", nargs="+", default=["none", "nf4"])
    parser.add_argument("--method", default="LoRA(rank=8, alpha=16)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--limit", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/qlora"))
    given = parser.parse_args()
    print(f"| {Path(given.model).name} on {given.data.name} | test, each seed | mean |")
    print("|---|---|---|")
    for stored in given.quantize:
        found = [run(given, stored, seed) for seed in range(given.seeds)]
        each = ", ".join(f"{score:.2f}" for score in found)
        print(f"| {stored} | {each} | {statistics.mean(found):.2f} |", flush=True)


if __name__ == "__main__":
    main()
