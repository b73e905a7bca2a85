"""Customer mails written from templates with noise: what they are, what they name, how urgent.

    python examples/customer_mails.py

A mail is a complaint, an enquiry or thanks; tags on its words mark order numbers and problems; a
number from 0 to 1 says how soon somebody should answer. Sentences, problems, articles, names and
even the formats of order numbers are dealt out to the splits: what a test mail is made of occurs
in no training mail, so that a score says something about mails not yet seen.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import customer_phrases as phrases

KINDS = {"complaint": 0.5, "enquiry": 0.3, "thanks": 0.15}  # and how urgent they are as such
MOODS = {
    "complaint": (0.4, 0.2, 0.0, -0.2),
    "enquiry": (0.4, 0.2, 0.0, -0.2),
    "thanks": (0.0, -0.2),
}
GAPS = {"item": phrases.ITEMS, "price": phrases.PRICES, "order": phrases.ORDERS}
MARKS = {"9": "0123456789", "A": "ABCDEFGHKLMNPRSTX"}  # what may stand for them in a number


def mails(split: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows with text, tokens, tags, kind and urgency; always the same for the same seed.

    Args:
        split: "train", "validation" or "test".
        count: How many.
        seed: Of every choice.
    """
    writer = Writer(split, seed)
    return [writer.mail() for _ in range(count)]


class Writer:
    """Puts mails of one split together.

    Attributes:
        split: Whose phrases it uses.
        draw: Every choice comes from here.
    """

    def __init__(self, split: str, seed: int) -> None:
        self.split = split
        self.draw = random.Random(f"{split} {seed}")

    def mail(self) -> dict[str, Any]:
        """One mail: greeting, what it is about, how much it presses, signature; with slips."""
        draw = self.draw
        kind = draw.choices(list(KINDS), (4, 3, 3))[0]
        mood = draw.choice(MOODS[kind])
        body = draw.sample(self.own(phrases.SENTENCES[kind]), draw.choice((1, 2)))
        body += draw.sample(self.own(phrases.CUES[mood]), draw.choice((1, 2)))
        words = [word for template in body for word in self.sentence(template)]
        if draw.random() < 0.8:
            words = self.sentence(self.one(phrases.GREETINGS)) + words
        if draw.random() < 0.8:
            words += self.sentence(f"{self.one(phrases.CLOSINGS)} {self.one(phrases.NAMES)}")
        if draw.random() < 0.3:
            words += self.sentence(self.number("Tel. 0999 999999"))
        tokens, tags = self.slips(words), [tag for _, tag in words]
        urgency = KINDS[kind] + mood + draw.gauss(0, 0.04)
        return {
            "text": " ".join(tokens),
            "tokens": tokens,
            "tags": tags,
            "kind": kind,
            "urgency": round(min(1.0, max(0.0, urgency)), 2),
        }

    def own(self, some: Sequence[str]) -> list[str]:
        """The phrases of a list that belong to this split."""
        return [phrase for i, phrase in enumerate(some) if i % 5 in phrases.SHARES[self.split]]

    def one(self, some: Sequence[str]) -> str:
        """One of this split's phrases of a list."""
        return self.draw.choice(self.own(some))

    def number(self, form: str) -> str:
        """A number of this form."""
        return "".join(self.draw.choice(MARKS[c]) if c in MARKS else c for c in form)

    def sentence(self, template: str) -> list[tuple[str, str]]:
        """A sentence with its gaps filled, as words with tags (B-order, I-order, …, O)."""
        text, spans = "", []
        problems = self.draw.sample(self.own(phrases.PROBLEMS), 2)
        for i, part in enumerate(re.split(r"\{(\w+)\}", template)):
            piece = part
            if i % 2:  # a gap
                piece = self.one(GAPS[part]) if part in GAPS else problems.pop()
                piece = piece.replace("{item}", self.one(phrases.ITEMS))
                piece = self.number(piece) if part == "order" else piece
                if part in ("order", "problem"):
                    spans.append((len(text), len(text) + len(piece), part))
            text += piece
        text = re.sub(r"(^|[.!?] )[a-z]", lambda found: found[0].upper(), text)
        return [(found[0], _tag(found, spans)) for found in re.finditer(r"\S+", text)]

    def slips(self, words: list[tuple[str, str]]) -> list[str]:
        """The words as typed: slips of the fingers, in order numbers none; some without stops."""
        draw = self.draw
        typed = [word if "order" in tag else self.slip(word) for word, tag in words]
        if draw.random() < 0.2:
            typed = [word.lower() for word in typed]
        if draw.random() < 0.2:
            typed = [word.rstrip(".,:!") or word for word in typed]
        return typed

    def slip(self, word: str) -> str:
        """The word, seldom with two letters swapped, one lost or one twice."""
        if len(word) < 4 or not word.isalpha() or self.draw.random() > 0.06:
            return word
        at = self.draw.randrange(1, len(word) - 1)
        pair = word[at : at + 2]
        typed = self.draw.choice((pair[::-1], pair[1], pair[0] + pair))
        return word[:at] + typed + word[at + 2 :]


def baselines(name: str, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> list[float]:
    """What no network is needed for: always the commonest answer, and words counted (tf-idf).

    Accuracy of the kind, F1 of the passages that the tags mark (each word with its usual tag), and
    Spearman's correlation of the urgency, where the one answer that is always given has none.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    from espalier.tasks.metrics import regression_scores
    from espalier.tasks.spans import entity_scores

    if name == "tags":
        seen: dict[str, Counter[str]] = defaultdict(lambda: Counter(["O"]))
        for row in train:
            for word, tag in zip(row["tokens"], row["tags"], strict=True):
                seen[word][tag] += 1
        usual = [[seen[word].most_common(1)[0][0] for word in row["tokens"]] for row in test]
        return [0.0, entity_scores(usual, [row["tags"] for row in test])["f1"]]
    number = name == "urgency"
    words = make_pipeline(TfidfVectorizer(), Ridge() if number else LogisticRegression())
    words.fit([row["text"] for row in train], [row[name] for row in train])
    found, right = words.predict([row["text"] for row in test]), [row[name] for row in test]
    if number:
        return [0.0, regression_scores(found, right)["spearman"]]
    common = Counter(row[name] for row in train).most_common(1)[0][0]
    return [right.count(common) / len(right), float((found == right).mean())]


def _tag(word: re.Match[str], spans: list[tuple[int, int, str]]) -> str:
    """The tag of a word, from the stretches of the sentence that are to be found."""
    for start, stop, what in spans:
        if word.start() < stop and word.end() > start:
            return f"{'B' if word.start() <= start else 'I'}-{what}"
    return "O"


if __name__ == "__main__":
    for row in mails("train", 5):
        print(f"{row['kind']}, urgency {row['urgency']}: {row['text']}")
        print(*(f"  {w}/{t}" for w, t in zip(row["tokens"], row["tags"], strict=True) if t != "O"))
