"""(IA)³ against peft with explicit module lists, and against scaled weights made by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import espalier as esp
from espalier.errors import AdapterError, SettingError, SiteError
from zoo import BY_NAME, CASES, Case, logits, train

BERT, GPT2, LLAMA, T5 = (BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5"))
KEYS_AND_VALUES = {
    "bert": r".*self\.(key|value)",
    "llama": r".*self_attn\.(k_proj|v_proj)",
    "t5": r".*Attention\.(k|v)",
    "bart": r".*_?attn\.(k_proj|v_proj)",
    "vit": r".*attention\.(k_proj|v_proj)",
}
SECOND_LAYER = {
    "bert": r".*layer\.\d+\.output\.dense",  # peft's default takes attention.output.dense too
    "llama": r".*down_proj",
    "t5": r".*DenseReluDense\.wo",
    "bart": r".*fc2",
    "vit": r".*mlp\.fc2",
}
PEERS = [BY_NAME[name] for name in KEYS_AND_VALUES]


def vectors(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Each vector by the path of its layer."""
    adapter = model.get_submodule(f"espalier.@{name}")
    named = dict(adapter.named()).items()
    return {label.split("/")[1]: v for label, v in named if not label.startswith("head/")}


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in esp.parameters(model):
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


class One(nn.Module):
    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x)


def strong(case: Case) -> nn.Module:
    """A model whose inner layers matter: fresh ones have weights near zero."""
    model = case.make()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1 and p.std() < 0.1:
                p.mul_(8)
    return model


def changed(case: Case, recipe: object = "IA3()") -> nn.Module:
    model = strong(case)
    esp.attach(model, recipe, head=False)
    randomise(model)
    return model


def theirs(case: Case, ours: nn.Module) -> nn.Module:
    """peft's (IA)³ on the same layers with the same numbers."""
    both = f"({KEYS_AND_VALUES[case.name]})|({SECOND_LAYER[case.name]})"
    config = peft.IA3Config(target_modules=both, feedforward_modules=SECOND_LAYER[case.name])
    model = peft.get_peft_model(strong(case), config).eval()
    held = {n: p for n, p in model.named_parameters() if ".ia3_l." in n}
    scales = vectors(ours)
    paths = {n.removeprefix("base_model.model.").partition(".ia3_l")[0] for n in held}
    assert paths == set(scales)
    with torch.no_grad():
        for n, p in held.items():
            value = scales[n.removeprefix("base_model.model.").partition(".ia3_l")[0]]
            p.copy_(value.view_as(p))
    return model


@pytest.mark.parametrize("case", PEERS, ids=lambda case: case.name)
def test_outputs_gradients_and_merged_weights_equal_pefts(case: Case) -> None:
    ours, batch = changed(case), case.batch()
    other = theirs(case, ours)
    expected = logits(other, batch)
    assert torch.allclose(logits(ours, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(strong(case), batch), expected, atol=1e-2)
    other(**batch).loss.backward()
    ours(**batch).loss.backward()
    adapter = ours.get_submodule("espalier.@default")
    grads = {s.label.split("/")[1]: s.of(adapter.vectors.grad) for s in adapter.slots["vectors"]}
    for n, p in other.named_parameters():
        if ".ia3_l." in n:
            path = n.removeprefix("base_model.model.").partition(".ia3_l")[0]
            assert torch.allclose(grads[path], p.grad.flatten(), atol=1e-5), path
    esp.merge(ours, unload=True)
    merged = other.merge_and_unload().state_dict()
    for key, value in ours.state_dict().items():
        assert torch.allclose(value, merged[key], atol=1e-6), key


def test_keys_and_values_of_a_fused_host_are_scaled_and_queries_are_not() -> None:
    model, batch = changed(GPT2), GPT2.batch()
    adapter = model.get_submodule("espalier.@default")
    named, width = dict(adapter.named()), 24
    dense = strong(GPT2)
    with torch.no_grad():
        for i, block in enumerate(dense.transformer.h):
            at = f"0/transformer.h.{i}"
            k = named[f"{at}.attn.c_attn:attention.k/scale"]
            v = named[f"{at}.attn.c_attn:attention.v/scale"]
            whole = torch.cat((torch.ones(width), k, v))
            block.attn.c_attn.weight.mul_(whole)  # Conv1D: (in, out)
            block.attn.c_attn.bias.mul_(whole)
            block.mlp.c_proj.weight.mul_(named[f"{at}.mlp.c_proj/scale_in"].unsqueeze(1))
    expected = logits(dense, batch)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)


def test_scaling_the_hidden_values_equals_scaling_what_the_gate_lets_through() -> None:
    model, batch = changed(LLAMA, esp.IA3(sites="")), LLAMA.batch()
    dense = strong(LLAMA)
    for i, block in enumerate(dense.model.layers):
        scale = vectors(model)[f"model.layers.{i}.mlp.down_proj"]
        with torch.no_grad():
            block.mlp.up_proj.weight.mul_(scale.unsqueeze(1))
    assert torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-6)


def test_counts_on_bert_base_from_configuration_alone() -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, esp.IA3())
    account = esp.account(model, "default")
    assert account.trained == 12 * (768 + 768 + 3072) == 55_296  # peft's default list: 64,512
    assert account.changed == 12 * (2 * (768 * 768 + 768) + 768 * 3072) == 42_485_760
    assert account.rank is None
    assert account.bytes == 4 * 55_296


def test_vectors_are_as_wide_as_grouped_keys_and_as_heads_say() -> None:
    llama = {path.rpartition(".")[2]: len(v) for path, v in vectors(changed(LLAMA)).items()}
    assert llama == {"k_proj": 2 * 6, "v_proj": 2 * 6, "down_proj": 40}
    t5 = vectors(changed(T5))
    assert {len(v) for path, v in t5.items() if path.endswith((".k", ".v"))} == {4 * 5}
    decoder = [v for path, v in t5.items() if path.startswith("decoder.block.0.")]
    assert sum(map(len, decoder)) == 4 * 4 * 5 + 40


