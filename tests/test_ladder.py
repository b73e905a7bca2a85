"""Ladder side-tuning against the formula by hand, the base's own rows, and real generation."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
)

import espalier as esp
import tiny_runs
from espalier.attention import NAME
from espalier.errors import AdapterError, SettingError, SiteError
from espalier.plain.ladder import Ladder
from graded import saved_bytes
from zoo import BY_NAME, VOCAB, logits, train

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_labels": 3, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip


def bert(**changes: Any) -> nn.Module:
    return tf.BertForSequenceClassification(tf.BertConfig(**{**SMALL, **changes})).eval()


def llama(**changes: Any) -> nn.Module:
    config = tf.LlamaConfig(**{**SMALL, "num_key_value_heads": 2, **changes})
    return tf.LlamaForCausalLM(config).eval()


def numbers(model: nn.Module, stack: str = "") -> dict[str, Tensor]:
    """The ladder's numbers by name, of the stack whose path begins so."""
    named = model.get_submodule("espalier.@l").named()  # type: ignore[operator]
    return {
        label.split("/", 2)[2]: value
        for label, value in named
        if label.startswith(f"0/{stack}") and "/" in label[2:]
    }


def shaken(model: nn.Module, recipe: str = "LadderSideTuning(reduction=2)") -> nn.Module:
    """With a ladder whose numbers all matter."""
    esp.attach(model, recipe, "l")
    for p in esp.parameters(model):
        p.data += 0.3 * torch.randn_like(p)
    return model


def ids(rows: int = 2, tokens: int = 7) -> Tensor:
    return torch.randint(5, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(3))


@contextmanager
def states(model: nn.Module, ending: str) -> Iterator[list[Tensor]]:
    """What the modules of a class give."""
    found: list[Tensor] = []

    def note(module: nn.Module, args: Any, result: Any) -> None:
        found.append(result if isinstance(result, Tensor) else result[0])

    inside = [m for m in model.modules() if type(m).__name__.endswith(ending)]
    hooks = [m.register_forward_hook(note) for m in inside]
    yield found
    for hook in hooks:
        hook.remove()


def filled(module: nn.Module, t: dict[str, Tensor], prefix: str) -> nn.Module:
    """A real module with the ladder's numbers copied in."""
    held = {name[len(prefix) :]: v for name, v in t.items() if name.startswith(prefix)}
    module.load_state_dict(held)
    return module.eval()


# ------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("closed", [False, True], ids=["open", "mu=0"])
def test_bert_equals_the_formula_with_real_narrow_layers(closed: bool) -> None:
    model = shaken(bert(), "LadderSideTuning(reduction=2, temperature=0.5)")
    t = numbers(model)
    if closed:
        t["gates"].fill_(-1e4)
    small = tf.BertConfig(**{**SMALL, "hidden_size": 16, "intermediate_size": 24})
    small._attn_implementation = "sdpa"
    layers = [filled(BertLayer(small), t, f"side.{i}.") for i in range(2)]
    text, mask = ids(), torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    with torch.no_grad():
        backbone: Any = model.bert
        h = [backbone.embeddings(text)]
        wide = (mask == 0)[:, None, None, :].float() * torch.finfo(torch.float32).min
        for layer in backbone.encoder.layer:
            h.append(type(layer).forward(layer, h[-1], wide))
        down = [F.linear(x, t[f"down.{i}.weight"], t[f"down.{i}.bias"]) for i, x in enumerate(h)]
        mu = torch.sigmoid(t["gates"] / 0.5)
        u = down[0]
        for i, layer in enumerate(layers):
            u = layer(mu[i] * u + (1 - mu[i]) * down[i + 1], wide)
        if closed:
            assert torch.allclose(u, layers[1](down[2], wide), atol=1e-6)
        out = F.linear(u, t["up.weight"], t["up.bias"])
        head = model.get_submodule("classifier")
        esp.activate(model, "l")
        expected = F.linear(backbone.pooler(out), head.weight, head.bias)  # type: ignore[arg-type]
    assert torch.allclose(
        logits(model, {"input_ids": text, "attention_mask": mask}), expected, atol=1e-5
    )


