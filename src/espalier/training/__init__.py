"""Training: settings, loop, run folder. Names load when first used, so that importing is light."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from espalier.training.callback import AdapterCallback
    from espalier.training.config import RunConfig
    from espalier.training.result import RunResult
    from espalier.training.run import fit, train

__all__ = ["AdapterCallback", "RunConfig", "RunResult", "fit", "train"]

_HOME = {
    "AdapterCallback": "callback",
    "RunConfig": "config",
    "RunResult": "result",
    "fit": "run",
    "train": "run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"espalier.training has no {name!r}")
    return getattr(importlib.import_module(f"espalier.training.{_HOME[name]}"), name)
