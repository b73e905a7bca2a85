"""What a training loop works on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.recipes import Recipe
from espalier.training.config import RunConfig
from espalier.training.progress import Screen
from espalier.training.record import Record

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from espalier.tasks import Task
    from espalier.training.trunk_cache import TrunkCache

Examples = Sequence[dict[str, Any]]
Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class Job:
    """What a loop works on: a grafted model on its device, encoded examples and settings."""

    model: PreTrainedModel
    tokenizer: Any
    task: Task
    train: Examples
    validation: Examples
    sources: Sequence[str]  # file and line of each training example
    config: RunConfig
    recipe: Recipe
    lr: float
    accelerator: Accelerator
    autocast: Autocast
    precision: str
    screen: Screen
    record: Record
    folder: Path | None
    threads: int
    trunk: TrunkCache | None = None

    def giving(
        self, examples: Examples, some: Sequence[int]
    ) -> contextlib.AbstractContextManager[None]:
        """Passes over some of these examples, given what is kept of a frozen trunk's states."""
        return self.trunk.giving(examples, some) if self.trunk else contextlib.nullcontext()
