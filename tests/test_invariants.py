"""The invariants of docs/design.md, as one table: every method on every family."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import SiteError
from zoo import CASES, Case, logits, train

METHODS = {
    "lora": "LoRA(rank=4, alpha=8)",
    "lora-qv": "LoRA(rank=2, alpha=2, rslora=True, sites='attention.q, attention.v')",
    "lora-two": "LoRA(rank=3, sites='attention.*') + LoRA(rank=2, sites='ffn.*', bias='lora_only')",
    "full": "FullTuning()",
    "head": "HeadOnly()",
}
TABLE = [(case, recipe) for case in CASES for recipe in METHODS]
IDS = [f"{case.name}-{recipe}" for case, recipe in TABLE]


def applies(case: Case, recipe: str) -> bool:
    return recipe != "head" or case.has_new_head


def grafted(case: Case, recipe: str) -> nn.Module:
    """A model with the adapter attached; a pair that refuses is checked to do so, and skipped."""
    model = case.make()
    if not applies(case, recipe):
        before = snapshot(model)
        with pytest.raises(SiteError, match="trains nothing here"):
            esp.attach(model, METHODS[recipe], "mine")
        same(before, snapshot(model))
        pytest.skip("refuses, and says why")
    esp.attach(model, METHODS[recipe], "mine")
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that could be observed of a model: classes, dictionaries, tensors, flags."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules():
        seen[f"{path} class"] = type(module)
        seen[f"{path} dict"] = sorted(module.__dict__)
        seen[f"{path} hooks"] = len(module._forward_pre_hooks) + len(module._forward_hooks)
    for name, p in model.named_parameters():
        seen[f"{name} values"] = p.detach().clone()
        seen[f"{name} identity"] = (id(p), p.data_ptr(), p.requires_grad, p.dtype)
    for name, b in model.named_buffers():
        seen[f"{name} values"] = b.detach().clone()
    seen["keys"] = list(model.state_dict())
    return seen


def same(a: dict[str, object], b: dict[str, object]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        other = b[key]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            assert torch.equal(value, other), key
        else:
            assert value == other, key


def base_values(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if not n.startswith("espalier.")}


@pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)
def test_fresh_changes_nothing_and_detach_leaves_no_trace(case: Case, recipe: str) -> None:
    untouched, batch = case.make(), case.batch()
    model = grafted(case, recipe)
    expected = logits(untouched, batch)
    assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    train(model, batch)
    esp.detach(model, "mine")
    assert torch.equal(logits(model, batch), expected)
    now, then = snapshot(model), snapshot(untouched)
    for key in [k for k in now if k.endswith(" identity")]:
        assert now.pop(key)[2:] == then.pop(key)[2:]  # type: ignore[index]
    same(then, now)


@pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)
def test_only_the_adapter_trains(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    base, expected = base_values(model), logits(case.make(), batch)
    first = train(model, batch, steps=1)
    assert esp.dead_sites(model) == []
    last = train(model, batch, steps=6)
    assert last < first
    for name, p in model.named_parameters():
        if name.startswith("espalier."):
            assert p.grad is not None
        else:
            assert p.grad is None
            assert not p.requires_grad
            assert torch.equal(p, base[name]), f"{name} changed"
    assert not torch.allclose(logits(model, batch), expected, atol=1e-4)
    esp.activate(model, None)
    assert torch.equal(logits(model, batch), expected)


@pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)
def test_merge_equals_unmerged_and_is_undone_exactly(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    base = base_values(model)
    train(model, batch)
    expected = logits(model, batch)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=3e-5)
    assert not torch.allclose(logits(model, batch), logits(case.make(), batch), atol=1e-4)
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)
    assert all(torch.equal(value, base[name]) for name, value in base_values(model).items())
    esp.merge(model, unload=True)
    assert list(model.state_dict()) == list(case.make().state_dict())
    assert torch.allclose(logits(model, batch), expected, atol=3e-5)


@pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)
def test_save_and_load_give_identical_outputs(case: Case, recipe: str, tmp_path: Path) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch)
    esp.save(model, "mine", tmp_path / "kept", extras={"note": "ü"})
    fresh = case.make()
    name = esp.load(fresh, tmp_path / "kept")
    assert name == "kept"
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert esp.parameters(fresh) == []  # loaded to be used, not to train
    card = esp.read_card(tmp_path / "kept")
    assert card["extras"] == {"note": "ü"}
    assert card == json.loads((tmp_path / "kept" / "adapter.json").read_text())
    file = tmp_path / "kept" / "adapter.safetensors"
    header = struct.unpack("<Q", file.read_bytes()[:8])[0]
    assert file.stat().st_size == 8 + header + esp.account(model, "mine").bytes


@pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)
def test_a_deep_copy_is_independent(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    train(twin, batch)
    assert not torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(model, batch), expected)


GENERATORS = [case for case in CASES if case.name in ("gpt2", "llama", "t5", "bart")]


@pytest.mark.parametrize("recipe", ["lora", "lora-two", "full"])
@pytest.mark.parametrize("case", GENERATORS, ids=lambda case: case.name)
def test_cached_generation_equals_step_by_step(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch, rate=5e-2)
    ids = batch["input_ids"][:1]
    how = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    mask = torch.ones_like(ids)
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **how)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    base = case.make()
    assert not torch.equal(cached, base.generate(ids, attention_mask=mask, **how))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in ("gpt2", "llama")], ids=str)
def test_left_padded_row_equals_the_row_alone(case: Case) -> None:
    model, batch = grafted(case, "lora"), case.batch()
    train(model, batch)
    ids = batch["input_ids"][:1]
    pad = torch.zeros(1, 4, dtype=ids.dtype)
    mask = torch.cat((pad, torch.ones_like(ids)), 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(
            input_ids=torch.cat((pad, ids), 1), attention_mask=mask, position_ids=positions
        ).logits[:, 4:]
    assert torch.allclose(padded, logits(model, {"input_ids": ids}), atol=1e-5)


def test_a_fresh_process_gives_the_same_numbers(tmp_path: Path) -> None:
    case = CASES[2]
    model, batch = grafted(case, "lora-two"), case.batch()
    train(model, batch)
    esp.save(model, "mine", tmp_path)
    from safetensors.torch import save_file

    save_file({"logits": logits(model, batch)}, tmp_path / "expected.st")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\n"
        "import espalier as esp; from zoo import BY_NAME, logits\n"
        "from safetensors.torch import load_file\n"
        "case = BY_NAME['llama']; model = case.make(); esp.load(model, sys.argv[2], 'again')\n"
        "want = load_file(sys.argv[2] + '/expected.st')['logits']\n"
        "assert torch.equal(logits(model, case.batch()), want)\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
