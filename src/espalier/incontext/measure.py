"""A base model measured with examples in its prompt: a task's metrics, and what it costs."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.data import TaskData, read_task
from espalier.errors import SettingError
from espalier.graft import Graft
from espalier.incontext.choosing import choose
from espalier.incontext.prompts import Asked, Prompts
from espalier.incontext.scoring import likelihoods
from espalier.incontext.settings import InContext
from espalier.modules import unwrap
from espalier.places import CHILD
from espalier.tasks import Guess, Row
from espalier.tasks.metrics import TextLoss
from espalier.training.evaluate import evaluating
from espalier.training.models import limit_of, writing_task

Data = TaskData | str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Cost:
    """What a measurement costs; a mean over queries where it says so.

    Attributes:
        trained: Trained parameters: none.
        prompt_tokens: Tokens of a query's prompt with its examples, on average.
        bare_tokens: The same without examples.
        tokens: All that the model read, with what calibrating asked for.
        flops: Estimated operations of the forward passes for one query, 2 for each parameter and
            token and those of attention.
        flops_ratio: How many times those without examples; nan without `compare`.
        seconds: For all queries.
        seconds_ratio: How many times those without examples; nan without `compare`.
    """

    trained: int
    prompt_tokens: float
    bare_tokens: float
    tokens: int
    flops: float
    flops_ratio: float
    seconds: float
    seconds_ratio: float


@dataclass(frozen=True)
class Shown:
    """What a model makes of a task when it is shown examples.

    Attributes:
        metrics: The task's, as a training run has them: `loss` and accuracy and so on.
        bare: The same without examples; empty without `compare`.
        queries: How many were asked.
        shots: How many examples each had, on average.
        fewer: Queries with fewer examples than asked for, for want of room.
        cut: Queries that lost their beginning, though they had no example at all.
        predictions: What was taken for each query: a label's name, a choice's place, or the loss
            of its answer.
        cost: What it costs.
    """

    metrics: dict[str, float]
    bare: dict[str, float]
    queries: int
    shots: float
    fewer: int
    cut: int
    predictions: tuple[Any, ...]
    cost: Cost


def in_context(
    model: Any,
    tokenizer: Any,
    data: Data,
    how: InContext | None = None,
    *,
    test: Data | None = None,
    limit: int | None = None,
) -> Shown:
    """Measure a model on a task with examples from the training rows in its prompt.

    Classes and choices: the answer whose tokens have the highest mean log-likelihood is taken;
    class words are calibrated first. `loss` is the cross-entropy among these scores. Texts: the
    loss of the answer's tokens and of its end.

    Args:
        model: A decoder or an encoder-decoder that writes words, with or without adapters.
        tokenizer: Its tokenizer.
        data: Rows with a train split and a test (else validation) split, as `esp.fit` takes them.
        how: The settings.
        test: The queries, where `data` does not bring them.
        limit: Queries at most.

    Raises:
        SettingError: A setting is wrong, or model and data do not go together.
        DataError: Data cannot be read.
    """
    how = how or InContext()
    if limit is not None and limit < 1:
        raise SettingError(
            f"in_context(limit={limit!r}): limit must be at least 1, or None for all"
        )
    _check_writes(model)
    read = _read(model, data, test)
    split = next((name for name in ("test", "validation") if read.splits.get(name)), None)
    if split is None or (how.shots and not read.splits.get("train")):
        raise SettingError("in context needs training rows for examples and test rows for queries")
    train, queries = read.splits.get("train", []), read.splits[split][:limit]
    graft = unwrap(model)._modules.get(CHILD)
    most = limit_of(model.config, tokenizer, graft.words if isinstance(graft, Graft) else 0)
    if how.max_length is not None:
        most = min(most or how.max_length, how.max_length)
    prompts = Prompts(read.task, tokenizer, how, bool(model.config.is_encoder_decoder), most)
    with evaluating(model):
        chosen = choose(read.task, train, queries, how)
        full = _measure(model, prompts, queries, chosen)
        bare = full if how.compare and not how.shots else None
        if how.compare and how.shots:
            bare = _measure(model, prompts, queries, [[]] * len(queries))
    return Shown(
        metrics=full.metrics,
        bare=bare.metrics if bare else {},
        queries=len(queries),
        shots=_mean(one.shots for one in full.asked),
        fewer=sum(one.shots < len(some) for one, some in zip(full.asked, chosen, strict=True)),
        cut=sum(one.cut for one in full.asked),
        predictions=full.predictions,
        cost=_cost(model, full, bare, len(queries)),
    )


@dataclass(frozen=True)
class _Measured:
    metrics: dict[str, float]
    predictions: tuple[Any, ...]
    asked: list[Asked]
    sizes: list[int]
    seconds: float


def _check_writes(model: Any) -> None:
    words = getattr(model, "get_output_embeddings", lambda: None)()
    if words is None or (not model.config.is_encoder_decoder and not writing_task(model.config)):
        raise SettingError(
            f"{type(model).__name__} writes no text, so it cannot be shown examples in a prompt; "
            "take a decoder such as demo-decoder, or an encoder-decoder"
        )


def _read(model: Any, data: Data, test: Data | None) -> TaskData:
    if isinstance(data, TaskData):
        if test is not None and not isinstance(test, TaskData):
            raise SettingError("test stands in the splits of data that is read already")
        return data
    sources: dict[str, Any] = {"test": test} if test is not None else {}
    return read_task(data, **sources, prefer=writing_task(model.config))  # type: ignore[arg-type]


def _measure(
    model: Any, prompts: Prompts, queries: Sequence[Row], shots: Sequence[Sequence[Row]]
) -> _Measured:
    """Every query with its examples, scored."""
    start = time.perf_counter()
    asked = [prompts.ask(query, some) for query, some in zip(queries, shots, strict=True)]
    found, sizes = _scored(model, asked, prompts.how.batch)
    task = prompts.task
    if not prompts.ranked:
        losses = [one for (one,) in found]
        metrics = task.score(losses, [one.candidates[0].chars for one in asked])
        predictions = tuple(loss.nats / max(loss.tokens, 1) for loss in losses)
        return _Measured(metrics, predictions, asked, sizes, time.perf_counter() - start)
    scores = [[-one.nats / max(one.tokens, 1) for one in own] for own in found]
    if task.name == "classification" and prompts.how.calibrate:
        blanks = [
            prompts.without_content(query, some[: one.shots])
            for query, some, one in zip(queries, shots, asked, strict=True)
        ]
        prior, more = _scored(model, blanks, prompts.how.batch)
        sizes += more
        scores = [
            [a + b.nats / max(b.tokens, 1) for a, b in zip(own, base, strict=True)]
            for own, base in zip(scores, prior, strict=True)
        ]
    guesses = [_taken(own) for own in scores]
    right = [query.values["label"] for query in queries]
    pairs = zip(scores, right, strict=True)
    loss = _mean(_log_sum(own) - own[at] for own, at in pairs)
    metrics = {"loss": loss, **task.score(guesses, right)}
    predictions = tuple(task.decode(guess) for guess in guesses)
    return _Measured(metrics, predictions, asked, sizes, time.perf_counter() - start)


def _scored(
    model: Any, asked: Sequence[Asked], batch: int
) -> tuple[list[list[TextLoss]], list[int]]:
    """The losses of each query's candidates."""
    flat = [one for query in asked for one in query.candidates]
    losses, sizes = likelihoods(model, flat, batch)
    each = iter(losses)
    return [[next(each) for _ in query.candidates] for query in asked], sizes


