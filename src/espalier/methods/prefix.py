"""Prefix-tuning (Li and Liang, arXiv 2101.00190) and P-tuning v2 (Liu et al., arXiv 2110.07602).

    head(x) = softmax([q Kₚᵀ, q Kᵀ] / √d_h) [Vₚ; V],   Kₚ (L, h_kv·d_h), Vₚ likewise, per layer

Every attention gets L keys and values of its own, before the text's; in an encoder-decoder the
encoder's, the decoder's and the cross attention's are three separate families. While it trains,
the paper's prefix is made by a network for each family, [Kₚ, Vₚ] = tanh(E W₁ᵀ + b₁) W₂ᵀ + b₂ with
E (L, D) and M hidden units; `esp.to_plain` drops it. P-tuning v2 trains Kₚ and Vₚ themselves and
drops some of their entries at random in training. They start at N(0, std²). The paper's code has
N(0, 1), `std=1`, which is about twice the spread of small models' own values (0.4 to 0.7); short
trainings do not make good what that breaks. At 0.2 a fresh prefix disturbs no more than zeros do.

The text's positions stay as they are without a prefix (implementations that hand it over as a
cache move them up by L). A fresh prefix changes the model, and zeros would, too: every key takes
its share of the attention. `esp.prefix_from_text` starts it from real words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta, Trained
from espalier.places import Sites
from espalier.plain.prefix import MadePrefix, Prefix, shared_layer
from espalier.recipes import Method, check, check_number


@dataclass(frozen=True)
class PrefixTuning(Method):
    """Extra keys and values in every attention, made by a network while they train.

    Args:
        length: L, the virtual words. The paper takes 10 for tables, 200 for summaries.
        hidden: M, hidden units of the network (800 for summaries).
        reparametrize: Whether a network makes keys and values, or they train themselves.
        dropout: Share of entries of keys and values dropped in training.
        std: Standard deviation of keys and values at the start, where no network makes them.
        sites: Which attentions, as whole: "all-attention", "attention", "decoder/cross", …
    """

    learning_rate: ClassVar[float] = 1e-3

    length: int = 10
    hidden: int = 512
    reparametrize: bool = True
    dropout: float = 0.0
    std: float = 0.2
    sites: str = "all-attention"

    def __post_init__(self) -> None:
        for name in ("length", "hidden"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            check(self, name, whole and value >= 1, "a whole number of at least 1")
        check(self, "reparametrize", isinstance(self.reparametrize, bool), "True or False")
        share = isinstance(self.dropout, int | float) and 0 <= self.dropout < 1
        check(self, "dropout", share, "at least 0 and below 1")
        check_number(self, "std", lambda x: 0 <= x < 100, "a number of at least 0, such as 0.2")
        check(self, "sites", isinstance(self.sites, str), "a selector such as 'attention'")

    @property
    def identity(self) -> bool:
        """Never: the new keys take a share of the attention whatever they are."""
        return False

    def plain(self, deltas: Sequence[Delta] = ()) -> PrefixTuning:
        """The same keys and values without the network that made them."""
        return replace(self, reparametrize=False)

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """A prefix per attention; attentions of one kind in one stack share a first layer."""
        chosen = places.select(self.sites)
        if not self.reparametrize:
            return [Prefix(site, self.length, self.dropout, self.std) for site in chosen]
        shared: dict[tuple[str, str, int], dict[str, Trained]] = {}
        for site in chosen:
            kind = (site.stack, site.role, site.n_in)
            if kind not in shared:
                shared[kind] = shared_layer(self.length, site.n_in, self.hidden)
        return [
            MadePrefix(site, shared[site.stack, site.role, site.n_in], self.dropout)
            for site in chosen
        ]


@dataclass(frozen=True)
class PTuningV2(PrefixTuning):
    """Prefix-tuning as made for understanding tasks: no network, dropout on the prefix.

    Args:
        length: L; below 20 for simple classification, about 100 for labelling words.
        hidden: M, if a network is asked for.
        reparametrize: Whether a network makes keys and values.
        dropout: Share of entries of keys and values dropped in training.
        std: Standard deviation of keys and values at the start; the paper's code has 1.
        sites: Which attentions, as whole.
    """

    learning_rate: ClassVar[float] = 5e-3

    length: int = 20
    reparametrize: bool = False
    dropout: float = 0.1