def test_llama_equals_the_formula_and_keeps_every_rth_frequency() -> None:
    model = shaken(llama(hidden_size=64))
    t = numbers(model)
    small = tf.LlamaConfig(**{
        **SMALL, "hidden_size": 32, "intermediate_size": 24, "head_dim": 8,
        "num_key_value_heads": 2,
    })  # fmt: skip
    small._attn_implementation = "sdpa"
    layers = [filled(LlamaDecoderLayer(small, i), t, f"side.{i}.") for i in range(2)]
    norm = filled(LlamaRMSNorm(32, small.rms_norm_eps), t, "norm.")
    with states(model, "LlamaDecoderLayer") as h, torch.no_grad():
        h.append(model.get_input_embeddings()(ids()))  # type: ignore[operator]
        given = model(input_ids=ids()).logits
        frequency = 10000.0 ** -(torch.arange(0, 16, 2)[::2] / 16)  # of heads of 16, every second
        angle = torch.arange(7)[:, None] * frequency
        angle = torch.cat((angle, angle), -1)[None]
        turns = (angle.cos(), angle.sin())
        u = F.linear(h[0], t["down.0.weight"], t["down.0.bias"])
        for i, layer in enumerate(layers):
            d = F.linear(h[i + 1], t[f"down.{i + 1}.weight"], t[f"down.{i + 1}.bias"])
            mu = torch.sigmoid(t["gates"][i] / 0.1)
            u = layer(mu * u + (1 - mu) * d, position_embeddings=turns, attention_mask=None)
        out = F.linear(norm(u), t["up.weight"], t["up.bias"])
        expected = F.linear(out, model.get_parameter("lm_head.weight"))
    assert torch.allclose(given, expected, atol=1e-5)


def test_t5_decodes_from_the_sides_encoder_and_leaves_the_trunks_states() -> None:
    case = BY_NAME["t5"]
    plain, model = case.make(), shaken(case.make())
    batch = case.batch()
    with torch.no_grad():
        trunk = plain.get_submodule("encoder")(input_ids=batch["input_ids"]).last_hidden_state
        same = model.get_submodule("encoder")(input_ids=batch["input_ids"]).last_hidden_state
    assert torch.equal(trunk, same)
    before = logits(model, batch)
    numbers(model, "encoder")["norm.weight"].mul_(2)
    assert not torch.allclose(logits(model, batch), before, atol=1e-3)


def test_layers_left_out_have_no_block_and_the_first_kept_owns_the_bias() -> None:
    config: dict[str, Any] = {
        "vocab_size": VOCAB, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_heads": 4,
        "num_layers": 4, "decoder_start_token_id": 0,
    }  # fmt: skip
    model = tf.T5ForConditionalGeneration(tf.T5Config(**config)).eval()
    shaken(model, "LadderSideTuning(reduction=2, sites='block, !block@0+2')")
    for stack in ("encoder", "decoder"):
        t = numbers(model, stack)
        bias = "layer.0.SelfAttention.relative_attention_bias.weight"
        assert [name for name in t if name.endswith(bias)] == [f"side.0.{bias}"]
        assert t["gates"].shape == (4,)
        assert sum(name.startswith("down.") for name in t) == 2 * 3
    case = BY_NAME["t5"]
    first = train(model, case.batch(), steps=1)
    assert train(model, case.batch(), steps=8) < first
    assert esp.dead_sites(model) == []


