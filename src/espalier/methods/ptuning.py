"""P-tuning (Liu et al. 2021, arXiv 2103.10385): a small network makes the words of a prompt.

    P = W₂ relu(W₁ LSTM(E) + b₁) + b₂,   E (L, D), LSTM of 2 layers in both directions, 2M wide,
                                         W₁ (2M, 2M), W₂ (D, 2M)
    P = W₂ relu(W₁ E + b₁) + b₂          with encoder="mlp"; W₁ (M, D), W₂ (D, M)

The network sees all words at once, so that neighbours learn together; `esp.to_plain` drops it and
keeps P. This is the paper's network of its LAMA experiments (M = D / 2, all tensors of it count
8,278,272 at D = 768 and L = 9, of which P keeps 6,912). The paper's few-shot experiments train the
language model as well: add a method that does, as in `PTuning() + FullTuning()`.

A template puts words before the text, between its two segments and after it: (3, 3, 3) is the
paper's. Real words between them, its anchors, are part of the text. Tensors start as PyTorch's
embeddings, LSTMs and linears do. A fresh prompt changes the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init

from espalier.deltas import Delta, Tensors, Trained
from espalier.errors import SettingError
from espalier.places import Site, Sites
from espalier.plain.prompt import Gaps, gaps_of, is_template, prompt_site
from espalier.recipes import Method, check, recipe

ENCODERS = ("lstm", "mlp")
_LAYERS, _SIDES = 2, ("forward", "backward")


@dataclass(frozen=True)
class PTuning(Method):
    """Words before, within or after the text, made by a network while they train.

    Args:
        length: L, words before the text.
        encoder: The network: "lstm", followed by two linears, or the two linears alone, "mlp".
        hidden: M, the width of each direction of the LSTM (D / 2 if left out), or that between
            the linears (D).
        template: How many words stand before the text, between its two segments, and after it;
            their sum is L then. The second segment is what token types or the first separator say.
    """

    learning_rate: ClassVar[float] = 3e-4

    length: int = 20
    encoder: str = "lstm"
    hidden: int | None = None
    template: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check(self, "length", type(self.length) is int and self.length >= 1, "at least 1")
        check(self, "encoder", self.encoder in ENCODERS, f"one of {', '.join(ENCODERS)}")
        wide = self.hidden is None or (type(self.hidden) is int and self.hidden >= 1)
        check(self, "hidden", wide, "a whole number of at least 1, or left out")
        object.__setattr__(self, "template", tuple(self.template))
        check(self, "template", is_template(self.template), "three numbers, as in (3, 3, 3)")

    @property
    def identity(self) -> bool:
        """Never: every word of the text attends to those of the prompt."""
        return False

    @property
    def words(self) -> int:
        """L, the tokens by which the text must be shorter."""
        return sum(gaps_of(self.length, self.template))

    def plain(self, deltas: Sequence[Delta] = ()) -> Method:
        """The prompt without the network that made it."""
        gaps = {"length": self.words, "template": self.template}
        return recipe({"method": "PromptTuning", **gaps}).methods[0]

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """The prompt with its network, where words enter the model."""
        site, lstm = prompt_site(model, places), self.encoder == "lstm"
        if lstm and self.hidden is None and site.n_out % 2:
            raise SettingError(f"PTuning: half of the width {site.n_out} is no whole; give hidden")
        hidden = self.hidden or (site.n_out // 2 if lstm else site.n_out)
        return [MadePrompt(site, gaps_of(self.length, self.template), hidden, lstm)]


class MadePrompt(Delta):
    """Rows that a network makes of E (L, D)."""

    embeds = True

    def __init__(self, site: Site, gaps: Gaps, hidden: int, lstm: bool) -> None:
        width, inner = site.n_out, 2 * hidden if lstm else hidden
        own = _lstm(width, hidden) if lstm else {}
        enters = inner if lstm else width
        super().__init__(
            site,
            e=Trained((sum(gaps), width), init.normal_),
            **own,
            w1=_uniform((inner, enters), enters),
            b1=_uniform((inner,), enters),
            w2=_uniform((width, inner), inner),
            b2=_uniform((width,), inner),
        )
        self.gaps, self.weights = gaps, tuple(own)
        self.hidden = hidden

    def embed(self, t: Tensors, training: bool) -> Tensor:
        """The rows that the network makes now."""
        return self.plain(t)["prompt"]

    def plain(self, t: Tensors) -> Tensors:
        """The rows (L, D), which a `Prompt` serves."""
        x = t["e"]
        if self.weights:
            state = x.new_zeros(_LAYERS * len(_SIDES), 1, self.hidden)
            flat = [t[name] for name in self.weights]
            # In training mode always: cuDNN keeps what a backward pass needs in no other.
            x = torch.lstm(
                x.unsqueeze(0), (state, state), flat, True, _LAYERS, 0.0, True, True, True
            )[0].squeeze(0)
        return {"prompt": F.linear(F.linear(x, t["w1"], t["b1"]).relu(), t["w2"], t["b2"])}


def _lstm(width: int, hidden: int) -> dict[str, Trained]:
    """Weights and biases of the LSTM in the order in which PyTorch's takes them."""
    found: dict[str, Trained] = {}
    for layer in range(_LAYERS):
        enters = width if layer == 0 else 2 * hidden
        for side in _SIDES:
            name = f"{layer}_{side}"
            found[f"w_in_{name}"] = _uniform((4 * hidden, enters), hidden)
            found[f"w_state_{name}"] = _uniform((4 * hidden, hidden), hidden)
            found[f"b_in_{name}"] = _uniform((4 * hidden,), hidden)
            found[f"b_state_{name}"] = _uniform((4 * hidden,), hidden)
    return found


def _uniform(shape: tuple[int, ...], fan: int) -> Trained:
    bound = 1 / math.sqrt(fan)
    return Trained(shape, partial(init.uniform_, a=-bound, b=bound))
