"""Ranking answer choices by likelihood, and the three losses of T-Few (Liu et al. 2022,
arXiv 2205.05638).

Of every choice there is a row of `nats` (N, T), the cross-entropy of its tokens, and of `seen`
(N, T), which of them count (the end token does, padding does not). `counts` says how many rows
belong to each example, `right` which of an example's own rows is the right one. Each loss is the
mean over examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from espalier.tasks.task import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

SLACK = 0.01
"""Added to 1 − p before the logarithm, as in the authors' code: p = 1 stays finite."""


def token_nats(logits: Tensor, targets: Tensor, shift: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each target token, 0 elsewhere, and which tokens are targets; both (N, T).

    Args:
        logits: (N, T, V).
        targets: (N, T) token ids; -100 where nothing is to be predicted.
        shift: Whether logits at t speak of the target at t + 1 (decoders) or at t.
    """
    import torch

    if shift:
        logits, targets = logits[:, :-1], targets[:, 1:]
    seen = targets != IGNORED
    found = torch.nn.functional.cross_entropy(logits[seen].float(), targets[seen], reduction="none")
    nats = found.new_zeros(targets.shape).masked_scatter(seen, found)
    return nats, seen


def choice_scores(nats: Tensor, seen: Tensor, power: float = 1.0) -> Tensor:
    """Log-likelihood of each choice over its length to a power, (N,); the highest is taken."""
    return -nats.sum(1) / seen.sum(1).clamp(min=1) ** power


def gold_loss(nats: Tensor, seen: Tensor, counts: Sequence[int], right: Sequence[int]) -> Tensor:
    """L_LM: the mean cross-entropy of the right choice's tokens."""
    at = _rows(counts, right)
    return (nats[at].sum(1) / seen[at].sum(1).clamp(min=1)).mean()


def length_normalised_loss(
    nats: Tensor, seen: Tensor, counts: Sequence[int], right: Sequence[int], power: float = 1.0
) -> Tensor:
    """L_LN: the cross-entropy of the right choice among the scores of all of an example's."""
    import torch

    scores = choice_scores(nats, seen, power).split(list(counts))
    each = [own.logsumexp(0) - own[i] for own, i in zip(scores, right, strict=True)]
    return torch.stack(each).mean()


def unlikelihood_loss(
    nats: Tensor, seen: Tensor, counts: Sequence[int], right: Sequence[int]
) -> Tensor:
    """L_UL: −log(1 − p + 0.01) over the tokens of an example's wrong choices, their mean."""
    import torch

    wrong = torch.ones(len(nats), 1, dtype=torch.bool, device=nats.device)
    wrong[_rows(counts, right)] = False
    counted = seen & wrong
    penalty = -torch.log1p(SLACK - torch.exp(-nats)) * counted
    sums, sizes = penalty.sum(1).split(list(counts)), counted.sum(1).split(list(counts))
    each = [s.sum() / n.sum().clamp(min=1) for s, n in zip(sums, sizes, strict=True)]
    return torch.stack(each).mean()


def _rows(counts: Sequence[int], right: Sequence[int]) -> list[int]:
    """The row of each example's right choice."""
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [start + i for start, i in zip(starts, right, strict=True)]
