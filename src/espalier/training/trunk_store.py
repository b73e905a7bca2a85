"""Where the states of a frozen trunk are kept: tokens in a few large blocks, in memory or on disk.

A split's rows are written one after the other, the longest first, padding left out: token by token
all states that training needs, (tokens, states, width) for each stack. On disk these are
safetensors files that are mapped into memory:

    <key>/index.json               what they are the states of, and each file's size
          encoder-0.safetensors    a shard: the rows of some of the passes that filled it

A folder is written under a temporary name and renamed when complete; its name is a hash of all
that decides the states, so that other data or another base never finds it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from espalier.container import NAMES
from espalier.errors import CheckpointError, SettingError
from espalier.trunk import State
from espalier.wording import setting

SHARD = 1_000_000_000  # bytes
_INDEX, _WRITING = "index.json", "writing-"
_NAME = re.compile(r"(writing-)?[0-9a-f]{24}(-\d+)?")
_DAY = 86_400  # seconds


@dataclass(frozen=True)
class Layout:
    """A split's rows: which examples they are, how long, and where they lie.

    Attributes:
        passes: The examples that are filled together, in the order in which they lie.
        rows: Of each example, its first row and the one after its last.
        lengths: For each stack, the tokens of each row.
        states: For each stack, the states that are kept.
        dtype: Of what is kept.
        parts: Into how many shards at least the rows are cut.
    """

    passes: list[list[int]]
    rows: list[tuple[int, int]]
    lengths: dict[str, list[int]]
    states: dict[str, list[State]]
    dtype: torch.dtype
    parts: int = 1

    def size(self, stack: str, tokens: int) -> int:
        """Bytes that so many tokens of a stack take."""
        states = self.states[stack]
        return tokens * len(states) * states[0].width * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of all states."""
        return sum(self.size(stack, sum(lengths)) for stack, lengths in self.lengths.items())

    @property
    def tokens(self) -> int:
        """Tokens of all stacks."""
        return sum(sum(lengths) for lengths in self.lengths.values())

    def spans(self) -> list[tuple[int, int]]:
        """The passes [start, stop) of each shard."""
        most = min(SHARD, -(-self.bytes // self.parts))
        spans, start, held = [], 0, 0
        for at, some in enumerate(self.passes):
            held += sum(
                self.size(stack, sum(lengths[row] for row in self.rows_of(some)))
                for stack, lengths in self.lengths.items()
            )
            if held >= most:
                spans.append((start, at + 1))
                start, held = at + 1, 0
        return spans if start == len(self.passes) else [*spans, (start, len(self.passes))]

    def shape(self, stack: str, number: int) -> tuple[int, int, int]:
        """Of a stack's states in a shard: (tokens, states, width)."""
        first, last = self.spans()[number]
        rows = (row for some in self.passes[first:last] for row in self.rows_of(some))
        states = self.states[stack]
        return sum(self.lengths[stack][row] for row in rows), len(states), states[0].width

    def rows_of(self, examples: Sequence[int]) -> list[int]:
        """The rows of these examples, in their order."""
        return [row for i in examples for row in range(*self.rows[i])]


class Store:
    """The kept states of one split, read by example."""

    def __init__(self, layout: Layout, data: Mapping[str, Sequence[Tensor]]) -> None:
        self.layout, self.data = layout, data
        shard: list[int] = []
        starts: dict[str, list[int]] = {stack: [] for stack in layout.lengths}
        for number, (first, last) in enumerate(layout.spans()):
            own = [row for some in layout.passes[first:last] for row in layout.rows_of(some)]
            shard += [number] * len(own)
            for stack, lengths in layout.lengths.items():
                starts[stack] += [0, *itertools.accumulate(lengths[row] for row in own)][:-1]
        self.shard = torch.tensor(shard)
        self.starts = {stack: torch.tensor(numbers) for stack, numbers in starts.items()}
        self.lengths = {stack: torch.tensor(n) for stack, n in layout.lengths.items()}

    def read(self, stack: str, rows: Tensor) -> Tensor:
        """The states of these rows, token after token: (tokens, states, width)."""
        starts, lengths = self.starts[stack][rows], self.lengths[stack][rows]
        where, shards = spread(starts, lengths), self.shard[rows]
        data = self.data[stack]
        if bool((shards == shards[0]).all()):
            return data[int(shards[0])].index_select(0, where)
        found = data[0].new_empty(len(where), *data[0].shape[1:])
        each = shards.repeat_interleave(lengths)
        for number in shards.unique().tolist():
            own = (each == number).nonzero()[:, 0]
            found.index_copy_(0, own, data[number].index_select(0, where[own]))
        return found


def spread(starts: Tensor, lengths: Tensor) -> Tensor:
    """The numbers start, start + 1, …, start + length − 1 of each pair, one after the other."""
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) + (starts - ends + lengths).repeat_interleave(lengths)


class Batch:
    """The kept states of one batch, padded as its rows are."""

    def __init__(self, kept: Store, some: Sequence[int]) -> None:
        self.kept = kept
        self.rows = torch.tensor(kept.layout.rows_of(some))
        self.read: dict[str, tuple[Tensor, Tensor | None]] = {}

    def __call__(self, state: State, x: Tensor) -> Tensor:
        """States (B, T, width) in the place of those made from x (B, T, …)."""
        if state.stack not in self.read:
            self.read[state.stack] = self._read(state.stack, x)
        rows, places = self.read[state.stack]
        own = rows[:, self.kept.layout.states[state.stack].index(state)].to(state.dtype)
        if places is None:
            return own.view(*x.shape[:2], state.width)
        out = own.new_zeros(x.shape[0] * x.shape[1], state.width)
        return out.index_copy_(0, places, own).view(*x.shape[:2], state.width)

    def _read(self, stack: str, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states of all tokens on x's device, and the tokens' places where there is padding."""
        lengths = self.kept.lengths[stack][self.rows]
        count, size = x.shape[:2]
        if len(lengths) != count or int(lengths.max()) > size:
            raise SettingError(
                f"{setting('trunk_cache')}: the {stack} runs on {count} rows of {size} tokens "
                f"where states of {len(lengths)} rows of up to {int(lengths.max())} were kept"
            )
        rows = self.kept.read(stack, self.rows).to(x.device, non_blocking=True)
        if len(rows) == count * size:
            return rows, None
        return rows, spread(torch.arange(count) * size, lengths).to(x.device)


# --------------------------------------------------------------------------------------- filling


class Memory:
    """A shard that is filled in memory."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.data, self._at = torch.empty(shape, dtype=dtype), 0

    def add(self, states: Tensor) -> None:
        """Put (tokens, states, width) after what is there."""
        self.data[self._at : self._at + len(states)] = states
        self._at += len(states)

    def close(self) -> None:
        """Nothing: it is where it stays."""


class OnDisk:
    """A shard that is written as a safetensors file with one tensor, `states`."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path = path
        self._file: BinaryIO = path.open("wb")
        size = dtype.itemsize
        for part in shape:
            size *= part
        entry = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [0, size]}
        header = json.dumps({"states": entry}).encode()
        header += b" " * (-len(header) % 8)
        self._file.write(len(header).to_bytes(8, "little") + header)

    def add(self, states: Tensor) -> None:
        """Write (tokens, states, width) after what is there."""
        self._file.write(memoryview(states.contiguous().view(torch.uint8).numpy()))  # type: ignore[arg-type]

    def close(self) -> None:
        """Make sure that it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


# -------------------------------------------------------------------------------------- the folder


def key(what: Mapping[str, Any]) -> str:
    """The name of the folder for the states of this."""
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def being_written(folder: Path) -> Path:
    """Where a folder is filled by this process and those that belong to it."""
    return folder.with_name(f"{_WRITING}{folder.name}-{os.getpid()}")


def is_whole(folder: Path, what: Mapping[str, Any]) -> bool:
    """Whether a folder holds the states of this, complete."""
    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in index["files"]}
        return index["what"] == json.loads(json.dumps(what)) and sizes == index["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def finish(written: Path, folder: Path, what: Mapping[str, Any]) -> None:
    """Give a filled folder its index and its name, in place of what stood there."""
    files = {path.name: path.stat().st_size for path in sorted(written.glob("*.safetensors"))}
    text = json.dumps({"what": what, "files": files}, indent=1)
    (written / _INDEX).write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(written, folder)


def mapped(folder: Path, layout: Layout) -> dict[str, list[Tensor]]:
    """The shards of a folder, mapped into memory and read as they are used.

    Raises:
        CheckpointError: a file cannot be read.
    """
    try:
        (folder / _INDEX).touch()  # used now: the longest unused goes first
        return {
            stack: [_mapped(folder / f"{stack}-{n}.safetensors") for n in range(count)]
            for stack in layout.lengths
            for count in (len(layout.spans()),)
        }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"The kept states in {folder} cannot be read: {error}") from error


def _mapped(path: Path) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("states")


def make_room(root: Path, needed: int, limit: float) -> None:
    """Remove kept states, the longest unused first, until `needed` bytes more are within `limit`.

    What was being written more than a day ago was left by a run that was killed. Nothing but
    folders with names and files such as ours is touched.
    """
    ours = [path for path in root.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    held = [(_used(path), _size(path), path) for path in ours]
    total = needed + sum(size for _, size, _ in held)
    for used, size, path in sorted(held):
        being_written = path.name.startswith(_WRITING) and time.time() - used < _DAY
        if total > limit and not being_written:
            shutil.rmtree(path, ignore_errors=True)
            total -= size


def _used(folder: Path) -> float:
    index = folder / _INDEX
    return (index if index.is_file() else folder).stat().st_mtime


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
