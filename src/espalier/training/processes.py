"""A run's processes: how they find each other, wait for each other, and hold the base together.

With `sharding` the base is spread over them before the adapter is attached. The processes of one
machine read it in turn, so that its memory holds one whole copy at a time and no more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier.errors import SettingError, TrainingError
from espalier.graft import get
from espalier.modules import is_sharded
from espalier.wording import setting

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.device_mesh import DeviceMesh

    from espalier.training.config import RunConfig

PATIENCE = timedelta(hours=1)  # how long a process waits for the others: one may read a large base
_LOST = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe")


def accelerator(config: RunConfig) -> Accelerator:
    """The run's device and processes.

    Raises:
        SettingError: The engine that shards is not there, or accelerate was told of another.
    """
    _check_engine(config)
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    names = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    handlers: list[Any] = [InitProcessGroupKwargs(timeout=PATIENCE)]
    # On a machine without an accelerator several processes are found only when told of the CPU.
    alone = int(os.environ.get("WORLD_SIZE", 1)) == 1 or torch.accelerator.is_available()
    try:  # what these would have it do we do ourselves, to the base alone
        return Accelerator(cpu=not alone, kwargs_handlers=handlers)
    finally:
        os.environ.update(before)


def _check_engine(config: RunConfig) -> None:
    asked = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "zero3"}
    for variable, name in asked.items():
        if os.environ.get(variable, "false").lower() in ("1", "true") and config.sharding == "none":
            raise SettingError(
                f"accelerate's configuration asks for {variable.rpartition('_')[2].lower()}, the "
                f"run's for none: write {setting('sharding', name)}, so that the base is sharded "
                "and the adapter is not"
            )
    if config.sharding == "zero3" and find_spec("deepspeed") is None:
        raise SettingError(
            f"{setting('sharding', 'zero3')} needs the package deepspeed, which is not installed: "
            f"pip install deepspeed. Or write {setting('sharding', 'fsdp')}, which spreads a "
            "frozen base just so and needs nothing more than torch"
        )


def shares_base(config: RunConfig, accelerator: Accelerator) -> bool:
    """Whether the base is to be spread: asked for, and over more than one process."""
    return config.sharding != "none" and accelerator.num_processes > 1


@contextlib.contextmanager
def in_turn(accelerator: Accelerator, on: bool) -> Iterator[None]:
    """One process of a machine after the other, if `on`."""
    mine = accelerator.local_process_index if on else 0
    for _ in range(mine):
        accelerator.wait_for_everyone()
    yield
    for _ in range(mine, _local_count() if on else 0):
        accelerator.wait_for_everyone()


def mesh(config: RunConfig, accelerator: Accelerator) -> DeviceMesh | None:
    """The processes as FSDP2 is to use them, called by all; None where it is not to be used."""
    if not shares_base(config, accelerator) or config.sharding == "zero3":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    kind, count = accelerator.device.type, accelerator.num_processes
    if config.sharding == "fsdp":
        return init_device_mesh(kind, (count,))
    shape = (count // _local_count(), _local_count())
    return init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))


def spread(model: nn.Module, config: RunConfig, accelerator: Accelerator) -> None:
    """Spread a base over the processes, as `sharding` asks, unless it is so already.

    Raises:
        SettingError: The base is quantised.
    """
    from espalier.sharding import shard, zero3

    if is_sharded(model):
        return
    if config.sharding == "zero3":
        zero3(model)
    else:
        shard(model, mesh(config, accelerator))


def agree(model: nn.Module, name: str, accelerator: Accelerator) -> None:
    """Give every process the main one's numbers of an adapter, to the last bit."""
    if accelerator.num_processes > 1:
        for flat in get(model, name).runs.values():
            torch.distributed.broadcast(flat.data, 0)


@contextlib.contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Say in one sentence when a process waits in vain for the others.

    Raises:
        TrainingError: Another process has ended, or does not answer any more.
    """
    try:
        yield
    except RuntimeError as error:
        if accelerator.num_processes == 1 or not _lost(error):
            raise
        index, count = accelerator.process_index, accelerator.num_processes
        raise TrainingError(
            f"Process {index} of {count} waited in vain for another, which has ended or hangs: "
            "what it said last tells why. A run with saved steps goes on with "
            f"{setting('resume', True)}."
        ) from error


def _lost(error: Exception) -> bool:
    return isinstance(error, torch.distributed.DistError) or (
        type(error) is RuntimeError and any(word in str(error).lower() for word in _LOST)
    )


def _local_count() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def described(config: RunConfig, accelerator: Accelerator) -> list[str]:
    """A line on how the base lies in the processes; none where it is whole."""
    if config.sharding == "none":
        return []
    if accelerator.num_processes == 1:
        return [
            f"{setting('sharding', config.sharding)} does nothing in one process: start several "
            "with `espalier launch`"
        ]
    over = _local_count() if config.sharding == "hybrid" else accelerator.num_processes
    return [f"base spread over {over} processes ({config.sharding}), the adapter whole in each"]
