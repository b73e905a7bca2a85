"""Reading and writing safetensors files whose data is one run of bytes.

A safetensors file is 8 bytes of header length, a JSON header that gives each tensor's type, shape
and place, and the tensors' bytes without gaps. Our adapters lie in flat buffers already in file
order, so writing one is a header and one write, reading one is a header and one copy. Any
safetensors reader opens the files.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from espalier.errors import CheckpointError

TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TYPES.items()}
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LONGEST_HEADER = 100_000_000


@dataclass(slots=True)
class Entry:
    """One tensor of a file: its type, its shape, and its bytes' place after the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(slots=True)
class Container:
    """An opened file: metadata and entries in file order; data is read on request."""

    path: Path
    metadata: dict[str, str]
    entries: dict[str, Entry]
    data_start: int

    def read(self, start: int, stop: int, into: Tensor) -> None:
        """Read bytes [start, stop) of the data into a contiguous CPU tensor of that size."""
        view = memoryview(into.detach().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        with open(self.path, "rb") as file:
            file.seek(self.data_start + start)
            if file.readinto(view) != stop - start:
                raise CheckpointError(f"{self.path} ended while it was read")

    def tensor(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        entry = self.entries[name]
        result = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.stop > entry.start:
            self.read(entry.start, entry.stop, result)
        return result


def write(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    runs: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file under a temporary name and put it in place.

    Args:
        path: The file; its folder is made.
        tensors: Names with (views of) the tensors, in the order in which `runs` holds them.
        runs: The data: contiguous tensors that together hold exactly those bytes.
        metadata: Text by text, kept in the header.

    Raises:
        CheckpointError: The folder cannot be written to, or there is no space.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    chunks = (t.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy() for t in runs)
    replace(path, (len(text).to_bytes(8, "little"), text, *chunks))


def replace(path: Path, chunks: Iterable[Any]) -> None:
    """Write bytes to a temporary name in the same folder, then rename. Raises CheckpointError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CheckpointError(_why(path, error)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as `replace` does."""
    replace(path, (text.encode(),))


def _why(path: Path, error: OSError) -> str:
    reasons = {
        errno.ENOSPC: "no space is left on the disk; free some or choose another folder",
        errno.EACCES: "the folder may not be written to; choose another or change its rights",
        errno.EPERM: "the folder may not be written to; choose another or change its rights",
        errno.EROFS: "the disk is read-only; choose another folder",
        errno.ENOTDIR: "a part of the path is a file, not a folder",
        errno.EEXIST: "a part of the path is a file, not a folder",
    }
    return f"cannot write {path}: {reasons.get(error.errno or 0, error.strerror or str(error))}"


def open_file(path: Path) -> Container:
    """Read and check a file's header; no tensor is read yet.

    Raises:
        CheckpointError: The file is missing, a pickle, truncated or no safetensors file.
    """
    if path.suffix in PICKLES:
        raise CheckpointError(
            f"{path} is a pickle, which can run any code when opened; Espalier reads safetensors "
            "only. Convert it with the library that wrote it"
        )
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or length > min(_LONGEST_HEADER, size):
                raise CheckpointError(f"{path} is no safetensors file, or its start is damaged")
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        entries = {name: _entry(item) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: the header is damaged") from None
    held = size - 8 - length
    needed = max((entry.stop for entry in entries.values()), default=0)
    if held < needed:
        raise CheckpointError(
            f"{path} is truncated: its header speaks of {needed:,} bytes of data, it holds "
            f"{held:,}. Copy or save it again"
        )
    return Container(path, metadata, entries, 8 + length)


def _entry(item: Mapping[str, Any]) -> Entry:
    start, stop = item["data_offsets"]
    dtype, shape = TYPES[item["dtype"]], tuple(item["shape"])
    if start < 0 or stop - start != math.prod(shape, start=dtype.itemsize):
        raise ValueError
    return Entry(dtype, shape, int(start), int(stop))
