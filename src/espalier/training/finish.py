"""The end of a run: the kept adapter measured, saved, loaded again to compare, and described."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier.checkpoint import load, open_saved, save
from espalier.container import write_text
from espalier.errors import CheckpointError
from espalier.graft import get
from espalier.modules import is_sharded
from espalier.recipes import Recipe
from espalier.training import plot
from espalier.training.card import card_text
from espalier.training.evaluate import evaluating, inputs
from espalier.training.folders import AS_TRAINED
from espalier.training.job import Job
from espalier.training.loop import Loop
from espalier.training.prepare import Material
from espalier.verbs import activate, detach, has_plain, to_plain

Metrics = dict[str, dict[str, float]]
WRITTEN = 200  # rows at most that answers are generated for


def settle(
    model: nn.Module, name: str, folder: Path | None, extras: Mapping[str, Any] | None = None
) -> bool:
    """Turn an adapter into the plain form that serves; the form that trained is kept in `folder`.

    False where it is plain already.
    """
    if not has_plain(model, name):
        return False
    if folder is not None:
        save(model, name, folder / AS_TRAINED, extras=extras)
    return to_plain(model, name)


def measure(at: Material, loop: Loop) -> tuple[Metrics, str | None]:
    """Metrics by split of the adapter that is kept, and what makes them doubtful."""
    lines = [line for line in loop.job.record.lines if line["kind"] == "train"]
    recent = [line["loss"] for line in lines[-loop.per_epoch :]]
    step, (validation, doubt) = loop.kept
    metrics = {"train": {"loss": sum(recent) / max(1, len(recent))}}
    if validation:
        metrics["validation"] = dict(validation)
    if "test" in at.encoded.examples:
        metrics["test"], doubt = loop.evaluate(at.encoded.examples["test"])
        loop.job.record.add("test", step=step, **metrics["test"])
    if at.config.generate:
        split = next(s for s in ("test", "validation", "train") if s in at.data.splits)
        written = _write(at, split)
        loop.job.record.add("generation", step=step, **written)
        metrics[split] = metrics.get(split, {}) | written
    return metrics, doubt


def _write(at: Material, split: str) -> dict[str, float]:
    """exact_match, bleu and rouge_l of greedy answers to rows of a split."""
    from espalier.generation import Adapted, Writing, write
    from espalier.tasks.metrics import generation_scores

    rows, config = at.data.splits[split][:WRITTEN], at.config
    card = {"extras": {"max_length": config.max_length}}
    adapted = Adapted(at.out.folder or Path(), at.model, at.tokenizer, at.data.task, card)
    how, batch = Writing(max_new_tokens=config.max_new_tokens), config.batch_in_evaluation
    answers = write(adapted, [row.values for row in rows], how, batch, config.seed)
    return generation_scores(answers, [at.data.task.answer(row) for row in rows])


def keep(
    at: Material,
    loop: Loop,
    name: str,
    parts: Recipe,
    metrics: Metrics,
    counted: Mapping[str, Any],
) -> None:
    """Fill the run folder: adapter (checked by loading it), model card, picture.

    Raises:
        CheckpointError: something cannot be written, or what was saved gives other outputs.
    """
    assert at.out.folder is not None
    folder, task, config = at.out.folder, at.data.task, at.config
    extras = {**task.extras(at.tokenizer), "max_length": config.max_length}
    extras["precision"] = at.precision
    if task.writes:
        extras["generation"] = {"max_new_tokens": config.max_new_tokens, "do_sample": False}
    save(at.model, name, folder / "adapter", extras=extras)
    sharded = is_sharded(at.model)
    note = _check_numbers(at, name) if sharded else _check_reload(at, loop.job, name)
    if note:
        at.out.screen.say(note)
    card = card_text(config, parts, task, at.data.splits, metrics, counted, folder)
    write_text(folder / "README.md", card)
    if plot.available():
        plot.draw(loop.job.record.lines, task.best[0], folder / "loss.png")
        plot.draw_places(loop.job.record.lines, folder)
    else:
        at.out.screen.say("No loss.png: matplotlib is missing; pip install 'espalier[report]'.")


def _check_numbers(at: Material, name: str) -> None:
    """Compare what was saved with what was trained, where a pass takes all processes."""
    assert at.out.folder is not None
    saved, _ = open_saved(at.out.folder / "adapter")
    if not all(torch.equal(saved.tensor(k), v.cpu()) for k, v in get(at.model, name).named()):
        raise CheckpointError(
            f"The adapter saved in {at.out.folder / 'adapter'} has other numbers than the one just "
            "trained. Please report this with the run's config.yaml."
        )


def _check_reload(at: Material, job: Job, name: str) -> str | None:
    """Load what was saved beside the adapter and compare outputs bit for bit."""
    assert at.out.folder is not None
    task, other = at.data.task, f"{name} (reloaded)"
    split = "validation" if at.encoded.examples.get("validation") else "train"
    examples = at.encoded.examples[split][: min(8, at.config.rows)]
    batch = job.collate(examples)

    def outputs(choice: str | None) -> Tensor:
        activate(at.model, choice)
        return at.model(**inputs(task, batch, at.device, at.model.dtype)).logits

    with evaluating(at.model), job.apart(examples):
        trained = outputs(name)
        load(at.model, at.out.folder / "adapter", name=other)
        same = torch.equal(trained, outputs(other))
        detach(at.model, other)
        idle = torch.equal(trained, outputs(None))
        activate(at.model, name)
    if not same:
        raise CheckpointError(
            f"The adapter saved in {at.out.folder / 'adapter'} gives other outputs than the one "
            "just trained. Please report this with the run's config.yaml."
        )
    return "The adapter changes no output of the base: it has learned nothing." if idle else None
