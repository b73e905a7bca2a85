"""Running the command in this process, and tiny models and data in files for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tiny_runs as tiny
from espalier.commands import main


@dataclass
class Said:
    code: int
    out: str
    err: str


class Command:
    """Calls `espalier` with words and captures what it says."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object) -> Said:
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        out, err = self._capsys.readouterr()
        return Said(code, out, err)

    def fails(self, *words: object, saying: Sequence[str]) -> str:
        """The message of a call that ends with code 2, one clear sentence, no traceback."""
        said = self(*words)
        assert said.code == 2, said
        assert "Traceback" not in said.err
        message = " ".join(said.err.split())
        for part in saying:
            assert part in message, message
        return message


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@dataclass
class World:
    """A folder with a tiny encoder, a tiny decoder, data, and a trained run of each."""

    root: Path
    bert: str
    llama: str
    reviews: Path
    test: Path
    sums: Path
    classifier: Path
    writer: Path

    def train(self, *words: object) -> list[object]:
        """Words of a short training on the reviews."""
        given = ["--model", self.bert, "--train", self.reviews, "--steps", 2, "--threads", 1]
        return ["train", *given, "--batch", 8, "--warmup", 0, *words]


def make_world(root: Path) -> World:
    bert = tiny.save_model(root / "bert", tiny.bert().bert, tiny.tokenizer("bert"))
    llama = tiny.save_model(root / "llama", tiny.llama(), tiny.tokenizer("llama"))
    rows = tiny.reviews(60)
    world = World(
        root,
        bert,
        llama,
        write_rows(root / "reviews.jsonl", rows[:48]),
        write_rows(root / "test.jsonl", rows[48:]),
        write_rows(root / "sums.jsonl", tiny.sums(48)),
        root / "runs" / "classifier",
        root / "runs" / "writer",
    )
    common = ["--steps", 4, "--batch", 8, "--threads", 1, "--quiet", "--warmup", 0]
    classify = ["--model", bert, "--train", world.reviews, "--test", world.test, *common]
    write = ["--model", llama, "--train", world.sums, "--max-new-tokens", 5, *common]
    for words in (
        ["train", *classify, "--rank", 4, "--out", world.classifier],
        ["train", *write, "--rank", 4, "--lr", 0.01, "--out", world.writer],
    ):
        assert main([str(word) for word in words]) == 0
    return world
