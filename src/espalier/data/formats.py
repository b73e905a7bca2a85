"""One reader per file format; rows keep the file's name and their line.

Text is UTF-8 (with or without a byte-order mark). Formats whose rows have no lines of their own
(json, parquet) count rows instead.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from espalier.errors import DataError
from espalier.tasks.rows import Row, kind
from espalier.wording import setting

csv.field_size_limit(2**31 - 1)


def read_file(path: Path, documents: str = "file") -> list[Row]:
    """The rows of one file, by its suffix.

    Args:
        path: a .jsonl, .json, .csv, .tsv, .parquet or .txt file.
        documents: for .txt, "file" (the file is one text) or "paragraphs" (blank lines part
            texts that have nothing to do with each other).

    Raises:
        DataError: unknown suffix, unreadable, broken or empty file; names file and line.
    """
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{path}: files ending in {suffix or 'nothing'!r} are not understood; "
            f"known: {', '.join(READERS)}"
        )
    try:
        rows = list(
            read_text(path, documents) if suffix in (".txt", ".text") else READERS[suffix](path)
        )
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    if not rows:
        raise DataError(f"{path}: the file holds no rows ({path.stat().st_size} bytes)")
    return rows


def decoded(path: Path) -> str:
    """The file's text.

    Raises:
        DataError: it is not UTF-8; names the line and the byte.
    """
    raw = path.read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: not UTF-8 (byte 0x{raw[error.start]:02x}); save the file as UTF-8, "
            f"for instance: iconv -f latin1 -t utf-8 {path.name} > new{path.suffix}"
        ) from None


def read_jsonl(path: Path) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    # Not splitlines: JSON text may hold U+2028 and its kin unescaped.
    for number, line in enumerate(decoded(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path}:{number}: broken JSON: {error.msg} at column {error.colno}: "
                f"{line[:60].strip()!r}"
            ) from None
        yield as_row(value, where)


def as_row(value: Any, where: str) -> Row:
    """A row from a JSON object.

    Raises:
        DataError: it is not an object.
    """
    if not isinstance(value, dict):
        raise DataError(f'{where}: a row is an object such as {{"text": ...}}, not {kind(value)}')
    return Row(value, where)


def read_json(path: Path) -> Iterator[Row]:
    """A JSON list of objects, or an object that holds one such list."""
    text = decoded(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # in truth one object a line
            yield from read_jsonl(path)
            return
        raise DataError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    if isinstance(value, dict):
        lists = {key: v for key, v in value.items() if isinstance(v, list)}
        if len(lists) != 1:
            raise DataError(
                f"{path}: need a list of objects, or an object with one such list; found an "
                f"object with {', '.join(map(repr, value)) or 'nothing'}"
            )
        (value,) = lists.values()
    if not isinstance(value, list):
        raise DataError(f"{path}: need a list of objects, found {kind(value)}")
    for number, item in enumerate(value, 1):
        yield as_row(item, f"{path.name}:row {number}")


def read_csv(path: Path) -> Iterator[Row]:
    """Comma, semicolon or tab separated values under a header line."""
    text = decoded(path)
    header = text.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for cells in reader:
            where, line = f"{path.name}:{line}", reader.line_num + 1
            if not cells:
                continue
            if names is None:
                names = _header(cells, path)
                continue
            if len(cells) != len(names):
                raise DataError(
                    f"{where}: {len(cells)} fields, but the header has {len(names)} "
                    f"({', '.join(names)}); quote fields that hold {delimiter!r} or line breaks"
                )
            yield Row(dict(zip(names, cells, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: broken {path.suffix[1:]}: {error}") from None


def _header(cells: list[str], path: Path) -> list[str]:
    names = [cell.strip() for cell in cells]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{path}:1: the header names {', '.join(map(repr, doubled))} twice")
    return names


def read_parquet(path: Path) -> Iterator[Row]:
    """The rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a parquet file that can be read: {error}") from None
    for number, values in enumerate(table.to_pylist(), 1):
        yield Row(values, f"{path.name}:row {number}")


def read_text(path: Path, documents: str = "file") -> Iterator[Row]:
    """Paragraphs of plain text with the blank lines after them, so that none of it is lost."""
    if documents not in ("file", "paragraphs"):
        raise DataError(f"{setting('documents', documents)}: must be 'file' or 'paragraphs'")
    text = decoded(path)
    line = 1
    parts = [part for part in re.split(r"(?<=\n)(?=[^\s])(?<=\n\n)", text) if part.strip()]
    for i, part in enumerate(parts):
        where = f"{path.name}:{line}"
        line += part.count("\n")
        if documents == "paragraphs":
            yield Row({"text": part.strip("\n")}, where)
        else:
            yield Row({"text": part, "continues": i < len(parts) - 1}, where)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
    ".text": read_text,
}
