"""Evaluation by writing: answers generated from prompts, compared with those in the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.training.evaluate import evaluating

if TYPE_CHECKING:
    from espalier.tasks import Row, Task


def write_answers(
    model: Any,
    task: Task,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch: int,
    max_length: int,
    max_new_tokens: int,
) -> list[str]:
    """The model's greedy answer to each row, in the rows' order."""
    prompts = [task.prompt(row.values, tokenizer, max_length) for row in rows]
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers = [""] * len(prompts)
    with evaluating(model):
        for at in range(0, len(order), batch):
            some = order[at : at + batch]
            texts = _generate(model, task, tokenizer, [prompts[i] for i in some], max_new_tokens)
            for i, text in zip(some, texts, strict=True):
                answers[i] = text
    return answers


def score_answers(task: Task, answers: Sequence[str], rows: Sequence[Row]) -> dict[str, float]:
    """exact_match, bleu and rouge_l of answers to the rows."""
    from espalier.tasks.metrics import generation_scores

    return generation_scores(answers, [task.answer(row) for row in rows])


def _generate(
    model: Any, task: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    from espalier.tasks.encoding import pad_id

    width, fill = max(map(len, prompts)), pad_id(tokenizer)
    before = task.name == "causal"  # a decoder goes on from the right end

    def padded(ids: Sequence[int], value: int) -> list[int]:
        space = [value] * (width - len(ids))
        return [*space, *ids] if before else [*ids, *space]

    device = next(nn.Module.parameters(model)).device
    ids = torch.tensor([padded(p, fill) for p in prompts], device=device)
    mask = torch.tensor([padded([1] * len(p), 0) for p in prompts], device=device)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=fill,
        eos_token_id=task.stop_ids(tokenizer),
    )
    new = out[:, width:] if before else out
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
