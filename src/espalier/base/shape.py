"""The base decoder's shape: Llama-like, with biases, small enough to be shipped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from espalier.base.tokenizer import END_ID, PAD_ID

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Shape:
    """Size of the decoder; the defaults are the shipped one."""

    vocab: int = 2048
    hidden: int = 160
    layers: int = 6
    heads: int = 5
    inner: int = 416
    positions: int = 256


def make_model(shape: Shape, seed: int) -> LlamaForCausalLM:
    """Return a freshly initialised decoder in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.positions,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)
