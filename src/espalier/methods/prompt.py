"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): words that no vocabulary has.

    E' = [P; E(x)],   P (L, D) trained, mask' = [1; mask]

P stands before the text, after left padding, of an encoder-decoder before the encoder's. What the
model gives is for the text's own tokens: heads pool the token that they pool without a prompt, and
labels stay as they are (nothing in P predicts a word, so the first word of a text is predicted by
none, as without P). The text's positions move up by L, and it has L tokens less of room.

Rows start as frequent words do (of the 5,000 lowest ids, specials left out), which at moderate
scale trains better than random rows; the paper finds class labels best. A fresh prompt changes the
model: the text is longer. In images rows stand after the first patch (VPT, arXiv 2203.12119).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from torch import nn

from espalier.deltas import Delta
from espalier.places import Sites
from espalier.plain.prompt import (
    Prompt,
    gaps_of,
    is_template,
    of_labels,
    of_text,
    of_vocabulary,
    prompt_site,
    uniform,
)
from espalier.recipes import Method, check

INITS = ("vocabulary", "random", "text", "labels")
Words: TypeAlias = str | tuple[int, ...]  # a text, or its token ids


@dataclass(frozen=True)
class PromptTuning(Method):
    """Trained words before the text.

    Args:
        length: L. The paper takes 100, of which 20 do most; 5 suffice for very large models.
        init: How they start: as frequent words ("vocabulary"), uniform in ±½ ("random"), as the
            words of `text`, or as the `labels` of a task, each the mean of its words.
        text: Words to start from, or their token ids; repeated where they are fewer than L.
        labels: Names of classes, or the token ids of each; the other rows start as frequent words.
        template: How many words stand before the text, between its two segments, and after it;
            their sum is L then. The second segment is what token types or the first separator say.
    """

    learning_rate: ClassVar[float] = 1e-2

    length: int = 20
    init: str = "vocabulary"
    text: Words = ""
    labels: tuple[Words, ...] = ()
    template: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "length", type(self.length) is int and self.length >= 1, "at least 1")
        check(self, "init", self.init in INITS, f"one of {', '.join(INITS)}")
        for name in ("text", "labels"):
            needed = "words, or token ids," if self.init == name else "left out, or"
            given = bool(getattr(self, name))
            check(self, name, given == (self.init == name), f"{needed} with init={name!r}")
        check(self, "labels", isinstance(self.labels, Sequence), "a list of texts or of token ids")
        object.__setattr__(self, "text", _words(self.text))
        object.__setattr__(self, "labels", tuple(map(_words, self.labels)))
        object.__setattr__(self, "template", tuple(self.template))
        check(self, "template", is_template(self.template), "three numbers, as in (3, 3, 3)")
        check(self, "labels", len(self.labels) <= self.words, f"at most {self.words} of them")

    @property
    def identity(self) -> bool:
        """Never: every word of the text attends to those of the prompt."""
        return False

    @property
    def words(self) -> int:
        """L, the tokens by which the text must be shorter."""
        return sum(gaps_of(self.length, self.template))

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """The prompt, at the model's word embedding or its first block of images."""
        site = prompt_site(model, places)
        if self.init == "text":
            start = of_text(model, site, self.text)
        elif self.init == "labels":
            start = of_labels(model, site, self.labels)
        else:
            start = uniform if self.init == "random" else of_vocabulary(model, places, site)
        return [Prompt(site, gaps_of(self.length, self.template), start)]


def _words(given: Words | Sequence[int]) -> Words:
    return given if isinstance(given, str) else tuple(given)
