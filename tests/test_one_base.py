"""The example of three tasks on one base: mails fair to test with, and the right answers."""

from __future__ import annotations

import importlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import espalier as esp
from espalier.generation import open_adapter, predict
from espalier.tasks import Row

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("one_base_three_tasks")


def test_mails_are_the_same_for_the_same_seed(example: Any) -> None:
    assert example.mails("train", 30, 1) == example.mails("train", 30, 1)
    assert example.mails("train", 30, 1) != example.mails("train", 30, 2)


def test_no_phrase_is_in_two_splits_and_none_is_lost(example: Any) -> None:
    made = importlib.import_module("customer_mails")
    phrases = made.phrases
    lists = [*phrases.SENTENCES.values(), *phrases.CUES.values(), phrases.PROBLEMS, phrases.ORDERS]
    for some in lists:
        parts = [set(made.Writer(split, 0).own(some)) for split in phrases.SHARES]
        assert all(parts)
        assert all(not a & b for a, b in itertools.combinations(parts, 2))
        assert set.union(*parts) == set(some)


def test_tags_mark_order_numbers_and_problems(example: Any) -> None:
    for row in example.mails("test", 200):
        named = example.passages(row["tokens"], row["tags"])
        assert row["text"].split() == row["tokens"]
        assert len(row["tags"]) == len(row["tokens"])
        for passage in named.split("; ") if named != "nothing named" else ():
            what, words = passage.split(" ", 1)
            assert any(c.isdigit() for c in words) == (what == "order")
            assert len(words.split()) <= (2 if what == "order" else 9)


def test_one_base_answers_as_each_run_does_by_itself(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"train": example.mails("train", 24), "test": example.mails("test", 8)}
    example.learn(tmp_path, rows, epochs=2)
    example.table(tmp_path, rows)
    base = example.OneBase()
    before = {name: p.clone() for name, p in base.bert.state_dict().items()}
    at = {name: example.take(base, tmp_path / name) for name in example.TASKS}
    for name in (*example.TASKS, *reversed(example.TASKS)):
        alone = open_adapter(tmp_path / name, precision="fp32")  # as the base here
        read = [alone.task.read(Row(row, "mail"), labelled=False) for row in rows["test"]]
        wanted = [found["prediction"] for found in predict(alone, read)]
        assert example.answers(at[name], rows["test"]) == wanted
    for name in example.TASKS:
        esp.detach(base, name)
    after = base.bert.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    kept = sum(example.size(tmp_path / name / "adapter") for name in example.TASKS)
    assert f"{kept / 1e6:.1f} MB of adapters" in capsys.readouterr().out
    assert json.loads((tmp_path / "details/adapter/adapter.json").read_text())["head"]
