"""Prints the places of a model: one row per role and stack, and below it what has no name.

The columns are role, layers, widths, count, kind and the first path, with its layer as `*`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .grammar import ROLES, SPANS
from .selectors import ranges

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from .places import Site, Sites


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

    grid = Table(title=f"Places of {sites.notes.model or 'a model'}", box=box.SIMPLE_HEAD)
    grid.add_column("role", style="bold cyan", no_wrap=True)
    grid.add_column("stack")
    grid.add_column("layers", justify="right")
    grid.add_column("in → out", justify="right", no_wrap=True)
    grid.add_column("count", justify="right")
    grid.add_column("kind")
    grid.add_column("where", overflow="fold")
    groups: dict[tuple[int, str, str], list[Site]] = {}
    for site in sites:
        # Stacks keep the order in which the model runs them; roles that of the grammar.
        order = sites.notes.stacks.index(site.stack) if site.stack in sites.notes.stacks else -1
        groups.setdefault((order, site.stack, site.role), []).append(site)
    last = None
    for order, stack, role in sorted(groups, key=lambda k: (k[0], ROLES.index(k[2]))):
        if last is not None and last != order:
            grid.add_section()
        last = order
        grid.add_row(*_row(stack, role, groups[order, stack, role]))
    return grid


def _row(stack: str, role: str, group: list[Site]) -> tuple[str, ...]:
    layers = ranges(sorted({site.layer for site in group if site.layer is not None}))
    widths = list(dict.fromkeys(_widths(site) for site in group))
    shown = ", ".join(widths[:2]) + (", …" if len(widths) > 2 else "")
    kinds = dict.fromkeys(f"{s.kind}, {s.bits} bit" if s.bits else s.kind for s in group)
    return role, stack, layers, shown, str(len(group)), ", ".join(kinds), _where(group[0])


def _widths(site: Site) -> str:
    return str(site.n_out) if site.kind in ("norm", "block") else f"{site.n_in} → {site.n_out}"


def _where(site: Site) -> str:
    path = starred(site.path)
    if site.role in SPANS and site.enter not in (None, site.path):
        return f"{starred(str(site.enter))} … {path}"
    if site.rows is not None:
        rows = site.rows
        each = f" of each {rows.width}" if rows.groups > 1 else ""
        return f"{path}, rows {rows.start}-{rows.stop - 1}{each}"
    return path + (f" = {', '.join(site.tied)}" if site.tied else "")


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
