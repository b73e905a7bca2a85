"""LoRA's family: DoRA, PiSSA, LoRA-FA, LoRA+ and rsLoRA against formulas by hand and peft."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import espalier as esp
from espalier.errors import CheckpointError, SettingError, SiteError
from espalier.shipped import demo_model
from zoo import BY_NAME, Case, logits, train

FAMILY = {
    "dora": "LoRA(rank=3, alpha=7, dora=True)",
    "dora-rs": "LoRA(rank=3, alpha=7, dora=True, rslora=True, bias='lora_only')",
    "dora-fa": "LoRA(rank=3, alpha=7, dora=True, freeze_a=True)",
    "dora-pissa": "LoRA(rank=3, alpha=7, dora=True, init='pissa')",
    "dora-slices": "LoRA(rank=3, alpha=7, dora=True, sites='attention.q, attention.v')",
    "pissa": "LoRA(rank=3, alpha=7, init='pissa')",
    "pissa-rs": "LoRA(rank=3, alpha=7, init='pissa_niter_2', rslora=True)",
    "pissa-slices": "LoRA(rank=3, init='pissa', sites='attention.q, attention.v')",
    "fa": "LoRA(rank=3, alpha=7, freeze_a=True, init='orthogonal')",
    "plus": "LoRA(rank=3, alpha=7, plus=16, init='gaussian')",
}
CASES = [BY_NAME[name] for name in ("bert", "gpt2", "llama")]
EVERY = pytest.mark.parametrize("recipe", FAMILY.values(), ids=FAMILY)
ON = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def moved(case: Case, recipe: str, name: str = "mine", size: float = 0.1, **how: Any) -> nn.Module:
    """A model with an adapter whose trained numbers are all away from their start."""
    model = case.make()
    esp.attach(model, recipe, name, **how)
    shake(model, size)
    return model


def shake(model: nn.Module, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(5)
    for p in esp.parameters(model):
        p.data.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def numbers(model: nn.Module, name: str = "mine") -> dict[str, Tensor]:
    """Every number of an adapter by its label without the method's place in the recipe."""
    adapter = model.get_submodule(f"espalier.@{name}")
    return {label.partition("/")[2]: value for label, value in adapter.named()}


def gradients(model: nn.Module, name: str = "mine") -> dict[str, Tensor]:
    adapter = model.get_submodule(f"espalier.@{name}")
    return {
        slot.label.partition("/")[2]: slot.of(flat.grad)
        for kind, flat in adapter.flat.items()
        for slot in adapter.slots[kind]
    }


class One(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


# ----------------------------------------------------------------------------------- every member


@ON
@EVERY
def test_fresh_is_exact_detach_too_and_training_reaches_every_number(
    case: Case, recipe: str
) -> None:
    model, batch = case.make(), case.batch()
    before = logits(model, batch)
    esp.attach(model, recipe, "mine", head=False)
    assert torch.equal(logits(model, batch), before)
    base = {n: p.clone() for n, p in model.named_parameters() if "espalier" not in n}
    start = {label: value.clone() for label, value in numbers(model).items()}
    train(model, batch, steps=3)
    changed = {label for label, value in numbers(model).items() if not value.equal(start[label])}
    kept = {label for label in start if label.endswith(("/a0", "/b0"))}
    if "freeze_a" in recipe:
        kept |= {label for label in start if label.endswith("/a")}
    assert changed == set(start) - kept
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    esp.detach(model, "mine")
    assert torch.equal(logits(model, batch), before)


@ON
@EVERY
def test_merged_equals_unmerged_whole_and_weighted(case: Case, recipe: str) -> None:
    model, batch = moved(case, recipe), case.batch()
    expected = logits(model, batch)
    assert not torch.allclose(expected, logits(case.make(), batch), atol=1e-2)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=2e-5)
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)
    if "bias" not in recipe:
        esp.activate(model, {"mine": 0.4})
        expected = logits(model, batch)
        esp.merge(model)
        assert torch.allclose(logits(model, batch), expected, atol=2e-5)


