"""Where changes of single layers can stand, and with which rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from espalier.errors import SiteError
from espalier.places import Conv, Site


def can_fold(conv: Conv) -> bool:
    """Whether a low-rank change of a convolution is a change of its kernel that fits it."""
    return conv.groups == 1 and (conv.padding_mode == "zeros" or isinstance(conv.padding, tuple))


def refusal(method: str, site: Site, takes: str) -> str:
    """Why a method that changes single layers cannot stand at a site."""
    if site.role == "block":
        return (
            f"{method} stands on single layers; {site.path} is a whole block. For the layers "
            f"within blocks write 'all-linear', for those of this one 'all-linear@{site.layer}'"
        )
    if site.span:
        return (
            f"{method} stands on single layers; {site.role!r} is a span from {site.enter} to "
            f"{site.path}. For the layers within it write '{site.role}.*'"
        )
    what = "an embedding" if site.kind == "embedding" else f"a {site.kind}"
    if site.conv and site.conv.groups > 1:
        what = "a grouped convolution"
    return f"{method} cannot stand on {site.path}, {what}; it takes {takes}"


def ranked(chosen: Sequence[Site], rank: int, ranks: Sequence[int]) -> Iterable[tuple[Site, int]]:
    """Each selected place with its rank: its own, or the one that all have.

    Raises:
        SiteError: There are ranks, but not one for each place.
    """
    if ranks and len(ranks) != len(chosen):
        raise SiteError(
            f"ranks gives {len(ranks)} places a rank, but the selector takes {len(chosen)} of this "
            "model; give one for each, in model order"
        )
    return zip(chosen, ranks or (rank,) * len(chosen), strict=True)
