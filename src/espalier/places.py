"""Where: the places of a model, by role.

    sites(model)                          every place, printable as a table
    sites(model).select("attention.q")    those a selector asks for

A role is what a place does (`attention.q`, `ffn.out`, `norm`); a site is one role at one path of
one model. Roles partition the modules: only a fused host (one linear for q, k and v) stands both
under its fused role and under its slices, which say in `rows` which output features are theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CHILD", "Conv", "Rows", "Site", "Sites", "sites"]

CHILD = "espalier"  # the one child of a model's root that is ours; no place of it is a site


@dataclass(frozen=True, slots=True)
class Rows:
    """The output features of a fused host that one role computes.

    An output (…, groups × width) viewed as (…, groups, width) has them at [start:stop] of every
    group. A contiguous slice has one group; hosts that interleave per head have one per head.
    """

    groups: int
    width: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many output features these are."""
        return self.groups * (self.stop - self.start)

    def take(self, y: Tensor) -> Tensor:
        """These features of y (…, groups·width): (…, size)."""
        if self.groups == 1:
            return y[..., self.start : self.stop]
        return y.unflatten(-1, (self.groups, self.width))[..., self.start : self.stop].flatten(-2)

    def place(self, y: Tensor, part: Tensor) -> Tensor:
        """Y with these features replaced by `part`; y itself is not written to."""
        import torch

        whole = y.unflatten(-1, (self.groups, self.width))
        inner = part.unflatten(-1, (self.groups, self.stop - self.start))
        parts = (whole[..., : self.start], inner, whole[..., self.stop :])
        return torch.cat(parts, dim=-1).flatten(-2)


@dataclass(frozen=True, slots=True)
class Conv:
    """The geometry of a Conv2d host."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str


@dataclass(frozen=True, slots=True)
class Site:
    """One role at one path of one model, with its widths.

    `path` is the host; for the spans `attention`, `cross` and `ffn` it is the out-projection, where
    the change leaves, and `enter` is the module whose input the change reads. A `block` enters and
    leaves at itself. `kind` is linear, conv1d (transformers' Conv1D, weight [in, out]), conv2d,
    embedding, norm or block. `tied` lists the paths that hold the very same weight. `kv` has the
    widths of all keys and of all values of an attention span, None where they are not known.
    """

    role: str
    path: str
    kind: str
    layer: int | None
    stack: str
    n_in: int
    n_out: int
    rows: Rows | None = None
    enter: str | None = None
    conv: Conv | None = None
    tied: tuple[str, ...] = ()
    bits: int | None = None
    kv: tuple[int, int] | None = None

    @property
    def span(self) -> bool:
        """Whether the change enters at one place and leaves at another."""
        return self.enter is not None


@dataclass(frozen=True, slots=True)
class Notes:
    """What a survey found besides sites.

    `unknown` maps a fused host without slices to the reason; `bare` lists what holds weights but
    offers no place (stacked experts, bare parameters, Conv1d), as (path, why).
    """

    model: str = ""
    stacks: tuple[str, ...] = ()
    unknown: dict[str, str] = field(default_factory=dict)
    bare: tuple[tuple[str, str], ...] = ()


class Sites(Sequence[Site]):
    """The places of a model in model order; prints as a table, narrows with `select`.

    `head` lists the modules of the task head that trains beside an adapter, while it is built.
    """

    __slots__ = ("_all", "_sites", "head", "notes")

    def __init__(
        self, found: Iterable[Site], notes: Notes | None = None, all_: Sites | None = None
    ) -> None:
        self._sites = tuple(found)
        self.notes = notes or Notes()
        self._all = all_
        self.head: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> Site: ...
    @overload
    def __getitem__(self, index: slice) -> Sites: ...
    def __getitem__(self, index: int | slice) -> Site | Sites:
        if isinstance(index, slice):
            return self._narrow(self._sites[index])
        return self._sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sites) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    def _narrow(self, found: Iterable[Site]) -> Sites:
        return Sites(found, self.notes, self._all or self)

    def beside(self, head: Iterable[str]) -> Sites:
        """The same places, for an adapter that trains this task head beside it."""
        found = self._narrow(self._sites)
        found.head = tuple(head)
        return found

    @property
    def whole(self) -> Sites:
        """All places of the model, where these are a selection."""
        return self._all or self

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that occur, in the grammar's order."""
        from espalier.grammar import ROLES

        here = {site.role for site in self._sites}
        return tuple(role for role in ROLES if role in here)

    @property
    def unnamed(self) -> tuple[str, ...]:
        """The paths of linears and convolutions nobody could name: sites of role "other"."""
        return tuple(site.path for site in self._sites if site.role == "other")

    def select(self, selector: str) -> Sites:
        """The sites a selector asks for, each once, in model order.

        Raises:
            SiteError: a term matches nothing; says what this model has and what comes near.
        """
        from espalier.selectors import select

        return self._narrow(select(self, selector))

    def __str__(self) -> str:
        from espalier.place_table import plain

        return plain(self)

    def __repr__(self) -> str:
        return f"<{len(self)} sites of {self.notes.model or 'a model'}: {', '.join(self.roles)}>"

    def __rich__(self) -> Any:
        from espalier.place_table import table

        return table(self)


def sites(model: nn.Module) -> Sites:
    """Every place of a model, in model order; works on any module, best on transformers models."""
    from espalier.survey import survey

    return survey(model)