@ON
@EVERY
def test_saved_and_loaded_outputs_are_identical(case: Case, recipe: str, tmp_path: Path) -> None:
    model, batch = moved(case, recipe), case.batch()
    esp.save(model, "mine", tmp_path)
    fresh = case.make()
    esp.load(fresh, tmp_path, "again")
    assert torch.equal(logits(fresh, batch), logits(model, batch))


@ON
@EVERY
def test_peft_reads_what_we_write(case: Case, recipe: str, tmp_path: Path) -> None:
    model, batch = moved(case, recipe), case.batch()
    esp.save(model, "mine", tmp_path, format="peft")
    other = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()
    assert torch.allclose(logits(other, batch), logits(model, batch), atol=2e-5)
    named = peft.get_peft_model_state_dict(other)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) <= set(named)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] is ("dora" in recipe)
    back = case.make()
    esp.load(back, tmp_path, "again")
    assert torch.allclose(logits(back, batch), logits(model, batch), atol=1e-5)


@ON
@EVERY
def test_the_plain_form_serves_the_same(case: Case, recipe: str) -> None:
    model, batch = moved(case, recipe), case.batch()
    expected = logits(model, batch)
    rich = esp.recipe(recipe).plain() != esp.recipe(recipe)
    assert rich == any(word in recipe for word in ("pissa", "freeze_a"))
    assert esp.to_plain(model, "mine") == rich
    assert torch.allclose(logits(model, batch), expected, atol=2e-5)
    assert not any(label.endswith(("/a0", "/b0")) for label in numbers(model))
    assert not model.get_submodule("espalier.@mine")._buffers


def tiny_llama(layers: int = 1) -> nn.Module:
    torch.manual_seed(7)
    config = tf.LlamaConfig(
        hidden_size=32, num_hidden_layers=layers, intermediate_size=64, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=96, use_cache=False,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).train()


def text() -> dict[str, Tensor]:
    ids = torch.randint(0, 96, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def step(run: Callable[..., Any], model: nn.Module) -> list[Tensor]:
    for p in esp.parameters(model):
        p.grad = None
    out = run(**text())
    out.loss.backward()
    return [out.logits.detach(), *(p.grad.clone() for p in esp.parameters(model))]


@pytest.mark.parametrize("recipe", ["dora", "dora-pissa", "pissa", "fa"])
def test_compiled_whole_without_a_break(recipe: str) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    esp.attach(model, FAMILY[recipe], "mine")
    shake(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(compiled, model), step(model, model))
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["dora", "dora-pissa", "pissa", "fa"])
def test_checkpointed_gradients_are_the_same(recipe: str) -> None:
    model = tiny_llama(2)
    esp.attach(model, FAMILY[recipe], "mine")
    shake(model)
    expected = step(model, model)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.testing.assert_close(step(model, model), expected)


@pytest.mark.parametrize("recipe", ["dora", "dora-pissa", "dora-rs", "pissa", "fa"])
def test_over_a_bf16_base_fresh_is_exact_and_it_learns(recipe: str) -> None:
    case = BY_NAME["bert"]
    model, batch = case.make().to(torch.bfloat16), case.batch()
    before = logits(model, batch)
    esp.attach(model, FAMILY[recipe], "mine", head=False)
    assert torch.equal(logits(model, batch), before)
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=12) < first
    mixed = logits(model, batch)
    assert mixed.dtype == torch.bfloat16
    model.float()
    assert torch.allclose(mixed.float(), logits(model, batch), atol=3e-2)


# -------------------------------------------------------------------------------------------- DoRA


def linear(dtype: torch.dtype = torch.float64) -> One:
    torch.manual_seed(2)
    return One(nn.Linear(7, 5, dtype=dtype))


def dense(w: Tensor, c: Tensor, t: dict[str, Tensor], s: float, rho: Tensor | None = None) -> Any:
    """DoRA written out: the weight, the lengths before, and a forward function."""
    direction = w + s * t["layer/b"] @ t["layer/a"]
    rho = direction.norm(dim=1) if rho is None else rho
    m = w.norm(dim=1) + t["layer/m"]
    return lambda x: F.linear(x, (m / rho).unsqueeze(1) * direction, c), rho


