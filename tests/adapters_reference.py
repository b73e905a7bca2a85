"""Writes adapters_reference.json: what the `adapters` library computes on two tiny models.

It wants an older transformers, so it runs in an environment of its own:

    pip install adapters==1.3.0 torch && python tests/adapters_reference.py

Every number of the models and of the adapters is a function of its name, so that the tests can make
the same ones without the library.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".json")
# Our recipe for each of the library's configurations that are tried.
RECIPES = {
    "double_seq_bn": "SerialAdapter(reduction=2)",
    "seq_bn": "SerialAdapter(style='pfeiffer', reduction=2)",
    "par_bn": "ParallelAdapter(bottleneck=4, reads='residual')",
    "compacter": "Compacter(reduction=2, p=2)",
    "stack": "SerialAdapter(style='pfeiffer', reduction=2)",  # two of them
}


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers between ±0.3 that depend on a name only."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (0.3 * torch.sin(1.7 * steps + zlib.crc32(name.encode()) % 1000)).view(shape)


def bert() -> nn.Module:
    """A BERT encoder: every layer ends in a norm."""
    config = tf.BertConfig(
        vocab_size=16, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=8,
    )  # fmt: skip
    return filled(tf.BertModel(config, add_pooling_layer=False))


def gpt2() -> nn.Module:
    """A GPT-2: every part of a layer starts with a norm."""
    config = tf.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=1, eos_token_id=2
    )
    return filled(tf.GPT2Model(config))


def filled(model: nn.Module) -> nn.Module:
    """The model in evaluation, its numbers made from their names."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = name.endswith("weight") and p.dim() == 1
            p.copy_(wave(name, tuple(p.shape)) + norm)
    return model.eval()


def batch() -> Tensor:
    """Ids of two texts of four words."""
    return torch.tensor([[3, 7, 1, 14], [9, 2, 2, 11]])


def reference(make: Any, config: str) -> list[float]:
    """The last hidden state with filled adapters of a configuration active."""
    import adapters
    from adapters.composition import Stack

    model: Any = make()
    adapters.init(model)
    known = adapters.ADAPTER_CONFIG_MAP["seq_bn" if config == "stack" else config]
    change = {"compacter": {"phm_dim": 2}}.get(config, {})
    names = ["a", "b"] if config == "stack" else ["a"]
    for name in names:
        model.add_adapter(name, config=known.replace(reduction_factor=2, **change))
    model.set_active_adapters(Stack(*names) if len(names) > 1 else "a")
    with torch.no_grad():
        for path, p in model.named_parameters():
            if key := _key(path):
                p.copy_(wave(key, tuple(p.shape)))
        model.eval()
        return model(batch()).last_hidden_state.flatten().tolist()


def _key(path: str) -> str | None:
    """Adapter, layer, place and our name of one of the library's tensors."""
    words = path.split(".")
    if path.endswith("phm_rule"):
        return f"{words[-2]}/rule"
    if "adapters" not in words:
        return None
    name = words[words.index("adapters") + 1]
    layer = next(word for word in words if word.isdigit())
    place = "attention" if "attention" in path else "ffn"
    side = "down" if "adapter_down" in words else "up"
    leaf = {"weight": "", "bias": "_bias", "b": "_bias", "W_left": "_u", "W_right": "_v"}
    return f"{name}/{layer}/{place}/{side}{leaf[words[-1]]}"


if __name__ == "__main__":
    found = {
        f"{make.__name__}-{config}": [round(value, 7) for value in reference(make, config)]
        for make in (bert, gpt2)
        for config in RECIPES
    }
    FILE.write_text(json.dumps(found) + "\n")
