"""What a method chooses by data is chosen before a run's first step, on its training examples."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from espalier.calibration import calibrate
from espalier.graft import get
from espalier.training.evaluate import inputs, targets
from espalier.training.prepare import Material

EXAMPLES = 256  # at most, one by one


def choose(at: Material, name: str) -> None:
    """Calibrate a fresh adapter on examples picked by the run's seed, if it asks for that."""
    if not any(delta.measures for delta in get(at.model, name).deltas):
        return
    task = at.data.task

    def loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
        return task.loss(model(**inputs(task, batch, at.device, at.model.dtype)), batch)

    at.out.screen.say("Choosing by data what to train …")
    calibrate(at.model, name, _batches(at), loss)


def _batches(at: Material) -> Iterator[Mapping[str, Tensor]]:
    task, examples = at.data.task, at.encoded.examples["train"]
    picked = random.Random(at.config.seed).sample(examples, min(EXAMPLES, len(examples)))
    for example in picked:
        batch = task.collate([example], at.tokenizer)
        if targets(batch, task.name == "causal"):  # the mean over no target is not a number
            yield batch
