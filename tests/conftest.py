"""Quiet libraries, one thread, no network."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
