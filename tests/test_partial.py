"""Partial tuning: what a selection trains, sparse masks, and what they keep for the backward."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import espalier as esp
import tiny_runs as tiny
from espalier.errors import AdapterError, SettingError, SiteError
from espalier.training import RunConfig, choosing
from espalier.training.loop import Loop
from graded import saved_bytes
from zoo import BY_NAME, CASES, Case, logits, train

BERT, GPT2, LLAMA, T5, VIT = (BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5", "vit"))
MASKED = [case for case in CASES if case.name in ("bert", "gpt2", "t5")]


def trained(model: nn.Module, name: str = "default") -> set[str]:
    """The base's parameters that a trained copy stands in for."""
    adapter = model.get_submodule(f"espalier.@{name}")
    return {
        f"{delta.site.path}.{key}"
        for delta in adapter.deltas
        for key in delta.parameters
        if not delta.site.path.startswith("classifier")
    }


def named(model: nn.Module, *patterns: str) -> set[str]:
    """Parameters by name, tied ones under each of theirs."""
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    return {n for n in names if any(fnmatch(n, pattern) for pattern in patterns)}


def sparse(model: nn.Module, name: str = "default") -> tuple[Tensor, Tensor]:
    """The values (T,) and indices (T,) of an adapter with a mask."""
    adapter = model.get_submodule(f"espalier.@{name}")
    return adapter.vectors, adapter.indices


def row(parameters: list[nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().flatten() for p in parameters])


# --- what a selection takes -------------------------------------------------------------------

SELECTIONS: list[tuple[Case, str, tuple[str, ...]]] = [
    (BERT, "attention.*", ("*.attention.self.*", "*.attention.output.dense.*")),
    (BERT, "block@last1", ("bert.encoder.layer.1.*",)),
    (BERT, "block@first1, !norm", ("bert.encoder.layer.0.*.dense.*", "*.layer.0.*.self.*")),
    (BERT, "norm", ("*LayerNorm*",)),
    (BERT, "ffn.*", ("*.intermediate.dense.*", "bert.encoder.layer.?.output.dense.*")),
    (BERT, "embeddings.*", ("bert.embeddings.*",)),
    (BERT, "embeddings.LayerNorm", ("bert.embeddings.LayerNorm.*",)),
    (BERT, "bert.pooler", ("bert.pooler.*",)),
    (BERT, "query.bias", ("*.query.bias",)),
    (BERT, "encoder.layer.*.output.*", ("*.output.dense.*", "*.output.LayerNorm.*")),
    (GPT2, "attention.*", ("*.attn.c_attn.*", "*.attn.c_proj.*")),
    (GPT2, "embedding", ("transformer.wte.weight", "lm_head.weight")),
    (LLAMA, "block@1", ("model.layers.1.*",)),
    (T5, "decoder/cross.*", ("decoder.*.EncDecAttention.*",)),
    (T5, "decoder/block@last1", ("decoder.block.1.*",)),
    (VIT, "vit.embeddings", ("vit.embeddings.*",)),  # bare parameters too
    (VIT, "cls_token", ("vit.embeddings.cls_token",)),
]


@pytest.mark.parametrize(
    ("case", "sites", "patterns"), SELECTIONS, ids=[f"{c.name} {s}" for c, s, _ in SELECTIONS]
)
def test_what_trains_is_what_a_hand_written_list_says(
    case: Case, sites: str, patterns: tuple[str, ...]
) -> None:
    model = case.make()
    expected = named(model, *patterns)
    if "!norm" in sites:
        expected = {n for n in expected if "LayerNorm" not in n}
    esp.attach(model, esp.PartialTuning(sites=sites))
    assert trained(model) == expected


@pytest.mark.parametrize(
    ("sites", "count"),
    [
        ("attention.*", 28_348_416),
        ("block@last1", 7_087_872),
        ("block@last3", 3 * 7_087_872),
        ("norm", 38_400),
        ("ffn.*", 56_669_184),
        ("embeddings.*", 23_837_184),
    ],
)
def test_counts_on_bert_base_from_configuration_alone(sites: str, count: int) -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, esp.PartialTuning(sites=sites))
    account = esp.account(model, "default")
    assert (account.trained, account.changed) == (count, count)
    assert account.rank == (0 if sites == "norm" else None)
    assert account.bytes == 4 * count


