"""Trained copies that stand in for a module's own parameters: full tuning, heads, selections."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor, nn

from espalier.deltas import Delta, Trained
from espalier.errors import SiteError
from espalier.places import Site


class Replacement(Delta):
    """Trained copies that stand in for parameters of one module."""

    replaces: ClassVar[bool] = True

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """Every scalar of the copies, by a change of any rank."""
        return sum(math.prod(spec.shape) for spec in self.trained.values()), None


def replacements(
    modules: Mapping[str, nn.Module],
    keep: Callable[[str, str], bool] = lambda path, name: True,
    head: bool = False,
) -> list[Delta]:
    """Replacements for parameters that these modules own; a tied tensor is trained once.

    Args:
        modules: By path.
        keep: Whether to replace the parameter of this name at this path.
        head: Whether these are a task head's.

    Raises:
        SiteError: One of the parameters is quantised and cannot be trained.
    """
    specs: dict[int, Trained] = {}
    found: list[Delta] = []
    for path, module in modules.items():
        own: dict[str, Trained] = {}
        for name, p in module._parameters.items():
            if p is None or not keep(path, name):
                continue
            if not p.is_floating_point():
                raise SiteError(f"{path}.{name} is quantised ({p.dtype}) and cannot be trained")
            own[name] = specs.setdefault(
                id(p), Trained(tuple(p.shape), _copy_of(p), head=head)
            )
        if own:
            site = Site("parameter", path, "parameter", None, "", 0, 0)
            found.append(Replacement(site, **own))
    return found


def _copy_of(parameter: nn.Parameter) -> Callable[[Tensor], object]:
    return lambda view: view.copy_(parameter.detach())
