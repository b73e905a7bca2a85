"""Classification of one text or of a pair of texts into one of several classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

from espalier.tasks.encoding import encode_texts, pad_inputs
from espalier.tasks.labels import class_settings, label_id, one_answer
from espalier.tasks.metrics import classification_scores
from espalier.tasks.rows import Row, cell, text_cell
from espalier.tasks.task import Example, Piece, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


class Guess(NamedTuple):
    """The class a model takes, and the probability it gives it."""

    id: int
    probability: float


@final
@dataclass(frozen=True)
class Classification(Task):
    """One class per text, or per pair of texts."""

    name: ClassVar[str] = "classification"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    best: ClassVar[tuple[str, str]] = ("accuracy", "max")

    indexed: bool = False
    """Whether a whole number in the data stands for a place in `labels`."""

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: text, perhaps text_pair, and label (a class number)."""
        values: dict[str, Any] = read_texts(raw, self.columns)
        if labelled:
            column = self.columns["label"]
            value = cell(raw, column)
            values["label"] = label_id(value, raw, column, self.labels or (), self.indexed)
        return Row(values, raw.where)

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        return texts_key(row)

    def classes(self, row: Row) -> list[str]:
        """The row's one class."""
        names: Sequence[str] = self.labels or ()
        at: int = row.values["label"]
        return [names[at]]

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`."""
        return [Piece(texts_key(row), False), Piece(f"→ {self.classes(row)[0]}", True)]

    def model_settings(self) -> dict[str, Any]:
        """See `Task.model_settings`."""
        return {**class_settings(self.labels), "problem_type": "single_label_classification"}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; labels is one int."""
        return encode_rows(rows, tokenizer, max_length)

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; labels [B] int64."""
        return collate_rows(examples, tokenizer)

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Guess]:
        """The most probable class of each row of logits [B, C]."""
        probabilities, ids = outputs.logits.detach().float().softmax(-1).max(-1)
        return [Guess(*pair) for pair in zip(ids.tolist(), probabilities.tolist(), strict=True)]

    def references(self, batch: Mapping[str, Tensor]) -> list[int]:
        """The right class numbers."""
        return batch["labels"].tolist()

    def score(self, predictions: Sequence[Guess], references: Sequence[int]) -> dict[str, float]:
        """accuracy, f1_macro, f1_weighted, matthews; f1 of class 1 where there are two classes."""
        return classification_scores(
            [p.id for p in predictions], references, len(self.labels or ())
        )

    def doubt(self, predictions: Sequence[Guess], references: Sequence[int]) -> str | None:
        """See `Task.doubt`: all rows get one class."""
        names = self.labels or ()
        return one_answer(map(self.decode, predictions), (names[at] for at in references))

    def decode(self, prediction: Guess) -> str:
        """The class's name."""
        return (self.labels or ())[prediction.id]


def read_texts(raw: Row, columns: Mapping[str, str]) -> dict[str, Any]:
    """The text, and the second one of a pair where `columns` names it."""
    return {
        name: text_cell(raw, columns[name]) for name in ("text", "text_pair") if name in columns
    }


def texts_key(row: Row) -> str:
    """The text or the two texts of a row, joined."""
    return "\n".join(row.values[name] for name in ("text", "text_pair") if name in row.values)


def encode_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
) -> list[Example]:
    """Examples of the texts or pairs of `rows`, with the one label of those that have one."""
    texts = [row.values["text"] for row in rows]
    has_pairs = bool(rows) and "text_pair" in rows[0].values
    pairs = [row.values["text_pair"] for row in rows] if has_pairs else None
    examples = encode_texts(tokenizer, texts, pairs, max_length)
    for row, example in zip(rows, examples, strict=True):
        if "label" in row.values:
            example["labels"] = row.values["label"]
    return examples


def collate_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, dtype: Any = None
) -> dict[str, Tensor]:
    """A padded batch whose labels, one or one list per example, become a tensor of `dtype`."""
    import torch

    batch = pad_inputs(examples, tokenizer)
    if "labels" in examples[0]:
        batch["labels"] = torch.tensor([e["labels"] for e in examples], dtype=dtype)
    return batch
