"""What libraries say while a command works: kept aside, and shown at the end with --debug."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def aside() -> Iterator[None]:
    """Keep library output off the screen; it goes to stderr afterwards if `--debug` was given."""
    from espalier.commands.outcome import DEBUG
    from espalier.training.logs import quiet

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        try:
            with quiet(log):
                yield
        finally:
            if DEBUG.get() and log.is_file():
                sys.stderr.write(log.read_text(encoding="utf-8"))