def test_kinds_part_weights_and_biases() -> None:
    found = {}
    for kinds in ("all", "weight", "bias"):
        model = BERT.make()
        esp.attach(model, esp.PartialTuning(sites="block@0", kinds=kinds))
        found[kinds] = trained(model)
    assert found["weight"] == {n for n in found["all"] if n.endswith(".weight")}
    assert found["bias"] == found["all"] - found["weight"]
    assert len(found["bias"]) == 8


def test_a_tied_embedding_is_trained_once_and_both_ends_follow() -> None:
    model, batch = GPT2.make(), GPT2.batch()
    esp.attach(model, esp.PartialTuning(sites="embedding"))
    assert esp.account(model, "default").trained == 96 * 24
    dense = GPT2.make()
    change = torch.randn(96, 24)
    with torch.no_grad():
        esp.parameters(model)[0].add_(change.flatten())
        dense.transformer.wte.weight.add_(change)
    assert dense.lm_head.weight is dense.transformer.wte.weight
    assert torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-5)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-5)


def test_training_equals_training_those_parameters_of_the_model_itself() -> None:
    model, dense, batch = LLAMA.make(), LLAMA.make(), LLAMA.batch()
    esp.attach(model, esp.PartialTuning(sites="attention.v, norm"))
    own = [p for n, p in dense.named_parameters() if "v_proj" in n or "norm" in n]
    theirs = torch.optim.SGD(own, lr=0.1)
    ours = torch.optim.SGD(esp.parameters(model), lr=0.1)
    for _ in range(3):
        for net, optimiser in ((model, ours), (dense, theirs)):
            optimiser.zero_grad()
            net(**batch).loss.backward()
            optimiser.step()
    assert torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-5)


@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_norms_equal_pefts_norm_tuning(case: Case) -> None:
    targets = ["LayerNorm"] if case is BERT else ["input_layernorm", "post_attention_layernorm"]
    config = peft.LNTuningConfig(target_modules=targets)
    theirs, batch = peft.get_peft_model(case.make(), config).eval(), case.batch()
    model = case.make()
    sites = "norm" if case is BERT else "norm, !model.norm"
    esp.attach(model, esp.PartialTuning(sites=sites), head=False)
    held = {
        n.removeprefix("base_model.model.").replace(".ln_tuning_layers.default", ""): p
        for n, p in theirs.named_parameters()
        if p.requires_grad
    }
    assert set(held) == trained(model)
    adapter = model.get_submodule("espalier.@default")
    slots = {
        slot.label.split("/", 1)[1].replace("/", "."): slot for slot in adapter.slots["vectors"]
    }
    with torch.no_grad():
        for n, p in held.items():
            p.add_(0.2 * torch.randn(p.shape))
            slots[n].of(adapter.vectors.data).copy_(p)
    assert torch.allclose(logits(model, batch), logits(theirs, batch), atol=1e-6)
    model(**batch).loss.backward()
    theirs(**batch).loss.backward()
    for n, p in held.items():
        assert torch.allclose(slots[n].of(adapter.vectors.grad), p.grad, atol=1e-6), n


def kept_for_backward(recipe: str) -> int:
    """Bytes that a step of a four-layer BERT keeps, parameters aside."""
    torch.manual_seed(7)
    config = tf.BertConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=64, num_labels=2, problem_type="single_label_classification",
    )  # fmt: skip
    model = tf.BertForSequenceClassification(config).eval()
    esp.attach(model, recipe)
    ids = torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": torch.tensor([0, 1, 1, 0])}
    model(**batch).loss.backward()
    assert esp.dead_sites(model) == []
    return saved_bytes(model, batch)


def test_below_the_lowest_trained_layer_nothing_is_kept_for_the_backward() -> None:
    full = kept_for_backward("FullTuning()")
    last = kept_for_backward("PartialTuning(sites='block@last1')")
    two = kept_for_backward("PartialTuning(sites='block@last2')")
    first = kept_for_backward("PartialTuning(sites='block@first1')")
    assert last < 0.35 * full
    assert last < two < 0.6 * full
    assert first > 0.7 * full  # few numbers at the bottom cost almost as much as all


# --- sparse masks -----------------------------------------------------------------------------

