"""What a language model makes of target tokens: loss and hits per example, characters covered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from espalier.tasks.metrics import TextLoss
from espalier.tasks.task import IGNORED, Example

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


def text_losses(logits: Tensor, labels: Tensor, shift: bool) -> list[TextLoss]:
    """Loss, tokens and right guesses of each example, one example at a time to save memory.

    Args:
        logits: [B, T, V].
        labels: [B, T]; -100 where nothing is to be predicted.
        shift: whether logits at t speak of the label at t + 1 (decoders) or at t.
    """
    import torch

    losses = []
    for row, target in zip(logits.detach(), labels, strict=True):
        if shift:
            row, target = row[:-1], target[1:]
        seen = target != IGNORED
        row, target = row[seen].float(), target[seen]
        if not len(target):
            losses.append(TextLoss(0.0, 0, 0))
            continue
        nats = torch.nn.functional.cross_entropy(row, target, reduction="sum")
        right = (row.argmax(-1) == target).sum()
        losses.append(TextLoss(float(nats), len(target), int(right)))
    return losses


def count_chars(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> None:
    """Note in each example, as `chars`, how many characters its target tokens spell."""
    targets = [[t for t in e["labels"] if t != IGNORED] for e in examples]
    texts = tokenizer.batch_decode(
        targets, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    for example, text in zip(examples, texts, strict=True):
        example["chars"] = len(text)


def target_chars(batch: Mapping[str, Tensor]) -> list[int]:
    """Characters of the targets of each example in a batch."""
    return batch["chars"].tolist()
