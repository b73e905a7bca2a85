"""Methods that live while they train: stopped and resumed, over two processes, in micro-batches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import espalier as esp
import tiny_runs as tiny
from espalier.training.loop import Loop
from test_resume import lasting, settings

# For runs of 12 steps: schedules begin early, and end within them.
METHODS = {
    "lora": "LoRA(rank=2)",
    "adalora": "AdaLoRA(rank=4, target=2, sites='attention.*')",
    "diff-pruning": "DiffPruning(sites='attention.*', share=0.05)",
    "said": "IntrinsicSAID(dimension=60)",
    "ladder": "LadderSideTuning(reduction=2)",
    "sum": "AdaLoRA(rank=3, target=1, sites='attention.q') + DiffPruning(sites='ffn.*')",
}
STEPS = 12
WEIGHTS = "adapter/adapter.safetensors"


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_stopped_anywhere_and_resumed_equals_never_stopped(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method": METHODS[method], "steps": STEPS, "save_every": 1, "evaluate_every": 3}
    plan = {**settings(tmp_path), **changes}
    esp.train(esp.RunConfig(**plan, out=tmp_path / "whole"))
    inner, stops = Loop._step, {4, 9}  # before and after what is settled at half of the steps

    def stopping(self: Loop, *given: Any) -> None:
        if self.at.step in stops:
            stops.discard(self.at.step)
            raise KeyboardInterrupt
        inner(self, *given)

    monkeypatch.setattr(Loop, "_step", stopping)
    out = tmp_path / "stopped"
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            esp.train(esp.RunConfig(**plan, out=out, resume=resume))
    esp.train(esp.RunConfig(**plan, out=out, resume=True))
    assert not stops
    assert lasting(out) == lasting(tmp_path / "whole")
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


RUNS = """
import json, sys
import espalier as esp, tiny_runs as tiny
for name, method in json.loads(sys.argv[3]).items():
    esp.fit(
        tiny.llama(), tiny.tokenizer("gpt2"), tiny.sums(40), method, batch=4, steps=6,
        lr=0.01, threads=1, out=f"{sys.argv[1]}/{name}", quiet=True, accumulate=int(sys.argv[2]),
    )
"""


def test_two_processes_equal_one(tmp_path: Path) -> None:
    (tmp_path / "runs.py").write_text(RUNS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "1"}
    script, methods = tmp_path / "runs.py", json.dumps(METHODS)
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    one = [sys.executable, script, tmp_path / "one", "2", methods]
    two = [sys.executable, *launch, script, tmp_path / "two", "1", methods]
    for command in (one, two):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    for name in METHODS:
        a, b = (load_file(tmp_path / n / name / WEIGHTS) for n in ("one", "two"))
        assert a.keys() == b.keys()
        for key, value in a.items():
            torch.testing.assert_close(value, b[key], atol=1e-5, rtol=1e-4, msg=f"{name} {key}")
        lines = [(tmp_path / n / name / "metrics.jsonl").read_text() for n in ("one", "two")]
        assert lines[0].count("\n") == lines[1].count("\n")


@pytest.mark.parametrize("method", [m for m in METHODS if m != "lora"])
def test_micro_batches_equal_one_big_batch(method: str) -> None:
    def trained(batch: int, accumulate: int) -> torch.Tensor:
        model = tiny.llama()
        esp.fit(
            model, tiny.tokenizer("gpt2"), tiny.sums(32), METHODS[method], steps=4, lr=0.01,
            batch=batch, accumulate=accumulate, validation_share=0, batching="random", quiet=True,
        )  # fmt: skip
        return torch.cat([p.detach().flatten() for p in esp.parameters(model)])

    whole = trained(16, 1)
    assert torch.allclose(whole, trained(4, 4), atol=1e-4)
    less = trained(4, 1)
    assert whole.shape != less.shape or not torch.allclose(whole, less, atol=1e-3)
