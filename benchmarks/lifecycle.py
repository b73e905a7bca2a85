"""Attach, save, load, switch and merge: beside peft, and beside the plain tensor work.

    python benchmarks/lifecycle.py                Llama-like, hidden 512, 8 layers, LoRA rank 8
    python benchmarks/lifecycle.py --json out.json

The plain work is what no library can do without, over the same tensors:

attach   allocate A and B of every weight; A uniform, B zero
save     write them with safetensors
load     read them with safetensors and copy them into tensors that stand ready
switch   give every weight the A and B of another adapter: two assignments each
merge    W + s B A of every weight into new memory, the old tensor kept: an exact undo needs it

Loading and switching are also timed as the 8th and the 100th adapter; peft only up to the 8th,
since loading a hundred takes it minutes. Every operation is undone between rounds, untimed.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bases
import espalier as esp
import measure
from measure import Trial

RANK, ALPHA = 8, 16
OURS, PEFT, PLAIN = "ours", "peft", "plain"
COLUMNS = (
    "", "ours / plain", "bound", "ours / peft", "peft / plain", "growth over the first: ours, peft",
)  # fmt: skip
BOUNDS = {"attach": 3.0, "save": 1.5, "load": 1.5, "switch": 2.0, "merge": 1.3}  # of ours / plain
PEFT_MOST = 8
Trials = dict[str, Trial]


def _peft(model: nn.Module) -> PeftModel:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    assert isinstance(wrapped, PeftModel)
    return wrapped


def _attach(model: nn.Module) -> None:
    esp.attach(model, esp.LoRA(rank=RANK, alpha=ALPHA))


class Plain:
    """The tensors of a LoRA on every linear of a model's blocks, and nothing around them."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [
            module.weight.detach()
            for path, module in model.named_modules()
            if isinstance(module, nn.Linear) and path != "lm_head"
        ]
        self.numbers: dict[str, Tensor] = {}
        self.attach()
        some = range(len(self.weights))
        self.slots: list[dict[str, Tensor]] = [{} for _ in some]
        pairs = [(self.numbers[f"{index}.a"], self.numbers[f"{index}.b"]) for index in some]
        self.adapters = (pairs, list(pairs))
        self.chosen = 0

    def attach(self) -> None:
        """Allocate A and B of every weight; A uniform, B zero."""
        self.numbers = {}
        for index, weight in enumerate(self.weights):
            bound = weight.shape[1] ** -0.5
            a = torch.empty(RANK, weight.shape[1]).uniform_(-bound, bound)
            self.numbers[f"{index}.a"] = a
            self.numbers[f"{index}.b"] = torch.zeros(weight.shape[0], RANK)

    def save(self, file: Path) -> None:
        """The same bytes, with safetensors."""
        save_file(self.numbers, file)

    def load(self, file: Path) -> None:
        """Read with safetensors and copy into tensors that stand ready."""
        held = load_file(file)
        for name, tensor in self.numbers.items():
            tensor.copy_(held[name])

    def switch(self) -> None:
        """Give every weight the A and B of the other adapter."""
        self.chosen = 1 - self.chosen
        for slot, (a, b) in zip(self.slots, self.adapters[self.chosen], strict=True):
            slot["a"] = a
            slot["b"] = b

    def merge(self) -> None:
        """W + s B A in new memory; the old weights stay in hand."""
        self.old = self.weights
        self.weights = [
            torch.addmm(
                weight, self.numbers[f"{index}.b"], self.numbers[f"{index}.a"], alpha=ALPHA / RANK
            )
            for index, weight in enumerate(self.old)
        ]

    def unmerge(self) -> None:
        """The old weights again."""
        self.weights = self.old


