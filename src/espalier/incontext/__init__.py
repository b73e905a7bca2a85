"""In-context learning, the baseline that trains nothing: examples stand in the prompt."""

from __future__ import annotations

from espalier.incontext.measure import Cost, Shown, in_context
from espalier.incontext.settings import InContext

__all__ = ["Cost", "InContext", "Shown", "in_context"]
