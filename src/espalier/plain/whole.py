"""Trained copies that stand in for a module's own parameters: full tuning, heads, selections."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase, translate
from typing import ClassVar

from torch import Tensor, nn

from espalier import hosts
from espalier.deltas import Delta, Trained
from espalier.errors import SiteError
from espalier.modules import base_modules
from espalier.places import Site, Sites


class Replacement(Delta):
    """Trained copies that stand in for parameters of one module."""

    replaces: ClassVar[bool] = True

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """Every scalar of the copies; of matrices by a change of any rank, of vectors by none."""
        matrices = any(len(spec.shape) > 1 for spec in self.trained.values())
        count = sum(math.prod(spec.shape) for spec in self.trained.values())
        return count, None if matrices else 0


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
            refuse_packed(f"{path}.{name}", p)
            own[name] = specs.setdefault(id(p), Trained(tuple(p.shape), _copy_of(p), head=head))
        if own:
            site = Site("parameter", path, "parameter", None, "", 0, 0)
            found.append(Replacement(site, **own))
    return found


def chosen(model: nn.Module, places: Sites, selector: str) -> list[tuple[str, str]]:
    """(path, name) of every parameter that a selector takes, in model order, all ends of tied ones.

    Roles are selected as everywhere, `block` with all that is in a layer. A pattern over names
    takes modules with all that is in them, and single parameters ("*.bias").

    Raises:
        SiteError: A term matches nothing, or a slice of a fused layer.
    """
    modules = base_modules(model)
    owned = {(path, name): p for path, m in modules.items() for name, p in m._parameters.items()}
    kept: set[int] = set()
    left: set[int] = set()
    for term in (term.strip() for term in selector.split(",")):
        what = term.lstrip("! ")
        if what:
            found = _named(owned, places, what) or _placed(owned, places, what)
            (left if term.startswith("!") else kept).update(id(owned[key]) for key in found)
    keys = [key for key, p in owned.items() if p is not None and id(p) in kept - left]
    if not keys:
        raise SiteError(f"the selector {selector!r} takes no parameter of {places.notes.model}")
    return keys


Owned = Mapping[tuple[str, str], nn.Parameter | None]


def _named(owned: Owned, places: Sites, what: str) -> list[tuple[str, str]]:
    """By name: parameters, and all that lies in a module. None for roles, stacks and layers."""
    if what == "all-linear" or "/" in what or "@" in what:
        return []
    if any(fnmatchcase(role, what) for role in places.whole.roles):
        return []
    match = re.compile(r"(?:.*\.)?" + translate(what)).match
    found = []
    for path, name in owned:
        names = [*path.split("."), name]
        if any(match(".".join(names[:end])) for end in range(1, len(names) + 1)):
            found.append((path, name))
    return found


def _placed(owned: Owned, places: Sites, what: str) -> list[tuple[str, str]]:
    """By role: what the modules at the sites own, and whole blocks."""
    paths: set[str] = set()
    for site in places.select(what):
        if site.span and site.role != "block":
            raise SiteError(
                f"{site.role!r} is a span, no layer with parameters of its own; write "
                f"'{site.role}.*' for the layers within it"
            )
        if site.rows is not None:
            raise SiteError(
                f"{site.role!r} is a slice of {site.path}, whose parameters can only be trained "
                "whole; name the fused layer"
            )
        inside = site.path + "."
        paths.update(
            path
            for path, _ in owned
            if path == site.path or (site.role == "block" and path.startswith(inside))
        )
    return [key for key in owned if key[0] in paths]


def refuse_packed(path: str, parameter: nn.Parameter) -> None:
    """Raise SiteError where a parameter is quantised: there are no numbers to train."""
    if hosts.packed(parameter):
        raise SiteError(
            f"{path} is quantised ({parameter.dtype}): there are no numbers that could be trained "
            "themselves. Choose a method that adds to it, such as LoRA, or load the base as it is"
        )


def _copy_of(parameter: nn.Parameter) -> Callable[[Tensor], object]:
    return lambda view: view.copy_(hosts.whole(parameter.detach()))
