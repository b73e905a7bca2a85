"""The docstring data: splits apart, labels not given away, the same rows every time."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path

import pytest

from espalier.data import docstrings
from espalier.data.areas import area_map, area_of
from espalier.data.docstrings import (
    MASK,
    MIN_WORDS,
    docstring_rows,
    masked,
    name_pattern,
    package_names,
    prose,
    shingles,
    tfidf_baseline,
    write_docstrings,
)
from espalier.errors import DataError

Rows = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    return docstring_rows(limit_per_class=40)


def every(rows: Rows) -> list[dict[str, str]]:
    return list(chain.from_iterable(rows.values()))


def test_every_split_has_every_area(rows: Rows) -> None:
    areas = set(area_map().values()) - {""}
    assert len(areas) == 10
    for split in ("train", "validation", "test"):
        assert {row["label"] for row in rows[split]} == areas
    assert len(rows["train"]) > 2 * len(rows["test"]) > 2 * len(rows["validation"])


def test_no_two_splits_share_a_module(rows: Rows) -> None:
    modules = {split: {row["module"] for row in some} for split, some in rows.items()}
    assert not modules["train"] & modules["test"]
    assert not modules["train"] & modules["validation"]
    assert not modules["validation"] & modules["test"]


def test_labels_are_those_of_the_map(rows: Rows) -> None:
    areas = area_map()
    for row in every(rows):
        assert row["label"] == area_of(row["module"], areas)


def test_texts_do_not_name_their_module_or_a_package(rows: Rows) -> None:
    for row in every(rows):
        words = {word.strip("_").lower() for word in re.findall(r"\w+", row["text"])} - {"name"}
        own = {part.strip("_").lower() for part in row["module"].split(".")} - {"name"}
        assert not words & own, row
        assert not words & set(package_names()), row


def test_texts_are_sentences_of_some_length(rows: Rows) -> None:
    for row in every(rows):
        assert MIN_WORDS <= len(row["text"].split()) <= 60
        assert ">>>" not in row["text"]
        assert "\n" not in row["text"]


def test_no_near_repeats(rows: Rows) -> None:
    seen: set[str] = set()
    for row in every(rows):
        runs = shingles(row["text"])
        assert len(runs & seen) <= 0.75 * len(runs)
        seen |= runs


def test_another_seed_deals_the_same_rows_otherwise(rows: Rows) -> None:
    other = docstring_rows(limit_per_class=40, seed=1)
    assert {row["module"] for row in other["test"]} != {row["module"] for row in rows["test"]}
    assert {row["text"] for row in every(other)} == {row["text"] for row in every(rows)}


def test_baseline_is_above_chance(rows: Rows) -> None:
    assert tfidf_baseline(rows) > 0.2


def test_files_are_written(tmp_path: Path, rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "docstring_rows", lambda limit, seed: rows)
    paths = write_docstrings(tmp_path / "new" / "folder")
    assert set(paths) == {"train", "validation", "test"}
    for split, path in paths.items():
        lines = path.read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == rows[split]


def test_too_small_a_limit_is_refused() -> None:
    with pytest.raises(DataError, match="at least 20"):
        docstring_rows(limit_per_class=5)


def test_longest_name_decides_and_parts_can_be_left_out() -> None:
    areas = area_map()
    assert area_of("pandas.core.strings.accessor", areas) == "text processing"
    assert area_of("pandas.core.arrays.boolean", areas) == "data types"
    assert area_of("sklearn.svm._base", areas) == "machine learning"
    assert area_of("sklearn.utils.validation", areas) is None
    assert area_of("jsonschema", areas) is None


@pytest.mark.parametrize(
    ("docstring", "wanted"),
    [
        ("Sum it up.\n\nParameters\n----------\nx : int", "Sum it up."),
        ("Sum it\nup.\n\nArgs:\n    x: A number.", "Sum it up."),
        ("See :class:`~a.B` and ``c``.\n\n>>> 1 + 1\n2", "See a.B and c ."),
        ("Read [the guide](http://x.org/y) first.", "Read the guide first."),
        ('!!! abstract "Usage"\n    [Page](x.md)\n\nPrivate values.', "Private values."),
    ],
)
def test_prose_is_the_description_alone(docstring: str, wanted: str) -> None:
    assert prose(docstring) == wanted


def test_names_are_masked() -> None:
    text = masked("A Socket from asyncio.sleep or NumPy or a sock.", {"socket"}, name_pattern())
    assert text == f"A {MASK} from {MASK} or {MASK} or a sock."
