"""(IA)³: infused adapter by inhibiting and amplifying inner activations (Liu et al. 2022,
arXiv 2205.05638).

    K' = l_k ⊙ (x W_kᵀ + c_k)      V' = l_v ⊙ (x W_vᵀ + c_v)      FFN(x) = (l_ff ⊙ h) W_outᵀ + c

with l_k, l_v (h_kv · d_h) at every self- and cross-attention and l_ff (D_ff) on the hidden values
h that enter the feed-forward's second layer; where there is a gate, h is the gated product. Keys
are scaled as the projection gives them, before rotary positions, so that merging is exact. The
vectors start as ones, so a fresh adapter changes nothing, and are never decayed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.errors import SiteError
from espalier.places import Site, Sites
from espalier.plain.scale import ScaleIn, ScaleOut
from espalier.plain.standing import refusal
from espalier.recipes import Method, check

KEYS_AND_VALUES = "attention.k, attention.v, cross.k, cross.v"


@dataclass(frozen=True)
class IA3(Method):
    """Scale keys, values and the feed-forward's hidden values by learned vectors.

    Args:
        sites: Linear layers whose output is scaled; by default the keys and values of every
            attention, of cross attention where the model has it.
        hidden: Linear layers whose input is scaled; "" for none.
    """

    learning_rate: ClassVar[float] = 3e-3

    sites: str = KEYS_AND_VALUES
    hidden: str = "ffn.out"

    def __post_init__(self) -> None:
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'attention.k'")
        check(self, "hidden", isinstance(self.hidden, str), "a selector such as 'ffn.out'")
        some = bool(self.sites.strip() or self.hidden.strip())
        check(self, "sites", some, "a selector where hidden is empty too")

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """A vector on the output of each of `sites`, and on the input of each of `hidden`."""
        found = [self.build(site) for site in self._scaled(places)]
        if self.hidden.strip():
            found += [_scaled_input(site) for site in places.select(self.hidden)]
        return found

    def build(self, site: Site) -> Delta:
        """A vector on the output of the site."""
        return ScaleOut(_linear(site))

    def _scaled(self, places: Sites) -> Iterable[Site]:
        if not self.sites.strip():
            return ()
        if self.sites != KEYS_AND_VALUES:
            return places.select(self.sites)
        for path, reason in places.notes.unknown.items():
            role = next((site.role for site in places if site.path == path), "")
            if role.startswith(("attention.", "cross.")):
                raise SiteError(
                    f"IA3 scales keys and values, but {path} computes them together with others "
                    f"and {reason}; name the sites that you mean with sites='...'"
                )
        # Cross attention is left out where the model has none; keys and values must be there.
        crossed = not {"cross.k", "cross.v"}.isdisjoint(places.roles)
        return places.select(KEYS_AND_VALUES if crossed else "attention.k, attention.v")


def _scaled_input(site: Site) -> Delta:
    if site.rows is not None:
        raise SiteError(
            f"IA3 cannot scale the input of {site.role!r} alone: {site.path} computes it together "
            "with others from one input"
        )
    return ScaleIn(_linear(site))


def _linear(site: Site) -> Site:
    """The site, if it is a linear layer. Raises SiteError where a vector cannot stand."""
    if site.span or site.kind not in ("linear", "conv1d"):
        raise SiteError(refusal("IA3", site, "linear layers"))
    return site
