"""MAM adapter (He et al. 2021, arXiv 2110.04366): a prefix at every attention, a scaled parallel
adapter at every feed-forward part.
"""

from __future__ import annotations

from espalier.methods.parallel import ParallelAdapter
from espalier.methods.prefix import PrefixTuning
from espalier.recipes import Recipe, named_sum


@named_sum
def MAM(length: int = 30, hidden: int = 800, bottleneck: int = 512, scale: float = 4.0) -> Recipe:
    """The sum PrefixTuning + ParallelAdapter with the paper's settings for generation.

    The paper's small form for GLUE is length 16, bottleneck 16, scale 2.

    Args:
        length: Prefix length.
        hidden: Width of the network that makes the prefix in training.
        bottleneck: Width of the parallel adapters.
        scale: Factor on what they add.
    """
    prefix = PrefixTuning(length=length, hidden=hidden)
    return prefix + ParallelAdapter(bottleneck=bottleneck, scale=scale, sites="ffn")
