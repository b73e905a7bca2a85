"""Packing: several short examples in one row, none of which sees another.

Positions start at 0 in every segment. Given positions but no attention mask and no cache,
transformers' masks keep segments apart (`masking_utils.find_packed_sequence_indices`), with
eager, sdpa, flash and flex attention alike. Whether a model really does is tried on the model
itself by `packing_refusal`, because recurrent layers, and models that count positions from the
mask, would leak from one segment into the next without a sign.
"""

from __future__ import annotations

import bisect
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from espalier.errors import SettingError
from espalier.tasks import IGNORED, Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE = 1e-4
"""Change of logits, in their standard deviations, that rounding may explain."""


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
    """Why packed rows would mix in this model, or None if they do not; tried on 12 tokens."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder; packing is for decoders"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return f"{name} takes no position_ids, so the segments of a packed row would see each other"
    if _leaks(model):
        return f"{name} lets the segments of a packed row see each other"
    return None


def _leaks(model: PreTrainedModel) -> bool:
    """Whether the second of two segments changes when the tokens of the first do."""
    import torch

    size = 6
    device = next(model.parameters()).device
    words = torch.arange(size, device=device)
    positions = torch.arange(size, device=device)
    given: dict[str, Any] = {"position_ids": torch.cat([positions, positions])[None]}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            one, two = (
                model(input_ids=torch.cat([first, words])[None], use_cache=False, **given)
                .logits[0, size:]
                .float()
                for first in (words, words.flip(0))
            )
    finally:
        for module, flag in training.items():
            module.training = flag
    return bool((one - two).abs().max() > TOLERANCE * one.std())
