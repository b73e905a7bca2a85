"""A ladder beside a stack of blocks: narrow blocks that read what the trunk's give, detached.

    u₀ = D₀ h₀,   uᵢ = blockᵢ(μᵢ uᵢ₋₁ + (1 − μᵢ) Dᵢ hᵢ),   out = U drop(norm(u_L)),   μᵢ = σ(aᵢ/T)

h₀ (B, T, d) enters the stack and hᵢ leaves its block i; Dᵢ (d/r, d), U (d, d/r), a (L,). `out`
takes the place of what ends the stack. An encoder that a decoder reads has no U: the trunk's
decoder goes on reading the trunk's encoder, and the side's decoder the side's encoder.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from espalier.caches import cache_in
from espalier.deltas import Batch, Call, Delta, Tensors, Trained
from espalier.errors import AdapterError
from espalier.places import Site
from espalier.plain.ladder_prune import Pruning
from espalier.plain.ladder_side import SideBlock, buffered, handed_on, places_in


class Bridge:
    """What a side encoder gave, for the side decoder, which may run much later and more often.

    `generate` calls the encoder alone and gives the decoder its states repeated for each beam, so
    rows of the side's states are found by those of the trunk's states they belong to.
    """

    def __init__(self) -> None:
        self.states: Tensor | None = None  # the trunk's (B, S, d)
        self.side: Tensor | None = None  # (B, S, d/r)
        self.found: tuple[Tensor, Tensor] | None = None  # states last asked for, and the side's
        self.within = False  # whether the encoder has run in the pass that asks

    def put(self, states: Tensor, side: Tensor) -> None:
        """Keep what the encoders gave."""
        self.states, self.side, self.found, self.within = states, side, None, True

    def get(self, states: Tensor, training: bool) -> Tensor:
        """The side's states for those that the decoder reads, (B', S, d) → (B', S, d/r).

        Raises:
            AdapterError: They are not those of the encoder's latest run with the ladder.
        """
        if self.side is None or self.states is None or states.shape[1:] != self.states.shape[1:]:
            raise AdapterError(_UNKNOWN)
        if self.within and len(states) == len(self.side):
            return self.side
        if self.found is None or self.found[0] is not states:
            self.found = (states, self.side[self._rows(self.states, states, training)])
        return self.found[1]

    def forget(self) -> None:
        """Keep nothing."""
        self.states = self.side = self.found = None
        self.within = False

    def _rows(self, known: Tensor, states: Tensor, training: bool) -> Tensor:
        """Which row of the known states each given one is."""
        same = (states[:, None, 0] == known[None, :, 0]).all(-1)
        rows = same.int().argmax(1)
        if torch.equal(known[rows], states):
            return rows
        if training and len(states) % len(known) == 0:  # the decoder's own dropout hides them
            each = torch.arange(len(known), device=known.device)
            return each.repeat_interleave(len(states) // len(known))
        raise AdapterError(_UNKNOWN)

    def __getstate__(self) -> dict[str, Any]:
        return {"states": None, "side": None, "found": None, "within": False}


_UNKNOWN = (
    "the decoder was given encoder states that the ladder's side encoder has not seen; run the "
    "encoder with the adapter active, and decode from what its latest run gave"
)


class Ladder(Delta):
    """The ladder beside one stack.

    Args:
        site: The module at which the stack ends: its last norm, or its last block.
        first: The path of the stack's first block.
        kept: For each block with a side block its path and number, in order.
        blocks: The side blocks.
        norm: The side's last norm, where the stack has one.
        settings: T, the share of dropout before U, and whether side blocks run again in the
            backward pass instead of keeping what they need there.
        bridge: Between the side's encoder and its decoder.
        numbers: Its numbers.
    """

    taps = True

    def __init__(
        self,
        site: Site,
        first: str,
        kept: Sequence[tuple[str, int]],
        blocks: Sequence[SideBlock],
        norm: nn.Module | None,
        settings: tuple[float, float, bool],
        bridge: Bridge | None,
        numbers: dict[str, Trained],
    ) -> None:
        super().__init__(site, **numbers)
        self.first, self.kept, self.blocks, self.norm = first, tuple(kept), tuple(blocks), norm
        self.temperature, self.dropout, self.recompute = settings
        self.bridge = bridge
        self.ends = "up.weight" in numbers
        self.mark = uuid.uuid4().hex
        self.pruning: Pruning | None = None  # where data choose what the side starts from
        self.selects = False  # whether projections start from the choice, too
        self.watches = tuple(dict.fromkeys((first, *(path for path, _ in kept))))

    def begin(self, batch: Batch) -> None:
        """From here on the encoder's latest run is an earlier pass's, until it runs again."""
        if self.bridge is not None and self.ends:
            self.bridge.within = False

    def ready(self) -> None:
        """Hold what is not trained where the numbers are."""
        if self.t:
            buffered(self.blocks, self.t["gates"].device)

    def rest(self) -> None:
        """Forget what the encoders gave, graph and all."""
        if self.bridge is not None:
            self.bridge.forget()

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """What the ladder makes of the stack's states (B, T, d); of an encoder, `y` itself."""
        u = self._climb(t, y, training)
        if self.norm is not None:
            own = {name: t[f"norm.{name}"] for name, _ in self.norm.named_parameters()}
            u = functional_call(self.norm, own, (u,))
        u = F.dropout(u, self.dropout, training)
        if self.ends:
            return F.linear(u, t["up.weight"], t["up.bias"])
        assert self.bridge is not None
        self.bridge.put(y.detach(), u)
        return y

    def _climb(self, t: Tensors, y: Tensor, training: bool) -> Tensor:
        """u_L (B, T, d/r); a block that the trunk left out this time leaves the side as it is."""
        calls = [
            (i, at, self.seen[path]) for i, (path, at) in enumerate(self.kept) if path in self.seen
        ]
        start = self.seen.get(self.first, calls[0][2] if calls else None)
        if start is None:
            raise AdapterError(f"{self.site.path} ran without the blocks of its stack")
        u = self._down(t, 0, start.x, y)
        share = torch.sigmoid(t["gates"] / self.temperature)
        last: Any = None
        for i, at, call in calls:
            v = torch.lerp(self._down(t, i + 1, call.y, y), u, share[at])
            side = self.blocks[i]
            if side.module.training != training:
                side.module.train(training)
            instead = handed_on(start, side.takes, last) | self._read(side, call, training)
            last = self._run(i, t, call, v, instead, training)
            u = last if isinstance(last, Tensor) else last[0]
        return u

    def _run(
        self,
        i: int,
        t: Tensors,
        call: Call,
        v: Tensor,
        instead: dict[str, Any],
        training: bool,
    ) -> Any:
        """What side block i gives for v; run again in the backward pass where that is asked."""
        side = self.blocks[i]
        name, cache = cache_in({**dict(zip(side.takes, call.args, strict=False)), **call.kwargs})
        again = self.recompute and training and torch.is_grad_enabled()
        if again and cache is not None and cache.get_seq_length() <= v.shape[1]:
            cache, instead = None, {**instead, name: None}  # it would be written to twice
        if cache is not None:
            at = i + places_in(cache, self.mark, [at for _, at in self.kept], v.shape[1])
            return side.run(t, call, v, instead, at)
        if again:
            return checkpoint(side.run, t, call, v, instead, i, use_reentrant=False)
        return side.run(t, call, v, instead, i)

    def _down(self, t: Tensors, i: int, h: Tensor, y: Tensor) -> Tensor:
        h = h.detach().to(y.device, y.dtype)
        return F.linear(h, t[f"down.{i}.weight"], t[f"down.{i}.bias"])

    def _read(self, side: SideBlock, call: Call, training: bool) -> dict[str, Tensor]:
        """The side encoder's states, in place of those that the trunk's decoder reads."""
        if self.bridge is None or not self.ends:
            return {}
        given = {**dict(zip(side.takes, call.args, strict=False)), **call.kwargs}
        states = given.get("encoder_hidden_states")
        return (
            {} if states is None else {"encoder_hidden_states": self.bridge.get(states, training)}
        )

    @property
    def measured(self) -> dict[str, tuple[str, str]]:
        """The weights of the blocks that the side starts from."""
        return {} if self.pruning is None else self.pruning.measured()

    def calibrate(self, squares: Tensors) -> None:
        """Let the side start from the numbers with the highest Fisher information."""
        assert self.pruning is not None
        if self.t["gates"].count_nonzero():
            raise AdapterError(
                f"the ladder beside {self.site.path} was trained already; starting it anew would "
                "lose what it learned. Attach a new adapter and calibrate that"
            )
        self.pruning.weigh(squares)
        for i, side in enumerate(self.blocks):
            for name, key in side.keys.items():
                self.pruning.start(i, name, self.t[key].data)
        if self.norm is not None:
            for name, _ in self.norm.named_parameters():
                self.pruning.end(name, self.t[f"norm.{name}"].data)
        for name in [n for n in self.trained if n.endswith(".weight") and self.selects]:
            if name.startswith("down."):
                self.pruning.down(self.t[name].data)
            elif name == "up.weight":
                self.pruning.up(self.t[name].data)
        self.pruning.squares = None  # as large as the model
