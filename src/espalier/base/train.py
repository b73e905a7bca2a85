"""Training loop of the base decoder: plain causal language modelling on one CPU thread.

The order of the blocks is a function of the seed and the step alone, and a checkpoint holds
the weights with the optimizer's state (safetensors, renamed into place), so that a build that
was killed goes on where it was and sees the same blocks as one that was not.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from espalier.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

Report = Callable[[int, float, float], None]


@dataclass(frozen=True)
class TrainSettings:
    """What the optimizer does; `steps` is fixed before the first step."""

    steps: int
    batch: int = 8
    block: int = 256
    lr: float = 3e-3
    lr_end: float = 1e-4
    warmup: int = 200
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    bf16: bool = True
    checkpoint_seconds: float = 300.0


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the rate of a step: linear warmup, then a cosine down to `lr_end`."""
    warmup = min(settings.warmup, max(1, settings.steps // 10))
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.lr_end + (settings.lr - settings.lr_end) * (1 + math.cos(math.pi * done)) / 2


class Blocks:
    """Batches of token blocks; every epoch has its own offset and its own order."""

    def __init__(self, ids: Tensor, settings: TrainSettings) -> None:
        """Keep the ids and find out how many batches one epoch has."""
        self.ids, self.settings = ids, settings
        self.count = (len(ids) - settings.block) // settings.block
        self.per_epoch = self.count // settings.batch
        if self.per_epoch < 1:
            raise DataError(f"{len(ids)} tokens are too few for one batch of blocks")
        self._epoch, self._order, self._offset = -1, torch.empty(0, dtype=torch.long), 0

    def batch(self, step: int) -> Tensor:
        """Return the batch of a step, of shape (batch, block)."""
        epoch, index = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.settings.seed * 100_003 + epoch)
            self._order = torch.randperm(self.count, generator=generator)
            self._offset = int(torch.randint(self.settings.block, (1,), generator=generator))
            self._epoch = epoch
        size, block = self.settings.batch, self.settings.block
        starts = self._order[index * size : (index + 1) * size] * block + self._offset
        return self.ids[starts[:, None] + torch.arange(block)[None, :]].long()


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.AdamW, step: int, key: str
) -> None:
    """Write weights, moments and step number under a temporary name, then rename."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"weight.{name}"] = parameter.detach().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].contiguous()
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"step": str(step), "key": key})
    os.replace(temporary, path)


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW, key: str) -> int:
    """Restore a checkpoint and return the number of steps done; 0 when there is none.

    Raises:
        CheckpointError: If the file cannot be read or belongs to other settings or other text.
    """
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                raise CheckpointError(
                    f"{path} comes from a build with other settings or other text; delete its "
                    "folder to start afresh"
                )
            step = int(metadata["step"])
            for name, parameter in model.named_parameters():
                parameter.data.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
                }
    except (SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error}") from error
    return step


def batch_loss(model: nn.Module, ids: Tensor, bf16: bool) -> Tensor:
    """Return the mean next-token loss in nats; the matrices multiply in bf16 if asked."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    ids: Tensor,
    settings: TrainSettings,
    checkpoint: Path | None = None,
    key: str = "",
    report: Report | None = None,
) -> int:
    """Train `model` in place up to `settings.steps` and return the step it started from.

    Args:
        model: The decoder, in fp32.
        ids: The tokens of the whole text, one after the other.
        settings: The optimizer's settings.
        checkpoint: Where to keep the state of an unfinished training, if anywhere.
        key: Names settings and text; a checkpoint with another key is refused.
        report: Called after every step with (steps done, loss, rate of the step).
    """
    blocks = Blocks(ids, settings)
    optimizer = make_optimizer(model, settings)
    first = load_checkpoint(checkpoint, model, optimizer, key) if checkpoint else 0
    model.train()
    saved = time.monotonic()
    for step in range(first, settings.steps):
        rate = learning_rate(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = batch_loss(model, blocks.batch(step), settings.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if report:
            report(step + 1, loss.item(), rate)
        if checkpoint and time.monotonic() - saved > settings.checkpoint_seconds:
            save_checkpoint(checkpoint, model, optimizer, step + 1, key)
            saved = time.monotonic()
    return first


@torch.no_grad()
def bits_per_character(model: nn.Module, ids: Tensor, characters: int, block: int) -> float:
    """Return the bits that `model` needs for each character of a text, read block by block.

    Blocks overlap by one token, so that every token but the very first is predicted.
    """
    model.eval()
    nats = 0.0
    span = block - 1
    full = (len(ids) - 1) // span
    starts = list(range(full))
    for at in range(0, full, 16):
        chunk = torch.stack([ids[s * span : s * span + block] for s in starts[at : at + 16]]).long()
        nats += float(batch_loss(model, chunk, bf16=False)) * chunk[:, 1:].numel()
    rest = ids[full * span :].long()
    if len(rest) > 1:
        nats += float(batch_loss(model, rest[None], bf16=False)) * (len(rest) - 1)
    return nats / math.log(2) / max(1, characters)
