"""Shared steps from text to padded tensors: tokenising with the length before truncation kept,
and padding on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from espalier.tasks.task import IGNORED, Example

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

UNLIMITED = 1_000_000
"""Tokenizers without a limit state one of about 10^30."""


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """`max_length`, else the tokenizer's own limit, else None."""
    if max_length is not None:
        return max_length
    limit = tokenizer.model_max_length
    return int(limit) if limit and limit < UNLIMITED else None


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int | None,
) -> list[Example]:
    """Encode texts or pairs with special tokens; the longer part of a pair is cut first.

    Returns:
        One dict per text: input_ids, token_type_ids where the model uses them, and `full`, the
        number of tokens before truncation.
    """
    if not texts:
        return []
    pairs = list(pairs) if pairs is not None else None
    examples = _encode(tokenizer, list(texts), pairs)
    limit = length_limit(tokenizer, max_length)
    long = [i for i, e in enumerate(examples) if limit is not None and e["full"] > limit]
    if long:
        some_pairs = [pairs[i] for i in long] if pairs is not None else None
        cut = _encode(tokenizer, [texts[i] for i in long], some_pairs, limit)
        for i, example in zip(long, cut, strict=True):
            examples[i] = example | {"full": examples[i]["full"]}
    return examples


def _encode(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    limit: int | None = None,
) -> list[Example]:
    encoded = tokenizer(
        texts,
        pairs,
        truncation=limit is not None,
        max_length=limit,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]  # type: ignore[assignment]
    examples: list[Example] = [{"input_ids": i, "full": len(i)} for i in ids]
    if "token_type_ids" in encoded:
        for example, types in zip(examples, encoded["token_type_ids"], strict=True):  # type: ignore[arg-type]
            example["token_type_ids"] = types
    return examples


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text without any special tokens around it."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]  # type: ignore[return-value]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`[bos]` where the tokenizer opens texts with a beginning-of-text token, else `[]`."""
    bos = tokenizer.bos_token_id
    start = tokenizer("a", verbose=False)["input_ids"][:1]  # type: ignore[index]
    return [bos] if isinstance(bos, int) and start == [bos] else []


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill up with: the padding token, else the end-of-text token, else 0.

    Which one it is makes no difference to training: padding is masked by position, never by id.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0


def pad_inputs(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """input_ids, attention_mask and token_type_ids, each [B, T], padded on the right."""
    import torch

    lists = [e["input_ids"] for e in examples]
    width = max(map(len, lists))
    batch = {
        "input_ids": pad_lists(lists, width, pad_id(tokenizer)),
        "attention_mask": pad_lists([[1] * len(ids) for ids in lists], width, 0),
    }
    if "token_type_ids" in examples[0]:
        batch["token_type_ids"] = pad_lists([e["token_type_ids"] for e in examples], width, 0)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def pad_lists(lists: Sequence[list[Any]], width: int, fill: Any) -> list[list[Any]]:
    """Each list filled up on the right to `width`."""
    return [row + [fill] * (width - len(row)) for row in lists]


def pad_labels(examples: Sequence[Example]) -> Tensor:
    """Labels of tokens as [B, T], padded with the label that no loss looks at."""
    import torch

    lists = [e["labels"] for e in examples]
    return torch.tensor(pad_lists(lists, max(map(len, lists)), IGNORED))
