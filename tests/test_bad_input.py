"""What a person can get wrong: one clear sentence, exit code 2, no traceback."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

import espalier as esp
import tiny_runs as tiny
from command_line import Command, World, make_world, write_rows
from espalier.commands.flags import mapping
from espalier.data import read_task
from espalier.errors import DataError, SettingError
from espalier.training import RunConfig
from espalier.wording import setting, typed


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def espalier(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def moved_adapter(world: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world.classifier / "adapter", tmp_path / "adapter"))


# ------------------------------------------------------------------------------------------- data


def test_wrong_column(world: World, espalier: Command) -> None:
    words = world.train("--columns", "text=review,label=label")
    espalier.fails(*words, saying=["'review'", "text, label"])


def test_settings_are_flags_where_they_are_typed_and_arguments_in_python(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a", "my grade": "x"}])
    espalier.fails("data", "check", data, saying=["--task causal", "--columns 'label=my grade'"])
    with pytest.raises(DataError, match=r"task='causal'.*columns=\{'label': 'my grade'\}"):
        read_task(str(data))
    espalier.fails(*world.train("--batch", 0), saying=["Error: --batch must be at least 1"])
    with pytest.raises(SettingError, match=r"^batch must be at least 1"):
        RunConfig(model="m", train="t", batch=0)
    full = ["--out", world.classifier]
    espalier.fails(*world.train(*full), saying=["another --out", "(--resume)", "(--overwrite)"])
    with pytest.raises(SettingError, match=r"another out, .*\(resume=True\)"):
        esp.fit(tiny.bert(), tiny.tokenizer(), tiny.reviews(), out=world.classifier, quiet=True)


@pytest.mark.parametrize(
    "columns",
    [
        {"text": "my text", "label": "it's"},
        {"text": "a,b"},
        {"a=b": "c", "d": " e "},
        {"text": "{"},
    ],
)
def test_columns_are_said_as_the_command_reads_them(columns: dict[str, str]) -> None:
    with typed():
        flag, text = shlex.split(setting("columns", columns))
    assert (flag, mapping(text)) == ("--columns", columns)


def test_columns_that_cannot_be_read(world: World, espalier: Command) -> None:
    espalier.fails(*world.train("--columns", "text"), saying=["text=review,label=stars"])


def test_empty_file(world: World, tmp_path: Path, espalier: Command) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    espalier.fails(*world.train("--train", empty), saying=["empty.jsonl", "empty"])


def test_missing_file_names_its_neighbour(world: World, espalier: Command) -> None:
    words = world.train("--train", world.root / "review.jsonl")
    espalier.fails(*words, saying=["review.jsonl", "reviews.jsonl"])


def test_one_broken_line_in_ten_thousand(world: World, tmp_path: Path, espalier: Command) -> None:
    lines = [json.dumps(row) for row in tiny.reviews(10_000)]
    lines[7_776] = lines[7_776][:-3]
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(lines), encoding="utf-8")
    espalier.fails(*world.train("--train", broken), saying=["broken.jsonl:7777"])


def test_label_unseen_in_training(world: World, tmp_path: Path, espalier: Command) -> None:
    rows = [*tiny.reviews(6), {"text": "a dull day", "label": "awful"}]
    test = write_rows(tmp_path / "test.jsonl", rows)
    message = espalier.fails(*world.train("--test", test), saying=["test.jsonl:7", "'awful'"])
    assert "good" in message
    espalier.fails("eval", world.classifier, "--data", test, saying=["test.jsonl:7", "'awful'"])


# ---------------------------------------------------------------------------------------- settings


def test_selector_that_matches_nothing(world: World, espalier: Command) -> None:
    words = world.train("--sites", "attention.query")
    espalier.fails(*words, saying=["attention.query", "attention.q"])


def test_a_refused_run_leaves_its_folder_free(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    out = tmp_path / "second-try"
    espalier.fails(*world.train("--sites", "cross.q", "--out", out), saying=["cross.q"])
    assert not out.exists()


def test_a_run_that_has_not_ended_says_how_to_go_on(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    run = Path(shutil.copytree(world.classifier, tmp_path / "stopped"))
    shutil.rmtree(run / "adapter")
    espalier.fails("predict", run, "a dull day", saying=["has not ended", "--resume"])


def test_a_misspelled_shipped_model(world: World, espalier: Command) -> None:
    words = world.train("--model", "demo-encodr")
    espalier.fails(*words, saying=["did you mean 'demo-encoder'"])


def test_rank_of_zero(world: World, espalier: Command) -> None:
    espalier.fails(*world.train("--rank", 0), saying=["rank=0", "at least 1"])
    espalier.fails(*world.train("--rank", "eight"), saying=["rank='eight'", "at least 1"])


def test_unknown_method(world: World, espalier: Command) -> None:
    espalier.fails(*world.train("--method", "lroa"), saying=["'lroa'", "LoRA"])


def test_unknown_key_in_the_config_file(world: World, tmp_path: Path, espalier: Command) -> None:
    config = tmp_path / "run.yaml"
    settings: dict[str, Any] = {"model": world.bert, "train": str(world.reviews), "epohcs": 2}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    espalier.fails("train", "--config", config, saying=["'epohcs'", "epochs"])


def test_key_of_another_tool_in_the_config_file(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    config = tmp_path / "run.yaml"
    settings: dict[str, Any] = {"base_model": world.bert, "train": "x", "num_epochs": 2}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    espalier.fails("train", "--config", config, saying=["write model", "write epochs"])


def test_alias_of_another_tool_as_a_flag(world: World, espalier: Command) -> None:
    espalier.fails(*world.train("--gradient_accumulation_steps", 2), saying=["--accumulate"])


def test_value_of_the_wrong_kind(world: World, espalier: Command) -> None:
    espalier.fails(*world.train("--batch", "many"), saying=["batch", "many"])
    espalier.fails(*world.train("--schedule", "linaer"), saying=["schedule", "linear"])


def test_a_word_too_many(world: World, espalier: Command) -> None:
    espalier.fails(*world.train("extra"), saying=["'extra'"])


def test_missing_settings(espalier: Command) -> None:
    espalier.fails("train", saying=["model is missing", "train is missing"])


# ---------------------------------------------------------------------------------------- adapters


def test_adapter_for_another_base(world: World, tmp_path: Path, espalier: Command) -> None:
    other = tiny.bert().bert
    for parameter in other.parameters():
        parameter.data.mul_(1.5).add_(0.1)
    folder = tiny.save_model(tmp_path / "other", other, tiny.tokenizer("bert"))
    words = ["eval", world.classifier, "--data", world.test, "--model", folder]
    espalier.fails(*words, saying=["another base"])


def test_base_that_has_moved(world: World, tmp_path: Path, espalier: Command) -> None:
    adapter = moved_adapter(world, tmp_path)
    words = ["predict", adapter, "a good film", "--model", tmp_path / "gone"]
    espalier.fails(*words, saying=["gone"])


def test_truncated_safetensors(world: World, tmp_path: Path, espalier: Command) -> None:
    adapter = moved_adapter(world, tmp_path)
    weights = adapter / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    espalier.fails("predict", adapter, "a good film", saying=["adapter.safetensors"])


def test_pickle_given_as_adapter(tmp_path: Path, espalier: Command) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": 1}))
    message = espalier.fails("predict", folder, "a good film", saying=["adapter_model.bin"])
    assert "pickle" in message


def test_pickle_that_calls_itself_safetensors(tmp_path: Path, espalier: Command) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "adapter.safetensors").write_bytes(pickle.dumps({"a": list(range(100))}))
    espalier.fails("predict", folder, "a good film", saying=["adapter.safetensors"])


def test_nothing_there(world: World, espalier: Command) -> None:
    espalier.fails("eval", "runs/nowhere", "--data", world.test, saying=["runs/nowhere"])


# ------------------------------------------------------------------------------------------- disks


def test_folder_that_cannot_be_written(world: World, tmp_path: Path, espalier: Command) -> None:
    (tmp_path / "file").touch()
    inside = tmp_path / "file" / "run"
    espalier.fails(*world.train("--out", inside), saying=[str(inside)])
    data = ["--data", world.test, "--out", inside / "p.jsonl"]
    espalier.fails("predict", world.classifier, *data, saying=[str(inside)])
    espalier.fails("merge", world.classifier, "--out", inside, saying=[str(tmp_path / "file")])


def test_folder_that_is_not_empty(world: World, espalier: Command) -> None:
    words = world.train("--out", world.classifier)
    espalier.fails(*words, saying=["not empty", "resume"])


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on renaming a written file into place fails as it does on a full disk."""

    def refuse(source: Any, target: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    monkeypatch.setattr(os, "replace", refuse)


def test_no_space_left(
    world: World, tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        full_disk(patch)
        espalier.fails(*world.train("--out", tmp_path / "run"), saying=["space"])
        words = ["merge", world.classifier, "--out", tmp_path / "merged"]
        espalier.fails(*words, saying=["No space left"])
    assert not (tmp_path / "merged").exists()


def test_nearly_full_disk_is_seen_before_anything_is_loaded(
    world: World, tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    espalier.fails(*world.train("--out", tmp_path / "run"), saying=["are free"])
    assert not (tmp_path / "run").exists()
