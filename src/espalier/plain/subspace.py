"""Parameters that move along few directions: θ_k + λ_k P_k(x), one x for the whole model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from espalier.deltas import Delta, Tensors, Trained
from espalier.modules import backbone, base_modules, unwrap
from espalier.places import Site
from espalier.plain.fastfood import projected
from espalier.plain.whole import refuse_packed


class Part(NamedTuple):
    """One tensor's map: its key, the place of its λ, its parameter's id, whether it counts here."""

    key: int
    place: int
    tensor: int
    counted: bool


class Subspace:
    """What all deltas of the method share: x (d,), λ (m,) or none, and the tensors made of them.

    Without gradients a tensor that was made serves as long as x and λ are what they were. While
    they can train that is seen by comparing them; once frozen they change only by being loaded.
    """

    def __init__(self, length: int, tensors: int, structure: bool) -> None:
        self.x = Trained((length,))
        self.scales = Trained((tensors,), nn.init.ones_) if structure else None
        self.made: dict[int, Tensor] = {}
        self.made_of: tuple[Tensor, ...] = ()

    def tensor(self, t: Tensors, part: Part, own: Tensor) -> Tensor:
        """θ_k + λ_k P_k(x) in θ_k's shape and type."""
        if torch.compiler.is_compiling():
            return _moved(t, part, own)
        if t["x"].requires_grad and torch.is_grad_enabled():
            self.made = {}
            return _moved(t, part, own)
        if not self.made or (t["x"].requires_grad and not self._current(t)):
            self.made = {}
            self.made_of = tuple(v.detach().clone() for v in t.values())
        if part.tensor not in self.made:
            with torch.inference_mode(False), torch.no_grad():  # gradients may pass through it
                self.made[part.tensor] = _moved(t, part, own).to(own.dtype)
        return self.made[part.tensor]

    def forget(self) -> None:
        """Drop every tensor that was made."""
        self.made, self.made_of = {}, ()

    def _current(self, t: Tensors) -> bool:
        return all(
            a.device == b.device and torch.equal(a, b)
            for a, b in zip(self.made_of, t.values(), strict=True)
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "made": {}, "made_of": ()}


def _moved(t: Tensors, part: Part, own: Tensor) -> Tensor:
    x = t["x"].to(own.device, torch.float32)
    scale = t["scales"][part.place].to(x) if "scales" in t else x.new_ones(())
    change = projected(x, scale, own.numel(), part.key)
    return own.detach().float() + change.view_as(own)


class Projected(Delta):
    """What stands in for the parameters of one module.

    Args:
        site: The module.
        parts: Its parameters' maps, by name.
        space: Shared by all deltas of the method.
    """

    replaces: ClassVar[bool] = True

    def __init__(self, site: Site, parts: Mapping[str, Part], space: Subspace) -> None:
        scales = {"scales": space.scales} if space.scales is not None else {}
        super().__init__(site, x=space.x, **scales)
        self.parts = dict(parts)
        self.space = space

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the host's parameters that move."""
        return tuple(self.parts)

    def ready(self) -> None:
        """Forget what was made: the numbers may be others now."""
        self.space.forget()

    def rest(self) -> None:
        """Forget what was made: it is as large as the model."""
        self.space.forget()

    def effective(self, t: Tensors, own: Tensors, training: bool) -> Tensors:
        """The moved parameters; gradients go to x and λ alone."""
        return {name: self.space.tensor(t, part, own[name]) for name, part in self.parts.items()}

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """Every scalar; of matrices by a change of any rank, of vectors by none."""
        own = [host._parameters[name] for name, part in self.parts.items() if part.counted]
        shapes = [p.shape for p in own if p is not None]
        matrices = any(len(shape) > 1 for shape in shapes)
        return sum(map(math.prod, shapes)), None if matrices else 0


def maps(
    modules: Mapping[str, nn.Module], keys: Iterable[tuple[str, str]], seed: int
) -> dict[str, dict[str, Part]]:
    """By path and name the map of every parameter; tied ones share that of the first.

    The key is drawn from the seed and the name, so that it is the same in every process.

    Raises:
        SiteError: A parameter is quantised.
    """
    known: dict[int, Part] = {}
    found: dict[str, dict[str, Part]] = {}
    for path, name in keys:
        p = modules[path]._parameters[name]
        assert p is not None
        refuse_packed(f"{path}.{name}", p)
        part = known.get(id(p))
        if part is None:
            digest = hashlib.sha256(f"{seed}:{path}.{name}".encode()).digest()
            part = Part(int.from_bytes(digest[:4]), len(known), len(known), True)
            known[id(p)] = part
        else:
            part = part._replace(counted=False)
        found.setdefault(path, {})[name] = part
    return found


def without_new_head(model: nn.Module) -> list[tuple[str, str]]:
    """(path, name) of every parameter but those of a head that its task brings, in model order.

    What predicts words belongs to the base. Told from the model's structure, not from what a
    checkpoint filled: an adapter finds the same tensors again wherever it is loaded.
    """
    model = unwrap(model)
    words = getattr(model, "get_output_embeddings", lambda: None)()
    inside = "" if words is not None else backbone(model)
    modules = base_modules(model)
    return [
        (path, name)
        for path, module in modules.items()
        if not inside or path == inside or path.startswith(inside + ".")
        for name, p in module._parameters.items()
        if p is not None
    ]
