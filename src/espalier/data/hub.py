"""Data sets of the `datasets` library: saved folders, and names on the hub."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from espalier.errors import DataError
from espalier.tasks.rows import Row

Parts = tuple[dict[str, list[Row]], dict[str, list[str]]]
"""Rows per split, and label names by column."""

ALIASES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}


def read_saved(folder: Path, split: str) -> Parts:
    """A folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

    Raises:
        DataError: the folder cannot be read as one.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: not a saved data set that can be read: {error}") from error
    splits = found if isinstance(found, DatasetDict) else {split: found}
    return _parts(splits, folder.name)


def read_hub(name: str) -> Parts:
    """A data set by its name on the hub; `name:config` picks a configuration.

    Raises:
        DataError: there is none, or the hub cannot be reached.
    """
    import datasets

    base, _, config = name.partition(":")
    try:
        with _cache_only_if_unreachable():
            found = datasets.load_dataset(base, config or None)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise DataError(
            f"{name}: no such file or folder here, and no data set of that name could be loaded "
            f"from the hub: {_first_line(error)}. Offline, give a local path; a configuration is "
            "picked with a colon (glue:sst2)"
        ) from error
    return _parts(found, base)


@contextmanager
def _cache_only_if_unreachable() -> Iterator[None]:
    """Take the local cache at once where the hub cannot be reached; the client retries for 25 s.

    The library reads its switch at import, so that setting the environment comes too late.
    """
    import datasets.config
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    if not any(before) and not reachable(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def reachable(address: str, seconds: float = 3.0) -> bool:
    """Whether anything answers at `address`, proxies of the environment included."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), None, seconds):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


def _parts(splits: Any, name: str) -> Parts:
    rows: dict[str, list[Row]] = {}
    for key, table in splits.items():
        split = ALIASES.get(str(key), str(key))
        if split in ("train", "validation", "test"):
            rows[split] = list(_rows(table, f"{name}/{key}"))
    if not rows:
        raise DataError(f"{name}: need splits train, validation or test; found {list(splits)}")
    return rows, _label_names(next(iter(splits.values())).features)


def _rows(table: Iterable[dict[str, Any]], where: str) -> Iterable[Row]:
    for number, values in enumerate(table, 1):
        yield Row(values, f"{where}:row {number}")


def _label_names(features: Any) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for column, feature in features.items():
        inner = getattr(feature, "feature", feature)  # a list of class labels
        listed = getattr(inner, "names", None)
        if listed:
            names[column] = list(listed)
    return names
