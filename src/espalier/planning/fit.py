"""What to change so that a step fits a memory, what costs least first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.errors import EspalierError, SettingError
from espalier.planning.rehearsal import Rehearsal
from espalier.planning.setup import Setup
from espalier.recipes import Recipe, recipe
from espalier.storage import Storage
from espalier.wording import quoted, setting

if TYPE_CHECKING:
    from espalier.planning.estimate import Plan

SHORTEST = 64  # tokens: shorter texts are no way out
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Way:
    """Changes that make a step fit, or come nearer to it.

    Attributes:
        changes: What is changed, in words, each added to those before.
        plan: What a step takes with all of them.
        fits: Whether that is enough.
    """

    changes: tuple[str, ...]
    plan: Plan
    fits: bool

    def to_json(self) -> dict[str, Any]:
        """The changes, what they come to, and the command, as JSON values."""
        return {
            "changes": list(self.changes), "needed": self.plan.needed, "fits": self.fits,
            "command": command(self.plan.setup),
        }  # fmt: skip


def bytes_of(text: int | str) -> int:
    """Bytes from a number or a text such as 24GB, 800 MB or 16GiB.

    Raises:
        SettingError: It is neither, or nothing.
    """
    read = _MEMORY.fullmatch(str(text))
    if read is None or isinstance(text, bool):
        raise SettingError(f"memory is a number of bytes or like 24GB, 800MB; got {text!r}")
    base = 2**10 if read[3] else 10**3
    power = " kmgt".index(read[2].lower() or " ")
    found = int(float(read[1]) * base**power)
    if found <= 0:
        raise SettingError(f"memory must be more than nothing; got {text!r}")
    return found


def ways(rehearsal: Rehearsal, found: Plan, memory: int) -> Iterator[Way]:
    """The cheapest changes with which a step fits `memory`, tried one on top of the other.

    The last way fits, or is all that can be done. Nothing where it fits as it is.
    """
    from espalier.planning.estimate import of_step

    if found.needed <= memory:
        return
    setup, changes, least = found.setup, (), found.needed
    way: Way | None = None
    for change in (None, *_CHANGES):
        changed = setup if change is None else change(setup, rehearsal)
        if changed is None:
            continue
        try:
            fresh = changed.same_base != setup.same_base
            tried = Rehearsal(changed) if fresh else rehearsal
        except EspalierError:  # this method cannot stand there
            continue
        floor = _floor(tried, changed)
        if change is not None:
            lowest = floor
            if floor <= memory:
                lowest = of_step(tried, dataclasses.replace(changed, batch=1)).needed
            before = _floor(rehearsal, setup) if floor > memory else least
            if lowest > 0.98 * before and change is not _shorter:
                continue  # it is not worth its price here
            changes = (*changes, *_told(setup, changed))
        rehearsal, setup = tried, changed
        if floor > memory:  # no batch is small enough
            continue
        plan = of_step(rehearsal, _with_batch(setup, largest(rehearsal, setup, memory) or 1))
        least = min(least, plan.needed)
        smaller = plan.setup.batch != found.setup.batch
        told = (_batch_words(plan.setup), *changes) if smaller else changes
        if told:
            way = Way(told, plan, plan.needed <= memory)
            yield way
        if plan.needed <= memory:
            spared = _spared(plan, rehearsal, found.setup, memory)
            if spared is not None:
                yield spared
            return
    if way is None:
        plan = of_step(rehearsal, _with_batch(setup, 1))
        yield Way((_batch_words(plan.setup), *changes), plan, plan.needed <= memory)


def _spared(plan: Plan, rehearsal: Rehearsal, asked: Setup, memory: int) -> Way | None:
    """A way without the changes that later ones made needless, dearest first; None without any."""
    from espalier.planning.estimate import of_step

    full = setup = plan.setup
    for names in _BACK:
        back = dataclasses.replace(setup, **{name: getattr(asked, name) for name in names})
        if back == setup:
            continue
        try:
            again = rehearsal if back.same_base == setup.same_base else Rehearsal(back)
        except EspalierError:  # the method cannot stand on what the base was
            continue
        if _floor(again, back) > memory:
            continue
        less = of_step(again, back)
        if less.needed <= memory:
            setup, rehearsal, plan = back, again, less
    return Way(tuple(_told(asked, setup)), plan, True) if setup != full else None


def _floor(rehearsal: Rehearsal, setup: Setup) -> int:
    """Bytes that no batch and no length change."""
    from espalier.planning.estimate import held

    return rehearsal.standing + sum(held(rehearsal, setup))


def largest(rehearsal: Rehearsal, setup: Setup, memory: int) -> int | None:
    """The largest micro-batch whose step fits, of those that keep the optimiser's step the same.

    Memory is linear in the batch at every operation, so two small steps foretell the others; the
    one chosen is looked at itself. None where not even one row fits.
    """
    from espalier.planning.estimate import of_step

    def needed(batch: int) -> int:
        return of_step(rehearsal, _with_batch(setup, batch)).needed

    choices = divisors(setup.batch)
    low = [batch for batch in choices if batch <= 2]
    if needed(low[-1]) > memory:
        return None
    if len(choices) > 2:
        at = [needed(batch) for batch in (2, 4)]
        slope = (at[1] - at[0]) / 2
        for batch in reversed(choices):
            if at[0] + slope * (batch - 2) <= memory and needed(batch) <= memory:
                return batch
    return next((batch for batch in reversed(low) if needed(batch) <= memory), None)


def divisors(rows: int) -> list[int]:
    """Micro-batches that divide a step's rows, smallest first."""
    return [n for n in range(1, rows + 1) if rows % n == 0]


