"""What narrow copies of blocks start from: a part of the trunk's own numbers, the weightiest.

Importance is |w|, or the mean squared gradient. One choice of dimensions of the stream serves the
whole stack; within a block each narrow head takes rows of one head of the trunk, the same of its
queries and keys, and the same of its values and the columns that read them. Where angles turn
queries and keys, these rows follow the frequencies that are left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.errors import SiteError
from espalier.places import Site
from espalier.plain.ladder_side import SideBlock, spread

_WRITERS = ("attention.o", "cross.o", "ffn.out")


class Part(NamedTuple):
    """A trunk block, the narrow one beside it, and the places in it by path within the block."""

    path: str
    side: SideBlock
    sites: Mapping[str, tuple[Site, ...]]


class Axes(NamedTuple):
    """Which outputs and inputs of a layer are taken; None for all."""

    rows: Tensor | None
    columns: Tensor | None


class Pruning:
    """The choice for one stack.

    Args:
        modules: The base's, by path.
        parts: The blocks with narrow ones beside them.
        ends: The paths of the stack's first block, whose numbers serve where a block has none, and
            of the module at which it ends.
        widths: Of the stream in the trunk and in the side.
        source: The choice for the encoder that the stack reads.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        parts: Sequence[Part],
        ends: tuple[str, str],
        widths: tuple[int, int],
        source: Pruning | None,
    ) -> None:
        self.modules, self.parts, self.widths = modules, parts, widths
        self.first, self.last = ends
        self.source = source
        self.squares: Mapping[str, Tensor] | None = None  # importance by data, by parameter
        self._axes: dict[int, dict[str, Axes]] = {}
        self._turned: dict[int, Tensor] = {}

    def measured(self) -> dict[str, tuple[str, str]]:
        """The parameters whose importance is asked for, as (path, name)."""
        linear = {s.path for p in self.parts for found in p.sites.values() for s in found}
        kinds = {path: self.modules[path] for path in linear}
        return {
            f"{path}.weight": (path, "weight")
            for path, module in sorted(kinds.items())
            if getattr(module._parameters.get("weight"), "ndim", 0) == 2
        }

    def weigh(self, squares: Mapping[str, Tensor]) -> None:
        """Choose anew, by the mean squared gradients of what is `measured`."""
        self.squares = squares
        self._axes, self._turned = {}, {}
        self.__dict__.pop("stream", None)

    @cached_property
    def stream(self) -> Tensor:
        """The dimensions (d/r,) of the stream that the side has, ascending."""
        wide, small = self.widths
        sites = [s for p in self.parts for found in p.sites.values() for s in found]
        writers = [s for s in sites if s.role in _WRITERS and s.n_out == wide and not s.span]
        if not writers:
            raise SiteError(f"nothing known writes to the stream of {self.first}; {_INSTEAD}")
        sums = [self._weights(site)[0] for site in writers]
        total = torch.stack([one.to(sums[0].device) for one in sums]).sum(0)
        return total.topk(small).indices.sort().values

    def start(self, at: int, name: str, view: Tensor) -> None:
        """Fill a parameter of the narrow block beside block `at`."""
        part = self.parts[at]
        owner, _, leaf = name.rpartition(".")
        path = f"{part.path}.{owner}" if owner else part.path
        if self._parameter(path, leaf) is None:  # what only the stack's first block has
            path = f"{self.first}.{owner}"
        sites = [s for s in part.sites.get(owner, ()) if s.kind in ("linear", "conv1d")]
        if not sites:
            own = self._parameter(path, leaf)
            if own is None:
                raise SiteError(f"{part.path} has no {name} to start from; {_INSTEAD}")
            self.take(own, view, f"{path}.{leaf}", self._heads(at))
            return
        rows, columns = self._of(at)[owner]
        if leaf == "bias":
            bias = hosts.bias(self.modules[path])
            assert bias is not None
            view.copy_(_taken(bias, 0, rows))
            return
        weight = hosts.dense(self.modules[path], sites[0])
        weight = _taken(_taken(weight, 0, rows), 1, columns)
        view.copy_(weight.T if part.side.turned(owner) else weight)

    def down(self, view: Tensor) -> None:
        """Fill a projection (d/r, d) into the side: it takes the side's dimensions as they are."""
        near_zero(view)
        view[torch.arange(len(view), device=view.device), self.stream.to(view.device)] += 1

    def up(self, view: Tensor) -> None:
        """Fill the projection (d, d/r) out of the side: it puts them back where they were."""
        self.down(view.T)

    def end(self, name: str, view: Tensor) -> None:
        """Fill a parameter of the side's last norm."""
        own = self._parameter(self.last, name)
        assert own is not None
        self.take(own, view, f"{self.last}.{name}")

    def take(self, own: Tensor, view: Tensor, name: str, heads: Tensor | None = None) -> None:
        """Fill a view with what is left of a parameter in a narrower stream.

        Raises:
            SiteError: An axis of it is neither the stream nor as long as before.
        """
        value = hosts.whole(own.detach())
        for axis, (wide, small) in enumerate(zip(own.shape, view.shape, strict=True)):
            if wide == small:
                continue
            if (wide, small) == self.widths:
                kept = self.stream
            elif heads is not None and len(heads) == small:
                kept = heads
            else:
                raise SiteError(
                    f"which {small} of {wide} numbers of {name} to keep is not known; {_INSTEAD}"
                )
            value = _taken(value, axis, kept)
        view.copy_(value)

    def _parameter(self, path: str, name: str) -> nn.Parameter | None:
        module = self.modules.get(path)
        return None if module is None else module._parameters.get(name)

    def _weights(self, site: Site) -> tuple[Tensor, Tensor]:
        """The importance of each output and each input of a layer, of its site's rows alone."""
        if self.squares is None:
            score = hosts.dense(self.modules[site.path], site).abs()
        else:
            score = self.squares[f"{site.path}.weight"]
            score = score.T if site.kind == "conv1d" else score
        if site.rows is not None:
            score = site.rows.take(score.T).T
        return score.sum(1), score.sum(0)

    def _of(self, at: int) -> dict[str, Axes]:
        """The axes of every layer of block `at`, by its path in the block."""
        if at not in self._axes:
            part, found = self.parts[at], {}
            features = self._features(at)
            for owner, sites in part.sites.items():
                known = [s for s in sites if s.kind in ("linear", "conv1d") and not s.span]
                slices = sorted((s for s in known if s.rows), key=lambda s: s.rows.start)  # type: ignore[union-attr]
                if known and known[0].role.split(".")[0] in ("attention", "cross", "ffn"):
                    used = slices or known
                    columns = self._columns(used[0], features)
                    found[owner] = Axes(_rows(used, features), columns)
                elif known:
                    found[owner] = self._plain(known[0], part.side, owner)
            self._axes[at] = found
        return self._axes[at]

    def _plain(self, site: Site, side: SideBlock, owner: str) -> Axes:
        """The axes of a layer of no known role: the stream, or whole."""
        shape = side.shapes[f"{owner}.weight"]
        small = shape[::-1] if side.turned(owner) else shape
        kept = []
        for wide, narrow in zip((site.n_out, site.n_in), small, strict=True):
            if wide != narrow and (wide, narrow) != self.widths:
                raise SiteError(
                    f"which {narrow} of {wide} numbers of {site.path} to keep is not known; "
                    f"{_INSTEAD}"
                )
            kept.append(None if wide == narrow else self.stream)
        return Axes(*kept)

    def _columns(self, site: Site, features: Mapping[tuple[str, str], Tensor]) -> Tensor:
        if site.role in _WRITERS:
            return features["in", site.path]
        if site.role in ("cross.k", "cross.v") and self.source is not None:
            return self.source.stream
        return self.stream

    def _features(self, at: int) -> dict[tuple[str, str], Tensor]:
        """For each layer what is kept of its outputs ("out", path of its role) or its inputs."""
        part = self.parts[at]
        sites = [s for found in part.sites.values() for s in found if not s.span]
        found: dict[tuple[str, str], Tensor] = {}
        for family in ("attention", "cross"):
            own = [s for s in sites if s.role.startswith(family + ".")]
            if own:
                found |= self._attention(at, own, family)
        outs = [s for s in sites if s.role == "ffn.out"]
        for out in outs:
            near = out.path.rpartition(".")[0]
            ways = [s for s in sites if s.role in ("ffn.in", "ffn.gate")]
            if len(outs) > 1:  # experts: each has its own
                ways = [s for s in ways if s.path.rpartition(".")[0] == near]
            found |= self._ffn(at, out, ways)
        for site in sites:
            if site.role in _WRITERS:
                found["out", _label(site)] = self.stream
        return found

    def _attention(
        self, at: int, sites: Sequence[Site], family: str
    ) -> dict[tuple[str, str], Tensor]:
        """Rows of each head: the same of queries and keys, the same of values and their readers."""
        named = {s.role.partition(".")[2]: s for s in sites}
        part = self.parts[at]
        small, wide = part.side.head
        if (
            not {"q", "k", "v", "o"} <= named.keys()
            or len(sites) - len([s for s in sites if s.role.endswith(("qkv", ".kv"))]) != 4
            or not wide
        ):
            raise SiteError(f"the heads of {family} in {part.path} are not known; {_INSTEAD}")
        q, k, v = (self._weights(named[name])[0] for name in "qkv")
        o = self._weights(named["o"])[1]
        heads, kv = len(q) // wide, len(k) // wide
        group = heads // kv
        turned = "position_embeddings" in part.side.takes and family == "attention"
        if turned:
            half = spread(wide // 2, small // 2, q.device)
            same = torch.cat((half, wide // 2 + half)).expand(kv, small)
            self._turned[at] = same[0]
        else:
            queries = q.view(kv, group, wide).sum(1)
            same = (queries * k.view(kv, wide)).topk(small).indices.sort().values
        readers = o.view(kv, group, wide).sum(1)
        carried = (readers * v.view(kv, wide)).topk(small).indices.sort().values
        return {
            ("out", _label(named["q"])): _heads_of(same, group, wide),
            ("out", _label(named["k"])): _heads_of(same, 1, wide),
            ("out", _label(named["v"])): _heads_of(carried, 1, wide),
            ("in", named["o"].path): _heads_of(carried, group, wide),
        }

    def _ffn(self, at: int, out: Site, ways: Sequence[Site]) -> dict[tuple[str, str], Tensor]:
        """Hidden features of a feed-forward part, by what enters and what leaves them."""
        part = self.parts[at]
        owner = out.path[len(part.path) + 1 :]
        small = part.side.shapes[f"{owner}.weight"][not part.side.turned(owner)]
        score = self._weights(out)[1]
        for way in ways:
            score = score * self._weights(way)[0]
        kept = score.topk(small).indices.sort().values
        return {("in", out.path): kept, **{("out", _label(way)): kept for way in ways}}

    def _heads(self, at: int) -> Tensor | None:
        """What is kept of numbers that all heads share, such as a norm of queries."""
        self._of(at)
        return self._turned.get(at)


_INSTEAD = "start the side anew instead, with init='random'"


def near_zero(view: Tensor) -> None:
    """N(0, 0.01²), the paper's start of projections into the side and out of it."""
    view.normal_(std=0.01)


def _label(site: Site) -> str:
    return f"{site.role} {site.path}"


def _taken(value: Tensor, axis: int, kept: Tensor | None) -> Tensor:
    return value if kept is None else value.index_select(axis, kept.to(value.device))


def _heads_of(dims: Tensor, group: int, wide: int) -> Tensor:
    """Features (h·w,) of heads of `wide`, of which each takes the dimensions (h/group, w)."""
    each = dims.repeat_interleave(group, 0)
    return (each + wide * torch.arange(len(each), device=each.device).unsqueeze(1)).flatten()


def _rows(sites: Sequence[Site], features: Mapping[tuple[str, str], Tensor]) -> Tensor:
    """Output features of a layer, of a fused one those of its slices in their order."""
    parts = []
    for site in sites:
        kept = features.get(("out", _label(site)))
        if kept is None:
            raise SiteError(
                f"which outputs of {site.role} {site.path} to keep is not known; {_INSTEAD}"
            )
        if (rows := site.rows) is not None:
            span = rows.stop - rows.start
            kept = rows.start + kept // span * rows.width + kept % span
        parts.append(kept.view(1 if rows is None else rows.groups, -1))
    return torch.cat(parts, 1).flatten()
