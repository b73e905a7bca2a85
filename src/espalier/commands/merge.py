"""`espalier merge`: base and adapter as one ordinary model folder, compared with the original.

The folder is written under a temporary name, loaded again with transformers alone, and its output
on one input compared with that of base and adapter; only then does it get its name.
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
from espalier.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from espalier.generation import Adapted

EXAMPLE = """\
espalier merge runs/reviews-lora --out reviews-merged"""

_SLACK = {"fp32": 1e-3, "bf16": 0.1}  # of the largest output; above it the folder is not kept


def command(
    run: Run,
    out: Annotated[Path, typer.Option(help="Folder to write; it must not hold anything yet.")],
    model: Base = None,
    precision: Precision = "auto",
) -> None:
    """Write base and adapter as one model that transformers, vLLM and others load by themselves."""
    merge_into(run, out, model, precision)


def merge_into(run: str, out: Path, model: str | None, precision: str) -> None:
    """Merge, save, load again, compare; `out` appears whole or not at all."""
    from espalier.training.folders import refuse_filled

    refuse_filled(out)
    at = opened(run, model, precision)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        whole = Path(folder) / "model"
        with aside():
            ids = _example(at)
            before = _logits(at.model, ids)
            _write(at, whole)
            difference = _difference(at, whole, ids, before)
        if out.is_dir():
            out.rmdir()
        os.chmod(whole, 0o755)
        os.replace(whole, out)
    say(
        f"The merged model is in {out} ({_size(out)}). Loaded again, its output on one input "
        f"differs by at most {difference:.1e} from that of base and adapter.",
        "In Python:",
        f"  model = {at.task.auto_model}.from_pretrained({str(out)!r})",
        f"  tokenizer = AutoTokenizer.from_pretrained({str(out)!r})",
    )


def _example(at: Adapted) -> dict[str, Tensor]:
    """One input in the form of the task, as tensors [1, T]."""
    text = "The quick brown fox jumps over the lazy dog."
    return dict(at.tokenizer(text, return_tensors="pt").to(at.device))


def _logits(model: Any, ids: dict[str, Tensor]) -> Tensor:
    import torch

    more = {"decoder_input_ids": ids["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(**ids, **more).logits.float().cpu()


def _write(at: Adapted, folder: Path) -> None:
    """The merged model, its tokenizer with the template of training, and its stop tokens."""
    import espalier as esp

    esp.merge(at.model, "adapter", unload=True, untie=True)
    if at.extras.get("chat_template"):
        at.tokenizer.chat_template = at.extras["chat_template"]
    if at.task.writes:
        at.model.generation_config.eos_token_id = at.task.stop_ids(at.tokenizer)
    for name in ("temperature", "top_p", "top_k"):
        # transformers refuses to save sampling settings of a base that decodes greedily.
        if at.model.can_generate() and not at.model.generation_config.do_sample:
            setattr(at.model.generation_config, name, None)
    at.model.save_pretrained(folder)
    at.tokenizer.save_pretrained(folder)


def _difference(at: Adapted, folder: Path, ids: dict[str, Tensor], before: Tensor) -> float:
    """Largest difference of outputs after loading the folder with transformers alone.

    Raises:
        CheckpointError: It is too large to be rounding.
    """
    import transformers

    auto = getattr(transformers, at.task.auto_model)
    again = auto.from_pretrained(folder, dtype=at.model.dtype).to(at.device).eval()
    after = _logits(again, ids)
    difference = float((after - before).abs().max())
    half = str(at.model.dtype) == "torch.bfloat16"
    if not difference <= _SLACK["bf16" if half else "fp32"] * max(1.0, float(before.abs().max())):
        raise CheckpointError(
            f"The merged model gives other outputs than base and adapter (by {difference:.2g}); "
            "nothing was kept. Please report this with the adapter's card."
        )
    return difference


def _size(folder: Path) -> str:
    from espalier.training.memory import in_words

    return in_words(sum(path.stat().st_size for path in folder.iterdir()))
