"""Every error a person can cause, as one tree.

    EspalierError
    ├── SettingError     a wrong value or unknown key in a method, a recipe or a run's settings
    ├── SiteError        a selector that matches nothing, or a place a method cannot stand on
    ├── AdapterError     an unknown, doubled, conflicting or merged adapter
    ├── CheckpointError  a file that is missing, broken, foreign, or made for another base
    ├── DataError        rows or columns that cannot be used, with file and line
    └── TrainingError    a run that cannot go on: non-finite loss, no gradient, no memory

Catch `EspalierError` to catch them all; the command prints its message and exits with code 2.
Each message says what was asked, what was found, and what would work.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EspalierError(Exception):
    """Something a person asked for cannot be done; the message says why and what would work."""


class SettingError(EspalierError, ValueError):
    """A setting has a wrong value or an unknown name."""


class SiteError(EspalierError, LookupError):
    """No such place in this model, or a method cannot stand there."""


class AdapterError(EspalierError, RuntimeError):
    """An adapter is unknown, already there, or in a state that forbids the call."""


class CheckpointError(EspalierError, OSError):
    """A file or folder cannot be read or written as an adapter, model or run."""


class DataError(EspalierError, ValueError):
    """Data that cannot be used; names the file and line."""


class TrainingError(EspalierError, RuntimeError):
    """A training run that cannot start or go on."""


def nearest(word: str, known: Iterable[str], count: int = 3) -> str:
    """A phrase naming the known words nearest to `word`, for the end of an error message."""
    words = sorted(set(known))
    lower = {w.lower(): w for w in words}
    close = [lower[m] for m in difflib.get_close_matches(word.lower(), lower, n=count, cutoff=0.5)]
    if close:
        return "did you mean " + " or ".join(repr(w) for w in close) + "?"
    return "known: " + ", ".join(words) if words else "none are known"
