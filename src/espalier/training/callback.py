"""For those who stay with transformers.Trainer (or trl): the adapter saved, dead places noticed.

    esp.attach(model, esp.LoRA())
    Trainer(model, args, train_dataset=..., callbacks=[AdapterCallback()]).train()

A grafted model trains in the Trainer as it is, since only the adapter asks for gradients. With the
callback each checkpoint folder, and at the end the output folder, gets an `adapter` folder that
`esp.load` reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from espalier.checkpoint import save
from espalier.errors import TrainingError
from espalier.verbs import dead_sites, only_active


class AdapterCallback(TrainerCallback):
    """Saves the active adapter with each checkpoint and at the end; checks the first gradients.

    Args:
        name: The adapter to save; the only active one if left out.
        extras: JSON kept with it, like a chat template or labels.

    Raises:
        AdapterError: no name was given, and not exactly one adapter is active.
        TrainingError: after the first backward pass a place of the adapter has no gradient.
    """

    def __init__(self, name: str | None = None, extras: Mapping[str, Any] | None = None) -> None:
        self.name, self.extras = name, extras
        self._checked = False

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
        """Put the final adapter into the output folder."""
        self._save(model, Path(str(args.output_dir)), state)

    def _save(self, model: nn.Module | None, folder: Path, state: TrainerState) -> None:
        if model is not None and state.is_world_process_zero:
            name = self.name or only_active(model)
            save(model, name, folder / "adapter", extras=self.extras)
