"""Added modules: serial and parallel adapters, Compacter, AdapterDrop."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import adapters_reference as reference
import espalier as esp
from espalier.errors import SettingError, SiteError
from espalier.graft import get
from test_invariants import base_values, same, snapshot
from zoo import BY_NAME, CASES, Case, logits, train

BERT, GPT2, LLAMA, T5, BART = (BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5", "bart"))
HOULSBY = "SerialAdapter(bottleneck=4)"
PFEIFFER = "SerialAdapter(style='pfeiffer', bottleneck=4)"
ROBUST = "SerialAdapter(style='pfeiffer', bottleneck=4, drop='robust')"
PARALLEL = "ParallelAdapter(bottleneck=6)"
STREAM = "ParallelAdapter(bottleneck=6, reads='residual', sites='attention, ffn')"
COMPACTER = "Compacter(bottleneck=4)"
RECIPES = {
    "houlsby": "SerialAdapter(bottleneck=4, scale='learned')",
    "pfeiffer": PFEIFFER,
    "norms": "SerialAdapter(style='pfeiffer', bottleneck=4, norms=True)",
    "parallel": "ParallelAdapter(bottleneck=6, scale='learned')",
    "stream": STREAM,
    "heads": "ParallelAdapter(bottleneck=6, sites='attention', adds_to='heads')",
    "compacter": COMPACTER,
}
TABLE = [(case, recipe) for case in CASES for recipe in RECIPES]
IDS = [f"{case.name}-{recipe}" for case, recipe in TABLE]


def adapted(make: Callable[[], nn.Module], recipe: str, name: str = "a", std: float = 0.2) -> Any:
    """A model with an adapter whose numbers all change something."""
    model = make()
    torch.manual_seed(11)
    esp.attach(model, recipe, name)
    generator = torch.Generator().manual_seed(len(name))
    for p in esp.parameters(model):
        p.data.add_(std * torch.randn(p.shape, generator=generator))
    return model


def numbers(model: nn.Module, site: str, name: str = "a") -> dict[str, Tensor]:
    """The adapter's numbers at one site, by their own names."""
    found = {label.partition("/")[2]: t for label, t in get(model, name).named()}
    at = {k: k.rpartition("/")[0].partition(":")[0] for k in found}
    return {k.rpartition("/")[2]: t for k, t in found.items() if at[k] == site}


def branch(
    t: dict[str, Tensor], h: Tensor, phi: Callable[[Tensor], Tensor], scale: float = 1.0
) -> Tensor:
    """The bottleneck by hand."""
    low = phi(h @ t["down"].T + t["down_bias"])
    return scale * (low @ t["up"].T + t["up_bias"])


def states(width: int = 24) -> Tensor:
    return torch.randn(2, 5, width, generator=torch.Generator().manual_seed(3))


# --- what they compute ------------------------------------------------------------------------


@pytest.mark.parametrize("case", json.loads(reference.FILE.read_text()).items(), ids=lambda c: c[0])
def test_agrees_with_the_adapters_library(case: tuple[str, list[float]]) -> None:
    family, _, config = case[0].partition("-")
    model = getattr(reference, family)()
    names = ["a", "b"] if config == "stack" else ["a"]
    for name in names:
        esp.attach(model, reference.RECIPES[config], name)
        for label, values in get(model, name).named():
            path, _, leaf = label.rpartition("/")
            found = re.search(r"\.(\d+)([.:]|$)", path)
            place = "attention" if "att" in path else "ffn"
            key = "rule" if leaf == "rule" else f"{found and found[1]}/{place}/{leaf}"
            values.copy_(reference.wave(f"{name}/{key}", tuple(values.shape)))
    esp.activate(model, names)
    with torch.no_grad():
        found = model(reference.batch()).last_hidden_state.flatten()
    torch.testing.assert_close(found, torch.tensor(case[1]), atol=2e-6, rtol=0)


