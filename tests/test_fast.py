"""Fast paths of training: the same values and gradients as the plain ones, for less."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as esp
from espalier.fast.drop import Drop
from espalier.fast.gated import act_of, gated
from espalier.fast.linear import Readers, Term, with_products
from espalier.fast.norm import Law, norm_law, rms_norm
from espalier.fast.quick import QuickFeed
from espalier.fast.rotary import rotating_twin
from graded import equal, graded, numbers, saved_bytes
from zoo import BY_NAME, undropped

RECIPES = (
    "LoRA(rank=4)",
    "LoRA(rank=4, rslora=True, bias='lora_only')",
    "LoRA(rank=4, freeze_a=True)",
    "LoRA(rank=4, init='pissa')",
    "LoRA(rank=4, dora=True)",
    "LoRA(rank=4, dora=True, init='pissa', bias='all')",
    "LoRA(rank=4, dora=True, freeze_a=True, sites='attention.q, attention.v')",
    "LoRA(rank=2, dora=True, sites='attention.q, ffn.*') + LoRA(rank=3, sites='all-linear')",
    "AdaLoRA(rank=4, target=2)",
    "LoRA(rank=4) + IA3() + PartialTuning(sites='norm')",
    "LoRA(rank=2) + LoRA(rank=3, sites='attention.q')",
    "SerialAdapter(bottleneck=4)",
    "PTuningV2(length=3)",
)


def shaken(model: nn.Module, seed: int = 1) -> nn.Module:
    """The model with trained numbers that are not those of a fresh adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in esp.parameters(model):
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def gradients(model: nn.Module, data: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one step, with the same dropout each time."""
    model.zero_grad()
    torch.manual_seed(5)
    loss = model(**data).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in esp.parameters(model) if p.grad is not None]


def both(model: nn.Module, data: dict[str, Any]) -> tuple[Any, Any]:
    """Loss and gradients by the fast paths and by the plain ones."""
    fast = gradients(model, data)
    with esp.plain_paths():
        return fast, gradients(model, data)


def agree(fast: Any, plain: Any, bound: float) -> None:
    """Loss and every gradient agree relative to the largest number in each."""
    assert fast[0].item() == pytest.approx(plain[0].item(), rel=bound)
    assert len(fast[1]) == len(plain[1]) > 0
    for ours, theirs in zip(fast[1], plain[1], strict=True):
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.filterwarnings("ignore:.*follows a schedule")
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_fast_paths_give_the_losses_and_gradients_of_the_plain_ones(
    family: str, recipe: str
) -> None:
    model = undropped(BY_NAME[family].make().train())
    esp.attach(model, recipe)
    agree(*both(shaken(model), BY_NAME[family].batch()), 5e-5)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_under_checkpointing_too(family: str, reentrant: bool) -> None:
    model = BY_NAME[family].make().train()
    esp.attach(model, "LoRA(rank=4, dropout=0.3)")
    shaken(model)
    whole = gradients(model, BY_NAME[family].batch())
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    agree(gradients(model, BY_NAME[family].batch()), whole, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_leaves_nothing_behind(reentrant: bool) -> None:
    model, data = BY_NAME["llama"].make().train(), BY_NAME["llama"].batch()
    esp.attach(model, "LoRA(rank=4)")
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    before = [weakref.ref(t) for t in gc.get_objects() if type(t) is Tensor]
    gradients(model, data)
    gc.collect()
    known = {id(ref()) for ref in before}
    states = [t for t in gc.get_objects() if type(t) is Tensor and t.dim() == 3 and t.requires_grad]
    assert not [t.shape for t in states if id(t) not in known]


def errors(model: nn.Module, data: dict[str, Any], fast: Any, plain: Any) -> tuple[float, float]:
    """How far gradients are from those in fp32, by the fast paths and by the plain ones."""
    with esp.plain_paths():
        truth = gradients(model.float(), data)

    def error(found: Any) -> float:
        pairs = zip(found[1], truth[1], strict=True)
        return sum(((a - b).norm() / b.norm()).item() for a, b in pairs)

    return error(fast), error(plain)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_over_a_bf16_base_they_are_as_near_to_the_truth_as_the_plain_ones(family: str) -> None:
    model, data = undropped(BY_NAME[family].make()).to(torch.bfloat16), BY_NAME[family].batch()
    esp.attach(model.train(), "LoRA(rank=4)")
    ours, theirs = errors(model, data, *both(shaken(model), data))
    assert ours < 1.5 * theirs < 0.5


def fused(model: nn.Module, data: dict[str, Any]) -> dict[torch.dtype, int]:
    """How many linears a step computes as one function with their products, by type."""
    found: dict[torch.dtype, int] = {}

    def look(_module: nn.Module, _args: Any, y: Tensor) -> None:
        if type(y.grad_fn).__name__.startswith("_Linear"):
            found[y.dtype] = found.get(y.dtype, 0) + 1

    kinds = (m for m in model.modules() if type(m).__name__ in ("Linear", "Conv1D"))
    hooks = [m.register_forward_hook(look) for m in kinds]
    gradients(model, data)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("recipe", ["LoRA(rank=4)", "LoRA() + LoRA(rank=3, sites='attention.q')"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_under_autocast_they_are_as_near_to_the_truth_as_the_plain_ones(
    family: str, base: torch.dtype, recipe: str
) -> None:
    data, found = BY_NAME[family].batch(), []
    for seed in range(1, 6):  # where a norm's input is nearly even, rounding alone says little
        model = undropped(BY_NAME[family].make()).to(base).train()
        esp.attach(model, recipe)
        shaken(model, seed)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(model, data).keys() == {torch.bfloat16}
            fast, plain = both(model, data)
        assert fast[0].item() == pytest.approx(plain[0].item(), rel=5e-3)
        found.append(errors(model, data, fast, plain))
    ours, theirs = (median(each) for each in zip(*found, strict=True))
    assert ours < 2 * theirs < 0.7


def test_a_base_in_fp64_trains() -> None:
    model, data = BY_NAME["llama"].make().double().train(), BY_NAME["llama"].batch()
    esp.attach(model, "LoRA(rank=4, dora=True)")
    agree(*both(shaken(model), data), 1e-6)


def test_evaluation_takes_the_plain_paths() -> None:
    model = BY_NAME["llama"].make().eval()
    before = model(**BY_NAME["llama"].batch()).logits
    esp.attach(model, "LoRA(rank=4)")
    gradients(model.train(), BY_NAME["llama"].batch())  # stands everything in
    assert torch.equal(model.eval()(**BY_NAME["llama"].batch()).logits, before)


def test_detaching_takes_every_stand_in_away() -> None:
    model = BY_NAME["llama"].make().to(torch.bfloat16).train()
    before = {path: set(module.__dict__) for path, module in model.named_modules()}
    esp.attach(model, "LoRA(rank=4)")
    gradients(model, BY_NAME["llama"].batch())
    assert "forward" in model.model.norm.__dict__
    esp.detach(model, "default")
    assert {path: set(module.__dict__) for path, module in model.named_modules()} == before


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.75), (torch.bfloat16, 0.6)])
def test_less_is_kept_for_backward(dtype: torch.dtype, share: float) -> None:
    model = BY_NAME["llama"].make().to(dtype).train()
    esp.attach(model, "LoRA(rank=2)")
    data = BY_NAME["llama"].batch()
    gradients(model, data)
    with esp.plain_paths():
        plain = saved_bytes(model, data)
    assert saved_bytes(model, data) < share * plain


def test_a_stretch_keeps_little_more_than_a_product() -> None:
    kept = {}
    for recipe in ("LoRA(rank=4)", "LoRA(rank=4, dora=True)"):
        model = BY_NAME["llama"].make().train()
        esp.attach(model, recipe)
        data = {"input_ids": torch.arange(128).view(2, 64) % 50}
        kept[recipe] = saved_bytes(model, {**data, "labels": data["input_ids"]})
    plain, stretched = kept.values()
    assert plain < stretched < 1.35 * plain


def test_lengths_of_rows_are_measured_again_where_the_weight_changed() -> None:
    model, data = BY_NAME["llama"].make().train(), BY_NAME["llama"].batch()
    esp.attach(model, "LoRA(rank=4, dora=True)")
    gradients(shaken(model), data)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data *= 3  # leaves no trace
    agree(*both(model, data), 5e-5)
    weights = {name: 0.5 * value for name, value in model.state_dict().items() if "proj" in name}
    model.load_state_dict(weights, strict=False)
    agree(*both(model, data), 5e-5)
    esp.attach(model, "LoRA(rank=2)", "other")
    shaken(model)
    esp.merge(model, "other")
    esp.unmerge(model)
    esp.activate(model, "default")
    agree(*both(model, data), 5e-5)


# -- one function at a time ------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_linear_with_two_products_is_its_formula(share: float) -> None:
    torch.manual_seed(0)
    drop, readers = Drop(), Readers()
    x, w, c = numbers(2, 5, 6), numbers(7, 6, grad=False), numbers(7)
    a, b, a2, b2 = numbers(3, 6), numbers(7, 3), numbers(2, 6, grad=False), numbers(4, 2)

    def ours(x: Tensor, c: Tensor, a: Tensor, b: Tensor, b2: Tensor) -> Tensor:
        terms = [Term(a, b, 0.5, share, 9, slice(None)), Term(a2, b2, 2.0, 0.0, 0, slice(1, 5))]
        return with_products(x, w, c, terms, drop, readers)

    def theirs(x: Tensor, c: Tensor, a: Tensor, b: Tensor, b2: Tensor) -> Tensor:
        mask = drop(torch.ones(10, 6, dtype=torch.float64), share, 9).view(2, 5, 6)
        y = F.linear(x, w, c) + 0.5 * (x * mask) @ a.T @ b.T
        return y + F.pad(2.0 * x @ a2.T @ b2.T, (1, 2))

    inputs = [x, c, a, b, b2]
    equal(graded(ours, inputs), graded(theirs, inputs))


@pytest.mark.parametrize("after", ["", "written", "nothing"])
@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("columns", [slice(None), slice(1, 5)])
def test_a_stretched_product_is_its_formula(columns: slice, keeps: bool, after: str) -> None:
    torch.manual_seed(0)
    width = len(range(7)[columns])
    x, w, c = numbers(2, 5, 6), numbers(7, 6, grad=False), numbers(7)
    a, b, sigma = numbers(3, 6), numbers(width, 3), numbers(width)
    a2, b2 = numbers(2, 6), numbers(2, 2)
    if after == "nothing":  # of which what is kept cannot tell
        with torch.no_grad():
            sigma[0] = -1

    def ours(x: Tensor, c: Tensor, a: Tensor, b: Tensor, sigma: Tensor, b2: Tensor) -> Tensor:
        terms = [Term(a, b, 0.5, 0.0, 0, columns, sigma)]
        if columns != slice(None):
            terms.append(Term(a2, b2, 2.0, 0.0, 0, slice(5, 7)))
        y = with_products(x, w, c, terms, Drop(), Readers(), keeps)
        return y.mul_(3) if after == "written" else y

    def theirs(x: Tensor, c: Tensor, a: Tensor, b: Tensor, sigma: Tensor, b2: Tensor) -> Tensor:
        z = x @ w.T
        parts = [z[..., columns] + 0.5 * x @ a.T @ b.T]
        parts[0] = parts[0] + sigma * parts[0]
        if columns != slice(None):
            parts = [z[..., :1], *parts, z[..., 5:] + 2.0 * x @ a2.T @ b2.T]
        y = torch.cat(parts, -1) + c
        return 3 * y if after == "written" else y

    inputs = [x, c, a, b, sigma] + ([b2] if columns != slice(None) else [b2.detach()])
    equal(graded(ours, inputs), graded(theirs, inputs))


def test_linears_that_read_one_tensor_add_up_its_gradient() -> None:
    torch.manual_seed(0)
    drop, readers = Drop(), Readers()
    x, b = numbers(4, 6), numbers(6, 2)
    weights = [numbers(6, 6, grad=False) for _ in range(3)]
    a = numbers(2, 6)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        terms = [Term(a, b, 1.0, 0.0, 0, slice(None))]
        return x + sum(with_products(x, w, None, terms, drop, readers) for w in weights)

    def theirs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x + sum(x @ w.T + x @ a.T @ b.T for w in weights)

    equal(graded(ours, [x, a, b]), graded(theirs, [x, a, b]))


class Norm(nn.Module):
    """A norm that centres, as root mean square norms do not."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), self.weight, None, self.eps)


def test_only_what_computes_a_root_mean_square_norm_is_taken_for_one() -> None:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x = torch.randn(5, 8)
    assert norm_law(Norm(), x) is None
    assert norm_law(nn.LayerNorm(8), x) is None
    for kind, offset in ((LlamaRMSNorm, 0.0), (GemmaRMSNorm, 1.0)):
        module = kind(8, eps=1e-3)
        nn.init.normal_(module.weight)
        law = norm_law(module, x)
        assert law is not None
        assert (law.eps, law.offset) == (1e-3, offset)
        weight = module.weight.detach()
        ours = graded(lambda x: rms_norm(x, weight, law), [x.requires_grad_()])  # noqa: B023
        equal(ours, graded(module, [x]), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_norm_computes_does_not_depend_on_what_it_is_given_first(dtype: torch.dtype) -> None:
    from transformers.models.cohere.modeling_cohere import CohereLayerNorm
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    centred = CohereLayerNorm(1024).to(dtype)
    assert norm_law(centred, torch.randn(2, 1024).to(dtype)) is None  # all but centred
    law = norm_law(GemmaRMSNorm(16).to(dtype), torch.zeros(3, 16, dtype=dtype))
    assert law is not None
    assert law.offset == 1


def test_what_was_made_and_then_written_to_is_kept_as_it_is() -> None:
    torch.manual_seed(0)
    w, out = torch.rand(6), numbers(7, 6, grad=False).float()
    law = Law(1e-6, 0.0, False)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        normed = rms_norm(x, w, law).mul_(2)
        terms = [Term(a, b, 1.0, 0.0, 0, slice(None))]
        return with_products(normed, out, None, terms, Drop(), Readers())

    def theirs(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        normed = 2 * F.rms_norm(x, (6,), w, 1e-6)
        return normed @ out.T + normed @ a.T @ b.T

    inputs = [torch.randn(*shape, requires_grad=True) for shape in ((4, 6), (2, 6), (7, 2))]
    equal(graded(ours, inputs), graded(theirs, inputs), 1e-5)


class Odd(nn.Module):
    """Not quite a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.a(x)) * self.b(x)) + 1e-3 * x


def test_only_a_gated_feed_forward_is_taken_for_one() -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    names = ("gate_proj", "up_proj", "down_proj")
    config = BY_NAME["llama"].make().config
    assert act_of(LlamaMLP(config), names) == "silu"
    config.hidden_act = "gelu_pytorch_tanh"
    assert act_of(LlamaMLP(config), names) == "gelu_tanh"
    assert act_of(LlamaMLP(config), (names[1], names[0], names[2])) is None
    assert act_of(Odd(), ("a", "b", "c")) is None


def test_trying_a_feed_forward_draws_no_number_and_calls_no_hook() -> None:
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    config: Any = BY_NAME["t5"].make().config
    config.dropout_rate, config.dense_act_fn = 0.5, "gelu_new"
    module = T5DenseGatedActDense(config).train()
    seen: list[Any] = []
    module.register_forward_hook(lambda *call: seen.append(call))
    before = torch.get_rng_state()
    assert act_of(module, ("wi_0", "wi_1", "wo")) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert not seen


def test_a_feed_forward_whose_parts_differ_in_type_casts_between_them() -> None:
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    config: Any = BY_NAME["t5"].make().config
    config.dropout_rate, config.dense_act_fn = 0.0, "gelu_new"
    module = T5DenseGatedActDense(config).to(torch.bfloat16).train()
    quick, x = QuickFeed("wi_0", "wi_1", "wo"), torch.randn(3, config.d_model).bfloat16()
    assert quick(module, x) is not None
    module.wo.float()  # as T5 keeps it in 16 bits
    assert quick(module, x) is None


@pytest.mark.parametrize(("act", "plain"), [("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu)])
def test_the_gated_product_is_its_formula(act: str, plain: Callable[[Tensor], Tensor]) -> None:
    inputs = [numbers(3, 5), numbers(3, 5)]
    equal(graded(lambda g, u: gated(g, u, act), inputs), graded(lambda g, u: plain(g) * u, inputs))


def test_only_a_rotation_of_halves_is_replaced() -> None:
    from transformers.models.glm.modeling_glm import GlmAttention
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert rotating_twin(LlamaAttention) is not None
    assert rotating_twin(GlmAttention) is None  # it rotates neighbours


def test_a_decorator_with_a_name_that_is_not_bound_is_seen_through() -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    def decorated(inner: Callable[..., Any]) -> Callable[..., Any]:
        later: Any

        @functools.wraps(inner)
        def outer(*args: Any, **kwargs: Any) -> Any:
            return inner(*args, **kwargs) or later  # noqa: F821 (never bound)

        return outer

    owner = type("Owner", (), {"forward": decorated(LlamaAttention.forward)})
    assert rotating_twin(owner) is not None


def test_a_forward_that_was_replaced_has_no_twin_of_the_old_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers.models.llama.modeling_llama import LlamaAttention

    assert rotating_twin(LlamaAttention) is not None
    monkeypatch.setattr(LlamaAttention, "forward", lambda self, x: x)
    assert rotating_twin(LlamaAttention) is None


def read_twice(x: Tensor, readers: Readers, w: Tensor, b: Tensor) -> Tensor:
    """Two linears that read x, each with a product whose A is fixed."""
    terms = [Term(torch.ones(2, 6, dtype=x.dtype), b, 1.0, 0.0, 0, slice(None))]
    once, again = (with_products(x, w, None, terms, Drop(), readers) for _ in range(2))
    return once + again.square()


def test_a_gradient_asked_for_alone_leaves_nothing_to_the_next_pass() -> None:
    torch.manual_seed(0)
    x, w, b = numbers(4, 6), numbers(6, 6, grad=False), numbers(6, 2)
    out = read_twice(x * 1, Readers(), w, b).sum()
    torch.autograd.grad(out, b, retain_graph=True)  # the linears run, what they read does not
    (whole,) = torch.autograd.grad(out, x)
    (alone,) = torch.autograd.grad(read_twice(x * 1, Readers(), w, b).sum(), x)
    equal([whole], [alone])


def test_what_was_read_without_a_graph_is_read_anew_with_one() -> None:
    torch.manual_seed(0)
    w, b = numbers(6, 6, grad=False), numbers(6, 2)
    inputs, readers = numbers(4, 6), Readers()
    x = inputs * 1
    with torch.no_grad():
        read_twice(x, readers, w, b)
    (ours,) = torch.autograd.grad(read_twice(x, readers, w, b).sum(), inputs)
    (alone,) = torch.autograd.grad(read_twice(inputs * 1, Readers(), w, b).sum(), inputs)
    equal([ours], [alone])


def test_a_linear_without_rows_has_gradients_of_zero() -> None:
    x, w, b = numbers(0, 6), numbers(6, 6, grad=False), numbers(6, 2)
    found = torch.autograd.grad(read_twice(x, Readers(), w, b).sum(), [x, b])
    assert found[0].shape == (0, 6)
    assert not found[1].any()
