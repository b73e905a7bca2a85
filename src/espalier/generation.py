"""A trained adapter at work: opened from its folder alone, then predicting or writing text.

The folder's card names the base model and holds the task, so that inputs are formatted exactly as
they were in training: same columns, same template, same system text, same limits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from espalier.checkpoint import load, read_card
from espalier.errors import CheckpointError, SettingError
from espalier.graft import find
from espalier.storage import Storage
from espalier.training.evaluate import evaluating, inputs
from espalier.training.models import (
    limit_of,
    load_config,
    load_model,
    load_tokenizer,
    precision_of,
    to_device,
)

if TYPE_CHECKING:
    from espalier.tasks import Row, Task

Precision = Literal["auto", "fp32", "bf16"]
Quantize = Literal["nf4", "fp4", "int8", "none"]
AT_ONCE = 1024  # rows predicted before the first of them is handed out


@dataclass(frozen=True)
class Writing:
    """How text is generated; saved with an adapter under "generation".

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token each time (greedy).
        top_p: Sample among the most probable tokens that together have this probability.
        top_k: Sample among this many tokens; 0 for all.
        num_beams: Beam search with this many beams when above 1.
        repetition_penalty: Above 1 makes tokens already there less probable.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    num_beams: int = 1
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, ok, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("num_beams", self.num_beams >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
        ):
            if not ok:
                raise SettingError(f"{name} must be {rule}; got {getattr(self, name)}.")

    @staticmethod
    def saved(extras: Mapping[str, Any], **typed: float | None) -> Writing:
        """The settings saved with an adapter, under those that were typed (None: not typed)."""
        kept = dict(extras.get("generation") or {})
        if not kept.pop("do_sample", "temperature" in kept):
            kept["temperature"] = 0.0
        known = {field.name for field in dataclasses.fields(Writing)}
        values: dict[str, Any] = {name: value for name, value in kept.items() if name in known}
        values |= {name: value for name, value in typed.items() if value is not None}
        return Writing(**values)

    def for_generate(self) -> dict[str, Any]:
        """Keywords of transformers' `generate`; what greedy decoding has no use for is left out."""
        kept: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.temperature > 0:
            kept |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return kept


@dataclass(frozen=True)
class Adapted:
    """A base model with its adapter active, its tokenizer, and the task it was trained for."""

    folder: Path
    model: Any
    tokenizer: Any
    task: Task
    card: Mapping[str, Any]
    precision: str = "fp32"

    @property
    def extras(self) -> Mapping[str, Any]:
        """What the trainer saved with the adapter."""
        return self.card["extras"]

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return next(self.model.parameters()).device

    @property
    def max_length(self) -> int | None:
        """The limit of training, in tokens."""
        return self.extras.get("max_length")


