"""BitFit: which biases train, those that are created, and what they do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import espalier as esp
import tiny_runs as tiny
from espalier.errors import AdapterError, SettingError, SiteError
from zoo import BY_NAME, CASES, Case, logits, train

BERT, GPT2, LLAMA, T5 = (BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5"))
BIASED = [case for case in CASES if case.name not in ("llama", "t5")]
HEADS = ("classifier",)


def labels(model: nn.Module, name: str = "default") -> set[str]:
    """The base's parameters that have a trained copy, and the layers that were given a bias."""
    adapter = model.get_submodule(f"espalier.@{name}")
    return {
        label.split("/")[1] + ("." + label.split("/")[2]).replace(".shift", "+")
        for label, _ in adapter.named()
        if not label.startswith("head/")
    }


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in esp.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def by_hand(model: nn.Module) -> set[str]:
    """1-d biases of linear, convolution and norm modules outside the head."""
    kinds = (nn.Linear, nn.LayerNorm, nn.Conv2d, Conv1D)
    return {
        f"{path}.bias"
        for path, module in model.named_modules()
        if isinstance(module, kinds)
        and isinstance(module.bias, Tensor)
        and module.bias.dim() == 1
        and not path.startswith(HEADS)
    }


@pytest.mark.parametrize("case", BIASED, ids=lambda case: case.name)
def test_what_trains_is_what_a_hand_written_list_says(case: Case) -> None:
    model = case.make()
    expected = by_hand(model)
    esp.attach(model, esp.BitFit())
    assert labels(model) == expected
    assert esp.account(model, "default").head == (75 if case.has_new_head else 0)
    adapter = model.get_submodule("espalier.@default")
    shares = {kind: p.numel() for kind, p in adapter.flat.items() if "head" not in kind}
    assert list(shares) == ["vectors"]  # never decayed


def test_counts_on_bert_base_from_configuration_alone() -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, esp.BitFit())
    account = esp.account(model, "default")
    assert account.trained == 12 * (7 * 768 + 3072) + 2 * 768 == 102_912
    assert (account.changed, account.rank) == (102_912, 0)
    esp.attach(model, esp.BitFit(sites="attention.q, ffn.in"), "small")
    assert esp.account(model, "small").trained == 12 * (768 + 3072)
    assert round(esp.account(model, "small").percent, 2) == 0.04


def test_the_head_of_a_masked_language_model_is_no_part_of_the_backbone() -> None:
    config = tf.BertConfig(
        vocab_size=96, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=40,
    )  # fmt: skip
    model = tf.BertForMaskedLM(config)
    esp.attach(model, esp.BitFit())
    assert not any(path.startswith("cls") for path in labels(model))
    assert "bert.embeddings.LayerNorm.bias" in labels(model)


def test_key_biases_have_no_gradient_but_rounding_and_nobody_is_alarmed() -> None:
    model, batch = BERT.make().double(), BERT.batch()
    esp.attach(model, esp.BitFit(), dtype=torch.float64)
    randomise(model)
    model(**batch).loss.backward()
    adapter = model.get_submodule("espalier.@default")
    largest = {
        slot.label: float(slot.of(adapter.vectors.grad).abs().max())
        for slot in adapter.slots["vectors"]
    }
    keys = {label for label in largest if ".key/" in label}
    assert len(keys) == 2
    assert max(largest[label] for label in keys) < 1e-12
    assert min(largest[label] for label in largest.keys() - keys) > 1e-9
    for slot in adapter.slots["vectors"]:
        if slot.label in keys:
            slot.of(adapter.vectors.grad).zero_()  # exactly nothing is no fault either
    assert esp.dead_sites(model) == []
    adapter.vectors.grad.zero_()
    dead = esp.dead_sites(model)
    assert any("query" in label for label in dead)
    assert not any("key" in label for label in dead)


def test_a_run_on_key_biases_and_others_passes_the_trainers_watch() -> None:
    model = tiny.bert(num_labels=2, problem_type="single_label_classification")
    result = esp.fit(
        model, tiny.tokenizer(), tiny.reviews(), "BitFit()", steps=10, batch=8, lr=0.02,
        quiet=True, threads=1,
    )  # fmt: skip
    losses = [line["loss"] for line in result.history if line["kind"] == "train"]
    assert losses[-1] < losses[0]


