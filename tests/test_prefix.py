"""Prefixes: extra keys and values in every attention, against independent computations of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    flash_attention_mask,
    flex_attention_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import espalier as esp
from espalier.errors import AdapterError, SettingError, SiteError
from zoo import BY_NAME, CASES, VOCAB, Case, logits, train

BERT, GPT2, LLAMA, T5, BART, VIT = (
    BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5", "bart", "vit")
)
TEXT = [case for case in CASES if case is not VIT]
WRITERS = [GPT2, LLAMA, T5, BART]
FIRST, REST = 4, 5  # of the nine tokens in the zoo's batches


def by_name(cases: list[Case]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def numbers(model: nn.Module, name: str = "p") -> dict[str, Tensor]:
    """Every tensor of an adapter by label, to be read or changed in place."""
    return dict(model.get_submodule(f"espalier.@{name}").named())


def prefixed(case: Case, recipe: str = "PTuningV2(length=3, std=1)") -> Any:
    """A model of the case with an adapter "p"."""
    model = case.make()
    esp.attach(model, recipe, "p")
    return model


def whole(case: Case) -> dict[str, Tensor]:
    """The batch, without padding."""
    return case.batch()


def padded(case: Case) -> dict[str, Tensor]:
    """The batch, its first row padded on the right; images have no padding."""
    batch = case.batch()
    if case is VIT:
        return batch
    mask = torch.ones_like(batch["input_ids"])
    mask[0, -3:] = 0
    return {**batch, "attention_mask": mask}


# --- what a prefix is --------------------------------------------------------------------------


def by_hand(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, scale: float, bias: Tensor
) -> Tensor:
    """Attention of (T, h, d_h) to L + T keys, one query and one head at a time."""
    out = torch.zeros_like(q)
    for i in range(len(q)):
        for h in range(q.shape[1]):
            own = torch.stack([q[i, h] @ one * scale for one in k[:, h]]) + bias[h, i]
            new = torch.stack([q[i, h] @ one * scale for one in keys[:, h]])
            shares = torch.cat([new, own]).exp() / (new.exp().sum() + own.exp().sum())
            out[i, h] = shares @ torch.cat([values[:, h], v[:, h]])
    return out.flatten(1)


def test_bert_attends_to_the_prefix_as_the_formula_says() -> None:
    model, batch = prefixed(BERT), BERT.batch()
    attention = model.get_submodule("bert.encoder.layer.1.attention.self")
    seen: list[Any] = []
    handle = attention.register_forward_hook(lambda m, args, out: seen.append((args[0], out[0])))
    logits(model, batch)
    handle.remove()
    x, out = seen[0]
    t, at = numbers(model), "0/bert.encoder.layer.1.attention.output.dense:attention"
    keys, values = (t[f"{at}/{name}"].unflatten(-1, (4, 6)) for name in ("keys", "values"))
    for row in range(len(x)):
        parts = [
            F.linear(x[row], linear.weight, linear.bias).unflatten(-1, (4, 6))
            for linear in (attention.query, attention.key, attention.value)
        ]
        expected = by_hand(*parts, keys, values, 6**-0.5, torch.zeros(4, 9, 9))
        assert torch.allclose(out[row], expected, atol=1e-6)
        # The same as interpolating with attention to the prefix alone, by λ per query and head.
        q, k, v = parts
        new = torch.einsum("ihd,jhd->hij", q, keys) / math.sqrt(6)
        own = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(6)
        share = torch.sigmoid(new.logsumexp(-1) - own.logsumexp(-1)).T.unsqueeze(-1)
        text = torch.einsum("hij,jhd->ihd", own.softmax(-1), v)
        prefix = torch.einsum("hij,jhd->ihd", new.softmax(-1), values)
        mixed = ((1 - share) * text + share * prefix).flatten(1)
        assert torch.allclose(out[row], mixed, atol=1e-6)


def test_t5_gives_the_prefix_no_position_bias_and_heads_of_their_own_width() -> None:
    model, batch = prefixed(T5), T5.batch()
    attention = model.get_submodule("encoder.block.1.layer.0.SelfAttention")
    seen: list[Any] = []
    handle = attention.register_forward_hook(
        lambda m, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    inner: list[Tensor] = []
    o = attention.get_submodule("o").register_forward_pre_hook(
        lambda m, args: inner.append(args[0])
    )
    logits(model, batch)
    handle.remove()
    o.remove()
    args, kwargs, (_, bias, *_) = seen[0]
    x = args[0] if args else kwargs["hidden_states"]
    assert bias.shape == (1, 4, 9, 9)  # what the next layers get has no columns for the prefix
    t, at = numbers(model), "0/encoder.block.1.layer.0.SelfAttention.o:attention"
    keys, values = (t[f"{at}/{name}"].unflatten(-1, (4, 5)) for name in ("keys", "values"))
    parts = [
        F.linear(x[0], getattr(attention, name).weight).unflatten(-1, (4, 5)) for name in "qkv"
    ]
    expected = by_hand(*parts, keys, values, 1.0, bias[0])
    assert torch.allclose(inner[0][0], expected, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@by_name([GPT2, LLAMA])
def test_the_cache_of_real_words_as_prefix_gives_what_the_words_give(
    case: Case, attention: str
) -> None:
    model, ids = case.make(), case.batch()["input_ids"][:1]
    model.set_attn_implementation(attention)
    whole = logits(model, {"input_ids": ids})[:, FIRST:]
    esp.attach(model, f"PrefixTuning(length={FIRST}, reparametrize=False)", "p")
    assert esp.prefix_from_text(model, "p", ids[:, :FIRST]) == 0.0
    rest = {"input_ids": ids[:, FIRST:], "position_ids": torch.arange(FIRST, 9)[None]}
    assert torch.allclose(logits(model, rest), whole, atol=1e-5)
    cache = model(ids[:, :FIRST], use_cache=True)  # with the prefix before it: not what was set
    esp.activate(model, None)
    cache = model(ids[:, :FIRST], use_cache=True).past_key_values.layers[1]
    at = esp.sites(model).select("attention@1")[0].path
    kept = numbers(model)[f"0/{at}:attention/keys"]
    assert torch.allclose(kept, cache.keys[0].transpose(0, 1).flatten(1), atol=1e-6)


@by_name([T5, BART])
def test_a_cross_prefix_of_a_text_equals_a_longer_encoder_text(case: Case) -> None:
    model, batch = case.make(), case.batch()
    first, second = batch["input_ids"][:1, :FIRST], batch["input_ids"][1:2]
    words = {"decoder_input_ids": batch["labels"][:1]}
    with torch.no_grad():
        states = [model.get_encoder()(ids).last_hidden_state for ids in (first, second)]
        both = tf.modeling_outputs.BaseModelOutput(last_hidden_state=torch.cat(states, 1))
        expected = model(encoder_outputs=both, **words).logits
    esp.attach(model, f"PrefixTuning(length={FIRST}, reparametrize=False, sites='cross')", "p")
    assert not torch.allclose(logits(model, {"input_ids": second, **words}), expected, atol=1e-3)
    esp.prefix_from_text(model, "p", first, decoder_input_ids=words["decoder_input_ids"][:, :2])
    assert torch.allclose(logits(model, {"input_ids": second, **words}), expected, atol=1e-5)


@pytest.mark.usefixtures("peft_finds_caches")
def test_peft_agrees_on_bert_where_positions_are_shifted_as_it_shifts_them() -> None:
    length, batch = 5, BERT.batch()
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=length)
    other = peft.get_peft_model(BERT.make(), config).eval()
    model = prefixed(BERT, f"PTuningV2(length={length})")
    table = dict(other.named_parameters())["prompt_encoder.default.embedding.weight"]
    with torch.no_grad():
        table.normal_()
        parts = iter(table.chunk(4, dim=1))  # keys, then values, of each layer
        for label, value in numbers(model).items():
            if label.endswith(("/keys", "/values")):
                value.copy_(next(parts))
    positions = torch.arange(length, length + 9)[None]
    inputs = {"input_ids": batch["input_ids"]}
    expected = logits(other, inputs)
    assert torch.allclose(logits(model, {**inputs, "position_ids": positions}), expected, atol=1e-5)
    assert not torch.allclose(logits(model, inputs), expected, atol=1e-5)


def test_keys_and_values_of_zero_still_take_their_share() -> None:
    model, batch = prefixed(LLAMA), LLAMA.batch()
    base = logits(LLAMA.make(), batch)
    for value in numbers(model).values():  # what a gate of 0 on keys and values leaves as well
        value.zero_()
    assert (logits(model, batch) - base).abs().max() > 1e-2
    assert not esp.PrefixTuning().identity


# --- the network that makes it -----------------------------------------------------------------


@by_name(CASES)
def test_without_its_network_the_prefix_is_the_same(case: Case) -> None:
    model, batch = prefixed(case, "PrefixTuning(length=3, hidden=8)"), case.batch()
    train(model, batch)
    esp.skip_layers(model, 1)
    expected = logits(model, batch)
    assert esp.to_plain(model, "p")
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    plain = prefixed(case, "PrefixTuning(length=3, reparametrize=False)")
    assert [v.shape for v in numbers(model).values()] == [v.shape for v in numbers(plain).values()]
    assert not esp.to_plain(model, "p")


def test_the_slices_are_one_network_over_all_layers() -> None:
    model = prefixed(BERT, "PrefixTuning(length=3, hidden=8)")
    t = numbers(model)
    one = {name: [v for label, v in t.items() if label.endswith(f"/{name}")] for name in
           ("e", "w1", "b1", "w2", "b2")}  # fmt: skip
    assert [len(found) for found in one.values()] == [1, 1, 1, 2, 2]
    big = nn.Sequential(nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 2 * 48))
    with torch.no_grad():
        big[0].weight.copy_(one["w1"][0])
        big[0].bias.copy_(one["b1"][0])
        big[2].weight.copy_(torch.cat(one["w2"]))
        big[2].bias.copy_(torch.cat(one["b2"]))
        made = big(one["e"][0]).chunk(4, dim=1)
    esp.to_plain(model, "p")
    kept = [v for label, v in numbers(model).items() if label.endswith(("/keys", "/values"))]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(made, kept, strict=True))


@by_name([T5, BART])
def test_encoder_decoder_and_cross_attention_have_networks_of_their_own(case: Case) -> None:
    model = prefixed(case, "PrefixTuning(length=3, hidden=8)")
    owners = [label.rpartition("/")[0] for label in numbers(model) if label.endswith("/e")]
    assert len(owners) == 3


COUNTS = {  # of bert-base: trained
    "PrefixTuning(length=10, hidden=512)": 9_857_024,
    "PrefixTuning(length=30, hidden=800)": 15_402_272,
    "PrefixTuning(length=10, reparametrize=False)": 184_320,
    "PTuningV2(length=20)": 368_640,
}


@pytest.mark.parametrize("recipe", COUNTS)
def test_counts_of_bert_base(recipe: str) -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, recipe, "p", head=False)
    account = esp.account(model, "p")
    assert (account.trained, account.changed) == (COUNTS[recipe], 0)


# --- every attention, every kind of model ------------------------------------------------------


@by_name(CASES)
def test_every_key_and_value_of_every_attention_gets_a_gradient(case: Case) -> None:
    model, batch = prefixed(case), case.batch()
    model(**batch).loss.backward()
    prefix = next(group["params"][0] for group in esp.groups(model) if group["name"] == "matrices")
    attentions = esp.sites(model).select("all-attention")
    assert len(attentions) == (6 if case in (T5, BART) else 2)
    assert prefix.numel() == sum(3 * sum(site.kv or ()) for site in attentions)
    assert prefix.grad is not None
    assert prefix.grad.count_nonzero() == prefix.numel()


def test_gpt2_with_cross_attention_has_a_prefix_in_both() -> None:
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=1, n_head=4, add_cross_attention=True
    )
    model = tf.GPT2LMHeadModel(config).eval()
    esp.attach(model, "PTuningV2(length=3)", "p")
    assert [s.kv for s in esp.sites(model).select("all-attention")] == [(24, 24), (24, 24)]
    ids = GPT2.batch()["input_ids"]
    model(ids, encoder_hidden_states=torch.randn(3, 7, 24), labels=ids).loss.backward()
    assert esp.dead_sites(model) == []


@pytest.mark.parametrize("make", [whole, padded], ids=["whole", "padded"])
@by_name(CASES)
def test_eager_equals_sdpa(case: Case, make: Callable[[Case], dict[str, Tensor]]) -> None:
    model, batch = prefixed(case), make(case)
    esp.attach(model, "PrefixTuning(length=2, hidden=8)", "q", head=False)
    for choice in ("p", ["p", "q"], {"p": 0.5, "q": 3.0}):
        esp.activate(model, choice)
        outputs = []
        for attention in ("eager", "sdpa"):  # chosen after the prefix was attached
            model.set_attn_implementation(attention)
            outputs.append(logits(model, batch))
        assert torch.allclose(*outputs, atol=1e-5)


@by_name(TEXT)
def test_padding_changes_nothing(case: Case) -> None:
    model, batch = prefixed(case), padded(case)
    others = {k: v[:1] for k, v in batch.items() if k == "labels" and case in (T5, BART)}
    short = {"input_ids": batch["input_ids"][:1, :6], **others}
    size = logits(model, short).shape[1]
    assert torch.allclose(logits(model, batch)[:1, :size], logits(model, short), atol=1e-5)


# --- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
@by_name(WRITERS)
def test_cached_generation_equals_uncached(case: Case, beams: int) -> None:
    model, ids = prefixed(case), case.batch()["input_ids"][:2]
    for value in numbers(model).values():
        value.mul_(20)  # strong enough to change words
    how = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, **how)
    plain = model.generate(ids, attention_mask=mask, use_cache=False, **how)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, case.make().generate(ids, attention_mask=mask, **how))


@by_name([LLAMA, GPT2])
def test_cached_steps_give_the_logits_of_one_pass(case: Case) -> None:
    model, ids = prefixed(case), case.batch()["input_ids"]
    whole, cache, steps = logits(model, {"input_ids": ids}), None, []
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:7], ids[:, 7:]):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    assert cache.get_seq_length() == 9  # the prefix is in no cache
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_a_static_cache_gives_the_same_words() -> None:
    model, ids = prefixed(LLAMA), LLAMA.batch()["input_ids"][:1]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
    how["attention_mask"] = torch.ones_like(ids)
    static = model.generate(ids, cache_implementation="static", **how)
    assert torch.equal(static, model.generate(ids, **how))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@by_name([GPT2, LLAMA])
def test_a_left_padded_row_equals_the_row_alone(case: Case, attention: str) -> None:
    model, ids = prefixed(case), case.batch()["input_ids"][:1]
    model.set_attn_implementation(attention)
    wide = torch.cat((torch.zeros(1, 4, dtype=ids.dtype), ids), 1)
    mask = (torch.arange(13) >= 4).long()[None]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": wide, "attention_mask": mask, "position_ids": positions}
    expected = logits(model, {"input_ids": ids})
    assert torch.allclose(logits(model, batch)[:, 4:], expected, atol=1e-5)
    how = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    assert torch.equal(model.generate(wide, attention_mask=mask, **how)[:, 4:], alone)


# --- training ----------------------------------------------------------------------------------


def gradients(model: Callable[..., Any], own: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    for p in esp.parameters(own):
        p.grad = None
    model(**batch).loss.backward()
    return [p.grad.clone() for p in esp.parameters(own) if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True])
@by_name([BERT, GPT2, LLAMA, T5])
def test_checkpointing_gives_the_same_gradients(case: Case, reentrant: bool) -> None:
    model, batch = prefixed(case, "PrefixTuning(length=3, hidden=8)").train(), case.batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    expected = gradients(model, model, batch)
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    torch.testing.assert_close(gradients(model, model, batch), expected)


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("eager")
    torch._dynamo.reset()


@by_name([LLAMA, T5])
def test_compiles_to_one_graph(case: Case, counter: CompileCounterWithBackend) -> None:
    model, batch = prefixed(case, "PrefixTuning(length=3, hidden=8)"), case.batch()
    expected = gradients(model, model, batch)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(gradients(compiled, model, batch), expected)
    assert counter.frame_count == 1
    esp.activate(model, None)
    with torch.no_grad():
        assert torch.allclose(compiled(**batch).logits, logits(case.make(), batch), atol=1e-6)


def test_compiled_blocks_share_graphs(counter: CompileCounterWithBackend) -> None:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model, batch = tf.LlamaForCausalLM(config), LLAMA.batch()
    esp.attach(model, "PTuningV2(length=3, dropout=0.0)", "p")
    expected = gradients(model, model, batch)
    for block in model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(gradients(model, model, batch), expected)
    assert counter.frame_count == 2  # the first block's input needs no gradient, the others' does


@by_name(CASES)
def test_bf16_base(case: Case) -> None:
    known, batch = prefixed(case), case.batch()
    expected = logits(known, batch)
    model = case.make().to(torch.bfloat16)
    esp.attach(model, "PTuningV2(length=3)", "p")
    for label, value in numbers(model).items():
        value.copy_(numbers(known)[label])
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch.items()}
    got = logits(model, batch)
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.float(), expected, atol=0.02 * float(expected.abs().max()) + 1e-2)
    train(model, batch, steps=2)
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    assert esp.dead_sites(model) == []


def test_dropout_is_on_the_prefix_and_in_training_only() -> None:
    model, batch = prefixed(LLAMA, "PTuningV2(length=3, dropout=0.5)"), LLAMA.batch()
    assert torch.equal(logits(model, batch), logits(model, batch))
    model.train()  # the zoo's Llama itself has no dropout
    assert not torch.equal(logits(model, batch), logits(model, batch))


# --- several, weighted, kept, taken out --------------------------------------------------------


@by_name(CASES)
def test_two_prefixes_are_one_longer_prefix(case: Case) -> None:
    model, batch = case.make(), padded(case)
    for name, length in (("a", 2), ("b", 3), ("c", 5)):
        esp.attach(model, f"PTuningV2(length={length})", name, head=False)
    a, b = numbers(model, "a"), numbers(model, "b")
    for label, value in numbers(model, "c").items():
        value.copy_(torch.cat([a[label].mul_(5), b[label]]))
    longer = logits(model, batch)
    esp.activate(model, ["a", "b"])
    assert torch.allclose(logits(model, batch), longer, atol=1e-5)


@by_name(CASES)
def test_a_weight_of_two_is_the_prefix_twice(case: Case) -> None:
    model, batch = case.make(), case.batch()
    for name in ("a", "twin"):
        esp.attach(model, "PTuningV2(length=2)", name, head=False)
    for label, value in numbers(model, "twin").items():
        value.copy_(numbers(model, "a")[label].mul_(5))  # strong enough to be seen
    esp.activate(model, "a")
    once = logits(model, batch)
    esp.activate(model, ["a", "twin"])
    twice = logits(model, batch)
    assert not torch.allclose(once, twice, atol=1e-4)
    esp.activate(model, {"a": 2.0})
    assert torch.allclose(logits(model, batch), twice, atol=1e-5)
    esp.activate(model, {"a": 0.5, "twin": 0.5})
    assert torch.allclose(logits(model, batch), once, atol=1e-5)
    esp.activate(model, {"a": 0.0})
    assert torch.equal(logits(model, batch), logits(case.make(), batch))
    with pytest.raises(AdapterError, match="cannot be below 0, as -1 is"):
        esp.activate(model, {"a": -1.0})


@by_name(CASES)
def test_nothing_stays_behind(case: Case) -> None:
    model, batch = case.make(), case.batch()
    expected = logits(model, batch)
    states = [dict(module.__dict__) for module in model.modules()]
    esp.attach(model, "PrefixTuning(length=2, hidden=8)", "p", head=False)
    train(model, batch)
    esp.activate(model, None)
    assert torch.equal(logits(model, batch), expected)
    for module, state in zip(model.modules(), states, strict=False):  # ours come last
        assert module.__dict__.get("config") is state.get("config")
    esp.activate(model, "p")
    esp.detach(model, "p")
    for module, state in zip(model.modules(), states, strict=True):
        assert list(module.__dict__) == list(state)
        assert module.__dict__.get("config") is state.get("config")


@pytest.mark.parametrize("recipe", ["PTuningV2(length=3)", "PrefixTuning(length=3, hidden=8)"])
@by_name(CASES)
def test_saved_and_copied_prefixes_act_the_same(case: Case, recipe: str, tmp_path: Path) -> None:
    model, batch = prefixed(case, recipe), case.batch()
    train(model, batch)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    train(twin, batch)
    assert torch.equal(logits(model, batch), expected)
    twin.set_attn_implementation("eager")
    assert model.config._attn_implementation == "sdpa"
    esp.save(model, "p", tmp_path / "p")
    fresh = case.make()
    esp.load(fresh, tmp_path / "p")
    assert torch.equal(logits(fresh, batch), expected)


# --- from real words ---------------------------------------------------------------------------


def test_a_network_is_regressed_onto_real_words_and_nothing_else_moves() -> None:
    ids = LLAMA.batch()["input_ids"][:1, :FIRST]
    model = prefixed(LLAMA, "PrefixTuning(length=4, hidden=64) + LoRA(rank=2)")
    before = {k: v.clone() for k, v in numbers(model).items()}
    start = esp.prefix_from_text(model, "p", ids, steps=0)
    left = esp.prefix_from_text(model, "p", ids, steps=300, learning_rate=1e-2)
    assert left < 0.01 * start
    after = numbers(model)
    for label, value in before.items():
        assert torch.equal(after[label], value) == label.startswith("1/"), label
    assert all(p.grad is None for p in esp.parameters(model))
    goal = prefixed(LLAMA, "PTuningV2(length=4)")
    esp.prefix_from_text(goal, "p", ids)
    esp.to_plain(model, "p")
    made, wanted = numbers(model), numbers(goal)
    errors = [F.mse_loss(made[label], value) for label, value in wanted.items()]
    assert math.isclose(left, torch.stack(errors).mean(), rel_tol=1e-3)


def test_starting_from_words_leaves_modes_and_active_adapters() -> None:
    model, ids = prefixed(BERT, "PTuningV2(length=4)").train(), BERT.batch()["input_ids"]
    model.get_submodule("dropout").eval()
    esp.attach(model, "LoRA(rank=2)", "other")
    modes = [m.training for m in model.modules()]
    esp.prefix_from_text(model, "p", ids[:1, :4])
    assert [m.training for m in model.modules()] == modes
    assert esp.active(model) == {"other": 1.0}


def test_a_start_that_cannot_be_is_explained() -> None:
    ids = LLAMA.batch()["input_ids"]
    model = prefixed(LLAMA, "PTuningV2(length=4)")
    with pytest.raises(SettingError, match=r"1 rows of 9 tokens.*is 4 long; give one row of 4"):
        esp.prefix_from_text(model, "p", ids[:1])
    with pytest.raises(SettingError, match="3 rows of 4 tokens"):
        esp.prefix_from_text(model, "p", ids[:, :4])
    esp.attach(model, "LoRA()", "lora")
    with pytest.raises(SettingError, match="no prefix to start from text"):
        esp.prefix_from_text(model, "lora", ids[:1, :4])
    esp.attach(model, "PrefixTuning(length=4, hidden=8)", "made")
    esp.freeze(model, "made")
    with pytest.raises(SettingError, match=r"frozen; call esp.thaw"):
        esp.prefix_from_text(model, "made", ids[:1, :4])


# --- where it cannot stand, and other attention functions --------------------------------------


@pytest.mark.parametrize(("setting", "std"), [("", 0.2), ("std=1", 1.0), ("std=0", 0.0)])
def test_a_prefix_without_a_network_starts_at_the_asked_for_spread(
    setting: str, std: float
) -> None:
    model = BERT.make()
    esp.attach(model, f"PTuningV2({setting})", "p", head=False)
    values = torch.cat([p.detach().flatten() for p in esp.parameters(model)])
    assert values.std().item() == pytest.approx(std, rel=0.05)


def test_settings_are_checked() -> None:
    wrong = ("length=0", "hidden=True", "dropout=1.0", "reparametrize='no'", "std=-0.1", "sites=3")
    for setting in wrong:
        with pytest.raises(SettingError, match=setting.partition("=")[0]):
            esp.recipe(f"PrefixTuning({setting})")
    assert esp.recipe("PTuningV2()") == esp.recipe("ptuningv2(length=20, dropout=0.1)")


def test_models_that_attend_on_their_own_are_refused_untouched() -> None:
    torch.manual_seed(0)
    small = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    bloom = tf.BloomForCausalLM(
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=1, n_head=4)
    )
    deberta = tf.DebertaV2Model(tf.DebertaV2Config(vocab_size=VOCAB, intermediate_size=40, **small))
    for model in (bloom, deberta):
        with pytest.raises(SiteError, match="computes its attention itself"):
            esp.attach(model, "PTuningV2()")
        assert not hasattr(model, "espalier")
    latent = tf.DeepseekV3Config(
        vocab_size=VOCAB, intermediate_size=40, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=6, v_head_dim=6, first_k_dense_replace=1, num_key_value_heads=4, **small,
    )  # fmt: skip
    with pytest.raises(SiteError, match="how wide the keys and values are"):
        esp.attach(tf.DeepseekV3ForCausalLM(latent), "PTuningV2()")
    with pytest.raises(SiteError, match=r"no prefix can stand at 'attention\.k'"):
        esp.attach(LLAMA.make(), "PTuningV2(sites='attention.k')")


def flash_by_hand(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flash attention computes: causal from the bottom right, padding from a 2-d mask."""
    assert module.config._attn_implementation == "my_flash"
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    ahead = torch.ones(q.shape[2], k.shape[2]).tril(k.shape[2] - q.shape[2]).bool()
    seen = ahead if mask is None else ahead & mask.bool()[:, None, None]
    scores = (q @ k.transpose(2, 3) * kwargs["scaling"]).masked_fill(~seen, -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


def flex_by_hand(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, **kwargs: Any
) -> tuple[Tensor, None]:
    """What flex attention computes, from the rule of its mask."""
    k, v = (part.repeat_interleave(q.shape[1] // k.shape[1], 1) for part in (k, v))
    assert mask.shape[2:] == (q.shape[2], k.shape[2])
    seen = create_mask(mask.mask_mod, len(q), 1, q.shape[2], k.shape[2], "cpu")
    scores = (q @ k.transpose(2, 3) * kwargs["scaling"]).masked_fill(~seen, -1e9)
    return (scores.softmax(-1) @ v).transpose(1, 2), None


@pytest.fixture
def by_hand_functions() -> Iterator[None]:
    tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    own = {
        "my_flash": (flash_by_hand, flash_attention_mask),
        "my_flex": (flex_by_hand, flex_attention_mask),
    }
    for name, functions in own.items():
        for table, function in zip(tables, functions, strict=True):
            table.register(name, function)
    yield
    for table in tables:
        for name in own:
            del table._global_mapping[name]


@pytest.mark.usefixtures("by_hand_functions")
def test_flex_attention_is_told_of_the_prefix() -> None:
    model, batch = prefixed(LLAMA), padded(LLAMA)
    batch["attention_mask"] = batch["attention_mask"].flip(1)  # a causal mask hides the end anyway
    expected, seen = logits(model, batch), batch["attention_mask"].bool()
    model.config._attn_implementation = "my_flex"
    assert torch.allclose(logits(model, batch)[seen], expected[seen], atol=1e-5)


@pytest.mark.usefixtures("by_hand_functions")
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_flash_attention_is_told_of_the_prefix(side: str) -> None:
    model, batch = prefixed(LLAMA), LLAMA.batch()
    mask = torch.ones_like(batch["input_ids"])
    if side != "none":
        mask[0, slice(0, 3) if side == "left" else slice(-3, None)] = 0
        batch["attention_mask"] = mask
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    expected = logits(model, batch)[mask.bool()]
    model.config._attn_implementation = "my_flash"
    assert torch.allclose(logits(model, batch)[mask.bool()], expected, atol=1e-5)
    esp.activate(model, {"p": 0.5})
    with pytest.raises(SiteError, match=r"'my_flash': an adapter's weight other than 1"):
        logits(model, batch)


@pytest.mark.usefixtures("by_hand_functions")
def test_flash_attention_with_a_window_or_packed_texts_is_refused() -> None:
    torch.manual_seed(0)
    config = tf.MistralConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=10,
    )  # fmt: skip
    model, batch = tf.MistralForCausalLM(config).eval(), LLAMA.batch()
    esp.attach(model, "PTuningV2(length=3)", "p")
    short = {"input_ids": batch["input_ids"][:, :7]}
    expected = logits(model, short)
    logits(model, batch)  # by masks, which SDPA has, the prefix stays in sight of all
    model.config._attn_implementation = "my_flash"
    assert torch.allclose(logits(model, short), expected, atol=1e-5)
    with pytest.raises(SiteError, match="sliding window would hide"):
        logits(model, batch)
    packed = {
        "input_ids": short["input_ids"][:1],
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    with pytest.raises(SiteError, match="packed texts"):
        logits(model, packed)
    llama = prefixed(LLAMA)  # SDPA masks one text from the other and keeps the prefix for both
    rows = [
        logits(llama, {"input_ids": packed["input_ids"][:, part]})
        for part in (slice(3), slice(3, 7))
    ]
    assert torch.allclose(
        logits(llama, {**packed, "use_cache": False}), torch.cat(rows, 1), atol=1e-5
    )
