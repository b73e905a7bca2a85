"""A base by its configuration alone, as a run would load it, in tensors without memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.errors import CheckpointError, EspalierError, SettingError
from espalier.modules import base_modules
from espalier.places import sites
from espalier.quantised import quantisable, settle
from espalier.storage import BLOCK, BLOCKS, Storage, library
from espalier.training import models
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.tasks import Task


def configuration(name: str) -> tuple[str, Any]:
    """The base's name and its configuration; a run folder or an adapter stands for its base.

    Raises:
        CheckpointError: There is no such model here, or transformers does not know its kind.
    """
    from espalier.checkpoint import WEIGHTS, read_card

    folder = Path(name).expanduser()
    if any((folder / inner / WEIGHTS).is_file() for inner in ("", "adapter")):
        name = str(read_card(folder)["base"]["name"])
    elif folder.is_file() and folder.suffix != ".json":
        raise CheckpointError(f"{name} is a file; give a model's folder, or its config.json.")
    return name, models.load_config(name)


def skeleton(config: Any, task: Task, dtype: torch.dtype, storage: Storage | None) -> nn.Module:
    """The model of a configuration for a task, on "meta": no memory, its layers in few bits.

    Raises:
        CheckpointError: There is no such model for the task.
        SettingError: It is to be quantised and cannot be, or is stored quantised.
    """
    import transformers

    if getattr(config, "quantization_config", None):
        raise SettingError(
            f"{config._name_or_path or config.model_type} is stored quantised; plan with the model "
            "it was made from, and quantize (--quantize nf4)"
        )
    for key, value in task.model_settings().items():
        setattr(config, key, value)
    auto = getattr(transformers, task.auto_model)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = auto.from_config(config)
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"There is no model of kind {config.model_type!r} for the task {task.name}; "
            f"name another with task (--task). ({reason})"
        ) from error
    return shaped(model, dtype, storage)


def shaped(model: nn.Module, dtype: torch.dtype, storage: Storage | None) -> nn.Module:
    """A model on "meta" in a type, its layers in few bits where asked."""
    kept = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    for path, module in base_modules(model).items():
        wide = any(part in kept for part in path.split("."))
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.float32 if wide else dtype)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = 0  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    if storage is not None:
        try:
            paths = quantisable(model, sites(model))
        except EspalierError as error:
            raise SettingError(f"{setting('quantize', storage.kind)}, but {error}") from None
        for path in paths:
            model.set_submodule(path, _packed(model.get_submodule(path), storage, dtype))
        settle(model, dtype)
    return model.train()


def _packed(module: nn.Module, storage: Storage, compute: torch.dtype) -> nn.Module:
    """The module of bitsandbytes in place of a Linear or Conv1D, without memory for its codes."""
    bnb = library(f"a base in {storage}")
    weight, bias = hosts.parameter(module, "weight"), module._parameters.get("bias")
    n_out, n_in = weight.shape if type(module) is nn.Linear else weight.shape[::-1]
    with torch.device("meta"):
        if storage.kind == "int8":
            made = bnb.nn.Linear8bitLt(n_in, n_out, bias is not None, has_fp16_weights=False)
            codes, scales = torch.empty(n_out, n_in, dtype=torch.int8), torch.empty(n_out)
            made.weight = nn.Parameter(codes, requires_grad=False)
            vars(made.weight).update(CB=None, SCB=None)
            made.state.CB, made.state.SCB = codes, scales
        else:
            made = bnb.nn.Linear4bit(n_in, n_out, bias is not None, compute_dtype=compute)
            codes = torch.empty(-(-n_out * n_in // 2), 1, dtype=torch.uint8)
            made.weight = nn.Parameter(codes, requires_grad=False)
            vars(made.weight)["quant_state"] = _state(n_out, n_in, storage, compute)
    made.bias = bias
    made.source_cls = type(module)
    return made


def _state(n_out: int, n_in: int, storage: Storage, dtype: torch.dtype) -> Any:
    """What bitsandbytes keeps beside the codes of a 4-bit weight."""
    functional = library(f"a base in {storage}").functional
    scales = -(-n_out * n_in // BLOCK)
    told: dict[str, Any] = {
        "shape": torch.Size((n_out, n_in)), "dtype": dtype, "blocksize": BLOCK,
        "quant_type": storage.kind, "code": torch.empty(16),
    }  # fmt: skip
    if not storage.double:
        return functional.QuantState(torch.empty(scales), **told)
    inner = functional.QuantState(
        torch.empty(-(-scales // BLOCKS)), dtype=torch.float32, blocksize=BLOCKS,
        code=torch.empty(256),
    )  # fmt: skip
    own = torch.empty(scales, dtype=torch.uint8)
    return functional.QuantState(own, **told, offset=torch.empty(()), state2=inner)


def pretend(model: nn.Module, device: torch.device) -> None:
    """Turn a model's tensors on "meta" into ones that claim to lie on a device; call it within.

    What shares memory goes on to share it.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one too, or its id would be another's

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, new
        return made[id(tensor)][1]

    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None:
                    continue
                held[name] = fake(tensor)  # type: ignore[assignment]
                _carry(tensor, held[name], fake)
        state: Any = getattr(module, "state", None)  # of an 8-bit module
        if isinstance(getattr(state, "CB", None), Tensor):
            state.CB, state.SCB = hosts.parameter(module, "weight").data, fake(state.SCB)


def _carry(old: Any, new: Any, fake: Any) -> None:
    """Give a faked parameter what bitsandbytes keeps on it."""
    state = getattr(old, "quant_state", None)
    if state is not None:
        for one in (state, state.state2):
            for name in ("absmax", "code", "offset"):
                if isinstance(getattr(one, name, None), Tensor):
                    setattr(one, name, fake(getattr(one, name)))
        new.quant_state = state
    elif hasattr(old, "SCB"):
        new.CB = new.SCB = None


def beside(model: nn.Module) -> list[Tensor]:
    """Tensors that belong to a model's codes and are no parameters."""
    found: list[Tensor] = []
    for module in base_modules(model).values():
        quant = getattr(module._parameters.get("weight"), "quant_state", None)
        owners = (quant, getattr(quant, "state2", None), getattr(module, "state", None))
        for owner in owners:
            held = (getattr(owner, name, None) for name in ("absmax", "code", "offset", "SCB"))
            found += [tensor for tensor in held if isinstance(tensor, Tensor)]
    return found
