"""Methods that live while they train: penalties, schedules and projections, for any training loop.

    life = esp.Lifecycle(model, steps=1000).follow(optimizer)

From then on each `optimizer.step()` adds the gradient of the methods' penalties and tells them of
the step. A loop that clips gradients calls `penalise`, `before` and `after` itself, the first of
them before it clips.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from espalier.deltas import Regime
from espalier.errors import SettingError
from espalier.graft import find

_FOLLOWING: WeakKeyDictionary[Regime, Lifecycle] = WeakKeyDictionary()  # each drives alone


class Lifecycle:
    """Drives what the active adapters' methods do while they train.

    Args:
        model: A model with adapters.
        steps: Optimiser steps of the whole training: schedules are laid out over them.
        done: Steps done already, when a training is resumed.

    Raises:
        SettingError: `steps` is no whole number of at least 1, or `done` is not within it.
    """

    def __init__(self, model: nn.Module, steps: int, done: int = 0) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise SettingError(f"Lifecycle(steps={steps!r}): a whole number of at least 1")
        if not 0 <= done <= steps:
            raise SettingError(f"Lifecycle(done={done!r}): from 0 to {steps} steps can be done")
        graft = find(model)
        self.steps, self.done = steps, done
        live = (graft.adapters[name] for name, _ in graft.live)
        self.adapters = [a for a in live if any(p.requires_grad for p in a.parameters())]
        self.regimes = [regime for adapter in self.adapters for regime in adapter.regimes]
        self._hooks: list[RemovableHandle] = []
        for regime in self.regimes:
            regime.start(steps, done)

    @property
    def settled(self) -> bool:
        """Whether the adapters as they stand may be kept as the result."""
        return all(regime.settled for regime in self.regimes)

    @property
    def settles(self) -> bool:
        """Whether it takes training until the adapters are fit to be kept, done by now or not."""
        return any(type(regime).settled is not Regime.settled for regime in self.regimes)

    def report(self) -> dict[str, list[list[Any]]]:
        """What there is to tell of each place: by name, lists of stack, layer, role and number."""
        found: dict[str, list[list[Any]]] = {}
        for regime in self.regimes:
            for name, numbers in regime.report().items():
                for delta, number in zip(regime.deltas, numbers, strict=True):
                    at = delta.site
                    found.setdefault(name, []).append([at.stack, at.layer, at.role, number])
        return found

    def penalise(self) -> Tensor:
        """Add the gradient of this step's penalties to those of the loss; their sum, a scalar."""
        found = [regime.penalty() for regime in self.regimes]
        parts = [penalty for penalty in found if penalty is not None]
        if not parts:
            return torch.zeros(())
        total = torch.stack(parts).sum()
        total.backward()
        return total.detach()  # still on its device: nobody waits for it who does not read it

    def before(self) -> None:
        """To be called when a step's gradients are complete, before the optimiser uses them."""
        self._tell("before_step")

    def after(self) -> None:
        """To be called after the optimiser's step, before the gradients are cleared."""
        self._tell("after_step")
        self.done += 1

    def follow(self, optimizer: torch.optim.Optimizer) -> Lifecycle:
        """Let an optimiser's steps, and no other's any more, do all three; returns itself.

        Another lifecycle that drove the same adapters, as when a cell is run again, no longer does.
        """
        for regime in self.regimes:
            if (before_us := _FOLLOWING.get(regime)) is not None:
                before_us.leave()
            _FOLLOWING[regime] = self
        self.leave()

        def before(*_: Any) -> None:
            self.penalise()
            self.before()

        def after(*_: Any) -> None:
            self.after()

        pre, post = optimizer.register_step_pre_hook, optimizer.register_step_post_hook
        self._hooks = [pre(before), post(after)]
        return self

    def leave(self) -> None:
        """Undo `follow`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _tell(self, what: str) -> None:
        if not self.regimes:
            return
        for adapter in self.adapters:
            adapter.show_gradients(True)
        with torch.no_grad():
            for regime in self.regimes:
                getattr(regime, what)(self.done + 1)
        for adapter in self.adapters:
            adapter.show_gradients(False)
