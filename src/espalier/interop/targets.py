"""Other libraries name layers by their paths, recipes by selectors: one from the other."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from espalier.errors import SiteError
from espalier.places import Sites


def selector(places: Sites, paths: Iterable[str]) -> str:
    """The shortest selector for exactly these hosts: roles, else last names, else all paths."""
    paths = list(paths)
    wanted = set(paths)
    roles = {site.role for site in places if site.path in wanted and not (site.rows or site.span)}
    last = {"*." + path.rpartition(".")[2] for path in paths}
    for short in ("all-linear", ", ".join(sorted(roles)), ", ".join(sorted(last))):
        try:
            if {site.path for site in places.select(short)} == wanted:
                return short
        except SiteError:
            continue
    return ", ".join(paths)


def pattern(config: Mapping[str, Any], name: str, path: str, default: str) -> float:
    """Peft's value for a path: its pattern's whose key ends the path, else the default."""
    for key, value in (config.get(name) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return float(value)
    return float(config.get(default) or 8)
