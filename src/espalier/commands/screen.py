"""The consoles that commands print to: results on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def console() -> Console:
    """The terminal a person reads, also while library output is kept aside."""
    from rich.console import Console

    from espalier.training.logs import screen

    return Console(file=screen(), highlight=False)


def say(*lines: str) -> None:
    """Print lines as they are: long ones are left to the terminal to break, nothing is markup."""
    out = console()
    for line in lines:
        out.print(line, markup=False, soft_wrap=True)


def show(table: Table) -> None:
    """Print a table, its title on a line of its own: a narrow table would break it."""
    from rich.text import Text

    out = console()
    if table.title:
        out.print(Text(str(table.title), style="bold"), soft_wrap=True)
    table.title = None
    out.print(table)


def whisper(*lines: str) -> None:
    """Print lines on stderr, where they do not end up in a file that stdout is sent to."""
    for line in lines:
        print(line, file=sys.stderr)
