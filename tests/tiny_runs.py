"""Tiny tokenizers, models and rows for the tests of training; a word-level vocabulary of 64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

GOOD, BAD = ["good", "fine", "nice", "lovely", "great"], ["bad", "poor", "awful", "sad", "dull"]
PLAIN = ["the", "a", "film", "day", "book", "was", "is", "very", "quite", "and", "it", "we", "saw"]
NUMBERS = [str(n) for n in range(10)]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "</s>", *GOOD, *BAD, *PLAIN, *NUMBERS]
SIZE = 64


def tokenizer(kind: str = "bert") -> Any:
    """A word-level tokenizer with BERT's frame around texts, or with an end token only."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCAB)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special: dict[str, Any] = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "</s>"}
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
        special |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    if kind == "t5":
        inner.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 4)]
        )
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def bert(head: str = "SequenceClassification", dropout: float = 0.0, **settings: Any) -> Any:
    """A tiny random BERT with one of transformers' heads."""
    torch.manual_seed(3)
    config = tf.BertConfig(
        vocab_size=SIZE,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
        **settings,
    )
    return getattr(tf, f"BertFor{head}")(config)


def gpt2() -> Any:
    """A tiny random GPT-2."""
    torch.manual_seed(3)
    config = tf.GPT2Config(
        vocab_size=SIZE, n_embd=32, n_layer=2, n_head=4, n_positions=48, bos_token_id=4,
        eos_token_id=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, initializer_range=0.2,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def llama() -> Any:
    """A tiny random Llama with grouped heads."""
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=SIZE, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=4, eos_token_id=4, pad_token_id=0, initializer_range=0.2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


def t5() -> Any:
    """A tiny random T5."""
    torch.manual_seed(3)
    config = tf.T5Config(
        vocab_size=SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, dropout_rate=0,
        pad_token_id=0, eos_token_id=4, decoder_start_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config)


def _words(i: int, kind: list[str]) -> str:
    many = [PLAIN[(i * k + 3) % len(PLAIN)] for k in range(1, 3 + i % 6)]
    return " ".join([*many, kind[i % len(kind)], PLAIN[i % 7]])


def reviews(count: int = 48) -> list[dict[str, Any]]:
    """Texts with label good or bad, by one word in each."""
    kinds = {"good": GOOD, "bad": BAD}
    return [
        {"text": _words(i, kinds[label]), "label": label}
        for i in range(count)
        for label in (["good", "bad"][i % 2],)
    ]


def sums(count: int = 48) -> list[dict[str, Any]]:
    """Prompts with a completion that follows from them."""
    return [
        {"prompt": f"{a} and {b} is", "completion": f" {max(a, b)} {min(a, b)}"}
        for i in range(count)
        for a, b in [(i % 10, (i * 7 + i // 10) % 10)]
    ]


def save_model(folder: Path, model: Any, words: Any) -> str:
    """The model and tokenizer as a folder to train from."""
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)