def attach(base: nn.Module, folder: Path) -> Trials:
    """Put a fresh adapter into a bare model."""
    ours, plain = copy.deepcopy(base), Plain(base)
    theirs: list[Any] = [copy.deepcopy(base)]

    def wrap() -> None:
        theirs[0] = _peft(theirs[0])

    def unwrap() -> None:
        theirs[0] = theirs[0].unload()
        theirs[0].__dict__.pop("peft_config", None)  # else the next wrapping may warn

    return {
        OURS: Trial(lambda: _attach(ours), lambda: esp.detach(ours, "default")),
        PEFT: Trial(wrap, unwrap),
        PLAIN: Trial(plain.attach),
    }


def save(base: nn.Module, folder: Path) -> Trials:
    """Write the adapter into a folder."""
    ours, theirs, plain = copy.deepcopy(base), _peft(copy.deepcopy(base)), Plain(base)
    _attach(ours)
    return {
        OURS: Trial(lambda: esp.save(ours, "default", folder / "saved-ours")),
        PEFT: Trial(lambda: theirs.save_pretrained(str(folder / "saved-peft"))),
        PLAIN: Trial(lambda: plain.save(folder / "plain.safetensors")),
    }


def load(base: nn.Module, folder: Path) -> Trials:
    """Load an adapter into a bare model."""
    ours, plain = copy.deepcopy(base), Plain(base)
    theirs: list[Any] = [copy.deepcopy(base)]

    def read() -> None:
        theirs[0] = PeftModel.from_pretrained(theirs[0], str(folder / PEFT))

    def unwrap() -> None:
        theirs[0] = theirs[0].unload()
        theirs[0].__dict__.pop("peft_config", None)

    return {
        OURS: Trial(lambda: esp.load(ours, folder / OURS, "one"), lambda: esp.detach(ours, "one")),
        PEFT: Trial(read, unwrap),
        PLAIN: Trial(lambda: plain.load(folder / "plain.safetensors")),
    }


def _many(base: nn.Module, folder: Path, count: int) -> tuple[nn.Module, PeftModel]:
    """Two models with `count` loaded adapters named 0, 1, …: ours, and peft's with fewer."""
    ours = copy.deepcopy(base)
    theirs: Any = copy.deepcopy(base)
    for index in range(count):
        esp.load(ours, folder / OURS, str(index))
    count = min(count, PEFT_MOST)
    theirs = PeftModel.from_pretrained(theirs, str(folder / PEFT), "0")
    for index in range(1, count):
        theirs.load_adapter(str(folder / PEFT), str(index))
    return ours, theirs


def load_nth(count: int) -> Callable[[nn.Module, Path], Trials]:
    """Load an adapter into a model that holds `count` − 1."""

    def make(base: nn.Module, folder: Path) -> Trials:
        plain = Plain(base)
        ours, theirs = _many(base, folder, count - 1)
        trials = {
            OURS: Trial(
                lambda: esp.load(ours, folder / OURS, "new"), lambda: esp.detach(ours, "new")
            ),
            PEFT: Trial(
                lambda: theirs.load_adapter(str(folder / PEFT), "new"),
                lambda: theirs.delete_adapter("new"),
            ),
            PLAIN: Trial(lambda: plain.load(folder / "plain.safetensors")),
        }
        return _without_peft(trials) if count > PEFT_MOST else trials

    return make


def _without_peft(trials: Trials) -> Trials:
    return {name: trial for name, trial in trials.items() if name != PEFT}


def switch(count: int) -> Callable[[nn.Module, Path], Trials]:
    """Make another one of `count` adapters the active one."""

    def make(base: nn.Module, folder: Path) -> Trials:
        plain = Plain(base)
        names = {OURS: 0, PEFT: 0}

        def another(who: str) -> str:
            names[who] = (names[who] + 1) % count
            return str(names[who])

        ours, theirs = _many(base, folder, count)
        trials = {
            OURS: Trial(lambda: esp.activate(ours, another(OURS)), times=100),
            PEFT: Trial(lambda: theirs.set_adapter(another(PEFT))),
            PLAIN: Trial(plain.switch, times=1000),
        }
        return _without_peft(trials) if count > PEFT_MOST else trials

    return make


