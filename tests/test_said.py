"""Intrinsic dimension (SAID, DID): the map against dense matrices, its gradient, what is kept."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import SettingError, SiteError
from espalier.graft import find
from espalier.plain import subspace
from espalier.plain.fastfood import (
    _share,
    adjoint,
    fastfood,
    hadamard,
    normals,
    permuted,
    signs,
)
from zoo import BY_NAME, logits, train

KEY = 20_12_13255


def dense(columns: int, size: int, key: int = KEY) -> Tensor:
    """P (size, columns) as a product of explicit matrices, H by Kronecker products."""
    bits = (size - 1).bit_length()
    n = 1 << bits
    h = torch.ones(1, 1)
    for _ in range(bits):
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    enter = torch.zeros(n, columns)  # pads a short x; adds up the blocks of a long one
    enter[torch.arange(columns) % n, torch.arange(columns)] = signs(columns, key)
    shuffle = torch.zeros(n, n)
    shuffle[torch.arange(n), permuted(torch.arange(n, dtype=torch.int32), bits, key).long()] = 1
    g = normals(0, max(n, 2), key)[:n]
    whole = h @ torch.diag(g) @ shuffle @ h @ enter
    return whole[:size] / (g.norm() * size**0.5)


@pytest.mark.parametrize(("columns", "size"), [(5, 8), (7, 50), (64, 64), (40, 13), (9, 1), (1, 3)])
def test_the_map_is_the_product_of_its_matrices(columns: int, size: int) -> None:
    found = torch.stack([fastfood(row, size, KEY) for row in torch.eye(columns)], 1)
    torch.testing.assert_close(found, dense(columns, size), atol=1e-5, rtol=1e-4)


def test_the_factors_are_what_they_are_called() -> None:
    b, g = signs(1 << 14, KEY), normals(0, 1 << 14, KEY)
    assert set(b.tolist()) == {-1.0, 1.0}
    assert abs(b.mean()) < 0.03
    assert abs(g.mean()) < 0.03
    assert abs(g.std() - 1) < 0.03
    assert abs((g**4).mean() - 3) < 0.3
    assert abs((b * g).mean()) < 0.03
    assert abs((g[1:] * g[:-1]).mean()) < 0.03
    for bits in (1, 5, 12):
        places = permuted(torch.arange(1 << bits, dtype=torch.int32), bits, KEY)
        assert sorted(places.tolist()) == list(range(1 << bits))
    assert torch.equal(normals(512, 256, KEY), g[512:768])  # in chunks as in one go
    ends = torch.tensor([-(2**31), -1, 0, 2**31 - 1], dtype=torch.int32)
    assert _share(ends).log().isfinite().all()
    assert _share(ends).max() <= 1


@pytest.mark.parametrize(("columns", "size"), [(20, 768), (1500, 3072), (300, 70_000), (5000, 768)])
def test_it_keeps_lengths_and_its_adjoint_is_true(columns: int, size: int) -> None:
    torch.manual_seed(1)
    ratios = []
    for key in range(4):
        x, y = torch.randn(columns), torch.randn(size)
        image = fastfood(x, size, key)
        ratios.append(float(image.norm() / x.norm()))
        torch.testing.assert_close(image @ y, x @ adjoint(y, columns, key), atol=1e-3, rtol=1e-4)
    assert 0.9 < sum(ratios) / len(ratios) < 1.1


def test_another_process_and_another_random_state_make_the_same_map() -> None:
    code = (
        "import torch; torch.manual_seed(99); torch.rand(5)\n"
        "from espalier.plain.fastfood import fastfood\n"
        f"print(fastfood(torch.arange(30.0), 100, {KEY}).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = fastfood(torch.arange(30.0), 100, KEY)
    assert torch.equal(torch.tensor(eval_list(done.stdout)), here)
    assert not torch.allclose(fastfood(torch.arange(30.0), 100, KEY + 1), here)


def eval_list(text: str) -> list[float]:
    """The numbers of a printed list."""
    return [float(part) for part in text.strip().strip("[]").split(",")]


class Two(nn.Module):
    """Two layers, of 12 and of 77 numbers, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Linear(4, 3, bias=False), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def deltas(model: nn.Module) -> list[Any]:
    """What the adapter put in the model, in model order."""
    return find(model).adapters["default"].deltas


