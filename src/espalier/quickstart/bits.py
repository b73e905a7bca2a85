"""What a decoder is worth on two kinds of text, in bits per character, and how fast it writes.

Bits per character compare models whatever their tokens: the loss in bits of all tokens, divided
by the characters that they stand for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.generation import Adapted

CONTEXT = 256  # tokens that the base reads at most


def writing_speed(at: Adapted, prompt: str, tokens: int = 64) -> float:
    """Tokens a second when going on from one prompt, with the adapter active and a cache."""
    import torch

    ids = torch.tensor([at.task.prompt(prompt, at.tokenizer)], device=at.device)
    start = time.perf_counter()
    at.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        pad_token_id=at.tokenizer.pad_token_id,
    )
    return tokens / (time.perf_counter() - start)


def docstring_bits(at: Adapted, rows: list[dict[str, str]]) -> float:
    """Bits per character of docstrings, given their signatures."""
    return _bits(at, at.task, rows)


def source_bits(at: Adapted, text: str) -> float:
    """Bits per character of source code."""
    from espalier.tasks import Causal

    return _bits(at, Causal({"text": "text"}), [{"text": text}])


def _bits(at: Adapted, task: Any, rows: list[dict[str, str]]) -> float:
    from accelerate import Accelerator

    from espalier.tasks import Row
    from espalier.training.evaluate import evaluate

    read = [task.read(Row(row, f"row {i}")) for i, row in enumerate(rows, 1)]
    examples = task.encode(read, at.tokenizer, CONTEXT)
    found = evaluate(at.model, task, at.tokenizer, examples, 16, Accelerator())
    return found.metrics["bits_per_character"]


def held_out_source(chars: int) -> str:
    """Source code of modules that the base never read: a piece of each, `chars` together."""
    from espalier.base.text import source_documents

    documents = source_documents("heldout")
    each = max(400, chars // len(documents))
    pieces = []
    for document in documents:
        start = document.text.find("\n", max(0, (len(document.text) - each) // 2)) + 1
        pieces.append(document.text[start : start + each])
    return "\n".join(pieces)[:chars]
