"""The language in which methods say where they go.

    term, term, !term        a term is [stack/]what[@layers]; `!` takes away
    what                     a role (attention.q, ffn, norm), a pattern over roles (attention.*),
                             all-linear, all-attention (self and cross), or a pattern over
                             module names (*.q_proj, lm_head)
    layers                   2 · 0-3 · 8- (8 and up) · -3 (up to 3) · first2 · last2 · 1+3+5

`attention`, `cross`, `ffn` and `block` are spans: the change enters at one module and leaves at
another. Patterns and all-linear take a fused host once, whole; its slices are asked for by name.
A word that can be read as roles is; module names match whole or from any dot on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase, translate
from typing import TYPE_CHECKING

from espalier.errors import SiteError, nearest
from espalier.grammar import FAMILIES, ROLES, SLICES, SPANS, block_role

if TYPE_CHECKING:
    from espalier.places import Site, Sites

ALL_LINEAR, ALL_ATTENTION = "all-linear", "all-attention"
_TERM = re.compile(
    r"(?P<out>!?)\s*(?:(?P<stack>[\w-]+)/)?(?P<what>[^@/]+?)\s*(?:@(?P<layers>\S+))?"
)
_LAYER = re.compile(
    r"(?P<one>\d+)|(?P<low>\d*)-(?P<high>\d*)|(?P<end>first|last)(?P<count>[1-9]\d*)"
)


def select(sites: Sites, selector: str) -> list[Site]:
    """The sites a selector asks for, each once, in model order.

    Raises:
        SiteError: the selector cannot be read, or one of its terms matches nothing.
    """
    terms = [term.strip() for term in selector.split(",") if term.strip()]
    chosen: dict[tuple[str, str], Site] = {}
    excluded: list[tuple[Site, bool]] = []
    for term in terms:
        read = _TERM.fullmatch(term)
        if read is None:
            raise SiteError(f"cannot read the selector {term!r}; a term is [stack/]role[@layers]")
        found, by_name = _find(sites, term, read)
        if read["out"]:
            excluded += [(site, by_name) for site in found]
        else:
            chosen.update({(site.path, site.role): site for site in found})
    if not chosen:
        raise SiteError(
            f"the selector {selector!r} asks for no place; say what to take before what to leave "
            f"out, as in 'all-linear, !*.q_proj'"
        )
    for site, by_name in excluded:
        _drop(sites, chosen, site, by_name)
    kept = {key for key, site in chosen.items() if not _within(chosen, site)}
    if not kept:
        raise SiteError(f"the selector {selector!r} leaves out all that it takes")
    return [site for site in sites if (site.path, site.role) in kept]


def _find(sites: Sites, term: str, read: re.Match[str]) -> tuple[list[Site], bool]:
    """The sites of one term, and whether it named modules rather than roles."""
    what, stack, layers = read["what"], read["stack"], read["layers"]
    by_name = False
    if what == ALL_LINEAR:
        found = _all_linear(sites)
    elif what == ALL_ATTENTION:
        found = [s for s in sites if s.role in ("attention", "cross")]
    elif roles := [role for role in ROLES if fnmatchcase(role, what)]:
        whole = any(c in what for c in "*?[")
        found = [s for s in sites if s.role in roles and not (whole and (s.rows or s.span))]
    else:
        by_name = True
        match = re.compile(r"(?:.*\.)?" + translate(what)).match
        found = [s for s in sites if not s.rows and not s.span and match(s.path)]
    if not found:
        raise SiteError(_nothing(sites, term, what))
    if stack is not None:
        there = list(dict.fromkeys(s.stack for s in found if s.stack))
        found = [s for s in found if s.stack == stack]
        if not found:
            have = ", ".join(there) or "none of its own"
            raise SiteError(
                f"no {what!r} in a stack {stack!r} of {sites.notes.model} (asked by {term!r}); "
                f"stacks with it: {have}{_near(stack, there)}"
            )
    return (_in_layers(found, layers, term) if layers else found), by_name


def _all_linear(sites: Sites) -> list[Site]:
    linear = [
        s
        for s in sites
        if s.kind in ("linear", "conv1d") and not s.rows and not s.span and s.role != "head"
    ]
    # A plain network has no blocks; then every linear that is not a head counts.
    return [s for s in linear if s.layer is not None] or linear


def _in_layers(found: list[Site], layers: str, term: str) -> list[Site]:
    present = sorted({s.layer for s in found if s.layer is not None})
    wanted: set[int] = set()
    for word in layers.split("+"):
        read = _LAYER.fullmatch(word)
        if read is None or word == "-":
            raise SiteError(
                f"cannot read the layers {layers!r} of {term!r}; "
                "write 2, 0-3, 8- (8 and up), -3 (up to 3), first2, last2 or 1+3+5"
            )
        if read["end"]:
            count = int(read["count"])
            wanted.update(present[:count] if read["end"] == "first" else present[-count:])
            continue
        low = int(read["one"] or read["low"] or 0)
        high = int(read["one"] or read["high"] or max(present, default=0))
        wanted.update(range(low, high + 1))
    kept = [s for s in found if s.layer in wanted]
    if not kept:
        have = f"layers {ranges(present)}" if present else "no layer numbers"
        raise SiteError(f"{term!r} matches no layer; what it names has {have}")
    return kept


def _drop(sites: Sites, chosen: dict[tuple[str, str], Site], site: Site, by_name: bool) -> None:
    """Takes a site away; a slice taken from a chosen fused host leaves its other slices."""
    fused = site.role.rpartition(".")[2] in SLICES
    for key, one in list(chosen.items()):
        if key[0] == site.path and (by_name or one.role == site.role or (fused and one.rows)):
            del chosen[key]
    if site.rows is not None:
        whole = [k for k, s in chosen.items() if k[0] == site.path and not s.rows and not s.span]
        for key in whole:
            del chosen[key]
            others = (s for s in sites if s.path == site.path and s.rows and s.role != site.role)
            chosen.update({(s.path, s.role): s for s in others})


def _within(chosen: dict[tuple[str, str], Site], site: Site) -> bool:
    """Whether a slice's whole host is chosen too."""
    if site.rows is None:
        return False
    family = site.role.partition(".")[0]
    return any((site.path, f"{family}.{fused}") in chosen for fused in SLICES)


