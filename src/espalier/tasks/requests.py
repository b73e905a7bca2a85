"""Prompts and conversations out of the column forms that people have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.errors import DataError
from espalier.tasks.chat import Message, read_messages
from espalier.tasks.rows import Row, cell, text_cell


def completion_of(raw: Row, columns: Mapping[str, str], labelled: bool) -> dict[str, Any]:
    """Prompt and, if `labelled`, completion."""
    values = {"prompt": text_cell(raw, columns["prompt"])}
    if labelled:
        values["completion"] = text_cell(raw, columns["completion"])
    return values


def messages_of(raw: Row, columns: Mapping[str, str], labelled: bool) -> list[Message]:
    """The conversation of a row: messages, or instruction, input and output.

    Unless `labelled`, a last answer is left away. Words after the last answer teach nothing and
    are dropped from labelled conversations.

    Raises:
        DataError: no answer, or no question.
    """
    if "messages" in columns:
        column = columns["messages"]
        messages = read_messages(cell(raw, column), raw.where, column)
        if labelled:
            while messages and messages[-1]["role"] != "assistant":
                messages.pop()
            if not messages:
                raise DataError(
                    f"{raw.where}: column {column!r} has no message from the assistant: "
                    "there is nothing to learn from it"
                )
        elif messages[-1]["role"] == "assistant":
            messages.pop()
        return messages
    return _instruction(raw, columns, labelled)


def _instruction(raw: Row, columns: Mapping[str, str], labelled: bool) -> list[Message]:
    asked = text_cell(raw, columns["instruction"])
    more = columns.get("input")
    if more is not None and more in raw.values:
        extra = text_cell(raw, more, blank=True)
        asked += f"\n\n{extra}" if extra.strip() else ""
    messages = [{"role": "user", "content": asked}]
    system = columns.get("system")
    if system is not None and system in raw.values:
        text = text_cell(raw, system, blank=True)
        if text.strip():
            messages.insert(0, {"role": "system", "content": text})
    if labelled:
        messages.append({"role": "assistant", "content": text_cell(raw, columns["output"])})
    return messages
