"""Examples and a query as token ids: every candidate answer after its prompt, within the limit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import SettingError
from espalier.incontext.settings import InContext
from espalier.tasks import Causal, Choices, Classification, Row, Seq2Seq, Task
from espalier.tasks.chat import Message, chat_pieces, template_of, with_system
from espalier.tasks.encoding import UNLIMITED, opening
from espalier.tasks.pieces import encode_pieces
from espalier.tasks.task import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTENT_FREE = "N/A"
TEMPLATES = {
    "classification": "Text: {text}\nLabel: {label}",
    "choices": "Question: {text}\nAnswer: {label}",
    "seq2seq": "Input: {text}\nOutput: {label}",
}


@dataclass(frozen=True)
class Candidate:
    """One answer after its prompt.

    Attributes:
        source: What the encoder reads; None for a decoder.
        ids: What the decoder reads, of an encoder-decoder without the token it starts from.
        scored: Places in `ids` of the tokens whose likelihood counts.
        chars: Characters of the answer.
    """

    source: tuple[int, ...] | None
    ids: tuple[int, ...]
    scored: tuple[int, ...]
    chars: int

    @property
    def length(self) -> int:
        """Tokens of the longer of both sides."""
        return max(len(self.ids), len(self.source or ()))


@dataclass(frozen=True)
class Asked:
    """A query with its examples: its candidates, how many examples fit, whether it was cut."""

    candidates: tuple[Candidate, ...]
    shots: int
    cut: bool


class Prompts:
    """Writes rows of one task as prompts for one kind of model.

    Args:
        task: Of the rows.
        tokenizer: The model's.
        how: The settings.
        encoder: Whether an encoder reads the prompt and a decoder writes the answer.
        limit: Tokens that a prompt may have with its answer; None for any number.

    Raises:
        SettingError: Such rows have no form in context, or the words do not fit the labels.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        how: InContext,
        encoder: bool,
        limit: int | None,
    ) -> None:
        self.task, self.tokenizer, self.how = task, tokenizer, how
        self.encoder, self.limit = encoder, limit
        self.chat = isinstance(task, Causal) and task.form == "chat"
        self.ranked = isinstance(task, Classification | Choices)
        self._check()

    def _check(self) -> None:
        task, words = self.task, self.how.words
        plain = isinstance(task, Causal) and task.form == "text"
        if plain or not isinstance(task, Causal | Seq2Seq | Classification | Choices):
            raise SettingError(
                f"data for {'plain text' if plain else task.name} has no form in context; it "
                "takes classes, choices, prompts with completions, conversations, source and target"
            )
        if self.chat and self.encoder:
            raise SettingError("conversations need a decoder, not an encoder-decoder")
        if words is not None and not isinstance(task, Classification):
            raise SettingError(f"words stand for classes; data for {task.name} has none")
        if words is not None and len(words) != len(task.labels or ()):
            raise SettingError(
                f"{len(words)} words for {len(task.labels or ())} labels: {list(task.labels or ())}"
            )

    def ask(self, query: Row, shots: Sequence[Row]) -> Asked:
        """A query after as many of its examples as fit, the most important last."""
        made, count = self._candidates(query, list(shots)[::-1]), len(shots)
        if self._fits(made):
            return Asked(made, count, False)
        fits, too_many = -1, count  # more examples are longer: halve what is between
        while too_many - fits > 1:
            count = (fits + too_many) // 2
            made = self._candidates(query, list(shots[:count])[::-1])
            fits, too_many = (count, too_many) if self._fits(made) else (fits, count)
        made = self._candidates(query, list(shots[: max(fits, 0)])[::-1])
        if fits >= 0:
            return Asked(made, fits, False)
        return Asked(tuple(_cut(one, self.limit or 0) for one in made), 0, True)

    def _fits(self, made: Sequence[Candidate]) -> bool:
        return self.limit is None or all(one.length <= self.limit for one in made)

    def without_content(self, query: Row, shots: Sequence[Row]) -> Asked:
        """The same for a query that says nothing, to calibrate by."""
        blank = {name: CONTENT_FREE for name in ("text", "text_pair") if name in query.values}
        return self.ask(Row({**query.values, **blank}, query.where), shots)

    def _candidates(self, query: Row, shots: Sequence[Row]) -> tuple[Candidate, ...]:
        if self.chat:
            return (self._turns(query, shots),)
        before = self.how.instruction + "".join(map(self._shown, shots))
        head, answers = self._parts(query)
        if self.encoder:
            return tuple(self._to_encoder(before + head, answer) for answer in answers)
        # An answer that is written is written to its end; the end token's place is `after`'s.
        end = "" if self.ranked else self.how.after
        texts = [[Piece(before + head, False), Piece(answer + end, True)] for answer in answers]
        start = opening(self.tokenizer)
        return tuple(
            _candidate(start, ids, learned, len(answer))
            for (ids, learned), answer in zip(
                encode_pieces(self.tokenizer, texts), answers, strict=True
            )
        )

    def _to_encoder(self, source: str, answer: str) -> Candidate:
        row = Row({"source": source.rstrip(), "target": answer.strip()}, "prompt")
        writer = Seq2Seq({"source": "source", "target": "target"})
        (made,) = writer.encode([row], self.tokenizer, UNLIMITED)
        ids = made["labels"]
        special = self.tokenizer.all_special_ids if self.ranked else ()
        scored = tuple(at for at, token in enumerate(ids) if token not in special)
        return Candidate(tuple(made["input_ids"]), tuple(ids), scored, made["chars"])

    def _turns(self, query: Row, shots: Sequence[Row]) -> Candidate:
        """Examples as earlier turns of the conversation; the query's own answers count."""
        task = self.task
        assert isinstance(task, Causal)
        own: list[Message] = query.values["messages"]
        system = own[:1] if own[0]["role"] == "system" else []
        past = [m for row in shots for m in row.values["messages"] if m["role"] != "system"]
        turns = with_system([*system, *past, *own[len(system) :]], task.system)
        template = template_of(self.tokenizer, task.chat_template)
        pieces = chat_pieces(self.tokenizer, turns, template, query.where)
        earlier = sum(message["role"] == "assistant" for message in past)
        for at, piece in enumerate(pieces):
            if piece.learned and earlier:
                pieces[at], earlier = Piece(piece.text, False), earlier - 1
        ids, learned = encode_pieces(self.tokenizer, [pieces])[0]
        chars = sum(len(m["content"]) for m in own if m["role"] == "assistant")
        return _candidate([], ids, learned, chars)

    def _shown(self, row: Row) -> str:
        """A training row with its answer."""
        head, answers = self._parts(row)
        return head + answers[row.values["label"] if self.ranked else 0] + self.how.after

    def _parts(self, row: Row) -> tuple[str, list[str]]:
        """What stands before the answer, and the answers there are, each with what parts them."""
        task, values = self.task, row.values
        if isinstance(task, Causal) and self.how.template is None:
            return values["prompt"] + task.separator, [values["completion"]]
        if isinstance(task, Classification):
            return self._filled(values, list(self.how.words or task.labels or ()))
        if isinstance(task, Choices):
            return self._filled({"text": task.prefix + values["question"]}, values["choices"])
        if isinstance(task, Seq2Seq):
            return self._filled({"text": task.prefix + values["source"]}, [values["target"]])
        return self._filled({"text": values["prompt"]}, [values["completion"].strip()])

    def _filled(self, values: Mapping[str, Any], answers: list[str]) -> tuple[str, list[str]]:
        template = self.how.template or TEMPLATES[self.task.name]
        if "text_pair" in values and "{text_pair}" not in template:
            template = template.replace("{text}", "{text}\n{text_pair}", 1)
        head = template.removesuffix("{label}")
        head = re.sub(r"\{(text|text_pair)\}", lambda found: str(values.get(found[1], "")), head)
        stem = head.rstrip(" ")  # tokens of words begin with their space
        return stem, [head[len(stem) :] + answer for answer in answers]


def _candidate(
    start: Sequence[int], ids: Sequence[int], learned: Sequence[bool], chars: int
) -> Candidate:
    whole, flags = [*start, *ids], [*[False] * len(start), *learned]
    scored = tuple(at for at, counts in enumerate(flags) if counts and at)
    return Candidate(None, tuple(whole), scored, chars)


def _cut(one: Candidate, limit: int) -> Candidate:
    """Without the beginning, so that what is asked and the answer stay."""
    if one.source is not None:
        ids = one.ids[:limit]
        scored = tuple(at for at in one.scored if at < limit)
        return Candidate(one.source[-limit:], ids, scored, one.chars)
    gone = max(len(one.ids) - limit, 0)
    scored = tuple(at - gone for at in one.scored if at > gone)
    return Candidate(None, one.ids[gone:], scored, one.chars)
