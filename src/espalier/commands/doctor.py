"""`espalier doctor`: what is installed, what is missing for what, and the fix."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from espalier.commands.noise import aside
from espalier.commands.screen import console, say

EXAMPLE = """\
espalier doctor"""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Look at this installation and machine. Exit code 0: whatever is needed is there."""
    with aside():
        from espalier.doctor import examine, table

        found = examine()
    if as_json:
        say(json.dumps(found.to_dict(), indent=1))
    else:
        console().print(table(found))
    if not found.sound:
        raise typer.Exit(2)
