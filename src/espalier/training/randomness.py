"""Every random number generator that training may touch: seeded, written down, put back."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from espalier.errors import CheckpointError


def seed_all(seed: int) -> None:
    """Seed python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def write(path: Path) -> None:
    """Write the random states of python, numpy, torch and every GPU."""
    _, keys, *rest = np.random.get_state()
    version, words, gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": t for i, t in enumerate(torch.cuda.get_rng_state_all())}
    others = {"numpy": [int(rest[0]), int(rest[1]), float(rest[2])], "python": [version, gauss]}
    save_file(tensors, path, metadata={"others": json.dumps(others)})


def read(path: Path) -> None:
    """Put back what `write` wrote.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            others = json.loads(file.metadata()["others"])
    except (OSError, SafetensorError, ValueError) as error:
        raise CheckpointError(f"The random state {path} cannot be read: {error}") from error
    torch.set_rng_state(tensors["torch"])
    np.random.set_state(("MT19937", tensors["numpy"].numpy().astype(np.uint32), *others["numpy"]))
    version, gauss = others["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), gauss))
    cuda = sorted((key for key in tensors if key.startswith("cuda.")), key=lambda k: int(k[5:]))
    if cuda and torch.cuda.is_available() and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensors[key] for key in cuda])
