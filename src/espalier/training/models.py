"""Base models and tokenizers by path or name, with errors that say what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from espalier.errors import CheckpointError, EspalierError, SettingError, nearest
from espalier.quantised import settle
from espalier.shipped import SHIPPED, located
from espalier.storage import stored
from espalier.training import fewbits
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.storage import Storage
    from espalier.tasks import Task


_WIDE = 256  # hidden width from which bf16 pays on a CPU


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Raises:
        CheckpointError: there is none, here or on the hub.
    """
    from transformers import AutoTokenizer

    name = _found(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(_missing(name, "tokenizer", error)) from error
    return tokenizer


def load_config(name: str) -> Any:
    """The configuration of a model, without its weights.

    Raises:
        CheckpointError: there is none, here or on the hub.
    """
    from transformers import AutoConfig

    name = _found(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(_missing(name, "model", error)) from error


def writing_task(config: Any) -> str | None:
    """The task of a model made to write text: "seq2seq" or "causal"; None for any other."""
    from transformers.models.auto import modeling_auto as auto

    if config.is_encoder_decoder:
        return "seq2seq"
    kind = config.model_type
    # Encoders can be turned into decoders too, but are not made for it.
    encoder = kind in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return "causal" if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not encoder else None


def precision_of(asked: str, device: torch.device, config: Any, trained: str | None = None) -> str:
    """fp32 or bf16: as asked, or for "auto" bf16 where the device is made for it.

    A CPU with units for bf16 products takes half the time for layers of some width; below that it
    gains little. What was `trained` in one of the two keeps it, where the device is made for it.
    """
    if asked != "auto":
        return asked
    cuda = device.type == "cuda"
    made = torch.cuda.is_bf16_supported() if cuda else device.type == "cpu" and has_bf16_units()
    if not made:
        return "fp32"
    return trained or ("bf16" if cuda or width(config) >= _WIDE else "fp32")


def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices by instructions of its own (AVX-512, AMX).

    What a CPU has is asked, not timed: a stopped run must find the same answer.
    """
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def limit_of(config: Any, tokenizer: Any, taken: int = 0) -> int | None:
    """The smaller of the model's positions and the tokenizer's limit; None when unlimited.

    `taken` of them are those of words that an adapter puts beside the text.
    """
    found = (
        getattr(config.get_text_config(), "max_position_embeddings", None),
        getattr(tokenizer, "model_max_length", None),
    )
    # Tokenizers without a limit state about 10^30.
    limits = [int(x) for x in found if isinstance(x, int | float) and 0 < x < 10**6]
    return min(limits) - taken if limits else None


def to_device(model: Any, device: torch.device) -> None:
    """Move a model, unless it is there already (as quantised ones are, which cannot be moved)."""
    if any(p.device.type != device.type for p in model.parameters()):
        model.to(device)


@contextlib.contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing while it lasts; non-reentrant, which frozen inputs need."""
    if not on:
        yield
        return
    before = getattr(model.config, "use_cache", None)
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise SettingError(f"{setting('checkpointing')}: {error}") from error
    model.config.use_cache = False  # nothing to keep keys and values for
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.config.use_cache = before


def load_model(
    name: str, task: Task, tokenizer: Any, dtype: torch.dtype, storage: Storage | None = None
) -> tuple[Any, list[str]]:
    """A model for the task, and the modules that no checkpoint filled: its new head.

    With `storage` its layers are quantised weight by weight as they are read.

    Raises:
        CheckpointError: there is no such model, here or on the hub, or none of the task's kind.
        SettingError: it is to be quantised and cannot be.
    """
    import transformers

    name = _found(name)
    auto, settings = getattr(transformers, task.auto_model), task.model_settings()
    try:
        if storage is not None:
            model, info = fewbits.loaded(auto, name, settings, storage, dtype)
        else:
            model, info = auto.from_pretrained(
                name,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # a head for other labels is made anew
                **settings,
            )
    except EspalierError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(_missing(name, f"model for the task {task.name}", error)) from error
    set_padding(model, tokenizer)
    if storage is None and stored(model) is not None:  # the files hold it so
        settle(model, dtype)
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return model, sorted({key.rpartition(".")[0] for key in new})


def set_padding(model: Any, tokenizer: Any) -> None:
    """Tell the model's configuration the padding id, which classifiers over decoders need."""
    if getattr(model.config, "pad_token_id", None) is None:
        from espalier.tasks import pad_id

        model.config.pad_token_id = pad_id(tokenizer)


def width(config: Any) -> int:
    """A model's hidden width, from its configuration."""
    config = config.get_text_config()
    return int(getattr(config, "hidden_size", None) or getattr(config, "d_model", None) or 512)


def _found(name: str) -> str:
    """The folder of a shipped model, else the name; a folder must hold a model."""
    name = located(name)
    path = Path(name).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{name} is a folder without config.json: no model that transformers can load."
        )
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise CheckpointError(f"There is no model folder {name}.")
    if not path.exists() and get_close_matches(name, SHIPPED, cutoff=0.8):
        raise CheckpointError(f"There is no model {name!r}; {nearest(name, SHIPPED)}")
    return name


def _missing(name: str, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"No {what} could be loaded from {name!r}: neither a folder here nor reachable on the hub, "
        f"or of another kind. Give the path of a local folder. ({reason})"
    )
