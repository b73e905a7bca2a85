"""Full fine-tuning, the baseline that every method is compared with.

Every parameter gets a trained copy that stands in for the base's own while the adapter is active;
the base itself stays as it was, so that switching it off costs nothing and is exact. The price is
one copy of the model in memory. A fresh copy changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.modules import base_modules
from espalier.places import Sites
from espalier.plain.whole import replacements
from espalier.recipes import Method


@dataclass(frozen=True)
class FullTuning(Method):
    """Train every parameter of the model."""

    learning_rate: ClassVar[float] = 3e-5
    trains_base: ClassVar[bool] = True

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One replacement per module that owns parameters; a tied tensor is trained once."""
        return replacements(base_modules(model))
