"""Espalier's own small decoder, shipped as package data, for a quickstart that needs no network.

It is a Llama-like model of about two million parameters that read the source code of Python's
standard library and nothing else; `espalier.base.build` is the whole recipe. This module is
light on purpose: it only finds the files and checks them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from espalier.errors import CheckpointError

WEIGHTS = "model.safetensors"
RECIPE = "recipe.json"
BUILD_HINT = "install Espalier again, or make the model with `espalier build-base`"


def base_dir() -> Path:
    """Return the folder of the shipped decoder, in the form `from_pretrained` reads."""
    return Path(__file__).resolve().parent / "model"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def verify(folder: Path | None = None) -> dict[str, object]:
    """Check that the decoder's weights are those its recipe names, and return the recipe.

    Args:
        folder: A folder written by `build_base`; the shipped decoder if not given.

    Raises:
        CheckpointError: If a file is missing, unreadable or not the one that was built.
    """
    folder = folder or base_dir()
    try:
        recipe = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        found = file_sha256(folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"the base decoder is incomplete: {error}; {BUILD_HINT}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder / RECIPE} is not JSON: {error}; {BUILD_HINT}") from error
    wanted = recipe.get("model_sha256") if isinstance(recipe, dict) else None
    if found != wanted:
        raise CheckpointError(
            f"{folder / WEIGHTS} is not the file its recipe names "
            f"(sha256 {found}, expected {wanted}); {BUILD_HINT}"
        )
    return recipe
