"""One encoder, three adapters of three methods, three kinds of answer to one mail; offline.

    pip install -e ".[demo]"
    python examples/one_base_three_tasks.py

What is a customer's mail (complaint, enquiry, thanks)? Which order and which problems does it name?
How urgent is it? Each question is a task of its own with an adapter and a head of its own, trained
by itself. Then the encoder is loaded once, with all three, and answers mails of the kinds that no
adapter was trained on (customer_mails.py says how they are made).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from customer_mails import mails
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import TokenClassifierOutput

import espalier as esp
from espalier.generation import Adapted, predict
from espalier.shipped import demo_model
from espalier.tasks import Row, Task, task_from_extras

NEW_MAILS = (
    "Hi, my order #70713 came today and the teapot is in pieces. I need a new one by Saturday!",
    "Good morning, do you have the reading lamp in black as well? No rush. Regards, Ann",
    "Thanks so much, the new jacket fits and K-55120 was here in two days.",
)


@dataclass(frozen=True)
class Question:
    """What is asked of a mail, how it is learned, and how well it is answered."""

    task: str
    columns: Mapping[str, str]
    method: esp.Method
    lr: float
    measure: str


QUESTIONS = {
    "kind": Question(
        "classification", {"text": "text", "label": "kind"}, esp.IA3(), 1e-2, "accuracy"
    ),
    "details": Question(
        "tokens", {"tokens": "tokens", "tags": "tags"}, esp.LoRA(rank=8), 2e-3, "f1"
    ),
    "urgency": Question(
        "regression",
        {"text": "text", "label": "urgency"},
        esp.SerialAdapter(style="pfeiffer"),
        2e-3,
        "spearman",
    ),
}


class OneBase(nn.Module):
    """The encoder, once, and a head whose numbers every adapter brings for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(demo_model())
        self.classifier = nn.Linear(self.bert.config.hidden_size, 1)
        self.tokenizer = AutoTokenizer.from_pretrained(demo_model())
        self.tasks: dict[str, Task] = {}
        self.folders: dict[str, Path] = {}
        self.by_word = False
        self.eval()

    def forward(self, **inputs: torch.Tensor) -> TokenClassifierOutput:
        """Logits of the active adapter: (B, T, classes) where it answers by word, else (B, …)."""
        found = self.bert(**inputs)
        read = found.last_hidden_state if self.by_word else found.pooler_output
        return TokenClassifierOutput(logits=self.classifier(read))

    def take(self, name: str, folder: Path) -> None:
        """Load an adapter beside those that are here."""
        card = esp.read_card(folder)
        self.tasks[name] = task_from_extras(card["extras"])
        self.folders[name] = folder
        esp.load(self, folder, name)

    def answer(self, name: str, rows: list[dict[str, Any]]) -> list[Any]:
        """What one adapter says to each mail. Switching is one assignment; nothing is loaded."""
        task = self.tasks[name]
        esp.activate(self, name)
        self.by_word = task.name == "tokens"
        read = [task.read(Row(row, f"mail {i}"), labelled=False) for i, row in enumerate(rows, 1)]
        card = esp.read_card(self.folders[name])
        at = Adapted(self.folders[name], self, self.tokenizer, task, card)
        return [found["prediction"] for found in predict(at, read)]