ORDER = {"magnitude": lambda x: -x.abs(), "smallest": lambda x: x.abs()}


@pytest.mark.parametrize("mask", ORDER)
@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_the_largest_or_smallest_scalars_of_all_are_chosen(case: Case, mask: str) -> None:
    model = case.make()
    everything = row(list(case.make().parameters()))
    esp.attach(model, esp.PartialTuning(sites="*", mask=mask, share=0.03), head=False)
    values, indices = sparse(model)
    count = round(0.03 * len(everything))
    assert values.shape == indices.shape == (count,)
    score = ORDER[mask](everything)
    bound = score.sort().values[count - 1]
    assert (indices.diff() > 0).all()
    assert (score[indices] <= bound).all()


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_sparse_differences_equal_a_dense_copy_with_a_masked_gradient(case: Case) -> None:
    model, dense, batch = case.make(), case.make(), case.batch()
    esp.attach(model, esp.PartialTuning(sites="*", mask="random", share=0.2), head=False)
    values, indices = sparse(model)
    own = list(dense.parameters())
    mask = torch.zeros_like(row(own))
    mask[indices] = 1
    for _ in range(3):
        model(**batch).loss.backward()
        dense(**batch).loss.backward()
        whole = torch.cat([p.grad.flatten() for p in own])
        assert torch.allclose(values.grad, whole[indices], atol=1e-5)
        with torch.no_grad():
            values -= 0.1 * values.grad
            at = 0
            for p in own:
                p -= 0.1 * (p.grad * mask[at : at + p.numel()].view_as(p))
                at += p.numel()
                p.grad = None
        values.grad = None
    expected = logits(dense, batch)
    assert not torch.allclose(logits(case.make(), batch), expected, atol=1e-4)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    esp.merge(model)  # tied ends take the difference once
    for p, q in zip(dense.parameters(), model.parameters(), strict=False):
        assert torch.allclose(p, q, atol=1e-6)
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    esp.unmerge(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_the_highest_fisher_information_is_chosen_example_by_example() -> None:
    model, batch = BERT.make(), BERT.batch()
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    esp.attach(model, esp.PartialTuning(sites="attention.*, ffn.*", mask="fisher", share=0.01))
    model.train().bert.eval()
    esp.calibrate(model, "default", single)
    assert model.training  # as it was, module by module
    assert not model.bert.training
    model.eval()
    dense = BERT.make()
    inner = [p for n, p in dense.named_parameters() if n in trained(model)]
    squares = torch.zeros_like(row(inner))
    for one in single:
        grads = torch.autograd.grad(dense(**one).loss, inner)
        squares += torch.cat([g.flatten() for g in grads]) ** 2 / 3
    values, indices = sparse(model)
    assert torch.equal(indices, squares.topk(len(values)).indices.sort().values)
    assert values.count_nonzero() == 0
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for n, p in model.named_parameters() if "espalier" not in n)
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=5) < first


def test_training_before_choosing_is_an_error_that_names_the_verb(tmp_path: Path) -> None:
    model, batch = BERT.make(), BERT.batch()
    esp.attach(model, esp.PartialTuning(mask="fisher"), "mine")
    assert torch.equal(logits(model, batch), logits(BERT.make(), batch))
    with pytest.raises(AdapterError, match=r"not chosen yet; call esp\.calibrate"):
        model(**batch)
    esp.calibrate(model, "mine", [batch], loss=lambda m, b: m(**b).logits.square().sum())
    esp.calibrate(model, "mine", [batch])  # nothing is trained yet: choose again
    train(model, batch)
    with pytest.raises(AdapterError, match="trained already"):
        esp.calibrate(model, "mine", [batch])
    expected = logits(model, batch)
    esp.save(model, "mine", tmp_path)
    fresh = BERT.make()
    esp.load(fresh, tmp_path, trainable=True)
    assert torch.equal(logits(fresh, batch), expected)
    train(fresh, batch, steps=1)