def test_dora_is_its_formula_and_its_gradient_holds_the_norm_fixed() -> None:
    model = linear()
    w, c = model.layer.weight.detach().clone(), model.layer.bias.detach().clone()
    esp.attach(model, "LoRA(rank=2, alpha=6, dora=True)", "mine", head=False, dtype=torch.float64)
    shake(model, 0.3)
    x = torch.randn(4, 7, dtype=torch.float64)
    t = {label: value.clone() for label, value in numbers(model).items()}
    forward, rho = dense(w, c, t, 3.0)
    torch.testing.assert_close(model(x).detach(), forward(x))
    model(x).square().sum().backward()
    for label, grad in gradients(model).items():
        for at in range(grad.numel()):
            values = []
            for sign in (1, -1):
                near = {key: value.clone() for key, value in t.items()}
                near[label].view(-1)[at] += sign * 1e-6
                values.append(dense(w, c, near, 3.0, rho)[0](x).square().sum())
            expected = (values[0] - values[1]) / 2e-6
            torch.testing.assert_close(grad.view(-1)[at], expected, rtol=1e-6, atol=1e-6)


def test_dora_makes_no_matrix_of_the_weight_s_size() -> None:
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            weight = model.layer.weight.untyped_storage().data_ptr()
            for one in out if isinstance(out, tuple | list) else (out,):
                if isinstance(one, Tensor) and one.untyped_storage().data_ptr() != weight:
                    largest = max(largest, one.numel())
            return out

    model = One(nn.Linear(64, 48))
    esp.attach(model, "LoRA(rank=2, dora=True)", "mine", head=False)
    x = torch.randn(3, 64, requires_grad=True)
    with Watch():
        model(x).sum().backward()
    assert largest < 64 * 48 // 4


def test_dora_leaves_rows_of_zeros_alone_and_finite() -> None:
    model = linear(dtype=torch.float32)
    with torch.no_grad():
        model.layer.weight[1] = 0
    x = torch.randn(4, 7)
    before = model(x).detach()
    esp.attach(model, "LoRA(rank=2, dora=True)", "mine", head=False)
    assert torch.equal(model(x), before)
    for _ in range(2):
        model(x).square().sum().backward()
        for p in esp.parameters(model):
            assert p.grad is not None
            assert p.grad.isfinite().all()
            p.data.sub_(0.01 * p.grad)
            p.grad = None
    assert model(x).isfinite().all()


