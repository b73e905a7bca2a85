"""Prompts and conversations out of the column forms that people have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from espalier.errors import DataError, SettingError
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


def requested_turns(request: Any, columns: Mapping[str, str]) -> list[Message]:
    """The conversation to answer: from the user's words, messages, or a row's values."""
    if isinstance(request, Mapping):
        if "messages" not in request:
            return messages_of(Row(request, "request"), columns, labelled=False)
        request = request["messages"]
    elif isinstance(request, str):
        request = [{"role": "user", "content": request}]
    row = Row({"messages": request}, "request")
    return messages_of(row, {"messages": "messages"}, labelled=False)


def requested_text(request: Any, columns: Mapping[str, str], name: str) -> str:
    """The text to continue: as it is, or from a row's values under `name` or its column.

    Raises:
        SettingError: the request is neither text nor a row.
    """
    if isinstance(request, str):
        return request
    if not isinstance(request, Mapping):
        raise SettingError(f"this adapter reads plain text, not a {type(request).__name__}")
    column = name if name in request else columns[name]
    return text_cell(Row(request, "request"), column)
