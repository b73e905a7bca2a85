"""Which rows of a fused linear are whose.

Nothing is cut into thirds on trust: a layout comes from the class of the module that holds the host
(`grammar.FUSED`), widths from that module's attributes or its config, and the sum must come out.
"""

from __future__ import annotations

from typing import Any

from espalier import grammar
from espalier.places import Rows


def rows(owner: Any, part: str, n_out: int) -> tuple[Rows, ...] | None:
    """The rows of each slice of a fused host, in the order of `grammar.SLICES`, or None."""
    classes = _classes(owner)
    layout = next((grammar.FUSED[name] for name in classes if name in grammar.FUSED), None)
    heads = _count(owner, "num_heads", "num_attention_heads", "n_heads", "n_head") or 1
    if part == "kv" and hasattr(owner, "qk_nope_head_dim"):
        # Latent attention: per head the position-free part of its key, then its value.
        return _cut(heads, (owner.qk_nope_head_dim, owner.v_head_dim), n_out)
    if layout is None or (layout == "grouped" and part != "qkv"):
        return None
    if part != "qkv":
        halves = _cut(1, (n_out // 2, n_out // 2), n_out)
        return halves[::-1] if halves and layout == "swapped" else halves
    kv = _count(owner, "num_kv_heads", "num_key_value_heads", "kv_heads") or heads
    if not grammar.ONE_EACH.isdisjoint(classes):
        kv = heads
    size = n_out // (heads + 2 * kv)
    stated = _count(owner, "head_dim", "head_size", "attention_head_size")
    if stated and heads > 1 and stated != size:
        return None
    if layout == "grouped":
        return _cut(kv, (heads // kv * size, size, size), n_out)
    return _cut(1, (heads * size, kv * size, kv * size), n_out)


def why_not(owner: Any, n_out: int) -> str:
    """Why `rows` found none."""
    name = type(owner).__name__
    if any(known in grammar.FUSED for known in _classes(owner)):
        return f"the head counts found on {name} do not explain {n_out} rows"
    return f"how {name} lays out its rows is not known"


def _classes(owner: Any) -> list[str]:
    # Only transformers' and diffusers' own: the same name elsewhere may mean another layout.
    prefix = {"transformers": "", "diffusers": "diffusers."}
    homes = ((c.__name__, c.__module__.partition(".")[0]) for c in type(owner).__mro__)
    return [prefix[home] + name for name, home in homes if home in prefix]


def _cut(groups: int, sizes: tuple[int, ...], n_out: int) -> tuple[Rows, ...] | None:
    width = sum(sizes)
    if groups * width != n_out:
        return None
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return tuple(Rows(groups, width, a, a + s) for a, s in zip(starts, sizes, strict=True))


def _count(owner: Any, *names: str) -> int | None:
    for holder in (owner, getattr(owner, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return None
