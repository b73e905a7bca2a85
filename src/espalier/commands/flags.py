"""Flags of `espalier train`, made from the fields of `RunConfig` and of the chosen method.

Nothing is listed twice: a new setting of a run or of a method is a new flag by itself. What a
person types stays text here; the objects that own the settings check it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer
import yaml

from espalier.errors import SettingError, nearest
from espalier.wording import flag

_WIDE = 24  # longer lists of choices stand in the help's text, not in its column
# The field with which each panel of the help begins.
_PANELS = {
    "model": "Model and data",
    "method": "Method",
    "epochs": "Training",
    "evaluate_every": "Evaluation",
    "out": "Run",
}


def with_run_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, which takes `**settings`, one option per field of RunConfig."""
    from espalier.training.config import RunConfig

    own = [p for p in inspect.signature(command).parameters.values() if p.kind != p.VAR_KEYWORD]
    panel = ""
    made = []
    for name, field in RunConfig.model_fields.items():
        panel = _PANELS.get(name, panel)
        default = "required" if field.is_required() else field.get_default()
        made.append(_option(name, field.annotation, field.description or "", default, panel))
    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in own]
    command.__signature__ = inspect.Signature(own + made)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in own + made}
    return command


def without(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Take a flag off a command that fills it in by itself."""

    def taken(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != name]
        command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        del command.__annotations__[name]
        return command

    return taken


def _option(name: str, kind: Any, text: str, default: Any, panel: str) -> inspect.Parameter:
    switch = kind is bool
    told = f" [{default}]" if default not in (None, "") else ""
    names = f"{flag(name)}/--no-{name.replace('_', '-')}" if switch else flag(name)
    words = [part for part in _members(kind) if isinstance(part, str)]
    choices = f" One of {', '.join(words)}." if words and _metavar(kind) == "NAME" else ""
    option = typer.Option(
        names,
        help=(text + choices + ("" if switch else told)).replace("[", "\\["),
        metavar="" if switch else _metavar(kind),
        show_default=False,
        rich_help_panel=panel,
    )
    annotation = Annotated[bool | None if switch else str | None, option]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _metavar(kind: Any) -> str:
    """What stands for a value in the help: its choices, or the sort of thing it is."""
    parts = list(_members(kind))
    words = [part for part in parts if isinstance(part, str)]
    sorts = ((str, "TEXT"), (int, "N"), (float, "X"), (dict, "A=B,..."))
    words += [word for sort, word in sorts if sort in parts][:1]
    text = "|".join(words) or "PATH"
    return text if len(text) <= _WIDE else "NAME"


def _members(kind: Any) -> Iterable[Any]:
    """The types of a union and the words of a Literal, flat."""
    if get_origin(kind) in (list, dict):
        yield get_origin(kind)
    elif get_args(kind):
        for part in get_args(kind):
            yield from _members(part)
    else:
        yield kind


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were typed; lists and mappings read out of their text."""
    values = {name: value for name, value in settings.items() if value is not None}
    if "columns" in values:
        values["columns"] = mapping(values["columns"])
    if "," in str(values.get("head", "")):
        values["head"] = [part.strip() for part in values["head"].split(",")]
    return values


def mapping(text: str) -> dict[str, str]:
    """`text=review,label=stars` as a mapping; YAML such as `{text: review}` too.

    Raises:
        SettingError: it is neither.
    """
    if text.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = None
        if isinstance(value, dict):
            return {str(k): str(v) for k, v in value.items()}
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(sep and name.strip() and value.strip() for name, sep, value in pairs):
        raise SettingError(f"--columns takes text=review,label=stars; got {text!r}.")
    return {name.strip(): value.strip() for name, _, value in pairs}


# ------------------------------------------------------------------------------ settings of methods


class Elsewhere(NamedTuple):
    """A command other than train: its name and flags, and why it has not those of a run."""

    name: str
    flags: Sequence[str]
    why: str


def elsewhere(ctx: typer.Context, why: str) -> Elsewhere:
    """The command that is running."""
    known = [name for parameter in ctx.command.params for name in parameter.opts]
    return Elsewhere(ctx.info_name or "", known, why)


def method_settings(
    words: Sequence[str], method: object, by: Elsewhere | None = None
) -> list[dict[str, Any]]:
    """The method with the settings that were typed as flags of their own (`--rank 16`).

    Args:
        words: What no option of the command took.
        method: The method so far, in any form that `esp.recipe` reads.
        by: The command, if it is not one that takes the settings of a run.

    Returns:
        The recipe as JSON data, with the settings in it.

    Raises:
        SettingError: A flag is no setting of the run or of the method; names the nearest.
    """
    from espalier.recipes import maker, recipe, terms

    # The settings typed are added before anything is built, so that `--method lora --rank 0` is
    # refused for the rank and `--method spot --source DIR` is whole.
    parts = [dict(term) if isinstance(term, Mapping) else term for term in terms(method)]
    makers = [maker(term) for term in parts]
    for name, text in _pairs(words).items():
        at = [i for i, made in enumerate(makers) if name in fields_of(made)]
        if not at:
            raise SettingError(unknown_flag(name, makers, by))
        if len(at) > 1:
            names = " and ".join(makers[i].__name__ for i in at)
            raise SettingError(
                f"{names} both have a setting {name}; write it into the method: "
                f'--method "{makers[at[0]].__name__}({name}={text}) + ..."'
            )
        parts[at[0]][name] = _value(text, fields_of(makers[at[0]])[name])
    return recipe(parts).to_json()


def fields_of(made: Callable[..., Any]) -> dict[str, Any]:
    """The settings of a method, or of a named sum, and their types."""
    hints = get_type_hints(made)
    return {name: hints[name] for name in inspect.signature(made).parameters}


def _pairs(words: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise SettingError(
                f"{word!r} belongs to no flag; settings are given as --name value "
                "(put a value with spaces in quotes)."
            )
        name, sep, value = word[2:].partition("=")
        if not sep:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        pairs[name.replace("-", "_")] = value
    return pairs


def _value(text: str, kind: Any) -> Any:
    """Text as the field's type; what does not fit is left for the method to refuse."""
    kinds = set(_members(kind))
    if get_origin(kind) is tuple and not text.lstrip().startswith(("[", "(")):  # 3,3,3 or yes,no
        parts = [part.strip() for part in text.split(",") if part.strip()]
        return parts if str in kinds else [yaml.safe_load(part) for part in parts]
    if str in kinds and not kinds & {int, float, bool}:
        return text
    try:
        value = yaml.safe_load(text)
        if float in kinds and int not in kinds and not isinstance(value, bool):
            return float(text)
    except (yaml.YAMLError, ValueError):
        return text
    words = str in kinds and float not in kinds  # a text, or a list of numbers or texts
    return text if words and not isinstance(value, list) else value


def unknown_flag(
    name: str, methods: Sequence[Callable[..., Any]], by: Elsewhere | None = None
) -> str:
    """One sentence on a flag that nothing takes: the right one, or the nearest."""
    from espalier.training.aliases import ALIASES
    from espalier.training.config import RunConfig

    of_run = [flag(field) for field in RunConfig.model_fields]
    own = [*of_run, "--config", "--print-config"] if by is None else by.flags
    other = re.match(r"write method: (\w+)\(", ALIASES.get(name, ""))
    meant = re.match(r"write (\w+)", ALIASES.get(name, ""))
    key = flag(name if meant is None or other else meant[1])
    if by is not None and key in of_run and key not in own:
        return f"`espalier {by.name}` takes no {key}, a flag of `espalier train`: {by.why}."
    if name in ALIASES and (other is None or other[1] in {cls.__name__ for cls in methods}):
        return f"There is no flag --{name}: {as_flags(ALIASES[name])}."
    of_method = {field for cls in methods for field in fields_of(cls)}
    near = nearest(flag(name), {*own, *map(flag, of_method)})
    names = " + ".join(cls.__name__ for cls in methods)
    if near.startswith("did"):
        return f"There is no flag {flag(name)} for {names}; {near}"
    rest = "those of a run" if by is None else "its own"
    return (
        f"There is no flag {flag(name)}; {names} has {', '.join(map(flag, sorted(of_method)))}, "
        f"and `espalier {by.name if by else 'train'} --help` lists {rest}."
    )


def as_flags(sentence: str) -> str:
    """A sentence about config keys (`write lr`, `write method: LoRA(rank=8)`) in flags."""
    found = re.fullmatch(r"write method: (\w+)\((\w+)=(.*)\)", sentence)
    if found:
        return f"write --method {found[1].lower()} {flag(found[2])} {found[3]}"
    found = re.fullmatch(r"write (\w+)(?:: ([\w\[\] ]+))?(.*)", sentence)
    if found:
        return f"write {flag(found[1])}{' ' + found[2] if found[2] else ''}{found[3]}"
    return sentence