def test_counts_of_t5_base_are_the_papers() -> None:
    config: dict[str, Any] = {
        "d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    with torch.device("meta"):
        model = tf.T5ForConditionalGeneration(tf.T5Config(**config))
    for sites, count in (("block, !block@0+4+8", 3_878_712), ("block", 5_097_240)):
        esp.attach(model, esp.LadderSideTuning(sites=sites), "l")
        assert esp.account(model, "l").trained == count
        esp.detach(model, "l")


# ------------------------------------------------------------------------- no graph in the trunk


@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"]
)
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "bart"])
def test_no_state_of_the_trunk_has_a_graph(name: str, reentrant: bool | None) -> None:
    case = BY_NAME[name]
    model: Any = shaken(case.make()).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    ending = {"bert": "BertLayer", "llama": "LlamaDecoderLayer", "t5": "T5Block"}
    inner = {"bert": "BertSelfAttention", "llama": "LlamaMLP", "t5": "T5LayerFF"}
    found: list[Tensor] = []
    for kind in (inner.get(name, "BartAttention"), ending.get(name, "coderLayer")):
        with states(model, kind) as seen:
            loss = model(**case.batch()).loss
        # Where the last block is the stack's end, what it gives is the ladder's.
        found += seen[:-1] if kind.endswith("Layer") else seen
    assert len(found) >= 3
    assert not any(h.requires_grad or h.grad_fn for h in found)
    loss.backward()
    assert all(p.grad is not None for p in esp.parameters(model))


def test_a_pickled_model_runs_where_nothing_else_of_ours_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as TABLE

    model = shaken(bert())
    batch = {"input_ids": ids(2, 9)}
    before, kept = logits(model, batch), pickle.dumps(model)
    monkeypatch.delitem(TABLE._global_mapping, NAME)  # as in a new process
    assert torch.equal(logits(pickle.loads(kept), batch), before)


