"""Parity with huggingface/peft: outputs, gradients, merged weights, and folders both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import espalier as esp
from espalier.errors import CheckpointError
from zoo import BY_NAME, Case, logits

PLAIN = [BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5", "vit")]
TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
    "vit": ["q_proj", "v_proj", "fc1"],
}
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"{0}": 3}, "alpha_pattern": {"{0}": 5, "{1}": 7}},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
}


def theirs(case: Case, **settings: object) -> nn.Module:
    """A peft model with numbers that are not zero."""
    targets = TARGETS[case.name]
    filled = json.loads(json.dumps(settings).replace("{0}", targets[0]).replace("{1}", targets[1]))
    config = peft.LoraConfig(
        **{
            "r": 5, "lora_alpha": 12, "target_modules": targets,
            "modules_to_save": ["classifier"] if case.has_new_head else None, **filled,
        }
    )  # fmt: skip
    model = peft.get_peft_model(case.make(), config)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def key_of(name: str) -> str:
    """Our label of a tensor of peft's, by the path and the matrix."""
    name = name.removeprefix("base_model.model.").replace(".default", "")
    path, _, rest = name.partition(".lora_")
    return f"{path}/{rest[0].lower()}" if rest else name


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_their_folder_here(case: Case, settings: str, tmp_path: Path) -> None:
    other, batch = theirs(case, **SETTINGS[settings]), case.batch()
    other.save_pretrained(tmp_path)
    ours = case.make()
    esp.load(ours, tmp_path, "mine", trainable=True)
    expected = logits(other, batch)
    assert torch.allclose(logits(ours, batch), expected, atol=1e-5)
    assert not torch.allclose(logits(case.make(), batch), expected, atol=1e-2)
    other(**batch).loss.backward()
    ours(**batch).loss.backward()
    grads = {key_of(n): p.grad for n, p in other.named_parameters() if "lora_" in n}
    adapter = ours.get_submodule("espalier.@mine")
    compared = 0
    for kind, flat in adapter.flat.items():
        for slot in adapter.slots[kind]:
            label = slot.label.partition("/")[2]
            if label in grads:
                assert torch.allclose(slot.of(flat.grad), grads[label], atol=1e-5), label
                compared += 1
    assert compared == len(grads) > 0
    esp.merge(ours)
    assert torch.allclose(logits(ours, batch), logits(other.merge_and_unload(), batch), atol=1e-5)


RECIPES = {
    "plain": "LoRA(rank=3, alpha=7)",
    "two ranks": "LoRA(rank=4, sites='attention.q') + LoRA(rank=2, alpha=3, sites='ffn.*')",
    "twice": "LoRA(rank=4, sites='attention.q') + LoRA(rank=2, alpha=3, sites='attention.q')",
    "rslora": "LoRA(rank=4, rslora=True)",
    "bias": "LoRA(rank=2, bias='all')",
    "two ranks with biases": "LoRA(rank=4, bias='lora_only', sites='attention.q') + "
    "LoRA(rank=2, bias='lora_only', sites='ffn.*')",
}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_our_folder_there(case: Case, recipe: str, tmp_path: Path) -> None:
    ours, batch = case.make(), case.batch()
    esp.attach(ours, RECIPES[recipe], "mine")
    with torch.no_grad():
        for p in esp.parameters(ours):
            p.add_(torch.randn_like(p) * 0.1)
    esp.save(ours, "mine", tmp_path, format="peft")
    other = peft.get_peft_model(case.make(), peft.LoraConfig.from_pretrained(tmp_path))
    state = load_file(tmp_path / "adapter_model.safetensors")
    result = peft.set_peft_model_state_dict(other, state)
    wanted = set(peft.get_peft_model_state_dict(other))
    assert not result.unexpected_keys
    assert wanted - {"original_module"} <= set(state) | {
        k for k in wanted if "original_module" in k or "modules_to_save" in k
    }
    assert torch.allclose(logits(other.eval(), batch), logits(ours, batch), atol=1e-5)
    through_disk = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()
    assert torch.allclose(logits(through_disk, batch), logits(ours, batch), atol=1e-5)
    back = case.make()
    esp.load(back, tmp_path, "again")
    assert torch.allclose(logits(back, batch), logits(ours, batch), atol=1e-6)


def test_slices_of_a_fused_layer_become_one_change_of_the_whole(tmp_path: Path) -> None:
    case = BY_NAME["gpt2"]
    ours, batch = case.make(), case.batch()
    esp.attach(ours, "LoRA(rank=3, sites='attention.q, attention.v')", "mine")
    with torch.no_grad():
        esp.parameters(ours)[0].normal_(std=0.2)
    esp.save(ours, "mine", tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True
    assert config["r"] == 6
    other = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()
    assert torch.allclose(logits(other, batch), logits(ours, batch), atol=1e-5)


def test_embeddings_both_ways(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.LoraConfig(r=3, target_modules=["embed_tokens", "q_proj"])
    other = peft.get_peft_model(case.make(), config)
    with torch.no_grad():
        for p in other.parameters():
            if p.requires_grad:
                p.normal_(std=0.2)
    other.save_pretrained(tmp_path / "theirs")
    batch = case.batch()
    ours = case.make()
    esp.load(ours, tmp_path / "theirs", "mine")
    assert torch.allclose(logits(ours, batch), logits(other.eval(), batch), atol=1e-5)
    esp.save(ours, "mine", tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(case.make(), str(tmp_path / "ours")).eval()
    assert torch.allclose(logits(again, batch), logits(ours, batch), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "not a and b and m"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"a_setting_of_next_year": 3}, "a_setting_of_next_year"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "VERA"}, "VERA"),
    ],
)
def test_what_we_do_not_know_is_named(change: dict, named: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    theirs(case).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    model = case.make()
    with pytest.raises(CheckpointError, match=named):
        esp.load(model, tmp_path, "mine")
    assert "espalier" not in model._modules


def test_an_adapter_for_another_model_names_the_places(tmp_path: Path) -> None:
    theirs(BY_NAME["llama"]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"made for another model.*model\.layers\.0"):
        esp.load(BY_NAME["bert"].make(), tmp_path)


def test_a_method_without_a_form_there_is_refused(tmp_path: Path) -> None:
    model = BY_NAME["bert"].make()
    esp.attach(model, "FullTuning()", "mine")
    with pytest.raises(CheckpointError, match="only replaces parameters"):
        esp.save(model, "mine", tmp_path, format="peft")
    esp.attach(model, "HeadOnly()", "head")
    with pytest.raises(CheckpointError, match="only replaces parameters"):
        esp.save(model, "head", tmp_path, format="peft")
    assert list(tmp_path.iterdir()) == []
