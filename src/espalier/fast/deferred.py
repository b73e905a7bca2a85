"""Logits that are computed when they are used; a cross-entropy over them never uses them whole.

In a model's place for logits (B, T, V) stands a tensor without memory that knows the hidden states
(B, T, D) and the head. What models do on the way to their loss it follows without computing: casts,
reshapes that leave the vocabulary alone, slices of tokens, and functions of single logits (a scale,
a cap, a bias over the vocabulary) which are noted down and done to each chunk. `F.cross_entropy`
drops the ignored tokens and takes the rest in chunks (loss.py). Any other function is given the
logits, computed with their graph as they would have been: whatever a model or a person does with
them, the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from espalier.errors import AdapterError
from espalier.fast import liger
from espalier.fast.loss import chunked_sum

Change = Callable[[Tensor], Tensor]


@dataclass(slots=True, eq=False)
class Source:
    """A head as it is in one pass.

    Attributes:
        run: Gives logits (…, V) for hidden states (…, D).
        trained: What it needs gradients for besides its input.
        width: V.
        weight: W (V, D) and c or None, where all it does is h Wᵀ + c and neither trains; else None.
    """

    run: Change
    trained: tuple[Tensor, ...]
    width: int
    weight: tuple[Tensor, Tensor | None] | None = None


class Logits(Tensor):
    """Logits (…, V) of hidden states (…, D) that nobody has needed yet.

    Attributes:
        source: The head.
        hidden: What it will read, with its graph.
        changes: What is done to every chunk of logits afterwards.
    """

    source: Source
    hidden: Tensor
    changes: tuple[Change, ...]
    _whole: Tensor | None

    @staticmethod
    def __new__(
        cls,
        source: Source,
        hidden: Tensor,
        dtype: torch.dtype,
        changes: tuple[Change, ...] = (),
    ) -> Logits:
        """A tensor of the logits' shape, type and device, without numbers."""
        shape = (*hidden.shape[:-1], source.width)
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)  # type: ignore[attr-defined]
        made.source, made.hidden, made.changes, made._whole = source, hidden, changes, None
        return made

    def compute(self) -> Tensor:
        """All logits, as the model would have given them: with their graph, to be written to."""
        if self._whole is None:
            with torch.inference_mode(False), torch.enable_grad():
                self._whole = _run(self.source, self.changes, self.hidden)
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        follow = _FOLLOWED.get(func)
        result = NotImplemented
        if follow is not None and args and type(args[0]) is cls:
            result = follow(func, *args, **kwargs)
        if result is NotImplemented:
            args, kwargs = tree_map(_computed, (args, kwargs))
            result = func(*args, **kwargs)
        return result

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise AdapterError(
            f"{func} was given logits that are not computed yet, past all that could compute "
            "them; run the forward pass within `with esp.plain_paths():`"
        )


def _run(source: Source, changes: tuple[Change, ...], hidden: Tensor) -> Tensor:
    """The logits (…, V) of some hidden states (…, D), changed."""
    logits = source.run(hidden)
    for change in changes:
        logits = change(logits)
    return logits


def _computed(value: Any) -> Any:
    return value.compute() if type(value) is Logits else value


# ------------------------------------------------------------------------------ what is followed


def _cast(func: Any, self: Logits, *args: Any, **kwargs: Any) -> Any:
    """To another type, on the same device."""
    like = torch.empty(0, dtype=self.dtype, device=self.device)
    cast = func(like, *args, **kwargs)
    if cast.device != self.device:
        return NotImplemented
    changes = self.changes
    if cast.dtype != self.dtype:
        changes = (*changes, _Cast(cast.dtype))
    return Logits(self.source, self.hidden, cast.dtype, changes)


@dataclass(frozen=True, slots=True)
class _Cast:
    dtype: torch.dtype

    def __call__(self, logits: Tensor) -> Tensor:
        return logits.to(self.dtype)


def _reshape(func: Any, self: Logits, *args: Any, **kwargs: Any) -> Any:
    """To another shape that ends with the vocabulary."""
    shaped = func(_outline(self), *args, **kwargs)
    if shaped.dtype != self.dtype or shaped.dim() < 2 or shaped.shape[-1] != self.shape[-1]:
        return NotImplemented
    hidden = self.hidden.reshape(*shaped.shape[:-1], self.hidden.shape[-1])
    return Logits(self.source, hidden, self.dtype, self.changes)


