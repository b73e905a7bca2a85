"""Which column is what, and so which task: one table of forms, no guessing beyond it.

A form is a task together with the columns it needs. The columns found decide; where they allow
several tasks the person is asked, by an error that names the choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from espalier.data.forms import (
    ASIDE,
    CANONICAL,
    CHOICES,
    CONTINUES,
    LABEL,
    LABELLED,
    NEEDED,
    PAIRS,
    QUESTION,
    RIGHT,
    SOURCES,
    TEXT,
    Form,
)
from espalier.errors import DataError, nearest
from espalier.tasks.rows import Row, as_number, is_missing
from espalier.wording import setting


def recognise(
    rows: Sequence[Row],
    task: str | None = None,
    prefer: str | None = None,
    given: Mapping[str, str] | None = None,
) -> Form:
    """The form that the columns of the first thousand rows have.

    Args:
        rows: raw training rows.
        task: the task asked for, or None to infer it.
        prefer: the task to take where the columns allow several.
        given: columns by the task's names, which overrule the table.

    Raises:
        DataError: no form fits, or several do; says what was found and what would work.
    """
    found = list(dict.fromkeys(str(c) for row in rows[:1000] for c in row.values))
    found = [c for c in found if c != CONTINUES]
    given = dict(given or {})
    _check_given(given, found)
    forms = possible_forms(found, given, rows, task)
    wanted = task or (prefer if any(f.task == prefer for f in forms) else None)
    forms = [f for f in forms if (f.task == wanted if wanted else f.usual)]
    if not forms:
        raise DataError(_no_form(found, task))
    if len(forms) > 1:
        raise DataError(_choices(found, forms))
    aside = set(found) - ASIDE - set(forms[0].columns.values())
    if forms[0].kind == "text" and not wanted and aside:
        raise DataError(
            f"is this plain text to continue, or text with labels? Found {', '.join(found)}. "
            f"Choose {setting('task', 'causal')} for the text alone, or name the column of "
            f"labels, for instance {setting('columns', {'label': min(aside)})}"
        )
    return forms[0]


def possible_forms(
    found: Sequence[str], given: Mapping[str, str], rows: Sequence[Row], task: str | None
) -> list[Form]:
    """Every form that the columns allow; plain text only where nothing else does."""
    forms = [
        *_labelled_forms(found, given, rows, task),
        *_tagged_forms(found, given),
        *_written_forms(found, given),
        *_choice_forms(found, given),
    ]
    forms = [f for f in forms if set(given.values()) <= set(f.columns.values())]
    if not any(task in (None, f.task) for f in forms):
        forms += _plain_form(found, given)
    return [f for i, f in enumerate(forms) if f not in forms[:i]]


def _choices(found: Sequence[str], forms: Sequence[Form]) -> str:
    if len({f.task for f in forms}) > 1:
        choices = "; or ".join(f"{setting('task', f.task)}: {f}" for f in forms)
        return f"the columns ({', '.join(found)}) allow more than one task; choose {choices}"
    choices = "; or ".join(setting("columns", f.columns) for f in forms)
    return (
        f"the columns ({', '.join(found)}) can be read in more than one way for "
        f"{forms[0].task}; choose {choices}"
    )


def _labelled_forms(
    found: Sequence[str], given: Mapping[str, str], rows: Sequence[Row], task: str | None
) -> Iterator[Form]:
    labels = [given["label"]] if "label" in given else _label_columns(found)
    for label in labels:
        tasks = [task] if task in LABELLED else label_tasks(rows, label)
        for name in tasks:
            for texts in _text_columns(found, given):
                if label not in texts.values():
                    yield Form(name, {**texts, "label": label})


def _label_columns(found: Sequence[str]) -> list[str]:
    exact = [name for name in ("label", "labels") if name in found]
    return exact[:1] or [name for name in LABEL if name in found]


def _text_columns(found: Sequence[str], given: Mapping[str, str]) -> list[dict[str, str]]:
    if "text" in given:
        return [{k: given[k] for k in ("text", "text_pair") if k in given}]
    pairs = [p for p in PAIRS if set(p) <= set(found)]
    if pairs:
        return [{"text": a, "text_pair": b} for a, b in pairs]
    if "text" in found:
        return [{"text": "text"}]
    return [{"text": c} for c in TEXT if c in found]


def _tagged_forms(found: Sequence[str], given: Mapping[str, str]) -> Iterator[Form]:
    tags = given.get("tags") or _one_of(("tags", "ner_tags", "pos_tags", "bio"), found)
    words = given.get("tokens") or _one_of(("tokens", "words", "text", "sentence"), found)
    if tags is not None and words is not None:
        yield Form("tokens", {"tokens": words, "tags": tags})


def _written_forms(found: Sequence[str], given: Mapping[str, str]) -> Iterator[Form]:
    """Forms in which text is written: conversations, instructions, prompts, sources."""

    def column(name: str, *aliases: str) -> str | None:
        return given.get(name) or _one_of((name, *aliases), found)

    messages = column("messages", "conversations", "conversation", "dialog")
    asked, output = column("instruction"), column("output", "response", "answer", "completion")
    prompt, completion = column("prompt"), column("completion", "response", "chosen")
    if messages is not None:
        yield Form("causal", {"messages": messages}, "chat")
    elif asked is not None and output is not None:
        more = {n: c for n in ("input", "system") if (c := column(n)) is not None}
        more |= {"input": "context"} if "input" not in more and "context" in found else {}
        yield Form("causal", {"instruction": asked, **more, "output": output}, "chat")
    elif prompt is not None and completion is not None:
        yield from _both_ways(prompt, completion, "", "causal")
    elif "question" in found and "answer" in found and not given:
        yield Form("causal", {"instruction": "question", "output": "answer"}, "chat")
        yield Form("seq2seq", {"source": "question", "target": "answer"}, usual=False)
    else:
        for source, target in SOURCES:
            source, target = given.get("source", source), given.get("target", target)
            if {source, target} <= set(found):
                yield from _both_ways(source, target, "\n", "seq2seq")


def _choice_forms(found: Sequence[str], given: Mapping[str, str]) -> Iterator[Form]:
    question = given.get("question") or _one_of(QUESTION, found)
    choices = given.get("choices") or _one_of(CHOICES, found)
    right = given.get("label") or _one_of(RIGHT, found)
    if question is not None and choices is not None and right is not None:
        yield Form("choices", {"question": question, "choices": choices, "label": right})


def _both_ways(source: str, target: str, separator: str, usual: str) -> Iterator[Form]:
    prompted = {"prompt": source, "completion": target}
    yield Form("causal", prompted, "completion", separator, usual == "causal")
    yield Form("seq2seq", {"source": source, "target": target}, usual=usual == "seq2seq")


def _plain_form(found: Sequence[str], given: Mapping[str, str]) -> Iterator[Form]:
    text = given.get("text") or _one_of(("text", "content"), found)
    if text is not None:
        yield Form("causal", {"text": text}, "text")


def label_tasks(rows: Sequence[Row], column: str) -> list[str]:
    """The tasks that the cells of a label column allow, the likeliest first.

    Lists are sets of classes; fractions are numbers to be predicted; floats that are all whole
    could be either; the rest are classes.
    """
    cells = [v for row in rows if not is_missing(v := row.values.get(column)) and v != ""]
    if not cells:
        return ["classification"]
    if any(isinstance(cell, list | tuple) for cell in cells):
        return ["multilabel"]
    numbers = [as_number(cell) for cell in cells]
    known = [n for n in numbers if n is not None]
    if len(known) < len(cells):
        return ["classification"]
    if any(not n.is_integer() for n in known):
        return ["regression"]
    floats = any(isinstance(c, float) or (isinstance(c, str) and "." in c) for c in cells)
    many = len(set(known)) > 200 and len(set(known)) > len(known) / 5
    return ["classification", "regression"] if floats or many else ["classification"]


def _one_of(names: Iterable[str], found: Sequence[str]) -> str | None:
    return next((name for name in names if name in found), None)


def _check_given(given: Mapping[str, str], found: Sequence[str]) -> None:
    known = sorted({name for names in CANONICAL.values() for name in names})
    for name, column in given.items():
        if name not in known:
            raise DataError(f"{setting('columns')}: unknown name {name!r}: {nearest(name, known)}")
        if column.split(".")[0] not in found:
            raise DataError(
                f"{setting('columns', {name: column})}: there is no column {column!r}; found: "
                f"{', '.join(found)} ({nearest(column, found)})"
            )


def _no_form(found: Sequence[str], task: str | None) -> str:
    wanted = NEEDED[task] if task else "; ".join(f"{k}: {v}" for k, v in NEEDED.items())
    return (
        f"no {task or 'known'} form fits the columns found: {', '.join(found) or 'none'}. "
        f"Needed: {wanted}. Name your own columns, for instance "
        f"{setting('columns', {'text': found[0] if found else 'review'})}"
    )
