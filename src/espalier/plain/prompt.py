"""Soft prompts: where they stand, how their rows start. L rows, D wide, V words in a vocabulary.

Rows live where the word embedding's output does: a row that equals an embedded word is that word,
also where a model multiplies its embeddings on the way out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import init

from espalier import hosts
from espalier.deltas import Delta, Tensors, Trained
from espalier.errors import SettingError, SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites

FREQUENT = 5000  # ids from which rows are drawn; vocabularies list frequent words first
Gaps = tuple[int, int, int]
Start = Callable[[Tensor], object]


class Prompt(Delta):
    """Rows P (L, D) that stand for L words."""

    embeds = True

    def __init__(self, site: Site, gaps: Gaps, start: Start | None) -> None:
        super().__init__(site, prompt=Trained((sum(gaps), site.n_out), start))
        self.gaps = gaps

    def embed(self, t: Tensors, training: bool) -> Tensor:
        """The rows."""
        return t["prompt"]


def prompt_site(model: nn.Module, places: Sites) -> Site:
    """Where the words of a prompt enter: the word embedding, or the first block of images.

    Of an encoder and a decoder it is the encoder's.

    Raises:
        SiteError: The model embeds no words and has no blocks of images.
    """
    whole = places.whole
    words = [s for s in whole if s.role == "embedding" and s.kind == "embedding"]
    blocks = [s for s in whole if s.role == "block"]
    sides = {s.stack for s in blocks}
    if {"encoder", "decoder"} <= sides:
        words = [s for s in words if s.stack == "encoder"]
    if words:
        return words[0]
    images = [s for s in blocks if s.stack == "vision"]
    attends = any(s.role.startswith("attention") and s.stack == "vision" for s in whole)
    if attends and len({s.n_out for s in images}) == 1:
        return replace(images[0], layer=None)
    what = "its encoder reads no words" if "decoder" in sides else "it embeds no words"
    raise SiteError(
        f"a prompt cannot enter {places.notes.model}: {what}"
        + (", and its blocks of images do not attend, or differ in width" if images else "")
    )


def gaps_of(length: int, template: Sequence[int]) -> Gaps:
    """How many words stand in each gap: all before the text unless a template says otherwise."""
    if not template:
        return length, 0, 0
    before, between, after = template
    return before, between, after


def is_template(template: object) -> bool:
    """Whether this is no template, or three whole numbers that are not all 0."""
    if not isinstance(template, tuple) or len(template) not in (0, 3):
        return False
    counts = [n for n in template if type(n) is int and n >= 0]
    return len(counts) == len(template) and (not template or sum(counts) > 0)


# ------------------------------------------------------------------------------- how rows start


def uniform(view: Tensor) -> None:
    """Uniform in ±½, the paper's; official code draws from [0, ½)."""
    init.uniform_(view, -0.5, 0.5)


def of_vocabulary(model: nn.Module, places: Sites, site: Site) -> Start:
    """Rows of different frequent words, drawn at random.

    Images have no words: their rows start uniform in ±√(6 / (D_patch + D)) (VPT, 2203.12119).
    """
    if site.kind == "embedding":
        return lambda view: view.copy_(_drawn(model, site, len(view)))
    patches = [s for s in places.whole if s.conv is not None and s.stack == site.stack]
    fan_in = sum(s.n_in * math.prod(s.conv.kernel) for s in patches[:1] if s.conv)
    bound = math.sqrt(6 / (fan_in + site.n_out))
    return lambda view: init.uniform_(view, -bound, bound)


def of_text(model: nn.Module, site: Site, text: str | Sequence[int]) -> Start:
    """Rows of a text's words, cut to L, or from the beginning again where they are fewer."""

    def start(view: Tensor) -> None:
        ids = _ids(model, site, text)
        view.copy_(embedded(model, site, [ids[i % len(ids)] for i in range(len(view))]))

    return start


def of_labels(model: nn.Module, site: Site, labels: Sequence[str | Sequence[int]]) -> Start:
    """A row for each label, the mean of its words; the rest as `of_vocabulary` has them."""

    def start(view: Tensor) -> None:
        view.copy_(_drawn(model, site, len(view)))
        for row, label in zip(view, labels, strict=False):
            row.copy_(embedded(model, site, _ids(model, site, label)).mean(0))

    return start


def embedded(model: nn.Module, site: Site, ids: Sequence[int]) -> Tensor:
    """Rows (n, D) of the base's words as they leave the embedding, in fp32."""
    host = base_modules(model)[site.path]
    where = next(host.parameters()).device
    with torch.no_grad(), hosts.gathered(host):
        return type(host).forward(host, torch.tensor(list(ids), device=where)).float()


def _drawn(model: nn.Module, site: Site, length: int) -> Tensor:
    special = {i for ids in special_ids(model).values() for i in ids}
    ids = torch.tensor([i for i in range(min(FREQUENT, site.n_in)) if i not in special])
    order = torch.randperm(len(ids))
    return embedded(model, site, ids[order[torch.arange(length) % len(ids)]].tolist())


def special_ids(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The ids that the configuration gives a meaning, by the name that it gives them."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = {name: getattr(text, name) for name in dir(text) if name.endswith("_token_id")}
    return {
        name: tuple(value) if isinstance(value, list | tuple) else (int(value),)
        for name, value in found.items()
        if value is not None
    }


def _ids(model: nn.Module, site: Site, words: str | Sequence[int]) -> list[int]:
    """Token ids of a text, by the model's own tokenizer where they are not given as such.

    Raises:
        SettingError: No tokenizer is found, there are no words, or an id is not the model's.
    """
    if site.kind != "embedding":
        raise SettingError("images have no words to start from; use init='vocabulary' or 'random'")
    given = words
    if isinstance(words, str):
        words = _tokenizer(model)(words, add_special_tokens=False).input_ids
    ids = [int(i) for i in words]
    if not ids or not all(0 <= i < site.n_in for i in ids):
        raise SettingError(f"{given!r} gives the ids {ids}; at least one of 0 to {site.n_in - 1}")
    return ids


def _tokenizer(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingError(
            f"to start a prompt from words takes a tokenizer, and none is found under the model's "
            f"name {name!r}; give token ids instead, as in text=tokenizer(...).input_ids"
        ) from error
