"""Quantising to 4 bits on the CPU: bitsandbytes' own codes, bit for bit, whatever the weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import espalier as esp
from espalier.fast import nf4
from espalier.fast.switch import plain_paths
from zoo import BY_NAME

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("nf4", "fp4")


def same(weight: Tensor, kind: str, double: bool) -> None:
    """Ours beside bitsandbytes': codes, scales, and what they stand for."""
    made = nf4.quantized(weight, kind, double)
    assert made is not None
    codes, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
    assert torch.equal(made[0], codes)
    assert made[0].shape == codes.shape
    assert torch.equal(made[1].absmax, state.absmax)
    assert (made[1].shape, made[1].dtype) == (state.shape, state.dtype)
    assert (made[1].blocksize, made[1].quant_type) == (state.blocksize, state.quant_type)
    assert torch.equal(made[1].code, state.code)
    assert made[1].nested == state.nested == double
    if double:
        assert torch.equal(made[1].state2.absmax, state.state2.absmax)
        assert torch.equal(made[1].state2.code, state.state2.code)
        assert torch.equal(made[1].offset, state.offset)
    if weight.shape[-1] % 2 == 0:  # else bitsandbytes compiles what expands them
        wide = functional.dequantize_4bit(made[0], made[1])
        assert torch.equal(wide, functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_and_scales_are_bitsandbytes(kind: str, dtype: torch.dtype) -> None:
    for shape in ((96, 128), (64, 1), (33, 50), (7, 9), (1, 1), (5, 64), (3, 41, 13)):
        for double in (False, True):
            same((torch.randn(shape) * 0.02).to(dtype), kind, double)


def test_codes_over_several_chunks_are_bitsandbytes() -> None:
    weight = torch.randn(1025, 300)
    assert weight.numel() > 2 * nf4._CHUNK
    same(weight, "nf4", True)


SPECIAL: dict[str, Callable[[], Tensor]] = {
    "zeros": lambda: torch.zeros(64, 64),
    "zeros and an odd end": lambda: torch.zeros(13, 11),
    "constant": lambda: torch.full((64, 33), -0.3),
    "half zeros": lambda: torch.randn(64, 64) * (torch.rand(64, 64) > 0.5),
    "a block of zeros": lambda: torch.cat((torch.randn(64), torch.zeros(64), torch.randn(70))),
    "huge": lambda: torch.randn(64, 64) * 8e37,
    "largest": lambda: torch.full((2, 64), torch.finfo(torch.float32).max),
    "tiny": lambda: torch.randn(64, 64) * 1e-37,
    "denormal": lambda: torch.randn(64, 64) * 1e-40,
    "outliers": lambda: torch.randn(64, 64).pow(9),
    "not contiguous": lambda: torch.randn(64, 48).T,
    "negative zeros": lambda: torch.where(torch.rand(64, 64) > 0.5, -0.0, 1.0),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SPECIAL)
def test_codes_of_odd_weights_are_bitsandbytes(name: str, kind: str) -> None:
    same(SPECIAL[name](), kind, double=name not in ("huge", "largest"))


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_at_a_bound_and_one_bit_beside_it_are_coded_as_bitsandbytes_does(kind: str) -> None:
    bounds = nf4._codes(kind).bounds
    assert len(bounds) == 15
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = [bounds]
    for _ in range(16):
        near += [torch.nextafter(near[-1], up)]
    near += [bounds]
    for _ in range(16):
        near += [torch.nextafter(near[-1], down)]
    rows = torch.nn.functional.pad(torch.cat(near).view(-1, 15), (0, 64 - 15), value=1.0)
    for scale in (1.0, 0.3, 3.7e-3):  # by 1 exactly what is compared, else rounded on its way
        same(rows * scale, kind, double=False)
    exact = nf4.packed(rows, kind)
    assert exact is not None
    assert torch.equal(exact[1], torch.ones(len(rows)))


@pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_is_left_to_bitsandbytes(what: float) -> None:
    for at in (3, 65):  # in a whole block, in an unfinished one
        weight = torch.randn(66)
        weight[at] = what
        assert nf4.quantized(weight, "nf4", False) is None
        with nf4.quick():
            codes, _ = functional.quantize_4bit(weight, quant_type="nf4")
        assert torch.equal(codes, functional.quantize_4bit(weight, quant_type="nf4")[0])


def count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes, from now on, each weight that our own code quantises."""
    seen: list[str] = []
    own = nf4.quantized

    def noting(weight: Tensor, kind: str, double: bool) -> Any:
        seen.append(kind)
        return own(weight, kind, double)

    monkeypatch.setattr(nf4, "quantized", noting)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_quantised_quickly_is_the_one_quantised_by_bitsandbytes(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = functional.quantize_4bit
    seen = count(monkeypatch)
    quick, plain = BY_NAME["llama"].make(), BY_NAME["llama"].make()
    esp.quantize(quick, kind)
    assert len(seen) == 14
    with plain_paths():
        esp.quantize(plain, kind)
    assert len(seen) == 14
    assert functional.quantize_4bit is theirs
    ours, own = quick.state_dict(), plain.state_dict()
    assert ours.keys() == own.keys()
    assert all(torch.equal(ours[key], own[key]) for key in own)


def test_transformers_quantises_quickly_when_it_loads_for_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    from espalier.storage import Storage
    from espalier.training.fewbits import loaded

    base: Any = BY_NAME["llama"].make()
    base.save_pretrained(tmp_path)
    seen = count(monkeypatch)
    model, _ = loaded(AutoModelForCausalLM, str(tmp_path), {}, Storage("nf4"), torch.float32)
    assert seen == ["nf4"] * 14
    for path, host in model.named_modules():
        if isinstance(host, bnb.nn.Linear4bit):
            weight = base.get_submodule(path).weight.detach()
            codes, state = functional.quantize_4bit(
                weight, quant_type="nf4", compress_statistics=True
            )
            assert torch.equal(host.weight.data, codes)
            assert torch.equal(host.weight.quant_state.absmax, state.absmax)  # type: ignore[union-attr]


def test_other_settings_than_ours_are_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count(monkeypatch)
    weight = torch.randn(4, 128)
    with nf4.quick():
        wide = functional.quantize_4bit(weight, blocksize=128, quant_type="nf4")[1]
        stored = functional.quantize_4bit(weight, quant_storage=torch.bfloat16)[0]
        assert not seen
        functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert (wide.blocksize, len(wide.absmax), stored.dtype) == (128, 4, torch.bfloat16)
    assert seen == ["nf4"]
