"""BitFit: bias-only tuning (Ben Zaken et al. 2021, arXiv 2106.10199).

    c → c + Δc   for every bias c of the linear, convolution and norm layers; weights stay

The biases are those of the backbone, embeddings' norm and pooler with them; those of the task head
train with the head. Models without biases (Llama, T5) can be given them: created as zeros, so a
fresh adapter changes nothing, and merged into biases that the base did not have. Bias tables that
are no such biases (relative positions) are left alone. The biases are vectors: never decayed.

Without rotary positions a key's bias adds the same to all scores of a query and so has no gradient
but rounding; it is trained like the others, as in the paper, to no effect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.nn.modules.conv import _ConvNd

from espalier.deltas import Delta
from espalier.errors import SiteError
from espalier.modules import backbone, base_modules
from espalier.places import Site, Sites
from espalier.plain.shift import Shift
from espalier.plain.whole import replacements
from espalier.recipes import Method, check

ALL = "all"
NAMES = ("bias", "in_proj_bias")
BIASED = ("linear", "conv1d", "conv2d", "norm")
KEYS = ("attention.k", "cross.k")
BESIDES = (nn.Linear, _ConvNd, nn.MultiheadAttention)
CREATED = ("attention.", "cross.", "ffn.", "pooler")


@dataclass(frozen=True)
class BitFit(Method):
    """Train the biases.

    Args:
        sites: "all" of the backbone, or a selector; "attention.q, ffn.in" is the paper's small
            variant.
        create: Give linear layers of attention, feed-forward and pooler that have no bias one.
    """

    learning_rate: ClassVar[float] = 1e-3

    sites: str = ALL
    create: bool = False

    def __post_init__(self) -> None:
        check(self, "sites", isinstance(self.sites, str), "'all' or a selector such as 'ffn.in'")
        check(self, "create", isinstance(self.create, bool), "True or False")

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """Trained copies of the biases that there are, and new ones where they are created."""
        modules = base_modules(model)
        if self.sites == ALL:
            sites, others = _backbone(model, modules, places)
            asked: list[Site] = []
        else:
            selected = places.select(self.sites)
            sites, others = _layers(places, selected), set[str]()
            asked = [site for site in selected if not site.span]
            self._refuse_lacking(places, asked, modules)
        whole = {site.path for site in sites if site.rows is None and _has(modules, site.path)}
        whole |= others
        found = replacements(modules, lambda path, name: name in NAMES and path in whole)
        # A slice of a fused host has a part of its bias; that part is trained as a difference.
        found += [self.build(s) for s in sites if s.rows is not None and _has(modules, s.path)]
        if self.create:
            lacking = [site for site in sites if not _has(modules, site.path)]
            found += [self.build(s) for s in lacking if s in asked or _creatable(s)]
        if not found:
            raise SiteError(
                f"{places.notes.model} has no biases to train; BitFit(create=True) gives its "
                "linear layers some, which start at zero"
            )
        keys = {site.path for site in places.whole if site.role in KEYS and site.rows is None}
        for delta in found:
            delta.idle = delta.site.path in keys or delta.site.role in KEYS
        return found

    def build(self, site: Site) -> Delta:
        """A bias added to what the host gives, or to the rows of a slice of it."""
        if site.kind not in ("linear", "conv1d"):
            raise SiteError(
                f"BitFit: {site.path}, a {site.kind}, has no bias, and one can be created for "
                "linear layers only"
            )
        return Shift(site)

    def _refuse_lacking(
        self, places: Sites, sites: Iterable[Site], modules: Mapping[str, nn.Module]
    ) -> None:
        """Raise where a selected role has no bias at all: nothing is passed over in silence."""
        have = {site.role for site in sites if _has(modules, site.path)}
        lacking = {site.role for site in sites} - have
        if lacking and not self.create:
            raise SiteError(
                f"{', '.join(sorted(lacking))} of {places.notes.model} has no bias; leave it out "
                "of sites=, or create biases that start at zero with create=True"
            )


def _backbone(
    model: nn.Module, modules: Mapping[str, nn.Module], places: Sites
) -> tuple[list[Site], set[str]]:
    """The backbone's layers, and paths of modules with biases that are no places of the model."""
    inside = backbone(model)
    prefix = f"{inside}." if inside else ""
    sites = [s for s in places.whole if s.kind in BIASED and not (s.span or s.rows)]
    known = {site.path for site in sites}
    others = {
        path
        for path, module in modules.items()
        if path.startswith(prefix) and path not in known and isinstance(module, BESIDES)
    }
    return [s for s in sites if s.path.startswith(prefix) and s.role != "head"], others


def _layers(places: Sites, sites: Iterable[Site]) -> list[Site]:
    """Single layers; a block stands for those within it."""
    found: dict[tuple[str, str], Site] = {}
    for site in sites:
        if site.span and site.role != "block":
            raise SiteError(
                f"BitFit trains layers; for those in {site.role!r} write '{site.role}.*'"
            )
        within = [s for s in places.whole if s.path.startswith(f"{site.path}.")]
        inner = [s for s in within if s.kind in BIASED and not (s.span or s.rows)]
        found.update({(s.path, s.role): s for s in (inner if site.span else [site])})
    return list(found.values())


def _has(modules: Mapping[str, nn.Module], path: str) -> bool:
    return any(modules[path]._parameters.get(name) is not None for name in NAMES)


def _creatable(site: Site) -> bool:
    return site.kind in ("linear", "conv1d") and site.role.startswith(CREATED)
