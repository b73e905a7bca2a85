"""What a training loop works on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.data.separation import sizes_of
from espalier.recipes import Recipe
from espalier.training.config import RunConfig
from espalier.training.progress import Screen
from espalier.training.record import Record

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor
    from transformers import PreTrainedModel

    from espalier.data.separation import Separation
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
    separation: Separation | None = None  # how the model keeps the texts of packed rows apart
    trunk: TrunkCache | None = None

    def collate(self, examples: Examples) -> dict[str, Tensor]:
        """A batch of these examples, as the model needs it."""
        batch = self.task.collate(examples, self.tokenizer)
        if self.separation and "segments" in examples[0]:
            batch = self.separation.batch(batch, sizes_of(examples))
        return batch

    def apart(self, examples: Examples) -> contextlib.AbstractContextManager[None]:
        """Passes over a batch of these examples, and their backward, with packed texts apart."""
        if self.separation and "segments" in examples[0]:
            return self.separation.holding(self.model, sizes_of(examples))
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def giving(self, examples: Examples, some: Sequence[int]) -> Iterator[None]:
        """Passes over some of these examples: packed texts apart, kept trunk states given."""
        with self.apart([examples[i] for i in some]):
            if self.trunk is None:
                yield
                return
            with self.trunk.giving(examples, some):
                yield
