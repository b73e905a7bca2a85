"""A model under `torch.compile` while it trains: its repeated blocks, or all of it.

    layers    each block by itself: one graph serves all blocks alike, so compiling is short, and
              what stands between and after them (casts, the loss in chunks) stays as it was
    model     the whole forward pass with the loss, and all logits, in one graph: longer compiling

Sizes are symbols from the first graph on: no length or batch asks for a graph of its own, and what
a step computes does not depend on the steps before it, so that a resumed run goes on as it was.
Before anything is compiled one batch is traced; where Python is needed within a graph, the run is
refused with the reason. Nothing of this remains in the model afterwards.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from espalier.errors import SettingError
from espalier.graft import find
from espalier.modules import base_modules
from espalier.wording import setting

How = Literal["none", "layers", "model"]
BACKEND: str | Callable[..., Any] = "inductor"
GRAPHS = 64
"""Graphs of one function: training and evaluation, first and other blocks, single texts."""


@contextlib.contextmanager
def compiled(model: nn.Module, how: How, run: Callable[[], object]) -> Iterator[None]:
    """The model compiled while it lasts.

    Args:
        model: A grafted model in training mode.
        how: What is compiled: "none", "layers" or "model".
        run: A pass over a small batch, with gradients; it is traced before anything is compiled.

    Raises:
        SettingError: There is no compiler, no repeated block, or a graph would break.
    """
    if how == "none":
        yield
        return
    parts = _parts(model, how)
    _check_compiler(next(model.parameters()).device)
    with _limits():
        _trace(parts, how, run)
        try:
            for part in parts:
                part.compile(backend=BACKEND, dynamic=True)
            yield
        finally:
            _plain(parts)


def _limits() -> contextlib.AbstractContextManager[None]:
    settings: Any = torch._dynamo.config
    return settings.patch(
        recompile_limit=GRAPHS,
        accumulated_recompile_limit=8 * GRAPHS,
        # Under checkpointing deltas forget what they were told in forward, once; a compiled
        # backward computes the graph again, not the Python.
        skip_fwd_side_effects_in_bwd_under_checkpoint=True,
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a grafted model, in order, found from its places."""
    modules = base_modules(model)
    return [modules[site.path] for site in find(model).places.whole if site.role == "block"]


def _parts(model: nn.Module, how: How) -> list[nn.Module]:
    parts = blocks(model) if how == "layers" else [model]
    if not parts:
        raise SettingError(
            f"{setting('compile', 'layers')} finds no repeated block in {type(model).__name__}. "
            f"Use {setting('compile', 'model')}, or none."
        )
    return parts


def _check_compiler(device: torch.device) -> None:
    if BACKEND != "inductor" or device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        raise SettingError(
            f"{setting('compile')}: no C++ compiler is found, which torch.compile needs on a CPU. "
            f"Install g++ or clang, or write {setting('compile', 'none')}."
        ) from None


def _trace(parts: Sequence[nn.Module], how: How, run: Callable[[], object]) -> None:
    """Refuse what would break a graph, at the price of tracing alone."""
    try:
        for part in parts:
            part.compile(backend="eager", fullgraph=True, dynamic=True)
        run()
    except _failures() as e:
        other = f" {setting('compile', 'layers')} may do." if how == "model" else ""
        raise SettingError(
            f"{setting('compile', how)} does not suit this model with this method: {_reason(e)}."
            f"{other} Write {setting('compile', 'none')}."
        ) from e
    finally:
        _plain(parts)
        torch._dynamo.reset()


def _failures() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc  # slow to import, and needed by few

    return exc.TorchDynamoException, exc.InternalTorchDynamoError


def _reason(error: Exception) -> str:
    """What a graph broke at, in one line."""
    text = str(error).strip()
    found = re.search(r"Explanation: (.+)", text)
    line = found[1] if found else text.partition("\n")[0]
    return line.strip().rstrip(".")[:300] or type(error).__name__


def _plain(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        part._compiled_call_impl = None  # torch has no other way back
