"""In how many bits a base's linear weights are stored, and what that comes to in memory.

    nf4, fp4   4 bits a number and a scale per 64 numbers: fp32 (4 + 32/64 = 4.5 bits), or, with
               double quantisation, 8 bits and an fp32 per 256 scales (4 + 8/64 + 32/16384 = 4.127)
    int8       8 bits a number and an fp32 scale per row

QLoRA, Dettmers et al. 2023 (arXiv 2305.14314); LLM.int8(), Dettmers et al. 2022 (2208.07339).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from espalier import hosts
from espalier.errors import SettingError
from espalier.modules import base_modules
from espalier.places import Sites

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

KINDS = ("nf4", "fp4", "int8")
BLOCK, BLOCKS = 64, 256  # numbers that share a scale, and scales that share one of their own
TABLES = 16 * 4, 256 * 4 + 4  # bytes of the code, and of the scales' code and their mean
NUMBER = 4  # bytes of a scale in fp32


@dataclass(frozen=True, slots=True)
class Storage:
    """How quantised weights are stored.

    Attributes:
        kind: "nf4", "fp4" or "int8".
        double: Whether the scales of 4-bit weights are quantised too.
    """

    kind: str = "nf4"
    double: bool = True

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SettingError(f"a base is quantised to {', '.join(KINDS)}; got {self.kind!r}")

    @property
    def bits(self) -> float:
        """Bits a number, without tables and the scales of int8, which large weights hide."""
        if self.kind == "int8":
            return 8.0
        scale = 8 + 8 * NUMBER / BLOCKS if self.double else 8 * NUMBER
        return 4 + scale / BLOCK

    def size(self, n_out: int, n_in: int) -> int:
        """Bytes of one weight (n_out, n_in), tables and scales included."""
        count = n_out * n_in
        if self.kind == "int8":
            return count + NUMBER * n_out
        scales = -(-count // BLOCK)
        codes = -(-count // 2) + TABLES[0]
        if not self.double:
            return codes + NUMBER * scales
        return codes + scales + NUMBER * -(-scales // BLOCKS) + TABLES[1]

    def to_json(self) -> dict[str, Any]:
        """As kept in an adapter's card."""
        return asdict(self)

    def __str__(self) -> str:
        return self.kind if self.double or self.kind == "int8" else f"{self.kind} (scales in fp32)"


def library(what: str) -> Any:
    """bitsandbytes, for `what` is asked of it.

    Raises:
        SettingError: It is not installed.
    """
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise SettingError(f"{what} needs bitsandbytes: pip install 'espalier[quant]'") from None


def stored(model: nn.Module) -> Storage | None:
    """How a model's quantised weights are stored; None where it has none."""
    for module in base_modules(model).values():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        state = getattr(weight, "quant_state", None)
        if state is not None:
            nested = bool(getattr(state, "original_nested", state.nested))
            return Storage(state.quant_type, nested)
        if hosts.packed(weight):
            return Storage("int8")
    return None


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a base takes in memory.

    Attributes:
        storage: How the quantised weights are stored.
        numbers: How many numbers are quantised, and how many are not.
        bytes: What these take by arithmetic, from the widths alone: quantised, and not.
        measured: What all tensors take together; None of a model that is not quantised yet.
        dense: What all of it would take unquantised.
    """

    storage: Storage
    numbers: tuple[int, int]
    bytes: tuple[int, int]
    measured: int | None
    dense: int

    @property
    def total(self) -> int:
        """Bytes by arithmetic."""
        return sum(self.bytes)


def footprint(
    model: nn.Module,
    places: Sites,
    paths: Iterable[str],
    storage: Storage,
    dtype: torch.dtype,
) -> Footprint:
    """Count a model whose weights at `paths` are quantised, or will be; it may lie on "meta".

    Args:
        model: The base, or a model with adapters, which are left out.
        places: Its places.
        paths: Of the modules with quantised weights.
        storage: How these are stored.
        dtype: The type of the rest; norms are fp32 always.
    """
    modules = base_modules(model)
    single = (site for site in places.whole if not (site.span or site.rows))
    widths = {site.path: (site.n_out, site.n_in) for site in single}
    chosen = {path: widths[path] for path in paths}
    norms = {site.path for site in places.whole if site.kind == "norm"}
    held: dict[int, tuple[nn.Parameter, int]] = {}
    for path, module in modules.items():
        for name, p in module._parameters.items():
            if p is not None and not (path in chosen and name == "weight"):
                held[id(p)] = p, NUMBER if path in norms else dtype.itemsize
    rest = sum(p.numel() for p, _ in held.values())
    numbers = sum(n_out * n_in for n_out, n_in in chosen.values())
    done = any(hosts.packed(hosts.parameter(modules[path], "weight")) for path in chosen)
    return Footprint(
        storage,
        (numbers, rest),
        (
            sum(storage.size(*width) for width in chosen.values()),
            sum(p.numel() * size for p, size in held.values()),
        ),
        _measured(modules) if done else None,
        dtype.itemsize * (numbers + rest),
    )


def _measured(modules: Mapping[str, nn.Module]) -> int:
    """Bytes of all parameters and of what belongs to their codes, shared memory once."""
    seen: dict[int, int] = {}
    for module in modules.values():
        for p in module._parameters.values():
            for tensor in () if p is None else (p.data, *_scales(module, p)):
                memory = tensor.untyped_storage()
                seen[memory.data_ptr()] = memory.nbytes()
    return sum(seen.values())


def _scales(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """The scales and tables of a quantised weight."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        own = getattr(weight, "SCB", None)
        own = getattr(getattr(module, "state", None), "SCB", None) if own is None else own
        return [] if own is None else [own]
    nested = [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    return [state.absmax, state.code, *nested]
