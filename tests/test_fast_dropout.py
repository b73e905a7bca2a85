"""Attention as batched products, and dropout that keeps a seed: against their formulas."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import espalier as esp
from espalier.fast import drop
from espalier.fast.attention import batched, in_training
from espalier.fast.drop import Drop
from espalier.fast.quick import QuickDropout
from graded import equal, graded, numbers, saved_bytes
from zoo import BY_NAME


def test_dropout_keeps_its_share_and_its_scale_and_repeats_itself() -> None:
    drop, x = Drop(), torch.ones(300, 401)
    once = drop(x, 0.3, 11)
    drop.rest()
    assert torch.equal(once, drop(x, 0.3, 11))
    assert not torch.equal(once, drop(x, 0.3, 12))
    assert (once == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert once.max().item() == pytest.approx(1 / 0.7, rel=1e-4)
    torch.testing.assert_close(drop(x.bfloat16(), 0.3, 11) == 0, once == 0)
    columns = (once == 0).double().mean(0)  # four decisions of one draw are independent
    assert columns.std().item() == pytest.approx((0.3 * 0.7 / 300) ** 0.5, rel=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_base_drops_its_share_of_numbers_and_of_their_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 401, dtype=dtype).requires_grad_()
    host, quick = nn.Dropout(0.3).train(), QuickDropout()
    out = quick(host, x)
    assert out is not None
    gone = out == 0
    assert gone.double().mean().item() == pytest.approx(0.3, abs=0.02)
    torch.testing.assert_close(out, (x / 0.7 * ~gone).to(dtype), rtol=2e-2, atol=0)
    (slope,) = torch.autograd.grad(out, x, g := torch.randn_like(x))
    torch.testing.assert_close(slope, (g / 0.7 * ~gone).to(dtype), rtol=2e-2, atol=0)
    again = quick(host, x)
    assert again is not None
    assert not torch.equal(again == 0, gone)
    torch.manual_seed(0)
    torch.randn(200, 401, dtype=dtype)
    assert torch.equal(quick(host, x), out)  # type: ignore[arg-type]


def test_dropouts_that_torch_does_better_are_its_own() -> None:
    quick, x = QuickDropout(), torch.randn(2, 300, 300)
    host = nn.Dropout(0.3).train()
    assert quick(host, x) is not None
    assert quick(host, x[:, :9, :9].contiguous()) is None  # small
    assert quick(host, x.transpose(1, 2)) is None  # other strides
    assert quick(host, input=x) is None
    assert quick(nn.Dropout(0.3, inplace=True).train(), x) is None
    assert quick(nn.Dropout(1.0).train(), x) is None
    assert quick(host, nn.Parameter(x)) is None
    host.p = 0.0
    assert quick(host, x) is None


def test_a_base_with_dropout_goes_through_functional_transforms() -> None:
    model = BY_NAME["bert"].make().train()
    esp.attach(model, "BitFit()")
    ids = BY_NAME["bert"].batch()["input_ids"].repeat(1, 40)[:, :50]

    def one(row: Tensor) -> Tensor:
        return model(input_ids=row[None]).logits[0]

    assert torch.func.vmap(one, randomness="different")(ids).isfinite().all()


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_a_base_with_dropout_keeps_less_for_backward(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drop, "SMALL", 0)
    model, data = BY_NAME[family].make().train(), BY_NAME[family].batch()
    esp.attach(model, "LoRA(rank=4)")
    fast = saved_bytes(model, data)
    with esp.plain_paths():
        assert fast < 0.8 * saved_bytes(model, data)


def test_dropout_of_nearly_all_leaves_numbers() -> None:
    assert Drop()(torch.ones(64, 64), 0.99999, 11).isfinite().all()


def test_one_input_has_one_mask_and_each_pass_its_own() -> None:
    drop, x = Drop(), torch.ones(3, 4)
    first = drop.seed(x, "q")
    assert drop.seed(x, "k") == first
    assert drop.seed(x, "q") != first
    assert drop.seed(torch.ones(3, 4), "k") != first


def test_masks_that_train_or_are_wider_than_the_scores_are_left_to_the_model() -> None:
    module, q = nn.Identity().train(), torch.randn(1, 2, 4, 8, dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 4, 4, dtype=q.dtype)
    assert in_training(module, q, q, q, mask, {}) is not None
    assert in_training(module, q, q, q, mask.float(), {}) is None
    assert in_training(module, q, q, q, mask.clone().requires_grad_(), {}) is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [None, "bool", "added"])
@pytest.mark.parametrize("length", [5, 300])  # one block of queries, and two
def test_attention_as_batched_products(causal: bool, masked: str | None, length: int) -> None:
    if causal and masked:
        pytest.skip("a mask says itself what is later")
    torch.manual_seed(0)
    q, k, v = numbers(2, 4, length, 8), numbers(2, 2, length, 8), numbers(2, 2, length, 8)
    mask = None
    if masked:
        mask = torch.rand(2, 1, length, length) > 0.3
        mask[..., 0] = True
        mask[0, :, 3] = False  # a query that sees nothing takes nothing
        if masked == "added":
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=causal, scale=0.3, enable_gqa=True
        )
        return out.transpose(1, 2)

    ours = graded(lambda q, k, v: batched(q, k, v, mask, 0.3, causal), [q, k, v])
    equal(ours, graded(theirs, [q, k, v]))
    if length < 9 and masked != "bool":
        flat = (x.detach().flatten(0, 1).requires_grad_() for x in (k, v))
        seen = None if mask is None else mask.clamp(min=-1e9)
        torch.library.opcheck(torch.ops.espalier.attend, (q, *flat, seen, 0.3, causal))


def dropped_shares(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """What attention leaves of the shares (B, T, h, S), told by values that are the keys' names."""
    names = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1)
    torch.manual_seed(3)
    return batched(q, k, names, None, 0.3, causal, 0.4)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [7, 300])  # one block of queries, and two
