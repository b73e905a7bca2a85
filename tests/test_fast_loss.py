"""The loss over chunks of the vocabulary product against F.cross_entropy on whole logits."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import espalier as esp
from espalier.fast import liger, loss
from espalier.fast.deferred import Logits
from espalier.fast.switch import plain_paths
from zoo import BY_NAME, VOCAB

ON_HEAD = "all-linear, lm_head"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 7 rows, so that even these batches have several."""
    monkeypatch.setattr(loss, "ROWS", 7)
    monkeypatch.setattr(loss, "NUMBERS", 1)


def narrow_gpt2() -> nn.Module:
    """A GPT-2 whose feed-forward is not as wide as its vocabulary."""
    torch.manual_seed(7)
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, n_inner=40,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config).eval()


def tied_llama() -> nn.Module:
    config: Any = deepcopy(BY_NAME["llama"].make().config)
    config.tie_word_embeddings = True
    torch.manual_seed(7)
    return tf.LlamaForCausalLM(config).eval()


def capped() -> nn.Module:
    """A Gemma 2, which bends its logits by a tanh after the head."""
    torch.manual_seed(7)
    config = tf.Gemma2Config(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=6, final_logit_softcapping=2.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return tf.Gemma2ForCausalLM(config).eval()


def experts() -> nn.Module:
    """A Mixtral that adds its router's own loss."""
    torch.manual_seed(7)
    config = tf.MixtralConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3,
        output_router_logits=True, router_aux_loss_coef=0.5,
    )  # fmt: skip
    return tf.MixtralForCausalLM(config).eval()


def masked_words() -> nn.Module:
    torch.manual_seed(7)
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=40,
    )  # fmt: skip
    return tf.BertForMaskedLM(config).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: BY_NAME[name].make for name in ("llama", "t5", "bart")},
    "gpt2": narrow_gpt2,
    "tied llama": tied_llama,
    "gemma2": capped,
    "mixtral": experts,
    "bert": masked_words,
}
RECIPES: dict[str, Callable[[], Any]] = {
    "lora": lambda: esp.LoRA(rank=4),
    "lora on the head": lambda: esp.LoRA(rank=4, sites=ON_HEAD),
    "dora on the head": lambda: esp.LoRA(rank=4, sites=ON_HEAD, dora=True),
    "scaled head": lambda: esp.IA3(sites="lm_head", hidden=""),
    "head with a bias": lambda: esp.BitFit("lm_head", create=True),
    "full": esp.FullTuning,
    "prompt and lora": lambda: esp.PromptTuning(length=3) + esp.LoRA(rank=4, sites=ON_HEAD),
}


