"""The shipped decoder, its rows, and a tiny build that is stopped and goes on."""

from __future__ import annotations

import json
import math
import shutil
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from espalier.base import base_dir, verify
from espalier.base.build import Shape, build_base
from espalier.base.progress import Progress
from espalier.base.signatures import first_sentence, signature_examples
from espalier.base.text import is_held_out, source_documents, stdlib_folder
from espalier.base.train import Blocks, TrainSettings, bits_per_character, learning_rate
from espalier.errors import CheckpointError, DataError, SettingError

TINY = Shape(vocab=320, hidden=16, layers=1, heads=2, inner=24, positions=32)
QUICK = TrainSettings(steps=0, batch=2, bf16=False, checkpoint_seconds=0.0)
STEPS = 6


def test_shipped_model_is_the_one_its_recipe_names() -> None:
    recipe = verify()
    assert float(str(recipe["heldout_bits_per_character"])) < 1.6
    assert (base_dir() / "model.safetensors").stat().st_size < 5_000_000


def test_damage_is_found(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base_dir(), tmp_path / "copy"))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    with pytest.raises(CheckpointError, match="not the file its recipe names"):
        verify(copy)
    (copy / "recipe.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        verify(copy)
    (copy / "recipe.json").unlink()
    with pytest.raises(CheckpointError, match="incomplete"):
        verify(copy)


def test_tokenizer_takes_any_text_there_and_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir(), local_files_only=True)
    for text in ("def f(x):\n\treturn 'é' + \"漢字\"  # done\n", "  a\n\n\n    b", "🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert len(tokenizer) == 2048


def test_shipped_model_reads_source_it_never_saw() -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir(), local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        base_dir(), local_files_only=True, dtype=torch.float32
    )
    text = "".join(document.text[2000:5000] for document in source_documents("heldout")[:12])
    ids = torch.tensor(tokenizer(text)["input_ids"])
    bits = bits_per_character(model, ids, len(text), model.config.max_position_embeddings)
    recipe = verify()
    assert bits < 0.6 * math.log2(len(tokenizer)) * len(ids) / len(text)
    assert abs(bits - float(str(recipe["heldout_bits_per_character"]))) < 0.35


def test_splits_of_the_source_share_no_module() -> None:
    pretrain, heldout = source_documents("pretrain"), source_documents("heldout")
    assert not {d.module for d in pretrain} & {d.module for d in heldout}
    assert all(is_held_out(document.module) for document in heldout)
    assert not [d.path for d in pretrain if "/test/" in d.path or "site-packages" in d.path]


def test_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no standard library"):
        source_documents(root=tmp_path / "none")
    with pytest.raises(DataError, match="no pretrain source files"):
        source_documents(root=tmp_path)


def test_signature_rows_are_apart_and_well_formed() -> None:
    splits = signature_examples(limit_per_module=30, packages=("networkx", "rich", "pydantic"))
    modules = {split: {row["module"] for row in rows} for split, rows in splits.items()}
    assert not modules["train"] & modules["test"]
    assert not modules["validation"] & (modules["train"] | modules["test"])
    every = list(chain.from_iterable(splits.values()))
    assert len({row["prompt"] for row in every}) == len(every)
    assert len({row["completion"].lower() for row in every}) == len(every)
    packages = {"networkx", "rich", "pydantic"}
    for row in every:
        assert row["prompt"].startswith(("def ", "async def "))
        assert row["prompt"].endswith('):\n    """')
        assert row["completion"].endswith(".")
        assert row["module"] in packages or is_held_out(row["module"])


@pytest.mark.parametrize(
    ("docstring", "wanted"),
    [
        ("Return the first\nline of it. And more.\n\nLonger.", "Return the first line of it."),
        ("return lower case, so no sentence.", None),
        ("Too short.", None),
        ("No end to this", None),
    ],
)
def test_first_sentence(docstring: str, wanted: str | None) -> None:
    assert first_sentence(docstring) == wanted


def test_learning_rate_rises_and_falls() -> None:
    rates = [learning_rate(step, TrainSettings(steps=1000)) for step in range(1000)]
    peak = rates.index(max(rates))
    assert 90 <= peak <= 110
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 2e-4


def test_blocks_depend_on_seed_and_step_only() -> None:
    ids = torch.arange(1000, dtype=torch.int32)
    settings = TrainSettings(steps=9, batch=4, block=16)
    blocks = Blocks(ids, settings)
    there = [blocks.batch(step) for step in range(40)]
    back = [Blocks(ids, settings).batch(step) for step in (39, 3, 20)]
    assert all(torch.equal(there[step], b) for step, b in zip((39, 3, 20), back, strict=True))
    with pytest.raises(DataError, match="too few"):
        Blocks(ids[:20], settings)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("bisect", "textwrap", "heapq"):
        shutil.copy(stdlib_folder() / f"{name}.py", folder)
    return folder


def build(out: Path, source: Path, seed: int = 0) -> dict[str, object]:
    return build_base(out, seed=seed, steps=STEPS, shape=TINY, settings=QUICK, source=source)


def test_a_stopped_build_ends_as_one_that_was_not(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(tmp_path / "whole", source)
    shown = Progress.step

    def stop(self: Progress, done: int, loss: float, rate: float) -> None:
        shown(self, done, loss, rate)
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            build(tmp_path / "resumed", source)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(CheckpointError, match="other settings"):
        build(tmp_path / "resumed", source, seed=1)
    resumed = build(tmp_path / "resumed", source)
    assert resumed["model_sha256"] == whole["model_sha256"]
    assert verify(tmp_path / "resumed") == json.loads(json.dumps(resumed))
    assert {path.name for path in (tmp_path / "resumed").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_full_folder_is_not_built_into(tmp_path: Path, source: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingError, match="already exists"):
        build(tmp_path, source)
    with pytest.raises(SettingError, match="positive"):
        build_base(tmp_path / "new", steps=0)