def maps_of(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor's P as a dense matrix, from the keys that its deltas hold."""
    found = {}
    for delta in deltas(model):
        host = model.get_submodule(delta.site.path)
        for name, part in delta.parts.items():
            size = host._parameters[name].numel()  # type: ignore[union-attr]
            found[f"{delta.site.path}.{name}"] = dense(len(delta.t["x"]), size, part.key)
    return found


def numbers(model: nn.Module) -> tuple[Tensor, Tensor]:
    """x and λ."""
    t = deltas(model)[0].t
    return t["x"], t["scales"]


def test_gradients_are_those_of_the_dense_formula() -> None:
    """Also where tensors differ in size: none is divided by its N, as the paper's code does."""
    model, data = Two(), torch.randn(6, 4)
    esp.attach(model, esp.IntrinsicSAID(dimension=12))
    x, scales = numbers(model)
    with torch.no_grad():
        x.data.normal_()
        scales.data.uniform_(0.5, 2)
    out = model(data)
    (out**2).sum().backward()
    (flat,) = esp.parameters(model)
    mine = x.detach().clone().requires_grad_(), scales.detach().clone().requires_grad_()
    base = dict(Two().named_parameters())
    moved = {
        name: base[name].detach() + mine[1][k] * (p @ mine[0]).view_as(base[name])
        for k, (name, p) in enumerate(maps_of(model).items())
    }
    expected = torch.func.functional_call(Two(), moved, (data,))
    (expected**2).sum().backward()
    torch.testing.assert_close(out, expected)
    assert mine[0].grad is not None
    assert mine[1].grad is not None
    torch.testing.assert_close(flat.grad, torch.cat((mine[0].grad, mine[1].grad)))


def test_a_fresh_one_moves_matrices_at_the_first_step() -> None:
    """No outer product of two vectors, whose gradients would both vanish at zero."""
    case = BY_NAME["bert"]
    model = case.make()
    esp.attach(model, esp.IntrinsicSAID(dimension=100, sites="attention.q"), head=False)
    model(**case.batch()).loss.backward()
    (flat,) = esp.parameters(model)
    assert flat.grad is not None
    assert flat.grad[:-4].count_nonzero() == 96  # two layers' weight and bias have a λ each
    assert flat.grad[-4:].count_nonzero() == 0  # λ: nothing to scale while x is zero


def test_one_vector_and_a_factor_per_tensor_train_tied_ones_once() -> None:
    for dimension in (200, 331):
        model = BY_NAME["gpt2"].make()
        esp.attach(model, esp.IntrinsicSAID(dimension=dimension))
        x, scales = numbers(model)
        assert len(x) + len(scales) == dimension
        assert len(scales) == len(list(BY_NAME["gpt2"].make().parameters()))
        account = esp.account(model, "default")
        assert (account.trained, account.head) == (dimension, 0)
        assert account.changed == account.total
        assert account.rank is None


def test_did_trains_the_directions_alone() -> None:
    model = BY_NAME["llama"].make()
    esp.attach(model, esp.IntrinsicSAID(dimension=40, structure=False))
    (flat,) = esp.parameters(model)
    assert flat.numel() == 40
    first = train(model, BY_NAME["llama"].batch(), 1)
    assert train(model, BY_NAME["llama"].batch(), 6) < first
    assert esp.account(model, "default").trained == 40


def test_a_new_head_trains_beside_it_and_words_do_not_count_as_one() -> None:
    model = BY_NAME["bert"].make()
    esp.attach(model, esp.IntrinsicSAID(dimension=150))
    account = esp.account(model, "default")
    assert (account.trained, account.head) == (150, 24 * 3 + 3)
    assert account.changed == account.total - account.head
    writer = BY_NAME["llama"].make()
    esp.attach(writer, esp.IntrinsicSAID(dimension=150))
    assert "lm_head.weight" in maps_of(writer)


def test_the_file_holds_the_subspace_alone(tmp_path: Path) -> None:
    case, dimension = BY_NAME["bart"], 300
    model, batch = case.make(), case.batch()
    esp.attach(model, esp.IntrinsicSAID(dimension=dimension, seed=5))
    train(model, batch)
    esp.save(model, "default", tmp_path)
    assert 4 * dimension < (tmp_path / "adapter.safetensors").stat().st_size < 4 * dimension + 2500
    fresh = case.make()
    esp.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch), logits(model, batch))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that a tensor is made."""
    found: list[int] = []
    true: Callable[..., Tensor] = subspace.projected

    def counting(*args: Any) -> Tensor:
        found.append(args[2])
        return true(*args)

    monkeypatch.setattr(subspace, "projected", counting)
    return found


@pytest.mark.parametrize("frozen", [False, True])
def test_generating_makes_each_tensor_once(made: list[int], frozen: bool) -> None:
    case = BY_NAME["gpt2"]
    ids = case.batch()["input_ids"]
    model: Any = case.make()
    esp.attach(model, esp.IntrinsicSAID(dimension=150))
    train(model, case.batch())
    if frozen:
        esp.freeze(model, "default")
    made.clear()
    model.eval()
    how = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4}
    model.generate(ids, **how)
    assert len(made) == len(list(case.make().parameters()))  # the tied one once


def test_numbers_changed_by_hand_are_noticed(made: list[int]) -> None:
    case = BY_NAME["t5"]
    model, batch = case.make(), case.batch()
    esp.attach(model, esp.IntrinsicSAID(dimension=150))
    before = logits(model, batch)
    esp.parameters(model)[0].data[:100].normal_()
    after = logits(model, batch)
    assert not torch.allclose(before, after)
    twin = copy.deepcopy(model)
    esp.parameters(model)[0].data[:100].zero_()
    assert torch.equal(logits(model, batch), before)
    assert torch.equal(logits(twin, batch), after)


def test_under_autocast_the_directions_are_computed_in_full() -> None:
    model = Two()
    esp.attach(model, esp.IntrinsicSAID(dimension=12))
    numbers(model)[0].data.normal_()
    expected = model.second.weight.detach() + (
        maps_of(model)["second.weight"] @ numbers(model)[0].detach()
    ).view(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        delta = deltas(model)[1]
        own = {"weight": model.second.weight, "bias": model.second.bias}
        found = delta.effective(delta.t, own, True)["weight"]
    torch.testing.assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)


def test_compiled_training_is_one_graph_with_the_same_gradients() -> None:
    data = torch.randn(6, 4)
    found = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = Two()
        esp.attach(model, esp.IntrinsicSAID(dimension=12))
        numbers(model)[0].data.copy_(torch.arange(9.0) / 9)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(data).square().sum().backward()
        found.append(esp.parameters(model)[0].grad)
    torch.testing.assert_close(*found)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(SettingError, match="dimension"):
        esp.IntrinsicSAID(dimension=0)
    with pytest.raises(SettingError, match="3 tensors with a factor each; take a dimension above"):
        esp.attach(Two(), esp.IntrinsicSAID(dimension=3))
    with pytest.raises(SiteError, match="matches"):
        esp.attach(Two(), esp.IntrinsicSAID(sites="nothing.like.it"))


def test_a_step_is_as_bold_in_any_dimension() -> None:
    """The first step's gain, to first order, is the rate times the sum of |∂loss/∂x|."""
    case, gains = BY_NAME["llama"], []
    for dimension in (400, 1600, 6400):
        model, method = case.make(), esp.IntrinsicSAID(dimension=dimension)
        esp.attach(model, method)
        model(**case.batch()).loss.backward()
        grad = esp.parameters(model)[0].grad
        assert grad is not None
        gains.append(method.learning_rate * float(grad.abs().sum()))
    assert max(gains) < 1.3 * min(gains)


def test_what_was_made_goes_when_no_one_uses_it_any_more() -> None:
    case = BY_NAME["bert"]
    model, batch = case.make(), case.batch()
    esp.attach(model, esp.IntrinsicSAID(dimension=150), head=False)
    esp.freeze(model, "default")
    space = deltas(model)[0].space
    logits(model, batch)
    assert space.made
    esp.activate(model, None)
    assert not space.made
    esp.merge(model, "default")
    assert not space.made


def test_other_devices_and_default_types_are_minded() -> None:
    part = subspace.Part(KEY, 0, 0, True)
    t = {"x": torch.ones(3), "scales": torch.ones(1)}
    assert subspace._moved(t, part, torch.zeros(4, 5, device="meta")).device.type == "meta"
    expected = fastfood(t["x"], 20, KEY)
    hadamard.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fastfood(t["x"], 20, KEY), expected)
    finally:
        torch.set_default_dtype(torch.float32)
