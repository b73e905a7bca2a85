"""Token classification: a tag per word, such as entities in BIO notation.

The first sub-word of a word carries its tag; the others carry none. A word that the tokenizer
drops altogether, or that lies beyond the length limit, has no tag to learn and is not scored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, final

from espalier.errors import DataError
from espalier.tasks.encoding import length_limit, pad_inputs, pad_labels
from espalier.tasks.labels import class_settings, label_id, one_answer
from espalier.tasks.rows import Row, cell, is_missing, kind
from espalier.tasks.spans import entity_scores
from espalier.tasks.task import IGNORED, Example, Piece, Task
from espalier.tasks.words import encode_words

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Tokens(Task):
    """A tag per word."""

    name: ClassVar[str] = "tokens"
    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    best: ClassVar[tuple[str, str]] = ("f1", "max")

    indexed: bool = False
    """Whether a whole number in the data stands for a place in `labels`."""

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: tokens (words) and tags (tag numbers)."""
        words = word_list(raw, self.columns["tokens"])
        if not words:
            raise DataError(f"{raw.where}: column {self.columns['tokens']!r} has no words")
        if not all(isinstance(word, str) for word in words):
            raise DataError(
                f"{raw.where}: column {self.columns['tokens']!r} holds words that are not text"
            )
        values: dict[str, Any] = {"tokens": words}
        if labelled:
            column = self.columns["tags"]
            tags = word_list(raw, column)
            if len(tags) != len(words):
                raise DataError(
                    f"{raw.where}: {len(words)} words in {self.columns['tokens']!r}, but "
                    f"{len(tags)} tags in {column!r}"
                )
            names = self.labels or ()
            values["tags"] = [label_id(tag, raw, column, names, self.indexed) for tag in tags]
        return Row(values, raw.where)

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        return " ".join(row.values["tokens"])

    def classes(self, row: Row) -> list[str]:
        """The tag of each word."""
        return self.decode(row.values["tags"])

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`."""
        pieces = []
        for word, tag in zip(row.values["tokens"], self.classes(row), strict=True):
            pieces += [Piece(f"{word} ", False)] + ([Piece(f"[{tag}] ", True)] * (tag != "O"))
        return pieces

    def model_settings(self) -> dict[str, Any]:
        """See `Task.model_settings`."""
        return class_settings(self.labels)

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; labels is a tag number on each word's first token, else -100."""
        words = [row.values["tokens"] for row in rows]
        examples = []
        for row, (example, heads) in zip(
            rows, encode_words(tokenizer, words, length_limit(tokenizer, max_length)), strict=True
        ):
            tags = row.values.get("tags")
            placed = heads.items()
            example["cut"] = int(len(heads) < len(row.values["tokens"]))
            if tags is not None:
                example["labels"] = [IGNORED] * len(example["input_ids"])
                for word, at in placed:
                    example["labels"][at] = tags[word]
                if not placed:
                    raise DataError(f"{row.where}: no word is left within max_length {max_length}")
            else:
                example["heads"] = [at for _, at in placed]
            examples.append(example)
        return examples

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; labels [B, T] int64.

        Without labels, `heads` [B, T] is 1 on the first token of each word.
        """
        import torch

        batch = pad_inputs(examples, tokenizer)
        if "labels" in examples[0]:
            batch["labels"] = pad_labels(examples)
        else:
            batch["heads"] = torch.zeros_like(batch["input_ids"])
            for i, example in enumerate(examples):
                batch["heads"][i, example["heads"]] = 1
        return batch

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[list[int]]:
        """The most probable tag of each word, from logits [B, T, C]."""
        first = batch["labels"] != IGNORED if "labels" in batch else batch["heads"] == 1
        best = outputs.logits.detach().argmax(-1)
        return [row[keep].tolist() for row, keep in zip(best, first, strict=True)]

    def references(self, batch: Mapping[str, Tensor]) -> list[list[int]]:
        """The right tag numbers of each word."""
        return [row[row != IGNORED].tolist() for row in batch["labels"]]

    def score(
        self, predictions: Sequence[list[int]], references: Sequence[list[int]]
    ) -> dict[str, float]:
        """Over entities: f1, precision, recall, f1_macro; over words: accuracy."""
        return entity_scores(
            [self.decode(p) for p in predictions], [self.decode(r) for r in references]
        )

    def doubt(
        self, predictions: Sequence[list[int]], references: Sequence[list[int]]
    ) -> str | None:
        """See `Task.doubt`: all words get one tag."""
        given, right = (chain(*map(self.decode, some)) for some in (predictions, references))
        return one_answer(given, right, "words")

    def decode(self, prediction: list[int]) -> list[str]:
        """The tags' names."""
        return [(self.labels or ())[i] for i in prediction]


def word_list(raw: Row, column: str) -> list[Any]:
    """The words or tags in a cell: a list, or text parted at white space.

    Raises:
        DataError: the cell is missing, or neither a list nor text.
    """
    value = cell(raw, column)
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        return value.split()
    found = "nothing" if is_missing(value) else kind(value)
    raise DataError(
        f"{raw.where}: column {column!r} holds {found}, need a list, or words parted by spaces"
    )
