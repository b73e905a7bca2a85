"""Log-likelihoods of answers after their prompts, in batches; each context is read once."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from espalier.incontext.prompts import Candidate
from espalier.modules import unwrap
from espalier.tasks.encoding import pad_lists
from espalier.tasks.metrics import TextLoss


class Context(NamedTuple):
    """What the model is given: its encoder's ids, if it has one, and its decoder's."""

    source: tuple[int, ...]
    ids: tuple[int, ...]


def likelihoods(
    model: Any, candidates: Sequence[Candidate], batch: int
) -> tuple[list[TextLoss], list[int]]:
    """The scored tokens of each candidate, and the sizes of the contexts that were read.

    Padding stands on the right, where nothing that counts can see it. Candidates that part in their
    last token alone, as label words of one token do, share one context.

    Args:
        model: A decoder or an encoder-decoder, in evaluation mode.
        candidates: In any order.
        batch: Contexts at once.
    """
    contexts: dict[Context, list[int]] = {}
    for number, one in enumerate(candidates):
        contexts.setdefault(_context(model, one), []).append(number)
    order = sorted(contexts, key=lambda c: -(len(c.source) + len(c.ids)))
    found: dict[int, TextLoss] = {}
    for at in range(0, len(order), batch):
        some = order[at : at + batch]
        shift = int(candidates[contexts[some[0]][0]].source is None)
        wanted = sorted(
            {p - shift for c in some for n in contexts[c] for p in candidates[n].scored}
        )
        logits = _logits(model, some, wanted)
        columns = {place: column for column, place in enumerate(wanted)}
        for row, context in zip(logits, some, strict=True):
            for number in contexts[context]:
                one = candidates[number]
                places = [columns[p - shift] for p in one.scored]
                found[number] = _loss(row[places], [one.ids[p] for p in one.scored])
    sizes = [len(c.source) + len(c.ids) for c in order]
    return [found[number] for number in range(len(candidates))], sizes


def _context(model: Any, one: Candidate) -> Context:
    last = max(one.scored, default=0)
    if one.source is None:
        return Context((), one.ids[:last] or one.ids[:1])
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    starts = (getattr(model.config, name, None) for name in names)
    start = next((token for token in starts if isinstance(token, int)), 0)
    return Context(one.source, (start, *one.ids[:last]))


def _logits(model: Any, contexts: Sequence[Context], wanted: Sequence[int]) -> Tensor:
    """Logits (B, places, V) of the decoder, at the wanted places only."""
    device = next(model.parameters()).device
    places = torch.tensor(wanted, dtype=torch.long, device=device)
    ids, mask = _padded([c.ids for c in contexts], device)
    with torch.no_grad():
        if contexts[0].source:
            source, source_mask = _padded([c.source for c in contexts], device)
            given = {"input_ids": source, "attention_mask": source_mask, "decoder_input_ids": ids}
            return model(**given, use_cache=False).logits[:, places]
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if "logits_to_keep" in inspect.signature(type(unwrap(model)).forward).parameters:
            return model(**given, logits_to_keep=places).logits
        return model(**given).logits[:, places]


def _padded(lists: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids filled up with zeros, which the mask hides."""
    rows = [list(one) for one in lists]
    width = max(map(len, rows))
    masks = pad_lists([[1] * len(row) for row in rows], width, 0)
    return (
        torch.tensor(pad_lists(rows, width, 0), device=device),
        torch.tensor(masks, device=device),
    )


def _loss(logits: Tensor, targets: Sequence[int]) -> TextLoss:
    if not targets:
        return TextLoss(0.0, 0, 0)
    right = torch.tensor(targets, device=logits.device)
    nats = torch.nn.functional.cross_entropy(logits.float(), right, reduction="sum")
    return TextLoss(float(nats), len(targets), int((logits.argmax(-1) == right).sum()))
