"""Quantised bases: the linear weights of a model's layers in 4 or 8 bits, through bitsandbytes.

What lies in no layer stays as it is: embeddings, the output over the vocabulary, task heads. Norms
compute in fp32 whatever the base's type. Quantising replaces modules, so it comes before adapters.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.errors import AdapterError, SettingError, SiteError
from espalier.fast.nf4 import quick
from espalier.modules import base_modules, unwrap
from espalier.places import CHILD, Sites, sites
from espalier.storage import Footprint, Storage, footprint, library, stored

HALVES = (torch.bfloat16, torch.float16)


def quantize(
    model: nn.Module,
    kind: str = "nf4",
    *,
    double: bool = True,
    compute: torch.dtype | None = None,
    skip: str = "",
) -> Footprint:
    """Quantise the linear weights of a model's layers in place, one after the other.

    Args:
        model: Any transformers model or torch module, without adapters. Linear layers become
            bitsandbytes' `Linear4bit` or `Linear8bitLt`; transformers' Conv1D become linear.
        kind: "nf4", "fp4" or "int8".
        double: Quantise the scales of 4-bit weights too.
        compute: The type that 4-bit weights are expanded to when used; the model's by default.
        skip: Patterns of paths to leave alone, as in "*.down_proj, model.layers.0.*".

    Returns:
        What the base takes now, by arithmetic and measured.

    Raises:
        AdapterError: Adapters are attached, or the model is quantised already.
        SettingError: An unknown kind.
        SiteError: No layer has a linear weight.
    """
    model, storage = unwrap(model), Storage(kind, double)
    _refuse(model)
    if (found := stored(model)) is not None:
        raise AdapterError(f"the base is quantised already, to {found}")
    places = sites(model)
    paths = quantisable(model, places, skip)
    dtype = _type_of(model)
    compute = compute or dtype
    with torch.no_grad(), quick():
        for path in paths:
            model.set_submodule(path, _packed(model.get_submodule(path), storage, compute))
    settle(model, compute)
    return footprint(model, places, paths, storage, dtype)


def quantisable(model: nn.Module, places: Sites, skip: str = "") -> list[str]:
    """Paths of the linear weights that are quantised; the model may lie on "meta".

    Raises:
        SiteError: There are none.
    """
    patterns = [term.strip() for term in skip.split(",") if term.strip()]
    modules = base_modules(model)
    # T5 reads the type of a weight to compute in; transformers keeps such in fp32, and so do we.
    kept = {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept |= {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    found = [
        site.path
        for site in places.whole
        if site.kind in ("linear", "conv1d") and not (site.span or site.rows or site.tied)
        if site.layer is not None and site.path.rpartition(".")[2] not in kept
        if type(modules[site.path]) is nn.Linear or site.kind == "conv1d"
        if not any(fnmatchcase(site.path, pattern) for pattern in patterns)
    ]
    if not found:
        raise SiteError(f"{places.notes.model} has no linear weight in a layer to quantise")
    return found


def measure(model: nn.Module) -> Footprint | None:
    """What a quantised base takes, by arithmetic and measured; None where nothing is quantised."""
    storage = stored(model)
    if storage is None:
        return None
    places = sites(model)
    paths = [site.path for site in places if site.bits and not (site.span or site.rows)]
    return footprint(model, places, paths, storage, _type_of(model))


def _refuse(model: nn.Module) -> None:
    if CHILD in model._modules:
        raise AdapterError(
            "adapters are attached, and quantising or dequantising replaces the modules that they "
            "stand on: do it first, then attach"
        )


def _type_of(model: nn.Module) -> torch.dtype:
    """The base's type: that of most of its floating-point numbers."""
    counts: dict[torch.dtype, int] = {}
    for module in base_modules(model).values():
        for p in module._parameters.values():
            if p is not None and not hosts.packed(p):
                counts[p.dtype] = counts.get(p.dtype, 0) + p.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)


