"""One training step: what it computes, moves and keeps, and how long it takes beside peft's.

    python benchmarks/step.py                     hidden 512, 8 layers, 4 × 256 tokens
    python benchmarks/step.py --small --json out.json
    python benchmarks/step.py --field settings    dropout, DoRA, q and v, AdaLoRA, checkpointing
    python benchmarks/step.py --field kinds       (IA)³, prefix and prompt tuning, adapters
    python benchmarks/step.py --field compile     torch.compile: peft's model, our layers or model

Every contender does forward + backward + AdamW with a model of its own. LoRA is of rank 8 on all
linears. `limit` is the frozen model's forward and backward for activations down to the embeddings,
nothing trained; `gemm` is that step's matrix products alone. "/ limit" and "/ rival" are medians
over interleaved rounds; the rival is peft's (or our own, where it says so) with the same settings.
What is compiled is compiled before anything is timed and has no counts: its kernels are no ATen
operations. "compiling" is the processor time that this takes, compilers it calls included.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config

import bases
import espalier as esp
import measure
from counting import Counts, count, products
from espalier.training import compiling

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
COLUMNS = (
    *("", "kernels", "GEMMs", "GFLOP", "MB moved", "MB saved", "saved / rival"),
    *("time / limit", "rival", "time / rival", "compiling"),
)
LIMIT, GEMM, PEFT, OURS = "limit", "gemm", "peft LoRA", "our LoRA"
PEFT_COMPILED = "peft LoRA, compiled"
inductor: Any = config
Made = tuple[nn.Module, Any]
COMPILED = contextlib.ExitStack()  # what stays compiled until a field is done


@dataclass(slots=True)
class Contender:
    """A model that trains one step at a time."""

    model: nn.Module
    batch: dict[str, Tensor]
    optimiser: torch.optim.Optimizer | None
    rival: str = LIMIT
    plain: bool = False

    def forward(self) -> Tensor:
        """The loss."""
        if not self.plain:
            return self.model(**self.batch).loss
        with esp.plain_paths():
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


def _limit(model: nn.Module) -> Made:
    model.requires_grad_(False)
    words = model.get_input_embeddings()  # type: ignore[operator]
    words.register_forward_hook(lambda _m, _args, out: out.requires_grad_())
    return model, None


def _plain_full(model: nn.Module) -> Made:
    return model, _adamw(model.parameters())


def _ours(method: str, model: nn.Module) -> Made:
    esp.attach(model, method)
    optimiser = _adamw(esp.parameters(model))
    if model.espalier.adapters["default"].regimes:  # type: ignore[union-attr]
        esp.Lifecycle(model, steps=10_000).follow(optimiser)
    return model, optimiser


def _checkpointed(make: Callable[[nn.Module], Made], model: nn.Module) -> Made:
    made = make(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    return made


def _compiled(how: compiling.How, make: Callable[[nn.Module], Made], model: nn.Module) -> Made:
    """As `--compile` does it, but for the little batch that it traces."""
    model, optimiser = make(model)
    words = torch.ones(2, 4, dtype=torch.long)
    COMPILED.enter_context(compiling.compiled(model, how, lambda: model(input_ids=words)))
    return model, optimiser


def _peft_compiled(model: nn.Module) -> Made:
    model, optimiser = _lora(model)
    model.compile(backend=compiling.BACKEND)
    return model, optimiser


def _peft(kind: str, model: nn.Module, fp32: bool = True, **settings: Any) -> Made:
    import peft

    task = "CAUSAL_LM" if type(model).__name__.endswith("CausalLM") else "SEQ_CLS"
    config = getattr(peft, kind)(task_type=task, **settings)
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32)  # type: ignore[arg-type]
    return wrapped, _adamw([p for p in wrapped.parameters() if p.requires_grad])


_LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
_lora = functools.partial(_peft, "LoraConfig", **_LORA)
Entry = tuple[Callable[[nn.Module], Made], str]  # what makes it, and its rival


def _our(method: str, rival: str) -> Entry:
    return functools.partial(_ours, method), rival


def _our_compiled(how: compiling.How) -> Callable[[nn.Module], Made]:
    return functools.partial(_compiled, how, functools.partial(_ours, "LoRA()"))


FIELDS: dict[str, dict[str, Entry]] = {
    "lora": {
        "full, plain": (_plain_full, LIMIT),
        "full, ours": _our("FullTuning()", "full, plain"),
        PEFT: (_lora, LIMIT),
        "peft LoRA, low precision": (functools.partial(_lora, fp32=False), PEFT),
        OURS: _our("LoRA()", PEFT),
        "our LoRA, plain paths": _our("LoRA()", PEFT),
    },
    "settings": {
        PEFT: (_lora, LIMIT),
        OURS: _our("LoRA()", PEFT),
        "peft LoRA, dropout": (functools.partial(_lora, lora_dropout=0.1), PEFT),
        "our LoRA, dropout": _our("LoRA(dropout=0.1)", "peft LoRA, dropout"),
        "our LoRA, dropout / ours": _our("LoRA(dropout=0.1)", OURS),
        "peft DoRA": (functools.partial(_lora, use_dora=True), PEFT),
        "our DoRA": _our("LoRA(dora=True)", "peft DoRA"),
        "our DoRA / our LoRA": _our("LoRA(dora=True)", OURS),
        "our AdaLoRA / our LoRA": _our("AdaLoRA(rank=8, target=4)", OURS),
        "peft q, v": (
            functools.partial(
                _peft,
                "LoraConfig",
                **{**_LORA, "target_modules": r".*\.(q_proj|v_proj|query|value)"},
            ),
            PEFT,
        ),
        "our q, v": _our("LoRA(sites='attention.q, attention.v')", "peft q, v"),
        "peft LoRA, checkpointing": (functools.partial(_checkpointed, _lora), PEFT),
        "our LoRA, checkpointing": (
            functools.partial(_checkpointed, functools.partial(_ours, "LoRA()")),
            "peft LoRA, checkpointing",
        ),
    },
    "kinds": {
        PEFT: (_lora, LIMIT),
        "peft (IA)³": (functools.partial(_peft, "IA3Config"), PEFT),
        "our (IA)³": _our("IA3()", "peft (IA)³"),
        "peft prefix 16": (
            functools.partial(_peft, "PrefixTuningConfig", num_virtual_tokens=16),
            PEFT,
        ),
        "our prefix 16": _our("PTuningV2(length=16)", "peft prefix 16"),
        "peft prompt 16": (
            functools.partial(_peft, "PromptTuningConfig", num_virtual_tokens=16),
            PEFT,
        ),
        "our prompt 16": _our("PromptTuning(length=16)", "peft prompt 16"),
        "our Pfeiffer": _our("SerialAdapter(style='pfeiffer', bottleneck=32)", LIMIT),
        "our Houlsby": _our("SerialAdapter(bottleneck=32)", LIMIT),
        "our parallel": _our("ParallelAdapter(bottleneck=32)", LIMIT),
    },
    "compile": {
        PEFT: (_lora, LIMIT),
        PEFT_COMPILED: (_peft_compiled, PEFT),
        OURS: _our("LoRA()", PEFT_COMPILED),
        "our LoRA, compiled layers": (_our_compiled("layers"), PEFT),
        "our LoRA, compiled model": (_our_compiled("model"), PEFT_COMPILED),
    },
}


def contenders(
    field: str, family: str, size: bases.Size, dtype: torch.dtype
) -> dict[str, Contender]:
    """Every contender of a field with a model of its own."""
    makers: dict[str, Entry] = {LIMIT: (_limit, LIMIT), **FIELDS[field]}
    if dtype == torch.float32:
        makers.pop("peft LoRA, low precision", None)
    data = bases.batch(family, size)
    found = {}
    for name, (make, rival) in makers.items():
        model, optimiser = make(bases.FAMILIES[family](size, dtype))
        found[name] = Contender(model, data, optimiser, rival, name.endswith("plain paths"))
    return found


def run(
    field: str, family: str, size: bases.Size, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Counts and time ratios of every contender, by name; compiled ones have no counts."""
    # Nothing comes from an earlier run's cache, and no time is spent where it is not seen.
    with COMPILED, inductor.patch(force_disable_caches=True, compile_threads=1):
        return _measured(contenders(field, family, size, dtype), rounds)


