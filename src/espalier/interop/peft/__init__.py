"""huggingface/peft's folders, both ways: adapter_config.json + adapter_model.safetensors.

Each of peft's types has a file here and a line in `KINDS`, which says whether an adapter has its
form, and how it is written and read. What is written is exact or refused; what is read is refused
by name where a setting is not known, since dropping one silently loads a different model.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from espalier.adapter import Adapter
from espalier.errors import CheckpointError
from espalier.graft import Graft
from espalier.interop.peft import adalora, ia3, lora, norms, prefix, prompt
from espalier.interop.peft.files import Kind, open_folder, write_folder
from espalier.interop.peft.whole import saved_whole

KINDS: dict[str, Kind] = {
    "LORA": lora.KIND,
    "ADALORA": adalora.KIND,
    "IA3": ia3.KIND,
    "LN_TUNING": norms.KIND,
    "PREFIX_TUNING": prefix.KIND,
    "PROMPT_TUNING": prompt.KIND,
    "P_TUNING": prompt.MADE_BY_NETWORK,
}


def write_peft(model: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Write an adapter as a peft folder.

    Raises:
        CheckpointError: peft has no form for this adapter, or the folder cannot be written.
    """
    for name, kind in KINDS.items():
        if kind.fits(adapter):
            config, tensors = kind.write(model, adapter)
            heads = saved_whole(model, adapter.head)
            config = {"peft_type": name, "modules_to_save": list(heads) or None, **config}
            write_folder(model, folder, config, {**_base_of(heads, kind.prefix), **tensors})
            return
    held = {type(delta).__name__ for delta in adapter.deltas if not delta.replaces}
    what = f"holds {', '.join(sorted(held))} together" if held else "only replaces parameters"
    raise CheckpointError(
        f"none of peft's formats ({', '.join(KINDS)}) has a form for {adapter.recipe}, which "
        f"{what}. Save it in Espalier's own format, or merge it where it can be merged"
    )


def _base_of(heads: dict[str, nn.Module], prefix: str) -> dict[str, Tensor]:
    """What the base has in modules that peft wants whole, trained or not."""
    return {
        f"{prefix}{path}.{name}": value
        for path, module in heads.items()
        for name, value in module.state_dict().items()
    }


def read_peft(model: nn.Module, folder: Path, name: str) -> tuple[Graft, Adapter]:
    """The adapter of a peft folder, ready to be installed.

    Raises:
        CheckpointError: A type or setting that we do not know, or tensors that do not fit the
            model.
    """
    foreign = open_folder(folder, KINDS)
    return KINDS[foreign.config["peft_type"]].read(model, foreign, name)
