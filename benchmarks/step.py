"""One training step: what it computes, moves and keeps, and how long it takes beside peft's.

    python benchmarks/step.py                     hidden 512, 8 layers, 4 × 256 tokens
    python benchmarks/step.py --small --json out.json

Contenders, each forward + backward + AdamW: full tuning (the plain model, and ours with fp32
copies), LoRA of rank 8 on all linears (peft, peft with adapters in the base's type, ours), and the
floor: the frozen model's forward + backward for activations down to the embeddings, nothing
trained. Where a run gives ratios only, "/ floor" and "/ peft" are medians over interleaved rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bases
import espalier as esp
import measure
from counting import Counts, count

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = ("", "kernels", "GEMMs", "GFLOP", "MB moved", "MB saved", "time / floor", "time / peft")
FLOOR, PEFT, OURS = "floor", "peft LoRA", "our LoRA"


@dataclass(slots=True)
class Contender:
    """A model that trains one step at a time."""

    model: nn.Module
    batch: dict[str, Tensor]
    optimiser: torch.optim.Optimizer | None

    def forward(self) -> Tensor:
        """The loss."""
        return self.model(**self.batch).loss

    def finish(self, loss: Tensor) -> None:
        """Backward, the optimiser's step, gradients cleared."""
        loss.backward()
        if self.optimiser is not None:
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One training step."""
        self.finish(self.forward())


def _adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _floor(model: nn.Module) -> tuple[nn.Module, None]:
    model.requires_grad_(False)
    words = model.get_input_embeddings()  # type: ignore[operator]
    words.register_forward_hook(lambda _m, _args, out: out.requires_grad_())
    return model, None


def _plain_full(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return model, _adamw(model.parameters())


def _our_full(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    esp.attach(model, esp.FullTuning())
    return model, _adamw(esp.parameters(model))


def _our_lora(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    esp.attach(model, esp.LoRA(rank=8, alpha=16))
    return model, _adamw(esp.parameters(model))


def _peft_lora(model: nn.Module, fp32: bool = True) -> tuple[nn.Module, torch.optim.Optimizer]:
    import peft

    task = "CAUSAL_LM" if type(model).__name__.endswith("CausalLM") else "SEQ_CLS"
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32)  # type: ignore[arg-type]
    return wrapped, _adamw([p for p in wrapped.parameters() if p.requires_grad])


def _peft_lora_low(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    return _peft_lora(model, fp32=False)


def contenders(family: str, size: bases.Size, dtype: torch.dtype) -> dict[str, Contender]:
    """Every contender with a model of its own."""
    makers: dict[str, Callable[[nn.Module], tuple[nn.Module, Any]]] = {
        "full, plain": _plain_full,
        "full, ours": _our_full,
        FLOOR: _floor,
        PEFT: _peft_lora,
        "peft LoRA, low precision": _peft_lora_low,
        OURS: _our_lora,
    }
    if dtype == torch.float32:
        del makers["peft LoRA, low precision"]
    data = bases.batch(family, size)
    return {
        name: Contender(*_with_batch(make(bases.FAMILIES[family](size, dtype)), data))
        for name, make in makers.items()
    }


def _with_batch(made: tuple[nn.Module, Any], data: dict[str, Tensor]) -> tuple[Any, ...]:
    return made[0], data, made[1]


def run(family: str, size: bases.Size, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Counts and time ratios of every contender, by name."""
    field = contenders(family, size, dtype)
    for one in field.values():
        one.step()  # the optimiser makes its state
    counts: dict[str, Counts] = {}
    for name, one in field.items():
        own = [*one.model.parameters(), *one.model.buffers(), *one.batch.values()]
        counts[name] = count(one.forward, one.finish, own)
    trials = {name: measure.Trial(one.step) for name, one in field.items()}
    seconds = measure.interleave(trials, rounds)
    return {
        name: {
            **asdict(counts[name]),
            "over_floor": asdict(measure.ratio(seconds[name], seconds[FLOOR])),
            "over_peft": asdict(measure.ratio(seconds[name], seconds[PEFT])),
        }
        for name in field
    }


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures as text, one row per contender."""
    return [
        [
            name,
            f"{one['kernels']:,}",
            f"{one['gemms']:,}",
            f"{one['flops'] / 1e9:.3g}",
            f"{one['moved'] / 1e6:,.4g}",
            f"{one['saved'] / 1e6:,.4g}",
            str(measure.Ratio(**one["over_floor"])),
            str(measure.Ratio(**one["over_peft"])),
        ]
        for name, one in found.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="Work and time of one training step.")
    preset = parser.add_mutually_exclusive_group()
    for name in ("small", "tiny"):
        preset.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.add_argument("--family", nargs="+", choices=[*bases.FAMILIES], default=[*bases.FAMILIES])
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--markdown", type=Path, help="also write the tables here")
    parser.set_defaults(size="default")
    asked = parser.parse_args(argv)
    torch.set_num_threads(asked.threads)
    size = bases.SIZES[asked.size]
    results: dict[str, Any] = {"setting": measure.setting(), "size": asdict(size)}
    report = measure.Report("One training step", results["setting"])
    for family in asked.family:
        for kind in asked.dtype:
            found = run(family, size, DTYPES[kind], asked.rounds)
            results[f"{family} {kind}"] = found
            report.table(f"{family}-like, {kind}", COLUMNS, rows(found))
    report.write(asked.markdown)
    measure.write_json(asked.json, results)


if __name__ == "__main__":
    main()
