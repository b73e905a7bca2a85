"""Which examples go together: buckets of like length, or plain shuffling.

The order depends on nothing but the seed and the epoch, so that a resumed run meets the very
batches that an uninterrupted one would have met.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from espalier.errors import SettingError
from espalier.tasks import Example

How = Literal["bucket", "random", "pack"]
BATCHES_PER_BUCKET = 32
"""Batches whose examples are sorted by length together: more waste less, fewer mix more."""


def batches(
    examples: Sequence[Example], batch: int, *, how: How = "bucket", seed: int = 0, epoch: int = 0
) -> list[list[int]]:
    """The indices of one epoch, batch by batch; each example once, the last batch maybe short.

    Args:
        examples: encoded examples (made by `pack` first for how="pack").
        batch: examples per batch.
        how: "bucket" sorts by length within random buckets; "random" and "pack" only shuffle.
        seed: of the run.
        epoch: counted from 0; each has its own order.

    Raises:
        SettingError: an unknown way, or no positive batch size.
    """
    if batch < 1:
        raise SettingError(f"batch={batch}: must be at least 1")
    if how not in ("bucket", "random", "pack"):
        raise SettingError(f"how={how!r}: must be 'bucket', 'random' or 'pack'")
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(examples)))
    rng.shuffle(order)
    if how == "bucket":
        size = batch * BATCHES_PER_BUCKET
        order = [
            i
            for at in range(0, len(order), size)
            for i in sorted(order[at : at + size], key=lambda i: -len(examples[i]["input_ids"]))
        ]
    groups = [order[at : at + batch] for at in range(0, len(order), batch)]
    if how == "bucket":
        rng.shuffle(groups)
    return groups


def in_order(examples: Sequence[Example], batch: int) -> list[list[int]]:
    """Batches for evaluation: the longest first, so that memory trouble shows at once."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))
    return [order[at : at + batch] for at in range(0, len(order), batch)]
