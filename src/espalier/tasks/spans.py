"""Entity F1 over BIO tags: an entity counts only if its type and both its ends are right.

Tags are read as CoNLL does and as seqeval does by default: `I-x` that follows nothing of type x
opens an entity of its own. IOBES tags (`E-`, `S-`) are understood too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

Span = tuple[str, int, int]
"""Type, first word, word after the last."""


def spans(tags: Sequence[str]) -> list[Span]:
    """The entities that BIO or IOBES tags describe, in order."""
    found: list[Span] = []
    open_type, start = "", 0
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        continues = prefix in ("I", "E") and kind == open_type
        if open_type and not continues:
            found.append((open_type, start, i))
            open_type = ""
        if prefix in ("B", "I", "E", "S") and not open_type:
            open_type, start = kind, i
        if prefix in ("E", "S") and open_type:
            found.append((open_type, start, i + 1))
            open_type = ""
    return found


def entity_scores(
    predicted: Sequence[Sequence[str]], right: Sequence[Sequence[str]]
) -> dict[str, float]:
    """precision, recall and f1 over entities (micro), f1_macro over types, accuracy over words."""
    hits: Counter[str] = Counter()
    guessed: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    words = same = 0
    for guess, truth in zip(predicted, right, strict=True):
        a, b = set(spans(guess)), set(spans(truth))
        hits.update(kind for kind, _, _ in a & b)
        guessed.update(kind for kind, _, _ in a)
        wanted.update(kind for kind, _, _ in b)
        words += len(truth)
        same += sum(p == r for p, r in zip(guess, truth, strict=True))
    types = sorted(set(guessed) | set(wanted))
    each = [_f1(hits[t], guessed[t], wanted[t]) for t in types]
    return {
        "precision": _share(hits.total(), guessed.total()),
        "recall": _share(hits.total(), wanted.total()),
        "f1": _f1(hits.total(), guessed.total(), wanted.total()),
        "f1_macro": sum(each) / len(each) if each else 0.0,
        "accuracy": _share(same, words),
    }


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def _f1(hits: int, guessed: int, wanted: int) -> float:
    return _share(2 * hits, guessed + wanted)
