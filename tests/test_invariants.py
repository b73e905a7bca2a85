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

import espalier as esp
from espalier.errors import AdapterError
from table import IDS, METHODS, TABLE, base_values, grafted, same, snapshot
from zoo import CASES, Case, logits, train

ALL = pytest.mark.parametrize(("case", "recipe"), TABLE, ids=IDS)


@ALL
def test_fresh_changes_nothing_and_detach_leaves_no_trace(case: Case, recipe: str) -> None:
    untouched, batch = case.make(), case.batch()
    model = grafted(case, recipe)
    expected = logits(untouched, batch)
    if esp.recipe(METHODS[recipe]).identity:  # the others' papers say why not
        assert torch.allclose(logits(model, batch), expected, atol=1e-6)
    train(model, batch)
    esp.detach(model, "mine")
    assert torch.equal(logits(model, batch), expected)
    now, then = snapshot(model), snapshot(untouched)
    for key in [k for k in now if k.endswith(" identity")]:
        assert now.pop(key)[2:] == then.pop(key)[2:]  # type: ignore[index]
    same(then, now)


@ALL
def test_only_the_adapter_trains(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    base, expected = base_values(model), logits(case.make(), batch)
    first = train(model, batch, steps=2)  # some parts start at zero and pass no gradient at first
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


@ALL
def test_merge_equals_unmerged_and_is_undone_exactly(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    base = base_values(model)
    train(model, batch)
    expected = logits(model, batch)
    if not all(delta.mergeable for delta in model.get_submodule("espalier.@mine").deltas):  # type: ignore[union-attr]
        before = snapshot(model)
        with pytest.raises(AdapterError, match="cannot be merged"):
            esp.merge(model)
        same(before, snapshot(model))
        return
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=3e-5)
    assert not torch.allclose(logits(model, batch), logits(case.make(), batch), atol=1e-4)
    esp.unmerge(model)
    assert torch.equal(logits(model, batch), expected)
    assert all(torch.equal(value, base[name]) for name, value in base_values(model).items())
    esp.merge(model, unload=True)
    assert set(case.make().state_dict()) <= set(model.state_dict())
    assert not [key for key in model.state_dict() if key.startswith("espalier")]
    assert torch.allclose(logits(model, batch), expected, atol=3e-5)


@ALL
def test_save_and_load_give_identical_outputs(case: Case, recipe: str, tmp_path: Path) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch)
    trained = logits(model, batch)
    if esp.to_plain(model, "mine"):
        assert torch.allclose(logits(model, batch), trained, atol=1e-5)
        assert not esp.to_plain(model, "mine")
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


@ALL
def test_a_deep_copy_is_independent(case: Case, recipe: str) -> None:
    model, batch = grafted(case, recipe), case.batch()
    train(model, batch)
    expected = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), expected)
    train(twin, batch)
    assert not torch.equal(logits(twin, batch), expected)
    assert torch.equal(logits(model, batch), expected)


def test_a_fresh_process_gives_the_same_numbers(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
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
        "from contextlib import nullcontext\n"
        "with esp.plain_paths() if sys.argv[3] == 'True' else nullcontext():\n"
        "    assert torch.equal(logits(model, case.batch()), want)\n"
    )
    plain = str(pytestconfig.getoption("--plain-paths"))
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path), plain]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
