"""From whatever a person points at to raw rows per split: local paths first, then the hub.

A source is a file, a folder with train/validation/test files (and perhaps labels.json), a
folder saved by `datasets`, the name of a data set on the hub, a list of dicts, or such lists by
split.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from espalier.data.formats import READERS, as_row, decoded, read_file
from espalier.errors import DataError, nearest
from espalier.tasks.rows import Row

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test",),
}
Listed = Iterable[Mapping[str, Any]]
Source = str | Path | Listed | Mapping[str, Listed]


@dataclass
class Raw:
    """Raw rows per split, and label names where the source states them, by column ("": any)."""

    splits: dict[str, list[Row]] = field(default_factory=dict)
    label_names: dict[str, list[str]] = field(default_factory=dict)


def read_source(source: Source, documents: str = "file", split: str = "train") -> Raw:
    """Read a source; what has no splits of its own becomes `split`.

    Raises:
        DataError: there is no such thing, or it cannot be read.
    """
    if isinstance(source, Mapping):
        return Raw({str(name): _listed(rows, str(name)) for name, rows in source.items()})
    if not isinstance(source, str | Path):
        return Raw({split: _listed(source, split)})
    path = Path(source).expanduser()
    if path.is_file():
        return Raw({split: read_file(path, documents)}, label_file(path.parent))
    if path.is_dir():
        return _read_folder(path, documents, split)
    if _looks_local(str(source)):
        raise DataError(f"{source}: no such file or folder{_neighbours(path)}")
    from espalier.data.hub import read_hub

    return Raw(*read_hub(str(source)))


def _listed(items: Listed, split: str) -> list[Row]:
    rows = [as_row(item, f"{split}:row {i}") for i, item in enumerate(items, 1)]
    if not rows:
        raise DataError(f"the list of {split} rows is empty")
    return rows


def _looks_local(name: str) -> bool:
    return (
        Path(name).suffix.lower() in READERS
        or name.startswith((".", "~", "/"))
        or name.count("/") > 1
        or name.endswith("/")
        or (len(name) > 1 and name[1] == ":")
    )


def _neighbours(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" (nor is there a folder {folder})"
    names = [p.name for p in folder.iterdir() if p.is_dir() or p.suffix.lower() in READERS]
    return f" ({nearest(path.name, names)})" if 0 < len(names) <= 200 else ""


def _read_folder(folder: Path, documents: str, split: str) -> Raw:
    if (folder / "dataset_dict.json").exists() or (folder / "dataset_info.json").exists():
        from espalier.data.hub import read_saved

        return Raw(*read_saved(folder, split))
    files = sorted(p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in READERS)
    files = [p for p in files if p.name != "labels.json"]
    raw = Raw(label_names=label_file(folder))
    for name, words in SPLITS.items():
        pattern = re.compile(rf"({'|'.join(words)})([-_.].*)?", re.IGNORECASE)
        parts = [p for p in files if pattern.fullmatch(p.stem)]
        if parts:
            raw.splits[name] = [row for p in parts for row in read_file(p, documents)]
    if not raw.splits and len(files) == 1:
        raw.splits[split] = read_file(files[0], documents)
    if not raw.splits:
        found = ", ".join(p.name for p in files) or "no data file"
        raise DataError(
            f"{folder}: need files named train, validation, test with one of "
            f"{', '.join(READERS)}; found {found}"
        )
    return raw


def label_file(folder: Path) -> dict[str, list[str]]:
    """Label names from `labels.json` in a folder: a list, or lists by column.

    Raises:
        DataError: the file is there but is neither.
    """
    path = folder / "labels.json"
    if not path.is_file():
        return {}
    try:
        value = json.loads(decoded(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    by_column = value if isinstance(value, dict) else {"": value}
    lists = {str(k): v for k, v in by_column.items() if isinstance(v, list) and v}
    bad = [k for k, v in lists.items() if not all(isinstance(name, str) for name in v)]
    if bad or not lists:
        raise DataError(f'{path}: need a list of label names such as ["no", "yes"]')
    return lists