@pytest.mark.parametrize(
    ("make", "dropout", "most", "most_again"),
    [(llama, 0.0, 0.25, 0.12), (bert, 0.0, 0.25, 0.12), (bert, 0.1, 0.25, 0.12)],
    ids=["llama", "bert", "bert-dropout"],
)
def test_saved_bytes_are_a_fraction_of_loras(
    make: Any, dropout: float, most: float, most_again: float
) -> None:
    """Also where the base drops attention: its scores (h, T, T) are divided by no width."""
    changes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704}
    if make is bert:
        changes |= {"attention_probs_dropout_prob": dropout, "hidden_dropout_prob": dropout}
    text = ids(2, 64)
    batch = {"input_ids": text, "labels": text if make is llama else torch.tensor([0, 1])}
    sizes = []
    for recipe in ("LoRA(rank=8)", "LadderSideTuning()", "LadderSideTuning(recompute=True)"):
        model = make(**changes).train()
        esp.attach(model, recipe, "l")
        with esp.plain_paths():  # LoRA's own share of the base's graph, not what is made of it
            sizes.append(saved_bytes(model, batch))
    assert sizes[1] <= most * sizes[0]
    assert sizes[2] <= most_again * sizes[0]


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_recomputing_gives_the_same_gradients(name: str) -> None:
    case, found = BY_NAME[name], []
    for recompute in (False, True):
        torch.manual_seed(5)
        model = shaken(case.make(), f"LadderSideTuning(reduction=2, recompute={recompute})")
        model.train()
        torch.manual_seed(5)
        model(**case.batch()).loss.backward()
        found.append([p.grad for p in esp.parameters(model)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ what it starts from


def source(side: Tensor, trunk: Tensor, columns: Tensor) -> Tensor:
    """Which rows of the trunk's weight, at these columns, the side's rows are, exactly."""
    same = (side[:, None] == trunk[:, columns][None]).all(-1)
    assert same.sum(1).eq(1).all()
    return same.int().argmax(1)


def topmost(score: Tensor, count: int) -> Tensor:
    return score.argsort(descending=True)[:count].sort().values


def test_bert_starts_from_exact_rows_of_its_heaviest_heads_and_features() -> None:
    model = bert()
    esp.attach(model, "LadderSideTuning(reduction=2)", "l")
    t, layers = numbers(model), model.get_submodule("bert.encoder.layer")
    weights = [dict(layer.named_parameters()) for layer in layers]  # type: ignore[union-attr]
    writers = [w[n].abs().sum(1) for w in weights for n in _WRITES]
    stream = topmost(torch.stack(writers).sum(0), 16)
    for i, w in enumerate(weights):
        side = {n: t[f"side.{i}.{n}"] for n in w}
        q, k, v = (
            source(side[n], w[n], stream) for n in (f"attention.self.{x}.weight" for x in _QKV)
        )
        heads = torch.arange(16) // 4
        assert torch.equal(q // 8, heads)  # each head takes from one head
        assert torch.equal(q, k)
        assert torch.equal(v // 8, heads)
        pull = w["attention.self.query.weight"].abs().sum(1) * w[
            "attention.self.key.weight"
        ].abs().sum(1)
        assert torch.equal(
            q, torch.cat([8 * a + topmost(p, 4) for a, p in enumerate(pull.view(4, 8))])
        )
        o = "attention.output.dense.weight"
        assert torch.equal(side[o], w[o][stream][:, v])
        assert torch.equal(side["attention.self.key.bias"], w["attention.self.key.bias"][k])
        f = source(side["intermediate.dense.weight"], w["intermediate.dense.weight"], stream)
        assert torch.equal(side["output.dense.weight"], w["output.dense.weight"][stream][:, f])
        norm = "attention.output.LayerNorm.weight"
        assert torch.equal(side[norm], w[norm][stream])
    for name in ("down.0.weight", "down.2.weight", "up.weight"):
        start = t[name].T if name == "up.weight" else t[name]
        rest = start - torch.eye(32)[stream]
        assert rest.std() == pytest.approx(0.01, rel=0.2)
    esp.attach(model, "LadderSideTuning(reduction=2, projections='random')", "l2", head=False)
    esp.activate(model, None)
    plain = dict(model.get_submodule("espalier.@l2").named())  # type: ignore[operator]
    starts = [v for n, v in plain.items() if n.endswith(("up.weight", "down.1.weight"))]
    assert all(v.std() == pytest.approx(0.01, rel=0.2) for v in starts)
    assert not any(t[n].any() for n in ("gates", "up.bias", "down.0.bias"))


_QKV = ("query", "key", "value")
_WRITES = ("attention.output.dense.weight", "output.dense.weight")


def test_fused_and_grouped_heads_start_from_exact_rows_too() -> None:
    model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=4))
    esp.attach(model, "LadderSideTuning(reduction=2)", "l")
    t, block = numbers(model), model.get_submodule("transformer.h.0")
    wide, small = block.get_parameter("attn.c_attn.weight").T, t["side.0.attn.c_attn.weight"].T
    total = block.get_parameter("attn.c_proj.weight").abs().sum(0)
    stream = topmost(total + block.get_parameter("mlp.c_proj.weight").abs().sum(0), 16)
    rows = source(small, wide, stream)
    assert torch.equal(rows // 8, torch.arange(48) // 4)  # 12 heads of q, k and v, in order
    assert torch.equal(rows[:16], rows[16:32] - 32)

    model = llama()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("norm.weight"):
                p.normal_()
    esp.attach(model, "LadderSideTuning(reduction=2)", "l")
    t, layer = numbers(model), model.get_submodule("model.layers.1")
    side = t["side.1.self_attn.q_proj.weight"]
    scores = [
        p.abs().sum(1)
        for n, p in model.named_parameters()
        if n.endswith(("o_proj.weight", "down_proj.weight"))
    ]
    stream = topmost(torch.stack(scores).sum(0), 16)
    turned = torch.tensor([0, 2, 4, 6])  # every second frequency, in both halves of a head
    rows = source(side, layer.get_parameter("self_attn.q_proj.weight"), stream)
    assert torch.equal(rows, torch.cat([turned + 8 * a for a in range(4)]))
    v = source(
        t["side.1.self_attn.v_proj.weight"], layer.get_parameter("self_attn.v_proj.weight"), stream
    )
    o = layer.get_parameter("self_attn.o_proj.weight")
    reads = torch.cat([v.view(2, 4)[a // 2] - 8 * (a // 2) + 8 * a for a in range(4)])
    assert torch.equal(t["side.1.self_attn.o_proj.weight"], o[stream][:, reads])
    assert torch.equal(t["norm.weight"], model.get_parameter("model.norm.weight")[stream])


def test_fisher_chooses_by_gradients_and_refuses_once_trained() -> None:
    model = bert()
    for name, p in model.named_parameters():
        if name.endswith("LayerNorm.weight"):
            nn.init.normal_(p)  # so that each tells which dimension it is of
    batches = [{"input_ids": ids(1), "labels": torch.tensor([i])} for i in range(2)]
    twin = copy.deepcopy(model)
    total = torch.zeros(32)
    names = [n for n, _ in twin.named_parameters() if n.endswith(_WRITES) and "encoder" in n]
    for batch in batches:
        twin.zero_grad()
        twin(**batch).loss.backward()
        for name in names:
            total += twin.get_parameter(name).grad.square().sum(1)  # type: ignore[union-attr]
    esp.attach(model, "LadderSideTuning(reduction=2, init='fisher')", "l")
    name = "output.LayerNorm.weight"
    before = numbers(model)[f"side.0.{name}"].clone()
    esp.calibrate(model, "l", batches)
    after = numbers(model)[f"side.0.{name}"]
    norm = model.get_parameter(f"bert.encoder.layer.0.{name}")
    assert torch.equal(after, norm[topmost(total, 16)])
    assert not torch.equal(before, after)
    assert torch.equal(numbers(model)["down.1.weight"].argmax(1), topmost(total, 16))
    train(model, batches[0])
    with pytest.raises(AdapterError, match="trained already"):
        esp.calibrate(model, "l", batches)


def test_the_trainer_lets_data_choose_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    own = Ladder.calibrate

    def calibrate(delta: Ladder, squares: Any) -> None:
        told.append(delta.site.path)
        own(delta, squares)

    monkeypatch.setattr(Ladder, "calibrate", calibrate)
    rows = [{"source": r["prompt"], "target": r["completion"]} for r in tiny_runs.sums(8)]
    recipe = "LadderSideTuning(reduction=4, init='fisher')"
    how: dict[str, Any] = {"epochs": 1, "batch": 4, "threads": 1, "quiet": True}
    esp.fit(tiny_runs.t5(), tiny_runs.tokenizer("t5"), rows, recipe, **how)
    assert told == ["encoder.final_layer_norm", "decoder.final_layer_norm"]


def test_random_starts_are_the_models_own_and_norms_follow_them() -> None:
    model = bert()
    esp.attach(model, "LadderSideTuning(reduction=2, init='random')", "l")
    t = numbers(model)
    assert t["side.0.attention.self.query.weight"].std() == pytest.approx(0.02, rel=0.3)
    assert t["side.0.output.LayerNorm.weight"].eq(1).all()
    assert not t["side.0.intermediate.dense.bias"].any()


# ----------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_cached_generation_with_beams_and_padding_equals_uncached(name: str) -> None:
    model = shaken(BY_NAME[name].make())
    text = ids()
    mask = torch.ones_like(text)
    left = slice(0, 3) if name in ("llama", "gpt2") else slice(4, 7)
    text[0, left], mask[0, left] = 0, 0
    how = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def written(**more: Any) -> Tensor:
        both = [model.generate(text, use_cache=cached, **how, **more) for cached in (True, False)]  # type: ignore[operator]
        assert torch.equal(*both)
        return both[0]

    alone = written()
    written(num_beams=3, num_return_sequences=2)
    esp.attach(model, "LadderSideTuning(reduction=2, init='random')", "second")
    for p in esp.parameters(model):
        p.data += 0.3 * torch.randn_like(p)
    esp.activate(model, {"l": 0.5, "second": 0.7})  # each has keys of its own in the cache
    both = written(num_beams=2)
    esp.activate(model, "l")
    assert torch.equal(written(), alone)
    assert both.shape == alone.shape


def test_a_cache_of_another_kind_or_history_is_refused() -> None:
    model = shaken(llama())
    with pytest.raises(AdapterError, match="StaticLayer"):
        model.generate(ids(), cache_implementation="static", max_new_tokens=2)  # type: ignore[operator]
    esp.activate(model, None)
    past = model(input_ids=ids(), use_cache=True).past_key_values
    esp.activate(model, "l")
    with pytest.raises(AdapterError, match="without this ladder"):
        model(input_ids=ids()[:, :1], past_key_values=past)
    whole = logits(model, {"input_ids": ids()})[:, 4:]
    with torch.no_grad():
        cache = model(input_ids=ids()[:, :4], use_cache=True).past_key_values
        for one in (copy.deepcopy(cache), cache):
            rest = model(input_ids=ids()[:, 4:], past_key_values=one).logits
            assert torch.allclose(rest, whole, atol=1e-5)


def test_encoder_states_are_matched_by_rows_and_strangers_refused() -> None:
    model = shaken(BY_NAME["t5"].make())
    text, words = ids(), ids(2, 4)
    with torch.no_grad():
        given = model.get_submodule("encoder")(input_ids=text)
        whole = model(input_ids=text, decoder_input_ids=words).logits
        again = type(given)(last_hidden_state=given.last_hidden_state.flip(0).repeat(2, 1, 1))
        turned = model(encoder_outputs=again, decoder_input_ids=words.flip(0).repeat(2, 1)).logits
        assert torch.allclose(turned, whole.flip(0).repeat(2, 1, 1), atol=1e-6)
        model.get_submodule("encoder")(input_ids=text + 1)
        with pytest.raises(AdapterError, match="latest run"):
            model(encoder_outputs=given, decoder_input_ids=words)


# ------------------------------------------------------------------------------- where it stands


def test_over_a_four_bit_trunk() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(1)
    model = llama(hidden_size=64, intermediate_size=128)
    esp.quantize(model, "nf4")
    esp.attach(model, "LadderSideTuning(reduction=2)", "l")
    batch = {"input_ids": ids(), "labels": ids()}
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=6) < first
    with pytest.raises(SiteError, match="4-bit"):
        esp.attach(model, "LadderSideTuning(reduction=2, init='fisher')", "m")


def test_places_where_it_cannot_stand_say_why() -> None:
    for recipe, model, why in (
        ("LadderSideTuning(reduction=3)", bert(), "reductions that do: 2, 4, 8"),
        ("LadderSideTuning(reduction=5)", llama(), "does not divide the width 32"),
        ("LadderSideTuning(reduction=2, sites='attention.q')", bert(), "whole blocks"),
        ("LadderSideTuning(reduction=2, sites='decoder/block')", BY_NAME["t5"].make(), "encoder"),
    ):
        with pytest.raises(SiteError, match=why):
            esp.attach(model, recipe, "l")
        assert "espalier" not in model._modules
    for setting in (
        "reduction=1",
        "init='best'",
        "temperature=0",
        "dropout=1.0",
        "recompute=2",
        "projections='no'",
    ):
        with pytest.raises(SettingError, match=setting.partition("=")[0]):
            esp.recipe(f"LadderSideTuning({setting})")


def test_an_encoder_alone_has_a_ladder_that_ends_it() -> None:
    model = shaken(BY_NAME["t5"].make(), "LadderSideTuning(reduction=2, sites='encoder/block')")
    assert "up.weight" in numbers(model, "encoder")
    model(**BY_NAME["t5"].batch()).loss.backward()
    assert esp.dead_sites(model) == []


@pytest.mark.parametrize(
    "config",
    [
        tf.GPTNeoXConfig(**SMALL),
        tf.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4),
        tf.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
        tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    ],
    ids=["fused-partial-rotary", "sliding", "head-norms", "alibi"],
)
def test_other_decoders_train_and_generate_without_code_of_their_own(config: Any) -> None:
    model = tf.AutoModelForCausalLM.from_config(config).eval()
    shaken(model)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert esp.dead_sites(model) == []
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 2}
    cached = model.generate(ids(), use_cache=True, **how)
    assert torch.equal(cached, model.generate(ids(), use_cache=False, **how))
