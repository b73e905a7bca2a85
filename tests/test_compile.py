"""A grafted model under torch.compile, gradient checkpointing, two processes and bf16."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import espalier as esp

METHOD = "LoRA(rank=4, alpha=8)"
RANKS = 2


def llama(layers: int = 1) -> nn.Module:
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def bert(layers: int = 1) -> nn.Module:
    torch.manual_seed(7)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=96,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",  # else BERT sets it in its first forward
    )
    return BertForSequenceClassification(config).train()


FAMILIES = pytest.mark.parametrize("family", [llama, bert])
Family = Callable[..., nn.Module]


def batch(family: Family) -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids if family is llama else torch.tensor([0, 1, 1, 0])}


def adapt(model: nn.Module, name: str = "default", recipe: str = METHOD) -> nn.Module:
    """Attach an adapter that changes something; the numbers are the same every time."""
    esp.attach(model, recipe, name)
    generator = torch.Generator().manual_seed(len(name))
    for p in esp.parameters(model):
        p.data.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


def step(model: Callable[..., Any], own: nn.Module, data: dict[str, Tensor]) -> list[Tensor]:
    """Logits, then the gradients of what trains in `own`, which `model` runs."""
    for p in esp.parameters(own):
        p.grad = None
    out = model(**data)
    out.loss.backward()
    grads = [p.grad for p in esp.parameters(own) if p.grad is not None]
    assert len(grads) == len(esp.parameters(own))
    return [out.logits.detach(), *(grad.clone() for grad in grads)]


def eager(family: Family, recipe: str = METHOD, layers: int = 1) -> list[Tensor]:
    model = adapt(family(layers), recipe=recipe)
    return step(model, model, batch(family))


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@FAMILIES
def test_one_graph(family: Family, counter: CompileCounterWithBackend) -> None:
    model = adapt(family(2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(step(compiled, model, batch(family)), eager(family, layers=2))
    optimiser = torch.optim.SGD(esp.parameters(model), lr=0.1)
    optimiser.step()
    again = step(compiled, model, batch(family))
    assert counter.frame_count == 1  # one graph, and a step of the optimiser asks for no other
    torch.testing.assert_close(again, step(model, model, batch(family)))


@FAMILIES
def test_attached_and_switched_after_compile(family: Family) -> None:
    torch._dynamo.reset()
    model, data = family(), batch(family)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    bare = compiled(**data).logits.detach()
    adapt(model)
    torch.testing.assert_close(step(compiled, model, data), eager(family))
    adapt(model, "second")
    torch.testing.assert_close(step(compiled, model, data), step(model, model, data))
    esp.activate(model, None)
    torch.testing.assert_close(compiled(**data).logits, bare)
    esp.activate(model, "default")
    torch.testing.assert_close(step(compiled, model, data), eager(family))
    esp.merge(model)
    torch.testing.assert_close(compiled(**data).logits, eager(family)[0])


def test_compiled_blocks_share_graphs() -> None:
    graphs = {}
    for layers in (2, 4):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        model = adapt(llama(layers))
        expected = step(model, model, batch(llama))
        for block in model.get_submodule("model.layers").children():
            block.compile(backend=counter, fullgraph=True)
        torch.testing.assert_close(step(model, model, batch(llama)), expected)
        graphs[layers] = counter.frame_count
    torch._dynamo.reset()
    # One for the first block, whose input needs no gradient, one for all that follow.
    assert graphs == {2: 2, 4: 2}


def test_compiled_blocks_attend_by_batched_products_of_any_length() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = adapt(llama(2).to(torch.bfloat16))
    texts = [torch.randint(0, 96, (2, length)) for length in (9, 300)]  # of one block, and two
    expected = [step(model, model, {"input_ids": ids, "labels": ids}) for ids in texts]
    for block in model.get_submodule("model.layers").children():
        block.compile(backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for ids, there in zip(texts, expected, strict=True):
        found = step(model, model, {"input_ids": ids, "labels": ids})
        graphs.append(counter.frame_count)
        for ours, theirs in zip(found, there, strict=True):
            assert (ours - theirs).norm() < 0.03 * theirs.norm()
    assert graphs[0] == graphs[1]
    assert "espalier.attend" in counter.graphs[-1].code
    torch._dynamo.reset()


@FAMILIES
@pytest.mark.parametrize("recipe", [METHOD, "FullTuning()"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(family: Family, recipe: str, reentrant: bool) -> None:
    model = adapt(family(2), recipe=recipe)
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)  # type: ignore[operator]
    torch.testing.assert_close(step(model, model, batch(family)), eager(family, recipe, 2))


@FAMILIES
def test_bf16_base(family: Family) -> None:
    model, data = family().to(torch.bfloat16), batch(family)
    before = model(**data).logits
    esp.attach(model, METHOD, head=["lm_head"] if family is llama else "auto")
    with esp.plain_paths():
        assert torch.equal(model(**data).logits, before)
    torch.testing.assert_close(model(**data).logits, before, rtol=2e-2, atol=2e-2)
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    optimiser = torch.optim.AdamW(esp.parameters(model), lr=0.01)
    losses = []
    for _ in range(4):
        out = model(**data)
        out.loss.backward()
        optimiser.step()
        assert not esp.dead_sites(model) or len(losses) == 0  # B starts at zero, so A waits a step
        optimiser.zero_grad()
        losses.append(out.loss.item())
    assert out.logits.dtype == torch.bfloat16
    assert losses[-1] < losses[0]


def _train(model: Callable[..., Any], own: nn.Module, data: dict[str, Tensor]) -> dict[str, Tensor]:
    optimiser = torch.optim.SGD(esp.parameters(own), lr=0.1)
    for _ in range(3):
        step(model, own, data)
        optimiser.step()
    return {str(i): p.detach() for i, p in enumerate(esp.parameters(own))}


def _rank(rank: int, folder: str) -> None:
    """One of two processes, on its half of the batch."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=RANKS)
    own = adapt(llama())
    half = {key: value.chunk(RANKS)[rank] for key, value in batch(llama).items()}
    save_file(_train(DistributedDataParallel(own), own, half), f"{folder}/{rank}.safetensors")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file on POSIX")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(
        _rank, (str(tmp_path),), nprocs=RANKS, start_method="spawn"
    )
    own = adapt(llama())
    one = _train(own, own, batch(llama))
    for rank in range(RANKS):
        torch.testing.assert_close(load_file(tmp_path / f"{rank}.safetensors"), one)
