"""Prints the places of a model: one row per role and stack, and below it what has no name.

Paths are those inside a block (a block's own row says where it stands); `a → b` is a span.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from espalier.grammar import ROLES
from espalier.selectors import ranges

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from espalier.places import Site, Sites


def plain(sites: Sites) -> str:
    """The table as text, 120 columns at most."""
    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=120, color_system=None, legacy_windows=False).print(table(sites))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def table(sites: Sites) -> Group:
    """The table and its footer, for rich."""
    from rich.console import Group
    from rich.text import Text

    notes = [Text(line, style="dim") for line in _footer(sites)]
    return Group(_rows(sites), *notes)


def _rows(sites: Sites) -> Table:
    from rich import box
    from rich.table import Table

    title = f"{sites.notes.model or 'Model'}: {len(sites)} places"
    grid = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    grid.add_column("role", style="cyan", no_wrap=True)
    grid.add_column("stack", no_wrap=True)
    grid.add_column("layers", justify="right", no_wrap=True)
    grid.add_column("in → out", justify="right", no_wrap=True)
    grid.add_column("count", justify="right", no_wrap=True)
    grid.add_column("kind", no_wrap=True)
    grid.add_column("where (inside its block)", overflow="fold")
    groups: dict[tuple[int, str, str], list[Site]] = {}
    stacks = sites.notes.stacks
    for site in sites:
        # Stacks in the order in which the model has them, what is in none of them last.
        order = stacks.index(site.stack) if site.stack in stacks else len(stacks)
        groups.setdefault((order, site.stack, site.role), []).append(site)
    blocks = {s.path for s in sites.whole if s.role == "block"}
    last = None
    for key in sorted(groups, key=lambda k: (k[0], ROLES.index(k[2]))):
        if last not in (None, key[0]):
            grid.add_section()
        last = key[0]
        grid.add_row(key[2], key[1], *_row(groups[key], blocks))
    return grid


def _row(group: list[Site], blocks: set[str]) -> tuple[str, ...]:
    layers = ranges(sorted({site.layer for site in group if site.layer is not None}))
    widths = list(dict.fromkeys(_widths(site) for site in group))
    shown = ", ".join(widths[:2]) + (", …" if len(widths) > 2 else "")
    kinds = dict.fromkeys(f"{s.kind}, {s.bits} bit" if s.bits else s.kind for s in group)
    first = next((site for site in group if site.layer is not None), group[0])
    return layers, shown, str(len(group)), ", ".join(kinds), _where(first, blocks)


def _widths(site: Site) -> str:
    return str(site.n_out) if site.kind in ("norm", "block") else f"{site.n_in} → {site.n_out}"


def _where(site: Site, blocks: set[str]) -> str:
    path = _inside(site.path, blocks)
    if site.enter not in (None, site.path):
        return f"{_inside(str(site.enter), blocks)} → {path}"
    if site.rows is not None:
        each = f" of each {site.rows.width}" if site.rows.groups > 1 else ""
        return f"{path}, rows {site.rows.start}-{site.rows.stop - 1}{each}"
    return path + (f" = {', '.join(site.tied)}" if site.tied else "")


def _inside(path: str, blocks: set[str]) -> str:
    """A path as seen from its block; elsewhere whole, its numbers as `*`."""
    names = path.split(".")
    for end in range(len(names) - 1, 0, -1):
        if ".".join(names[:end]) in blocks:
            return ".".join(names[end:])
    return starred(path)


def starred(path: str) -> str:
    """A path with every number as `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path)


def _footer(sites: Sites) -> list[str]:
    lines = []
    if sites.unnamed:
        lines.append(f"No role known for: {_short(sites.unnamed)} (select by module name).")
    for path, reason in {starred(p): r for p, r in sites.notes.unknown.items()}.items():
        lines.append(f"Only as a whole: {path} ({reason}).")
    if sites.notes.bare:
        held = (f"{path} ({why})" for path, why in sites.notes.bare)
        lines.append(f"No method can stand on: {_short(held)}.")
    return lines


def _short(paths: Iterable[str], most: int = 8) -> str:
    seen = list(dict.fromkeys(starred(path) for path in paths))
    more = f" and {len(seen) - most} more" if len(seen) > most else ""
    return ", ".join(seen[:most]) + more
