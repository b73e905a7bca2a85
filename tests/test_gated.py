"""Gates around methods, and the hybrids that are sums of gated parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import AdapterError, SettingError, SiteError
from zoo import BY_NAME, Case, logits, train

BERT, LLAMA, T5, VIT = (BY_NAME[name] for name in ("bert", "llama", "t5", "vit"))
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


def test_a_mask_given_without_its_name_is_minded_too() -> None:
    model, ids = grafted("Gated(LoRA(rank=4))", steps=0), BERT.batch()["input_ids"]
    for u in numbers(model, "gate_u"):
        u.normal_()
    for b in numbers(model, "/b"):
        b.normal_()
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.no_grad():
        named = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model(ids, mask).logits, named)
        assert not torch.allclose(model(ids, torch.ones_like(mask)).logits, named, atol=1e-3)


def test_an_encoder_that_runs_by_itself_gates_by_its_own_text_and_mask() -> None:
    """`generate` calls it so; what an earlier pass was given is nothing to it."""
    part = "Gated(SerialAdapter(bottleneck=4, init='bert')) + Gated(PrefixTuning(length=2))"
    model, batch = grafted(part, T5, steps=0), T5.batch()
    for view in [*numbers(model, "gate_u"), *numbers(model, "/up")]:
        view.normal_()
    ids = batch["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    encoder = model.get_encoder()
    with torch.no_grad():
        whole = model(**batch, attention_mask=mask).encoder_last_hidden_state
        model.generate(input_ids=ids.flip(0), max_new_tokens=3)
        alone = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        assert torch.allclose(alone, whole, atol=1e-6)
        unmasked = encoder(input_ids=ids).last_hidden_state
        assert not torch.allclose(unmasked[0, :5], whole[0, :5], atol=1e-3)
    esp.detach(model, "mine")
    assert not encoder._forward_pre_hooks
    assert not encoder._forward_pre_hooks_with_kwargs


def test_a_weight_multiplies_the_gate_of_an_adapter_within_a_norm() -> None:
    part = "Gated(SerialAdapter(style='pfeiffer', bottleneck=4, init='bert'))"
    model, batch = grafted(part, steps=0), BERT.batch()
    for view in numbers(model, "/up"):
        view.normal_()
    force(model, 0.5)
    half = logits(model, batch)
    force(model, 1.0)
    esp.activate(model, {"mine": 0.5})
    assert torch.allclose(logits(model, batch), half, atol=1e-6)


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
    with pytest.raises(SettingError, match="Gated needs part"):
        esp.recipe("gated")
    with pytest.raises(SettingError, match="over must be one of"):
        esp.recipe("Gated(LoRA(), over='all')")
    with pytest.raises(SettingError, match="one gate around a method is enough"):
        esp.recipe("Gated(Gated(LoRA()))")
    with pytest.raises(SiteError, match="nothing to gate"):
        esp.attach(BERT.make(), "Gated(FullTuning())")
    for case, place in ((BERT, "embedding"), (VIT, "conv")):
        with pytest.raises(SiteError, match="a gate reads states of tokens"):
            esp.attach(case.make(), f"Gated(LoRA(sites='{place}'))")
    with pytest.raises(AdapterError, match="no gates"):
        esp.gates(grafted("LoRA(rank=2)", steps=0), [BERT.batch()])


def test_gates_that_did_not_act_are_not_read_from_an_earlier_pass() -> None:
    model, batch = grafted("Gated(LoRA(rank=2))", steps=0), BERT.batch()
    assert esp.gates(model, [batch])
    esp.activate(model, None)
    with pytest.raises(AdapterError, match=r"was not used in this batch; is its adapter active"):
        esp.gates(model, [batch], "mine")


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


# --- the named sums ---------------------------------------------------------------------------

SMALL = "length=3, hidden=5, bottleneck=4"
PARTS = (
    "PrefixTuning(length=3, hidden=5) + SerialAdapter(style='pfeiffer', bottleneck=4, init='bert')"
    " + LoRA(rank=2, alpha=2, sites='attention.q, attention.v')"
)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_unipelt_with_open_gates_is_the_sum_of_its_parts(case: Case) -> None:
    model, batch = grafted(f"UniPELT({SMALL}, rank=2)", case, steps=5), case.batch()
    force(model, 1.0)
    assert torch.allclose(
        logits(model, batch), logits(copy_of(model, PARTS, case), batch), atol=1e-6
    )


def test_unipelt_with_shut_gates_keeps_nothing_but_the_mass_of_zero_keys() -> None:
    model, batch = grafted(f"UniPELT({SMALL}, rank=2)", steps=5), BERT.batch()
    force(model, 0.0)
    zeros = BERT.make()
    esp.attach(zeros, "PrefixTuning(length=3, reparametrize=False)", "mine")
    own, other = model.get_submodule(ADAPTER), zeros.get_submodule(ADAPTER)
    heads = {label: value for label, value in own.named() if label.startswith("head/")}
    for label, value in other.named():
        value.copy_(heads[label]) if label in heads else value.zero_()
    assert torch.allclose(logits(model, batch), logits(zeros, batch), atol=1e-6)
    bare = BERT.make()
    esp.attach(bare, "HeadOnly()", "mine")
    for label, value in bare.get_submodule(ADAPTER).named():
        value.copy_(heads[label])
    assert not torch.allclose(logits(model, batch), logits(bare, batch), atol=2e-5)


def test_mam_is_its_prefix_and_its_parallel_adapter() -> None:
    model, batch = grafted(f"MAM({SMALL}, scale=2.0)", steps=5), BERT.batch()
    both = logits(model, batch)
    prefix = "PrefixTuning(length=3, hidden=5)"
    parallel = "ParallelAdapter(bottleneck=4, scale=2.0)"
    assert str(esp.MAM(length=3, hidden=5, bottleneck=4, scale=2.0)) == f"{prefix} + {parallel}"
    for up in numbers(model, "/up"):
        up.zero_()
    for bias in numbers(model, "/up_bias"):
        bias.zero_()
    alone = logits(copy_of(model, prefix), batch)
    assert torch.allclose(logits(model, batch), alone, atol=1e-6)
    assert not torch.allclose(both, alone, atol=1e-4)


def test_sums_of_one_text_or_two_are_one_adapter() -> None:
    named = esp.recipe("UniPELT() + BitFit()")
    assert [type(method).__name__ for method in named.methods] == ["Gated"] * 3 + ["BitFit"]
    assert esp.recipe(named.to_json()) == named
    with pytest.raises(SettingError, match="UniPELT has no setting 'ranks'; did you mean"):
        esp.recipe("UniPELT(ranks=4)")
    with pytest.raises(SettingError, match="did you mean"):
        esp.recipe("UniPelts()")