def test_cross_attention_is_scaled_where_there_is_one() -> None:
    paths = vectors(changed(T5))
    assert sum("EncDecAttention" in path for path in paths) == 2 * 2
    assert not any(path.endswith((".q", ".o")) for path in paths)
    config = tf.BertConfig(
        vocab_size=96, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=40, is_decoder=True, add_cross_attention=True,
    )  # fmt: skip
    model = tf.BertModel(config)
    esp.attach(model, esp.IA3())
    assert {p.rpartition("layer.0.")[2] for p in vectors(model)} == {
        "attention.self.key", "attention.self.value", "crossattention.self.key",
        "crossattention.self.value", "output.dense",
    }  # fmt: skip


def test_a_fused_host_of_unknown_layout_is_refused_with_the_reason() -> None:
    config = tf.CodeGenConfig(vocab_size=96, n_embd=32, n_layer=1, n_head=4, rotary_dim=4)
    model = tf.CodeGenForCausalLM(config)
    with pytest.raises(SiteError, match=r"qkv_proj computes them together .* layout|lays out"):
        esp.attach(model, esp.IA3())
    assert "espalier" not in model._modules
    esp.attach(model, esp.IA3(sites=""))
    assert [p.rpartition(".")[2] for p in vectors(model)] == ["fc_out"]


@pytest.mark.parametrize(
    "first", ["IA3(sites='ffn.out') + LoRA()", "LoRA() + IA3(sites='ffn.out')"]
)
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_merged_equals_unmerged_beside_lora_in_either_order(case: Case, first: str) -> None:
    model, batch = changed(case, first), case.batch()
    expected = logits(model, batch)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=2e-5)
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)


def test_a_vector_of_zeros_still_unmerges_to_the_exact_bits() -> None:
    model, batch = changed(BERT), BERT.batch()
    with torch.no_grad():
        for v in vectors(model).values():
            v[::2] = 0
    expected = logits(model, batch)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    esp.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_several_adapters_multiply_and_weights_interpolate() -> None:
    model, x = One(nn.Linear(5, 4)), torch.randn(3, 5)
    base = model(x).detach()
    for name in ("a", "b"):
        esp.attach(model, esp.IA3(sites="host", hidden=""), name, head=False)
        randomise(model)
    a, b = (vectors(model, name)["host"].clone() for name in ("a", "b"))
    esp.activate(model, ["a", "b"])
    assert torch.allclose(model(x), base * a * b, atol=1e-6)
    esp.activate(model, {"a": 0.25, "b": 1.0})
    assert torch.allclose(model(x), base * (1 + 0.25 * (a - 1)) * b, atol=1e-6)
    esp.merge(model)
    assert torch.allclose(model(x), base * (1 + 0.25 * (a - 1)) * b, atol=1e-6)


def test_vectors_start_as_ones_and_are_never_decayed() -> None:
    model = BERT.make()
    esp.attach(model, esp.IA3(), head=False)
    assert all(torch.equal(v, torch.ones_like(v)) for v in vectors(model).values())
    assert [g["weight_decay"] for g in esp.groups(model, weight_decay=0.1)] == [0.0]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trains_saves_copies_and_leaves_no_trace(case: Case, tmp_path: Path) -> None:
    model, batch = case.make(), case.batch()
    untouched = logits(model, batch)
    esp.attach(model, esp.IA3(), "mine")
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
    esp.detach(model, "mine")
    assert torch.equal(logits(model, batch), untouched)
    assert list(model.state_dict()) == list(case.make().state_dict())


def test_bf16_base_keeps_its_type_and_learns() -> None:
    model, batch = LLAMA.make().bfloat16(), LLAMA.batch()
    before = logits(model, batch)
    esp.attach(model, esp.IA3())
    assert torch.equal(logits(model, batch), before)
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    first = train(model, batch, steps=1, rate=0.05)
    assert train(model, batch, steps=8, rate=0.05) < first
    assert logits(model, batch).dtype == torch.bfloat16


def test_four_bit_hosts_are_scaled_and_refuse_to_merge() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    host = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    host.load_state_dict(nn.Linear(64, 32).state_dict())
    model, x = One(host.to("cpu")), torch.randn(3, 64)
    base = model(x)
    esp.attach(model, esp.IA3(sites="host", hidden=""), head=False)
    randomise(model)
    assert torch.allclose(model(x), base * vectors(model)["host"], atol=1e-5)
    with pytest.raises(AdapterError, match="4-bit weights"):
        esp.merge(model)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("IA3(sites='norm')", r"IA3 cannot stand on .*, a norm"),
        ("IA3(sites='attention')", r"span .* write 'attention\.\*'"),
        ("IA3(sites='cross.k')", r"no 'cross\.k'"),
        ("IA3(hidden='ffn.outt')", r"ffn\.out"),
    ],
)
def test_where_it_cannot_stand_it_says_so(method: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        esp.attach(BERT.make(), method)


def test_the_input_of_one_slice_cannot_be_scaled_alone() -> None:
    with pytest.raises(SiteError, match="together with others from one input"):
        esp.attach(GPT2.make(), esp.IA3(hidden="attention.v"))


@pytest.mark.parametrize("method", ["IA3(sites='', hidden='')", "IA3(sites=3)", "IA3(hidden=None)"])
def test_wrong_settings_are_refused(method: str) -> None:
    with pytest.raises(SettingError, match=r"IA3\((sites|hidden)="):
        esp.recipe(method)
