"""Multi-label classification: any number of classes per text, or per pair of texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from espalier.errors import DataError
from espalier.tasks.classification import collate_rows, encode_rows, read_texts, texts_key
from espalier.tasks.labels import class_settings, label_id
from espalier.tasks.metrics import multilabel_scores
from espalier.tasks.rows import Row, cell, is_missing, kind, shown
from espalier.tasks.task import Example, Piece, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

THRESHOLD = 0.5
"""A class is taken from this probability on."""


@final
@dataclass(frozen=True)
class Multilabel(Task):
    """A set of classes per text; the set may be empty."""

    name: ClassVar[str] = "multilabel"
    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    best: ClassVar[tuple[str, str]] = ("f1_micro", "max")

    indexed: bool = False
    """Whether a whole number in the data stands for a place in `labels`."""
    flags: bool = False
    """Whether the data has a 0 or 1 per class instead of a list of classes."""

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: text, perhaps text_pair, and labels (sorted class numbers)."""
        values = read_texts(raw, self.columns)
        if labelled:
            values["labels"] = self._ids(raw, self.columns["label"])
        return Row(values, raw.where)

    def _ids(self, raw: Row, column: str) -> list[int]:
        names = self.labels or ()
        given = label_list(raw, column)
        if not self.flags:
            return sorted({label_id(v, raw, column, names, self.indexed) for v in given})
        if len(given) != len(names) or not all(v in (0, 1) for v in given):
            raise DataError(
                f"{raw.where}: column {column!r} holds {shown(given)}, need a 0 or 1 for each of "
                f"{len(names)} classes"
            )
        return [i for i, flag in enumerate(given) if flag]

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        return texts_key(row)

    def classes(self, row: Row) -> list[str]:
        """The row's classes."""
        return self.decode(row.values["labels"])

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`."""
        names = ", ".join(self.classes(row)) or "(none)"
        return [Piece(texts_key(row), False), Piece(f"→ {names}", True)]

    def model_settings(self) -> dict[str, Any]:
        """See `Task.model_settings`."""
        return {**class_settings(self.labels), "problem_type": "multi_label_classification"}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; labels is a list of 0.0 or 1.0 per class."""
        examples = encode_rows(rows, tokenizer, max_length)
        for row, example in zip(rows, examples, strict=True):
            if "labels" in row.values:
                ids = set(row.values["labels"])
                example["labels"] = [float(i in ids) for i in range(len(self.labels or ()))]
        return examples

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; labels [B, C] float32."""
        import torch

        return collate_rows(examples, tokenizer, torch.float32)

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[list[int]]:
        """The classes with a probability of at least one half, from logits [B, C]."""
        return _sets(outputs.logits.detach().float().sigmoid() >= THRESHOLD)

    def references(self, batch: Mapping[str, Tensor]) -> list[list[int]]:
        """The right class numbers."""
        return _sets(batch["labels"] > THRESHOLD)

    def score(
        self, predictions: Sequence[list[int]], references: Sequence[list[int]]
    ) -> dict[str, float]:
        """f1_micro, f1_macro, accuracy (the whole set right)."""
        return multilabel_scores(predictions, references, len(self.labels or ()))

    def doubt(
        self, predictions: Sequence[list[int]], references: Sequence[list[int]]
    ) -> str | None:
        """See `Task.doubt`: all rows get the same classes."""
        given, right = (set(map(tuple, some)) for some in (predictions, references))
        if len(given) != 1 or len(right) < 2:
            return None
        names = ", ".join(self.decode(predictions[0]))
        return (
            f"The model gives all {len(predictions):,} rows "
            f"{f'the same labels, {names}' if names else 'no label'}: the text makes no difference "
            "to it. Try more steps, another learning rate, or rows in which the labels are more "
            "even."
        )

    def decode(self, prediction: list[int]) -> list[str]:
        """The classes' names."""
        return [(self.labels or ())[i] for i in prediction]


def _sets(flags: Tensor) -> list[list[int]]:
    return [row.nonzero().reshape(-1).tolist() for row in flags]


def label_list(raw: Row, column: str) -> list[Any]:
    """The labels in a cell: a list as it is, text parted at `|`, `;` or `,`.

    Raises:
        DataError: the cell is missing, or neither a list nor text.
    """
    value = cell(raw, column)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        mark = next((m for m in "|;," if m in value), "|")
        return [part.strip() for part in value.split(mark) if part.strip()]
    if is_missing(value):
        raise DataError(f"{raw.where}: column {column!r} is empty; write [] for no label")
    raise DataError(f"{raw.where}: column {column!r} holds {kind(value)}, need a list of labels")


def has_flags(lists: Iterable[Sequence[Any]]) -> bool:
    """Whether every cell has a 0 or 1 per class: lists of one length, more than two numbers."""
    sizes, found = set(), set()
    for values in lists:
        sizes.add(len(values))
        found.update(v if isinstance(v, int) else str(v) for v in values)
    return len(sizes) == 1 and sizes != {0} and max(sizes) > 1 and found == {0, 1}
