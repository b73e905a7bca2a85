"""A learned gate around any method that adds (UniPELT, Mao et al. 2021, arXiv 2110.07577).

    y ← y + g · (change of the part),   g = mean over real tokens of σ(u·h + a),   u (D,), a (1,)

u ~ N(0, 0.02²) and a = 0, so that gates start near ½. h is what enters the part: the input of a
LoRA's or a prefix's projection, the adapter's own input. Each delta of the part has its own gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from espalier.deltas import Delta
from espalier.errors import SettingError, SiteError
from espalier.places import Sites
from espalier.plain.gated import OVER, GatedDelta
from espalier.recipes import Method, check


@dataclass(frozen=True)
class Gated(Method):
    """A method whose changes are gated by the input; write `Gated(LoRA())`.

    The paper's gate on LoRA replaces α / R: give the LoRA `alpha=rank` for that.

    Args:
        part: The method within.
        over: What one gate value is for: a "sequence" (the paper's), a "token", or "auto":
            sequences, but tokens in causal decoders, where a mean would look ahead.
    """

    part: Method
    over: str = "auto"

    def __post_init__(self) -> None:
        check(self, "part", isinstance(self.part, Method), "one method, as in Gated(LoRA())")
        check(self, "over", self.over in OVER, f"one of {', '.join(OVER)}")
        if isinstance(self.part, Gated):
            raise SettingError("Gated(Gated(...)): one gate around a method is enough")
        object.__setattr__(self, "learning_rate", self.part.learning_rate)

    @property
    def identity(self) -> bool:
        """Whether the part is the identity when fresh."""
        return self.part.identity

    def plain(self, deltas: Sequence[Delta] = ()) -> Gated:
        """The gate around the plain part."""
        return Gated(self.part.plain(), self.over)

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """A gate around each delta of the part."""
        found = self.part.deltas(model, places)
        for delta in found:
            if delta.replaces or delta.embeds:
                raise SiteError(
                    f"Gated({type(self.part).__name__}): {delta.site.path} is not changed by "
                    "adding something, so there is nothing to gate; leave the gate out"
                )
            if delta.regime is not None:
                raise SiteError(
                    f"Gated({type(self.part).__name__}): its numbers follow a schedule of their "
                    "own while they train, which a gate would disturb; leave the gate out"
                )
            if delta.site.kind in ("embedding", "conv2d"):
                raise SiteError(
                    f"Gated({type(self.part).__name__}): a gate reads states of tokens, which "
                    f"{delta.site.path}, a {delta.site.kind}, is not given; leave the gate out"
                )
        return [GatedDelta(delta, self.over) for delta in found]
