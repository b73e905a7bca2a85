"""transformers.Trainer on a grafted model: only the adapter changes; the callback saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import espalier as esp
import tiny_runs as tiny
from espalier.data import read_task
from espalier.errors import TrainingError
from espalier.training import AdapterCallback


def trainer(model: Any, out: Path, callbacks: list[Any], **settings: Any) -> Trainer:
    data, words = read_task(tiny.reviews(), validation_share=0), tiny.tokenizer()
    examples = data.task.encode(data.splits["train"], words, 24)
    arguments = TrainingArguments(
        output_dir=str(out), num_train_epochs=4, per_device_train_batch_size=8,
        learning_rate=0.02, logging_steps=1, report_to=[], disable_tqdm=True, use_cpu=True,
        remove_unused_columns=False, **{"save_strategy": "no", **settings},
    )  # fmt: skip
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,  # type: ignore[arg-type]
        data_collator=lambda some: data.task.collate(some, words),
        callbacks=callbacks,
    )


def grafted() -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny.bert(num_labels=2)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    esp.attach(model, esp.LoRA(rank=4), name="mine", head=["classifier"])
    return model, before


def test_the_trainer_trains_the_adapter_alone(tmp_path: Path) -> None:
    model, before = grafted()
    run = trainer(model, tmp_path, [])
    run.train()
    losses = [line["loss"] for line in run.state.log_history if "loss" in line]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert list(tmp_path.iterdir()) == []


def test_the_callback_saves_the_adapter(tmp_path: Path) -> None:
    model, before = grafted()
    callback = AdapterCallback(extras={"labels": ["bad", "good"]})
    trainer(model, tmp_path, [callback], save_strategy="epoch", save_total_limit=1).train()
    model.eval()
    batch = {"input_ids": torch.tensor([[2, 5, 20, 3]])}
    expected = model(**batch).logits
    fresh = tiny.bert(num_labels=2).eval()
    esp.load(fresh, tmp_path / "adapter")
    assert torch.equal(fresh(**batch).logits, expected)
    assert esp.read_card(tmp_path / "adapter")["extras"]["labels"] == ["bad", "good"]
    checkpoint = next(tmp_path.glob("checkpoint-*"))
    assert (checkpoint / "adapter" / "adapter.safetensors").is_file()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())


def test_the_callback_names_places_without_gradient(tmp_path: Path) -> None:
    model, _ = grafted()
    layer = model.bert.encoder.layer[1].attention.self.query
    inner = layer.forward
    layer.forward = lambda x: inner(x).detach()
    with pytest.raises(TrainingError, match=r"layer\.1\.attention\.self\.query"):
        trainer(model, tmp_path, [AdapterCallback()]).train()
