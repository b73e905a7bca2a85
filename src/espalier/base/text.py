"""Text that the base decoder is built from: source code of Python's own standard library.

Files are read as text, never imported or executed, in sorted order. Whole top-level modules
are held out of pretraining, chosen by SHA-256 of their name, so that figures taken on them
before and after an adaptation are honest: the base has never seen a line of them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from espalier.errors import DataError

HELD_OUT_PERCENT = 15
MAX_FILE_BYTES = 300_000
# Tests, demonstrations, generated tables and files that describe one machine's build.
_SKIPPED = """__pycache__ config encodings idlelib lib-dynload msilib pydoc_data site-packages
test tests turtledemo"""
SKIPPED_FOLDERS = frozenset(_SKIPPED.split())
SKIPPED_FILES = ("_sysconfigdata", "html/entities.py", "stringprep.py", "this.py")


@dataclass(frozen=True)
class Document:
    """One source file: its top-level module, its path below the library's folder, its text."""

    module: str
    path: str
    text: str


def name_bucket(name: str, purpose: str) -> int:
    """Return a number from 0 to 99 that depends on nothing but `name` and `purpose`."""
    digest = hashlib.sha256(f"espalier:{purpose}:{name}".encode()).hexdigest()
    return int(digest[:8], 16) % 100


def is_held_out(module: str) -> bool:
    """Tell whether a top-level standard library module is kept out of pretraining."""
    return name_bucket(module.lstrip("_"), "held-out") < HELD_OUT_PERCENT


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def python_files(root: Path) -> Iterator[Path]:
    """Yield the Python files below `root` in sorted order, without tests and data tables."""
    for path in sorted(root.iterdir(), key=lambda entry: entry.name):
        if path.is_dir():
            if path.name.split("-")[0] not in SKIPPED_FOLDERS and path.name not in SKIPPED_FOLDERS:
                yield from python_files(path)
        elif path.suffix == ".py" and path.stat().st_size <= MAX_FILE_BYTES:
            yield path


def read_source(path: Path) -> str | None:
    """Return a file's text with plain newlines, or None when it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError):
        return None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def source_documents(
    split: Literal["pretrain", "heldout"] = "pretrain", root: Path | None = None
) -> list[Document]:
    """Read the standard library's source code, one document per file, without repeats.

    Args:
        split: `pretrain` for the modules the base learns from, `heldout` for all others.
        root: Folder to read in place of the running interpreter's standard library.

    Raises:
        DataError: If the folder has no readable Python file of that split.
    """
    folder = root or stdlib_folder()
    if not folder.is_dir():
        raise DataError(f"no standard library source at {folder}")
    documents: list[Document] = []
    seen: set[str] = set()
    for path in python_files(folder):
        relative = path.relative_to(folder).as_posix()
        module = relative.split("/")[0].removesuffix(".py")
        if relative.startswith(SKIPPED_FILES) or is_held_out(module) != (split == "heldout"):
            continue
        text = read_source(path)
        if text and text.strip() and text not in seen:
            seen.add(text)
            documents.append(Document(module, relative, text))
    if not documents:
        raise DataError(f"no {split} source files below {folder}")
    return documents
