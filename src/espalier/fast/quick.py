"""Finding the modules of a frozen base that can train with less memory, to stand in for them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.attention import Attention, callers
from espalier.fast import drop
from espalier.fast.attention import suits
from espalier.fast.gated import act_of, gated
from espalier.fast.norm import Law, norm_law, rms_norm
from espalier.fast.rotary import rotating_twin
from espalier.fast.switch import enabled, ordinary
from espalier.modules import base_modules

if TYPE_CHECKING:
    from espalier.graft import Graft


class QuickNorm:
    """A root mean square norm; what it computes is found out at its first use."""

    def __init__(self) -> None:
        self.law: Law | None = None
        self.tried = False

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """The norm's output, or None where its own forward had better be called."""
        if len(args) != 1 or kwargs:
            return None
        (x,) = args
        if not self.tried:
            self.tried, self.law = True, norm_law(host, x)
        weight = host.weight
        if self.law is None or weight.requires_grad or weight.dtype != x.dtype:  # type: ignore[union-attr]
            return None
        return rms_norm(x, weight, self.law)  # type: ignore[arg-type]


class QuickFeed:
    """A gated feed-forward with its children by name: gate, up, out."""

    def __init__(self, gate: str, up: str, out: str) -> None:
        self.names = (gate, up, out)
        self.act: str | None = None
        self.tried = False

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """The feed-forward's output, or None where its own forward had better be called."""
        if len(args) != 1 or kwargs:
            return None
        (x,) = args
        if not self.tried:
            self.tried, self.act = True, act_of(host, self.names)
        if self.act is None:
            return None
        gate, up, out = (host._modules[name] for name in self.names)
        if len({linear.weight.dtype for linear in (gate, up, out)}) > 1:  # type: ignore[union-attr]
            return None  # its own forward may cast between them
        return out(gated(gate(x), up(x), self.act))  # type: ignore[misc]


class QuickAttention:
    """An attention that rotates its queries and keys by a function of its file."""

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The attention's output, or None where its own forward had better be called."""
        twin = rotating_twin(type(host))
        return None if twin is None else twin(host, *args, **kwargs)


class QuickDropout:
    """A dropout on a CPU, where torch's own is slow and keeps its mask."""

    def __call__(self, host: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
        """What is left of x, or None where torch's own had better be called."""
        share: Any = host.p
        if len(args) != 1 or kwargs or not 0 < share < 1 or host.inplace:
            return None
        x: Tensor = args[0]
        if not ordinary(x) or x.device.type != "cpu" or not x.is_floating_point():
            return None
        # torch's own keeps other strides.
        return drop.dropped(x, share) if x.numel() >= drop.SMALL and x.is_contiguous() else None


Quick = QuickNorm | QuickFeed | QuickAttention | QuickDropout


def taken(quick: Quick, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a quick stand-in gives for this call; None where the host's own forward is to run."""
    if not host.training or not enabled() or torch.compiler.is_compiling():
        return None
    x = args[0] if args else next(iter(kwargs.values()), None)
    return quick(host, *args, **kwargs) if isinstance(x, Tensor) else None


def quicken(graft: Graft, model: nn.Module) -> None:
    """Give norms, gated feed-forwards and dropouts a stand-in, and attention batched products."""
    modules = base_modules(model)
    for path, module in modules.items():
        if type(module) is nn.Dropout and module.p:
            graft.seat(path, module).quick = QuickDropout()
    feeds: dict[str, dict[str, str]] = {}
    for site in graft.places:
        parent, _, child = site.path.rpartition(".")
        if site.role == "norm" and not site.span:
            graft.seat(site.path, modules[site.path]).quick = QuickNorm()
        elif site.role in _FEED and site.rows is None and site.kind == "linear":
            feeds.setdefault(parent, {})[site.role] = child
    for path, names in feeds.items():
        if names.keys() == _FEED:
            graft.seat(path, modules[path]).quick = QuickFeed(
                names["ffn.gate"], names["ffn.in"], names["ffn.out"]
            )
    for path, module in callers(modules, graft.places).items():
        if rotating_twin(type(module)) is not None:
            graft.seat(path, module).quick = QuickAttention()
        if suits(module) and path not in graft.attentions:
            graft.attentions[path] = Attention(module, graft)
            graft.attentions[path].refresh()


_FEED = {"ffn.gate", "ffn.in", "ffn.out"}