def open_adapter(
    folder: str | Path,
    base: str | None = None,
    precision: Precision = "auto",
    quantize: Quantize | None = None,
) -> Adapted:
    """The adapter in a run folder or adapter folder, on its base, ready to use.

    Args:
        folder: A folder that `esp.save` or a run wrote.
        base: Where the base model is, if not where the card says.
        precision: The base's numbers; auto is what the adapter was trained in, where the device
            is made for it. Of an adapter whose card does not say, auto is that of a run: bf16 on
            GPUs and CPUs with units for it (on a CPU for models at least 256 wide), else fp32.
        quantize: How the base's layers are stored, if not as they were in training.

    Raises:
        CheckpointError: The adapter or its base is missing, damaged, or does not fit.
        SettingError: The card names no task.
    """
    from espalier.tasks import task_from_extras

    card = read_card(folder)
    task = task_from_extras(card["extras"])
    name = base or card["base"]["name"]
    if not name:
        raise CheckpointError(
            f"The card in {folder} does not name its base model; give it with --model."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = load_tokenizer(name)
        trained = card["extras"].get("precision")
        chosen = precision_of(precision, device, load_config(name), trained)
        dtype = torch.bfloat16 if chosen == "bf16" else torch.float32
        model, _ = load_model(name, task, tokenizer, dtype, storage_of(card, quantize))
    except CheckpointError as error:
        if base:
            raise
        raise CheckpointError(
            f"{error} It is the base of the adapter in {folder}; "
            "if it has moved, say where with --model."
        ) from error
    load(model, folder, "adapter")
    to_device(model, device)
    model.eval()
    return Adapted(Path(folder), model, tokenizer, task, card, chosen)


def storage_of(card: Mapping[str, Any], quantize: Quantize | None = None) -> Storage | None:
    """How to store the base of an adapter: as asked, else as the card says that it was."""
    kept = card["base"].get("quantised")
    if quantize == "none":
        return None
    if quantize is not None:
        return Storage(**{**(kept or {}), "kind": quantize})
    return None if kept is None else Storage(**kept)


# ----------------------------------------------------------------------------------- predicting


def predict(at: Adapted, rows: Sequence[Row], batch: int = 32) -> Iterator[dict[str, Any]]:
    """For each row, in order: {"prediction": what a person reads}, and "probability" if known.

    Text-writing tasks answer with generated text.
    """
    for start in range(0, len(rows), AT_ONCE):
        some = rows[start : start + AT_ONCE]
        if at.task.writes:
            texts = write(at, [row.values for row in some], Writing.saved(at.extras), batch)
            yield from ({"prediction": text} for text in texts)
        else:
            yield from _classify(at, some, batch)


def _classify(at: Adapted, rows: Sequence[Row], batch: int) -> list[dict[str, Any]]:
    from espalier.data import in_order

    examples = at.task.encode(rows, at.tokenizer, at.max_length)
    found: list[dict[str, Any]] = [{}] * len(rows)
    with evaluating(at.model):
        for chunk in in_order(examples, batch):
            on_cpu = at.task.collate([examples[i] for i in chunk], at.tokenizer)
            outputs = at.model(**inputs(at.task, on_cpu, at.device))
            for i, guess in zip(chunk, at.task.predict(outputs, on_cpu), strict=True):
                found[i] = {"prediction": at.task.decode(guess)}
                probability = getattr(guess, "probability", None)
                if probability is not None:
                    found[i]["probability"] = round(probability, 4)
    return found


# -------------------------------------------------------------------------------------- writing


def write(
    at: Adapted, requests: Sequence[Any], how: Writing, batch: int = 8, seed: int = 0
) -> list[str]:
    """The model's answer to each request (a text, a list of messages, or a row's values).

    Raises:
        SettingError: The adapter's task does not write text.
    """
    from espalier.data import in_order

    prompts = [_prompt(at, request, how) for request in requests]
    answers = [""] * len(prompts)
    torch.manual_seed(seed)
    with evaluating(at.model):
        for chunk in in_order([{"input_ids": prompt} for prompt in prompts], batch):
            new = _generate(at, [prompts[i] for i in chunk], how)
            for i, ids in zip(chunk, new, strict=True):
                answers[i] = at.tokenizer.decode(ids, skip_special_tokens=True).strip()
    return answers


def stream(at: Adapted, request: Any, how: Writing, show: Callable[[str], object]) -> str:
    """One answer, handed to `show` piece by piece as it is written; returns the whole of it."""
    from transformers import TextStreamer

    class Shower(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    pieces = Shower(at.tokenizer, skip_prompt=at.task.name == "causal", skip_special_tokens=True)
    with evaluating(at.model):
        at_once = pieces if how.num_beams == 1 else None  # beams are known at the end only
        ids = _generate(at, [_prompt(at, request, how)], how, at_once)
    text = at.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    if how.num_beams > 1:
        show(text)
    return text


def _prompt(at: Adapted, request: Any, how: Writing) -> list[int]:
    """Token ids to go on from; a decoder's leave room for the answer, but keep half of the space.

    The bound is the model's, not that of training: a conversation may grow longer than those that
    it was trained on.
    """
    if at.task.name != "causal":
        return at.task.prompt(request, at.tokenizer, at.max_length)
    limit = limit_of(at.model.config, at.tokenizer, find(at.model).words)
    room = None if limit is None else max(limit - how.max_new_tokens, limit // 2)
    return at.task.prompt(request, at.tokenizer, room)


def _generate(
    at: Adapted, prompts: Sequence[Sequence[int]], how: Writing, streamer: Any = None
) -> list[list[int]]:
    """The new ids for each prompt."""
    from espalier.tasks import pad_id

    width, fill = max(map(len, prompts)), pad_id(at.tokenizer)
    before = at.task.name == "causal"  # a decoder goes on from the right end

    def padded(ids: Sequence[int], value: int) -> list[int]:
        space = [value] * (width - len(ids))
        return [*space, *ids] if before else [*ids, *space]

    taken = find(at.model).words
    limit = limit_of(at.model.config, at.tokenizer, taken) if before else None
    if limit is not None:
        how = dataclasses.replace(how, max_new_tokens=min(how.max_new_tokens, limit - width))
    ids = torch.tensor([padded(p, fill) for p in prompts], device=at.device)
    mask = torch.tensor([padded([1] * len(p), 0) for p in prompts], device=at.device)
    out = at.model.generate(
        input_ids=ids,
        attention_mask=mask,
        pad_token_id=fill,
        eos_token_id=at.task.stop_ids(at.tokenizer) or None,
        streamer=streamer,
        **how.for_generate(),
    )
    return (out[:, width:] if before else out).tolist()
