"""The intrinsic dimension of a task: the sweep, its files, going on, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import espalier as esp
import tiny_runs as tiny
from command_line import Command, write_rows
from espalier.errors import SettingError
from espalier.training.dimension import Sweep, Trial


@pytest.fixture
def espalier(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def given(folder: Path, family: str = "bert") -> dict[str, Any]:
    """A tiny model and data, and the settings of short runs."""
    encoder = family == "bert"
    model = tiny.bert().bert if encoder else tiny.llama()
    rows = tiny.reviews(40) if encoder else tiny.sums(40)
    return {
        "model": tiny.save_model(folder / "model", model, tiny.tokenizer(family)),
        "train": str(write_rows(folder / "rows.jsonl", rows[:30])),
        "validation": str(write_rows(folder / "held.jsonl", rows[30:])),
        "steps": 6,
        "batch": 8,
        "threads": 1,
        "warmup": 0,
    }


def score(folder: Path, metric: str) -> float:
    """The validation score that a run noted."""
    return json.loads((folder / "result.json").read_text())["metrics"]["validation"][metric]


def test_a_sweep_is_written_and_goes_on_where_it_was(tmp_path: Path, espalier: Command) -> None:
    settings, out = given(tmp_path), tmp_path / "sweep"
    words = [w for key, value in settings.items() for w in (f"--{key}", value)]
    command = ["dimension", *words, "--out", out, "--quiet", "--full-lr", 0.01]
    said = espalier(*command, "--dimensions", "200,60", "--every")
    assert said.code == 0, said
    full = score(out / "full", "accuracy")
    found = json.loads((out / "dimension.json").read_text())
    assert found["full"] == full
    assert found["target"] == pytest.approx(0.9 * full)
    trials = [(t["dimension"], t["score"]) for t in found["trials"]]
    assert trials == [(n, score(out / f"d{n}", "accuracy")) for n in (60, 200)]
    reached = [n for n, value in trials if value >= 0.9 * full]
    assert found["found"] == min(reached, default=None)
    card = esp.read_card(out / "d60")
    assert card["recipe"][0]["dimension"] == 60
    assert card["trained"] == 60 + 32 * 2 + 2
    assert "full tuning" in (out / "dimension.md").read_text()
    assert "full tuning" in said.out
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    said = espalier(*command, "--dimensions", "60,200,90", "--every")
    assert said.code == 0, said
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    trials = json.loads((out / "dimension.json").read_text())["trials"]
    assert [trial["dimension"] for trial in trials] == [60, 90, 200]
    espalier.fails(*command, "--batch", 4, saying=["batch 8, not 4", "overwrite"])
    espalier.fails(*command, "--dimensions", "60,x", saying=["whole numbers"])


def test_a_loss_is_to_come_below_its_target_and_then_it_stops(tmp_path: Path) -> None:
    from espalier.training.dimension import intrinsic_dimension

    config = esp.RunConfig(**given(tmp_path, "llama"), out=tmp_path / "sweep", quiet=True)
    sweep = intrinsic_dimension(config, [50, 100], full_score=1e3, share=0.5)
    assert (sweep.metric, sweep.goal, sweep.target) == ("loss", "min", 2e3)
    assert sweep.found == 50
    assert [trial.dimension for trial in sweep.trials] == [50]
    assert not (tmp_path / "sweep" / "full").exists()
    with pytest.raises(SettingError, match="take a dimension above"):
        intrinsic_dimension(config.replace(out=tmp_path / "small"), [5], full_score=1.0)


def test_what_was_found_reads_as_what_it_is() -> None:
    trials = (Trial(500, 0.7, 1.0), Trial(1000, 0.85, 1.0))
    some = Sweep("accuracy", "max", 0.9, 0.9, 0.81, trials, 1000)
    assert "above 500, at most 1,000" in str(some)
    none = Sweep("accuracy", "max", 0.9, 0.99, 0.891, trials, None)
    assert "no dimension up to 1,000" in str(none)
    first = Sweep("accuracy", "max", 0.9, 0.9, 0.5, trials, 500)
    assert "≤ 500" in str(first)


def test_what_cannot_be_swept_is_said(tmp_path: Path) -> None:
    from espalier.training.dimension import intrinsic_dimension

    config = esp.RunConfig(model="m", train="t", out=tmp_path)
    for wrong in ([], [0]):
        with pytest.raises(SettingError, match="dimensions"):
            intrinsic_dimension(config, wrong)
    with pytest.raises(SettingError, match="share"):
        intrinsic_dimension(config, share=1.5)
    with pytest.raises(SettingError, match="validation data"):
        intrinsic_dimension(config.replace(validation_share=0.0))
    with pytest.raises(SettingError, match="score is 0, of which there is no share"):
        intrinsic_dimension(config.replace(validation="v"), full_score=0.0)
