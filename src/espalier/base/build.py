"""Build the base decoder from scratch: `espalier build-base` or `python -m espalier.base.build`.

Reads the standard library's source, trains the tokenizer and the model on one CPU thread, and
measures bits per character on the modules held out. The number of steps is fixed before the
first one, so a build can be repeated by giving the `steps` of its recipe.json. Work happens in
`<out>.partial`, which a killed build resumes from and which becomes `<out>` only when complete.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from espalier.base import RECIPE, WEIGHTS, file_sha256
from espalier.base.progress import Progress
from espalier.base.shape import Shape, make_model
from espalier.base.text import Document, source_documents
from espalier.base.tokenizer import END_ID, save_tokenizer, train_tokenizer
from espalier.base.train import TrainSettings, bits_per_character, train
from espalier.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import LlamaForCausalLM

CHECKPOINT = "checkpoint.safetensors"
PLAN = "plan.json"
TIMING_STEPS = 25


def encode(tokenizer: Tokenizer, documents: list[Document]) -> Tensor:
    """Return the tokens of all documents, each closed by the end token."""
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer.encode(document.text).ids, END_ID]
    return torch.tensor(ids, dtype=torch.int32)


def corpus_facts(documents: list[Document]) -> dict[str, Any]:
    """Return count, size and hash of a set of documents."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(f"{document.path}\0{document.text}\0".encode())
    size = sum(len(document.text.encode()) for document in documents)
    return {"files": len(documents), "bytes": size, "sha256": digest.hexdigest()}


def steps_for(minutes: float, shape: Shape, settings: TrainSettings) -> int:
    """Time a few steps on a model that is thrown away; return how many fit in `minutes`."""
    ids = torch.randint(0, shape.vocab, (settings.batch * settings.block * 4,), dtype=torch.int32)
    times: list[float] = []
    train(
        make_model(shape, 0),
        ids,
        replace(settings, steps=TIMING_STEPS),
        report=lambda *_: times.append(time.perf_counter()),
    )
    skipped = TIMING_STEPS // 5  # the first steps also pay for memory and kernels
    seconds = (times[-1] - times[skipped]) / (len(times) - 1 - skipped)
    return max(1, int(minutes * 60 / seconds))


def write_json(path: Path, value: object) -> None:
    """Write JSON under a temporary name and rename it into place."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def make_plan(
    work: Path, minutes: float, steps: int | None, shape: Shape, settings: TrainSettings
) -> TrainSettings:
    """Fix the number of steps, or take it from the build that `work` was left by."""
    path = work / PLAN
    if path.exists():
        try:
            planned = int(json.loads(path.read_text(encoding="utf-8"))["steps"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; delete {work}") from error
        if steps not in (None, planned):
            raise CheckpointError(f"{work} holds a build of {planned} steps, not {steps}")
        return replace(settings, steps=planned)
    planned = steps or steps_for(minutes, shape, settings)
    write_json(path, {"steps": planned})
    return replace(settings, steps=planned)


def finish(work: Path, model: LlamaForCausalLM, heldout: Tensor, characters: int) -> float:
    """Write the model in bf16 and return the held-out bits per character of what was written."""
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model.bfloat16().save_pretrained(work)
    (work / WEIGHTS).chmod(0o644)
    written = LlamaForCausalLM.from_pretrained(work, dtype=torch.float32, local_files_only=True)
    block = int(model.config.max_position_embeddings)
    return bits_per_character(written, heldout, characters, block)


def check_request(out: Path, minutes: float, threads: int, steps: int | None) -> None:
    """Refuse, before any work, what could not be finished."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} already exists and is not an empty folder")
    if minutes <= 0 or threads < 1 or (steps is not None and steps < 1):
        raise SettingError("minutes, threads and steps must be positive")


def build_base(
    out: Path,
    minutes: float = 70,
    seed: int = 0,
    threads: int = 1,
    steps: int | None = None,
    shape: Shape | None = None,
    settings: TrainSettings | None = None,
    source: Path | None = None,
) -> dict[str, Any]:
    """Train tokenizer and decoder and write them, with their recipe, into `out`.

    Args:
        out: Folder to make; it must not exist yet or be empty.
        minutes: Time to train for; used once, to choose the number of steps.
        seed: Seed of the weights and of the order of the text.
        threads: CPU threads; the shipped decoder was built with one.
        steps: Fixed number of steps, in place of `minutes`.
        shape: Size of the decoder.
        settings: Other optimizer settings; what the arguments above set is replaced.
        source: Folder of Python source to read in place of the standard library.

    Returns:
        What recipe.json says.

    Raises:
        SettingError: If `out` is not empty or a number makes no sense.
        CheckpointError: If `<out>.partial` belongs to a different build.
    """
    check_request(out, minutes, threads, steps)
    torch.set_num_threads(threads)
    shape = shape or Shape()
    settings = replace(settings or TrainSettings(steps=0), seed=seed, block=shape.positions)
    work = out.with_name(out.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    settings = make_plan(work, minutes, steps, shape, settings)
    recipe = train_both(work, shape, settings, source) | {"threads": threads} | versions()
    recipe["model_sha256"] = file_sha256(work / WEIGHTS)
    publish(work, out, recipe)
    return recipe


def train_both(
    work: Path, shape: Shape, settings: TrainSettings, source: Path | None
) -> dict[str, Any]:
    """Train tokenizer and model and write them into `work`; return text, settings and result."""
    documents, held = source_documents("pretrain", source), source_documents("heldout", source)
    tokenizer = train_tokenizer((document.text for document in documents), shape.vocab)
    save_tokenizer(tokenizer, work, shape.positions)
    modules = sorted({document.module for document in held})
    recipe: dict[str, Any] = {
        "what": "Espalier's own base decoder, trained on Python's standard library source",
        "shape": asdict(shape),
        "settings": asdict(settings),
        "pretrain": corpus_facts(documents),
        "heldout": corpus_facts(held) | {"modules": modules},
    }
    key = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()
    model, ids = make_model(shape, settings.seed), encode(tokenizer, documents)
    with Progress(settings, len(ids)) as progress:
        train(model, ids, settings, work / CHECKPOINT, key, progress.step)
    characters = sum(len(document.text) for document in held)
    bits = finish(work, model, encode(tokenizer, held), characters)
    return recipe | {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "corpus_tokens": len(ids),
        "trained_tokens": settings.steps * settings.batch * settings.block,
        "heldout_bits_per_character": round(bits, 4),
    }


def publish(work: Path, out: Path, recipe: dict[str, Any]) -> None:
    """Add the recipe, remove what only an unfinished build needs, and rename to `out`."""
    write_json(work / RECIPE, recipe)
    for name in (CHECKPOINT, PLAN):
        (work / name).unlink(missing_ok=True)
    if out.exists():
        out.rmdir()
    os.replace(work, out)


def versions() -> dict[str, str]:
    """Return the versions that a rebuild should use for the same numbers."""
    import tokenizers
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build Espalier's base decoder from scratch.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    recipe = build_base(**vars(options))
    print(f"{options.out}: {recipe['heldout_bits_per_character']} bits per held-out character")


if __name__ == "__main__":
    main()
