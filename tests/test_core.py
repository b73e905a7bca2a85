"""The graft through its public face: names, several adapters, types, hosts, settings."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import espalier as esp
from espalier.errors import AdapterError, SettingError, SiteError
from zoo import BY_NAME, logits, train

BERT, GPT2, LLAMA, BART = (BY_NAME[name] for name in ("bert", "gpt2", "llama", "bart"))


def randomise(model: nn.Module, std: float = 0.2) -> None:
    with torch.no_grad():
        for p in esp.parameters(model):
            p.normal_(std=std)


# --- names and several adapters ---------------------------------------------------------------

ODD_NAMES = ["layers", "forward", "a.b", "keys", "weight", "training", "bert", "%2E", "näme/1", " "]


def test_any_text_is_a_safe_name() -> None:
    model, batch = LLAMA.make(), LLAMA.batch()
    outputs = {}
    for name in ODD_NAMES:
        esp.attach(model, esp.LoRA(rank=2), name)
        randomise(model)
        outputs[name] = logits(model, batch)
    assert len({tuple(o.flatten().tolist()) for o in outputs.values()}) == len(ODD_NAMES)
    for name in ODD_NAMES:
        esp.activate(model, name)
        assert torch.equal(logits(model, batch), outputs[name])
    esp.freeze(model, "layers")
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trains) == len(ODD_NAMES) - 1
    for name in ODD_NAMES:
        esp.detach(model, name)
    assert list(model.state_dict()) == list(LLAMA.make().state_dict())


@pytest.mark.parametrize("name", ["", 3, None])
def test_a_name_must_be_text(name: object) -> None:
    with pytest.raises(SettingError, match="name is text"):
        esp.attach(BERT.make(), esp.LoRA(), name)  # type: ignore[arg-type]


def test_loading_a_frozen_second_adapter_leaves_the_first_training(tmp_path: Path) -> None:
    model, batch = BERT.make(), BERT.batch()
    esp.attach(model, esp.LoRA(rank=2), "second")
    randomise(model)
    esp.save(model, "second", tmp_path / "second")
    model = BERT.make()
    esp.attach(model, esp.LoRA(rank=3), "first")
    esp.load(model, tmp_path / "second")
    esp.activate(model, "first")
    assert sum(p.numel() for p in esp.parameters(model)) > 0
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=5) < first


def test_stack_and_weights_add_low_rank_changes() -> None:
    model, batch = LLAMA.make(), LLAMA.batch()
    for name in ("a", "b"):
        esp.attach(model, esp.LoRA(rank=2, sites="head"), name)
        randomise(model)
    base, only = logits(LLAMA.make(), batch), {}
    for name in ("a", "b"):
        esp.activate(model, name)
        only[name] = logits(model, batch) - base
    esp.activate(model, ["a", "b"])
    assert torch.allclose(logits(model, batch), base + only["a"] + only["b"], atol=1e-5)
    esp.activate(model, {"a": 0.7, "b": -0.3})
    mixed = logits(model, batch)
    assert torch.allclose(mixed, base + 0.7 * only["a"] - 0.3 * only["b"], atol=1e-5)
    assert esp.active(model) == {"a": 0.7, "b": -0.3}
    esp.merge(model)
    assert torch.allclose(logits(model, batch), mixed, atol=1e-5)


def test_two_heads_cannot_act_at_once() -> None:
    model = BERT.make()
    for name in ("mail", "spam"):
        esp.attach(model, esp.LoRA(rank=2), name)
    with pytest.raises(AdapterError, match=r"'mail' and 'spam' both bring their own classifier"):
        esp.activate(model, ["mail", "spam"])
    assert esp.active(model) == {"spam": 1.0}


def test_an_adapter_acts_once_and_trained_copies_act_whole() -> None:
    model = BERT.make()
    esp.attach(model, esp.LoRA(rank=2), "mine")
    with pytest.raises(AdapterError, match="'mine' is named twice"):
        esp.activate(model, ["mine", "mine"])
    esp.activate(model, {"mine": 0.5})  # the head beside it is taken whole
    esp.attach(model, esp.BitFit(), "biases")
    with pytest.raises(AdapterError, match=r"its weight must be 1, not 0\.5"):
        esp.activate(model, {"biases": 0.5})
    assert esp.active(model) == {"biases": 1.0}


def test_unknown_doubled_and_merged_adapters_are_named() -> None:
    model = BERT.make()
    with pytest.raises(AdapterError, match="no adapters"):
        esp.activate(model, "mail")
    esp.attach(model, esp.LoRA(), "mail")
    with pytest.raises(AdapterError, match="did you mean 'mail'"):
        esp.activate(model, "mial")
    with pytest.raises(AdapterError, match="attached already"):
        esp.attach(model, esp.LoRA(), "mail")
    esp.merge(model)
    for call in (
        lambda: esp.detach(model, "mail"),
        lambda: esp.attach(model, esp.LoRA(), "other"),
        lambda: esp.activate(model, None),
        lambda: esp.merge(model),
    ):
        with pytest.raises(AdapterError, match="unmerge"):
            call()
    esp.unmerge(model)
    with pytest.raises(AdapterError, match="no adapter is merged"):
        esp.unmerge(model)


def test_a_copy_of_a_merged_model_unmerges_itself_alone() -> None:
    model, batch = GPT2.make(), GPT2.batch()
    esp.attach(model, esp.LoRA(rank=2, sites="all-linear, embedding"))
    randomise(model)
    expected = logits(model, batch)
    esp.merge(model, untie=True)
    merged = logits(model, batch)
    twin = copy.deepcopy(model)
    esp.unmerge(twin)
    assert torch.equal(logits(twin, batch), expected)
    assert twin.config.tie_word_embeddings is True
    assert torch.equal(logits(model, batch), merged)
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)


def test_a_parameter_is_trained_by_one_method_only() -> None:
    model = BERT.make()
    with pytest.raises(SettingError, match=r"both train .*\.bias itself"):
        esp.attach(model, "LoRA(bias='all') + FullTuning()")
    assert "espalier" not in model._modules


def test_a_failed_attach_leaves_the_model_alone() -> None:
    model = BERT.make()
    model.classifier.requires_grad_(False)
    with pytest.raises(SiteError):
        esp.attach(model, esp.LoRA(sites="cross.q"))
    assert "espalier" not in model._modules
    assert model.bert.pooler.dense.weight.requires_grad
    esp.attach(model, esp.LoRA())
    esp.detach(model, "default")
    assert model.bert.pooler.dense.weight.requires_grad
    assert not model.classifier.weight.requires_grad


def test_a_site_without_gradient_is_named() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    model = Lazy()
    esp.attach(model, esp.LoRA(rank=2, sites="*used, *idle"), head=False)
    model(torch.randn(3, 4)).sum().backward()
    assert esp.dead_sites(model) == ["0/idle"]


def test_a_module_put_in_between_two_attachments_is_found() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False)
    model[1].weight.requires_grad = True
    esp.attach(model, esp.LoRA(rank=2, sites="other"))
    esp.detach(model, "default")
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, False]
    model[0] = nn.Linear(4, 6)
    model[1] = nn.Linear(6, 4, bias=False)
    for recipe in (esp.LoRA(rank=2, sites="other"), esp.FullTuning()):
        esp.attach(model, recipe, type(recipe).__name__)
        assert not any(host._parameters["weight"].requires_grad for host in (model[0], model[1]))
    assert esp.account(model, "LoRA").trained == 2 * (4 + 6) + 2 * (6 + 4)
    model(torch.randn(3, 4)).sum().backward()
    assert esp.dead_sites(model) == []
    for name in ("LoRA", "FullTuning"):
        esp.detach(model, name)
    assert all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_switching_follows_buffers_that_were_replaced_meanwhile() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    host, x = model[0], torch.randn(2, 4)
    base = model(x)
    for name in ("a", "b"):
        esp.attach(model, esp.LoRA(rank=2, sites="other"), name)
    randomise(model)
    change = model(x) - base
    assert change.abs().max() > 1e-3
    for p in esp.parameters(model):
        p.data = 2 * p.data  # both factors
    esp.activate(model, "a")
    assert torch.equal(host(x), base)
    esp.activate(model, "b")
    torch.testing.assert_close(host(x) - base, 4 * change, rtol=1e-4, atol=1e-5)


def test_a_sequential_root_runs_as_before() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(3, 4)
    expected = model(x)
    esp.attach(model, esp.LoRA(rank=2), head=False)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    esp.detach(model, "default")
    assert len(model) == 3


def test_the_optimiser_sees_one_tensor_per_kind() -> None:
    model = BERT.make()
    esp.attach(model, esp.LoRA(bias="lora_only"))
    groups = esp.groups(model, weight_decay=0.1, learning_rate=1e-3, head_rate=1e-2)
    found = {g["name"]: (g["weight_decay"], g["lr"]) for g in groups}
    assert found == {
        "matrices": (0.1, 1e-3),
        "vectors": (0.0, 1e-3),
        "head_matrices": (0.1, 1e-2),
        "head_vectors": (0.0, 1e-2),
    }
    assert all("lr" not in g for g in esp.groups(model))
    account = esp.account(model, "default")
    assert sum(p.numel() for p in esp.parameters(model)) == account.trained + account.head


# --- types and devices ------------------------------------------------------------------------


def test_trainables_stay_fp32_over_a_bf16_base() -> None:
    model, batch = BERT.make().to(torch.bfloat16), BERT.batch()
    before = logits(model, batch)
    esp.attach(model, esp.LoRA(rank=2))
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    assert torch.equal(logits(model, batch), before)
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=8) < first
    assert logits(model, batch).dtype == torch.bfloat16
    assert esp.dead_sites(model) == []
    assert model.classifier.weight.dtype == torch.bfloat16
    expected = logits(model, batch)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=5e-2)


def test_moving_the_model_moves_the_adapter() -> None:
    model, batch = BERT.make(), BERT.batch()
    esp.attach(model, esp.LoRA(rank=2))
    randomise(model, 0.05)
    expected = logits(model, batch)
    model.to(torch.float64)
    assert torch.allclose(logits(model, batch), expected.double(), atol=1e-5)
    model.to(torch.float32)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=4) < first


def test_state_dict_keeps_the_base_keys_and_brings_the_adapter_back() -> None:
    model, batch = BERT.make(), BERT.batch()
    esp.attach(model, esp.LoRA(rank=2), "a.b")
    randomise(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    ours = [k for k in state if k.startswith("espalier.")]
    assert [k for k in state if k not in ours] == list(BERT.make().state_dict())
    expected = logits(model, batch)
    other = BERT.make()
    esp.attach(other, esp.LoRA(rank=2), "a.b")
    other.load_state_dict(state)
    assert torch.equal(logits(other, batch), expected)


# --- LoRA on its hosts, against dense computations --------------------------------------------


class One(nn.Module):
    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.host = host

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.host(x)


def low_rank(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    adapter = model.get_submodule("espalier.@default")
    named = {label.rpartition("/")[2]: v.clone() for label, v in adapter.named()}
    return named["a"], named["b"]


HOSTS = {
    "linear": (lambda: nn.Linear(7, 5), lambda: torch.randn(3, 4, 7)),
    "linear without bias": (lambda: nn.Linear(7, 5, bias=False), lambda: torch.randn(3, 7)),
    "conv1d": (lambda: Conv1D(5, 7), lambda: torch.randn(2, 3, 7)),
    "conv2d": (
        lambda: nn.Conv2d(3, 6, (3, 5), stride=2, padding=(1, 2), dilation=1),
        lambda: torch.randn(2, 3, 9, 11),
    ),
    "dilated conv2d": (
        lambda: nn.Conv2d(3, 4, 3, dilation=2, padding="same"),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "circular conv2d": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        lambda: torch.randn(2, 3, 8, 8),
    ),
    "embedding": (lambda: nn.Embedding(11, 6), lambda: torch.randint(0, 11, (2, 5))),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_output_and_gradients_equal_the_dense_weight(kind: str) -> None:
    make, data = HOSTS[kind]
    model, x = One(make()), data()
    esp.attach(model, esp.LoRA(rank=3, alpha=7, sites="host"), head=False)
    randomise(model, 0.3)
    a, b = low_rank(model)
    a.requires_grad_(), b.requires_grad_()
    host = model.host
    if kind == "embedding":
        expected = F.embedding(x, host.weight + 7 / 3 * (b @ a).T)
    elif "conv2d" in kind:
        change = 7 / 3 * (b.flatten(1) @ a.flatten(1)).view_as(host.weight)
        expected = host._conv_forward(x, host.weight + change, host.bias)
    else:
        w = host.weight.T if kind == "conv1d" else host.weight
        expected = F.linear(x, w + 7 / 3 * b @ a, host.bias)
    y = model(x)
    assert torch.allclose(y, expected, atol=1e-5)
    weights = torch.randn_like(y)
    (expected * weights).sum().backward()
    (y * weights).sum().backward()
    grad = esp.parameters(model)[0].grad
    assert a.grad is not None
    assert b.grad is not None
    assert grad is not None
    assert torch.allclose(grad, torch.cat((a.grad.flatten(), b.grad.flatten())), atol=1e-4)
    esp.merge(model)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_slices_of_a_fused_host_equal_adapting_split_layers() -> None:
    model, batch = GPT2.make(), GPT2.batch()
    esp.attach(model, esp.LoRA(rank=2, sites="attention.q, attention.v"))
    randomise(model)
    adapter = model.get_submodule("espalier.@default")
    named = dict(adapter.named())
    dense = GPT2.make()
    width = dense.config.n_embd
    for layer, block in enumerate(dense.transformer.h):
        for role, at in (("q", 0), ("v", 2)):
            label = f"0/transformer.h.{layer}.attn.c_attn:attention.{role}"
            change = 8 * named[f"{label}/b"] @ named[f"{label}/a"]
            with torch.no_grad():
                block.attn.c_attn.weight[:, at * width : (at + 1) * width] += change.T
    assert torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-5)
    keys = model.transformer.h[0].attn.c_attn(torch.randn(1, 1, width))
    assert keys.shape[-1] == 3 * width


def test_scaled_embeddings_scale_the_change_too() -> None:
    model, batch = BART.make(), BART.batch()
    esp.attach(model, esp.LoRA(rank=2, sites="encoder/embedding"))
    randomise(model)
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(BART.make(), batch), atol=1e-3)
    esp.merge(model, untie=True)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)


def test_dropout_acts_in_training_only_and_on_the_branch_only() -> None:
    model, x = One(nn.Linear(64, 8)), torch.randn(5, 64)
    esp.attach(model, esp.LoRA(rank=4, dropout=0.5, sites="host"), head=False)
    assert torch.equal(model.train()(x), model.host.__class__.forward(model.host, x))
    randomise(model)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_rslora_equals_lora_with_alpha_times_root_rank() -> None:
    plain, root = esp.LoRA(rank=9, alpha=6 * 3), esp.LoRA(rank=9, alpha=6, rslora=True)
    assert plain.scale == root.scale == 2.0
    assert esp.LoRA(rank=1, alpha=5).scale == esp.LoRA(rank=1, alpha=5, rslora=True).scale


def merged_only_untied(model: Any, batch: dict[str, Tensor], reason: str) -> None:
    """Merging is refused for the reason and changes nothing; untied it is exact, and undone so."""
    expected = logits(model, batch)
    with pytest.raises(AdapterError, match=reason):
        esp.merge(model)
    assert torch.equal(logits(model, batch), expected)
    esp.merge(model, untie=True)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    assert model.config.tie_word_embeddings is False
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)


def test_tied_embeddings_are_refused_or_untied() -> None:
    model, batch = GPT2.make(), GPT2.batch()
    esp.attach(model, esp.LoRA(rank=2, sites="embedding"))
    randomise(model)
    merged_only_untied(model, batch, r"wte shares its weight with lm_head.*untie=True")
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight is model.transformer.wte.weight


def test_merging_a_copy_of_one_end_of_a_tied_weight_leaves_the_other_end() -> None:
    model, batch = GPT2.make(), GPT2.batch()
    esp.attach(model, esp.LoRA(rank=2, sites="ffn.out"), head=["lm_head"])
    randomise(model)
    merged_only_untied(model, batch, r"lm_head shares its weight with transformer\.wte")
    esp.detach(model, "default")
    assert model.lm_head.weight is model.transformer.wte.weight


def test_four_bit_hosts_train_and_refuse_to_merge() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    host = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32, quant_type="nf4")
    host.load_state_dict(nn.Linear(64, 32).state_dict())
    model, x = One(host.to("cpu")), torch.randn(3, 64)
    base = model(x)
    esp.attach(model, esp.LoRA(rank=2, sites="host"), head=False)
    assert torch.equal(model(x), base)
    randomise(model)
    a, b = low_rank(model)
    assert torch.allclose(model(x), base + 8 * x @ a.T @ b.T, atol=1e-4)
    model(x).sum().backward()
    assert esp.dead_sites(model) == []
    with pytest.raises(AdapterError, match="4-bit weights"):
        esp.merge(model)
    esp.attach(model, esp.LoRA(rank=2, sites="host"), "other", head=False)
    with pytest.raises(SiteError, match="quantised"):
        esp.attach(model, esp.FullTuning(), "full")


def test_another_librarys_forward_is_kept_and_given_back() -> None:
    model, x = One(nn.Linear(4, 4)), torch.randn(2, 4)
    plain = model.host.forward
    model.host.forward = lambda x: plain(x) + 1  # as accelerate's hooks do
    theirs, expected = model.host.__dict__["forward"], model(x)
    esp.attach(model, esp.LoRA(rank=2, sites="host"), head=False)
    assert torch.equal(model(x), expected)
    esp.detach(model, "default")
    assert model.host.__dict__["forward"] is theirs


def test_a_compiled_model_is_grafted_inside(tmp_path: Path) -> None:
    model, batch = BERT.make(), BERT.batch()
    compiled = torch.compile(model, backend="eager")
    esp.attach(compiled, esp.LoRA(rank=2), "mine")
    randomise(compiled, 0.05)
    expected = logits(model, batch)
    assert torch.allclose(logits(compiled, batch), expected, atol=1e-5)
    esp.save(compiled, "mine", tmp_path)
    esp.merge(compiled)
    esp.unmerge(compiled)
    esp.detach(compiled, "mine")
    assert list(model.state_dict()) == list(BERT.make().state_dict())
    esp.load(compiled, tmp_path, "again")
    assert torch.allclose(logits(compiled, batch), expected, atol=1e-5)


# --- heads ------------------------------------------------------------------------------------


def test_a_newly_initialised_head_is_found_and_saved(tmp_path: Path) -> None:
    backbone = tf.BertModel(BERT.make().config)
    backbone.save_pretrained(tmp_path / "base")
    load = tf.AutoModelForSequenceClassification.from_pretrained
    model = load(tmp_path / "base", num_labels=3)
    esp.attach(model, esp.LoRA(rank=2), "mine")
    assert model.get_submodule("espalier.@mine").head == ("classifier",)
    batch = BERT.batch()
    train(model.eval(), batch)
    esp.save(model, "mine", tmp_path / "kept")
    fresh = load(tmp_path / "base", num_labels=3).eval()  # its own random head
    esp.load(fresh, tmp_path / "kept")
    assert torch.equal(logits(fresh, batch), logits(model, batch))


def test_a_head_that_full_tuning_trains_is_no_part_of_the_base(tmp_path: Path) -> None:
    model = BERT.make()
    esp.attach(model, esp.FullTuning(), head=["classifier"])
    card = esp.read_card(esp.save(model, "default", tmp_path))
    assert card["head"] == ["classifier"]
    assert not any(name.startswith("classifier") for name in card["base"]["values"])
    esp.load(BERT.make(), tmp_path)


def test_heads_can_be_named_or_left_alone() -> None:
    model = BERT.make()
    esp.attach(model, esp.LoRA(), "none", head=False)
    assert esp.account(model, "none").head == 0
    esp.attach(model, esp.LoRA(), "two", head=["classifier", "bert.pooler"])
    assert model.get_submodule("espalier.@two").head == ("bert.pooler.dense", "classifier")
    with pytest.raises(SiteError, match="did you mean 'classifier'"):
        esp.attach(model, esp.LoRA(), "typo", head=["clasifier"])


# --- counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "trained", "changed", "rank"),
    [
        ("LoRA(sites='attention.q, attention.v')", 294_912, 14_155_776, 8),
        ("LoRA(sites='attention.*')", 589_824, 4 * 12 * 768 * 768, 8),
        ("LoRA(sites='attention.*, ffn.*')", 1_327_104, 84_934_656, 8),
        ("FullTuning()", 109_482_240, 109_482_240, None),
    ],
)
def test_counts_on_bert_base_from_configuration_alone(
    recipe: str, trained: int, changed: int, rank: int | None
) -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, recipe)
    account = esp.account(model, "default")
    assert (account.trained, account.changed, account.rank) == (trained, changed, rank)
    assert account.total == 109_482_240
    assert account.bytes == 4 * trained


@pytest.mark.parametrize(
    ("recipe", "changed", "rank"),
    [
        ("LoRA(rank=4, sites='attention.q') + LoRA(rank=2, sites='attention.q')", 2 * 768**2, 6),
        ("LoRA(rank=4, sites='attention.q') + FullTuning()", 0, None),
    ],
)
def test_counts_of_two_methods_on_one_layer(recipe: str, changed: int, rank: int | None) -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig(num_hidden_layers=2))
    esp.attach(model, recipe)
    account = esp.account(model, "default")
    # Scalars of a layer's bias may count as changed too: there are at most 768 of them.
    wanted = changed or account.total
    assert wanted <= account.changed <= wanted + 2 * 768
    assert account.rank == rank


# --- recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "recipe",
    [
        esp.LoRA(),
        esp.LoRA(rank=3, alpha=1.5, dropout=0.1, rslora=True, sites="ffn.*") + esp.HeadOnly(),
        esp.FullTuning(),
    ],
)
def test_recipes_survive_json_and_text(recipe: object) -> None:
    made = esp.recipe(recipe)
    assert esp.recipe(json.loads(json.dumps(made.to_json()))) == made
    assert esp.recipe(str(made)) == made


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("LoRA(rank=0)", r"LoRA\(rank=0\): rank must be a whole number of at least 1"),
        ("LoRA(rank=2.5)", "rank must be a whole number"),
        ("LoRA(alpha=-1)", "alpha must be above 0"),
        ("LoRA(dropout=1)", "dropout must be at least 0 and below 1"),
        ("LoRA(dropout='much')", "dropout must be at least 0 and below 1"),
        ("LoRA(rslora='yes')", "rslora must be True or False"),
        ("LoRA(sites=3)", "sites must be a selector"),
        ("LoRA(bias='some')", "bias must be one of none, lora_only, all"),
        ("LoRA(r=8)", "LoRA has no setting 'r'"),
        ("lorra", "no method 'lorra'; did you mean 'LoRA'"),
        ("LoRA(rank=open('x'))", "must be a number"),
        ("__import__('os')", "is no method"),
        ("LoRA(", "is no recipe"),
        ([], "a list of methods"),
        ({"rank": 3}, "a method is given as"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(source: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        esp.recipe(source)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("lora", "LoRA(rank=8)"),
        ("LoRA(alpha=8, rank=4)", "LoRA(rank=4, alpha=8)"),
        ("LoRA(sites='ffn') + IA3()", "LoRA(rank=8, sites='ffn') + IA3()"),
        ("Gated(PrefixTuning())", "Gated(part=PrefixTuning(length=10))"),
        ("SerialAdapter(bottleneck=64)", "SerialAdapter(bottleneck=64)"),
    ],
)
def test_recipes_are_shown_with_their_size_and_read_again(source: str, shown: str) -> None:
    assert str(esp.recipe(source)) == shown
    assert esp.recipe(shown) == esp.recipe(source)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("attention", "span"),
        ("norm", "cannot stand on"),
        ("ffn.inn", r"did you mean 'ffn\.in'"),
        ("atention.q", r"did you mean 'attention\.q'"),
        ("embeding", "did you mean 'embedding'"),
        ("all-lineer@1", "did you mean 'all-linear'"),
        ("encodr/attention.q", "did you mean 'encoder'"),
    ],
)
def test_lora_says_where_it_cannot_stand(sites: str, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        esp.attach(BERT.make(), esp.LoRA(sites=sites))


def test_importing_is_light() -> None:
    code = (
        "import sys, espalier; heavy = {'torch', 'transformers', 'pydantic', 'datasets', 'numpy'};"
        "found = heavy & set(sys.modules); assert not found, found;"
        "espalier.LoRA(rank=2); assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
