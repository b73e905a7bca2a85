"""Conversations: messages from the usual forms, and their rendering into pieces.

A chat template says where the assistant's words begin and end, either with its own generation
marks or, where it has none, by being rendered turn by turn: the text up to each answer must be
a prefix of the text with it. A template that rewrites earlier turns is refused, because what
the model would be trained on is then not what it is given later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.errors import DataError
from espalier.tasks.rows import kind, shown
from espalier.tasks.task import Piece

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, str]

DEFAULT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if not loop.first %}{{ '\\n\\n' }}{% endif -%}
{%- if message['role'] == 'system' -%}{{ message['content'] }}
{%- elif message['role'] == 'assistant' -%}
{{ '### Response:\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else -%}{{ '### Instruction:\\n' + message['content'] }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif -%}
"""
"""What is used, and saved with the adapter, where a tokenizer has no chat template."""

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "instruction": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
}
_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def read_messages(value: Any, where: str, column: str) -> list[Message]:
    """Messages as role and content, from `role`/`content` or `from`/`value` objects.

    Raises:
        DataError: not a list of such objects, an unknown role, or empty content.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(
            f"{where}: column {column!r} holds {kind(value)} {shown(value)}, need a list of "
            '{"role": ..., "content": ...}'
        )
    return [_message(item, where, f"{column}[{i}]") for i, item in enumerate(value)]


def _message(item: Any, where: str, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: {place} is {kind(item)} {shown(item)}, need an object")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if role not in ROLES:
        raise DataError(
            f"{where}: {place} has role {role!r} (under 'role' or 'from'); "
            f"known: {', '.join(ROLES)}"
        )
    if isinstance(content, list) and all(_is_text_part(part) for part in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(
            f"{where}: {place} has {kind(content)} for content, need text "
            "(under 'content' or 'value')"
        )
    if ROLES[role] == "assistant" and not content.strip():
        raise DataError(f"{where}: {place} is an empty answer: there is nothing to learn from it")
    return {"role": ROLES[role], "content": content}


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and "text" in part


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages with the system text in front, unless they bring their own."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def template_of(tokenizer: PreTrainedTokenizerBase, given: str | None) -> str:
    """The chat template in force: the given one, else the tokenizer's, else the plain default."""
    if given is not None:
        return given
    return tokenizer.get_chat_template() if tokenizer.chat_template else DEFAULT_TEMPLATE


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: str,
    *,
    ask: bool,
    where: str = "chat",
) -> str:
    """The conversation as text; `ask` ends it where the assistant begins to write.

    Raises:
        DataError: the template refuses the messages (roles that do not alternate, say).
    """
    return _rendered(tokenizer, messages, template, where, ask=ask)[0]


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template: str,
    where: str,
    *,
    ask: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text and, if asked for, the spans inside the template's generation marks."""
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    # A tokenizer without an end token would print "None" for it.
    tokens: dict[str, Any] = {"bos_token": "", "eos_token": ""} | {
        name: str(token) for name, token in tokenizer.special_tokens_map.items()
    }
    try:
        texts, spans = render_jinja_template(
            [list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=ask,
            **tokens,
        )
    except jinja2.TemplateError as error:
        raise DataError(f"{where}: the chat template refuses these messages: {error}") from error
    return texts[0], [(int(a), int(b)) for a, b in spans[0]] if marks else []


def chat_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str, where: str
) -> list[Piece]:
    """The conversation up to the last answer, in pieces; only the assistant's are learned.

    Raises:
        DataError: the template refuses the messages, or cannot be cut into turns.
    """
    if _GENERATION_MARK.search(template):
        return _marked_pieces(tokenizer, messages, template, where)
    pieces: list[Piece] = []
    so_far = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:i], template, ask=True, where=where)
        answered = render(tokenizer, messages[: i + 1], template, ask=False, where=where)
        if not asked.startswith(so_far) or not answered.startswith(asked):
            raise _unstable(where, i)
        pieces += [Piece(asked[len(so_far) :], False), Piece(answered[len(asked) :], True)]
        so_far = answered
    return pieces


def _unstable(where: str, turn: int) -> DataError:
    return DataError(
        f"{where}: the chat template rewrites earlier text when message {turn} is added, so the "
        "loss cannot be limited to the assistant's words. Use single-turn conversations, a "
        "template with {% generation %} marks, or another chat_template"
    )


def _marked_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str, where: str
) -> list[Piece]:
    text, spans = _rendered(tokenizer, messages, template, where, marks=True)
    pieces, at = [], 0
    for start, end in spans:
        # A template may leave the end-of-turn token outside its marks; it must be learned too.
        stop = end + len(end_token_at(tokenizer, text, end))
        pieces += [Piece(text[at:start], False), Piece(text[start:stop], True)]
        at = stop
    return pieces


def end_token_at(tokenizer: PreTrainedTokenizerBase, text: str, place: int) -> str:
    """The special or added token that stands in `text` at `place`, or an empty text."""
    fits = (token for token in added_tokens(tokenizer) if text.startswith(token, place))
    return max(fits, key=len, default="")


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Tokens that stand outside the ordinary vocabulary: special ones and added ones."""
    added: dict[str, int] = tokenizer.get_added_vocab()  # type: ignore[operator]
    return {str(t) for t in (*tokenizer.all_special_tokens, *added)} - {""}


def prompt_pieces(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template: str
) -> list[Piece]:
    """The pieces of a conversation that ends where the assistant is to write."""
    past = chat_pieces(tokenizer, messages, template, "prompt")
    text = render(tokenizer, messages, template, ask=True, where="prompt")
    so_far = "".join(piece.text for piece in past)
    if not text.startswith(so_far):
        # The template drops something from past turns (hidden thoughts, say): one new piece.
        return [Piece(text, False)]
    return [*past, Piece(text[len(so_far) :], False)]
