"""`compile: layers` and `compile: model`: the same losses, few graphs, refusals before the start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import espalier as esp
import tiny_runs as tiny
from espalier.errors import SettingError
from espalier.training import compiling
from espalier.training.loop import Loop

HOW = pytest.mark.parametrize("how", ["layers", "model"])


@pytest.fixture(autouse=True)
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Graphs are made as for training, forward and backward, but no machine code."""
    torch._dynamo.reset()
    made = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", made)
    yield made
    torch._dynamo.reset()


def fit(model: nn.Module, rows: Any = None, **settings: Any) -> esp.RunResult:
    given: dict[str, Any] = {
        "method": "LoRA(rank=2)", "batch": 3, "steps": 6, "warmup": 0, "lr": 0.02,
        "max_length": 24, "threads": 1, "quiet": True, "evaluate_every": 3, **settings,
    }  # fmt: skip
    words = tiny.tokenizer("bert" if "Bert" in type(model).__name__ else "gpt")
    return esp.fit(model, words, rows or tiny.sums(20), **given)


def losses(result: esp.RunResult) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in result.history])


@HOW
def test_the_same_losses_in_training_and_evaluation(
    how: Any, counter: CompileCounterWithBackend
) -> None:
    plain, model = fit(tiny.llama()), tiny.llama()
    compiled = fit(model, compile=how)
    assert counter.frame_count > 0
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=1e-5)
    made = counter.frame_count
    model(torch.tensor([[1, 2, 3]]))
    assert counter.frame_count == made  # the model is plain again
    assert not [m for m in model.modules() if m._compiled_call_impl is not None]


@HOW
def test_no_length_or_batch_asks_for_graphs_without_end(
    how: Any, counter: CompileCounterWithBackend
) -> None:
    """48 texts of 6 lengths in batches of 1 to 5: as many graphs as for a few of them."""
    graphs = []
    for steps in (12, 40):
        torch._dynamo.reset()
        counter.frame_count = 0
        fit(tiny.bert(), tiny.reviews(48), compile=how, batch=5, batching="random", steps=steps)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] <= 8


@HOW
@pytest.mark.parametrize("settings", [
    {"batching": "pack", "batch": 2}, {"checkpointing": True}, {"method": "DoRA(rank=2)"},
    {"method": "PfeifferAdapter(reduction=8)"},
])  # fmt: skip
def test_goes_with_what_else_a_run_may_do(how: Any, settings: dict[str, Any]) -> None:
    if "batch" in settings:
        settings = {"max_length": 32, **settings}
    plain = fit(tiny.llama(), steps_only(), **settings)
    compiled = fit(tiny.llama(), steps_only(), compile=how, **settings)
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=1e-4)


def steps_only() -> list[dict[str, Any]]:
    return tiny.sums(16)


def test_a_resumed_run_goes_on_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_model(tmp_path / "base", tiny.llama(), tiny.tokenizer("gpt"))
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.sums(30)))

    def run(name: str, **more: Any) -> list[float]:
        torch._dynamo.reset()  # as a new process would begin
        config = esp.RunConfig(
            model=base, train=str(data), out=tmp_path / name, method="LoRA(rank=2)", batch=4,
            steps=7, warmup=0, save_every=2, threads=1, quiet=True, compile="layers", **more,
        )  # fmt: skip
        return [line["loss"] for line in esp.train(config).history]

    whole, inner = run("whole"), Loop._step

    def stops(self: Loop, *given: Any) -> None:
        if self.at.step == 5:
            raise KeyboardInterrupt
        inner(self, *given)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Loop, "_step", stops)
        run("stopped")
    assert run("stopped", resume=True) == whole
    a, b = ((tmp_path / name / "adapter").rglob("*.safetensors") for name in ("whole", "stopped"))
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]
    with pytest.raises(SettingError, match="compile: was 'layers', now 'none'"):
        esp.RunConfig(model=base, train=str(data), compile="none")
        run_other(base, data, tmp_path)


def run_other(base: str, data: Path, folder: Path) -> None:
    """Resume the same run without compiling, before it is finished."""
    (folder / "stopped" / "result.json").unlink()
    state = folder / "stopped" / "state" / "step-6"
    state.mkdir(parents=True)
    written = {"fixed": {"config": {}}, "position": {}}
    (state / "run.json").write_text(json.dumps(written))
    esp.train(esp.RunConfig(model=base, train=str(data), out=folder / "stopped", resume=True))


@HOW
def test_what_breaks_a_graph_is_refused_before_the_first_step(
    how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.llama()
    block = model.model.layers[1].mlp
    inner = block.forward

    def looks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    block.forward = looks
    monkeypatch.setattr(Loop, "_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(SettingError, match=rf"compile: {how} does not suit .* Set compile: none"):
        fit(model, compile=how)
    assert not [m for m in model.modules() if m._compiled_call_impl is not None]


def test_a_model_without_repeated_blocks_is_refused() -> None:
    model = tiny.llama()
    esp.attach(model, "LoRA(rank=2)")
    assert compiling.blocks(model) == [*model.model.layers]

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(x)

    flat = Flat()
    esp.attach(flat, "LoRA(rank=1, sites='other')", head=False)
    with (
        pytest.raises(SettingError, match="finds no repeated block in Flat"),
        compiling.compiled(flat, "layers", lambda: None),
    ):
        pass


def test_no_compiler_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compiling, "BACKEND", "inductor")
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(SettingError, match=r"no C\+\+ compiler"):
        fit(tiny.llama(), compile="layers")


def test_a_trunk_cache_is_not_compiled() -> None:
    with pytest.raises(SettingError, match="compile: layers and trunk_cache: memory: choose one"):
        esp.RunConfig(model="m", train="t", compile="layers", trunk_cache="memory")
