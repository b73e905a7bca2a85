"""`python -m espalier`: the command without its script on the path."""

from __future__ import annotations

import sys

from espalier.commands import main

if __name__ == "__main__":
    sys.exit(main())