DORA = {
    "bert": ["query", "value", "output.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "down_proj"],
}


def their_dora(case: Case, **settings: Any) -> nn.Module:
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_dora=True, target_modules=DORA[case.name],
        modules_to_save=["classifier"] if case.has_new_head else None, **settings,
    )  # fmt: skip
    model = peft.get_peft_model(case.make(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1 + 0.1 * torch.randn_like(p)).add_(0.1 * torch.randn_like(p))
    return model.eval()


@ON
@pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "bias": "lora_only"}], ids=str)
def test_dora_from_peft_gives_outputs_gradients_and_merged_weights(
    case: Case, settings: dict[str, Any], tmp_path: Path
) -> None:
    other, batch = their_dora(case, **settings), case.batch()
    other.save_pretrained(tmp_path)
    ours = case.make()
    esp.load(ours, tmp_path, "mine", trainable=True)
    expected = logits(other, batch)
    assert torch.allclose(logits(ours, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(case.make(), batch), expected, atol=1e-2)
    other(**batch).loss.backward()
    ours(**batch).loss.backward()
    mine = gradients(ours)
    compared = 0
    for name, p in other.named_parameters():
        if ".lora_" in name:
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            key = {"A": "a", "B": "b", "m": "m"}[rest[0]]
            assert torch.allclose(mine[f"{path}/{key}"], p.grad, atol=1e-5), name
            compared += 1
    assert compared == 3 * sum(1 for name in mine if name.endswith("/b"))
    esp.merge(ours)
    merged = other.merge_and_unload().state_dict()
    for name, value in ours.state_dict().items():
        if not name.startswith("espalier"):
            assert torch.allclose(value, merged[name], atol=1e-5), name


def test_dora_drops_what_peft_drops(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    other, batch = their_dora(case, lora_dropout=0.4), case.batch()
    other.save_pretrained(tmp_path)
    ours = case.make()
    esp.load(ours, tmp_path, "mine", trainable=True)
    outputs = []
    for model in (ours, other):
        torch.manual_seed(11)
        outputs.append(model.train()(**batch).logits)
    assert torch.allclose(*outputs, atol=1e-5)
    assert not torch.allclose(outputs[0], logits(other.eval(), batch), atol=1e-3)


def test_dora_and_lora_on_slices_of_one_layer_reach_peft(tmp_path: Path) -> None:
    case = BY_NAME["gpt2"]
    parts = "LoRA(rank=2, sites='attention.q') + LoRA(rank=3, dora=True, sites='attention.v')"
    model, batch = moved(case, parts), case.batch()
    esp.save(model, "mine", tmp_path, format="peft")
    other = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()
    assert torch.allclose(logits(other, batch), logits(model, batch), atol=1e-5)
    stacked = moved(case, "LoRA(rank=2) + LoRA(rank=3, dora=True)")
    with pytest.raises(CheckpointError, match="on the same rows, one of them DoRA's"):
        esp.save(stacked, "mine", tmp_path, format="peft")
    tables = moved(case, "LoRA(sites='embedding') + LoRA(dora=True)")
    with pytest.raises(CheckpointError, match="wte is a embedding"):
        esp.save(tables, "mine", tmp_path, format="peft")


@ON
@pytest.mark.parametrize(
    "parts",
    [
        "LoRA(rank=2) + LoRA(rank=3, alpha=7, dora=True)",
        "LoRA(rank=3, dora=True) + LoRA(rank=2, init='pissa')",
        "IA3() + LoRA(rank=3, alpha=7, dora=True)",
        "LoRA(rank=3, dora=True) + IA3()",
        "LoRA(rank=3, dora=True, bias='all')",
    ],
)
def test_in_a_sum_merged_equals_unmerged(case: Case, parts: str) -> None:
    model, batch = moved(case, parts), case.batch()
    expected = logits(model, batch)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=3e-5)


def test_two_adapters_are_active_together() -> None:
    case = BY_NAME["llama"]
    model, batch = moved(case, FAMILY["dora"], "one"), case.batch()
    esp.attach(model, FAMILY["pissa"], "two")
    shake(model, 0.2)
    esp.activate(model, {"one": 0.7, "two": 0.5})
    expected = logits(model, batch)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=2e-5)


def test_trained_biases_are_not_stretched_over_a_bf16_base() -> None:
    model = linear(dtype=torch.float32).to(torch.bfloat16)
    esp.attach(model, "LoRA(rank=2, dora=True, bias='lora_only')", "mine", head=False)
    with torch.no_grad():
        for label, value in numbers(model).items():
            value.fill_(3.0 if label.endswith("bias") else 0.0)
        numbers(model)["layer/m"].copy_(-model.layer.weight.float().norm(dim=1))  # m = 0
    out = model(torch.randn(4, 7, dtype=torch.bfloat16))
    assert torch.allclose(out.float(), torch.full((4, 5), 3.0), atol=2e-2)


# ------------------------------------------------------------------------------------------- PiSSA


def test_pissa_starts_at_the_leading_singular_directions() -> None:
    model = One(nn.Linear(12, 9))
    w = model.layer.weight.detach().clone()
    esp.attach(model, "LoRA(rank=4, alpha=6, init='pissa')", "mine", head=False)
    t, s = numbers(model), 6 / 4
    principal = s * t["layer/b0"] @ t["layer/a0"]
    u, sigma, vt = torch.linalg.svd(w)
    torch.testing.assert_close(principal, u[:, :4] @ torch.diag(sigma[:4]) @ vt[:4])
    torch.testing.assert_close(torch.linalg.svdvals(w - principal)[:5], sigma[4:9])
    torch.testing.assert_close(t["layer/a0"].norm(dim=1), t["layer/b0"].norm(dim=0))
    assert not t["layer/a"].any()
    assert not t["layer/b"].any()


