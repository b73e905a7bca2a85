"""Causal language modelling: plain text, prompt with completion, or conversations.

In the last two forms the loss sees the completions only. The end token after an answer is always
learned, also where the tokenizer pads with that very token: masking goes by position, not by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, final

from espalier.errors import DataError, SettingError
from espalier.tasks.chat import (
    added_tokens,
    chat_pieces,
    end_token_at,
    prompt_pieces,
    template_of,
    with_system,
)
from espalier.tasks.encoding import (
    length_limit,
    opening,
    pad_inputs,
    pad_labels,
    pad_lists,
    plain_ids,
)
from espalier.tasks.metrics import TextLoss, text_scores
from espalier.tasks.pieces import Encoded, blocks, encode_pieces, fit, learned_pieces
from espalier.tasks.requests import completion_of, messages_of, requested_text, requested_turns
from espalier.tasks.rows import Row, text_cell
from espalier.tasks.task import IGNORED, Example, Piece, Task
from espalier.tasks.textloss import count_chars, target_chars, text_losses

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

BLOCK = 1024
"""Tokens per block of plain text where neither the caller nor the tokenizer has a limit."""


@final
@dataclass(frozen=True)
class Causal(Task):
    """A decoder writes text."""

    name: ClassVar[str] = "causal"
    auto_model: ClassVar[str] = "AutoModelForCausalLM"
    best: ClassVar[tuple[str, str]] = ("loss", "min")
    writes: ClassVar[bool] = True

    form: str = "text"
    """"text" (plain), "completion" (prompt and completion) or "chat" (messages)."""
    separator: str = ""
    """What stands between prompt and completion."""
    system: str | None = None
    """A system text put before conversations that bring none."""
    chat_template: str | None = None
    """The template in force; None: the tokenizer's own, else a plain default."""

    def read(self, raw: Row, labelled: bool = True) -> Row:
        """See `Task.read`; values: text, or prompt and completion, or messages."""
        if self.form == "text":
            values: dict[str, Any] = {"text": text_cell(raw, self.columns["text"])}
            # A line of a longer text: no end token after it, and blank lines belong to it.
            values |= {"continues": True} if raw.values.get("continues") is True else {}
        elif self.form == "completion":
            values = completion_of(raw, self.columns, labelled)
        else:
            values = {"messages": messages_of(raw, self.columns, labelled)}
        return Row(values, raw.where)

    def key(self, row: Row) -> str:
        """See `Task.key`."""
        if self.form != "chat":
            return row.values["text" if self.form == "text" else "prompt"]
        turns = row.values["messages"]
        if turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return "\n".join(message["content"] for message in turns)

    def preview(
        self, row: Row, tokenizer: PreTrainedTokenizerBase | None, max_length: int | None
    ) -> list[Piece]:
        """See `Task.preview`."""
        if tokenizer is not None:
            return learned_pieces(self.encode([row], tokenizer, max_length), tokenizer)
        if self.form == "text":
            return [Piece(row.values["text"], True)]
        return [Piece(self.key(row) + self.separator, False), Piece(self.answer(row), True)]

    def model_settings(self) -> dict[str, Any]:
        """Nothing: the head is the model's own."""
        return {}

    def encode(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int | None
    ) -> list[Example]:
        """See `Task.encode`; labels is a list of token ids, -100 where nothing is learned.

        Plain text becomes blocks of `max_length` tokens that run across rows, each text ended
        by the end token; the other forms give one example per row.
        """
        limit = length_limit(tokenizer, max_length)
        if self.form == "text":
            examples = self._blocks(rows, tokenizer, limit or BLOCK)
        else:
            examples = self._answers(rows, tokenizer, limit)
        count_chars(examples, tokenizer)
        return examples

    def _blocks(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, size: int
    ) -> list[Example]:
        start, end = opening(tokenizer), tokenizer.eos_token_id
        stream: list[int] = []
        fresh = True
        for row, ids in zip(
            rows, plain_ids(tokenizer, [row.values["text"] for row in rows]), strict=True
        ):
            stream += start + ids if fresh else ids
            fresh = not row.values.get("continues", False)
            if fresh and isinstance(end, int):
                stream.append(end)
        return blocks(stream, size)

    def _answers(
        self, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, limit: int | None
    ) -> list[Example]:
        end = tokenizer.eos_token_id
        template = template_of(tokenizer, self.chat_template) if self.form == "chat" else ""
        pieces = [self._pieces(row, tokenizer, template) for row in rows]
        start = opening(tokenizer) if self.form == "completion" else []
        ends = tuple(added_tokens(tokenizer))
        examples = []
        encoded = encode_pieces(tokenizer, pieces)
        for row, some, (ids, learned) in zip(rows, pieces, encoded, strict=True):
            whole = Encoded(start + ids, [False] * len(start) + learned)
            if not (some and some[-1].text.rstrip().endswith(ends)):
                if not isinstance(end, int):
                    raise SettingError(
                        "the tokenizer has no end-of-text token, so a model could never learn to "
                        "stop: set tokenizer.eos_token. The tokenizer of an encoder has none: to "
                        "write text take a decoder, such as demo-decoder"
                    )
                whole = Encoded([*whole.ids, end], [*whole.learned, True])
            example = fit(whole, limit, int(whole.ids[:1] == [tokenizer.bos_token_id]))
            if all(label == IGNORED for label in example["labels"]):
                raise DataError(
                    f"{row.where}: nothing of this row is learned: no token of an answer is left "
                    f"within max_length {limit}"
                )
            examples.append(example)
        return examples

    def _pieces(self, row: Row, tokenizer: PreTrainedTokenizerBase, template: str) -> list[Piece]:
        if self.form == "completion":
            prompt = row.values["prompt"] + self.separator
            return [Piece(prompt, False), Piece(row.values["completion"], True)]
        messages = with_system(row.values["messages"], self.system)
        return chat_pieces(tokenizer, messages, template, row.where)

    def collate(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
    ) -> dict[str, Tensor]:
        """See `Task.collate`; labels [B, T], chars [B].

        Packed examples give position_ids [B, T] instead of an attention mask: padding counts as
        a segment of its own, and no segment sees another.
        """
        import torch

        batch = pad_inputs(examples, tokenizer)
        batch["labels"] = pad_labels(examples)
        batch["chars"] = torch.tensor([e["chars"] for e in examples])
        if "position_ids" in examples[0]:
            del batch["attention_mask"]
            width = batch["input_ids"].shape[1]
            rows = [e["position_ids"] for e in examples]
            filled = [row + list(range(width - len(row))) for row in rows]
            batch["position_ids"] = torch.tensor(pad_lists(filled, width, 0))
        return batch

    def predict(self, outputs: Any, batch: Mapping[str, Tensor]) -> list[TextLoss]:
        """Loss, tokens and right guesses of each example, from logits [B, T, V] and labels."""
        return text_losses(outputs.logits, batch["labels"], shift=True)

    def references(self, batch: Mapping[str, Tensor]) -> list[int]:
        """The number of characters of each example's targets."""
        return target_chars(batch)

    def score(self, predictions: Sequence[TextLoss], references: Sequence[int]) -> dict[str, float]:
        """Loss per token, perplexity, token_accuracy, bits_per_character."""
        return text_scores(predictions, references)

    def decode(self, prediction: TextLoss) -> float:
        """The loss per target token, in nats."""
        return prediction.nats / max(prediction.tokens, 1)

    def extras(self, tokenizer: PreTrainedTokenizerBase | None = None) -> dict[str, Any]:
        """See `Task.extras`; for conversations with the chat template really used."""
        fields = super().extras(tokenizer)
        if self.form == "chat" and tokenizer is not None:
            fields["chat_template"] = template_of(tokenizer, self.chat_template)
        return fields

    def prompt(
        self, request: Any, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
    ) -> list[int]:
        """Token ids to generate from, formatted exactly as in training; cut from the left.

        Args:
            request: a text (the user's words), a list of messages, or a row's values, the answer
                in which is left away.
            tokenizer: the one used in training.
            max_length: tokens to keep at most.
        """
        start: list[int] = []
        if self.form == "chat":
            template = template_of(tokenizer, self.chat_template)
            messages = with_system(requested_turns(request, self.columns), self.system)
            pieces = prompt_pieces(tokenizer, messages, template)
        else:
            start = opening(tokenizer)
            name = "text" if self.form == "text" else "prompt"
            pieces = [Piece(requested_text(request, self.columns, name) + self.separator, False)]
        ids = start + encode_pieces(tokenizer, [pieces])[0].ids
        if max_length is None or len(ids) <= max_length:
            return ids
        head = int(ids[:1] == [tokenizer.bos_token_id])
        return ids[:head] + ids[len(ids) - max_length + head :]

    def answer(self, row: Row) -> str:
        """The completion, or the last answer of the conversation."""
        if self.form == "completion":
            return row.values["completion"]
        if self.form == "chat":
            return row.values["messages"][-1]["content"]
        raise SettingError("plain text has no answer to compare with")

    def stop_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The tokens that end an answer: the end of text, and the template's end of turn."""
        stops = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
        if self.form == "chat":
            template = template_of(tokenizer, self.chat_template)
            turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
            text = chat_pieces(tokenizer, turn, template, "stop")[-1].text
            token = end_token_at(tokenizer, text, text.rindex("y") + 1)
            ids = plain_ids(tokenizer, [token])[0] if token else []
            stops += [i for i in ids if i not in stops]
        return stops