def _pick(func: Any, self: Logits, index: Any) -> Any:
    """Some of the tokens, with all of the vocabulary."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not all(part is ... or isinstance(part, slice | int) for part in parts):
        return NotImplemented
    rest = [slice(None)] * (self.dim() - sum(part is not ... for part in parts))
    at = parts.index(...) if ... in parts else len(parts)
    parts[at : at + 1] = rest
    if len(parts) != self.dim() or parts[-1] != slice(None):
        return NotImplemented
    hidden = self.hidden[tuple(parts)]
    if hidden.dim() < 2:
        return NotImplemented
    return Logits(self.source, hidden, self.dtype, self.changes)


def _each(func: Any, self: Logits, *args: Any, **kwargs: Any) -> Any:
    """A function of single logits, and of constants that are the same for every token."""
    for value in tree_leaves((args, kwargs)):
        if isinstance(value, Tensor) and not _constant(value):
            return NotImplemented
    outline, args_, kwargs_ = tree_map(
        lambda v: v.to("meta") if isinstance(v, Tensor) else v, (_outline(self), args, kwargs)
    )
    try:
        result = func(outline, *args_, **kwargs_)
    except (RuntimeError, TypeError):  # let it be raised where it is really done
        return NotImplemented
    if result.shape != self.shape:
        return NotImplemented
    change = _Change(func, args, kwargs)
    return Logits(self.source, self.hidden, result.dtype, (*self.changes, change))


@dataclass(frozen=True, slots=True)
class _Change:
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.func(logits, *self.args, **self.kwargs)


def _constant(value: Tensor) -> bool:
    alike = all(size == 1 for size in value.shape[:-1]) and value.dim() <= 2
    return type(value) is not Logits and alike and not value.requires_grad


def _outline(logits: Logits) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device="meta")


def _cross_entropy(
    func: Any,
    self: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """The mean or the sum over the tokens that count, chunk by chunk."""
    plain = weight is None and size_average is None and reduce is None
    if not plain or self.dim() != 2 or target.dim() != 1 or target.is_floating_point():
        return NotImplemented
    if reduction not in ("mean", "sum") or len(target) != len(self):
        return NotImplemented
    kept = (target != ignore_index).nonzero()[:, 0]
    hidden = self.hidden
    if len(kept) < len(target):
        hidden, target = hidden[kept], target[kept]
    changes = self.changes
    while changes and isinstance(changes[-1], _Cast) and changes[-1].dtype == torch.float32:
        changes = changes[:-1]  # sums are taken in fp32 in any case
    if not changes and liger.suits(self.source.weight, hidden):
        assert self.source.weight is not None
        total = liger.chunked_sum(hidden, target, *self.source.weight, label_smoothing)
    else:
        source = self.source
        run, trained = partial(_run, source, changes), source.trained
        total = chunked_sum(run, hidden, target, source.width, trained, label_smoothing)
    return total / len(kept) if reduction == "mean" else total


def _named(names: Sequence[str]) -> list[Any]:
    """The functions of torch and of tensors that have these names."""
    homes = (Tensor, torch)
    found = (vars(home).get(name) or getattr(home, name, None) for home in homes for name in names)
    return [func for func in found if func is not None]


_FACTS = (
    *("dtype", "device", "shape", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "grad"),
    *("is_cuda", "is_cpu", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested"),
)
_QUESTIONS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "__len__"),
    *("is_floating_point", "is_complex", "is_contiguous"),
)
_ABOUT = {getattr(Tensor, name).__get__ for name in _FACTS} | {*_named(_QUESTIONS)}

_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_named(["to", "float", "double", "half", "bfloat16", "contiguous"]), _cast),
    **dict.fromkeys(_named(["view", "reshape", "flatten"]), _reshape),
    **dict.fromkeys(_named(["__getitem__"]), _pick),
    **dict.fromkeys(
        _named(["add", "sub", "mul", "div", "true_divide", "tanh", "clamp", "neg"])
        + _named(["__add__", "__radd__", "__sub__", "__mul__", "__rmul__", "__truediv__"])
        + _named(["__neg__"]),
        _each,
    ),
    F.cross_entropy: _cross_entropy,
}