def test_fast_pissa_comes_close_to_the_full_decomposition() -> None:
    model = One(nn.Linear(60, 40, bias=False))
    with torch.no_grad():  # a spectrum that falls
        model.layer.weight.copy_(torch.linalg.qr(torch.randn(40, 40))[0] @ torch.randn(40, 60))
        model.layer.weight.mul_(0.7 ** torch.arange(40).unsqueeze(1))
    found = []
    for start in ("pissa", "pissa_niter_8"):
        esp.attach(model, f"LoRA(rank=3, init={start!r})", start, head=False)
        t = numbers(model, start)
        found.append(t["layer/b0"] @ t["layer/a0"])
    assert torch.allclose(*found, atol=1e-4 * float(found[0].abs().max()))


@ON
def test_pissa_trained_equals_peft_s_on_its_rewritten_base(case: Case) -> None:
    batch = case.batch()
    ours = case.make()
    roles = {"bert": "*.query", "gpt2": "*.c_attn", "llama": "*.q_proj"}[case.name]
    esp.attach(ours, f"LoRA(rank=3, alpha=7, init='pissa', sites='{roles}')", "mine", head=False)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, init_lora_weights="pissa", target_modules=[roles[2:]],
        fan_in_fan_out=case.name == "gpt2",
    )  # fmt: skip
    other = peft.get_peft_model(case.make(), config).eval()
    assert torch.allclose(logits(other, batch), logits(ours, batch), atol=1e-5)
    theirs = {n: p for n, p in other.named_parameters() if ".lora_" in n}
    t = numbers(ours)
    for name, p in theirs.items():
        path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        start = t[f"{path}/{rest[0].lower()}0"]
        assert torch.allclose(start.abs(), p.abs(), atol=1e-5), name
    train(ours, batch)
    with torch.no_grad():
        for name, p in theirs.items():
            path, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
            key = rest[0].lower()
            p.copy_(t[f"{path}/{key}0"] + t[f"{path}/{key}"])
    assert torch.allclose(logits(other, batch), logits(ours, batch), atol=1e-5)


def test_pissa_goes_to_peft_as_twice_the_rank_and_needs_no_other_base(tmp_path: Path) -> None:
    model = moved(BY_NAME["bert"], "LoRA(rank=3, alpha=7, init='pissa', sites='attention.q')")
    esp.save(model, "mine", tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 14, True)
    plain = esp.recipe("LoRA(rank=3, alpha=7, init='pissa', rslora=True)").plain().methods[0]
    assert plain.rank == 6
    assert plain.scale == pytest.approx(7 / 3**0.5)


def test_pissa_on_a_convolution() -> None:
    model = One(nn.Conv2d(4, 6, 3, padding=1))
    x = torch.randn(2, 4, 8, 8)
    before = model(x).detach()
    recipe = "LoRA(rank=2, alpha=3, init='pissa', sites='conv')"
    esp.attach(model, recipe, "mine", head=False)
    assert torch.equal(model(x), before)
    t = numbers(model)
    top = torch.linalg.svdvals(model.layer.weight.detach().flatten(1))[:2]
    made = 1.5 * t["layer/b0"].flatten(1) @ t["layer/a0"].flatten(1)
    torch.testing.assert_close(torch.linalg.svdvals(made)[:2], top)
    shake(model)
    expected = model(x).detach()
    esp.merge(model)
    assert torch.allclose(model(x), expected, atol=1e-5)


def test_pissa_refuses_more_directions_than_there_are() -> None:
    with pytest.raises(SiteError, match="9 × 12 has 9 singular directions"):
        esp.attach(One(nn.Linear(12, 9)), "LoRA(rank=10, init='pissa')", head=False)