def test_the_trainer_chooses_and_a_resumed_run_keeps_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_model(tmp_path / "base", tiny.bert(num_labels=2), tiny.tokenizer())
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews(32)))
    config = RunConfig(
        model=base, train=str(data), method="PartialTuning(mask='fisher', share=0.05)", batch=8,
        epochs=3, lr=0.01, save_every=2, threads=1, quiet=True, head=["classifier"],
        validation_share=0, out=tmp_path / "whole",
    )  # fmt: skip
    result = esp.train(config)
    losses = [line["loss"] for line in result.history if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    stopped = config.replace(out=tmp_path / "stopped")
    inner, calls = Loop._step, []

    def counted(loop: Loop, *given: object) -> None:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        inner(loop, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Loop, "_step", counted)
    with pytest.raises(KeyboardInterrupt):
        esp.train(stopped)
    monkeypatch.setattr(choosing, "EXAMPLES", 1)  # would choose otherwise
    esp.train(stopped.replace(resume=True))
    weights = "adapter/adapter.safetensors"
    whole, again = ((tmp_path / name / weights).read_bytes() for name in ("whole", "stopped"))
    assert whole == again


def test_calibration_says_what_it_lacks() -> None:
    model, batch = BERT.make(), BERT.batch()
    esp.attach(model, esp.PartialTuning(mask="fisher"), "mine")
    with pytest.raises(SettingError, match="at least one batch"):
        esp.calibrate(model, "mine", [])
    with pytest.raises(SettingError, match="put labels in, or pass loss="):
        esp.calibrate(model, "mine", [{"input_ids": batch["input_ids"]}])
    assert not model.bert.pooler.dense.weight.requires_grad
    esp.attach(model, "BitFit()", "other")
    with pytest.raises(AdapterError, match="nothing to choose by data"):
        esp.calibrate(model, "other", [batch])


def test_a_sparse_file_holds_values_and_indices_and_nothing_else(tmp_path: Path) -> None:
    model, batch = BERT.make(), BERT.batch()
    method = esp.PartialTuning(sites="block", mask="magnitude", share=0.05)
    esp.attach(model, method, "mine", head=False)
    train(model, batch)
    esp.save(model, "mine", tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        held = {name.rpartition("/")[2]: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    count = round(0.05 * 2 * 4480)
    assert {name: (len(t), t.dtype) for name, t in held.items()} == {
        "values": (count, torch.float32), "indices": (count, torch.int32),
    }  # fmt: skip
    account = esp.account(model, "mine")
    assert (account.trained, account.changed, account.bytes) == (count, count, 8 * count)


def test_indices_of_another_adapter_loaded_into_the_state_are_followed() -> None:
    batch, states, outputs = BERT.batch(), [], []
    for seed in (1, 2):
        model = BERT.make()
        torch.manual_seed(seed)
        esp.attach(model, esp.PartialTuning(mask="random", share=0.1), head=False)
        train(model, batch, rate=0.1)
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        outputs.append(logits(model, batch))
    assert not torch.equal(outputs[0], outputs[1])
    model.load_state_dict(states[0])
    assert torch.equal(logits(model, batch), outputs[0])


# --- life in a model --------------------------------------------------------------------------

RECIPES = {
    "attention": "PartialTuning()",
    "last": "PartialTuning(sites='block@last1')",
    "norm": "PartialTuning(sites='norm')",
    "magnitude": "PartialTuning(sites='*', mask='magnitude', share=0.05)",
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trains_merges_saves_copies_and_leaves_no_trace(
    case: Case, recipe: str, tmp_path: Path
) -> None:
    model, batch = case.make(), case.batch()
    untouched = logits(model, batch)
    esp.attach(model, RECIPES[recipe], "mine")
    assert torch.equal(logits(model, batch), untouched)
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=5) < first
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    train(twin, batch, steps=1)
    assert torch.equal(logits(model, batch), expected)
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


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_base_keeps_its_type_and_learns(recipe: str) -> None:
    model, batch = LLAMA.make().bfloat16(), LLAMA.batch()
    before = logits(model, batch)
    esp.attach(model, RECIPES[recipe])
    assert torch.equal(logits(model, batch), before)
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=8) < first
    assert logits(model, batch).dtype == torch.bfloat16
    expected = logits(model, batch)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=1e-2)


@pytest.mark.parametrize("recipe", ["last", "magnitude"])
def test_compiles_to_one_graph_also_where_it_was_just_loaded(recipe: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    trained_one, batch = LLAMA.make(), LLAMA.batch()
    esp.attach(trained_one, RECIPES[recipe])
    train(trained_one, batch)
    esp.save(trained_one, "default", tmp_path)
    model = LLAMA.make()
    model.config.use_cache = False
    esp.load(model, tmp_path, trainable=True)
    counter = CompileCounterWithBackend("aot_eager")
    out = torch.compile(model, backend=counter, fullgraph=True)(**batch)
    assert counter.frame_count == 1
    assert torch.allclose(out.logits, logits(trained_one, batch), atol=1e-5)
    out.loss.backward()
    assert esp.dead_sites(model) == []


@pytest.mark.parametrize("recipe", ["last", "magnitude"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_the_same(recipe: str, reentrant: bool) -> None:
    grads = []
    for checkpointed in (False, True):
        model, batch = LLAMA.make().train(), LLAMA.batch()
        esp.attach(model, RECIPES[recipe])
        if checkpointed:
            how = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model(**batch).loss.backward()
        grads.append([p.grad for p in esp.parameters(model)])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_adapters_of_different_parts_stack_and_of_the_same_part_do_not() -> None:
    model, batch = BERT.make(), BERT.batch()
    dense = BERT.make()
    for name, sites in (("a", "block@0"), ("b", "norm@1")):
        esp.attach(model, esp.PartialTuning(sites=sites), name, head=False)
        with torch.no_grad():
            for p in esp.parameters(model):
                p.mul_(1.5)
            for n, p in dense.named_parameters():
                if n in trained(model, name):
                    p.mul_(1.5)
    esp.activate(model, ["a", "b"])
    assert torch.allclose(logits(model, batch), logits(dense, batch), atol=1e-5)
    esp.attach(model, esp.PartialTuning(sites="norm"), "c", head=False)
    with pytest.raises(AdapterError, match="both bring their own"):
        esp.activate(model, ["a", "c"])


def test_quantised_weights_are_refused_and_their_biases_train() -> None:
    bnb = pytest.importorskip("bitsandbytes")

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            storage: Callable[..., nn.Module] = bnb.nn.Linear4bit
            host = storage(64, 32, compute_dtype=torch.float32, quant_storage=torch.float32)
            host.load_state_dict(nn.Linear(64, 32).state_dict())
            self.host = host.to("cpu")

        def forward(self, x: Tensor) -> Tensor:
            return self.host(x)

    for mask in ("none", "magnitude"):
        with pytest.raises(SiteError, match=r"host\.weight is quantised .* trained"):
            esp.attach(One(), esp.PartialTuning(sites="host", mask=mask), head=False)
    model, x = One(), torch.randn(3, 64)
    esp.attach(model, esp.PartialTuning(sites="host", kinds="bias"), head=False)
    before = model(x)
    with torch.no_grad():
        esp.parameters(model)[0].add_(1.0)
    assert torch.allclose(model(x), before + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "method", "message"),
    [
        (BERT, "PartialTuning(sites='attention')", r"a span.*write 'attention\.\*'"),
        (GPT2, "PartialTuning(sites='attention.v')", "slice of .*c_attn.*name the fused layer"),
        (BERT, "PartialTuning(sites='cross.*')", "cross"),
        (BERT, "PartialTuning(sites='encodr.*')", "no role and matches no module"),
        (LLAMA, "PartialTuning(sites='norm', kinds='bias')", "has no bias to train"),
        (BERT, "PartialTuning(sites='norm, !norm')", "takes no parameter"),
    ],
)
def test_a_selection_of_nothing_is_refused(case: Case, method: str, message: str) -> None:
    model = case.make()
    with pytest.raises(SiteError, match=message):
        esp.attach(model, method)
    assert "espalier" not in model._modules


@pytest.mark.parametrize(
    "setting", ["kinds='some'", "mask='l0'", "share=0", "share=1.5", "share='much'", "sites=3"]
)
def test_wrong_settings_are_refused(setting: str) -> None:
    with pytest.raises(SettingError, match=rf"PartialTuning\({setting.partition('=')[0]}="):
        esp.recipe(f"PartialTuning({setting})")


def test_a_few_vectors_take_larger_steps_than_whole_layers() -> None:
    assert esp.recipe("PartialTuning(sites='block@last1')").learning_rate == 5e-5
    assert esp.recipe("PartialTuning(sites='norm')").learning_rate == 1e-3
    assert esp.recipe("PartialTuning(kinds='bias')").learning_rate == 1e-3
