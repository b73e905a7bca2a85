"""How a model keeps the texts of a packed row apart: learned by trial, not by its name.

    segments    attention goes through transformers' table: each text by itself, no mask at all
    positions   positions that start anew say where a text starts, and transformers masks the others
    mask        a mask (B, 1, T, T) that shows a token its own text up to itself

On a GPU `positions` comes first: there the model's own attention is the better one. A way is taken
if the texts of a packed row give what they give alone, and if changing one text changes nothing in
the next; one of the two texts tried is as long as the longest row, so that windows and chunks show.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from espalier.tasks import Example

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

Sizes = Sequence[Sequence[int]]
Way = Literal["segments", "positions", "mask"]
LEAK = 1e-4
"""Change of a text's logits, in their standard deviations, where another text changes."""
OTHER = {"float32": 1e-2, "float64": 1e-2}
"""Difference to the logits of the text alone that rounding may explain; 0.3 in 16 bits."""
FIRST = 3  # tokens of the first text tried


@dataclass(frozen=True)
class Separation:
    """A way that works with a model, and what the model is to be given for it."""

    way: Way
    positions: bool  # whether the model takes position_ids
    dtype: torch.dtype  # of a mask

    def batch(self, given: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
        """A collated batch of packed rows as this model needs it; `sizes` of the texts by row."""
        import torch

        given = dict(given)
        if self.way == "mask":
            number = _numbers(sizes, given["input_ids"].shape[1])
            seen = (number[:, :, None] == number[:, None]).tril_()
            mask = torch.zeros(seen.shape, dtype=self.dtype)
            given["attention_mask"] = mask.masked_fill_(~seen, torch.finfo(self.dtype).min)[:, None]
        if not self.positions:
            del given["position_ids"]
        return given

    def holding(self, model: Any, sizes: Sizes) -> contextlib.AbstractContextManager[None]:
        """Passes over packed rows of these sizes, and their backward."""
        if self.way != "segments":
            return contextlib.nullcontext()
        from espalier.fast import segments

        return segments.holding(model, sizes)


def sizes_of(examples: Sequence[Example]) -> list[list[int]]:
    """Tokens of each text of packed rows."""
    import itertools

    return [[len(list(part)) for _, part in itertools.groupby(e["segments"])] for e in examples]


def separation(
    model: PreTrainedModel, longest: int = 12, *, whole_graphs: bool = False
) -> Separation | str:
    """How this model keeps texts apart, or why it does not.

    Args:
        model: A decoder, with what is attached to it.
        longest: Tokens of the longest packed row.
        whole_graphs: Leave out the way that tells texts apart in Python, for compiled models.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder; packing is for decoders"
    device = next(model.parameters()).device
    ways: list[Way] = ["segments", "positions"]
    flash = "flash" in (getattr(model.config, "_attn_implementation", None) or "")
    if device.type != "cpu" or flash:
        ways.reverse()
    ways = [way for way in (*ways, "mask") if not (whole_graphs and way == "segments")]
    takes = "position_ids" in inspect.signature(model.forward).parameters
    for way in ways:
        found = Separation(way, takes, model.dtype)
        if (takes or way != "positions") and _works(model, found, longest):
            return found
    return f"{name} lets the segments of a packed row see each other"


def _works(model: PreTrainedModel, how: Separation, longest: int) -> bool:
    """Whether two texts give the same together as alone, and the first changes no second."""
    import torch

    second = max(longest - FIRST - 1, FIRST + 1)
    device = next(model.parameters()).device
    known = max(2, int(model.config.get_text_config().vocab_size))
    words = torch.arange(FIRST + second, device=device) % known
    other = torch.cat([(words[:FIRST] + FIRST) % known, words[FIRST:]])
    texts = words.split([FIRST, second])
    with _as_trained(model, texts[1]):
        try:
            one, two = (_packed(model, how, row, [FIRST, second]) for row in (words, other))
        except Exception:  # out of the model's own code: these inputs are none that it takes
            return False
        alone = torch.cat([_logits(model, input_ids=text[None]) for text in texts])
    scale = float(alone.std())
    allowed = OTHER.get(str(model.dtype).removeprefix("torch."), 0.3)
    return bool(
        (one - two)[FIRST:].abs().max() <= LEAK * scale
        and (one - alone).abs().max() <= allowed * scale
    )


def _packed(model: Any, how: Separation, words: Tensor, sizes: list[int]) -> Tensor:
    """Logits of one row, whose last token is padding."""
    import torch

    ids = torch.cat([words, words[:1]])[None]
    positions = torch.cat([torch.arange(size) for size in (*sizes, 1)])[None]
    batch = how.batch({"input_ids": ids, "position_ids": positions}, [sizes])
    with how.holding(model, [sizes]):
        return _logits(model, **{k: v.to(ids.device) for k, v in batch.items()})[:-1]


def _logits(model: Any, **given: Tensor) -> Tensor:
    return model(**given, use_cache=False).logits[0].detach().float()


@contextlib.contextmanager
def _as_trained(model: Any, text: Tensor) -> Iterator[None]:
    """Training mode, or evaluation where that is random; every module's own mode afterwards."""
    import torch

    training = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng(devices=[]):
            model.train()
            once, again = (_logits(model, input_ids=text[None]) for _ in range(2))
            if not torch.equal(once, again):
                model.eval()
            yield
    finally:
        for module, flag in training.items():
            module.training = flag


def _numbers(sizes: Sizes, width: int) -> Tensor:
    """The number of the text that each token belongs to (B, T); -1 in padding."""
    import torch

    out = torch.full((len(sizes), width), -1)
    for row, some in zip(out, sizes, strict=True):
        row[: sum(some)] = torch.repeat_interleave(torch.tensor(some))
    return out
