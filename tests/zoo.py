"""Tiny random models of the families that every method is tried on, with a batch for each.

Deliberately odd: Llama has fewer key than query heads, T5's heads do not multiply to its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 96


@dataclass(frozen=True)
class Case:
    """One family: how to make the model and a batch with labels."""

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    has_new_head: bool


def _seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(7)
        return build().eval()

    return make


def _ids(rows: int = 3, tokens: int = 9) -> Tensor:
    return torch.randint(5, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(1))


def _classes() -> Tensor:
    return torch.tensor([0, 2, 1])


def _text_classes() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "labels": _classes()}


def _words() -> dict[str, Tensor]:
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def _seq2seq() -> dict[str, Tensor]:
    return {"input_ids": _ids(), "labels": _ids(3, 5)}


def _images() -> dict[str, Tensor]:
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels, "labels": _classes()}


_LIKE_BERT = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "num_labels": 3,
}  # fmt: skip
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def bert() -> nn.Module:
    """A BERT classifier."""
    return tf.BertForSequenceClassification(tf.BertConfig(**_LIKE_BERT))


def gpt2() -> nn.Module:
    """A GPT-2: Conv1D hosts, fused qkv, tied embeddings."""
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=64, **_ENDS
    )
    return tf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    """A Llama with grouped-query attention and an untied head."""
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **_ENDS,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def t5() -> nn.Module:
    """A T5 whose heads multiply to 4·5 = 20, not to its width of 24."""
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=24, d_kv=5, d_ff=40, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def bart() -> nn.Module:
    """A BART: biases everywhere, scaled embeddings."""
    config = tf.BartConfig(
        vocab_size=VOCAB, d_model=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
        decoder_ffn_dim=40, max_position_embeddings=64, scale_embedding=True,
        decoder_start_token_id=2, forced_eos_token_id=2, **_ENDS,
    )  # fmt: skip
    return tf.BartForConditionalGeneration(config)


def vit() -> nn.Module:
    """A ViT classifier."""
    config = tf.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
        image_size=16, patch_size=8, num_labels=3,
    )  # fmt: skip
    return tf.ViTForImageClassification(config)


CASES = [
    Case("bert", _seeded(bert), _text_classes, True),
    Case("gpt2", _seeded(gpt2), _words, False),
    Case("llama", _seeded(llama), _words, False),
    Case("t5", _seeded(t5), _seq2seq, False),
    Case("bart", _seeded(bart), _seq2seq, False),
    Case("vit", _seeded(vit), _images, True),
]
BY_NAME = {case.name: case for case in CASES}


def undropped(model: nn.Module) -> nn.Module:
    """The model without any dropout of its own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The model's logits, without a graph."""
    with torch.no_grad():
        return model(**batch).logits


def train(model: nn.Module, batch: dict[str, Tensor], steps: int = 3, rate: float = 1e-2) -> float:
    """A few optimiser steps on one batch through the public face; returns the last loss."""
    import espalier as esp

    optimiser = torch.optim.AdamW(esp.parameters(model), lr=rate)
    esp.Lifecycle(model, steps).follow(optimiser)
    loss = torch.tensor(0.0)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimiser.step()
    return float(loss.detach())
