"""How a message names a setting: as an argument to who calls from Python, as a flag to who types.

`setting("limit", 0)` is `limit=0` in Python and `--limit 0` on the command line; the command says
which of the two it is, for as long as it runs.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

_TYPED: ContextVar[bool] = ContextVar("typed", default=False)
_UNSAID = object()


@contextlib.contextmanager
def typed() -> Iterator[None]:
    """While it lasts, settings are named as flags."""
    before = _TYPED.set(True)
    try:
        yield
    finally:
        _TYPED.reset(before)


def flag(name: str) -> str:
    """A setting's flag: max_length gives --max-length."""
    return f"--{name.replace('_', '-')}"


def setting(name: str, value: Any = _UNSAID) -> str:
    """A setting, with a value or without, as the person who reads the message would write it."""
    if not _TYPED.get():
        value = dict(value) if isinstance(value, Mapping) else value
        return name if value is _UNSAID else f"{name}={value!r}"
    if value is _UNSAID or value is True:
        return flag(name)
    if value is False:
        return flag(f"no_{name}")
    if isinstance(value, Mapping):
        value = _pairs(value)
    return f"{flag(name)} {quoted(str(value))}"


def quoted(text: str) -> str:
    """A text as one word of a shell, with the quotes that leave it readable."""
    if "'" in text and not set(text) & set('"$`\\!'):
        return f'"{text}"'
    return shlex.quote(text)


def _pairs(value: Mapping[Any, Any]) -> str:
    """`text=review,label=stars`, or JSON where a name has marks that would part it."""
    words = [str(word) for pair in value.items() for word in pair]
    if all(word and word == word.strip() and not set(word) & set(",={") for word in words):
        return ",".join(f"{key}={part}" for key, part in value.items())
    return json.dumps(dict(value), ensure_ascii=False)
