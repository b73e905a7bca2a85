"""Prompts of one task for another: reading saved ones, how alike they are, mixing them (SPoT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.errors import CheckpointError, SettingError

METRICS = ("mean", "words")
_SLACK = 0.02  # as far as one base's values differ between fp32 and bf16


class SavedPrompt(NamedTuple):
    """A saved soft prompt: where it was read, its rows (L, D), and a few values of its base."""

    folder: str
    rows: Tensor
    base: dict[str, list[float]]

    def __str__(self) -> str:
        return f"{self.folder} ({len(self.rows)} words of width {self.rows.shape[1]})"


def read_prompt(folder: str | Path, model: nn.Module | None = None) -> SavedPrompt:
    """The one prompt of an adapter that was saved in its plain form, alone or in a sum.

    Args:
        folder: A folder that `esp.save` or a run wrote, or a hub id.
        model: The base that it must have been trained on.

    Raises:
        CheckpointError: There is no such adapter, it holds no prompt, or it has another base.
    """
    from espalier import identity
    from espalier.checkpoint import open_saved

    opened, card = open_saved(folder)
    labels = [label for label in opened.entries if label.endswith("/prompt")]
    if len(labels) != 1:
        raise CheckpointError(
            f"{opened.path} holds {len(labels) or 'no'} soft prompts; one of prompt tuning, or of "
            "P-tuning made plain by esp.to_plain, can be a source"
        )
    if model is not None:
        identity.check(model, card["base"], opened.path)
    return SavedPrompt(str(folder), opened.tensor(labels[0]).float(), card["base"]["values"])


def prompt_similarity(one: Tensor, other: Tensor, metric: str = "mean") -> float:
    """How alike the tasks of two prompts (L, D) are, between -1 and 1.

    Args:
        one: A prompt's rows.
        other: Another's.
        metric: The cosine of the "mean" rows, or the mean cosine over all pairs of "words".

    Raises:
        SettingError: An unknown metric.
    """
    _check_metric(metric)
    a, b = one.double(), other.double()
    if metric == "mean":
        return F.cosine_similarity(a.mean(0), b.mean(0), dim=0).item()
    return (F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T).mean().item()


def rank_prompts(
    target: str | Path, sources: Sequence[str | Path], metric: str = "mean"
) -> list[tuple[str, float]]:
    """Saved prompts by how alike they are to a target task's own, the most alike first.

    Args:
        target: Folder of a prompt that was trained on the target task for a while (10,000 steps
            in the paper, as were those of the sources).
        sources: Folders of prompts of other tasks.
        metric: As for `prompt_similarity`.

    Returns:
        (folder, similarity) of each source.

    Raises:
        CheckpointError: One cannot be read, or they differ in length or base.
        SettingError: An unknown metric.
    """
    _check_metric(metric)
    aim, *read = alike([read_prompt(target), *map(read_prompt, sources)])
    found = [(source.folder, prompt_similarity(aim.rows, source.rows, metric)) for source in read]
    return sorted(found, key=lambda pair: -pair[1])


def shares(similarities: Sequence[float], top: int = 0) -> list[float]:
    """What each source is worth in a mixture: its share of the similarities of the `top` best.

    0 takes all of them. Below 0 a similarity counts as 0.

    Raises:
        SettingError: None of them is above 0.
    """
    best = sorted(range(len(similarities)), key=lambda i: -similarities[i])[: top or None]
    kept = [max(s, 0.0) if i in best else 0.0 for i, s in enumerate(similarities)]
    if not sum(kept):
        raise SettingError("no source resembles the target: all similarities are 0 or below")
    return [share / sum(kept) for share in kept]


def mixed(folders: Sequence[str], target: str, metric: str, top: int, model: nn.Module) -> Tensor:
    """Rows (L, D) to start from: the one source's, or a mean of several weighted by likeness.

    Raises:
        CheckpointError: One cannot be read, has another base, or they differ in length.
        SettingError: No source resembles the target.
    """
    sources = alike([read_prompt(folder, model) for folder in folders])
    if len(sources) == 1:
        return sources[0].rows
    aim, *sources = alike([read_prompt(target, model), *sources])
    worth = shares([prompt_similarity(aim.rows, s.rows, metric) for s in sources], top)
    return torch.stack([w * s.rows for w, s in zip(worth, sources, strict=True)]).sum(0)


def alike(prompts: list[SavedPrompt]) -> list[SavedPrompt]:
    """The prompts, which have one length and one base. Raises CheckpointError otherwise."""
    first = prompts[0]
    for other in prompts[1:]:
        if other.rows.shape != first.rows.shape:
            raise CheckpointError(f"prompts differ in size: {first}, {other}")
        for name in first.base.keys() & other.base.keys():
            pairs = zip(first.base[name], other.base[name], strict=True)
            scale = max(map(abs, first.base[name]))
            if any(abs(a - b) > _SLACK * scale + 1e-6 for a, b in pairs):
                raise CheckpointError(
                    f"prompts of different bases: {first.folder} and {other.folder} were trained "
                    f"on models that differ in {name}"
                )
    return prompts


def _check_metric(metric: str) -> None:
    if metric not in METRICS:
        raise SettingError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