def _taken(scores: Sequence[float]) -> Guess:
    """The highest score, and its share of all."""
    best = max(range(len(scores)), key=scores.__getitem__)
    return Guess(best, math.exp(scores[best] - _log_sum(scores)))


def _log_sum(scores: Sequence[float]) -> float:
    top = max(scores)
    return top + math.log(math.fsum(math.exp(score - top) for score in scores))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / max(len(found), 1)


def _cost(model: Any, full: _Measured, bare: _Measured | None, queries: int) -> Cost:
    flops = _flops(model, full.sizes) / queries
    nothing = float("nan")
    return Cost(
        trained=0,
        prompt_tokens=_mean(map(_prompt_tokens, full.asked)),
        bare_tokens=_mean(map(_prompt_tokens, bare.asked)) if bare else nothing,
        tokens=sum(full.sizes),
        flops=flops,
        flops_ratio=flops * queries / _flops(model, bare.sizes) if bare else nothing,
        seconds=full.seconds,
        seconds_ratio=full.seconds / bare.seconds if bare else nothing,
    )


def _prompt_tokens(asked: Asked) -> int:
    """Tokens before the answer."""
    one = asked.candidates[0]
    return len(one.source) if one.source is not None else min(one.scored, default=len(one.ids))


def _flops(model: Any, sizes: Iterable[int]) -> float:
    """2·N·T for the matrices and 2·L·D·T² for causal attention over T tokens."""
    config = model.config.get_text_config()
    layers = getattr(config, "num_hidden_layers", 0) or 0
    width = getattr(config, "hidden_size", 0) or 0
    count = sum(p.numel() for p in model.parameters())
    table, words = model.get_input_embeddings(), model.get_output_embeddings()
    if table.weight is not words.weight:  # looking a word up costs nothing
        count -= table.weight.numel()
    return sum(2.0 * count * size + 2.0 * layers * width * size**2 for size in sizes)


def as_json(shown: Shown) -> dict[str, Any]:
    """A result as JSON data, without its predictions; what is not known is None."""
    data = dataclasses.asdict(shown)
    del data["predictions"]
    data["cost"] = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in data["cost"].items()
    }
    return data
