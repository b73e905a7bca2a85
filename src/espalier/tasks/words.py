"""Words that are given, to tokens: which token opens which word.

Fast tokenizers say so themselves. Others, and byte-level ones that were not made for words
given one by one, encode each word by itself with a space before all but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.tasks.encoding import plain_ids
from espalier.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Heads = dict[int, int]
"""Word number to the place of its first token."""


def encode_words(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], limit: int | None
) -> list[tuple[Example, Heads]]:
    """Examples (input_ids, perhaps token_type_ids, full) and where each word begins."""
    if not texts:
        return []
    if tokenizer.is_fast and _takes_words(tokenizer):
        return _by_word_ids(tokenizer, texts, limit)
    return [_word_by_word(tokenizer, words, limit) for words in texts]


def _takes_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer parts "a", "b" as it parts the text "a b"."""
    try:
        apart = tokenizer(["a", "b"], is_split_into_words=True, add_special_tokens=False)
    except (AssertionError, ValueError):  # byte-level ones without add_prefix_space
        return False
    together = tokenizer("a b", add_special_tokens=False)
    # With add_prefix_space only the first word may differ.
    return apart["input_ids"][-1:] == together["input_ids"][-1:]  # type: ignore[index]


def _by_word_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[str]], limit: int | None
) -> list[tuple[Example, Heads]]:
    encoded = tokenizer(
        [list(words) for words in texts],
        is_split_into_words=True,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    results: list[tuple[Example, Heads]] = []
    for i in range(len(texts)):
        ids: list[int] = encoded["input_ids"][i]  # type: ignore[index,assignment]
        heads: Heads = {}
        for at, word in enumerate(encoded.word_ids(i)):
            if word is not None:
                heads.setdefault(word, at)
        results.append(_cut(tokenizer, ids, heads, limit))
    return results


def _word_by_word(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], limit: int | None
) -> tuple[Example, Heads]:
    parts = plain_ids(tokenizer, [word if i == 0 else f" {word}" for i, word in enumerate(words)])
    before, after = _frame(tokenizer)
    ids, heads = list(before), {}
    for word, part in enumerate(parts):
        if part:
            heads[word] = len(ids)
            ids += part
    return _cut(tokenizer, ids + after, heads, limit)


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare: list[int] = plain_ids(tokenizer, ["a"])[0]
    framed: list[int] = tokenizer("a", verbose=False)["input_ids"]  # type: ignore[index,assignment]
    for at in range(len(framed) - len(bare) + 1):
        if framed[at : at + len(bare)] == bare:
            return framed[:at], framed[at + len(bare) :]
    return [], []


def _cut(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], heads: Heads, limit: int | None
) -> tuple[Example, Heads]:
    """The example with its end cut to `limit`; the closing special tokens stay."""
    full = len(ids)
    if limit is not None and full > limit:
        after = _frame(tokenizer)[1]
        room = max(limit - len(after), 0)
        ids = (ids[:room] + after)[:limit]
        heads = {word: at for word, at in heads.items() if at < room}
    example: Example = {"input_ids": ids, "full": full}
    if "token_type_ids" in tokenizer.model_input_names:
        example["token_type_ids"] = [0] * len(ids)
    return example, heads
