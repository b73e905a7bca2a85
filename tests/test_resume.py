"""A run killed by SIGKILL and resumed equals a run never killed, bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import espalier as esp
import tiny_runs as tiny
from espalier.errors import CheckpointError, SettingError
from espalier.training import RunConfig, state
from espalier.training.record import TIME_FIELDS

# Steps: 6 an epoch; states after 4, 8, …, and the last. The third save is that of step 12.
MOMENTS = {
    "in the middle of an epoch": "loop.Loop._step, 10",
    "while a state is being written": "state._flush, 3",
    "between a state written and its name": "state.os.replace, 2",
    "after the last step": "finish.keep, 1",
}
KILLED = """
import importlib, os, signal, sys
from espalier.training import RunConfig, train
path, number = sys.argv[1].split(", ")
module, *names, last = path.split(".")
place = importlib.import_module(f"espalier.training.{module}")
for name in names:
    place = getattr(place, name)
inner, calls = getattr(place, last), []
def counted(*given):
    calls.append(1)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return inner(*given)
setattr(place, last, counted)
train(RunConfig.from_yaml(sys.argv[2], {"out": sys.argv[3]}))
"""


def run_killed(moment: str, config: Path, out: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, moment, str(config), str(out)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def settings(folder: Path) -> dict[str, Any]:
    """A run on a model with dropout, shuffled rows, evaluations and a best adapter to keep."""
    model = tiny.bert(dropout=0.1, num_labels=2)
    base = tiny.save_model(folder / "base", model, tiny.tokenizer())
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews(54)))
    return {
        "model": base, "train": str(data), "method": "LoRA(rank=2, dropout=0.1)", "batch": 4,
        "accumulate": 2, "epochs": 3, "lr": 0.01, "save_every": 4, "evaluate_every": 5,
        "head": ["classifier"], "threads": 1, "quiet": True,
    }  # fmt: skip


def lasting(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The config's file, and the folder of a run that nobody killed."""
    folder = tmp_path_factory.mktemp("resume")
    config = RunConfig(**settings(folder), out=folder / "whole")
    (folder / "run.yaml").write_text(config.to_yaml())
    esp.train(config)
    return folder / "run.yaml", folder / "whole"


@pytest.mark.parametrize(
    "moment",
    [m if i < 2 else pytest.param(m, marks=pytest.mark.slow) for i, m in enumerate(MOMENTS)],
)
def test_killed_and_resumed_equals_never_killed(
    whole: tuple[Path, Path], tmp_path: Path, moment: str
) -> None:
    path, reference = whole
    run_killed(MOMENTS[moment], path, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    esp.train(RunConfig.from_yaml(path, {"out": tmp_path / "run", "resume": True}))
    assert lasting(tmp_path / "run") == lasting(reference)
    weights = "adapter/adapter.safetensors"
    assert (tmp_path / "run" / weights).read_bytes() == (reference / weights).read_bytes()
    assert not (tmp_path / "run" / "state").exists()


def test_other_settings_are_refused_by_name(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = whole
    out = tmp_path / "run"
    monkeypatch.setattr("espalier.training.finish.keep", _interrupted)
    with pytest.raises(KeyboardInterrupt):
        esp.train(RunConfig.from_yaml(path, {"out": out}))
    with pytest.raises(SettingError, match=r"(?s)lr: was 0\.01, now 0\.02.*seed: was 0, now 1"):
        esp.train(RunConfig.from_yaml(path, {"out": out, "resume": True, "lr": 0.02, "seed": 1}))
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:50])
    with pytest.raises(CheckpointError, match="fewer than"):
        esp.train(RunConfig.from_yaml(path, {"out": out, "resume": True}))
    tensors = next((out / "state").glob("step-*/tensors.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cannot be read"):
        esp.train(RunConfig.from_yaml(path, {"out": out, "resume": True}))


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"method": "LoRA", "rank": 4, "sites": "ffn.*"}, "  method.rank: was 8, now 4"),
        ({"method": "IA3"}, "  method.method: was 'LoRA', now 'IA3'"),
        ("LoRA(rank=4)", "  method: was {'method': 'LoRA', 'rank': 8, 'sites': 'ffn.*'}, now 'L"),
    ],
)
def test_of_a_changed_recipe_the_message_has_what_differs(now: Any, said: str) -> None:
    both = {"model": "m", "train": "t"}
    lora = {"method": "LoRA", "rank": 8, "sites": "ffn.*"}
    was = RunConfig(**both, method=lora).to_dict()
    with pytest.raises(SettingError) as caught:
        state.refuse_changed(was, RunConfig(**both, method=now))
    (line,) = [line for line in str(caught.value).splitlines() if line.startswith("  ")]
    assert line.startswith(said)
    pile = {**both, "method": [lora, {"method": "IA3"}]}
    other = [{**lora, "sites": "head"}, {"method": "IA3"}]
    with pytest.raises(SettingError, match=r"\n  method 1\.sites: was 'ffn\.\*', now 'head'\n"):
        state.refuse_changed(RunConfig(**pile).to_dict(), RunConfig(**pile | {"method": other}))


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_result_with_other_fields_is_another_versions(
    whole: tuple[Path, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole[1], run)
    kept = json.loads((run / "result.json").read_text())
    del kept["metric"], kept["doubt"]
    (run / "result.json").write_text(json.dumps(kept))
    config = RunConfig.from_yaml(run / "config.yaml", {"out": run, "resume": True})
    with pytest.raises(CheckpointError, match=r"result\.json was written by another version"):
        esp.train(config)
