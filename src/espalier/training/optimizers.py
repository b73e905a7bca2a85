"""AdamW in four forms, and what they remember as tensors that a run's state can hold.

    adamw              torch's, moments in fp32
    adamw_8bit         bitsandbytes': moments in 8 bits with a scale per 256: 2 bytes, not 8
    paged_adamw        moments in memory that moves out of the GPU where it is short
    paged_adamw_8bit   both

Paging needs a CUDA device; elsewhere the same arithmetic is done without it. bitsandbytes keeps the
moments of tensors with less than 4096 numbers in fp32, and does not page those below 100,000.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from espalier.storage import library

Groups = list[dict[str, Any]]


def optimizer(name: str, groups: Groups, lr: float) -> tuple[torch.optim.Optimizer, str | None]:
    """The optimiser of this name over parameter groups, and what to say where it is another.

    Raises:
        SettingError: It needs bitsandbytes, which is not installed.
    """
    devices = {p.device.type for group in groups for p in group["params"]}
    note = None
    if name.startswith("paged_") and devices != {"cuda"}:
        name = name.removeprefix("paged_")
        form = "8-bit moments, not paged" if name == "adamw_8bit" else "torch's AdamW"
        note = f"optimizer: paging needs a CUDA device; here {form}, by the same arithmetic."
    if name == "adamw":
        # One pass over memory per step, where torch has it: the flat buffers are plain tensors.
        fused = devices <= {"cpu", "cuda"}
        return torch.optim.AdamW(groups, lr=lr, fused=fused), note
    bnb = library(f"optimizer: {name}").optim
    forms = {
        "adamw_8bit": bnb.AdamW8bit,
        "paged_adamw": bnb.PagedAdamW,
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
    }
    return forms[name](groups, lr=lr), note


def moments(made: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All that an optimiser remembers, by "index of the parameter.name"; nothing is shared."""
    _settle(made)
    found: dict[str, Tensor] = {}
    for index, p in enumerate(_parameters(made)):
        for key, value in made.state.get(p, {}).items():
            own = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value)
            found[f"{index}.{key}"] = own.cpu()
    return found


def put_moments(made: torch.optim.Optimizer, saved: dict[str, Tensor]) -> None:
    """Give an optimiser that has not stepped yet what `moments` gave."""
    by_index: dict[int, dict[str, Tensor]] = {}
    for label, tensor in saved.items():
        index, _, key = label.partition(".")
        by_index.setdefault(int(index), {})[key] = tensor
    if isinstance(made, torch.optim.AdamW):
        made.load_state_dict({**made.state_dict(), "state": by_index})
        return
    own: Any = made  # bitsandbytes': its buffers may be paged, so they are filled where they are
    index = -1
    for g, group in enumerate(own.param_groups):
        for i, p in enumerate(group["params"]):
            index += 1
            if index not in by_index:
                continue
            own.init_state(group, p, g, i)
            _settle(own)
            for key, value in by_index[index].items():
                if isinstance(own.state[p][key], Tensor):
                    own.state[p][key].copy_(value)
                else:
                    own.state[p][key] = value.item()


def _parameters(made: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in made.param_groups for p in group["params"]]


def _settle(made: Any) -> None:
    """Wait for the GPU, where paged buffers are read and written by the CPU as well."""
    if getattr(made, "is_paged", False) and torch.cuda.is_available():
        torch.cuda.synchronize()
