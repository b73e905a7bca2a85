"""The benchmark scripts run, on models so small that nothing they print means anything."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
NAMES = (
    "bases",
    "measure",
    "counting",
    "step",
    "lifecycle",
    "nf4",
    "mixed",
    "gpu",
    "real_text",
    "loss",
    "plan",
    "trunk_cache",
)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import from benchmarks/ as a script there would, and leave no trace of it."""
    monkeypatch.syspath_prepend(SCRIPTS)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in NAMES:
        sys.modules.pop(name, None)


def _import(name: str) -> ModuleType:
    return __import__(name)


@pytest.mark.usefixtures("scripts")
def test_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    asked = ["--tiny", "--rounds", "1", "--dtype", "bf16", "--json", str(out)]
    _import("step").main([*asked, "--field", "lora", "settings", "--family", "llama"])
    found = json.loads(out.read_text())
    printed = capsys.readouterr().out
    for field in ("lora", "settings"):
        entries = found[f"{field} llama bf16"]
        limit, ours, peft = (entries[name] for name in ("limit", "our LoRA", "peft LoRA"))
        assert limit["gemms"] == entries["gemm"]["gemms"] < ours["gemms"]
        assert ours["kernels"] < 0.85 * peft["kernels"]
        assert ours["moved"] < 0.7 * peft["moved"]
        assert ours["saved"] < 0.6 * peft["saved"]
        assert f"{field}: llama-like, bf16" in printed
    _import("step").main(["--tiny", "--rounds", "1", "--dtype", "fp32", "--field", "kinds"])


@pytest.mark.usefixtures("scripts")
def test_compiled_steps_are_timed_and_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.training.compiling.BACKEND", "eager")
    out = tmp_path / "step.json"
    asked = ["--tiny", "--rounds", "1", "--dtype", "bf16", "--json", str(out)]
    _import("step").main([*asked, "--field", "compile", "--family", "llama"])
    entries = json.loads(out.read_text())["compile llama bf16"]
    compiled = {name for name, one in entries.items() if "compiling" in one}
    assert compiled == {name for name in entries if "compiled" in name} != set()
    assert compiled == {name for name, one in entries.items() if "kernels" not in one}


@pytest.mark.usefixtures("scripts")
def test_counts_are_those_of_the_operations() -> None:
    """One linear layer, by hand: two products forward and backward, and what lies between."""
    counting = _import("counting")
    weight = torch.zeros(5, 3, requires_grad=True)
    x = torch.ones(2, 3)
    counts = counting.count(
        lambda: torch.relu(x @ weight.T).sum(), lambda loss: loss.backward(), [weight]
    )
    assert counts.gemms == 2  # x Wᵀ and the weight's gradient; x needs none
    assert counts.flops == 2 * (2 * 2 * 3 * 5)
    assert counts.saved == 4 * (2 * 3 + 2 * 5)  # x and relu's result
    # relu reads and writes 10 numbers; sum reads 10, writes 1; the ones for the loss are written;
    # relu's backward reads its result and the (repeated) 1 and writes 10.
    assert counts.moved >= 4 * (20 + 11 + 1 + 21)
    assert counts.kernels >= 6


