"""Rows of one batch on different adapters: `with esp.rows(model, ["mail", None, "tax"]): …`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from espalier.deltas import Delta
from espalier.errors import AdapterError, SettingError
from espalier.graft import Graft, find
from espalier.mixed import Mixed
from espalier.modules import base_modules, unwrap
from espalier.pieces import Live
from espalier.verbs import Choice, resolve

if TYPE_CHECKING:
    from espalier.seat import Seat


@contextmanager
def rows(model: nn.Module, choices: Sequence[Choice]) -> Iterator[None]:
    """Within it row i of every batch is on the i-th choice; afterwards all is as it was.

    Each row's output is what the row would give alone, with its adapter active: forward passes,
    training, and `generate` with its caches, beams and several sequences for a row. Any mix of
    methods goes together, except as below. A backward pass through checkpointed layers runs them
    again and belongs within.

    Args:
        model: A model with adapters.
        choices: For each row what `esp.activate` takes: a name, a list of names that are stacked,
            {"a": 0.7, "b": 0.3}, or None for the base alone.

    Example:
        with esp.rows(model, ["mail", None, "tax"]):
            tokens = model.generate(**batch)

    Raises:
        SettingError: The choices are no list of at least one.
        AdapterError: A choice that `esp.activate` would refuse, or adapters that cannot share a
            batch: a network that runs beside the model, prompts of different lengths, trained
            copies of what is not computed row by row. In a forward pass: the batch has no such
            rows.
    """
    if isinstance(choices, str | Mapping) or not choices:
        raise SettingError(
            f"rows takes a list with a choice for each row of the batch, such as "
            f"['mail', None], not {choices!r}"
        )
    graft = find(model)
    known = {repr(choice): choice for choice in choices}  # each is checked once
    found = {key: resolve(graft, choice) for key, choice in known.items()}
    lives = [found[repr(choice)] for choice in choices]
    if len(set(lives)) > 1:
        _check(unwrap(model), graft, list(dict.fromkeys(lives)))
    before, taken = graft.live, []
    try:
        taken += _enter(unwrap(model), graft, lives)
        yield
    finally:
        graft.rows = None
        for seat, name in taken:
            seat.deltas.pop(name)
            kept = seat.deltas or seat.watchers or seat.around or seat.quick
            if not kept and seat.leave():
                del graft.seats[seat.path]
        graft.live = tuple((name, weight) for name, weight in before if name in graft.adapters)
        graft.refresh()


def _enter(model: nn.Module, graft: Graft, lives: list[Live]) -> list[tuple[Seat, str]]:
    """Make all adapters of the rows live, each on its rows; gives the seats made for this time."""
    names = list(dict.fromkeys(name for live in lives for name, _ in live))
    alike = len(set(lives)) == 1
    graft.live = lives[0] if alike else tuple((name, 1.0) for name in names)
    for name in names:
        graft.adapters[name].sync()
    taken: list[tuple[Seat, str]] = []
    if not alike:
        graft.rows = Mixed(graft, lives)
        paths = {id(module): path for path, module in base_modules(model).items()}
        for name in names:
            for module, delta in graft.stand_ins[name]:
                seat = graft.seat(paths[id(module)], module)
                if name not in seat.deltas:
                    taken.append((seat, name))
                seat.deltas.setdefault(name, []).append(delta)
    graft.refresh()
    return taken


def _check(model: nn.Module, graft: Graft, lives: list[Live]) -> None:
    """Raise AdapterError where these adapters cannot share a batch."""
    modules = base_modules(model)
    acting = [[(n, d) for n, _ in live for d in graft.acting(graft.adapters[n])] for live in lives]
    words = {site.n_out for site in graft.places.whole if site.role == "embedding"}
    for name, delta in (pair for group in acting for pair in group):
        if why := _alone(delta, modules, words):
            raise AdapterError(
                f"{name!r} cannot be on some rows of a batch: {why}; esp.activate it for a batch "
                "of its own"
            )
    _check_told(graft, lives)
    _check_words(acting)


def _alone(delta: Delta, modules: Mapping[str, nn.Module], words: set[int]) -> str:
    """Why a delta acts on whole batches only; "" if it does not."""
    site, kind = delta.site, type(delta).__name__
    host = modules[site.path]
    if delta.taps:
        return f"its {kind} is a network of its own that runs beside the whole batch"
    table = isinstance(host, nn.Embedding) and bool(words) and host.embedding_dim not in words
    if table and not (delta.attends or delta.embeds):
        return f"{site.path} is a table that all rows of a batch share"
    if not delta.replaces:
        return ""
    above = modules.get(site.path.rpartition(".")[0])
    if len(host._modules) or isinstance(above, nn.MultiheadAttention):
        return f"it trains numbers of {site.path} that are not applied row by row"
    return ""


def _check_told(graft: Graft, lives: list[Live]) -> None:
    """Deltas that note what each pass is given note it for one group of rows."""
    seen: set[str] = set()
    for name in (name for live in lives for name, _ in live):
        if name in seen and graft.adapters[name].told:
            raise AdapterError(
                f"{name!r} notes what its rows are given (gates do), and can be on the rows of one "
                "choice only, not also in another stack or with another weight"
            )
        seen.add(name)


def _check_words(acting: list[list[tuple[str, Delta]]]) -> None:
    """Prompts stand among the words of all rows in the same places."""
    gaps = [
        tuple(sum(d.gaps[at] for _, d in group if d.embeds) for at in range(3)) for group in acting
    ]
    if len(set(gaps)) > 1:
        lengths = ", ".join(str(sum(one)) for one in dict.fromkeys(gaps))
        raise AdapterError(
            f"these rows would have {lengths} words of soft prompts beside their text, and all "
            "rows of a batch have as many in the same places; serve them in batches of their own"
        )
