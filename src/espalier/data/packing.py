"""Packing: several short examples in one row, none of which sees another.

Positions start at 0 in every segment. How a model keeps segments apart, and whether it does, is
tried on the model itself (`espalier.data.separation`): recurrent layers, and models that count
positions themselves, would leak from one segment into the next without a sign.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.errors import SettingError
from espalier.tasks import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def pack(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Pack examples into rows of at most `max_length` tokens, best fit first.

    Returns:
        Examples with input_ids, labels (the first of each segment ignored), position_ids (from
        0 in each segment) and segments (0, 1, ...), besides the sums of full, cut and chars.

    Raises:
        SettingError: an example is longer than `max_length`, or has one label for all tokens.
    """
    if not examples:
        return []
    if not isinstance(examples[0].get("labels"), list) or "position_ids" in examples[0]:
        raise SettingError("only examples of causal language modelling can be packed, and once")
    longest = max(len(e["input_ids"]) for e in examples)
    if longest > max_length:
        raise SettingError(
            f"an example has {longest} tokens, more than fit into a packed row of {max_length}"
        )
    return [_joined([examples[i] for i in row]) for row in best_fit(examples, max_length)]


def best_fit(examples: Sequence[Example], max_length: int) -> list[list[int]]:
    """Which examples share a row: the longest first, each where the least room is left over."""
    lengths = [len(e["input_ids"]) for e in examples]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # room left and row, sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect.bisect_left(free, (lengths[i], -1))
        if at < len(free):
            room, row = free.pop(at)
        else:
            room, row = max_length, len(rows)
            rows.append([])
        rows[row].append(i)
        bisect.insort(free, (room - lengths[i], row))
    return rows


def _joined(parts: Sequence[Example]) -> Example:
    joined: Example = {"input_ids": [], "labels": [], "position_ids": [], "segments": []}
    for number, part in enumerate(parts):
        size = len(part["input_ids"])
        joined["input_ids"] += part["input_ids"]
        joined["labels"] += [IGNORED, *part["labels"][1:]]
        joined["position_ids"] += range(size)
        joined["segments"] += [number] * size
    for name in ("full", "cut", "chars"):
        joined[name] = sum(part[name] for part in parts)
    return joined


def packing_refusal(model: PreTrainedModel) -> str | None:
    """Why packed rows would mix in this model, or None if they do not; tried on a few tokens."""
    from espalier.data.separation import separation

    found = separation(model)
    return found if isinstance(found, str) else None
