"""The `espalier` command: one small file per command, loaded when it is the one asked for.

Exit codes: 0 done; 2 something that a person can put right, said in one message; 130 stopped with
Ctrl-C; 1 a bug, with its traceback. `--debug` anywhere shows the traceback in every case.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer

_BEGIN, _USE, _LOOK, _HAND_ON = "Begin", "Train and use", "Look", "Hand on"

# name: (panel of the overview, one line)
COMMANDS: dict[str, tuple[str, str]] = {
    "quickstart": (_BEGIN, "See it work in minutes, offline, on a real model and real text."),
    "doctor": (_BEGIN, "What is installed, what is missing for what, and the fix."),
    "train": (_USE, "Adapt a model to your data."),
    "launch": (_USE, "Train in several processes, on one machine or many."),
    "eval": (_USE, "Measure a trained adapter on labelled data."),
    "predict": (_USE, "Rows in, the same rows with predictions out."),
    "generate": (_USE, "Write text with a trained adapter."),
    "chat": (_USE, "Talk to a trained adapter in the terminal."),
    "spot": (_USE, "Prompts of tasks for another: train them, rank them, start from them."),
    "incontext": (_LOOK, "The base with examples in its prompt, to compare with; nothing trains."),
    "dimension": (_LOOK, "How few scalars a task needs: its intrinsic dimension."),
    "inspect": (_LOOK, "The places of a model, what a method would train, or an adapter's card."),
    "plan": (_LOOK, "Memory and work of a training step, and what to change to fit a memory."),
    "data": (_LOOK, "Check data before training: columns, lengths, what the loss sees."),
    "merge": (_HAND_ON, "Write base and adapter as one ordinary model folder."),
    "export": (_HAND_ON, "Write the adapter in another tool's format."),
    "build-base": (_HAND_ON, "Build the quickstart's decoder again, from Python's own source."),
}

_HELP = "Adapt pretrained models with small trained parts: train, compare, use, hand on."
_EPILOG = """Start here:  espalier quickstart

One command in detail, with an example:  espalier train --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for what a person typed."""
    from espalier.commands import outcome

    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [word for word in arguments if word != "--debug"]
    # Progress bars of the hub's client would be drawn over our own lines.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with outcome.caught(debug) as ended:
        named = next((word for word in arguments if not word.startswith("-")), "")
        _app(named)(arguments or ["--help"], prog_name="espalier")
    return ended.code


def _app(named: str) -> typer.Typer:
    """The application, with the code of the command `named` and one line for every other."""
    app = typer.Typer(
        epilog=_EPILOG,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=_HELP)(_options)
    for name, (panel, line) in COMMANDS.items():
        known: dict[str, Any] = {"rich_help_panel": panel}
        if name != named:
            app.command(name, help=line, **known)(_elsewhere)
            continue
        module = importlib.import_module(f"espalier.commands.{name.replace('-', '_')}")
        group = getattr(module, "app", None)
        if group is not None:
            app.add_typer(group, name=name, **known)
        else:
            known |= {"epilog": paragraphs(module.EXAMPLE), **getattr(module, "SETTINGS", {})}
            app.command(name, **known)(module.command)
    return app


def _print_version(asked: bool) -> None:
    if asked:
        import espalier

        typer.echo(f"espalier {espalier.__version__}")
        raise typer.Exit


def _options(
    version: bool = typer.Option(
        False,
        "--version",
        callback=_print_version,
        is_eager=True,
        metavar="",
        help="Print the version and stop.",
    ),
    debug: bool = typer.Option(
        False, "--debug", metavar="", help="Show tracebacks and what libraries said."
    ),
) -> None:
    """Options of all commands; `--debug` is taken out of the words before they get here."""


def _elsewhere() -> None:
    """Stands for a command whose file was not loaded."""


def paragraphs(example: str) -> str:
    """An example's lines, spaced as help texts need to be to keep them apart."""
    return "[bold]Example[/bold]\n\n" + "\n\n".join(f"  {line}" for line in example.splitlines())
