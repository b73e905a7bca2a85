"""Which training rows are shown before a query: by seed and class, or by likeness to the query."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import zip_longest

from espalier.incontext.settings import InContext
from espalier.tasks import Row, Task

_AT_ONCE = 512  # queries compared with all training rows at a time


def choose(
    task: Task, train: Sequence[Row], queries: Sequence[Row], how: InContext
) -> list[list[Row]]:
    """For each query its examples, the most important first; never a row with its own text."""
    unique = list({task.key(row): row for row in reversed(train)}.values())[::-1]
    if how.shots == 0:
        return [[] for _ in queries]
    if how.choose == "similar":
        return _nearest(task, unique, queries, how.shots)
    random.Random(how.seed).shuffle(unique)
    order, known = _in_turn(task, unique), {task.key(row) for row in unique}
    return [
        _in_turn(task, _without(task, unique, query, len(unique)))[: how.shots]
        if task.key(query) in known
        else order[: how.shots]
        for query in queries
    ]


def _in_turn(task: Task, rows: Sequence[Row]) -> list[Row]:
    """One row of each class in turn, where the task has classes."""
    classes: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        classes.setdefault(tuple(task.classes(row)), []).append(row)
    return [row for turn in zip_longest(*classes.values()) for row in turn if row is not None]


def _without(task: Task, order: Sequence[Row], query: Row, count: int) -> list[Row]:
    own = task.key(query)
    found: list[Row] = []
    for row in order:
        if len(found) == count:
            break
        if task.key(row) != own:
            found.append(row)
    return found


def _nearest(
    task: Task, rows: Sequence[Row], queries: Sequence[Row], count: int
) -> list[list[Row]]:
    """The rows of highest cosine to each query, the nearest first; ties in the order of rows."""
    import numpy as np
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Every character that is no space belongs to a term, so that no text is without any.
    vectors = TfidfVectorizer(token_pattern=r"(?u)\w+|[^\w\s]")
    known = vectors.fit_transform([task.key(row) for row in rows])
    found: list[list[Row]] = []
    for at in range(0, len(queries), _AT_ONCE):
        some = queries[at : at + _AT_ONCE]
        asked = vectors.transform([task.key(query) for query in some])
        likeness = np.asarray((asked @ known.T).todense())
        for query, scores in zip(some, likeness, strict=True):
            order = np.argsort(-scores, kind="stable")[: count + 1]  # one may be its own text
            found.append(_without(task, [rows[i] for i in order], query, count))
    return found
