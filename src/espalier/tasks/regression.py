"""Regression: one number per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from espalier.tasks.classification import collate_rows, encode_rows, read_texts, texts_key
from espalier.tasks.metrics import regression_scores
from espalier.tasks.rows import Row, number_cell
from espalier.tasks.task import Example, Piece, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Regression(Task):
    """One number per text, in the units of the data."""

    name: ClassVar[str] = "regression"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    best: ClassVar[tuple[str, str]] = ("spearman", "max")

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: text, perhaps text_pair, and label (a float)."""
        values = read_texts(raw, self.columns)
        if labelled:
            values["label"] = number_cell(raw, self.columns["label"])
        return Row(values, raw.where)

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        return texts_key(row)

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`."""
        return [Piece(texts_key(row), False), Piece(f"→ {row.values['label']:g}", True)]

    def model_settings(self) -> dict[str, Any]:
        """See `Task.model_settings`."""
        return {"num_labels": 1, "problem_type": "regression"}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; labels is one float."""
        return encode_rows(rows, tokenizer, max_length)

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; labels [B] float32."""
        import torch

        return collate_rows(examples, tokenizer, torch.float32)

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[float]:
        """The number for each row of logits [B, 1]."""
        return outputs.logits.detach().float().reshape(-1).tolist()

    def references(self, batch: Mapping[str, Tensor]) -> list[float]:
        """The right numbers."""
        return batch["labels"].tolist()

    def score(self, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
        """pearson, spearman, mse, mae."""
        return regression_scores(predictions, references)

    def decode(self, prediction: float) -> float:
        """The number itself."""
        return prediction
