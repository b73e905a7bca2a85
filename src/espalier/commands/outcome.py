"""How a command ends: its exit code and the one message that says why.

Errors of ours and of the file system are a person's to put right (code 2, no traceback); what
remains is a bug (code 1, with the traceback that a report needs).
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from espalier.errors import EspalierError
from espalier.wording import typed

DONE, BUG, MISTAKE, STOPPED = 0, 1, 2, 130

LAUNCHED = "ESPALIER_LAUNCHED"  # set where `espalier launch` says how to go on after Ctrl-C
_HEAD_START = 3.0  # seconds

DEBUG: ContextVar[bool] = ContextVar("debug", default=False)  # whether --debug was given

# What the file system refuses, in words that say what to do.
_REFUSALS = {
    errno.ENOSPC: "No space left on the disk",
    errno.EDQUOT: "The disk quota is used up",
    errno.EROFS: "The file system is read-only",
    errno.EACCES: "No permission",
    errno.EPERM: "No permission",
    errno.ENOTDIR: "A part of this path is a file, not a folder",
    errno.ENOENT: "There is no such file or folder",
    errno.EISDIR: "This is a folder, not a file",
    errno.EEXIST: "This already exists",
    errno.ENAMETOOLONG: "The file name is too long",
}


class Interrupted(Exception):
    """Ctrl-C, with a sentence on what was kept and how to go on."""


@dataclass
class Ended:
    """The exit code, known once the command is over."""

    code: int = DONE


@contextlib.contextmanager
def caught(debug: bool) -> Iterator[Ended]:
    """Turn whatever ends a command into a message and a code."""
    ended = Ended()
    DEBUG.set(debug)
    try:
        with typed():
            yield ended
    except Exception as error:
        ended.code = _explain(error)
        if debug or ended.code == BUG:
            traceback.print_exception(error)
    except (SystemExit, KeyboardInterrupt) as stop:
        code = stop.code if isinstance(stop, SystemExit) else STOPPED
        ended.code = code if isinstance(code, int) else DONE if not code else BUG
        if code == STOPPED:
            _stopped("nothing more was written.")


def _explain(error: Exception) -> int:
    """Say on stderr what ended the command; returns the exit code."""
    _let_main_speak()
    if isinstance(error, Interrupted):
        _stopped(str(error))
        return STOPPED
    if isinstance(error, BrokenPipeError):  # the reader has gone (`espalier inspect ... | head`)
        sys.stdout = None
        return DONE
    if isinstance(error, EspalierError):
        fail(str(error))
        return MISTAKE
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        about = error.filename or error.strerror
        fail(f"{_REFUSALS[error.errno]}: {about}.")
        return MISTAKE
    fail(
        f"this is a bug in Espalier ({type(error).__name__}: {error}). "
        "Please report it with the lines below and what you typed."
    )
    return BUG


def _let_main_speak() -> None:
    """Of several processes with one mistake the first says it; its launcher ends the others."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(_HEAD_START)


def _stopped(message: str) -> None:
    if LAUNCHED not in os.environ:
        fail(message, "Stopped")


def fail(message: str, word: str = "Error") -> None:
    """One message on stderr, its first word in red."""
    from rich.console import Console
    from rich.text import Text

    console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
    console.print(Text.assemble((word, "bold red"), ": ", message))
