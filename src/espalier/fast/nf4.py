"""Quantising to NF4 and FP4 on the CPU: bitsandbytes' codes bit for bit, in a fraction of its time.

A number's code is how many of 15 bounds lie below it, once it is divided by the largest of its
block of 64. Instead of searching among the bounds, each number is cut to one of 65,536 cells, and a
table says the cell's code. In the 15 cells that hold a bound the table says so, and the few numbers
there are searched for after all. Rounding to cells is monotone, so no other number can be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.fast.switch import enabled
from espalier.storage import BLOCK, BLOCKS, library

_CHUNK = 2**17  # numbers taken at once: what one pass writes, the next finds in the cache
_HALF, _MIDDLE = 32_760.0, 32_768.0  # cells on each side of zero, a few less than there are
_FLAG = 128  # marks a cell that holds a bound
_FLAGS = -0x7F7F7F7F7F7F7F80  # in any of eight codes read as one int64
_LEAST = 1e-38  # the smallest divisor
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = ("nf4", "fp4")
_STORED = {"quant_storage": torch.uint8}
_USUAL = {"quant_type": "fp4", "compress_statistics": False, "blocksize": None, **_STORED}


class _Codes(NamedTuple):
    """What a kind's codes follow from."""

    bounds: Tensor  # (15,) fp32, between neighbouring values
    order: Tensor  # (16,) uint8, the code of the n-th value by size
    table: Tensor  # (65536,) uint8, the code of a cell


@cache
def _codes(kind: str) -> _Codes:
    values = library("4-bit codes").functional.get_4bit_type(kind, device="cpu")
    order = torch.argsort(values)
    bounds = (values[order[:-1]] + values[order[1:]]) / 2
    cells = (bounds * _HALF + _MIDDLE).to(torch.int32)
    every = torch.arange(2**16, dtype=torch.int32, device="cpu")
    codes = order.to(torch.uint8)
    table = codes[torch.bucketize(every, cells)]
    table[cells.long()] = _FLAG
    return _Codes(bounds, codes, table)


def packed(weight: Tensor, kind: str) -> tuple[Tensor, Tensor] | None:
    """The 4-bit codes of a weight on the CPU, and the scales of its blocks of 64.

    Args:
        weight: Of any shape; fp32, bf16 or fp16.
        kind: "nf4" or "fp4".

    Returns:
        Codes (⌈N/2⌉, 1) as bytes, the first of two in the high half, and scales (⌈N/64⌉,) in
        fp32; None where the weight holds something that is not finite.
    """
    known, flat = _codes(kind), weight.detach().reshape(-1)
    count = flat.numel()
    full = count - count % BLOCK
    scales = torch.empty(-(-count // BLOCK), dtype=torch.float32, device="cpu")
    out = torch.empty((count + 1) // 2, dtype=torch.uint8, device="cpu")
    size = min(_CHUNK, full)
    scaled, work = torch.empty(2, size, dtype=torch.float32, device="cpu")
    cells = torch.empty(size, dtype=torch.int32, device="cpu")
    codes = torch.empty(size, dtype=torch.uint8, device="cpu")
    for start in range(0, full, _CHUNK):
        stop = min(start + _CHUNK, full)
        some = slice(stop - start)
        own = scales[start // BLOCK : stop // BLOCK]
        if not _scale(flat[start:stop], own, scaled[some], work[some]):
            return None
        _search(scaled[some], work[some], cells[some], codes[some], known)
        _pack(codes[some], out[start // 2 : stop // 2])
    if full < count:
        rest = flat[full:].float()
        scales[-1] = rest.abs().max().clamp(min=_LEAST)
        last = torch.nn.functional.pad(rest / scales[-1], (0, count % 2))
        _pack(known.order[torch.bucketize(last, known.bounds)], out[full // 2 :])
        if not scales[-1].isfinite():
            return None
    return out.unsqueeze(1), scales


def _scale(part: Tensor, scales: Tensor, scaled: Tensor, work: Tensor) -> bool:
    """Fill the scales of whole blocks and their numbers divided by them; False if not finite."""
    blocks, wide = part.view(-1, BLOCK), scaled.view(-1, BLOCK)
    if part.dtype != torch.float32:
        blocks = wide.copy_(blocks)
    torch.amax(torch.abs(blocks, out=work.view(-1, BLOCK)), 1, out=scales)
    # As bitsandbytes does, not by division: the last bit decides at a bound.
    torch.mul(blocks, (1.0 / scales.clamp(min=_LEAST)).unsqueeze(1), out=wide)
    return bool(scales.isfinite().all())


def _search(scaled: Tensor, work: Tensor, cells: Tensor, codes: Tensor, known: _Codes) -> None:
    """Fill the codes of numbers within ±1; `work` and `cells` are room for as many."""
    cells.copy_(torch.mul(scaled, _HALF, out=work).add_(_MIDDLE))
    torch.index_select(known.table, 0, cells, out=codes)
    doubtful = (codes.view(torch.int64) & _FLAGS).nonzero().view(-1)  # eight numbers each
    if len(doubtful):
        again = torch.bucketize(scaled.view(-1, 8)[doubtful], known.bounds)
        codes.view(-1, 8)[doubtful] = known.order[again]


def _pack(codes: Tensor, out: Tensor) -> None:
    """Two codes (2N,) into each byte (N,), the first in the high half."""
    pairs = codes.view(torch.int16)  # the second code in its high byte
    out.copy_((pairs << 4) + (pairs >> 8))


def quantized(weight: Tensor, kind: str, double: bool) -> tuple[Tensor, Any] | None:
    """What bitsandbytes' `quantize_4bit` gives for a weight on the CPU: codes and their state.

    Args:
        weight: Of any shape; fp32, bf16 or fp16.
        kind: "nf4" or "fp4".
        double: Quantise the scales too.

    Returns:
        Codes (⌈N/2⌉, 1) and a `QuantState`; None where the weight holds something not finite.
    """
    made = packed(weight, kind)
    if made is None:
        return None
    codes, scales = made
    functional = library("4-bit codes").functional
    nested: dict[str, Any] = {}
    if double:
        offset = scales.mean()
        scales, second = functional.quantize_blockwise(scales - offset, blocksize=BLOCKS)
        nested = {"offset": offset, "state2": second}
    values = functional.get_4bit_type(kind, device="cpu")
    state = functional.QuantState(
        absmax=scales,
        shape=weight.shape,
        dtype=weight.dtype,
        blocksize=BLOCK,
        code=values,
        quant_type=kind,
        **nested,
    )
    return codes, state


@contextmanager
def quick() -> Iterator[None]:
    """Let bitsandbytes quantise to 4 bits on the CPU as above, also when transformers asks it."""
    functional = library("4-bit codes").functional
    theirs = functional.quantize_4bit

    def ours(A: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        given = _USUAL | kwargs
        kind, double = given.pop("quant_type"), given.pop("compress_statistics")
        usual = not args and given.pop("blocksize") in (None, BLOCK) and given == _STORED
        here = A.device.type == "cpu" and A.dtype in _FLOATS and kind in _KINDS
        made = quantized(A, kind, double) if enabled() and usual and here else None
        return theirs(A, *args, **kwargs) if made is None else made

    functional.quantize_4bit = ours
    try:
        yield
    finally:
        functional.quantize_4bit = theirs
