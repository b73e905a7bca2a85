"""For those who stay with transformers.Trainer (or trl): all that an adapter needs in training.

    esp.attach(model, esp.LoRA())
    Trainer(model, args, train_dataset=..., callbacks=[AdapterCallback()]).train()

A grafted model trains in the Trainer as it is, since only the adapter asks for gradients. With the
callback, methods that live while they train (schedules, penalties, projections) are told of every
optimiser step; each checkpoint folder, and at the end the output folder, gets an `adapter` folder
that `esp.load` reads. At the end the adapter becomes the plain form that serves, and the form that
trained is kept beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from espalier.checkpoint import save
from espalier.errors import SettingError, TrainingError
from espalier.lifecycle import Lifecycle
from espalier.training.finish import settle
from espalier.verbs import dead_sites, only_active


class AdapterCallback(TrainerCallback):
    """Drives the active adapter's lifecycle, saves it, and checks its first gradients.

    Args:
        name: The adapter to save; the only active one if left out.
        extras: JSON kept with it, like a chat template or labels.

    Raises:
        AdapterError: no name was given, and not exactly one adapter is active.
        SettingError: the best checkpoint is to be loaded at the end, which may be one from before
            the adapter's method has settled what it keeps.
        TrainingError: after the first backward pass a place of the adapter has no gradient.
    """

    def __init__(self, name: str | None = None, extras: Mapping[str, Any] | None = None) -> None:
        self.name, self.extras = name, extras
        self._checked = False
        self._life: Lifecycle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Let the optimiser's steps drive what the adapter's methods do while they train."""
        if model is None or optimizer is None:
            return
        self._life = Lifecycle(model, state.max_steps, state.global_step)
        if args.load_best_model_at_end and self._life.settles:
            raise SettingError(
                "load_best_model_at_end may bring back an adapter whose ranks or masks are not "
                "final: its method settles them in the course of training. Leave it out, and what "
                "stands at the end is kept"
            )
        # accelerate wraps the optimiser and skips steps in which gradients only add up.
        self._life.follow(getattr(optimizer, "optimizer", optimizer))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Check once that every place of the adapter got a gradient."""
        if self._checked or model is None:
            return
        self._checked = True
        dead = dead_sites(model)
        if dead:
            raise TrainingError(f"These places of the adapter get no gradient: {', '.join(dead)}.")

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Put the adapter beside the checkpoint that was just written."""
        self._save(model, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}", state)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Put the final adapter into the output folder, in its plain form."""
        if model is None:
            return
        if self._life is not None:
            self._life.leave()
        folder = Path(str(args.output_dir))
        name = self.name or only_active(model)
        settle(model, name, folder if state.is_world_process_zero else None, self.extras)
        self._save(model, folder, state)

    def _save(self, model: nn.Module | None, folder: Path, state: TrainerState) -> None:
        if model is not None and state.is_world_process_zero:
            name = self.name or only_active(model)
            save(model, name, folder / "adapter", extras=self.extras)