def bert_parts(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of an unadapted BERT layer: attention's out-projection, the FFN's input, its output."""
    heads = layer.attention.self(x)[0]
    o = layer.attention.output.dense(heads)
    a = layer.attention.output.LayerNorm(o + x)
    return o, a, layer.output.dense(layer.intermediate(a))


@torch.no_grad()
def test_pfeiffer_in_a_layer_that_ends_in_a_norm_applies_that_norm_twice() -> None:
    layer, x = BERT.make().bert.encoder.layer[0], states()
    _, a, u = bert_parts(layer, x)
    norm = layer.output.LayerNorm
    model = adapted(BERT.make, PFEIFFER)
    t = numbers(model, "bert.encoder.layer.0")
    v = norm(u + a)
    want = norm(branch(t, v, F.relu) + u + a)
    found = model.bert.encoder.layer[0](x)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)
    assert not torch.allclose(found, v + branch(t, v, F.relu), atol=1e-2)


@torch.no_grad()
def test_houlsby_stands_before_the_residual_sums_of_a_bert_layer() -> None:
    layer, x = BERT.make().bert.encoder.layer[0], states()
    o, _, _ = bert_parts(layer, x)
    model = adapted(BERT.make, HOULSBY)
    first = numbers(model, "bert.encoder.layer.0.attention.output.dense")
    second = numbers(model, "bert.encoder.layer.0.output.dense")
    a = layer.attention.output.LayerNorm(o + branch(first, o, F.silu) + x)
    u = layer.output.dense(layer.intermediate(a))
    want = layer.output.LayerNorm(u + branch(second, u, F.silu) + a)
    torch.testing.assert_close(model.bert.encoder.layer[0](x), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pfeiffer_in_a_layer_that_begins_with_a_norm_adds_to_its_output() -> None:
    x = states()
    v = GPT2.make().transformer.h[1](x)
    v = v if isinstance(v, Tensor) else v[0]
    model = adapted(GPT2.make, PFEIFFER)
    found = model.transformer.h[1](x)
    found = found if isinstance(found, Tensor) else found[0]
    want = v + branch(numbers(model, "transformer.h.1"), v, F.relu)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("reads", ["input", "residual"])
def test_parallel_beside_a_feed_forward_part_after_a_norm_reads_what_it_says(reads: str) -> None:
    x, layer = states(), GPT2.make().transformer.h[0]
    stream = layer.attn(layer.ln_1(x))[0] + x
    model = adapted(GPT2.make, f"ParallelAdapter(bottleneck=6, reads={reads!r})")
    t = numbers(model, "transformer.h.0.mlp.c_proj")
    entering = layer.ln_2(stream) if reads == "input" else stream
    want = stream + layer.mlp(layer.ln_2(stream)) + branch(t, entering, F.relu, 4.0)
    found = model.transformer.h[0](x)
    found = found if isinstance(found, Tensor) else found[0]
    torch.testing.assert_close(found, want, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("reads", ["input", "residual"])
def test_parallel_in_a_layer_that_ends_in_a_norm_has_one_reading(reads: str) -> None:
    layer, x = BERT.make().bert.encoder.layer[0], states()
    _, a, u = bert_parts(layer, x)
    model = adapted(BERT.make, f"ParallelAdapter(bottleneck=6, reads={reads!r}, scale=2)")
    t = numbers(model, "bert.encoder.layer.0.output.dense")
    want = layer.output.LayerNorm(u + branch(t, a, F.relu, 2.0) + a)
    for _ in range(2):  # the second pass must not be misled by what the first one saw
        torch.testing.assert_close(model.bert.encoder.layer[0](x), want, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("to", ["output", "heads"])
def test_parallel_beside_attention_adds_after_or_before_its_projection(to: str) -> None:
    layer, x = BERT.make().bert.encoder.layer[0], states()
    o, heads = layer.attention.output.dense, layer.attention.self(x)[0]
    model = adapted(BERT.make, f"ParallelAdapter(bottleneck=6, sites='attention', adds_to={to!r})")
    change = branch(numbers(model, "bert.encoder.layer.0.attention.output.dense"), x, F.relu, 4.0)
    added = o(heads) + change if to == "output" else o(heads + change)
    want = layer.attention.output.LayerNorm(added + x)
    found = model.bert.encoder.layer[0].attention.output.LayerNorm
    seen: list[Tensor] = []
    found.register_forward_hook(lambda m, args, y: seen.append(y))
    model.bert.encoder.layer[0](x)
    torch.testing.assert_close(seen[0], want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_a_nonlinearity_it_is_a_lora_on_one_linear() -> None:
    site, batch = "sites='layer.0.output.dense'", BERT.batch()
    recipe = f"ParallelAdapter(bottleneck=3, scale=2, nonlinearity='linear', {site})"
    model, low = BERT.make(), BERT.make()
    esp.attach(model, recipe, "a")
    t = numbers(model, "bert.encoder.layer.0.output.dense")
    t["up"].normal_()
    esp.attach(low, f"LoRA(rank=3, alpha=6, {site})", "a")
    values = numbers(low, "bert.encoder.layer.0.output.dense")
    values["a"].copy_(t["down"])
    values["b"].copy_(t["up"])
    torch.testing.assert_close(logits(model, batch), logits(low, batch), atol=1e-6, rtol=0)


PARALLEL_LAYERS: dict[str, Callable[[], tuple[nn.Module, str]]] = {
    "gptj": lambda: (
        tf.GPTJModel(
            tf.GPTJConfig(vocab_size=32, n_embd=24, n_layer=1, n_head=4, rotary_dim=4, n_inner=40)
        ),
        "h.0",
    ),
    "neox": lambda: (
        tf.GPTNeoXModel(
            tf.GPTNeoXConfig(
                vocab_size=32, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
                intermediate_size=40,
            )
        ),
        "layers.0",
    ),
    "phi": lambda: (
        tf.PhiModel(
            tf.PhiConfig(
                vocab_size=32, hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
                intermediate_size=40, pad_token_id=0,
            )
        ),
        "layers.0",
    ),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("family", PARALLEL_LAYERS)
@pytest.mark.parametrize("recipe", [HOULSBY, PFEIFFER, PARALLEL, STREAM])
def test_layers_whose_parts_run_side_by_side(family: str, recipe: str) -> None:
    torch.manual_seed(7)
    model, block = PARALLEL_LAYERS[family]()
    model.eval()
    places = {s.role: s for s in esp.sites(model)}
    watched = {path: model.get_submodule(path) for path in (
        places["attention.o"].path, places["ffn.out"].path, str(places["ffn"].enter),
        str(places["attention"].enter), block,
    )}  # fmt: skip
    calls: dict[str, tuple[Tensor, Any]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            calls[path] = (x, y if isinstance(y, Tensor) else y[0])

        return hook

    hooks = [m.register_forward_hook(note(p), with_kwargs=True) for p, m in watched.items()]
    ids = torch.tensor([[3, 4, 5]])
    model(ids)
    x, y = calls[block]
    esp.attach(model, recipe, "a", head=False)
    for p in esp.parameters(model):
        p.normal_(std=0.2)
    o, out = numbers(model, places["attention.o"].path), numbers(model, places["ffn.out"].path)
    if recipe == HOULSBY:
        want = y + branch(o, calls[places["attention.o"].path][1], F.silu)
        want = want + branch(out, calls[places["ffn.out"].path][1], F.silu)
    elif recipe == PFEIFFER:
        want = y + branch(numbers(model, block), y, F.relu)
    elif recipe == PARALLEL:
        want = y + branch(out, calls[str(places["ffn"].enter)][0], F.relu, 4.0)
    else:
        want = y + branch(o, x, F.relu, 4.0) + branch(out, x, F.relu, 4.0)
    model(ids)
    torch.testing.assert_close(calls[block][1], want, atol=1e-5, rtol=0)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_a_weight_scales_the_branch_also_within_the_second_norm() -> None:
    batch = BERT.batch()
    model = adapted(BERT.make, PFEIFFER)
    esp.activate(model, {"a": 0.25})
    weighted = logits(model, batch)
    esp.activate(model, "a")
    for label, value in get(model, "a").named():
        if label.endswith(("/up", "/up_bias")):
            value.mul_(0.25)
    torch.testing.assert_close(logits(model, batch), weighted, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("recipe", [HOULSBY, PFEIFFER, STREAM, RECIPES["heads"], COMPACTER])
def test_a_gate_half_open_is_a_weight_of_one_half(recipe: str) -> None:
    batch = T5.batch()
    model = adapted(T5.make, recipe)
    esp.activate(model, {"a": 0.5})
    gated = adapted(T5.make, f"Gated({recipe})")
    kept = dict(get(model, "a").named())
    for label, value in get(gated, "a").named():
        if label in kept:
            value.copy_(kept[label])
        else:
            value.zero_()
    torch.testing.assert_close(logits(gated, batch), logits(model, batch), atol=1e-4, rtol=1e-4)


# --- Compacter --------------------------------------------------------------------------------


@torch.no_grad()
def test_compacter_multiplies_with_a_sum_of_kronecker_products() -> None:
    layer, x = BERT.make().bert.encoder.layer[0], states()
    _, a, u = bert_parts(layer, x)
    model = adapted(BERT.make, "Compacter(bottleneck=6, p=2, rank=3, plus=True)")
    t = numbers(model, "bert.encoder.layer.0.output.dense")
    rule = t["rule"]

    def h(side: str) -> Tensor:
        b = [t[f"{side}_u"][i] @ t[f"{side}_v"][i] for i in range(2)]
        return sum((torch.kron(rule[i], b[i]) for i in range(2)), torch.zeros(()))

    low = F.gelu(u @ h("down") + t["down_bias"])
    assert low.shape[-1] == 6
    want = layer.output.LayerNorm(u + low @ h("up") + t["up_bias"] + a)
    torch.testing.assert_close(model.bert.encoder.layer[0](x), want, atol=1e-5, rtol=0)


@torch.no_grad()
def test_compacter_of_one_product_and_full_rank_is_an_ordinary_adapter() -> None:
    batch = GPT2.batch()
    whole = adapted(GPT2.make, "SerialAdapter(bottleneck=4, nonlinearity='gelu')")
    parts = adapted(GPT2.make, "Compacter(bottleneck=4, p=1, rank=4)")
    for label, value in get(parts, "a").named():
        path, _, leaf = label.rpartition("/")
        side, _, factor = leaf.partition("_")
        t = numbers(whole, path.partition("/")[2])
        if leaf == "rule":
            value.fill_(1)
        elif factor == "bias":
            value.copy_(t[leaf])
        elif (side, factor) in (("down", "u"), ("up", "v")):
            value[0].copy_(t[side].T)
        else:
            value[0].copy_(torch.eye(4))
    torch.testing.assert_close(logits(parts, batch), logits(whole, batch), atol=1e-5, rtol=0)


def test_compacter_has_one_rule_and_starts_as_the_paper_says() -> None:
    model = BERT.make()
    esp.attach(model, "Compacter(bottleneck=16, p=8)", "a")
    rules = {id(t) for d in get(model, "a").deltas for k, t in d.t.items() if k == "rule"}
    assert len(rules) == 1
    kept = dict(get(model, "a").named())
    rule = next(t for label, t in kept.items() if label.endswith("/rule"))
    assert 0.8e-4 < float(rule.std()) < 1.2e-4
    for label, t in kept.items():
        if re.search(r"_[uv]$", label):
            bound = (2 * 6 / (t.shape[1] + t.shape[2])) ** 0.5
            assert bound / 2 < float(t.abs().max()) <= bound
        elif label.endswith("_bias"):
            assert not t.any()
    assert sum(label.endswith("/rule") for label in kept) == 1


# --- counts -----------------------------------------------------------------------------------

COUNTS = {
    "SerialAdapter()": 1_789_056,
    "SerialAdapter(bottleneck=64)": 2_379_264,
    "SerialAdapter(norms=True)": 1_789_056 + 12 * 4 * 768,
    "SerialAdapter(style='pfeiffer')": 894_528,
    "SerialAdapter(scale='learned')": 1_789_056 + 24,
    "ParallelAdapter()": 9_452_544,
    "ParallelAdapter(bottleneck=384)": 7_091_712,
    "Compacter()": 57_088,
    "Compacter(plus=True)": 57_088 - 12 * 2_376,
}


def test_counts_on_bert_base() -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    found = {}
    for recipe in COUNTS:
        esp.attach(model, recipe, "a")
        found[recipe] = esp.account(model, "a").trained
        esp.detach(model, "a")
    assert found == COUNTS


def test_encoder_decoders_have_a_third_adapter_after_cross_attention() -> None:
    model = T5.make()
    esp.attach(model, HOULSBY, "a")
    each = 2 * 24 * 4 + 4 + 24
    assert esp.account(model, "a").trained == (2 * 2 + 2 * 3) * each


# --- AdapterDrop ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [HOULSBY, PFEIFFER, "LoRA(rank=2)"])
@pytest.mark.parametrize("case", [BERT, T5], ids=lambda case: case.name)
def test_skipping_all_layers_is_the_base_and_none_the_whole(case: Case, recipe: str) -> None:
    batch, name = case.batch(), "a"
    model = case.make()
    esp.attach(model, recipe, name, head=False)
    for p in esp.parameters(model):
        p.data.normal_(std=0.2)
    whole = logits(model, batch)
    esp.skip_layers(model, 2)
    assert torch.equal(logits(model, batch), logits(case.make(), batch))
    esp.skip_layers(model, 1)
    some = logits(model, batch)
    only = case.make()
    where = {HOULSBY: "attention.o@1-, ffn.out@1-", PFEIFFER: "block@1-"}
    where = where.get(recipe, "all-linear@1-")
    if recipe == HOULSBY and case is T5:
        where += ", cross.o@1-"
    esp.attach(only, recipe[:-1] + f", sites={where!r})", name, head=False)
    kept = dict(get(model, name).named())
    for label, value in get(only, name).named():
        value.copy_(kept[label])
    assert torch.equal(some, logits(only, batch))
    esp.skip_layers(model, 0, name)
    assert torch.equal(logits(model, batch), whole)
    esp.skip_layers(model, 1)
    esp.detach(model, name)
    now, then = snapshot(model), snapshot(case.make())
    assert now.keys() == then.keys()
    assert all(now[key] == then[key] for key in now if key.endswith((" dict", " class")))


def test_a_merge_leaves_skipped_layers_out() -> None:
    model, batch = adapted(LLAMA.make, "LoRA(rank=2)"), LLAMA.batch()
    esp.skip_layers(model, 1)
    expected = logits(model, batch)
    esp.merge(model)
    torch.testing.assert_close(logits(model, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [-1, True, 1.5])
def test_skip_layers_takes_a_whole_number(count: Any) -> None:
    with pytest.raises(SettingError, match="whole number"):
        esp.skip_layers(adapted(BERT.make, HOULSBY), count)


def test_robust_training_draws_the_layers_of_a_pass_with_torch() -> None:
    batch, drawn = LLAMA.batch(), set()
    model = adapted(LLAMA.make, ROBUST)
    whole = logits(model, batch)
    for seed in range(5):
        torch.manual_seed(seed)
        first = int(torch.randint(2, ()))
        drawn.add(first)
        esp.skip_layers(model, first)
        expected = logits(model, batch)
        esp.skip_layers(model, 0)
        model.train()
        torch.manual_seed(seed)
        with esp.plain_paths():  # as in evaluation, to the bit
            out = model(**batch)
        assert torch.equal(out.logits, expected)
        out.loss.backward()
        assert esp.dead_sites(model) == (["0/model.layers.0:block"] if first else [])
        for p in esp.parameters(model):
            p.grad = None
        model.eval()
        assert torch.equal(logits(model, batch), whole)
    assert drawn == {0, 1}


def test_robust_training_draws_every_depth_equally_often() -> None:
    from espalier.plain.bottleneck import Depth

    depth, counts = Depth(4), [0, 0, 0, 0]
    for _ in range(2000):
        depth.draw(training=True)
        counts[int(depth.skipped)] += 1
    assert min(counts) > 420
    depth.draw(training=False)
    assert depth.skipped == 0


# --- a life -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)
def test_attached_trained_saved_copied_and_taken_out(
    case: Case, recipe: str, tmp_path: Path
) -> None:
    model, batch = case.make(), case.batch()
    base, expected = base_values(model), logits(model, batch)
    before = snapshot(case.make())
    esp.attach(model, RECIPES[recipe], "mine")
    torch.testing.assert_close(logits(model, batch), expected, atol=3e-6, rtol=0)
    first = train(model, batch, steps=2)
    assert train(model, batch, steps=5) < first
    assert esp.dead_sites(model) == []
    assert all(torch.equal(value, base[name]) for name, value in base_values(model).items())
    trained = logits(model, batch)
    assert not torch.allclose(trained, expected, atol=1e-4)
    esp.save(model, "mine", tmp_path)
    fresh = case.make()
    esp.load(fresh, tmp_path, "mine")
    assert torch.equal(logits(fresh, batch), trained)
    twin = copy.deepcopy(model)
    train(twin, batch)
    assert torch.equal(logits(model, batch), trained)
    assert not torch.equal(logits(twin, batch), trained)
    esp.detach(model, "mine")
    after = snapshot(model)
    for seen in (before, after):
        for key in [key for key in seen if key.endswith(" identity")]:
            seen[key] = seen[key][2:]  # type: ignore[index]
    same(after, before)
    assert torch.equal(logits(model, batch), expected)


def test_starts_named_by_papers_are_near_the_identity_and_say_so() -> None:
    batch = BERT.batch()
    for init, sigma in (("bert", 0.02), ("houlsby", 0.0088)):  # cut at 2 σ, σ shrinks by 0.88
        method = esp.SerialAdapter(bottleneck=12, init=init)
        assert not method.identity
        model = BERT.make()
        esp.attach(model, method, "a")
        values = [t.flatten() for k, t in get(model, "a").named() if k.endswith(("/up", "/down"))]
        assert abs(float(torch.cat(values).std()) - sigma) < sigma / 20
        off = (logits(model, batch) - logits(BERT.make(), batch)).abs().max()
        assert 0 < float(off) < 1e-2
    assert esp.SerialAdapter().identity
    assert not esp.Compacter().identity


@pytest.mark.parametrize("recipe", [PFEIFFER, STREAM, ROBUST, COMPACTER])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", [BERT, LLAMA], ids=lambda case: case.name)
def test_checkpointing_gives_the_same_gradients_and_holds_nothing(
    case: Case, recipe: str, reentrant: bool
) -> None:
    def gradients(model: Any) -> list[Tensor]:
        torch.manual_seed(2)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.train()
        model(**case.batch()).loss.backward()
        return [p.grad for p in esp.parameters(model)]

    model = adapted(case.make, recipe)
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    torch.testing.assert_close(gradients(model), gradients(adapted(case.make, recipe)))
    assert not any(delta.seen for delta in get(model, "a").deltas)


@pytest.fixture
def counter() -> Iterator[CompileCounterWithBackend]:
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("case", "recipe"),
    [(BERT, PFEIFFER), (BERT, STREAM), (LLAMA, STREAM), (LLAMA, ROBUST), (LLAMA, COMPACTER)],
)
def test_one_graph(case: Case, recipe: str, counter: CompileCounterWithBackend) -> None:
    model, batch = adapted(case.make, recipe), case.batch()
    model.config.problem_type = "single_label_classification"  # else set in the first forward
    model.config.use_cache = False
    model.train(recipe == ROBUST)
    model(**batch)  # what trains fast stands in from the first pass in training on
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in (0, 1, 2, 3) if recipe == ROBUST else (0,):
        results = []
        for run in (compiled, model):
            torch.manual_seed(seed)
            out = run(**batch)
            out.loss.backward()
            results.append([out.logits.detach(), *(p.grad for p in esp.parameters(model))])
            for p in esp.parameters(model):
                p.grad = None
        torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    # The draw before each pass is a small graph of its own; nothing breaks the model's.
    assert counter.frame_count == (2 if recipe == ROBUST else 1)


@pytest.mark.parametrize("recipe", [*RECIPES.values(), ROBUST])
def test_a_bf16_base_stays_bf16_and_learns(recipe: str) -> None:
    model, batch = BERT.make().to(torch.bfloat16), BERT.batch()
    esp.attach(model, recipe, "a")
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=8) < first
    assert logits(model, batch).dtype == torch.bfloat16


@pytest.mark.parametrize("recipe", [PFEIFFER, STREAM])
@pytest.mark.parametrize("case", [GPT2, T5], ids=lambda case: case.name)
def test_cached_generation_equals_step_by_step(case: Case, recipe: str) -> None:
    model = adapted(case.make, recipe)
    ids = case.batch()["input_ids"][:1]
    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "min_new_tokens": 5}
    cached = model.generate(ids, use_cache=True, do_sample=False, **how)
    assert torch.equal(cached, model.generate(ids, use_cache=False, do_sample=False, **how))


def test_autocast_does_not_hide_the_norms() -> None:
    batch = LLAMA.batch()
    model = adapted(LLAMA.make, STREAM)
    expected = logits(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model, batch).float()
    other = logits(adapted(LLAMA.make, STREAM.replace("residual", "input")), batch)
    assert (found - expected).abs().max() < 0.2 * (other - expected).abs().max()


# --- refusals ---------------------------------------------------------------------------------

WRONG = {
    "SerialAdapter(style='pfeifer')": "style",
    "SerialAdapter(bottleneck=0)": "bottleneck",
    "SerialAdapter(reduction=0)": "reduction",
    "SerialAdapter(nonlinearity='rely')": "nonlinearity",
    "SerialAdapter(init='zero')": "init",
    "SerialAdapter(scale='learnt')": "scale",
    "SerialAdapter(dropout=1.0)": "dropout",
    "SerialAdapter(norms='yes')": "norms",
    "SerialAdapter(drop='some')": "drop",
    "ParallelAdapter(bottleneck=None)": "bottleneck",
    "ParallelAdapter(nonlinearity='auto')": "nonlinearity",
    "ParallelAdapter(reads='norm')": "reads",
    "ParallelAdapter(adds_to='head')": "adds_to",
    "ParallelAdapter(adds_to='heads', reads='residual')": "reads",
    "Compacter(p=0)": "p must be",
    "Compacter(rank=1.5)": "rank",
    "Compacter(bottleneck=6)": "a multiple of p = 4",
}


@pytest.mark.parametrize("recipe", WRONG)
def test_wrong_settings_are_named(recipe: str) -> None:
    with pytest.raises(SettingError, match=WRONG[recipe]):
        esp.attach(BERT.make(), recipe)


MISPLACED = {
    "SerialAdapter(sites='block')": r"stands after linear layers .*'block'",
    "SerialAdapter(style='pfeiffer', sites='ffn')": r"stands after whole layers .*'ffn'",
    "SerialAdapter(sites='norm')": "'norm'",
    "ParallelAdapter(sites='embedding')": "'embedding'",
    "ParallelAdapter(sites='block', reads='residual')": "no part of a layer",
    "ParallelAdapter(sites='ffn', adds_to='heads')": "has no heads",
    "Compacter(p=5)": "5.* does not divide .*24",
    "Compacter(sites='block')": "'block'",
}


@pytest.mark.parametrize("recipe", MISPLACED)
def test_places_where_they_cannot_stand_are_named(recipe: str) -> None:
    model = BERT.make()
    with pytest.raises(SiteError, match=MISPLACED[recipe]):
        esp.attach(model, recipe)
    assert list(model.state_dict()) == list(BERT.make().state_dict())


def test_a_feed_forward_part_in_pieces_hides_the_second_norm() -> None:
    model: Any = BERT.make()
    for layer in model.bert.encoder.layer:
        layer.chunk_size_feed_forward = 3
    for recipe in (PFEIFFER, STREAM):
        with pytest.raises(SiteError, match="chunk_size_feed_forward"):
            esp.attach(model, recipe)
    whole = logits(adapted(BERT.make, PARALLEL), BERT.batch())
    found = logits(adapted(lambda: model, PARALLEL), BERT.batch())
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=0)


def test_a_residual_stream_that_cannot_be_told_is_refused() -> None:
    class Halved(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x / 2)

    model: Any = LLAMA.make()
    for layer in model.model.layers:
        layer.mlp = Halved(layer.mlp)
    esp.attach(model, "ParallelAdapter(bottleneck=4, reads='residual')")
    with pytest.raises(SiteError, match="use reads='input'"):
        model(**LLAMA.batch())
