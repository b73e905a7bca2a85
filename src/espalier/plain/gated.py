"""A gate around another delta: how much of its change acts, learned from the input."""

from __future__ import annotations

from torch import Tensor
from torch.nn import init

from espalier.deltas import Batch, Delta, Tensors, Trained

OVER = ("auto", "sequence", "token")


class GatedDelta(Delta):
    """y + g · (part(x, y) − y) with g = σ(u·h + a), h (B, T, D) what the part's gate reads.

    One g per example is the mean over its real tokens, padding left out. In a causal stack that
    mean would look ahead, so each token has its own; extra keys and values, which all tokens
    share, take the g of the first real token there, held while a cache continues it.
    """

    def __init__(self, part: Delta, over: str) -> None:
        u = Trained((part.gate_width,), _small)
        super().__init__(part.site, **part.trained, gate_u=u, gate_a=Trained((1,)))
        self.part = part
        self.watches = part.watches or self.watches  # the gate reads what enters in any case
        self.attends, self.reads_host = part.attends, part.reads_host
        self.gates, self.idle = part.gates, part.idle
        causal = part.site.stack == "decoder"
        self.over = over if over != "auto" else "token" if causal else "sequence"
        self.batch = Batch(None, None, False, False)
        self.value: Tensor | None = None  # of the latest forward pass, detached

    def begin(self, batch: Batch) -> None:
        """Note the mask of real tokens and whether a cache is continued."""
        self.batch = batch
        self.part.begin(batch)

    def before(self, t: Tensors, x: Tensor, training: bool) -> Tensor:
        """The gated change of the host's input."""
        if type(self.part).before is Delta.before:
            return x
        self.part.seen = self.seen
        return x + self._gate(t, x) * (self.part.before(t, x, training) - x)

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The gated change of the host's output."""
        if type(self.part).after is Delta.after:
            return y
        self.part.seen = self.seen
        gate = self._gate(t, self.part.gate_input(x, y))
        if self.part.gates:
            gate = gate * t["gate"] if "gate" in t else gate  # an adapter's weight
            return self.part.after({**t, "gate": gate}, x, y, training)
        return y + gate * (self.part.after(t, x, y, training) - y)

    def attend(self, t: Tensors, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Keys and values (B, L, …), both multiplied by the gate (UniPELT)."""
        keys, values = self.part.attend(t, x, training)
        gate = self._gate(t, x, shared=True)
        return keys * gate, values * gate

    def plain(self, t: Tensors) -> Tensors:
        """The plain part's numbers, and the gate's."""
        part = {key: value for key, value in t.items() if key in self.part.trained}
        return {**self.part.plain(part), "gate_u": t["gate_u"], "gate_a": t["gate_a"]}

    def _gate(self, t: Tensors, h: Tensor, shared: bool = False) -> Tensor:
        """G as (B, 1, 1) or (B, T, 1) for h (B, T, D); as (B, 1) for h (B, D)."""
        held = self.value
        one = shared or self.over == "sequence"
        if one and self.batch.continuing and held is not None and len(held) == len(h):
            return held
        g = (h @ t["gate_u"] + t["gate_a"]).sigmoid().unsqueeze(-1)
        if one and g.dim() > 2:
            g = self._first(g) if self.over == "token" else self._mean(g)
        self.value = g.detach()
        return g

    def _mean(self, g: Tensor) -> Tensor:
        mask = self._mask(g)
        if mask is None:
            return g.flatten(1, -2).mean(1).view(len(g), *[1] * (g.dim() - 1))
        weight = mask.to(g.dtype).unsqueeze(-1)
        return (g * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)

    def _first(self, g: Tensor) -> Tensor:
        mask = self._mask(g)
        if mask is None:
            return g[:, :1]
        at = mask.int().argmax(1).view(-1, 1, 1)
        return g.gather(1, at)

    def _mask(self, g: Tensor) -> Tensor | None:
        """Which of g's (B, T, 1) tokens are real, where the model was told."""
        for mask in (self.batch.decoder_mask, self.batch.mask)[self.site.stack != "decoder" :]:
            if mask is not None and mask.shape == g.shape[:2]:
                return mask
        return None


def _small(u: Tensor) -> None:
    init.normal_(u, std=0.02)