def test_over_four_bits_the_dequantised_weight_counts() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    packed = One(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32))
    packed.layer.weight = bnb.nn.Params4bit(
        torch.randn(64, 64) / 8, requires_grad=False, quant_type="nf4"
    ).to("cpu")
    w = bnb.functional.dequantize_4bit(packed.layer.weight.data, packed.layer.weight.quant_state)
    plain = One(nn.Linear(64, 64))
    plain.load_state_dict({"layer.weight": w.float(), "layer.bias": packed.layer.bias.detach()})
    x = torch.randn(3, 64)
    for recipe in (FAMILY["dora"], FAMILY["pissa"]):
        for model in (packed, plain):
            torch.manual_seed(1)
            esp.attach(model, recipe, recipe, head=False)
            shake(model)
        assert torch.allclose(packed(x), plain(x), atol=1e-4)


# ------------------------------------------------------------------------- LoRA-FA, LoRA+, rsLoRA


def test_frozen_a_gives_b_the_gradient_that_lora_gives_it() -> None:
    case = BY_NAME["bert"]
    found = {}
    for name, recipe in (("fa", "LoRA(rank=3, freeze_a=True)"), ("lora", "LoRA(rank=3)")):
        model = case.make()
        torch.manual_seed(4)
        esp.attach(model, recipe, "mine", head=False)
        with torch.no_grad():
            for label, value in numbers(model).items():
                seed = sum(map(ord, label))
                value.normal_(generator=torch.Generator().manual_seed(seed)).mul_(0.1)
        model(**case.batch()).loss.backward()
        found[name] = gradients(model)
    assert all(label.endswith("/b") for label in found["fa"])
    for label, grad in found["fa"].items():
        torch.testing.assert_close(grad, found["lora"][label])


@pytest.mark.parametrize("recipe", ["LoRA(rank=2, freeze_a=True)", "LoRA(rank=2)"])
def test_backward_keeps_the_narrow_product_where_a_is_frozen(recipe: str) -> None:
    model = One(nn.Linear(64, 48))
    esp.attach(model, recipe, "mine", head=False)
    shapes: list[tuple[int, ...]] = []
    x = torch.randn(5, 64, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    assert (5, 2) in shapes
    assert ((5, 64) in shapes) == ("freeze_a" not in recipe)


def moved_in_five_steps(recipe: str) -> float:
    """How far Adam at the recipe's own rate takes a weight, relative to the weight."""
    torch.manual_seed(0)
    model = tf.AutoModelForSequenceClassification.from_pretrained(demo_model(), num_labels=2).eval()
    batch = {"input_ids": torch.randint(1000, 9000, (8, 12)), "labels": torch.arange(8) % 2}
    weight: nn.Parameter = model.bert.encoder.layer[3].intermediate.dense.weight
    before = weight.detach().clone()
    esp.attach(model, recipe, "mine")
    groups = esp.groups(model, learning_rate=esp.recipe(recipe).learning_rate)
    optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
    for _ in range(5):
        model(**batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    esp.merge(model)
    return ((weight.detach() - before).norm() / before.norm()).item()


def test_default_rates_take_weights_about_as_far() -> None:
    lora = moved_in_five_steps("LoRA()")
    for recipe in ("LoRA(init='pissa')", "LoRA(plus=16.0)", "LoRA(dora=True)"):
        assert 0.3 < moved_in_five_steps(recipe) / lora < 4


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_plus_rates_reach_b_alone_and_nothing_is_left_out(family: str) -> None:
    case = BY_NAME[family]
    model = case.make()
    recipe = (
        "LoRA(rank=2, plus=16, dora=True) + LoRA(rank=3, plus=4, sites='embedding', bias='all')"
    )
    esp.attach(model, recipe, "mine")
    groups = esp.groups(model, weight_decay=0.1, learning_rate=1e-3)
    adapter = model.get_submodule("espalier.@mine")
    rates = {}
    for group in groups:
        (flat,) = group["params"]
        kind = next(k for k, own in adapter.flat.items() if own is flat)
        for slot in adapter.slots[kind]:
            assert slot.label not in rates
            rates[slot.label] = (group["lr"], group["weight_decay"])
    assert set(rates) == {label for label, _ in adapter.named()}
    for label, (rate, decay) in rates.items():
        fast = label.startswith("0/") and label.endswith("/b")
        assert rate == pytest.approx(16e-3 if fast else 1e-3), label
        vector = label.endswith(("/m", "bias")) or label.endswith("norm/weight")
        assert decay == (0.0 if vector else 0.1), label


def test_lora_plus_moves_b_as_much_faster_as_it_says() -> None:
    steps = {}
    for plus in (1, 8):
        model = BY_NAME["bert"].make()
        torch.manual_seed(4)
        esp.attach(model, f"LoRA(rank=2, plus={plus})", "mine", head=False)
        optimiser = torch.optim.SGD(esp.groups(model, learning_rate=0.1))
        model(**BY_NAME["bert"].batch()).loss.backward()
        optimiser.step()
        steps[plus] = {k: v for k, v in numbers(model).items() if k.endswith("/b")}
    for label, moved_by in steps[1].items():
        torch.testing.assert_close(steps[8][label], 8 * moved_by)


def test_rslora_is_lora_with_another_alpha() -> None:
    case = BY_NAME["bert"]
    outputs = []
    for recipe in ("LoRA(rank=4, alpha=3, rslora=True)", "LoRA(rank=4, alpha=6)"):
        torch.manual_seed(4)
        outputs.append(logits(moved(case, recipe), case.batch()))
    assert torch.equal(*outputs)


# ----------------------------------------------------------------------------- counts and refusals


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        ("LoRA(sites='attention.q, attention.v')", 294_912),
        ("LoRA(dora=True, sites='attention.q, attention.v')", 313_344),
        ("LoRA(freeze_a=True, sites='attention.q, attention.v')", 147_456),
        ("LoRA(init='pissa', sites='attention.q, attention.v')", 294_912),
        ("LoRA()", 1_327_104),
    ],
)
def test_counts_on_bert_base(recipe: str, count: int) -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, recipe, "mine")
    assert esp.account(model, "mine").trained == count


