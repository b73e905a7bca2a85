"""`espalier chat`: a conversation in the terminal, with the template of the training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from espalier.commands.adapters import Base, Precision, Quantize, Run, opened
from espalier.commands.generate import (
    Penalty,
    Seed,
    Temperature,
    Tokens,
    TopK,
    TopP,
    settings,
)
from espalier.commands.noise import aside
from espalier.commands.screen import whisper
from espalier.errors import EspalierError

if TYPE_CHECKING:
    from espalier.generation import Adapted

EXAMPLE = """\
espalier chat runs/support-lora
echo "Where is my order?" | espalier chat runs/support-lora"""

_WORDS = "/new starts over · /quit or Ctrl-D ends"


def command(
    run: Run,
    system: Annotated[
        str | None, typer.Option(help="System text in place of the one saved with the adapter.")
    ] = None,
    max_new_tokens: Tokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    repetition_penalty: Penalty = None,
    seed: Seed = 0,
    model: Base = None,
    precision: Precision = "auto",
    quantize: Quantize = None,
) -> None:
    """Talk to a trained adapter; the template and the system text are those of its training."""
    at = opened(run, model, precision, quantize)
    how = settings(at, max_new_tokens, temperature, top_p, top_k, None, repetition_penalty)
    remembers = getattr(at.task, "form", "") == "chat"
    if sys.stdin.isatty():
        kind = "" if remembers else " It was trained on single prompts: each line stands alone."
        whisper(f"{at.folder} on {at.card['base']['name']}.{kind}", _WORDS)
    import torch

    torch.manual_seed(seed)
    past: list[dict[str, str]] = _opening(system)
    for line in _lines():
        if line.strip() in ("/quit", "/exit"):
            return
        if line.strip() == "/new":
            past = _opening(system)
            continue
        if line.strip():
            past = _turn(at, how, past, line, remembers)


def _opening(system: str | None) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}] if system else []


def _lines() -> Iterator[str]:
    """What the person types, until the end of input."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def _turn(
    at: Adapted, how: Any, past: list[dict[str, str]], line: str, remembers: bool
) -> list[dict[str, str]]:
    """One answer, printed as it is written; returns the conversation with it."""
    from espalier.generation import stream

    out = sys.stdout

    def show(text: str) -> None:
        out.write(text)
        out.flush()

    asked = [*past, {"role": "user", "content": line}]
    answer = ""
    try:
        with aside():
            answer = stream(at, asked if remembers else line, how, show)
    except KeyboardInterrupt:
        pass  # Ctrl-C ends the answer, not the conversation
    except EspalierError as error:
        whisper(str(error))
        return past
    show("\n")
    # An empty answer is no turn that a template could show.
    return [*asked, {"role": "assistant", "content": answer}] if remembers and answer else past
