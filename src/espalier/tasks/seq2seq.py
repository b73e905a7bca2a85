"""Sequence to sequence: an encoder reads the source, a decoder writes the target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from espalier.errors import SettingError
from espalier.tasks.encoding import encode_texts, length_limit, pad_inputs, pad_labels
from espalier.tasks.metrics import TextLoss, text_scores
from espalier.tasks.rows import Row, text_cell
from espalier.tasks.task import Example, Piece, Task
from espalier.tasks.textloss import count_chars, target_chars, text_losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase


@final
@dataclass(frozen=True)
class Seq2Seq(Task):
    """Text to text, for encoder-decoder models, which shift the labels themselves."""

    name: ClassVar[str] = "seq2seq"
    auto_model: ClassVar[str] = "AutoModelForSeq2SeqLM"
    best: ClassVar[tuple[str, str]] = ("loss", "min")
    writes: ClassVar[bool] = True

    prefix: str = ""
    """A text put before each source, such as "summarize: "."""

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: source and target."""
        values: dict[str, Any] = {"source": text_cell(raw, self.columns["source"])}
        if labelled:
            values["target"] = text_cell(raw, self.columns["target"])
        return Row(values, raw.where)

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        return row.values["source"]

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`."""
        if tokenizer is None:
            source, target = self.prefix + row.values["source"], row.values["target"]
            return [Piece(source, False), Piece(target, True)]
        example = self.encode([row], tokenizer, max_length)[0]
        source = tokenizer.decode(example["input_ids"])
        return [Piece(str(source), False), Piece(str(tokenizer.decode(example["labels"])), True)]

    def model_settings(self) -> dict[str, Any]:
        """Nothing: the head is the model's own."""
        return {}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; labels are the target's token ids with the end token.

        Source and target may have `max_length` tokens each. A target that is cut loses its end
        token: a model should not learn to stop in the middle.
        """
        sources = [self.prefix + row.values["source"] for row in rows]
        examples = encode_texts(tokenizer, sources, None, max_length)
        if rows and "target" in rows[0].values:
            limit = length_limit(tokenizer, max_length)
            targets = [row.values["target"] for row in rows]
            for example, ids in zip(examples, _target_ids(tokenizer, targets), strict=True):
                example["labels"] = ids[:limit]
                example["cut"] = int(len(example["labels"]) < len(ids))
            count_chars(examples, tokenizer)
        return examples

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; labels [B, U] int64, chars [B]."""
        import torch

        batch = pad_inputs(examples, tokenizer)
        if "labels" in examples[0]:
            batch["labels"] = pad_labels(examples)
            batch["chars"] = torch.tensor([e["chars"] for e in examples])
        return batch

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[TextLoss]:
        """Loss, tokens and right guesses of each example, the target given word by word."""
        return text_losses(outputs.logits, batch["labels"], shift=False)

    def references(self, batch: Mapping[str, Tensor]) -> list[int]:
        """The number of characters of each example's target."""
        return target_chars(batch)

    def score(self, predictions: Sequence[TextLoss], references: Sequence[int]) -> dict[str, float]:
        """Loss per token, perplexity, token_accuracy, bits_per_character."""
        return text_scores(predictions, references)

    def decode(self, prediction: TextLoss) -> float:
        """The loss per target token, in nats."""
        return prediction.nats / max(prediction.tokens, 1)

    def prompt(
        self, request: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> list[int]:
        """The encoder's token ids for a text or a row's values, as in training."""
        if isinstance(request, Mapping):
            name = "source" if "source" in request else self.columns["source"]
            request = text_cell(Row(request, "request"), name)
        if not isinstance(request, str):
            raise SettingError(f"need a text to read, not a {type(request).__name__}")
        return encode_texts(tokenizer, [self.prefix + request], None, max_length)[0]["input_ids"]

    def answer(self, row: Row) -> str:
        """The target."""
        return row.values["target"]

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The end token."""
        return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []


def _target_ids(tokenizer: PreTrainedTokenizerBase, targets: list[str]) -> list[list[int]]:
    encoded = tokenizer(
        text_target=targets,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    end = tokenizer.eos_token_id
    lists: list[list[int]] = encoded["input_ids"]  # type: ignore[assignment]
    return [[*ids, end] if isinstance(end, int) and end not in ids[-2:] else ids for ids in lists]
