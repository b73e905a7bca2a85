"""Gates around methods, and the hybrids that are sums of gated parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import AdapterError, SettingError, SiteError
from zoo import BY_NAME, Case, logits, train

BERT, LLAMA = BY_NAME["bert"], BY_NAME["llama"]
ADAPTER = "espalier.@mine"


def grafted(recipe: str, case: Case = BERT, steps: int = 3) -> nn.Module:
    """A model with the recipe attached as "mine" and trained a little."""
    model = case.make()
    esp.attach(model, recipe, "mine")
    if steps:
        train(model, case.batch(), steps)
    return model


def numbers(model: nn.Module, ending: str) -> list[Tensor]:
    """The numbers of every slot whose label ends so, to be changed in place."""
    adapter = model.get_submodule(ADAPTER)
    return [value for label, value in adapter.named() if label.endswith(ending)]


def force(model: nn.Module, gate: float) -> None:
    """Set every gate to 0, ½ or 1 by its bias."""
    for u in numbers(model, "gate_u"):
        u.zero_()
    for a in numbers(model, "gate_a"):
        a.fill_({0.0: -1e9, 0.5: 0.0, 1.0: 1e9}[gate])


def copy_of(model: nn.Module, recipe: str, case: Case = BERT) -> nn.Module:
    """The same numbers under another recipe, gates left out."""
    other = case.make()
    esp.attach(other, recipe, "mine")
    have = dict(model.get_submodule(ADAPTER).named())
    for label, value in other.get_submodule(ADAPTER).named():
        value.copy_(have[label])
    return other


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_open_gates_equal_the_bare_method_and_shut_ones_the_base(case: Case) -> None:
    part = "LoRA(rank=4, alpha=4, sites='attention.q, attention.v')"
    model, batch = grafted(f"Gated({part})", case), case.batch()
    force(model, 1.0)
    bare = copy_of(model, part, case)
    assert torch.allclose(logits(model, batch), logits(bare, batch), atol=1e-6)
    force(model, 0.0)
    for view in numbers(bare, "/b"):
        view.zero_()
    assert torch.equal(logits(model, batch), logits(bare, batch))


def test_half_open_gates_take_half_of_the_change() -> None:
    part = "LoRA(rank=4, alpha=4, sites='ffn.out@1')"
    model, batch = grafted(f"Gated({part})"), BERT.batch()
    force(model, 0.5)
    bare = copy_of(model, part)
    for view in numbers(bare, "/b"):
        view.mul_(0.5)
    assert torch.allclose(logits(model, batch), logits(bare, batch), atol=1e-6)


def test_the_gate_is_the_mean_over_real_tokens_of_a_sigmoid() -> None:
    model, ids = grafted("Gated(LoRA(rank=2, sites='attention.q@0'))"), BERT.batch()["input_ids"]
    (u,), (a,) = numbers(model, "gate_u"), numbers(model, "gate_a")
    u.normal_()
    a.fill_(0.3)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    (read,) = esp.gates(model, [batch])
    hidden = model.get_submodule("bert.embeddings")(ids)
    g = torch.sigmoid(hidden @ u + a)
    expected = ((g * mask).sum(1) / mask.sum(1)).mean()
    assert read.mean == pytest.approx(float(expected), abs=1e-5)
    assert (read.method, read.role, read.layer) == ("LoRA", "attention.q", 0)


def test_more_padding_changes_no_gate() -> None:
    model, ids = grafted("Gated(LoRA(rank=4))", steps=5), BERT.batch()["input_ids"]
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pad = torch.zeros(len(ids), 6, dtype=ids.dtype)
    long = {k: torch.cat((v, pad), 1) for k, v in short.items()}
    assert torch.allclose(logits(model, short), logits(model, long), atol=1e-5)


def test_q_and_v_have_gates_of_their_own() -> None:
    model = grafted("Gated(LoRA(rank=4, sites='attention.q, attention.v'))", steps=0)
    assert len(numbers(model, "gate_u")) == 2 * 2


@pytest.mark.parametrize("cached", [True, False])
def test_gates_of_a_causal_stack_do_not_look_ahead(cached: bool) -> None:
    model, ids = grafted("Gated(LoRA(rank=4))", LLAMA, steps=5), LLAMA.batch()["input_ids"]
    whole = logits(model, {"input_ids": ids})
    if not cached:
        assert torch.allclose(logits(model, {"input_ids": ids[:, :5]}), whole[:, :5], atol=1e-5)
        return
    with torch.no_grad():
        start = model(input_ids=ids[:, :5], use_cache=True)
        rest = model(input_ids=ids[:, 5:], past_key_values=start.past_key_values).logits
    assert torch.allclose(rest, whole[:, 5:], atol=1e-5)


def test_gated_adapters_do_not_merge() -> None:
    model = grafted("Gated(LoRA(rank=4))")
    with pytest.raises(AdapterError, match="cannot be merged"):
        esp.merge(model)


def test_wrong_gates_say_what_is_wrong() -> None:
    with pytest.raises(SettingError, match="one method"):
        esp.recipe("Gated(part='LoRA')")
    with pytest.raises(SettingError, match="over must be one of"):
        esp.recipe("Gated(LoRA(), over='all')")
    with pytest.raises(SettingError, match="one gate around a method is enough"):
        esp.recipe("Gated(Gated(LoRA()))")
    with pytest.raises(SiteError, match="nothing to gate"):
        esp.attach(BERT.make(), "Gated(FullTuning())")
    with pytest.raises(AdapterError, match="no gates"):
        esp.gates(grafted("LoRA(rank=2)", steps=0), [BERT.batch()])


def test_a_gated_method_survives_text_and_json() -> None:
    recipe = esp.recipe("Gated(LoRA(rank=4), over='token') + LoRA(rank=2)")
    assert esp.recipe(str(recipe)) == recipe
    assert esp.recipe(recipe.to_json()) == recipe
    assert recipe.methods[0].learning_rate == esp.LoRA.learning_rate


def test_gates_are_drawn(tmp_path: Path) -> None:
    model = grafted("Gated(LoRA(rank=2)) + Gated(LoRA(rank=2, sites='attention.q'))")
    read = esp.gates(model, [BERT.batch(), BERT.batch()])
    assert len(read) == 2 * 6 + 2
    assert read.plot(tmp_path / "gates.png").stat().st_size > 2000
    assert str(read).count("\n") == len(read)
