"""One encoder, three adapters of three methods, three answers to one mail; offline.

    pip install -e ".[demo]"
    python examples/one_base_three_tasks.py

What is a customer's mail: complaint, enquiry or thanks? Which order and which problems does it
name? How urgent is it? Each is a task with an adapter and a head of its own, trained by itself.
Then the encoder is loaded once, takes all three, and answers mails made of sentences that no
adapter has seen (customer_mails.py writes them).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from customer_mails import baselines, mails
from torch import nn
from transformers import AutoModel
from transformers.modeling_outputs import TokenClassifierOutput

import espalier as esp
from espalier.generation import Adapted, predict
from espalier.shipped import demo_model
from espalier.tasks import Row, task_from_extras
from espalier.training.models import load_tokenizer

TASKS: dict[str, dict[str, Any]] = {  # as in config files; rates were chosen by validation mails
    "kind": {
        "task": "classification",
        "columns": {"text": "text", "label": "kind"},
        "method": "IA3()",
        "lr": 2e-2,
    },
    "details": {
        "task": "tokens",
        "columns": {"tokens": "tokens", "tags": "tags"},
        "method": "LoRA(rank=8)",
        "lr": 2e-3,
    },
    "urgency": {
        "task": "regression",
        "columns": {"text": "text", "label": "urgency"},
        "method": "SerialAdapter(style='houlsby')",
        "lr": 2e-3,
    },
}
MEASURES = {"kind": "accuracy", "details": "f1", "urgency": "spearman"}
NEW_MAILS = (
    "Hi, my order #70713 came today and the teapot is in pieces. I need a new one by Saturday!",
    "Good morning, do you have the reading lamp in black as well? No rush. Regards, Ann",
    "Thanks so much, the new jacket fits and order K-55120 was here in two days.",
)


class OneBase(nn.Module):
    """The encoder, loaded once, and a head whose numbers every adapter brings for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(demo_model())
        self.classifier = nn.Linear(self.bert.config.hidden_size, 1)
        self.by_word = False

    def forward(self, **inputs: torch.Tensor) -> TokenClassifierOutput:
        """Logits of the active adapter: (B, T, C) where it answers word by word, else (B, C)."""
        found = self.bert(**inputs)
        read = found.last_hidden_state if self.by_word else found.pooler_output
        return TokenClassifierOutput(logits=self.classifier(read))


def take(base: OneBase, folder: Path) -> Adapted:
    """Load a run's adapter beside those that the base holds, under the folder's name."""
    card = esp.read_card(folder)
    task = task_from_extras(card["extras"])
    # The adapter's head stands in for this one, which has to have its shape when it is loaded.
    width = len(task.labels) if task.labels else 1
    base.classifier.weight = nn.Parameter(torch.zeros(width, base.bert.config.hidden_size))
    base.classifier.bias = nn.Parameter(torch.zeros(width))
    esp.load(base, folder, folder.name)
    return Adapted(folder, base.eval(), load_tokenizer("demo-encoder"), task, card)


def answers(at: Adapted, rows: Sequence[dict[str, Any]]) -> list[Any]:
    """What one of the adapters says to each mail. Switching loads nothing."""
    esp.activate(at.model, at.folder.name)
    at.model.by_word = at.task.name == "tokens"
    read = [at.task.read(Row(row, "mail"), labelled=False) for row in rows]
    return [found["prediction"] for found in predict(at, read)]


def passages(words: Sequence[str], tags: Sequence[str]) -> str:
    """The order numbers and problems in a mail, from its words' tags."""
    found: list[str] = []
    for word, tag in zip(words, tags, strict=True):
        if tag.startswith("B-"):
            found.append(f"{tag[2:]} {word}")
        elif tag != "O" and found:
            found[-1] += f" {word}"
    return "; ".join(passage.rstrip(".,:!?") for passage in found) or "nothing named"


def learn(folder: Path, rows: dict[str, list[dict[str, Any]]], epochs: int) -> None:
    """Train each adapter by itself, as `espalier train` does; a run folder each."""
    for split, some in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    for name, settings in TASKS.items():
        print(f"{name}: {settings['method']} learns from {len(rows['train'])} mails", flush=True)
        files = {split: str(folder / f"{split}.jsonl") for split in rows}
        more = {
            "epochs": epochs,
            "batch": 8,
            "validation_share": 0,
            "out": folder / name,
            "quiet": True,
        }
        esp.train(esp.RunConfig(model="demo-encoder", **files, **settings, **more))


def table(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Scores on test mails beside what needs no network, and what each adapter takes."""
    titles = ("", "method", "measure", "score", "commonest", "words", "trained", "kept")
    line = "{:8} {:31} {:9} {:>6} {:>10} {:>6} {:>8} {:>8}".format
    print(f"\n{line(*titles)}")
    total = 0
    for name, settings in TASKS.items():
        result = json.loads((folder / name / "result.json").read_text())
        counted, measure = result["account"], MEASURES[name]
        scores = [result["metrics"]["test"][measure]]
        scores += baselines("tags" if name == "details" else name, rows["train"], rows["test"])
        total += (kept := size(folder / name / "adapter"))
        print(
            line(
                name,
                settings["method"],
                measure,
                *(f"{score:.2f}" for score in scores),
                f"{counted['trained'] + counted['head']:,}",
                f"{kept / 1e3:.0f} kB",
            )
        )
    copies = len(TASKS) * size(demo_model())
    print(
        f"\nKept for three tasks: {total / 1e6:.1f} MB of adapters, one base. "
        f"Three full copies: {copies / 1e6:.0f} MB, {copies / total:.0f} times as much."
    )


def size(folder: Path) -> int:
    """Bytes of the safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main(folder: Path, quick: bool) -> None:
    """Write mails, train three adapters, load them on one base, answer new mails."""
    rows = {
        "train": mails("train", 48 if quick else 600),
        "test": mails("test", 24 if quick else 300),
    }
    learn(folder, rows, 1 if quick else 3)
    table(folder, rows)
    base = OneBase()
    at = {name: take(base, folder / name) for name in TASKS}
    held = sum(p.nbytes for p in base.parameters())
    print(f"\nOne base with all three adapters is in memory: {held / 1e6:.0f} MB.")
    new = [{"text": mail, "tokens": mail.split()} for mail in NEW_MAILS]
    kinds, tags, urgencies = (answers(at[name], new) for name in TASKS)
    for row, kind, some, urgency in zip(new, kinds, tags, urgencies, strict=True):
        print(
            f"\n{row['text']}\n  → {kind}, urgency {urgency:.2f}; {passages(row['tokens'], some)}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Three adapters on one encoder, offline.")
    parser.add_argument("--quick", action="store_true", help="a few mails only, to see it run")
    parser.add_argument("--out", type=Path, help="keep the runs here, in a new folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as aside:
        out = given.out or Path(aside)
        out.mkdir(parents=True, exist_ok=True)
        main(out, given.quick)
