"""Texts made of pieces, some of which are learned: encoding, masking, cutting.

The mask is right by construction. Pieces are encoded from left to right; the ids of the first
pieces are always a prefix of the ids of more pieces, so what a model is given at inference (the
pieces before the answer) is token for token what it saw in training. Nothing is searched for.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from espalier.tasks.encoding import plain_ids
from espalier.tasks.task import IGNORED, Example, Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoded(NamedTuple):
    """Token ids with one flag each: learned or not."""

    ids: list[int]
    learned: list[bool]


def encode_pieces(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[Piece]]
) -> list[Encoded]:
    """Encode each text so that any first pieces of it give a prefix of its ids.

    The text up to a piece's end is encoded in one go where that leaves the ids so far as they
    are (so that words look as in running text); otherwise the piece is encoded by itself.
    """
    until = [_cumulated(pieces) for pieces in texts]
    joint = _in_groups(tokenizer, until)
    alone = _in_groups(tokenizer, [[p.text for p in pieces] for pieces in texts], joint)
    results = []
    for pieces, whole, single in zip(texts, joint, alone, strict=True):
        ids: list[int] = []
        learned: list[bool] = []
        for i, piece in enumerate(pieces):
            ids = whole[i] if whole[i][: len(ids)] == ids else ids + single[i]
            learned += [piece.learned] * (len(ids) - len(learned))
        results.append(Encoded(list(ids), learned))
    return results


def _cumulated(pieces: Sequence[Piece]) -> list[str]:
    texts, so_far = [], ""
    for piece in pieces:
        so_far += piece.text
        texts.append(so_far)
    return texts


def _in_groups(
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Sequence[str]],
    joint: Sequence[Sequence[list[int]]] | None = None,
) -> list[list[list[int]]]:
    """Encode all texts in one call; groups that `joint` shows to be consistent are skipped."""
    wanted = [joint is None or not _consistent(joint[i]) for i in range(len(groups))]
    flat = [text for group, want in zip(groups, wanted, strict=True) if want for text in group]
    ids = iter(plain_ids(tokenizer, flat))
    return [
        [next(ids) if want else [] for _ in group]
        for group, want in zip(groups, wanted, strict=True)
    ]


def _consistent(prefixes: Sequence[list[int]]) -> bool:
    return all(b[: len(a)] == a for a, b in itertools.pairwise(prefixes))


def fit(encoded: Encoded, max_length: int | None, opening: int) -> Example:
    """An example of at most `max_length` tokens: input_ids, labels, full, cut.

    The start of the prompt is cut first (the `opening` tokens stay), so that the last answer
    stays whole. An answer that does not fit by itself loses its end, and with it the end token,
    and leaves a quarter of the room to the prompt.
    """
    ids, learned = encoded
    keep = list(range(len(ids)))
    if max_length is not None and len(ids) > max_length:
        start = _last_answer(learned)
        answer = len(ids) - start
        room = max_length - answer if answer <= max_length else min(start, max_length // 4)
        head = list(range(min(opening, room)))
        before = list(range(start - (room - len(head)), start))
        keep = (head + before + list(range(start, len(ids))))[:max_length]
    kept = [learned[i] for i in keep]
    return {
        "input_ids": [ids[i] for i in keep],
        "labels": [ids[i] if learned[i] and place else IGNORED for place, i in enumerate(keep)],
        "full": len(ids),
        "cut": int(sum(kept) < sum(learned)),
    }


def blocks(stream: Sequence[int], size: int) -> list[Example]:
    """Plain text in examples of `size` tokens, all of which are learned but the very first.

    The first token of a block has nothing before it from which it could be foretold; blocks
    share one token, so that each is foretold in one of them.
    """
    parts = [list(stream[i : i + size]) for i in range(0, len(stream), max(size - 1, 1))]
    return [
        {"input_ids": part, "labels": [IGNORED, *part[1:]], "full": len(part), "cut": 0}
        for part in parts
        if len(part) > 1
    ]


def learned_pieces(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """The text of examples as it is after encoding and cutting, by what the loss sees of it."""
    tokens: list[tuple[int, bool]] = []
    for example in examples:
        flags = [label != IGNORED for label in example["labels"]]
        pairs = list(zip(example["input_ids"], flags, strict=True))
        tokens += pairs[1:] if tokens else pairs  # blocks of plain text share a token
    return [
        Piece(str(tokenizer.decode([token for token, _ in run])), learned)
        for learned, run in itertools.groupby(tokens, key=lambda pair: pair[1])
    ]


def _last_answer(learned: Sequence[bool]) -> int:
    """Where the last learned stretch begins."""
    start = len(learned)
    while start and not learned[start - 1]:
        start -= 1
    while start and learned[start - 1]:
        start -= 1
    return start