def merge(base: nn.Module, folder: Path) -> Trials:
    """Write the active adapter into the base's weights."""
    bare = copy.deepcopy(base)
    ours, theirs, plain = copy.deepcopy(base), _peft(copy.deepcopy(base)), Plain(bare)
    _attach(ours)
    tuner: Any = theirs.base_model
    return {
        OURS: Trial(lambda: esp.merge(ours), lambda: esp.unmerge(ours)),
        PEFT: Trial(tuner.merge_adapter, tuner.unmerge_adapter),
        PLAIN: Trial(plain.merge, plain.unmerge),
    }


def operations(counts: list[int]) -> dict[str, Callable[[nn.Module, Path], Trials]]:
    """What is timed, by name; the names' first words are those of `BOUNDS`."""
    more = [count for count in counts if count > 1]
    return {
        "attach": attach,
        "save": save,
        "load": load,
        **{f"load, number {count}": load_nth(count) for count in more},
        **{f"switch, {count} loaded": switch(count) for count in counts},
        "merge": merge,
    }


def prepare(base: nn.Module, folder: Path) -> None:
    """The files that are loaded."""
    ours, theirs = copy.deepcopy(base), _peft(copy.deepcopy(base))
    _attach(ours)
    esp.save(ours, "default", folder / OURS)
    theirs.save_pretrained(str(folder / PEFT))
    Plain(base).save(folder / "plain.safetensors")


def run(base: nn.Module, folder: Path, counts: list[int], rounds: int) -> dict[str, Any]:
    """Ratios of every operation, and how much the n-th load and switch grew over the first."""
    prepare(base, folder)
    found: dict[str, Any] = {}
    first: dict[str, dict[str, list[float]]] = {}
    for name, make in operations(counts).items():
        seconds = measure.interleave(make(base, folder), rounds)
        kind = name.partition(",")[0]
        first.setdefault(kind, seconds)
        beside = seconds.get(PEFT)
        found[name] = {
            "ours_over_plain": asdict(measure.ratio(seconds[OURS], seconds[PLAIN])),
            "bound": BOUNDS[kind],
            "growth_ours": measure.growth(seconds[OURS], first[kind][OURS]),
        }
        if beside is not None:
            found[name] |= {
                "ours_over_peft": asdict(measure.ratio(seconds[OURS], beside)),
                "peft_over_plain": asdict(measure.ratio(beside, seconds[PLAIN])),
                "growth_peft": measure.growth(beside, first[kind][PEFT]),
            }
    return found


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures as text, one row per operation."""
    return [
        [
            name,
            _ratio(one, "ours_over_plain"),
            f"{one['bound']}" + ("" if _holds(one) else " (missed)"),
            _ratio(one, "ours_over_peft"),
            _ratio(one, "peft_over_plain"),
            f"{one['growth_ours']:.2f}, "
            + (f"{one['growth_peft']:.2f}" if "growth_peft" in one else "–"),
        ]
        for name, one in found.items()
    ]


def _ratio(one: dict[str, Any], key: str) -> str:
    return str(measure.Ratio(**one[key])) if key in one else "–"


def _holds(one: dict[str, Any]) -> bool:
    return one["ours_over_plain"]["median"] <= one["bound"]


def main(argv: list[str] | None = None) -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="The life of an adapter, beside peft's.")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8, 100], metavar="N")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    parser.set_defaults(size="default")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    size = bases.SIZES[asked.size]
    base = bases.llama(size, torch.float32)
    folder = Path(tempfile.mkdtemp(prefix="lifecycle-"))
    try:
        found = run(base, folder, asked.counts, asked.rounds)
    finally:
        shutil.rmtree(folder)
    facts = measure.setting()
    report = measure.Report("Life of an adapter", facts)
    report.table(f"LoRA rank {RANK}, all linears of a Llama-like model", COLUMNS, rows(found))
    report.write(asked.markdown)
    measure.write_json(asked.json, {"setting": facts, "size": asdict(size), **found})


if __name__ == "__main__":
    main()
