"""Settings of methods typed as flags, and adapters made plain that go on training."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import espalier as esp
from espalier.commands.flags import method_settings
from espalier.errors import CheckpointError, SettingError
from zoo import BY_NAME, logits, train


@pytest.mark.parametrize(
    ("words", "method", "expected"),
    [
        (["--template", "3,3,3"], "ptuning", {"template": [3, 3, 3]}),
        (["--template", "[3, 3, 3]"], "ptuning", {"template": [3, 3, 3]}),
        (["--init", "labels", "--labels", "yes, no"], "prompttuning", {"labels": ["yes", "no"]}),
        (["--init", "text", "--text", "one, two"], "prompttuning", {"text": "one, two"}),
        (["--rank", "4", "--dora"], "lora", {"rank": 4, "dora": True}),
        (["--length", "16"], "mam", {"method": "PrefixTuning", "length": 16}),
    ],
)
def test_flags_become_settings(words: list[str], method: str, expected: dict[str, Any]) -> None:
    first = method_settings(words, method)[0]
    assert {key: first[key] for key in expected} == expected


def test_a_setting_without_default_may_be_typed_alone() -> None:
    with pytest.raises(CheckpointError, match="there is no folder nowhere"):
        method_settings(["--source", "nowhere"], "spot")


def test_a_flag_of_another_method_is_said_not_to_be_one_of_this() -> None:
    with pytest.raises(SettingError, match="no flag --rank for PrefixTuning"):
        method_settings(["--rank", "3"], "PrefixTuning(length=10)")


@pytest.mark.parametrize(
    "recipe",
    ["PrefixTuning(length=3, hidden=5)", "PTuning(length=3)", "LoRA(rank=2, init='pissa')"],
)
def test_an_adapter_made_plain_trains_on(recipe: str) -> None:
    case = BY_NAME["llama"]
    model, batch = case.make(), case.batch()
    esp.attach(model, recipe, "mine")
    train(model, batch)
    before = logits(model, batch)
    esp.to_plain(model, "mine")
    assert torch.allclose(logits(model, batch), before, atol=1e-5)
    first = train(model, batch, steps=1)
    assert train(model, batch, steps=5) < first