def test_attention_with_dropout_is_its_formula(causal: bool, length: int) -> None:
    torch.manual_seed(0)
    q, k, v = numbers(2, 4, length, 8), numbers(2, 2, length, 8), numbers(2, 2, length, 8)
    left = dropped_shares(q, k, causal).detach().transpose(1, 2)
    stays = (left != 0).double() / 0.6
    later = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1) if causal else 0.0

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        shares = (0.3 * q @ k.transpose(2, 3) + later).softmax(-1)
        return (shares * stays @ v).transpose(1, 2)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        return batched(q, k, v, None, 0.3, causal, 0.4)

    equal(graded(ours, [q, k, v]), graded(theirs, [q, k, v]), 1e-4)  # a share is k / 32768
    visible = length * (length + 1) / 2 if causal else length**2
    assert left.ne(0).sum().item() / (8 * visible) == pytest.approx(0.6, abs=0.1)


def test_attention_drops_on_a_cpu_without_keeping_shares() -> None:
    module, q = nn.Identity().train(), torch.randn(2, 4, 96, 8)
    assert in_training(module, q, q, q, None, {"dropout": 0.1}) is not None
    assert in_training(module, q, q, q, None, {"dropout": 0.0}) is None  # a flash kernel's work
    assert in_training(module, q, q, q, None, {"dropout": 1.0}) is None
    assert in_training(module, q.double(), q, q, None, {"dropout": 0.1}) is None
    few = q[:, :, :9]
    assert in_training(module, few, few, few, None, {"dropout": 0.1}) is None


def test_attention_with_dropout_is_the_same_under_autocast() -> None:
    inputs = [torch.randn(2, 4, 96, 8).bfloat16().requires_grad_() for _ in range(3)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        torch.manual_seed(3)
        out = in_training(nn.Identity().train(), q, k, v, None, {"dropout": 0.1})
        assert out is not None
        return out

    alone = graded(attend, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        equal(graded(attend, inputs), alone)


def test_the_side_of_a_ladder_attends_by_batched_products_too() -> None:
    class Named(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None):
            seen.add(str(func))
            return func(*args, **(kwargs or {}))

    seen: set[str] = set()
    model, data = BY_NAME["bert"].make().to(torch.bfloat16).train(), BY_NAME["bert"].batch()
    esp.attach(model, "LadderSideTuning(reduction=2)")
    for plain in (True, False):
        seen.clear()
        with Named(), esp.plain_paths() if plain else nullcontext():
            model(**data).loss.backward()
        assert any("scaled_dot_product" in name for name in seen) == plain
