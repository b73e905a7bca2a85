"""How weights are stored: the one file that knows Linear, Conv1D, Conv2d, Embedding and 4/8 bits.

Everything else sees a float32 weight in the orientation of `nn.Linear`, (out, in).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier.errors import AdapterError
from espalier.places import Site

if TYPE_CHECKING:
    from espalier.deltas import Delta

Operand = Tensor | Callable[[], Tensor]
Undo = partial[None]  # no closure: in a deep copy of the model it restores the copy


def parameter(host: nn.Module, name: str) -> nn.Parameter:
    """The base's own parameter, also while a trained copy stands in for it."""
    own = host._parameters[name]
    assert own is not None
    return own


def whole(tensor: Tensor) -> Tensor:
    """A parameter's values; where they are spread over processes, gathered: a call of all."""
    if hasattr(tensor, "full_tensor"):  # torch's DTensor, which FSDP2 makes of parameters
        return tensor.full_tensor()  # type: ignore[operator]
    if hasattr(tensor, "ds_id"):  # a parameter under DeepSpeed's ZeRO-3
        deepspeed: Any = import_module("deepspeed")
        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor


@contextmanager
def gathered(host: nn.Module) -> Iterator[None]:
    """The host with its own parameters whole while it lasts, to be called outside of a pass."""
    own = host._parameters
    host._parameters = {name: p if p is None else whole(p) for name, p in own.items()}  # type: ignore[assignment]
    try:
        yield
    finally:
        host._parameters = own


def dense(host: nn.Module, site: Site) -> Tensor:
    """The host's weight as float32: (out, in), a kernel (out, in, kh, kw), or a table (V, D)."""
    weight = parameter(host, "weight")
    if site.bits:
        weight = _dequantised(host, weight)
    weight = whole(weight.detach()).to(torch.float32)
    return weight.T if site.kind == "conv1d" else weight


def packed(parameter: nn.Parameter) -> bool:
    """Whether a parameter is quantised: its elements are no numbers that could be trained."""
    return not parameter.is_floating_point() or hasattr(parameter, "quant_state")


def count(parameter: nn.Parameter) -> int:
    """How many numbers a parameter stands for; one in 4 bits holds two in each byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def bias(host: nn.Module) -> Tensor | None:
    """The host's bias as float32, or None."""
    own = host._parameters.get("bias")
    return None if own is None else whole(own.detach()).to(torch.float32)


