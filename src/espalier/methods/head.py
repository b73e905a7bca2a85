"""Head only: the frozen model's features and a trained task head, the cheapest baseline.

The head that a task model brings newly initialised is trained beside every method; this one adds
nothing to it. A fresh copy of the head changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from espalier.deltas import Delta
from espalier.places import Sites
from espalier.recipes import Method


@dataclass(frozen=True)
class HeadOnly(Method):
    """Train the task head alone (linear probing on frozen features)."""

    learning_rate: ClassVar[float] = 2e-2

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """No delta: the head itself belongs to every adapter of a task model."""
        return []
