"""Attention within the texts of packed rows: each text by itself, so that no mask is ever made.

    rows   [ a a a a | b b | c c c ]        work a² + b² + c², not (a + b + c)²

While sizes are held, the configuration of each attention names our function in transformers' table.
Under a name for which the table of masks has no entry, transformers makes no mask; our function
splits queries, keys and values by the sizes and gives what the model's own function would give with
a mask of blocks. Padding at a row's end gets zeros. What it cannot do it refuses, so that a trial
on the model (`espalier.data.separation`) finds out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.attention import StandIn
from espalier.errors import SiteError
from espalier.fast import switch
from espalier.fast.attention import batched

NAME = "espalier-segments"  # ours in the table
Sizes = Sequence[Sequence[int]]
_REFUSED = ("position_bias", "softcap", "s_aux", "cache", "sinks")

_held: Sizes | None = None


def held() -> Sizes | None:
    """The sizes of the texts in each row of the pass that is under way, or None."""
    return _held


@contextmanager
def holding(model: nn.Module, sizes: Sizes) -> Iterator[None]:
    """Passes over packed rows, and their backward, with attention within the texts alone.

    Args:
        model: A transformers model whose attention goes through the table of functions.
        sizes: Tokens of each text, by row; what is left of a row is padding.
    """
    global _held
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    configs = _configs(model)
    before = [config._attn_implementation for config in configs]
    outer, _held = _held, sizes
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        _held = outer
        for config, name in zip(configs, before, strict=True):
            config._attn_implementation = name


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that name an attention, those that hold others first."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        config = config.config if isinstance(config, StandIn) else config
        if hasattr(config, "_attn_implementation"):
            found.setdefault(id(config), config)
    return list(found.values())


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers finds under our name: (B, T, h, d_v), and no shares.

    Args:
        module: The attention module.
        query: (B, h, T, d).
        key: (B, h_kv, T, d); each head serves h / h_kv heads of queries.
        value: (B, h_kv, T, d_v).
        attention_mask: None.
        dropout: The share of attention weights that is dropped.
        scaling: What scores are multiplied with; d^-½ if None.
        sliding_window: How many keys, its own too, a query sees at most.
        **kwargs: What other functions take; what changes scores is refused.

    Raises:
        SiteError: The call is not causal attention of the texts that are held.
    """
    sizes = _held
    _refuse(module, query, key, attention_mask, sizes, kwargs)
    assert sizes is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = zip(query.unbind(0), key.unbind(0), value.unbind(0), sizes, strict=True)
    out = [
        _row(q, k, v, some, dropout if module.training else 0.0, scale, sliding_window)
        for q, k, v, some in rows
    ]
    return torch.stack(out), None


def _refuse(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    sizes: Sizes | None,
    kwargs: Mapping[str, Any],
) -> None:
    stated = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if stated is None else stated
    other = [name for name in _REFUSED if kwargs.get(name) is not None]
    if not causal or mask is not None or other or kwargs.get("output_attentions"):
        why = f"it is given {', '.join(other)}" if other else "it is not plain causal attention"
    elif sizes is None or len(sizes) != len(query):
        why = "the rows are not those whose texts are held"
    elif key.shape[2] != query.shape[2]:
        why = "there are other keys than the text's"
    else:
        return
    raise SiteError(f"{type(module).__name__} cannot attend within packed texts: {why}")


def _row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sizes: Sequence[int],
    dropout: float,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attention of one row, (h, T, d): (T, h, d_v).

    Split, not sliced: the backward of slices would fill a whole row for each text.
    """
    rest = q.shape[1] - sum(sizes)
    parts = [*sizes, rest] if rest else list(sizes)
    parted = zip(q.split(parts, 1), k.split(parts, 1), v.split(parts, 1), strict=True)
    texts = [(q[None], k[None], v[None]) for q, k, v in parted][: len(sizes)]
    out = [_text(q, k, v, dropout, scale, window) for q, k, v in texts]
    if rest:
        out.append(v.new_zeros(rest, q.shape[0], v.shape[-1]))
    return torch.cat(out)


def _text(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float, window: int | None
) -> Tensor:
    """Causal attention of one text, (1, h, t, d): (t, h, d_v)."""
    size = q.shape[2]
    windowed = window is not None and window < size
    plain = q.is_cpu and q.dtype == torch.bfloat16 and switch.enabled()
    if plain and not (dropout or windowed):
        return batched(q, k, v, None, scale, True)[0]
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    mask = None
    if windowed:
        seen = torch.ones(size, size, dtype=torch.bool, device=q.device)
        mask = seen.tril_().triu_(1 - window)  # type: ignore[operator]
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None and size > 1, scale=scale
    )
    return y[0].transpose(0, 1)
