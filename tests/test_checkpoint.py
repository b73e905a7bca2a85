"""Adapters on disk: strict, whole or not at all, and only for the base they were made for."""

from __future__ import annotations

import builtins
import errno
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import nn

import espalier as esp
from espalier.errors import CheckpointError, SettingError
from zoo import BY_NAME, logits, train

BERT, LLAMA = BY_NAME["bert"], BY_NAME["llama"]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A folder with a trained BERT adapter."""
    model = BERT.make()
    esp.attach(model, "LoRA(rank=2, bias='lora_only')", "mine")
    train(model, BERT.batch())
    return esp.save(model, "mine", tmp_path / "kept", extras={"labels": ["a", "b"]})


def refuses(folder: Path, message: str, model: nn.Module | None = None) -> None:
    model = BERT.make() if model is None else model
    with pytest.raises(CheckpointError, match=message):
        esp.load(model, folder)
    assert "espalier" not in model._modules


def test_any_safetensors_reader_opens_the_file(kept: Path) -> None:
    model = BERT.make()
    esp.load(model, kept, "mine")
    adapter = model.get_submodule("espalier.@mine")
    with safe_open(kept / "adapter.safetensors", "pt") as file:
        assert set(file.keys()) == {label for label, _ in adapter.named()}
        for label, value in adapter.named():
            assert torch.equal(file.get_tensor(label), value)
        assert json.loads(file.metadata()["espalier"])["extras"] == {"labels": ["a", "b"]}


def test_the_numbers_alone_bring_an_adapter_back(kept: Path) -> None:
    (kept / "adapter.json").unlink()
    assert esp.load(BERT.make(), kept) == "kept"
    assert esp.load(BERT.make(), kept / "adapter.safetensors", "mine") == "mine"


@pytest.mark.parametrize("size", [0, 5, 40, -1, -3000])
def test_truncated_files(kept: Path, size: int) -> None:
    file = kept / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refuses(kept, "truncated|damaged|no safetensors file")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    (tmp_path / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    refuses(tmp_path, "is a pickle")
    refuses(tmp_path / "adapter_model.bin", "is a pickle")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    refuses(tmp_path, "is a pickle")


def test_missing_folders_and_foreign_files(tmp_path: Path, kept: Path) -> None:
    refuses(tmp_path / "nowhere", "there is no folder")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", "holds no adapter.safetensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, kept / "adapter.safetensors")
    refuses(kept, "no adapter of Espalier's")


def test_an_adapter_for_another_base_of_the_same_shape(kept: Path) -> None:
    other = BERT.make()
    with torch.no_grad():
        for p in other.bert.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    refuses(kept, "trained on another base", other)
    assert esp.load(other, kept, check_base=False) == "kept"


def test_the_same_base_in_another_type_is_the_same_base(kept: Path) -> None:
    assert esp.load(BERT.make().to(torch.bfloat16), kept) == "kept"


def test_an_adapter_for_another_architecture(kept: Path) -> None:
    refuses(kept, "trained on a BertForSequenceClassification", LLAMA.make())


def test_another_width_names_the_tensor(kept: Path) -> None:
    config = BERT.make().config
    config.num_labels = 5
    model = tf.BertForSequenceClassification(config)
    model.bert.load_state_dict(BERT.make().bert.state_dict())
    refuses(kept, r"head/classifier/weight has shape \(3, 24\) in the file, \(5, 24\) here", model)


def test_missing_and_unexpected_tensors_are_named(kept: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = kept / "adapter.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    label = "0/bert.encoder.layer.0.attention.self.query/a"
    tensors["0/stranger/a"] = tensors.pop(label)
    save_file(tensors, file, metadata=metadata)
    refuses(kept, rf"{label} is missing in the file; 0/stranger/a has no place")


def test_reordered_files_load_all_the_same(kept: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = BERT.make()
    esp.load(model, kept)
    expected = logits(model, BERT.batch())
    file = kept / "adapter.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(dict(sorted(load_file(file).items(), reverse=True)), file, metadata=metadata)
    model = BERT.make()
    esp.load(model, kept)
    assert torch.equal(logits(model, BERT.batch()), expected)


def test_a_later_format_says_so(kept: Path) -> None:
    file = kept / "adapter.safetensors"
    file.write_bytes(file.read_bytes().replace(b'\\"format\\": 1', b'\\"format\\": 9'))
    refuses(kept, "format 9")


def test_a_damaged_card(kept: Path) -> None:
    file = kept / "adapter.safetensors"
    file.write_bytes(file.read_bytes().replace(b'\\"format\\": 1', b'\\"foxmat\\": 1'))
    refuses(kept, "the card in its header is damaged")


def test_an_unwritable_folder(tmp_path: Path) -> None:
    model = BERT.make()
    esp.attach(model, esp.LoRA(rank=2), "mine")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file, not a folder"):
        esp.save(model, "mine", tmp_path / "file" / "inner")


def test_a_full_disk_leaves_the_old_files_whole(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = BERT.make()
    esp.load(model, kept, "mine")
    before = {p.name: p.read_bytes() for p in kept.iterdir()}
    real = builtins.open

    class Full:
        def __init__(self, file) -> None:
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if "w" in mode and str(path).startswith(str(kept)) else file

    monkeypatch.setattr(builtins, "open", opened)
    with pytest.raises(CheckpointError, match="no space is left"):
        esp.save(model, "mine", kept)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in kept.iterdir()} == before


def test_saving_needs_an_unmerged_base_and_a_known_format(tmp_path: Path) -> None:
    model = BERT.make()
    esp.attach(model, esp.LoRA(rank=2), "mine")
    with pytest.raises(SettingError, match="'espalier', 'peft' or 'diffusers'"):
        esp.save(model, "mine", tmp_path, format="pickle")  # type: ignore[arg-type]
    esp.merge(model)
    with pytest.raises(esp.errors.AdapterError, match="unmerge"):
        esp.save(model, "mine", tmp_path)


def test_loading_to_train_on(kept: Path) -> None:
    model = BERT.make()
    esp.load(model, kept, "mine", trainable=True)
    first = train(model, BERT.batch(), steps=1)
    assert train(model, BERT.batch(), steps=4) < first
