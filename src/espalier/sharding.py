"""Sharding: a frozen base spread over processes by torch's FSDP2, its adapters whole in each.

Blocks are found from the sites, so in any model: each is gathered when it runs and let go of
again. The numbers of an adapter are few, so every process holds all of them: they are ignored by
FSDP, their gradients are added up here, and one process alone can save them. A seat calls its host
within the block's own forward, where the weights are whole.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from espalier import identity
from espalier.errors import AdapterError, SettingError
from espalier.graft import Graft, find
from espalier.modules import base_modules, is_sharded, unwrap
from espalier.places import CHILD, sites
from espalier.storage import stored
from espalier.verbs import parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: nn.Module, mesh: DeviceMesh | None = None) -> None:
    """Spread the base's parameters over processes; called by all of them, before training.

    Adapters can be attached before or after. Afterwards every pass of the model, and whatever
    reads a weight (a start from the base's own weights), is a call of all processes. Gradients of
    the adapters are each process's own until `average_gradients`.

    Args:
        model: The same in all processes, on the host or on the device; its parts move to the
            mesh's device one by one.
        mesh: One dimension shards; of two, the first replicates. All processes if left out.

    Raises:
        AdapterError: The base is sharded already, or an adapter is merged into it.
        SettingError: torch.distributed is not initialised, or the base is quantised.
    """
    from torch.distributed import is_available, is_initialized
    from torch.distributed.fsdp import fully_shard

    model = unwrap(model)
    if is_sharded(model):
        raise AdapterError("this base is sharded already")
    if not (is_available() and is_initialized()):
        raise SettingError(
            "a base is sharded over processes, and torch.distributed is not initialised: start "
            "them with `espalier launch`, or call torch.distributed.init_process_group first"
        )
    refuse_quantised(model)
    graft = model._modules.get(CHILD)
    if isinstance(graft, Graft):
        graft.refuse_merged()
        live, graft.live = graft.live, ()
        graft.refresh()  # trained copies step aside
    ours = set() if graft is None else set(graft.parameters())
    identity.note(model)
    modules = base_modules(model)
    for path in blocks(model):
        fully_shard(modules[path], mesh=mesh, ignored_params=ours)
    fully_shard(model, mesh=mesh, ignored_params=ours)
    if isinstance(graft, Graft):
        for name, adapter in graft.adapters.items():
            graft.place(model, adapter, graft.skipped[name])
        graft.live = live
        graft.refresh()


def zero3(model: nn.Module) -> None:
    """Spread the base by DeepSpeed's ZeRO-3, the adapters left whole. Never run on a machine yet.

    The adapters stand aside while the engine takes the model apart. It gets no optimiser: nothing
    of what it holds trains.

    Raises:
        SettingError: The base is quantised.
    """
    deepspeed: Any = import_module("deepspeed")
    model = unwrap(model)
    refuse_quantised(model)
    identity.note(model)
    graft = model._modules.pop(CHILD, None)
    model.requires_grad_(False)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    try:
        deepspeed.initialize(model=model, config=settings)
    finally:
        if graft is not None:
            model._modules[CHILD] = graft


def blocks(model: nn.Module) -> list[str]:
    """The paths of the blocks that are gathered one at a time, inner ones first."""
    paths = {site.path for site in sites(model).whole if site.role == "block" and site.path}
    return sorted(paths, key=lambda path: (-path.count("."), path))


def refuse_quantised(model: nn.Module) -> None:
    """Raise SettingError where a base is in few bits: its packed weights cannot be cut."""
    storage = stored(model)
    if storage is not None:
        raise SettingError(
            f"this base is in {storage}: its packed weights lose their scales when they are cut "
            "into shards. Leave sharding out, so that each process holds the base whole (70 "
            "billion numbers in nf4 take 36 GB), or shard it unquantised, in bf16"
        )


def average_gradients(model: nn.Module) -> None:
    """Average the adapters' gradients over all processes; after backward, before clipping.

    For loops of one's own over a sharded base. A gradient that a process lacks counts as zeros.

    Raises:
        AdapterError: Nothing is attached.
    """
    from torch.distributed import ReduceOp, all_reduce, get_world_size, is_initialized

    find(model)
    if not is_initialized():
        return
    for parameter in parameters(model):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_reduce(parameter.grad, ReduceOp.SUM)
        parameter.grad /= get_world_size()