def _measured(entered: dict[str, Contender], rounds: int) -> dict[str, Any]:
    counts: dict[str, Counts] = {}
    spent: dict[str, float] = {}
    for name, one in list(entered.items()):
        start = _spent()
        try:
            one.step()  # the optimiser makes its state
            one.step()
        except (RuntimeError, ValueError) as error:
            if not name.startswith("peft"):
                raise
            print(f"{name} does not run here: {error}")
            del entered[name]
            continue
        if any(module._compiled_call_impl is not None for module in one.model.modules()):
            spent[name] = _spent() - start
            continue
        own = [*one.model.parameters(), *one.model.buffers(), *one.batch.values()]
        counts[name] = count(one.forward, one.finish, own)
    trials = {name: measure.Trial(one.step) for name, one in entered.items()}
    again, counts[GEMM] = products(entered[LIMIT].step)
    trials[GEMM] = measure.Trial(again)
    seconds = measure.interleave(trials, rounds)
    rivals = {name: one.rival if one.rival in entered else LIMIT for name, one in entered.items()}
    rivals[GEMM] = LIMIT
    return {
        name: {
            **(asdict(counts[name]) if name in counts else {}),
            **({"compiling": spent[name]} if name in spent else {}),
            **_saved(counts.get(name), counts.get(rival)),
            "seconds": seconds[name],
            "over_limit": asdict(measure.ratio(seconds[name], seconds[LIMIT])),
            "rival": rival,
            "over_rival": asdict(measure.ratio(seconds[name], seconds[rival])),
        }
        for name, rival in rivals.items()
    }