# --- created biases ---------------------------------------------------------------------------


@pytest.mark.parametrize("case", [LLAMA, T5], ids=lambda case: case.name)
def test_models_without_biases_say_so_and_can_be_given_some(case: Case) -> None:
    model, batch = case.make(), case.batch()
    with pytest.raises(SiteError, match=r"no biases to train; BitFit\(create=True\)"):
        esp.attach(model, esp.BitFit())
    assert "espalier" not in model._modules
    untouched = logits(model, batch)
    linears = {p for p, m in model.named_modules() if isinstance(m, nn.Linear) and p != "lm_head"}
    esp.attach(model, esp.BitFit(create=True))
    assert torch.equal(logits(model, batch), untouched)  # zeros, and nothing else
    assert labels(model) == {f"{path}+" for path in linears}  # t-few forgets wo
    randomise(model)
    dense = case.make()
    adapter = model.get_submodule("espalier.@default")
    for label, value in adapter.named():
        host = dense.get_submodule(label.split("/")[1])
        host.bias = nn.Parameter(value.detach().clone())
    expected = logits(dense, batch)
    assert not torch.allclose(expected, untouched, atol=1e-2)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    esp.unmerge(model)
    assert list(model.state_dict())[: len(case.make().state_dict())] == list(
        case.make().state_dict()
    )


def test_relative_positions_are_no_biases() -> None:
    model = T5.make()
    esp.attach(model, esp.BitFit(create=True))
    assert not any("relative" in label for label in labels(model))


def qwen() -> nn.Module:
    torch.manual_seed(7)
    config = tf.Qwen2Config(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return tf.Qwen2ForCausalLM(config).eval()


def test_biases_that_are_there_train_and_those_that_lack_are_created() -> None:
    model = qwen()
    esp.attach(model, esp.BitFit(sites="attention.q, attention.v"), "there")
    assert {label.rpartition(".")[2] for label in labels(model, "there")} == {"bias"}
    with pytest.raises(SiteError, match=r"attention\.o, ffn\.in of Qwen2ForCausalLM has no bias"):
        esp.attach(model, esp.BitFit(sites="attention.q, attention.o, ffn.in"), "some")
    esp.attach(model, esp.BitFit(create=True), "all")
    made = {label for label in labels(model, "all") if label.endswith("+")}
    assert {label.rpartition(".")[2] for label in made} == {
        "o_proj+", "gate_proj+", "up_proj+", "down_proj+",
    }  # fmt: skip
    assert len(labels(model, "all")) - len(made) == 2 * 3


def test_a_block_stands_for_the_layers_in_it() -> None:
    model = BERT.make()
    esp.attach(model, esp.BitFit(sites="block@last1"))
    assert labels(model) == {p for p in by_hand(BERT.make()) if "layer.1." in p}
    model = LLAMA.make()
    esp.attach(model, esp.BitFit(sites="block@0", create=True))
    assert len(labels(model)) == 7


def test_a_slice_of_a_fused_bias_trains_alone() -> None:
    model, batch = GPT2.make(), GPT2.batch()
    esp.attach(model, esp.BitFit(sites="attention.q, attention.v"))
    randomise(model)
    named = dict(model.get_submodule("espalier.@default").named())
    dense = GPT2.make()
    for i, block in enumerate(dense.transformer.h):
        for role, at in (("q", 0), ("v", 48)):
            change = named[f"0/transformer.h.{i}.attn.c_attn:attention.{role}/shift"]
            with torch.no_grad():
                block.attn.c_attn.bias[at : at + 24] += change
    expected = logits(dense, batch)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)