def current(host: nn.Module, site: Site, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weight (out, in) and bias that the host computes with now, cut to the site's rows.

    Where a trained copy stands in for a parameter, it is the copy.
    """
    weight, own = host.weight, host.__dict__.get("bias", host._parameters.get("bias"))
    assert isinstance(weight, Tensor)
    if site.bits:
        weight = _dequantised(host, parameter(host, "weight"))
    weight = (weight.T if site.kind == "conv1d" else weight).to(dtype)
    found = {"weight": weight if site.rows is None else site.rows.take(weight.T).T}
    if isinstance(own, Tensor):
        found["bias"] = (own if site.rows is None else site.rows.take(own)).to(dtype)
    return found


def computed(x: Tensor) -> torch.dtype:
    """The type in which products of x are computed: x's own, or what autocast casts it to."""
    if x.dtype == torch.float64:
        return x.dtype
    return autocast_type(x.device.type) or x.dtype


def multiplies(host: nn.Module, x: Tensor) -> bool:
    """Whether all a host does with x is x Wᵀ + c, in x's type or autocast's, and W is frozen.

    That is so for Linear and Conv1D themselves, and for 4-bit layers that compute in x's type.
    """
    weight = host.__dict__.get("weight", host._parameters.get("weight"))
    if weight is None or weight.requires_grad:
        return False
    kind = type(host)
    if kind is nn.Linear or _is(kind, "transformers.pytorch_utils", "Conv1D"):
        casts = x.is_floating_point() and autocast_type(x.device.type) is not None
        return weight.dtype == x.dtype or (casts and torch.float64 not in (weight.dtype, x.dtype))
    if _is(kind, "bitsandbytes.nn.modules", "Linear4bit") and computed(x) == x.dtype:
        return host.compute_dtype in (None, x.dtype) and hasattr(weight, "quant_state")
    return False


def operands(host: nn.Module, dtype: torch.dtype) -> tuple[Operand, Tensor | None]:
    """W (D_out, D_in), or what unpacks it anew, and c, of a host that only multiplies."""
    weight, bias = host.weight, host.bias
    if bias is not None:
        bias = bias.to(dtype)  # type: ignore[operator]
    if packed(weight):  # type: ignore[arg-type]
        return partial(_unpacked, host, dtype), bias  # type: ignore[return-value]
    if weight.dtype != dtype:  # cast anew in backward: kept, the whole base would be there twice
        return partial(_cast, host, weight, dtype), bias  # type: ignore[return-value]
    return _upright(host, weight), bias  # type: ignore[return-value, arg-type]


def _upright(host: nn.Module, weight: Tensor) -> Tensor:
    """The weight (out, in) of a Linear or a Conv1D."""
    return weight if type(host) is nn.Linear else weight.t()


def _cast(host: nn.Module, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return _upright(host, weight).to(dtype)


def autocast_type(kind: str) -> torch.dtype | None:
    """What autocast casts to on a kind of device; None where it is off, as on meta."""
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def _is(kind: type, module: str, name: str) -> bool:
    return kind.__name__ == name and kind.__module__ == module


def _unpacked(host: nn.Module, dtype: torch.dtype) -> Tensor:
    """A 4-bit weight (out, in) in the type of the computation."""
    import bitsandbytes.functional as bnb

    weight = parameter(host, "weight")
    return bnb.dequantize_4bit(weight.data, weight.quant_state).to(dtype)  # type: ignore[attr-defined]


def tensors(delta: Delta, like: Tensor, host: nn.Module) -> dict[str, Tensor]:
    """A delta's numbers in the type and on the device of the computation, as its ports get them."""
    t = {
        key: _alike(delta.cast.get(key, own), own, like)
        for key, own in delta.t.items()
        if key not in delta.aside
    }
    if delta.reads_host:
        t.update(current(host, delta.site, like.dtype))
    return t


def _alike(cast: Tensor, own: Tensor, like: Tensor) -> Tensor:
    """Numbers, or what they were cast to, in another tensor's type and on its device."""
    if not own.is_floating_point():
        return own.to(like.device)
    v = cast if cast.dtype == like.dtype else own
    return v if v.dtype == like.dtype and v.device == like.device else v.to(like.device, like.dtype)


def write(host: nn.Module, site: Site, weight: Tensor, untie: bool = False) -> Undo:
    """Put a float32 weight into the host, cast once; returns what restores the exact old bits.

    Args:
        host: The module.
        site: Its site; says how the weight is stored.
        weight: The new weight, in the orientation that `dense` gives.
        untie: Give the host a parameter of its own if it shares its weight with another module.

    Raises:
        AdapterError: The weight is quantised: writing it back would lose most of a small change.
    """
    refuse_quantised(site)
    weight = weight.T if site.kind == "conv1d" else weight
    return put(host, "weight", weight, untie)


def refuse_quantised(site: Site) -> None:
    """Raise AdapterError where a weight is quantised: writing back loses most of a small change."""
    if site.bits:
        raise AdapterError(
            f"{site.path} holds {site.bits}-bit weights; writing a merged weight back into "
            f"{site.bits} bits loses most of a small change. Write a 16-bit model with `espalier "
            "merge RUN --out FOLDER` or esp.write_merged(model, name, base, folder), or give the "
            "base dense weights first: save the adapter, detach it, esp.dequantize(model), load "
            "the adapter, merge"
        )


def declare_untied(model: nn.Module) -> list[Undo]:
    """Note in the model's config that its embeddings are no longer tied; returns the undo."""
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False):
        return []
    config.tie_word_embeddings = False
    return [partial(setattr, config, "tie_word_embeddings", True)]


def put(host: nn.Module, name: str, value: Tensor, own: bool = False) -> Undo:
    """Give a parameter new values in its own type; returns what restores the exact old bits.

    With `own`, the host gets a parameter of its own and the shared one stays as it was.
    """
    known = parameter(host, name)
    fresh = value.detach().to(known.device, known.dtype).contiguous()
    if own:
        host._parameters[name] = nn.Parameter(fresh, requires_grad=known.requires_grad)
        return partial(setattr, host, name, known)
    old, known.data = known.data, fresh
    return partial(setattr, known, "data", old)


def put_bias(host: nn.Module, value: Tensor) -> Undo:
    """Give a host a bias, also one that had none; returns what restores the exact old bits."""
    if host._parameters.get("bias") is not None:
        return put(host, "bias", value)
    weight = parameter(host, "weight")
    fresh = value.detach().to(weight.device, weight.dtype)
    host.register_parameter("bias", nn.Parameter(fresh, requires_grad=False))
    return partial(host.register_parameter, "bias", None)


def scaled(host: nn.Module) -> bool:
    """Whether an embedding multiplies its rows on the way out (BART, Gemma 3, …)."""
    return isinstance(host, nn.Embedding) and hasattr(host, "embed_scale")


def checkpointed(host: nn.Module) -> bool:
    """Whether a block checkpoints itself within its class's forward, as transformers' do."""
    own = type(host).forward
    names = getattr(getattr(own, "__code__", None), "co_names", ())
    return "_gradient_checkpointing_func" in names and hasattr(own, "__wrapped__")


def gain(host: nn.Module) -> Tensor:
    """What a scaled embedding multiplies its rows with."""
    return torch.as_tensor(host.embed_scale, dtype=parameter(host, "weight").dtype)


def hold_layout(modules: Iterable[nn.Module]) -> list[Undo]:
    """Keep 4-bit weights on the CPU in the layout that they are trained in; returns the undo.

    On some processors bitsandbytes repacks them at the first evaluation: the scales are rounded
    to bf16, and no gradient passes the module from then on.
    """
    undo: list[Undo] = []
    for module in modules:
        if module.__dict__.get(REPACKS):
            _repack(module)
            setattr(module, REPACKS, False)
            undo.append(partial(setattr, module, REPACKS, True))
    return undo


REPACKS = "support_avx512bf16_for_cpu"  # what bitsandbytes asks of a 4-bit module before repacking


def _repack(host: nn.Module) -> None:
    """Give a 4-bit host that was repacked for evaluation the layout of training again."""
    state = getattr(host._parameters["weight"], "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        host.state_dict()  # bitsandbytes unpacks what it saves


def _dequantised(host: nn.Module, weight: nn.Parameter) -> Tensor:
    """The weight (out, in) in fp32, as its codes say."""
    import bitsandbytes.functional as bnb

    _repack(host)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        wide = copy(state)
        wide.dtype = torch.float32  # not rounded to the type that the weight once had
        return bnb.dequantize_4bit(weight.data, wide)
    scales = weight.SCB  # type: ignore[attr-defined]
    if scales is None:  # the first forward moves them
        scales = host.state.SCB  # type: ignore[union-attr]
    return bnb.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[arg-type]
