"""Loading a base in few bits: each weight is quantised as it is read, the whole is never dense."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from espalier.errors import CheckpointError, SettingError, SiteError
from espalier.fast.nf4 import quick
from espalier.places import Sites, sites
from espalier.quantised import quantisable, settle
from espalier.storage import Footprint, Storage, footprint, library
from espalier.wording import setting


def expected(
    auto: Any, name: str, settings: dict[str, Any], storage: Storage
) -> tuple[Any, Sites, list[str]]:
    """The model without memory for its weights, its places, and the paths to quantise.

    Raises:
        SettingError: What lies in the folder is quantised already, or has nothing to quantise.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name, **settings)
    if getattr(config, "quantization_config", None):
        raise SettingError(
            f"{setting('quantize', storage.kind)}, but {name} is stored quantised already; it is "
            "loaded as it is when that is left out."
        )
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = auto.from_config(config)
    places = sites(model)
    try:
        return model, places, quantisable(model, places)
    except SiteError as error:
        raise SettingError(f"{setting('quantize', storage.kind)}, but {error}.") from None


def arithmetic(
    auto: Any, name: str, settings: dict[str, Any], storage: Storage, dtype: torch.dtype
) -> Footprint:
    """What a base will take, from its configuration alone."""
    model, places, paths = expected(auto, name, settings, storage)
    return footprint(model, places, paths, storage, dtype)


def keywords(
    auto: Any, name: str, settings: dict[str, Any], storage: Storage, dtype: torch.dtype
) -> dict[str, Any]:
    """Keywords with which transformers' `from_pretrained` quantises what `quantize` would."""
    from transformers import BitsAndBytesConfig

    library(setting("quantize", storage.kind))
    model, _, paths = expected(auto, name, settings, storage)
    chosen = set(paths)
    left = [
        re.escape(path) + "$"  # the whole path, not others that begin or end like it
        for path, module in model.named_modules()
        if (isinstance(module, nn.Linear) or hasattr(module, "nf")) and path not in chosen
    ]
    four = storage.kind != "int8"
    config = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        llm_int8_skip_modules=left or ["$nothing"],
        llm_int8_threshold=0.0,
        bnb_4bit_quant_type=storage.kind if four else "fp4",
        bnb_4bit_use_double_quant=storage.double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


def loaded(
    auto: Any, name: str, settings: dict[str, Any], storage: Storage, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """A quantised model, ready to train on, and transformers' notes of its loading.

    Args:
        auto: The class that loads it.
        name: A folder, or a name on the hub.
        settings: Keywords of the configuration.
        storage: How its layers are stored.
        dtype: The type of the rest, and of what 4-bit weights are expanded to.

    Raises:
        SettingError: It cannot be quantised, or is already.
        CheckpointError: A weight to quantise is not in the files.
    """
    more = keywords(auto, name, settings, storage, dtype)
    with _tight(), quick():
        model, info = auto.from_pretrained(
            name,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **settings,
            **more,
        )
    _refuse_unfilled(model, info["missing_keys"], name)
    settle(model, dtype)
    return model, info


_THRESHOLD = -3  # of glibc's mallopt: the size above which memory goes straight back when freed
_SMALL, _USUAL = 2**20, 2**25


@contextmanager
def _tight() -> Iterator[None]:
    """Let freed memory go back to the system at once, where the C library is glibc.

    Each weight passes through a few temporary tensors of its size. Left to itself the allocator
    keeps most of that memory, which on a CPU comes to as much as the quantised model.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.mallopt(_THRESHOLD, _SMALL)  # type: ignore[union-attr]
    try:
        yield
    finally:
        libc.malloc_trim(0)  # type: ignore[union-attr]
        libc.mallopt(_THRESHOLD, _USUAL)  # type: ignore[union-attr]


def _refuse_unfilled(model: Any, missing: set[str], name: str) -> None:
    """Raise CheckpointError where a weight to quantise was not in the files."""
    modules = dict(model.named_modules())
    for key in missing:
        path, _, leaf = key.rpartition(".")
        if leaf == "weight" and hasattr(modules.get(path), "source_cls"):
            raise CheckpointError(
                f"{name} holds no {key}; a base in few bits needs all of its layers."
            )