def _with_batch(setup: Setup, batch: int) -> Setup:
    rows = setup.batch * setup.accumulate
    if rows % batch:
        return dataclasses.replace(setup, batch=batch)
    return dataclasses.replace(setup, batch=batch, accumulate=rows // batch)


Change = Callable[[Setup, Rehearsal], "Setup | None"]


def _eight_bits(setup: Setup, _: Rehearsal) -> Setup | None:
    if setup.optimizer.endswith("8bit"):
        return None
    return dataclasses.replace(setup, optimizer="adamw_8bit")


def _checkpointing(setup: Setup, _: Rehearsal) -> Setup | None:
    return None if setup.checkpointing else dataclasses.replace(setup, checkpointing=True)


def _four_bits(setup: Setup, _: Rehearsal) -> Setup | None:
    if setup.storage is not None or setup.recipe.trains_base:
        return None
    return dataclasses.replace(setup, storage=Storage("nf4"))


def _shorter(setup: Setup, _: Rehearsal) -> Setup | None:
    length = setup.length // 2
    if length < SHORTEST:
        return None
    return dataclasses.replace(
        setup, length=length, target_length=max(SHORTEST, setup.target_length // 2)
    )


def _top_half(setup: Setup, rehearsal: Rehearsal) -> Setup | None:
    """The same method on the upper half of the layers: nothing is saved below the lowest."""
    from espalier.places import sites

    parts = []
    count = max((s.layer or 0 for s in sites(rehearsal.model)), default=0) + 1
    for method in setup.recipe.methods:
        chosen = getattr(method, "sites", "")
        if not chosen or "@" in chosen or "layers" in chosen or count < 2:
            return None
        terms = (f"{term.strip()}@{count // 2}-" for term in chosen.split(","))
        parts.append(dataclasses.replace(method, sites=", ".join(terms)))  # type: ignore[type-var]
    return dataclasses.replace(setup, recipe=Recipe(tuple(parts)))


def _lora(setup: Setup, _: Rehearsal) -> Setup | None:
    """LoRA on the attention's queries and values in place of a method that trains more."""
    small = recipe("LoRA(sites='attention.q, attention.v')")
    return None if setup.recipe == small else dataclasses.replace(setup, recipe=small)


# What costs least first: nothing, a third more time, some exactness of the base, cut texts, and
# last the method itself.
_CHANGES: tuple[Change, ...] = (
    _eight_bits, _checkpointing, _four_bits, _shorter, _shorter, _top_half, _lora, _four_bits,
)  # fmt: skip


# What a way out may give back, dearest first.
_BACK = (
    ("length", "target_length"), ("storage",), ("checkpointing",), ("optimizer",),
    ("batch", "accumulate"),
)  # fmt: skip


def _batch_words(setup: Setup) -> str:
    batch, accumulate = setting("batch", setup.batch), setting("accumulate", setup.accumulate)
    return f"{batch} with {accumulate} (the same step)"


def _told(old: Setup, new: Setup) -> Iterator[str]:
    """Every difference of two setups, in words."""
    if new.batch != old.batch:
        yield _batch_words(new)
    if new.optimizer != old.optimizer:
        yield setting("optimizer", new.optimizer)
    if new.checkpointing != old.checkpointing:
        yield f"{setting('checkpointing', True)} (about 1/3 slower)"
    if new.storage != old.storage:
        yield f"{setting('quantize', 'nf4')} (the base in 4 bits)"
    if new.length != old.length:
        yield f"{setting('max_length', new.length)} (data is cut)"
    if new.recipe != old.recipe:
        yield setting("method", str(new.recipe))


def flags(setup: Setup) -> list[str]:
    """The settings of a setup as flags, those that differ from the defaults."""
    found = ["--model", quoted(setup.model), "--method", quoted(str(setup.recipe))]
    found += ["--batch", str(setup.batch)]
    if setup.accumulate > 1:
        found += ["--accumulate", str(setup.accumulate)]
    if setup.precision != "fp32":
        found += ["--precision", setup.precision]
    if setup.storage is not None:
        found += ["--quantize", setup.storage.kind]
        found += [] if setup.storage.double else ["--no-double-quantization"]
    if setup.checkpointing:
        found.append("--checkpointing")
    if setup.optimizer != "adamw":
        found += ["--optimizer", setup.optimizer]
    return found


def command(setup: Setup) -> str:
    """The command that trains so; the data is left to fill in."""
    words = [*flags(setup), "--max-length", str(setup.length), "--train", "DATA"]
    return "espalier train " + " ".join(words)
