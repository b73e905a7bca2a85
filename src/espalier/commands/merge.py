"""`espalier merge`: base and adapter as one ordinary model folder, compared with the original.

The folder is written under a temporary name, loaded again with transformers alone, and its output
compared with that of base and adapter; only then does it get its name. A base in few bits becomes
a 16-bit model, written weight by weight.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.adapters import Base, Precision, Run, opened
from espalier.commands.noise import aside
from espalier.commands.screen import say
from espalier.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from espalier.generation import Adapted

EXAMPLE = """\
espalier merge runs/reviews-lora --out reviews-merged"""

Onto = Annotated[
    str,
    typer.Option(
        help="For a base in few bits: merge onto what its codes stand for, or onto the weights "
        "before quantisation.",
        metavar="dequantised|original",
    ),
]
_SLACK = {"fp32": 1e-3, "bf16": 0.1}  # of the largest output; above it the folder is not kept
_ROUNDING = 0.1  # relative error above which weights in 16 bits are not the dequantised ones
_ROWS, _TOKENS = 4, 32  # random tokens on which outputs are compared


def command(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not hold anything yet.")],
    model: Base = None,
    precision: Precision = "auto",
    onto: Onto = "dequantised",
) -> None:
    """Write base and adapter as one model that transformers, vLLM and others load by themselves."""
    merge_into(run, out, model, precision, onto)


def merge_into(run: str, out: Path, model: str | None, precision: str, onto: str) -> None:
    """Merge, save, load again, compare; `out` appears whole or not at all."""
    from espalier.storage import stored
    from espalier.training.folders import refuse_filled

    if onto not in ("dequantised", "original"):
        raise SettingError(f"--onto must be dequantised or original; got {onto!r}.")
    refuse_filled(out)
    at = opened(run, model, _own(run, model) if precision == "auto" else precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        whole = Path(folder) / "model"
        with aside():
            if stored(at.model) is not None:
                said = _dense(at, whole, model, precision, onto)
            else:
                said = _whole(at, whole)
        if out.is_dir():
            out.rmdir()
        os.chmod(whole, 0o755)
        os.replace(whole, out)
    say(
        f"The merged model is in {out} ({_size(out)}). {said}",
        "In Python:",
        f"  model = {at.task.auto_model}.from_pretrained({str(out)!r})",
        f"  tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
    )


def _own(run: str, model: str | None) -> str:
    """The type of a base's own numbers, that merging may round none; auto for one in few bits."""
    import torch

    from espalier.checkpoint import read_card
    from espalier.training.models import load_config

    base = read_card(run)["base"]
    if base.get("quantised") or not (model or base["name"]):
        return "auto"
    own = load_config(model or base["name"]).dtype
    return "bf16" if own == torch.bfloat16 else "fp32"


def _whole(at: Adapted, folder: Path) -> str:
    """Merge in memory and save; returns what is to be said of it."""
    import espalier as esp

    text = "The quick brown fox jumps over the lazy dog."
    ids = dict(at.tokenizer(text, return_tensors="pt").to(at.device))
    before = _logits(at.model, ids)
    esp.merge(at.model, "adapter", unload=True, untie=True)
    _write_tokens(at, folder)
    at.model.save_pretrained(folder)
    difference = _difference(at, folder, ids, before)
    return (
        f"Loaded again, its output on one input differs by at most {difference:.1e} from that of "
        f"base and adapter, all in {at.precision}."
    )


def _dense(at: Adapted, folder: Path, model: str | None, precision: str, onto: str) -> str:
    """Write a quantised base with the adapter as a dense model; returns what is to be said."""
    import torch

    import espalier as esp
    from espalier.shipped import located

    ids = _random(at)
    before = _logits(at.model, ids)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    base = located(model or at.card["base"]["name"])
    esp.write_merged(at.model, "adapter", base, folder, dtype=dtype, onto=onto)
    _write_tokens(at, folder)
    if not _fits(folder, at.device):
        return "It was not compared with base and adapter: there is no memory to load it."
    error = _relative_error(at, folder, ids, before)
    if onto == "dequantised" and not error <= _ROUNDING:
        raise CheckpointError(
            f"The merged model gives other outputs than base and adapter ({error:.2g} of their "
            "norm); nothing was kept. Please report this with the adapter's card."
        )
    return (
        f"Loaded again, its outputs on {_ROWS} × {_TOKENS} random tokens differ from those of the "
        f"quantised base with the adapter by {error:.2e} of their norm (merged onto the {onto} "
        f"weights, in {'fp32' if precision == 'fp32' else 'bf16'})."
    )


def _random(at: Adapted) -> dict[str, Tensor]:
    """Random tokens [R, T] in the form that the model takes."""
    import torch

    from espalier.training.models import limit_of

    limit = limit_of(at.model.config, at.tokenizer) or _TOKENS
    shape = _ROWS, min(_TOKENS, limit // 2)
    words = min(len(at.tokenizer), at.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, words, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.to(at.device), "attention_mask": torch.ones_like(ids).to(at.device)}


def _logits(model: Any, ids: dict[str, Tensor]) -> Tensor:
    import torch

    more = {"decoder_input_ids": ids["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**ids, **more).logits.float().cpu()


def _write_tokens(at: Adapted, folder: Path) -> None:
    """The tokenizer with the template of training; the model is told its stop tokens."""
    if at.extras.get("chat_template"):
        at.tokenizer.chat_template = at.extras["chat_template"]
    if at.task.writes:
        at.model.generation_config.eos_token_id = at.task.stop_ids(at.tokenizer)
    for name in ("temperature", "top_p", "top_k"):
        # transformers refuses to save sampling settings of a base that decodes greedily.
        if at.model.can_generate() and not at.model.generation_config.do_sample:
            setattr(at.model.generation_config, name, None)
    at.tokenizer.save_pretrained(folder)


def _difference(at: Adapted, folder: Path, ids: dict[str, Tensor], before: Tensor) -> float:
    """Largest difference of outputs after loading the folder with transformers alone.

    Raises:
        CheckpointError: It is too large to be rounding.
    """
    after = _outputs(at, folder, ids)
    difference = float((after - before).abs().max())
    half = str(at.model.dtype) == "torch.bfloat16"
    if not difference <= _SLACK["bf16" if half else "fp32"] * max(1.0, float(before.abs().max())):
        raise CheckpointError(
            f"The merged model gives other outputs than base and adapter (by {difference:.2g}); "
            "nothing was kept. Please report this with the adapter's card."
        )
    return difference


def _relative_error(at: Adapted, folder: Path, ids: dict[str, Tensor], before: Tensor) -> float:
    """‖merged − unmerged‖ / ‖unmerged‖ of the outputs, computed in the quantised base's type."""
    after = _outputs(at, folder, ids)
    return float((after - before).norm() / before.norm())


def _outputs(at: Adapted, folder: Path, ids: dict[str, Tensor]) -> Tensor:
    import transformers

    auto = getattr(transformers, at.task.auto_model)
    again = auto.from_pretrained(folder, dtype=at.model.dtype).to(at.device).eval()
    return _logits(again, ids)


def _fits(folder: Path, device: torch.device) -> bool:
    """Whether there is memory to load what was written."""
    import psutil
    import torch

    size = sum(path.stat().st_size for path in folder.iterdir())
    if device.type == "cuda":
        return 1.5 * size < torch.cuda.mem_get_info(device)[0]
    return 2.5 * size < psutil.virtual_memory().available


def _size(folder: Path) -> str:
    from espalier.training.memory import in_words

    return in_words(sum(path.stat().st_size for path in folder.iterdir()))
