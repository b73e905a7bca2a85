"""UniPELT (Mao et al. 2021, arXiv 2110.07577): prefix, adapter and LoRA, each behind a gate."""

from __future__ import annotations

from espalier.methods.gated import Gated
from espalier.methods.lora import LoRA
from espalier.methods.prefix import PrefixTuning
from espalier.methods.serial import SerialAdapter
from espalier.recipes import Recipe, named_sum


@named_sum
def UniPELT(length: int = 10, hidden: int = 512, bottleneck: int = 48, rank: int = 8) -> Recipe:
    """The gated sum PrefixTuning + SerialAdapter (Pfeiffer) + LoRA (q, v), the paper's APL.

    LoRA's gate replaces α / R, hence alpha = rank; BitFit was dropped by the paper.

    Args:
        length: Prefix length.
        hidden: Width of the network that makes the prefix in training.
        bottleneck: Width of the adapters after the feed-forward parts.
        rank: Of the LoRA.
    """
    return (
        Gated(PrefixTuning(length=length, hidden=hidden))
        + Gated(SerialAdapter(style="pfeiffer", bottleneck=bottleneck, init="bert"))
        + Gated(LoRA(rank=rank, alpha=rank, sites="attention.q, attention.v"))
    )
