"""The models that are measured: built from configurations, random weights, no download."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Size:
    """Widths of a model and of its batch."""

    hidden: int = 512
    layers: int = 8
    intermediate: int = 1408
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 32_000
    batch: int = 4
    length: int = 256


SIZES = {
    "default": Size(),
    "small": Size(hidden=256, layers=4, intermediate=704, heads=4, kv_heads=2, vocabulary=8_000),
    "tiny": Size(32, 2, 64, heads=4, kv_heads=2, vocabulary=128, batch=2, length=8),
}


def llama(size: Size, dtype: torch.dtype) -> nn.Module:
    """A decoder with grouped queries and an untied head over the vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=size.intermediate,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2 * size.length + 64,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return nn.Module.to(LlamaForCausalLM(config), dtype).train()


def bert(size: Size, dtype: torch.dtype, dropout: float = 0.0) -> nn.Module:
    """An encoder with a classification head of 4 classes; BERT's own dropout would be 0.1."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        intermediate_size=4 * size.hidden,
        num_attention_heads=size.heads,
        vocab_size=size.vocabulary,
        max_position_embeddings=2 * size.length + 64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    config.num_labels = 4
    return nn.Module.to(BertForSequenceClassification(config), dtype).train()


FAMILIES: dict[str, Callable[[Size, torch.dtype], nn.Module]] = {
    "llama": llama,
    "bert": bert,
    "bert-dropout": partial(bert, dropout=0.1),
}


def batch(family: str, size: Size) -> dict[str, Tensor]:
    """Random ids, with the ids themselves (llama) or random classes as labels."""
    torch.manual_seed(1)
    ids = torch.randint(0, size.vocabulary, (size.batch, size.length))
    labels = ids if family == "llama" else torch.randint(0, 4, (size.batch,))
    types = {"token_type_ids": torch.zeros_like(ids)} if family != "llama" else {}
    return {"input_ids": ids, "labels": labels, **types}