def _spent() -> float:
    """Processor seconds so far, those of compilers that were called among them."""
    return sum(os.times()[:4])


def _saved(own: Counts | None, rival: Counts | None) -> dict[str, float]:
    if own is None or rival is None:
        return {}
    return {"saved_over_rival": own.saved / (rival.saved or 1)}


def rows(found: dict[str, Any]) -> list[list[str]]:
    """The figures as text, one row per contender."""
    return [
        [
            name,
            _cell(one, "kernels", ","),
            _cell(one, "gemms", ","),
            _cell(one, "flops", ".3g", 1e9),
            _cell(one, "moved", ",.4g", 1e6),
            _cell(one, "saved", ",.4g", 1e6),
            _cell(one, "saved_over_rival", ".2f"),
            str(measure.Ratio(**one["over_limit"])),
            one["rival"],
            str(measure.Ratio(**one["over_rival"])),
            _cell(one, "compiling", ".0f"),
        ]
        for name, one in found.items()
    ]


def _cell(one: dict[str, Any], key: str, form: str, unit: float = 1) -> str:
    value = one.get(key)
    return "–" if value is None else format(value if unit == 1 else value / unit, form)


def main(argv: list[str] | None = None) -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description="Work and time of one training step.")
    preset = parser.add_mutually_exclusive_group()
    for name in ("small", "tiny"):
        preset.add_argument(f"--{name}", dest="size", action="store_const", const=name)
    parser.add_argument("--field", nargs="+", choices=[*FIELDS], default=["lora"])
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
    for field in asked.field:
        for family in asked.family:
            for kind in asked.dtype:
                found = run(field, family, size, DTYPES[kind], asked.rounds)
                results[f"{field} {family} {kind}"] = found
                report.table(f"{field}: {family}-like, {kind}", COLUMNS, rows(found))
                report.write(asked.markdown)
                measure.write_json(asked.json, results)


if __name__ == "__main__":
    main()