@pytest.mark.usefixtures("scripts")
def test_mixed(tmp_path: Path) -> None:
    out = tmp_path / "mixed.json"
    _import("mixed").main(["--tiny", "--rounds", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    for kind in ("fp32", "bf16"):
        assert len(found[kind]) == 6
        assert all(one["ours_over_base"]["median"] > 0 for one in found[kind].values())


@pytest.mark.usefixtures("scripts")
def test_plan(tmp_path: Path) -> None:
    out, table = tmp_path / "plan.json", tmp_path / "plan.md"
    arguments = ["--tiny", "--only", "BERT", "--json", str(out), "--markdown", str(table)]
    _import("plan").main(arguments)
    (found,) = json.loads(out.read_text()).values()
    assert found["measured"] > 0 <= found["files"]
    assert 0 < found["predicted"] < found["peak"]
    assert "| BERT-like, LoRA on the top 2 layers |" in table.read_text()


@pytest.mark.usefixtures("scripts")
def test_trunk_cache(tmp_path: Path) -> None:
    out, table = tmp_path / "trunk.json", tmp_path / "trunk.md"
    arguments = ["--random", "--size", "tiny", "--length", "12", "--limit", "16", "--batch", "4"]
    arguments += ["--rounds", "1", "--top", "1", "--only", "ladder, cached"]
    _import("trunk_cache").main([*arguments, "--json", str(out), "--markdown", str(table)])
    found = json.loads(out.read_text())
    assert [*found][1:] == ["peft's LoRA, all layers", "LoRA, all layers", "ladder, cached"]
    assert all(one["epoch"]["median"] > 0 for one in [*found.values()][1:])
    # Two states of 32 bf16 numbers and one that starts, of each of 12 tokens in 16 + 4 rows.
    assert found["ladder, cached"]["kept_bytes"] == 3 * 32 * 2 * 12 * (16 + 4)
    assert "| ladder, cached |" in table.read_text()


@pytest.mark.usefixtures("scripts")
def test_lifecycle(tmp_path: Path) -> None:
    out, table = tmp_path / "life.json", tmp_path / "life.md"
    arguments = ["--tiny", "--rounds", "1", "--counts", "1", "2", "--json", str(out)]
    _import("lifecycle").main([*arguments, "--markdown", str(table)])
    found = json.loads(out.read_text())
    names = ("attach", "save", "load", "load, number 2", "switch, 1 loaded", "merge")
    for name in names:
        assert found[name]["ours_over_plain"]["median"] > 0
        assert found[name]["ours_over_peft"]["median"] > 0
        assert f"| {name} |" in table.read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("scripts")
def test_nf4(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out, table = tmp_path / "nf4.json", tmp_path / "nf4.md"
    arguments = ["--tiny", "--rounds", "1", "--json", str(out), "--markdown", str(table)]
    _import("nf4").main(arguments)
    found = json.loads(out.read_text())
    for kind in ("nf4", "fp4, scales in 8 bits"):
        for dtype in ("float32", "bfloat16"):
            assert found[f"{kind}, from {dtype}"]["equal"] is True
            assert f"| {kind}, from {dtype} |" in table.read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.usefixtures("scripts")
def test_gpu(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    out = tmp_path / "gpu.md"
    given = ["--device", "cpu", "--size", "tiny", "--steps", "2", "--out", str(out)]
    _import("gpu").main(given)
    text = out.read_text()
    assert "failed" not in text
    assert "out of" not in text
    assert "WRONG" not in text
    assert text.count("| right |") == 2 * 7 + 2 * 2
    for title in ("Numerics", "Training, Llama-like tiny", "Decoding", "Quantising"):
        assert f"## {title}" in text
    for who in ("ours", "peft, Trainer", "floor"):
        assert text.count(f"| {who} | 2 |") == 2


@pytest.mark.usefixtures("scripts")
def test_gpu_says_what_did_not_fit_and_stops_in_time(tmp_path: Path) -> None:
    gpu = _import("gpu")
    bench = gpu.Bench(torch.device("cpu"), "tiny", float("inf"), 2, gpu.Paper(None, ""))

    def too_much() -> None:
        raise torch.OutOfMemoryError

    assert bench.attempt(too_much) == "out of memory"
    assert bench.attempt(lambda: 1 / 0).startswith("failed: ZeroDivisionError")
    out = tmp_path / "late.md"
    gpu.main(["--device", "cpu", "--size", "tiny", "--minutes", "0", "--out", str(out)])
    assert out.read_text().count("not run: out of time") == 18 + 2 * 3 + 5 + 2


@pytest.mark.usefixtures("scripts")
def test_real_text(tmp_path: Path) -> None:
    data, out, table = tmp_path / "data", tmp_path / "text.json", tmp_path / "text.md"
    data.mkdir()
    lines = [json.dumps({"instruction": "a" * 9 * n, "output": "b"}) for n in range(1, 13)]
    (data / "train.jsonl").write_text("\n".join(lines))
    arguments = ["--tiny", "--data", str(data), "--rounds", "1", "--batch", "3", "--dtype", "fp32"]
    _import("real_text").main([*arguments, "--json", str(out), "--markdown", str(table)])
    found = json.loads(out.read_text())
    padded, bucketed = found["fp32"]["peft, random batches"], found["fp32"]["ours, bucket"]
    packed = next(one for name, one in found["fp32"].items() if "pack" in name)
    assert padded["tokens_per_real"] > bucketed["tokens_per_real"] >= 1
    assert packed["tokens_per_real"] >= 1
    assert packed["over_peft"]["median"] > 0
    assert "| one flat buffer, fused (ours) |" in table.read_text()


@pytest.mark.usefixtures("scripts")
def test_loss(tmp_path: Path) -> None:
    out = tmp_path / "loss.json"
    _import("loss").main(["--tiny", "--rounds", "1", "--json", str(out)])
    found = json.loads(out.read_text())
    for kind in ("fp32", "bf16"):
        assert found[kind]["chunks"]["saved"] < found[kind]["whole logits"]["saved"]
