"""The invariants that speak of how a model runs: generation, padding, types, memory, compiling."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import espalier as esp
from table import METHODS, REFUSED, grafted
from zoo import BY_NAME, CASES, Case, logits, train

DECODERS = [case for case in CASES if case.name in ("gpt2", "llama")]
WRITERS = [case for case in CASES if case.name in ("gpt2", "llama", "t5", "bart")]


def pairs(cases: list[Case], without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Every method on some families, without the pairs that refuse."""
    table = [
        (case, recipe)
        for case in cases
        for recipe in METHODS
        if (case.name, recipe) not in REFUSED and recipe not in without
    ]
    ids = [f"{case.name}-{recipe}" for case, recipe in table]
    return pytest.mark.parametrize(("case", "recipe"), table, ids=ids)


@pairs(WRITERS)
def test_cached_generation_equals_step_by_step(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch, rate=5e-2)
    model.eval()
    ids = batch["input_ids"][:2]
    how = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **how)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **how))


@pairs(DECODERS)
def test_left_padded_row_equals_the_row_alone(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch)
    ids = batch["input_ids"][:1]
    pad = torch.zeros(1, 4, dtype=ids.dtype)
    mask = torch.cat((pad, torch.ones_like(ids)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(
            input_ids=torch.cat((pad, ids), 1), attention_mask=mask, position_ids=positions
        ).logits[:, 4:]
    assert torch.allclose(padded, logits(model, {"input_ids": ids}), atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*follows a schedule")
@pairs([BY_NAME["bert"]])
def test_a_model_that_is_let_go_leaves_nothing_behind(case: Case, recipe: str) -> None:
    model = grafted(case, recipe)
    model.train()(**case.batch()).loss.backward()
    model.eval()(**case.batch())
    left = [weakref.ref(held) for held in (model, *model.parameters())]
    del model
    gc.collect()
    assert not [held().shape for held in left if held() is not None]


@pairs([BY_NAME["bert"], BY_NAME["llama"], BY_NAME["t5"]])
def test_fp32_numbers_train_over_a_bf16_base(case: Case, recipe: str) -> None:
    model, batch = case.make().to(torch.bfloat16), case.batch()
    before = logits(model, batch)
    esp.attach(model, METHODS[recipe], "mine")
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=8) < first
    assert logits(model, batch).dtype == torch.bfloat16
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    esp.activate(model, None)
    assert torch.equal(logits(model, batch), before)


def gradients(model: nn.Module, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Gradients of the adapter for one batch in training mode."""
    model.train()
    torch.manual_seed(3)
    for p in esp.parameters(model):
        p.grad = None
    model(**batch).loss.backward()
    return [p.grad.clone() for p in esp.parameters(model) if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
@pairs([BY_NAME["bert"], BY_NAME["llama"], BY_NAME["t5"]])
def test_checkpointed_gradients_equal_plain_ones(case: Case, recipe: str, reentrant: bool) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch, steps=2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(plain, gradients(model, batch), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pairs([BY_NAME["bert"], BY_NAME["llama"]])
def test_one_graph_without_breaks(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch)
    expected = logits(model, batch)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert torch.allclose(logits(compiled, batch), expected, atol=1e-5)  # type: ignore[arg-type]
    assert counter.frame_count == 1
