"""Quiet libraries, one thread, no network."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--plain-paths", action="store_true", help="fast paths off in every test")


@pytest.fixture(autouse=True)
def _paths(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--plain-paths"):
        yield
        return
    from espalier.fast.switch import plain_paths

    with plain_paths():
        yield


@pytest.fixture
def peft_finds_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peft up to 0.21 looks for the old name of a cache, which transformers 5.24 still takes."""

    def signature(function: Callable[..., Any]) -> inspect.Signature:
        found = inspect.signature(function)
        known = found.parameters
        if "cache" not in known or "past_key_values" in known:
            return found
        old = inspect.Parameter("past_key_values", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return inspect.Signature([old, *known.values()], __validate_parameters__=False)

    monkeypatch.setattr("peft.peft_model.inspect", SimpleNamespace(signature=signature))
