"""Where ladders stand: the stacks of a model, where each ends, and which of them reads which."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn

from espalier.deltas import Delta, Trained
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites
from espalier.plain.ladder import Bridge, Ladder
from espalier.plain.ladder_prune import Part, Pruning, near_zero
from espalier.plain.ladder_side import (
    SideBlock,
    config_of,
    made,
    narrow_norm,
    narrowed,
    width_of_heads,
)

_ENTRANCE = re.compile(r"emb|pre", re.I)  # norms beside a list of blocks that come before it


@dataclass(frozen=True, slots=True)
class Form:
    """What is the same for the ladders beside all stacks.

    Attributes:
        reduction: r.
        temperature: T.
        dropout: Share dropped before U, in training only.
        init: "magnitude", "fisher" or "random".
        projections: "select" or "random".
        recompute: Whether side blocks run again in the backward pass.
    """

    reduction: int
    temperature: float
    dropout: float
    init: str
    projections: str
    recompute: bool


@dataclass(frozen=True, slots=True)
class Stack:
    """A list of blocks.

    Attributes:
        blocks: All of them, in order.
        kept: The numbers of those beside which a side block stands.
        end: The module at which the stack ends: a norm beside the list, else the last block.
        crosses: Whether the blocks attend to another stack's states.
    """

    blocks: tuple[Site, ...]
    kept: tuple[int, ...]
    end: Site
    crosses: bool


def ladders(model: nn.Module, places: Sites, selector: str, form: Form) -> list[Delta]:
    """One ladder for each stack with selected blocks.

    Raises:
        SiteError: Something else than blocks is selected, or a stack cannot have a ladder.
    """
    modules = base_modules(model)
    stacks = list(_stacks(places, selector))
    readers = [stack for stack in stacks if stack.crosses]
    read = {id(stack): _read_by(stack, stacks) for stack in readers}
    known: dict[int, tuple[Bridge, _Built]] = {}
    found: list[Delta] = []
    for stack in sorted(stacks, key=lambda stack: stack.crosses):
        is_read = any(stack is source for source in read.values())
        bridge, source = (Bridge() if is_read else None), None
        if stack.crosses:
            bridge, source = known[id(read[id(stack)])]
        built = _Built(modules, places, stack, form, source)
        if bridge is not None and is_read:
            known[id(stack)] = (bridge, built)
        found.append(built.ladder(bridge, not is_read))
    return found


def _stacks(places: Sites, selector: str) -> Iterator[Stack]:
    chosen = places.select(selector)
    if other := next((site for site in chosen if site.role != "block"), None):
        raise SiteError(
            f"a ladder's side blocks stand beside whole blocks (sites='block, !block@0'), not at "
            f"{other.role!r} {other.path}"
        )
    taken = {site.path for site in chosen}
    lists: dict[str, list[Site]] = {}
    for site in places.whole:
        if site.role == "block":
            lists.setdefault(_above(site.path), []).append(site)
    for container, blocks in lists.items():
        kept = tuple(i for i, site in enumerate(blocks) if site.path in taken)
        if kept:
            inside = tuple(site.path + "." for site in blocks)
            crosses = any(
                s.role.startswith("cross.") and s.path.startswith(inside) for s in places.whole
            )
            yield Stack(tuple(blocks), kept, _end(places, container, blocks[-1]), crosses)


def _above(path: str) -> str:
    return path.rpartition(".")[0]


def _end(places: Sites, container: str, last: Site) -> Site:
    """The norm beside the list of blocks that comes after it, else the last block."""
    whole = list(places.whole)
    after = whole[whole.index(last) :]
    norms = [s for s in after if s.role == "norm" and s.layer is None and s.n_out == last.n_out]
    for site in norms:
        if _above(site.path) == _above(container) and not _ENTRANCE.search(
            site.path[len(_above(site.path)) :]
        ):
            return site
    return replace(last, layer=None)  # it stands in no layer that could be skipped


def _read_by(stack: Stack, stacks: Iterable[Stack]) -> Stack:
    """The stack whose states this one attends to."""
    sources = [s for s in stacks if not s.crosses and s.blocks[0].stack != stack.blocks[0].stack]
    if len(sources) != 1 or sources[0].end.n_out != stack.end.n_out:
        raise SiteError(
            f"the side of {_above(stack.blocks[0].path)} reads the side of the encoder that its "
            "blocks attend to: that needs a ladder of its own, of the same width (sites='block' "
            "takes all stacks)"
        )
    return sources[0]


class _Built:
    """What a ladder beside one stack is made of."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        places: Sites,
        stack: Stack,
        form: Form,
        source: _Built | None,
    ) -> None:
        self.modules, self.stack, self.form = modules, stack, form
        self.sites = list(places.whole)
        first = stack.blocks[0]
        self.config = narrowed(
            config_of(modules, first.path), first.path, modules[first.path], form.reduction
        )
        self.widths = (first.n_out, first.n_out // form.reduction)
        self.blocks = [self._side(j) for j in range(len(stack.kept))]
        parts = [
            Part(path, side, self._inside(path))
            for (path, _), side in zip(self.kept, self.blocks, strict=True)
        ]
        ends = (first.path, stack.end.path)
        above = None if source is None else source.pruning
        self.pruning = Pruning(modules, parts, ends, self.widths, above)

    @property
    def kept(self) -> list[tuple[str, int]]:
        """Paths and numbers of the blocks with a side block."""
        return [(self.stack.blocks[at].path, at) for at in self.stack.kept]

    def ladder(self, bridge: Bridge | None, ends: bool) -> Ladder:
        """The delta. `ends`: whether its output takes the place of the stack's."""
        stack, form, (wide, small) = self.stack, self.form, self.widths
        select = form.projections == "select" and form.init != "random"
        down, up = (self.pruning.down, self.pruning.up) if select else (near_zero, near_zero)
        numbers = {"gates": Trained((len(stack.blocks),))}
        for i in range(len(stack.kept) + 1):
            numbers[f"down.{i}.weight"] = Trained((small, wide), down)
            numbers[f"down.{i}.bias"] = Trained((small,))
        for i, side in enumerate(self.blocks):
            fresh = cache(partial(self._anew, i))
            for name, shape in side.shapes.items():
                numbers[side.keys[name]] = Trained(shape, self._start(i, name, fresh))
        norm = None
        if stack.end.role == "norm":
            norm = narrow_norm(self.modules[stack.end.path], small)
            for name, _ in norm.named_parameters():
                start = partial(self.pruning.end, name)
                numbers[f"norm.{name}"] = Trained((small,), start)
        if ends:
            numbers["up.weight"] = Trained((wide, small), up)
            numbers["up.bias"] = Trained((wide,))
        settings = (form.temperature, form.dropout, form.recompute)
        first = stack.blocks[0].path
        delta = Ladder(stack.end, first, self.kept, self.blocks, norm, settings, bridge, numbers)
        if form.init == "fisher":
            self._refuse_packed()
            delta.pruning, delta.measures, delta.selects = self.pruning, True, select
        return delta

    def _start(
        self, i: int, name: str, fresh: Callable[[], nn.Module]
    ) -> Callable[[Tensor], object]:
        """What fills a parameter of side block i."""
        if self.form.init == "random":
            return lambda view: view.copy_(fresh().get_parameter(name))
        return partial(self.pruning.start, i, name)

    def _anew(self, i: int) -> nn.Module:
        """Side block i as the model's own code starts one."""
        block, start = self._made(i, "cpu"), getattr(self.modules[""], "_init_weights", None)
        return block if start is None else block.apply(start)

    def _made(self, i: int, device: str) -> nn.Module:
        path, at = self.kept[i]
        first = self.modules[self.stack.blocks[0].path] if i == 0 else None
        with torch.device(device):
            return made(self.modules[path], first, self.config, at, path)

    def _side(self, i: int) -> SideBlock:
        path, _ = self.kept[i]
        block = self.modules[path]
        module = self._made(i, "meta")
        if next(module.buffers(), None) is not None:
            module = self._made(i, "cpu")  # what it computes from its configuration is needed
        heads = (width_of_heads(module) or 0, width_of_heads(block) or 0)
        side = SideBlock(module, heads, f"side.{i}.")
        wide = {tuple(p.shape) for p in block.parameters() if p.dim() > 1}
        if side.shapes and all(s in wide for s in side.shapes.values() if len(s) > 1):
            raise SiteError(f"{path}: {type(block).__name__} ignores its configuration's widths")
        return side

    def _inside(self, path: str) -> dict[str, tuple[Site, ...]]:
        """The places in a block, by path within it."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.path.startswith(path + ".") and not site.span:
                found.setdefault(site.path[len(path) + 1 :], []).append(site)
        return {inside: tuple(sites) for inside, sites in found.items()}

    def _refuse_packed(self) -> None:
        for part in self.pruning.parts:
            for sites in part.sites.values():
                if packed := next((site for site in sites if site.bits), None):
                    raise SiteError(
                        f"{packed.path} holds {packed.bits}-bit weights, which have no gradient "
                        "for init='fisher'; take 'magnitude' or 'random'"
                    )