def batch_for(model: nn.Module) -> dict[str, Tensor]:
    """Three texts whose first words are not learned, as the prompts of completions are not."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (3, 9), generator=draw)
    wide = 5 if model.config.is_encoder_decoder else 9  # type: ignore[union-attr]
    labels = torch.randint(5, VOCAB, (3, wide), generator=draw)
    if not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        labels = ids.clone()
    labels[0, :3] = labels[1, 2:4] = -100
    return {"input_ids": ids, "labels": labels}


def prepared(name: str, recipe: str, **how: Any) -> nn.Module:
    model = MODELS[name]()
    esp.attach(model, RECIPES[recipe](), **how)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in esp.parameters(model):
            p.add_(0.02 * torch.randn_like(p))
    return model


def passed(model: nn.Module, batch: dict[str, Tensor], share: float = 1.0) -> tuple[Any, ...]:
    """Loss, gradients and the logits of a pass."""
    for p in esp.parameters(model):
        p.grad = None
    outputs = model(**batch)
    (share * outputs.loss).backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in esp.parameters(model)]
    return outputs.loss.detach(), [g.clone() for g in grads], outputs.logits


def apart(found: Tensor, right: Tensor) -> float:
    return float((found - right).detach().norm() / right.detach().norm().clamp(min=1e-12))


def compare(model: nn.Module, batch: dict[str, Tensor], bound: float = 1e-6) -> None:
    value, grads, logits = passed(model, batch, 0.3)
    assert type(logits) is Logits
    with plain_paths():
        right, wanted, plain = passed(model, batch, 0.3)
    assert type(plain) is Tensor
    assert apart(value, right) < bound
    for found, want in zip(grads, wanted, strict=True):
        assert apart(found, want) < bound
    assert apart(logits + 0, plain) < bound  # whoever wants logits gets them


# --------------------------------------------------------------------------------- whole models


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "tied llama", "t5", "bart"])
def test_loss_and_gradients_are_those_of_whole_logits(name: str, recipe: str) -> None:
    if name == "tied llama" and recipe == "head with a bias":
        pytest.skip("the same as untied")
    model = prepared(name, recipe)
    compare(model, batch_for(model), 2e-6)


@pytest.mark.parametrize("name", ["gemma2", "mixtral", "bert"])
def test_what_models_do_after_their_head_is_done_to_every_chunk(name: str) -> None:
    model = prepared(name, "lora")
    compare(model, batch_for(model), 2e-6)


def test_a_head_trained_by_itself_has_the_same_gradients() -> None:
    for name in ("llama", "t5"):
        model = MODELS[name]()
        esp.attach(model, esp.HeadOnly(), head=["lm_head"])
        compare(model, batch_for(model))


def test_the_loss_that_a_router_adds_is_kept() -> None:
    model = prepared("mixtral", "lora")
    batch = batch_for(model)
    outputs = model(**batch)
    words = F.cross_entropy(
        (outputs.logits + 0)[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    torch.testing.assert_close(outputs.loss, words + 0.5 * outputs.aux_loss)
    assert float(outputs.aux_loss.detach()) > 0.1


def test_bf16_is_as_near_to_fp32_as_whole_logits_in_bf16() -> None:
    for name in ("llama", "t5"):
        model = prepared(name, "lora on the head")
        batch = batch_for(model)
        with plain_paths():
            right, wanted, _ = passed(model, batch)
        model = nn.Module.to(model, torch.bfloat16)
        value, grads, logits = passed(model, batch)
        with plain_paths():
            _, plain, _ = passed(model, batch)
        assert type(logits) is Logits
        assert value.dtype == torch.float32
        assert apart(value, right) < 5e-3
        for found, other, want in zip(grads, plain, wanted, strict=True):
            assert apart(found.float(), want) < 1.3 * apart(other.float(), want) + 1e-3


def test_a_word_that_is_all_but_certain_keeps_the_precision_of_its_loss_in_bf16() -> None:
    logits = torch.randn(1, 6, VOCAB, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[0, torch.arange(6), torch.arange(6)] = 12.0
    hidden, labels = logits[0].clone().requires_grad_(), torch.arange(6)
    value = loss.chunked_sum(lambda x: x * 1, hidden, labels, VOCAB)
    value.backward()
    right = logits[0].float().requires_grad_()
    F.cross_entropy(right, labels, reduction="sum").backward()
    want = float(F.cross_entropy(right, labels, reduction="sum").detach())
    assert want < 0.02
    assert float(value.detach()) == pytest.approx(want, rel=5e-3)
    assert hidden.grad is not None
    assert right.grad is not None
    assert apart(hidden.grad.float(), right.grad) < 5e-3


def test_autocast_is_that_of_the_pass() -> None:
    model = prepared("llama", "lora on the head")
    batch = batch_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**batch)
        with plain_paths():
            right = model(**batch)
    assert type(outputs.logits) is Logits
    assert outputs.logits.dtype == right.logits.dtype == torch.bfloat16
    torch.testing.assert_close(outputs.loss, right.loss, rtol=2e-3, atol=0)
    torch.testing.assert_close(outputs.logits + 0, right.logits, rtol=2e-2, atol=2e-2)


def test_checkpointing_packing_and_accumulation_change_nothing() -> None:
    model = prepared("llama", "lora on the head")
    batch = batch_for(model)
    batch["position_ids"] = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 3)
    batch["use_cache"] = False  # type: ignore[assignment]
    compare(model, batch)
    model.train()
    _, right, _ = passed(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    _, grads, logits = passed(model, batch)
    assert type(logits) is Logits
    assert apart(grads[0], right[0]) < 1e-6
    (0.5 * model(**batch).loss).backward()
    both = esp.parameters(model)[0].grad
    assert both is not None
    assert apart(both, 1.5 * right[0]) < 1e-6


def test_a_batch_without_a_target_gives_no_gradient() -> None:
    model = prepared("llama", "full")
    batch = batch_for(model)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    value, grads, _ = passed(model, {**batch, "num_items_in_batch": 4})  # type: ignore[dict-item]
    assert float(value) == 0
    assert not any(g.any() for g in grads)
    with plain_paths():
        assert bool(model(**batch).loss.isnan())
    assert bool(model(**batch).loss.isnan())


def test_dropout_on_the_head_is_the_seeds_and_the_trial_draws_none() -> None:
    model = MODELS["llama"]()
    esp.attach(model, esp.LoRA(rank=4, sites="lm_head", dropout=0.5))
    with torch.no_grad():
        for p in esp.parameters(model):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    batch = batch_for(model)
    model.train()
    passed(model, batch)
    values = []
    for _ in range(2):
        esp.activate(model, "default")  # another trial
        torch.manual_seed(0)
        values.append((*passed(model, batch)[:2], torch.random.get_rng_state()))
        torch.manual_seed(0)
        values.append((*passed(model, batch)[:2], torch.random.get_rng_state()))
    for value, grads, state in values[1:]:
        assert torch.equal(value, values[0][0])
        assert torch.equal(grads[0], values[0][1][0])
        assert torch.equal(state, values[0][2])
    torch.manual_seed(1)
    assert not torch.equal(passed(model, batch)[0], values[0][0])


# ------------------------------------------------------------------------------------- memory


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile has; outlines have no memory."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.most = max(self.most, *(t.numel() for t in made if not t.is_meta), 0)
        return out


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "bart", "gemma2", "bert"])
def test_logits_never_exist_whole_in_training(name: str) -> None:
    model = prepared(name, "lora on the head" if name != "bert" else "lora")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCAB, (30, 8), generator=draw)
    whole = ids.numel() * VOCAB
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    def most() -> int:
        kept.clear()
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(input_ids=ids, labels=ids).loss.backward()
        return max(largest.most, *kept)

    assert most() < whole
    with plain_paths():
        assert most() >= whole


def test_a_chunk_alone_is_computed_at_a_time() -> None:
    hidden = torch.randn(50, 8, requires_grad=True)
    weight = torch.randn(400, 8)
    with Largest() as largest:
        value = loss.chunked_sum(
            lambda x: F.linear(x, weight), hidden, torch.randint(0, 400, (50,)), 400
        )
        value.backward()
    assert largest.most == max(7 * 400, weight.numel())


def test_ignored_tokens_never_reach_the_head() -> None:
    model = prepared("llama", "lora")
    batch = batch_for(model)
    counted: list[int] = []
    seat = esp.graft.find(model).head.seat  # type: ignore[attr-defined]
    run = type(seat)._inner
    seat_type = type(seat)

    def counting(self: Any, args: Any, kwargs: Any) -> Any:
        if self is seat:
            counted.append(args[0].numel() // args[0].shape[-1])
        return run(self, args, kwargs)

    model(**batch).loss.backward()  # with a trial
    seat_type._inner = counting
    try:
        model(**batch).loss.backward()
    finally:
        seat_type._inner = run
    assert sum(counted) == int((batch["labels"][:, 1:] != -100).sum())


# ----------------------------------------------------------------------------- loops of one's own


def test_own_losses_with_smoothing_are_taken_in_chunks() -> None:
    model = prepared("llama", "lora on the head")
    ids, labels = (t.repeat(5, 1) for t in batch_for(model).values())

    def own(logits: Tensor) -> tuple[Tensor, list[Tensor]]:
        words = logits[:, :-1].flatten(0, 1).float()
        value = F.cross_entropy(words, labels[:, 1:].flatten(), label_smoothing=0.1)
        return value.detach(), [*torch.autograd.grad(value, esp.parameters(model))]

    with esp.deferred_logits(model):
        logits = model(input_ids=ids).logits
    assert type(logits) is Logits
    with Largest() as largest:
        value, grads = own(logits)
    assert largest.most < ids.numel() * VOCAB
    logits = model(input_ids=ids).logits
    assert type(logits) is Tensor
    right, wanted = own(logits)
    assert apart(value, right) < 1e-6
    assert apart(grads[0], wanted[0]) < 1e-6


def deferred() -> Iterator[tuple[nn.Module, Logits, Tensor]]:
    model = prepared("llama", "lora on the head")
    batch = batch_for(model)
    logits = model(**batch).logits
    with plain_paths():
        plain = model(**batch).logits
    yield model, logits, plain


def test_any_other_use_of_logits_gives_what_whole_logits_give() -> None:
    (found,) = deferred()
    _, logits, plain = found
    assert logits.shape == plain.shape
    assert logits.size(-1) == VOCAB
    assert len(logits) == 3
    index = torch.tensor([0, 2])
    uses: list[Callable[[Tensor], Tensor]] = [
        lambda z: z.argmax(-1),
        lambda z: z[:, -1],
        lambda z: z[0, 1:, :5],
        lambda z: z[..., 3],
        lambda z: z[1, 2, 3, ...],
        lambda z: z[index],
        lambda z: z[:, None],
        lambda z: z.view(-1)[:7],
        lambda z: z.transpose(1, 2),
        lambda z: 2 - z,
        lambda z: z * torch.arange(9.0)[None, :, None],
        lambda z: z + torch.arange(float(VOCAB)),
        lambda z: torch.log_softmax(z.double(), -1),
        lambda z: torch.cat([z, z]),
        lambda z: z.detach().cpu().clone(),
        lambda z: torch.from_numpy(z.detach().numpy()),
        lambda z: F.cross_entropy(z.transpose(1, 2), torch.ones(3, 9, dtype=torch.long)),
        lambda z: F.cross_entropy(z[0], torch.arange(9), reduction="none"),
        lambda z: F.cross_entropy(z[0], torch.arange(9), weight=torch.arange(float(VOCAB))),
        lambda z: F.cross_entropy(z[0] / 3, torch.arange(9), reduction="sum"),
        lambda z: F.cross_entropy(z[0], torch.full((9, VOCAB), 1 / VOCAB)),
    ]
    for use in uses:
        want, got = use(plain), use(logits)
        got = got + 0 if type(got) is Logits else got
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_gradients_flow_through_logits_that_were_computed() -> None:
    (found,) = deferred()
    model, logits, plain = found
    for one in (logits, plain):
        one.logsumexp(-1).sum().backward()
    grad = esp.parameters(model)[0].grad
    assert grad is not None
    both = grad.clone()
    esp.parameters(model)[0].grad = None
    with plain_paths():
        model(**batch_for(model)).logits.logsumexp(-1).sum().backward()
    grad = esp.parameters(model)[0].grad
    assert grad is not None
    assert apart(both, 2 * grad) < 1e-5


def test_logits_that_were_written_to_stay_so() -> None:
    model = prepared("llama", "lora")
    outputs = model.train()(**batch_for(model))
    with torch.no_grad():
        outputs.logits[..., 0] = -7.0
        assert (outputs.logits[..., 0] == -7).all()
    assert (outputs.logits[..., 0] == -7).all()


def test_logits_of_a_head_that_has_changed_since_are_refused() -> None:
    (found,) = deferred()
    model, logits, _ = found
    with torch.no_grad():
        esp.parameters(model)[0].add_(1)
    with pytest.raises(esp.errors.AdapterError, match="head has changed since"):
        logits.argmax(-1)


def test_a_frozen_head_is_the_same_after_the_step() -> None:
    model = prepared("llama", "lora")
    logits = model(**batch_for(model)).logits
    with plain_paths():
        plain = model(**batch_for(model)).logits
    with torch.no_grad():
        esp.parameters(model)[0].add_(1)
    torch.testing.assert_close(logits.argmax(-1), plain.argmax(-1))


# ------------------------------------------------------------------------------------ where not


def test_evaluation_and_passes_without_labels_give_plain_logits() -> None:
    model = prepared("llama", "lora")
    batch = batch_for(model)
    with torch.no_grad():
        assert type(model(**batch).logits) is Tensor
    assert type(model(input_ids=batch["input_ids"]).logits) is Tensor
    esp.activate(model, None)
    assert type(model(**batch).logits) is Tensor


def test_the_last_detach_leaves_no_trace_at_the_head() -> None:
    model = prepared("llama", "lora")
    assert "forward" in model.lm_head.__dict__
    esp.detach(model, "default")
    assert "forward" not in model.lm_head.__dict__


def test_a_copy_of_the_model_has_a_head_of_its_own() -> None:
    model = prepared("llama", "lora on the head")
    twin = deepcopy(model)
    esp.detach(model, "default")
    compare(twin, batch_for(twin))


def test_a_delta_that_minds_its_neighbours_keeps_whole_logits() -> None:
    from espalier.fast.head import _by_rows

    model = MODELS["llama"]()
    esp.attach(model, esp.UniPELT())
    deltas = esp.graft.find(model).adapters["default"].deltas  # type: ignore[attr-defined]
    assert not all(_by_rows(delta) for delta in deltas)


def test_a_compiled_model_takes_the_plain_path_without_a_break() -> None:
    model = prepared("llama", "lora on the head")
    batch = batch_for(model)
    whole: Any = torch.compile(model, backend="eager", fullgraph=True)
    outputs: Any = whole(**batch)
    assert type(outputs.logits) is Tensor
    torch.testing.assert_close(outputs.loss, model(**batch).loss)


def test_transformers_trainer_needs_nothing(tmp_path: Any) -> None:
    model = prepared("llama", "lora")
    before = esp.parameters(model)[0].detach().clone()
    rows = [{"input_ids": row, "labels": row} for row in batch_for(model)["input_ids"]]
    seen: list[type] = []

    class Watching(tf.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            both: Any = super().compute_loss(model, inputs, True, **kwargs)
            value, outputs = both
            seen.append(type(outputs.logits))
            return value

    args = tf.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, gradient_accumulation_steps=2,
    )  # fmt: skip
    Watching(model, args, train_dataset=rows).train()  # type: ignore[arg-type]
    assert set(seen) == {Logits}
    assert not torch.equal(before, esp.parameters(model)[0])


def test_liger_is_asked_for_the_same_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is a stand-in here: this checks what it is given, not its kernels."""

    class Fused(nn.Module):
        def __init__(self, reduction: str, label_smoothing: float) -> None:
            super().__init__()
            self.how = {"reduction": reduction, "label_smoothing": label_smoothing}

        def forward(self, weight: Tensor, states: Tensor, labels: Tensor, bias: Any) -> Tensor:
            return F.cross_entropy(F.linear(states, weight, bias), labels, **self.how)  # type: ignore[arg-type]

    stand_in = types.ModuleType("liger_kernel.transformers")
    stand_in.LigerFusedLinearCrossEntropyLoss = Fused  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    asked: list[bool] = []

    def suits(weight: Any, hidden: Tensor) -> bool:
        asked.append(weight is not None)
        return weight is not None

    monkeypatch.setattr(liger, "suits", suits)
    for recipe, plain in (("lora", True), ("lora on the head", False)):
        model = prepared("llama", recipe)
        compare(model, batch_for(model))
        assert asked.pop() == plain
