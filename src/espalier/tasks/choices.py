"""Multiple choice by a writing model: the choice that it finds likeliest for its length is taken.

Trained with the three losses of T-Few (ranking.py), added up. Decoders and encoder-decoders both
serve; each choice is encoded as the answer that such a model would write.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from espalier.errors import DataError
from espalier.tasks.causal import Causal
from espalier.tasks.classification import Guess
from espalier.tasks.encoding import pad_inputs, pad_labels
from espalier.tasks.ranking import (
    choice_scores,
    gold_loss,
    length_normalised_loss,
    token_nats,
    unlikelihood_loss,
)
from espalier.tasks.rows import Row, cell, is_missing, kind, shown, text_cell
from espalier.tasks.seq2seq import Seq2Seq
from espalier.tasks.task import Example, Piece, Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

WRITERS = {"causal": Causal.auto_model, "seq2seq": Seq2Seq.auto_model}


@final
@dataclass(frozen=True)
class Choices(Task):
    """One question and several possible answers, one of which is right."""

    name: ClassVar[str] = "choices"
    best: ClassVar[tuple[str, str]] = ("accuracy", "max")

    writer: str = "causal"
    """The kind of model: "causal" or "seq2seq"."""
    prefix: str = ""
    """A text put before each question."""

    @property
    def auto_model(self) -> str:
        """The class that loads such a model."""
        return WRITERS[self.writer]

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: question, choices, and label (the right one's place, from 0)."""
        values: dict[str, Any] = {
            "question": text_cell(raw, self._column(raw, "question")),
            "choices": read_choices(raw, self._column(raw, "choices")),
        }
        if labelled:
            right = read_right(raw, self.columns["label"], values["choices"])
            values["label"] = check_once(raw, right, values["choices"])
        return Row(values, raw.where)

    def _column(self, raw: Row, name: str) -> str:
        """The person's column, or the task's own name where only that is there."""
        column = self.columns[name]
        return name if column not in raw.values and name in raw.values else column

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        return "\n".join([row.values["question"], *row.values["choices"]])

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`; the right choice counts as learned."""
        choices, right = row.values["choices"], row.values["label"]
        pieces = [Piece(f"\n{i}. {text}", i == right) for i, text in enumerate(choices)]
        return [Piece(self.prefix + row.values["question"], False), *pieces]

    def model_settings(self) -> dict[str, Any]:
        """Nothing: the head is the model's own."""
        return {}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; all choices of a row laid end to end.

        input_ids and targets are flat, sizes and target_sizes say where the choices part; labels
        is the place of the right one.
        """
        flat = [one for row in rows for one in self._as_answers(row)]
        encoded = iter(self._writer.encode(flat, tokenizer, max_length))
        examples: list[Example] = []
        for row in rows:
            own = list(itertools.islice(encoded, len(row.values["choices"])))
            examples.append(
                {
                    "input_ids": [i for one in own for i in one["input_ids"]],
                    "targets": [i for one in own for i in one["labels"]],
                    "sizes": [len(one["input_ids"]) for one in own],
                    "target_sizes": [len(one["labels"]) for one in own],
                    "full": sum(one["full"] for one in own),
                    "cut": int(any(one["cut"] for one in own)),
                }
                | ({"labels": row.values["label"]} if "label" in row.values else {})
            )
        return examples

    @property
    def _writer(self) -> Task:
        if self.writer == "seq2seq":
            return Seq2Seq({"source": "source", "target": "target"})
        return Causal({"prompt": "prompt", "completion": "completion"}, None, "completion")

    def _as_answers(self, row: Row) -> list[Row]:
        """Each choice as the answer to the question, in the writer's own terms."""
        question = self.prefix + row.values["question"]
        source, target = self._writer.columns
        # A space parts question and answer where a decoder reads them as one text.
        parted = self.writer == "seq2seq" or question[-1].isspace()
        return [
            Row({source: question, target: text if parted or text[0].isspace() else f" {text}"},
                row.where)
            for text in row.values["choices"]
        ]  # fmt: skip

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; one row per choice: targets (N, U), and counts and labels (B)."""
        import torch

        flat: list[Example] = []
        for example in examples:
            ids = _parted(example["input_ids"], example["sizes"])
            targets = _parted(example["targets"], example["target_sizes"])
            flat += [{"input_ids": i, "labels": t} for i, t in zip(ids, targets, strict=True)]
        batch = pad_inputs(flat, tokenizer)
        batch["targets"] = pad_labels(flat)
        batch["counts"] = torch.tensor([len(e["sizes"]) for e in examples])
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([e["labels"] for e in examples])
        return batch

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """See `Task.inputs`; an encoder-decoder makes its decoder's input from the targets."""
        given: dict[str, Any] = {k: batch[k] for k in ("input_ids", "attention_mask")}
        return given | ({"labels": batch["targets"]} if self.writer == "seq2seq" else {})

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """L_LM + L_LN + L_UL of T-Few."""
        nats, seen = self._nats(outputs, batch)
        known = (nats, seen, batch["counts"].tolist(), batch["labels"].tolist())
        return gold_loss(*known) + length_normalised_loss(*known) + unlikelihood_loss(*known)

    def _nats(self, outputs: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        targets = batch["targets"].to(outputs.logits.device)
        return token_nats(outputs.logits, targets, shift=self.writer == "causal")

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[Guess]:
        """The likeliest choice of each example for its length, and its share of all scores."""
        scores = choice_scores(*self._nats(outputs, batch)).detach()
        found = (own.softmax(0).max(0) for own in scores.split(batch["counts"].tolist()))
        return [Guess(int(best.indices), float(best.values)) for best in found]

    def references(self, batch: Mapping[str, Tensor]) -> list[int]:
        """The places of the right choices."""
        return batch["labels"].tolist()

    def score(self, predictions: Sequence[Guess], references: Sequence[int]) -> dict[str, float]:
        """The share of examples whose right choice is taken: accuracy."""
        hits = [p.id == r for p, r in zip(predictions, references, strict=True)]
        return {"accuracy": sum(hits) / max(len(hits), 1)}

    def decode(self, prediction: Guess) -> int:
        """The choice's place in its list, counted from 0."""
        return prediction.id


def read_choices(raw: Row, column: str) -> list[str]:
    """The texts in a cell: a list, or text parted at `|`.

    Raises:
        DataError: fewer than two that differ, or one that is blank or no text.
    """
    value = cell(raw, column)
    if isinstance(value, str):
        value = [part.strip() for part in value.split("|")]
    where = f"{raw.where}: column {column!r}"
    if not isinstance(value, list | tuple):
        raise DataError(f"{where} holds {kind(value)} {shown(value)}, need a list of texts")
    for i, text in enumerate(value):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: choice {i} is {shown(text)}, need a text")
    if len(set(value)) < 2:
        raise DataError(f"{where} holds {shown(value)}, need at least two choices that differ")
    return list(value)


def read_right(raw: Row, column: str, choices: Sequence[str]) -> int:
    """The place of the right choice, from its text or its number counted from 0.

    Raises:
        DataError: it is missing, or none of the choices.
    """
    value = cell(raw, column)
    where = f"{raw.where}: column {column!r}"
    if is_missing(value) or value == "":
        raise DataError(f"{where} is empty, need the right choice or its number from 0")
    if isinstance(value, str):
        texts = [text.strip() for text in choices]
        if value.strip() in texts:
            return texts.index(value.strip())
        value = int(value) if value.strip().isdigit() else value
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(choices):
        raise DataError(
            f"{where} holds {shown(value)}, which is none of the choices {shown(list(choices))} "
            f"and no number from 0 to {len(choices) - 1}"
        )
    return value


def check_once(raw: Row, right: int, choices: Sequence[str]) -> int:
    """The place of the right choice. Raises DataError where its text is a wrong choice's too."""
    if list(choices).count(choices[right]) > 1:
        raise DataError(f"{raw.where}: the right choice {shown(choices[right])} stands there twice")
    return right


def _parted(flat: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    ends = list(itertools.accumulate(sizes))
    return [list(flat[end - size : end]) for end, size in zip(ends, sizes, strict=True)]
