"""How near `espalier plan` comes to what a training step really takes, on six configurations.

    python benchmarks/plan.py [--markdown FILE] [--json FILE] [--only NAME]

Each is predicted from its configuration, then trained two steps in a process of its own on random
weights. Measured is the most memory that the second step holds (VmHWM), less what the process held
once the model, its adapter and the optimiser stood, without pages of files: the code of torch's
libraries, which is read in as the first step calls it, belongs to the page cache, is shared by all
processes and counts as free memory. It stands in a column of its own. The C library is told to
give large blocks back when they are freed (MALLOC_MMAP_THRESHOLD_), or memory that it keeps would
be counted as the step's. Predicted is the plan's peak without weights, buffers and the adapter's
numbers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from measure import Report, setting, write_json

SHOWN = ("weights", "optimiser", "gradients", "activations", "logits", "workspace", "libraries")
ENV = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: a family, what trains, and the settings of the plan."""

    family: str
    method: str
    batch: int
    length: int
    settings: dict[str, Any]


CASES = {
    "Llama-like, LoRA on all linears": Case("llama", "LoRA(sites='all-linear')", 4, 256, {}),
    "Llama-like, full tuning": Case("llama", "FullTuning()", 4, 256, {}),
    "Llama-like, QLoRA (nf4)": Case(
        "llama", "LoRA(sites='all-linear')", 4, 256, {"quantize": "nf4"}
    ),
    "Llama-like, LoRA, checkpointing": Case(
        "llama", "LoRA(sites='all-linear')", 4, 256, {"checkpointing": True}
    ),
    "BERT-like, LoRA on the top 2 layers": Case("bert", "LoRA(sites='all-linear@6-')", 16, 256, {}),
    "T5-like, prefix": Case("t5", "PrefixTuning(length=16)", 8, 128, {}),
}
TINY = {"all-linear@6-": "all-linear@1-"}


def config(family: str, tiny: bool) -> Any:
    """The configuration of a family; with `tiny` one that only tries the script out."""
    import transformers as tf

    hidden, layers, heads, words = (32, 2, 4, 128) if tiny else (512, 8, 8, 32_000)
    if family == "llama":
        return tf.LlamaConfig(
            hidden_size=hidden, num_hidden_layers=layers, intermediate_size=hidden * 11 // 4,
            num_attention_heads=heads, num_key_value_heads=heads // 2, vocab_size=words,
            tie_word_embeddings=False, architectures=["LlamaForCausalLM"], pad_token_id=0,
        )  # fmt: skip
    if family == "bert":
        return tf.BertConfig(
            hidden_size=hidden, num_hidden_layers=layers, intermediate_size=4 * hidden,
            num_attention_heads=heads, vocab_size=words, num_labels=4,
            architectures=["BertForSequenceClassification"],
        )  # fmt: skip
    return tf.T5Config(
        d_model=hidden, d_kv=hidden // heads, d_ff=4 * hidden, num_layers=layers, num_heads=heads,
        vocab_size=words, decoder_start_token_id=0, architectures=["T5ForConditionalGeneration"],
    )  # fmt: skip


def predicted(case: Case, folder: str) -> dict[str, Any]:
    """The plan's numbers."""
    import espalier as esp

    given = {"batch": case.batch, "length": case.length, "keep": "last", "precision": "fp32"}
    given |= case.settings
    return esp.plan(folder, case.method, device="cpu", **given).to_json()


def resident(name: str) -> int:
    """A line of the process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def step_memory(case: Case, folder: str) -> dict[str, int]:
    """Train two steps in this process; what they add to its own memory, and to that of files."""
    import transformers

    import espalier as esp
    from espalier.planning.setup import task_named
    from espalier.training.evaluate import inputs
    from espalier.training.models import checkpointed
    from espalier.training.optimizers import optimizer

    torch.manual_seed(0)
    torch.set_num_threads(1)
    settings = transformers.AutoConfig.from_pretrained(folder)
    task = task_named(None, settings)
    model: Any = getattr(transformers, task.auto_model).from_config(settings)
    if case.settings.get("quantize"):
        esp.quantize(model, case.settings["quantize"])
    esp.attach(model, case.method)
    made, _ = optimizer("adamw", esp.groups(model, 0.0, 1e-4, 1e-4), 1e-4)
    batch = _batch(task.name, case, settings.vocab_size)
    model.train()
    gc.collect()
    give_back()
    own, files = resident("RssAnon"), resident("RssFile")
    with checkpointed(model, case.settings.get("checkpointing", False)):
        for _ in range(2):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            given = inputs(task, batch, torch.device("cpu"), model.dtype)
            loss = task.loss(model(**given), batch) * 1.0
            loss.backward()
            del loss
            torch.nn.utils.clip_grad_norm_(esp.parameters(model), 1.0)
            made.step()
            made.zero_grad(set_to_none=True)
    now = resident("RssFile")
    return {"measured": resident("VmHWM") - now - own, "files": now - files}


def give_back() -> None:
    """Hand freed memory back to the system."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _batch(task: str, case: Case, words: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, words, (case.batch, case.length))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # as in any batch of real texts, not all are of one length
    labels = torch.randint(0, 4, (case.batch,)) if task == "classification" else ids
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def main(arguments: list[str] | None = None) -> None:
    """Predict, measure, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", help="one configuration, or a part of its name")
    parser.add_argument("--tiny", action="store_true", help="for trying the script out")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child:
        name, folder = given.child
        print(json.dumps(step_memory(_case(name, given.tiny), folder)))
        return
    torch.set_num_threads(1)  # what is planned is measured with one
    rows, found = [], {}
    for name in CASES:
        if given.only and given.only not in name:
            continue
        case = _case(name, given.tiny)
        with tempfile.TemporaryDirectory() as folder:
            config(case.family, given.tiny).save_pretrained(folder)
            told = predicted(case, folder)
            measured = _in_own_process(name, folder, given.tiny)
        parts = told["parts"]
        step = told["peak"] - parts["weights"] - parts["adapter"]
        found[name] = {"predicted": step, **measured, **told}
        taken, files = measured["measured"], measured["files"]
        sizes = [f"{size / 1e6:,.1f}" for size in (step, taken, files)]
        sizes.insert(2, f"{step / taken:.3f}")
        rows.append([name, *sizes, *(f"{parts[part] / 1e6:,.0f}" for part in SHOWN)])
    columns = ["configuration", "step, predicted (MB)", "measured", "ratio", "code read in", *SHOWN]
    report = Report("Planned and measured peak memory of a training step", setting())
    report.table("Above the loaded model, fp32; parts in MB at the planned peak", columns, rows)
    report.write(given.markdown)
    write_json(given.json, found)


def _case(name: str, tiny: bool) -> Case:
    case = CASES[name]
    if not tiny:
        return case
    method = case.method
    for long, short in TINY.items():
        method = method.replace(long, short)
    return Case(case.family, method, 2, 8, case.settings)


def _in_own_process(name: str, folder: str, tiny: bool) -> dict[str, int]:
    words = [sys.executable, __file__, "--child", name, folder, *(["--tiny"] if tiny else [])]
    env = {**os.environ, **ENV, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
