"""Fastfood: a dense random linear map R^d → R^D, made anew from a key whenever it is used.

    P x = S · (H G Π H B x)[:D],   S = 1 / (‖g‖ √D),   ‖P x‖ ≈ ‖x‖

N is the power of two from D on, H the Walsh-Hadamard matrix (N, N) of ±1, B and G = diag(g) are
random signs and normal numbers, Π a permutation (Le et al. 2013, arXiv 1408.3060; without the
lengths of rows, as Aghajanyan et al. 2020 use it). An x longer than N is folded: blocks of N are
added up, each with signs of its own, so that every coordinate counts in every tensor.

Nothing is kept. Signs, permutation and normal numbers are functions of the key and of the place,
in whole-number arithmetic: the same on every machine, whatever random generators do, and 0 bytes
where tables would take 8 for each of N. Of H B x only the first M = 2^⌈log₂ d⌉ entries differ, the
rest repeats them; the other H is a few products with Hadamard matrices of at most 256 rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LARGEST = 8  # bits of the Hadamard matrices that are multiplied with
_CHUNK = 1 << 16  # entries whose numbers are made at a time: they stay in a processor's cache
_ROUNDS = 3
_ODD, _HALF = 0x45D9F3B, 0xFFFF
_NORMAL = 0x297A2D39  # so that B and G draw from two streams


@cache
def hadamard(bits: int, device: torch.device | None = None) -> Tensor:
    """The Walsh-Hadamard matrix (2^bits, 2^bits) of ±1 in Sylvester's order, fp32."""
    h = torch.ones(1, 1, dtype=torch.float32, device=device)  # the default type may be another
    for _ in range(bits):
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def walsh(v: Tensor) -> Tensor:
    """H v for v (2^k,), un-normalised; fp32, whatever autocast is on."""
    bits = (len(v) - 1).bit_length()
    parts = max(1, math.ceil(bits / _LARGEST))
    sizes = [bits // parts + (i < bits % parts) for i in range(parts)]
    with torch.autocast(v.device.type, enabled=False):
        largest = hadamard(sizes[0], v.device)  # its corners are the smaller ones
        inner = 1
        for size in sizes:
            h = largest[: 1 << size, : 1 << size]
            rows = v.view(-1, 1 << size, inner)
            v = h @ rows if inner > 1 else rows[..., 0] @ h
            inner <<= size
    return v.reshape(-1)


def signs(count: int, key: int, device: torch.device | None = None) -> Tensor:
    """The diagonal of B (count,): ±1."""
    return (1 - 2 * (_mixed(_places(0, count, device), key) & 1)).float()


def permuted(places: Tensor, bits: int, key: int) -> Tensor:
    """Where Π takes the entries at `places` (int32) from: one-to-one on 0 … 2^bits - 1."""
    mask, shift = (1 << bits) - 1, bits // 2 + 1
    digest = hashlib.sha256(key.to_bytes(4)).digest()
    places = places.clone()
    for turn in range(_ROUNDS):
        factor, offset = (
            int.from_bytes(digest[at : at + 4]) & mask for at in (8 * turn, 8 * turn + 4)
        )
        places.mul_(factor | 1).add_(offset).bitwise_and_(mask)
        places.bitwise_xor_(places >> shift)
    return places


def normals(first: int, count: int, key: int, device: torch.device | None = None) -> Tensor:
    """Entries first … first + count - 1 of g, standard normal (Box and Muller's way); both even."""
    each = _share(_mixed(_places(first, first + count, device), key ^ _NORMAL)).view(-1, 2)
    length, angle = each[:, 0].log().mul_(-2).sqrt_(), each[:, 1] * (2 * math.pi)
    return torch.stack((length * angle.cos(), length * angle.sin()), 1).view(-1)


def fastfood(x: Tensor, size: int, key: int) -> Tensor:
    """P x.

    Args:
        x: (d,), fp32.
        size: D.
        key: Which map, of 32 bits; with d and D it says all.

    Returns:
        (D,), fp32.
    """
    bits, small = _bits(size, len(x))
    folded = x.new_zeros(-(-len(x) >> small) << small)
    folded[: len(x)] = x * signs(len(x), key, x.device)
    u = walsh(folded.view(-1, 1 << small).sum(0))
    v = x.new_empty(1 << bits)
    squares = x.new_zeros(())
    for at, places, g in _gauss(bits, key, x.device):
        v[at] = u.index_select(0, places & ((1 << small) - 1)) * g
        squares += g.square().sum()
    return walsh(v)[:size] * (squares * size).rsqrt()


def adjoint(y: Tensor, length: int, key: int) -> Tensor:
    """Pᵀ y (length,) for y (D,), fp32: the transpose of the map, factor by factor."""
    bits, small = _bits(len(y), length)
    padded = y.new_zeros(1 << bits)
    padded[: len(y)] = y
    v = walsh(padded)
    u, squares = y.new_zeros(1 << small), y.new_zeros(())
    for at, places, g in _gauss(bits, key, y.device):
        u.index_add_(0, places & ((1 << small) - 1), v[at] * g)
        squares += g.square().sum()
    u = walsh(u).repeat(-(-length >> small))[:length]
    return u * signs(length, key, y.device) * (squares * len(y)).rsqrt()


def _bits(size: int, length: int) -> tuple[int, int]:
    """log₂ of N and of M."""
    bits = (size - 1).bit_length()
    return bits, min(bits, (length - 1).bit_length())


def _gauss(bits: int, key: int, device: torch.device) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Π and G in chunks: which entries, where Π takes them from, and g there."""
    count = 1 << bits
    for first in range(0, count, _CHUNK):
        stop = min(first + _CHUNK, count)
        places = permuted(_places(first, stop, device), bits, key)
        g = normals(first, max(stop - first, 2), key, device)[: stop - first]
        yield slice(first, stop), places, g


def _places(first: int, stop: int, device: torch.device | None) -> Tensor:
    return torch.arange(first, stop, dtype=torch.int32, device=device)


def _mixed(places: Tensor, key: int) -> Tensor:
    """32 bits for each place (int32) that look random and are not; the key comes in twice."""
    x = places ^ _signed(key)
    for drawn in (key * _ODD, key >> 9):
        x.bitwise_xor_((x >> 16) & _HALF).mul_(_ODD).add_(_signed(drawn))
        x.bitwise_xor_((x >> 16) & _HALF).mul_(_ODD)
    return x.bitwise_xor_((x >> 16) & _HALF)


def _signed(number: int) -> int:
    """The lowest 32 bits as an int32, whose arithmetic wraps around."""
    return ((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def _share(bits: Tensor) -> Tensor:
    """32 bits as a number above 0 and at most 1; the logarithm of 0 is none."""
    return bits.float().mul_(2.0**-32).add_(0.5).clamp_(2.0**-33, 1.0)


@torch.library.custom_op("espalier::projected", mutates_args=())
def projected(x: Tensor, scale: Tensor, size: int, key: int) -> Tensor:
    """λ · P x (D,) for x (d,) and a scalar λ, with the true adjoint as its gradient.

    One node for autograd, which keeps x and λ alone, and for a compiler, which sees no more of it.
    """
    return scale * fastfood(x, size, key)


@projected.register_fake
def _shape_of(x: Tensor, scale: Tensor, size: int, key: int) -> Tensor:
    return x.new_empty(size)


@torch.library.custom_op("espalier::projected_back", mutates_args=())
def projected_back(grad: Tensor, length: int, key: int) -> Tensor:
    """Pᵀ grad (length,), as a node of its own."""
    return adjoint(grad.contiguous(), length, key)


@projected_back.register_fake
def _length_of(grad: Tensor, length: int, key: int) -> Tensor:
    return grad.new_empty(length)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, _, ctx.key = inputs
    ctx.save_for_backward(x, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale = ctx.saved_tensors
    back = projected_back(grad, len(x), ctx.key)
    return scale * back, (x * back).sum().view_as(scale), None, None  # ⟨P x, y⟩ = ⟨x, Pᵀ y⟩


projected.register_autograd(_backward, setup_context=_keep)
