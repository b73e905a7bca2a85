"""The most memory that a training step takes, ours beside peft's; each in a process of its own.

    python benchmarks/step_memory.py [--dtype fp32 bf16] [--family llama bert] [--markdown FILE]

Measured is the most that was ever resident in three steps, less what was resident before them with
the model and its adapter in memory (see plan.py). LoRA is of rank 8 on all linears.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import bases
import measure
import step
from plan import ENV, give_back, resident

LORA = step.FIELDS["lora"]
SETTINGS = step.FIELDS["settings"]
ENTRIES: dict[str, step.Entry] = {
    **{name: LORA[name] for name in ("full, plain", step.PEFT, step.OURS)},
    "our LoRA, plain paths": LORA["our LoRA, plain paths"],
    **{name: entry for name, entry in SETTINGS.items() if name.endswith("checkpointing")},
    **{name: SETTINGS[name] for name in ("peft DoRA", "our DoRA", "peft q, v", "our q, v")},
    "our top 2 layers": (
        functools.partial(step._ours, "LoRA(sites='all-linear@last2')"),
        step.PEFT,
    ),
}


def child(name: str, family: str, size: str, dtype: str) -> int:
    """Bytes above what stood before, in this process."""
    torch.set_num_threads(1)
    shape, kind = bases.SIZES[size], step.DTYPES[dtype]
    model, optimiser = ENTRIES[name][0](bases.FAMILIES[family](shape, kind))
    one = step.Contender(
        model, bases.batch(family, shape), optimiser, plain=name.endswith("plain paths")
    )
    gc.collect()
    give_back()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        one.step()
    return resident("VmHWM") - before


def measured(*asked: str) -> int:
    """`child`, in a new process."""
    command = [sys.executable, __file__, "--child", *asked]
    made = subprocess.run(
        command, env={**os.environ, **ENV}, capture_output=True, text=True, check=False
    )
    if made.returncode:
        raise SystemExit(made.stderr)
    return json.loads(made.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="Memory of one training step.")
    parser.add_argument("--size", choices=[*bases.SIZES], default="default")
    parser.add_argument("--family", nargs="+", choices=[*bases.FAMILIES], default=[*bases.FAMILIES])
    parser.add_argument("--dtype", nargs="+", choices=[*step.DTYPES], default=[*step.DTYPES])
    parser.add_argument("--only", nargs="+", choices=[*ENTRIES], default=[*ENTRIES])
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.child:
        print(json.dumps(child(*asked.child)))
        return
    report = measure.Report("Memory of one training step", measure.setting())
    for family in asked.family:
        for dtype in asked.dtype:
            found: dict[str, Any] = {
                name: measured(name, family, asked.size, dtype) for name in asked.only
            }
            base = found.get(step.PEFT)
            rows = [
                [name, f"{size / 1e6:,.0f}", f"{size / base:.2f}" if base else ""]
                for name, size in found.items()
            ]
            report.table(f"{family}-like, {dtype}", ("", "MB", "/ peft LoRA"), rows)
            report.write(asked.markdown)


if __name__ == "__main__":
    main()
