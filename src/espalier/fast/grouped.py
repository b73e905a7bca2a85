"""Low-rank changes of rows on different adapters, as two batched products of small matrices.

The factors of all adapters of a batch are stacked once. Up to `ALONE` rows each row has its own
copy of its factors in place: y.baddbmm_(x · down, up), two calls whatever the rows. More rows are
sorted by adapter into blocks of equal size. Both cost the same for any number of adapters but for
the memory that is read. In 16 bits, where a product costs less than sorting, many rows of a few
adapters are multiplied with the factors of all, and what is not a row's own is hidden.
B rows, T words each, K choices, R rank, C blocks of n rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from espalier.fast.decoding import adds_a_product, computed_in, fits, plain, product
from espalier.pieces import Live

if TYPE_CHECKING:
    from espalier.graft import Graft
    from espalier.seat import Seat

ALONE = 16
NARROW = 64  # K · R up to which rows are multiplied with all factors
FEW = 8  # words of one block up to which batched products in fp32 are faster than in bf16


class Stack(NamedTuple):
    """The factors of K choices, scaled: down (K, R, D_in), up (K, R, D_out).

    `stamp` tells whether the numbers that they were made from are still the same.
    """

    lives: tuple[Live, ...]
    down: Tensor
    up: Tensor
    stamp: tuple[object, ...]


class Blocks(NamedTuple):
    """Which rows stand in each block, and whose factors it is multiplied with.

    Attributes:
        count: C.
        order: (C·n,) rows, any row where a block is not full; None where block i is row i.
        real: The places in `order` that count; None where all do.
        whose: (C,) places in the stack, -1 for the base alone; None where block i has factors i.
    """

    count: int
    order: Tensor | None
    real: Tensor | None
    whose: Tensor | None


class Grouped:
    """What rows of a batch on different adapters add to one host.

    Args:
        seat: The host's.
        choices: For each row its live adapters.
        stack: The factors of all that add something here.
    """

    def __init__(self, seat: Seat, choices: Sequence[Live], stack: Stack) -> None:
        self.seat, self.stack = seat, stack
        self.device, self.kind = stack.down.device, stack.down.device.type
        place = {live: index for index, live in enumerate(stack.lives)}
        self.choices = [place.get(live, -1) for live in choices]
        self.made: dict[tuple[int, torch.dtype], tuple[Blocks, Tensor, Tensor]] = {}
        self.narrow = len(stack.down) * stack.down.shape[1] <= NARROW
        self.all: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor] | None] = {}

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this call is one that it can compute, if rows can be told in what it is given."""
        fine = fits(self.seat.host, self.device, self.kind, args, kwargs)
        return fine and args[0].numel() > 0

    def output(self, x: Tensor, rows: int) -> Tensor:
        """The host's output, changed: x (B, T, D_in) or flattened, y likewise."""
        y = type(self.seat.host).forward(self.seat.host, x)  # type: ignore[attr-defined]
        into = y.view(rows, -1, y.shape[-1])
        blocks = rows if rows <= ALONE else len(self.stack.down)
        dtype = computed_in(x, rows * into.shape[1] // blocks, FEW)
        if self.narrow and rows > ALONE and dtype.itemsize == 2 and into.dtype == dtype:
            whole = self._of_all(rows, dtype)
            if whole is not None:
                hidden, down, up = whole
                low = torch.mm(x.reshape(-1, x.shape[-1]), down)
                low.view(rows, -1, low.shape[-1]).masked_fill_(hidden, 0)
                into.view(len(low), -1).addmm_(low, up)
                return y
        given = x.reshape(rows, -1, x.shape[-1]).to(dtype)
        how, down, up = self._factors(rows, dtype)
        if how.order is None:
            low = torch.bmm(given, down)
            if into.dtype == dtype:
                into.baddbmm_(low, up)
            else:
                into.add_(torch.bmm(low, up))
            return y
        order, real = how.order, how.real
        given = given.index_select(0, order).view(how.count, -1, given.shape[-1])
        added = torch.bmm(torch.bmm(given, down), up).view(len(order), -1, into.shape[-1])
        if real is not None:
            order, added = order.index_select(0, real), added.index_select(0, real)
        into.index_add_(0, order, added.to(into.dtype))
        return y

    def _of_all(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor] | None:
        """What of K·R is not a row's own, and all factors (D_in, K·R), (K·R, D_out), made once.

        None where one is not finite: multiplied with zero it would reach the rows of others.
        """
        if (rows, dtype) not in self.all:
            down, up = self.stack.down.to(dtype), self.stack.up.to(dtype)
            count, rank, _ = down.shape
            own = torch.tensor(self._whose(rows), device=down.device)
            others = own.unsqueeze(1) != torch.arange(count, device=down.device)
            hidden = others.repeat_interleave(rank, 1).unsqueeze(1)  # (B, 1, K·R)
            whole = hidden, down.flatten(0, 1).t(), up.flatten(0, 1)
            self.all[rows, dtype] = whole if up.isfinite().all() else None
        return self.all[rows, dtype]

    def _whose(self, rows: int) -> list[int]:
        """For each of so many rows the place of its factors, -1 for none."""
        each = rows // len(self.choices)
        return [one for one in self.choices for _ in range(each)]

    def _factors(self, rows: int, dtype: torch.dtype) -> tuple[Blocks, Tensor, Tensor]:
        """Blocks of so many rows with their factors (C, D_in, R) and (C, R, D_out), made once."""
        made = self.made.get((rows, dtype))
        if made is None:
            down, up = self.stack.down.to(dtype), self.stack.up.to(dtype)
            blocks = blocks_of(self._whose(rows), len(down), down.device)
            if blocks.whose is not None:
                down, up = (one.index_select(0, blocks.whose.clamp(min=0)) for one in (down, up))
                up.masked_fill_((blocks.whose < 0).view(-1, 1, 1), 0)
            made = self.made[rows, dtype] = (blocks, down.transpose(1, 2), up)
        return made


def grouped(seat: Seat, choices: Sequence[Live]) -> Grouped | None:
    """How all that the rows' adapters add at a seat is computed as one, if it is products."""
    names = dict.fromkeys(name for live in choices for name, _ in live)
    deltas = [delta for name in names for delta in seat.deltas.get(name, ())]
    if not deltas or not plain(seat) or not all(adds_a_product(delta) for delta in deltas):
        return None
    here = {live for live in choices if any(name in seat.deltas for name, _ in live)}
    return Grouped(seat, choices, _stack(seat, tuple(sorted(here))))


def stamp(graft: Graft, lives: Sequence[Live]) -> tuple[object, ...]:
    """What changes when the numbers of these adapters do."""
    names = dict.fromkeys(name for live in lives for name, _ in live)
    runs = [flat for name in names for flat in graft.adapters[name].runs.values()]
    return tuple((id(f), f.data_ptr(), 0 if f.is_inference() else f._version) for f in runs)


def _stack(seat: Seat, lives: tuple[Live, ...]) -> Stack:
    """The stacked factors of these choices, those of the last call if they are still the same."""
    graft = seat.graft
    now = stamp(graft, lives)
    held = graft.stacks.get(seat.path)
    if held is None or held.lives != lives or held.stamp != now:
        pairs = [_joined(seat, live) for live in lives]
        rank = max(len(down) for down, _ in pairs)
        downs, ups = (
            [one if len(one) == rank else F.pad(one, (0, 0, 0, rank - len(one))) for one in side]
            for side in zip(*pairs, strict=True)
        )
        held = graft.stacks[seat.path] = Stack(lives, torch.stack(downs), torch.stack(ups), now)
    return held


def _joined(seat: Seat, live: Live) -> tuple[Tensor, Tensor]:
    """All factors of one choice at a seat, side by side: (R, D_in), and scaled (R, D_out)."""
    downs, ups = [], []
    for delta, weight in seat.acting(live):
        a, b, scale = product(delta)[:3]
        up, rows = b.t() * (scale * weight), delta.site.rows
        if rows is not None:
            up = rows.place(up.new_zeros(len(up), rows.groups * rows.width), up)
        downs.append(a)
        ups.append(up)
    return torch.cat(downs).float(), torch.cat(ups).float()


def blocks_of(whose: Sequence[int], count: int, device: torch.device) -> Blocks:
    """How rows stand in blocks, given for each its place among `count` factors, -1 for none."""
    everyone = list(range(count))
    if len(whose) <= ALONE or list(whose) == everyone:
        own = None if list(whose) == everyone else torch.tensor(whose, device=device)
        return Blocks(len(whose), None, None, own)
    rows: list[list[int]] = [[] for _ in everyone]
    for row, one in enumerate(whose):
        if one >= 0:
            rows[one].append(row)
    size = max(1, -(-sum(map(len, rows)) // count))  # at most twice as many blocks as factors
    blocks = [
        (one, mine[at : at + size])
        for one, mine in enumerate(rows)
        for at in range(0, len(mine), size)
    ]
    order = [row for _, mine in blocks for row in mine + mine[:1] * (size - len(mine))]
    real = [index * size + at for index, (_, mine) in enumerate(blocks) for at in range(len(mine))]
    owners = [one for one, _ in blocks]
    return Blocks(
        len(blocks),
        torch.tensor(order, device=device),
        None if len(real) == len(order) else torch.tensor(real, device=device),
        None if owners == everyone else torch.tensor(owners, device=device),
    )
