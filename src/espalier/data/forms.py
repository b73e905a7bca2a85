"""The forms that data comes in: column names and what they mean. Tables only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# fmt: off
TEXT = (
    "text", "sentence", "review", "content", "comment", "tweet", "utterance", "query",
    "question", "body", "title", "headline", "message",
)
LABEL = (
    "label", "labels", "class", "category", "intent", "sentiment", "topic", "stars", "rating",
    "score", "similarity",
)
# fmt: on
PAIRS = (
    ("text", "text_pair"),
    ("text_a", "text_b"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("query", "passage"),
)
SOURCES = (
    ("source", "target"),
    ("input", "target"),
    ("input", "output"),
    ("document", "summary"),
    ("article", "highlights"),
    ("article", "summary"),
    ("dialogue", "summary"),
    ("text", "summary"),
    ("src", "tgt"),
)
QUESTION = ("question", "prompt", "source", "input", "query", "text", "premise", "context")
CHOICES = ("choices", "options", "answer_choices", "candidates", "endings")
RIGHT = ("label", "answer", "completion", "target", "output", "gold")
# fmt: off
ASIDE = frozenset((
    "id", "idx", "index", "uid", "guid", "url", "source", "meta", "metadata", "date",
    "timestamp", "split", "lang",
))
# fmt: on
"""Columns that may stand beside plain text without raising a question."""

NEEDED = {
    "classification": "text + label (or sentence1 + sentence2 + label)",
    "multilabel": "text + labels (a list)",
    "regression": "text + label (a number)",
    "tokens": "tokens + tags",
    "causal": "text, or prompt + completion, or instruction + output, or messages",
    "seq2seq": "source + target",
    "choices": "question + choices (a list of texts) + label (the right one, or its number from 0)",
}
CONTINUES = "continues"
"""Set by the reader of plain text on lines that are not the last of their text."""
LABELLED = ("classification", "multilabel", "regression")


@dataclass(frozen=True)
class Form:
    """A task, the kind of it, and the person's columns by the names that the task gives them."""

    task: str
    columns: Mapping[str, str]
    kind: str = ""
    separator: str = ""
    usual: bool = True
    """Whether the form is taken without being asked for."""

    def __str__(self) -> str:
        pairs = ", ".join(
            name if name == column else f"{name} = {column}"
            for name, column in self.columns.items()
        )
        return f"{self.task} ({pairs})"


CANONICAL = {
    "classification": ("text", "text_pair", "label"),
    "multilabel": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
    "tokens": ("tokens", "tags"),
    "causal": (
        *("text", "prompt", "completion", "messages"),
        *("instruction", "input", "output", "system"),
    ),
    "seq2seq": ("source", "target"),
    "choices": ("question", "choices", "label"),
}
