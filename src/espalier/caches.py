"""The cache that a model's module is given, whatever transformers calls it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# One name since transformers 5.24; before it another for attention, and another for recurrence.
NAMES = ("cache", "past_key_values", "past_key_value", "layer_past", "cache_params")


def cache_in(given: Mapping[str, Any]) -> tuple[str, Any]:
    """The cache among a module's arguments, after the name it has there; ("", None) without one."""
    for name in NAMES:
        if given.get(name) is not None:
            return name, given[name]
    return "", None


def words_in(cache: Any) -> int | None:
    """How many words a cache holds; None where it has recurrent states alone, which count none."""
    try:
        return 0 if cache is None else cache.get_seq_length()
    except ValueError:
        return None


def begun(cache: Any) -> bool:
    """Whether a cache holds some text already."""
    words = words_in(cache)
    return cache.has_previous_state() if words is None else words > 0
