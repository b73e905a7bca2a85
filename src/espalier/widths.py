"""What names leave open in a feed-forward part, and widths decide: whether it has a gate, where."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Named(Protocol):
    """A host with the role that its name gave it."""

    role: str
    n_in: int
    n_out: int


def settle(parts: Iterable[list[Named]]) -> None:
    """Correct the roles of the linears of each feed-forward part, in place."""
    for part in parts:
        _settle_numbered(part)
        named = {host.role[4:]: host for host in part}
        if "gate" in named and "in" not in named:
            named["gate"].role = "ffn.in"  # a w1 without a w3
        elif "gate" not in named and "out" in named:
            inner = named["out"].n_in
            for name, host in named.items():
                if name != "out":
                    both = host.n_out == 2 * inner
                    host.role = "ffn.gate_in" if both else "ffn.in"


def _settle_numbered(part: list[Named]) -> None:
    """Of two layers that go in side by side, known by number only, the first is the gate."""
    first = next((host for host in part if host.role == "ffn.in"), None)
    if first is None or first.n_in == first.n_out or len(part) != 3:
        return
    alike = [h for h in part if (h.n_in, h.n_out) == (first.n_in, first.n_out)]
    if len(alike) == 2:
        first.role, alike[1].role = "ffn.gate", "ffn.in"