def _packed(module: nn.Module, storage: Storage, compute: torch.dtype) -> nn.Module:
    """The module that computes with the quantised weight of a Linear or Conv1D."""
    bnb = library(f"a base in {storage}")
    weight = hosts.parameter(module, "weight").detach()
    if type(module) is not nn.Linear:  # Conv1D keeps (in, out)
        weight = weight.T.contiguous()
    n_out, n_in = weight.shape
    bias = module._parameters.get("bias")
    with torch.device("meta"):
        if storage.kind == "int8":
            made = bnb.nn.Linear8bitLt(n_in, n_out, bias is not None, has_fp16_weights=False)
        else:
            made = bnb.nn.Linear4bit(
                n_in,
                n_out,
                bias is not None,
                compute_dtype=compute,
                compress_statistics=storage.double,
                quant_type=storage.kind,
            )
    device = weight.device
    if storage.kind == "int8":  # is quantised on its way from the CPU only
        made.weight = bnb.nn.Int8Params(
            weight.cpu(), requires_grad=False, has_fp16_weights=False
        ).to(device)
    else:
        made.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=storage.double,
            quant_type=storage.kind,
            module=made,
        ).to(device)
    if bias is not None:
        made.bias = bias
    made.source_cls = type(module)  # transformers' note of what it was
    return made.train(module.training)


def settle(model: nn.Module, compute: torch.dtype) -> None:
    """Make a quantised base sound to train on: norms in fp32, biases and layout kept as they are.

    Args:
        model: The base, quantised here or loaded so by transformers.
        compute: The type that 4-bit weights are expanded to when used.
    """
    modules = base_modules(model)
    hosts.hold_layout(modules.values())
    # It says at every call of an 8-bit module that inputs are cast to fp16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    for module in modules.values():
        # bitsandbytes casts a bias in place to what it computes in, also a trained copy.
        if isinstance(getattr(module, "compute_dtype", None), torch.dtype):
            module.compute_dtype = compute  # type: ignore[assignment]
            if (bias := module._parameters.get("bias")) is not None:
                bias.data = bias.data.to(compute)
    for site in sites(model):
        if site.kind == "norm":
            _widen(modules[site.path])


def _widen(norm: nn.Module) -> None:
    """Let a norm of half precision compute in fp32 between inputs and outputs of its old type."""
    half = next((p.dtype for p in norm._parameters.values() if p is not None), None)
    if half in HALVES:
        norm.to(torch.float32)
        norm.register_forward_pre_hook(_as_fp32)
        norm.register_forward_hook(partial(_as_before, half))


def _as_fp32(norm: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return args[0].float(), *args[1:]


def _as_before(dtype: torch.dtype, norm: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
    return y.to(dtype)


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Give a quantised base dense weights again, of the values that its codes stand for, in place.

    Args:
        model: A quantised model without adapters.
        dtype: The type of the weights; that of the rest of the base by default.

    Raises:
        AdapterError: Adapters are attached.
        SettingError: Nothing is quantised.
    """
    model = unwrap(model)
    _refuse(model)
    if stored(model) is None:
        raise SettingError("this model holds no quantised weights")
    dtype = dtype or _type_of(model)
    modules = base_modules(model)
    for site in sites(model):
        if site.bits and not (site.span or site.rows):
            model.set_submodule(site.path, _dense(modules[site.path], site, dtype))
        elif site.kind == "norm":
            _narrow(modules[site.path], dtype)
    for name in ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(getattr(model, "config", None), "quantization_config"):
        del model.config.quantization_config  # type: ignore[union-attr]


def _dense(module: Any, site: Any, dtype: torch.dtype) -> nn.Module:
    """A Linear or Conv1D with the values of a quantised module."""
    weight, bias = hosts.dense(module, site).to(dtype), module._parameters.get("bias")
    cls = getattr(module, "source_cls", nn.Linear)
    with torch.device("meta"):
        if cls is nn.Linear:
            made = nn.Linear(site.n_in, site.n_out, bias is not None)
        else:
            made, weight = cls(site.n_out, site.n_in), weight.T.contiguous()
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        bias.data = bias.data.to(dtype)
        made.bias = bias
    return made.train(module.training)


def _narrow(norm: nn.Module, dtype: torch.dtype) -> None:
    """Undo `_widen`."""
    for hooks in (norm._forward_pre_hooks, norm._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook is _as_fp32 or getattr(hook, "func", None) is _as_before:
                del hooks[key]
                norm.to(dtype)