# --------------------------------------------------------------------------------------- messages


def _nothing(sites: Sites, term: str, what: str) -> str:
    """What was asked, what this model has, what comes near."""
    model, have = sites.notes.model, ", ".join(sites.roles)
    if fused := _fused_instead(sites, what):
        host, reason = fused
        return (
            f"no {what!r} in {model} (asked by {term!r}): {host.path} computes it together with "
            f"others and {reason}; select {host.role!r} to change the whole"
        )
    match = re.compile(r"(?:.*\.)?" + translate(what)).match
    held = next((path_and_why for path_and_why in sites.notes.bare if match(path_and_why[0])), None)
    if held is not None and what not in ROLES:
        return f"{term!r} matches {held[0]}, but it is a {held[1]}: no place a method can stand on"
    if what in (*ROLES, ALL_LINEAR, ALL_ATTENTION):
        return f"no {what!r} in {model} (asked by {term!r}); it has {have}{_hidden(sites, what)}"
    roles = {*sites.roles, ALL_LINEAR, ALL_ATTENTION}
    if what.partition(".")[0] in SPANS:
        return f"no {what!r} in {model} (asked by {term!r}); it has {have}{_near(what, roles)}"
    names = {s.path.rpartition(".")[2] for s in sites} | {s.path for s in sites if "." in what}
    near = _near(what, roles | names)
    return f"{term!r} is no role and matches no module of {model}; roles it has: {have}{near}"


def _near(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known, 1)
    return f"; {near}" if near.startswith("did") else ""


def _hidden(sites: Sites, what: str) -> str:
    """Where weights of that family are after all, in a form nobody can stand on."""
    family = FAMILIES.get(what.partition(".")[0])
    for path, why in sites.notes.bare:
        router = block_role(path.rpartition(".")[0])[0] == "router"
        if family and not router and any(family.search(name) for name in path.split(".")):
            return f"; {path} is a {why}, no place a method can stand on"
    return ""


def _fused_instead(sites: Sites, what: str) -> tuple[Site, str] | None:
    family, _, part = what.partition(".")
    for site in sites:
        reason = sites.notes.unknown.get(site.path)
        if reason and site.role.startswith(family + "."):
            fused = site.role.partition(".")[2]
            if part in SLICES.get(fused, ()):
                return site, reason
    return None


def ranges(numbers: list[int]) -> str:
    """Sorted numbers as ranges: [0, 1, 2, 5] gives "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
