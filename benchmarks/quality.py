"""What does each method reach on real text? Test accuracy or loss, several seeds, equal tuning.

    python benchmarks/quality.py --model DIR --data FOLDER [FOLDER ...] [--methods NAME ...]

Each FOLDER holds train, validation and test as jsonl. No method is tuned more than another: each
gets the same learning rates (its default and three times that, or --rates times it), compared on
the validation data with the first seed; the best one is run with the other seeds. The test data is
looked at once per run. Results are kept line by line in --out, so that a stopped benchmark goes on
where it was. "untouched" is the base with a fresh adapter, which changes nothing.
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
    "untouched": "LoRA(rank=1)",
    "head only": "HeadOnly()",
    "LoRA": "LoRA(rank=8, alpha=16)",
    "DoRA": "LoRA(rank=8, alpha=16, dora=True)",
    "PiSSA": "LoRA(rank=8, alpha=16, init='pissa')",
    "LoRA-FA": "LoRA(rank=8, alpha=16, freeze_a=True)",
    "LoRA+": "LoRA(rank=8, alpha=16, plus=16.0)",
    "AdaLoRA": "AdaLoRA(rank=12, target=8)",
    "Houlsby": "SerialAdapter(bottleneck=24)",
    "Pfeiffer": "SerialAdapter(style='pfeiffer', bottleneck=24)",
    "parallel": "ParallelAdapter(bottleneck=24)",
    "Compacter": "Compacter(bottleneck=24)",
    "prompt": "PromptTuning(length=20)",
    "P-tuning": "PTuning(length=20)",
    "P-tuning v2": "PTuningV2(length=20)",
    "prefix": "PrefixTuning(length=10)",
    "(IA)³": "IA3()",
    "BitFit": "BitFit()",
    "BitFit, made": "BitFit(create=True)",
    "norms": "PartialTuning(sites='norm')",
    "attention": "PartialTuning(sites='attention.*')",
    "last 2 layers": "PartialTuning(sites='block@last2')",
    "magnitude 0.5 %": "PartialTuning(sites='all-linear', mask='magnitude', share=0.005)",
    "ladder": "LadderSideTuning()",
    "diff pruning": "DiffPruning()",
    "MAM": "MAM(length=16, bottleneck=16, scale=2.0)",
    "UniPELT": "UniPELT()",
    "SAID": "IntrinsicSAID(dimension=5000)",
    "full": "FullTuning()",
}
Score = tuple[str, str, float]  # metric, whether more or less is better, factor for the table
ACCURACY: Score = ("accuracy", "max", 100.0)
LOSS: Score = ("loss", "min", 1.0)


def run(arguments: argparse.Namespace, data: Path, method: str, lr: float, seed: int) -> dict:
    """One training run's validation and test scores, from the notes if it is there already."""
    key = {"data": data.name, "method": method, "lr": lr, "seed": seed}
    notes = arguments.out.read_text().splitlines() if arguments.out.exists() else []
    for line in map(json.loads, notes):
        if {name: line[name] for name in key} == key:
            return line
    still = method == "untouched"
    config = esp.RunConfig(
        model=str(arguments.model),
        method=METHODS[method],
        **{split: str(data / f"{split}.jsonl") for split in ("train", "validation", "test")},
        out=arguments.out.parent / "runs" / f"{data.name}-{method}-{lr:g}-{seed}".replace(" ", "-"),
        overwrite=True,
        lr=1e-20 if still else lr,
        head_lr=1e-20 if still else None,
        steps=1 if still else None,
        seed=seed,
        epochs=arguments.epochs,
        batch=arguments.batch,
        max_length=arguments.max_length,
        limit=arguments.limit,
        columns=dict(part.split("=", 1) for part in arguments.columns) or None,
        threads=arguments.threads,
        precision=arguments.precision,
        quiet=True,
    )
    result = esp.train(config)
    name = (ACCURACY if "accuracy" in result.metrics["test"] else LOSS)[0]
    line = key | {
        "validation": result.metrics["validation"][name],
        "test": result.metrics["test"][name],
        "trained": result.account["trained"],
        "kept": result.account["kept"] - result.account["head"],
        "metric": name,
        "seconds": round(result.seconds, 1),
    }
    with arguments.out.open("a") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return line


def rates(method: str, factors: list[float]) -> tuple[float, ...]:
    """The learning rates that are tried: multiples of the method's own."""
    own = esp.recipe(METHODS[method]).learning_rate
    return (own,) if method == "untouched" else tuple(factor * own for factor in factors)


def rows(arguments: argparse.Namespace, data: Path) -> Iterator[list[Any]]:
    """One table row per method: chosen rate, mean and spread of the test score."""
    for method in arguments.methods:
        try:
            first = [run(arguments, data, method, lr, 0) for lr in rates(method, arguments.rates)]
        except esp.EspalierError as error:
            yield [data.name, method, "", "", "", f"refuses: {error}"]
            continue
        name, way, factor = ACCURACY if first[0]["metric"] == "accuracy" else LOSS
        best = (max if way == "max" else min)(first, key=lambda line: line["validation"])
        seeds = range(1, 1 if method == "untouched" else arguments.seeds)
        lines = [best, *(run(arguments, data, method, best["lr"], seed) for seed in seeds)]
        scores = [factor * line["test"] for line in lines]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        shown = f"{statistics.mean(scores):.1f} ± {spread:.1f}"
        if name == "loss":
            shown = f"{statistics.mean(scores):.3f} ± {spread:.3f}"
        counts = [f"{best['trained']:,}", f"{best['kept']:,}", f"{best['lr']:g}"]
        yield [data.name, method, *counts, f"{shown} ({len(scores)} seeds)"]


def main() -> None:
    """Run and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 3], metavar="FACTOR")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--columns", nargs="+", default=[], metavar="PART=COLUMN")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="fp32")
    parser.add_argument("--out", type=Path, default=Path("runs/quality/notes.jsonl"))
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    print("| data | method | trained | kept | rate | test: accuracy in %, or loss |")
    print("|---|---|---|---|---|---|")
    for data in arguments.data:
        for row in rows(arguments, data):
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
