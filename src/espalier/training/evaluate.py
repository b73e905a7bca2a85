"""A model's loss and metrics on encoded examples, without keeping logits.

Each batch's outputs are turned into small predictions by the task at once; what is kept grows with
the number of examples, not with the vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from espalier.modules import is_sharded

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from espalier.tasks import Task


class Measured(NamedTuple):
    """Loss and metrics, and a sentence where the answers are of no use whatever these say."""

    metrics: dict[str, float]
    doubt: str | None


def targets(batch: Mapping[str, Tensor], causal: bool) -> int:
    """What the mean in the model's loss is taken over: labelled tokens, or rows.

    A causal model predicts the next token, so that a row's first label counts for nothing.
    """
    labels = batch["labels"]
    if labels.dim() == 2 and not labels.is_floating_point():
        return int(((labels[:, 1:] if causal else labels) != -100).sum())
    return len(labels)


def inputs(
    task: Task,
    batch: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """What the model is called with: the batch's part for it, on its device.

    Labels that are numbers get the model's dtype: losses do not mix two of them.
    """
    moved = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    labels = moved.get("labels")
    if labels is not None and labels.is_floating_point():
        moved["labels"] = labels.to(dtype)
    return task.inputs(moved)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and the mode before afterwards."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def _nothing(_: Sequence[int]) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def evaluate(
    model: PreTrainedModel,
    task: Task,
    tokenizer: Any,
    examples: Sequence[dict[str, Any]],
    batch_size: int,
    accelerator: Accelerator,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    giving: Callable[[Sequence[int]], contextlib.AbstractContextManager[None]] = _nothing,
) -> Measured:
    """Loss (mean over targets) and the task's metrics; the same numbers in every process.

    A pass over the examples of some indices runs within `giving(indices)`.
    """
    from accelerate.utils import gather_object

    from espalier.data import in_order

    causal = task.name == "causal"
    every, processes = in_order(examples, batch_size), accelerator.num_processes
    chunks = every[accelerator.process_index :: processes]
    alone = -(-len(every) // processes) - len(chunks)  # passes that another process has more
    found: list[tuple[float, int, list[Any], list[Any]]] = []
    with evaluating(model):
        for chunk in chunks:
            batch = task.collate([examples[i] for i in chunk], tokenizer)
            count = targets(batch, causal)
            with autocast(), giving(chunk):
                outputs = model(**inputs(task, batch, accelerator.device, model.dtype))
            loss = float(task.loss(outputs, batch)) if count else 0.0
            found.append((loss, count, task.predict(outputs, batch), task.references(batch)))
        for chunk in every[: alone if is_sharded(model) else 0]:  # a pass is one of all processes
            batch = task.collate([examples[i] for i in chunk], tokenizer)
            with autocast(), giving(chunk):
                model(**inputs(task, batch, accelerator.device, model.dtype))
    if accelerator.num_processes > 1:
        found = gather_object(found)
    total = sum(count for _, count, _, _ in found)
    mean = sum(loss * count for loss, count, _, _ in found) / max(1, total)
    predictions = [p for _, _, some, _ in found for p in some]
    references = [r for _, _, _, some in found for r in some]
    metrics = {"loss": mean, **task.score(predictions, references)}
    return Measured(metrics, task.doubt(predictions, references))