def test_a_padding_id_s_embedding_never_trains(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    config = peft.LoraConfig(r=3, target_modules=["word_embeddings"])
    other = peft.get_peft_model(case.make(), config)
    other.save_pretrained(tmp_path)
    ours = case.make()
    esp.load(ours, tmp_path, "mine", trainable=True)
    batch = case.batch()
    batch["input_ids"][:, -3:] = 0
    for model in (ours, other):
        model(**batch).loss.backward()
    grad = gradients(ours)["bert.embeddings.word_embeddings/a"]
    expected = next(p.grad for n, p in other.named_parameters() if "lora_embedding_A" in n)
    torch.testing.assert_close(grad, expected)
    assert grad.count_nonzero()
    assert not grad[:, 0].any()


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        ("LoRA(freeze_a=True, init='pissa')", "freeze_a must be False: pissa trains"),
        ("LoRA(init='loftq')", "init must be one of kaiming, gaussian, orthogonal, pissa"),
        ("LoRA(plus=0.5)", "plus must be at least 1"),
        ("LoRA(dora=1)", "dora must be True or False"),
    ],
)
def test_contradictory_settings_say_what_would_work(recipe: str, named: str) -> None:
    with pytest.raises(SettingError, match=named):
        esp.recipe(recipe)


@pytest.mark.parametrize("setting", ["dora=True", "freeze_a=True", "init='pissa'"])
def test_an_embedding_is_refused_by_name(setting: str) -> None:
    model = BY_NAME["gpt2"].make()
    with pytest.raises(SiteError, match=r"transformer\.wte, an embedding; it takes linear layers"):
        esp.attach(model, f"LoRA(sites='embedding', {setting})")
    assert "espalier" not in model._modules


@EVERY
def test_recipes_survive_text_and_json(recipe: str) -> None:
    parts = esp.recipe(recipe)
    assert esp.recipe(str(parts)) == parts
    assert esp.recipe(json.loads(json.dumps(parts.to_json()))) == parts


def test_orthogonal_rows_start_also_where_numbers_are_bf16() -> None:
    model = BY_NAME["bert"].make().bfloat16()
    esp.attach(model, esp.LoRA(rank=2, init="orthogonal"), dtype=torch.bfloat16)
    a = next(v for label, v in model.get_submodule("espalier.@default").named() if "/a" in label)
    assert torch.allclose((a @ a.T).float(), torch.eye(2), atol=1e-2)