def test_a_slice_of_a_fused_host_without_bias_is_given_a_part_of_one() -> None:
    config = tf.MptConfig(vocab_size=96, d_model=24, n_layers=1, n_heads=4, max_seq_len=32)
    torch.manual_seed(7)
    model = tf.MptForCausalLM(config).eval()
    batch = LLAMA.batch()
    untouched = logits(model, batch)
    esp.attach(model, esp.BitFit(sites="attention.v", create=True))
    randomise(model)
    expected = logits(model, batch)
    assert not torch.allclose(expected, untouched, atol=1e-4)
    esp.merge(model)
    assert model.transformer.blocks[0].attn.Wqkv.bias[:48].count_nonzero() == 0
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    esp.unmerge(model)
    assert model.transformer.blocks[0].attn.Wqkv.bias is None
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 2.0}, ["a", "b"]])
def test_created_biases_of_several_adapters_add_up(weights: Any) -> None:
    model, batch = LLAMA.make(), LLAMA.batch()
    for name in ("a", "b"):
        esp.attach(model, esp.BitFit(sites="ffn.out@last1", create=True), name)
        randomise(model)
    a, b = (next(iter(dict(model.get_submodule(f"espalier.@{n}").named()).values())) for n in "ab")
    esp.activate(model, weights)
    one, two = weights.values() if isinstance(weights, dict) else (1, 1)
    dense = LLAMA.make()
    dense.model.layers[1].mlp.down_proj.bias = nn.Parameter(one * a + two * b)
    expected = logits(dense, batch)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)


def test_two_adapters_with_their_own_copy_of_a_bias_cannot_act_at_once() -> None:
    model = BERT.make()
    for name in ("a", "b"):
        esp.attach(model, esp.BitFit(), name, head=False)
    with pytest.raises(AdapterError, match=r"'a' and 'b' both bring their own .*\.bias"):
        esp.activate(model, ["a", "b"])


# --- life in a model --------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trains_merges_saves_copies_and_leaves_no_trace(case: Case, tmp_path: Path) -> None:
    model, batch = case.make(), case.batch()
    untouched = logits(model, batch)
    esp.attach(model, esp.BitFit(create=True), "mine")
    assert torch.equal(logits(model, batch), untouched)
    first = train(model, batch, steps=1)
    assert esp.dead_sites(model) == []
    assert train(model, batch, steps=5) < first
    expected = logits(model, batch)
    assert torch.equal(logits(copy.deepcopy(model), batch), expected)
    esp.save(model, "mine", tmp_path)
    fresh = case.make()
    esp.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch), expected)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=3e-5)
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)
    esp.detach(model, "mine")
    assert torch.equal(logits(model, batch), untouched)
    assert list(model.state_dict()) == list(case.make().state_dict())


def test_bf16_base_keeps_its_type_and_learns() -> None:
    model, batch = BERT.make().bfloat16(), BERT.batch()
    before = logits(model, batch)
    esp.attach(model, esp.BitFit())
    assert torch.equal(logits(model, batch), before)
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=8) < first
    assert logits(model, batch).dtype == torch.bfloat16


def test_biases_of_four_bit_hosts_train() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    host = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    host.load_state_dict(nn.Linear(64, 32).state_dict())

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.host = host.to("cpu")

        def forward(self, x: Tensor) -> Tensor:
            return self.host(x)

    model, x = One(), torch.randn(3, 64)
    before = model(x)
    esp.attach(model, esp.BitFit(), head=False)
    with torch.no_grad():
        esp.parameters(model)[0].add_(1.0)
    assert torch.allclose(model(x), before + 1, atol=1e-5)
    model(x).sum().backward()
    assert esp.dead_sites(model) == []
    esp.merge(model)
    assert torch.allclose(model(x), before + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "method", "message"),
    [
        (BERT, "BitFit(sites='attention')", r"write 'attention\.\*'"),
        (LLAMA, "BitFit(sites='norm', create=True)", r"a norm, has no bias"),
        (BERT, "BitFit(sites='cross.q')", r"no 'cross\.q'"),
        (BERT, "BitFit(sites='embedding')", r"embedding of .* has no bias"),
    ],
)
def test_where_there_is_no_bias_it_says_so(case: Case, method: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        esp.attach(case.make(), method)


@pytest.mark.parametrize("method", ["BitFit(sites=3)", "BitFit(create='yes')"])
def test_wrong_settings_are_refused(method: str) -> None:
    with pytest.raises(SettingError, match=r"BitFit\((sites|create)="):
        esp.recipe(method)
