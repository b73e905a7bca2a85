"""`compile: layers` and `compile: model`: the same losses, few graphs, early refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
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
    """Graphs are traced as ever, but run as they are: no machine code is made."""
    torch._dynamo.reset()
    made = CompileCounterWithBackend("eager")
    monkeypatch.setattr(compiling, "BACKEND", made)
    yield made
    torch._dynamo.reset()


def small(layers: int = 1) -> Any:
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
        bos_token_id=4, eos_token_id=4, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def fit(model: nn.Module, **settings: Any) -> esp.RunResult:
    given: dict[str, Any] = {
        "method": "LoRA(rank=2)", "batch": 3, "steps": 4, "warmup": 0, "lr": 0.02,
        "max_length": 24, "threads": 1, "quiet": True, "evaluate_every": 2, **settings,
    }  # fmt: skip
    return esp.fit(model, tiny.tokenizer("gpt"), tiny.sums(16), **given)


def losses(result: esp.RunResult) -> torch.Tensor:
    return torch.tensor([line["loss"] for line in result.history])


@HOW
def test_the_same_losses_in_training_and_evaluation(
    how: Any, counter: CompileCounterWithBackend
) -> None:
    model = small()
    compiled, plain = fit(model, compile=how), fit(small())
    assert counter.frame_count > 0
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=1e-5)
    made = counter.frame_count
    model(torch.tensor([[1, 2, 3]]))
    assert counter.frame_count == made  # the model is plain again
    assert not [m for m in model.modules() if m._compiled_call_impl is not None]


@HOW
def test_no_length_or_batch_asks_for_a_graph_of_its_own(
    how: Any, counter: CompileCounterWithBackend
) -> None:
    model = small(2).train()
    esp.attach(model, "LoRA(rank=2)")
    graphs = []
    with compiling.compiled(model, how, lambda: model(torch.ones(2, 4, dtype=torch.long))):
        for shape in [(3, 5), (5, 5), (4, 9), (2, 11), (7, 3), (6, 17)]:
            ids = torch.ones(shape, dtype=torch.long)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[1] <= 3


@pytest.mark.parametrize("settings", [
    {"batching": "pack", "batch": 2, "max_length": 32, "method": "SerialAdapter()"},
    {"checkpointing": True},
])  # fmt: skip
def test_goes_with_packing_adapters_and_checkpointing(settings: dict[str, Any]) -> None:
    compiled, plain = fit(small(), compile="layers", **settings), fit(small(), **settings)
    torch.testing.assert_close(losses(compiled), losses(plain), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_goes_on_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.save_model(tmp_path / "base", small(), tiny.tokenizer("gpt"))
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.sums(30)))

    def run(name: str, how: Any = "layers", **more: Any) -> list[float]:
        torch._dynamo.reset()  # as a new process would begin
        config = esp.RunConfig(
            model=base, train=str(data), out=tmp_path / name, method="LoRA(rank=2)", batch=4,
            steps=5, warmup=0, save_every=2, threads=1, quiet=True, compile=how,
            validation_share=0, **more,
        )  # fmt: skip
        return [line["loss"] for line in esp.train(config).history]

    whole, inner = run("whole"), Loop._step

    def stops(self: Loop, *given: Any) -> None:
        if self.at.step == 3:
            raise KeyboardInterrupt
        inner(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    with pytest.raises(SettingError, match="compile: was 'layers', now 'none'"):
        run("stopped", "none", resume=True)
    assert run("stopped", resume=True) == whole
    a, b = ((tmp_path / name / "adapter").rglob("*.safetensors") for name in ("whole", "stopped"))
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]


@HOW
def test_what_breaks_a_graph_is_refused_before_the_first_step(
    how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small()
    block = model.model.layers[0].mlp
    inner = block.forward

    def looks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return inner(x)

    block.forward = looks
    monkeypatch.setattr(Loop, "_step", lambda *_: pytest.fail("a step was taken"))
    with pytest.raises(SettingError, match=rf"compile='{how}' does not suit .* compile='none'"):
        fit(model, compile=how)
    assert not [m for m in model.modules() if m._compiled_call_impl is not None]


def test_a_model_without_repeated_blocks_is_refused() -> None:
    model = small(2)
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
        fit(small(), compile="layers")


def test_a_trunk_cache_is_not_compiled() -> None:
    with pytest.raises(SettingError, match="compile='layers' and trunk_cache='memory': choose one"):
        esp.RunConfig(model="m", train="t", compile="layers", trunk_cache="memory")
