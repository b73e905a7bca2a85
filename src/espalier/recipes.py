"""What a person writes: methods, and recipes that join them with `+`; JSON and text both ways."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, ParamSpec

from espalier.deltas import Delta
from espalier.errors import SettingError, nearest

if TYPE_CHECKING:
    from torch import nn

    from espalier.places import Site, Sites

P = ParamSpec("P")


class Method:
    """Settings of one method: a frozen dataclass with a `sites` selector and `build`.

    Subclasses register themselves by class name; a new method is a new file in `methods/`.
    """

    registry: ClassVar[dict[str, type[Method]]] = {}
    learning_rate: ClassVar[float] = 1e-3
    trains_base: ClassVar[bool] = False  # whether it trains copies of the base's own weights
    sites: str

    def __init_subclass__(cls) -> None:
        Method.registry[cls.__name__] = cls

    def build(self, site: Site) -> Delta:
        """The delta for one site. Raises SiteError where the method cannot stand."""
        raise NotImplementedError

    def deltas(self, model: nn.Module, places: Sites) -> list[Delta]:
        """One delta for each selected site of the model."""
        return [self.build(site) for site in places.select(self.sites)]

    @property
    def words(self) -> int:
        """How many words it puts beside a text, which must then be shorter by as many."""
        return 0

    @property
    def identity(self) -> bool:
        """Whether a fresh adapter changes nothing; papers that say otherwise override it."""
        return True

    def plain(self, deltas: Sequence[Delta] = ()) -> Method:
        """The method whose deltas serve what this one trained; itself where nothing is richer.

        `deltas` are those that this one built, where their numbers are known and matter.
        """
        return self

    def __add__(self, other: Method | Recipe) -> Recipe:
        return Recipe((self,)) + other

    def to_json(self) -> dict[str, Any]:
        """The method's name and every setting, as JSON data."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        settings = {field.name: _to_json(getattr(self, field.name)) for field in fields}
        return {"method": type(self).__name__, **settings}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Methods joined in order; left acts first, in the forward pass and when merged."""

    methods: tuple[Method, ...]

    def __add__(self, other: Method | Recipe) -> Recipe:
        return Recipe(self.methods + recipe(other).methods)

    @property
    def learning_rate(self) -> float:
        """The rate to start from: the most cautious of the parts."""
        return min(method.learning_rate for method in self.methods)

    @property
    def trains_base(self) -> bool:
        """Whether any part trains copies of the base's own weights."""
        return any(method.trains_base for method in self.methods)

    @property
    def identity(self) -> bool:
        """Whether a fresh adapter changes nothing."""
        return all(method.identity for method in self.methods)

    @property
    def words(self) -> int:
        """How many words its parts put beside a text."""
        return sum(method.words for method in self.methods)

    def plain(self, built: Mapping[int, Sequence[Delta]] | None = None) -> Recipe:
        """The recipe that serves what this one trained; `built` has each method's deltas."""
        held = built or {}
        return Recipe(tuple(m.plain(held.get(at, ())) for at, m in enumerate(self.methods)))

    def to_json(self) -> list[dict[str, Any]]:
        """One JSON object per method."""
        return [method.to_json() for method in self.methods]

    @staticmethod
    def from_json(data: object) -> Recipe:
        """The recipe that `to_json` wrote. Raises SettingError for unknown methods or fields."""
        if isinstance(data, Mapping):
            data = [data]
        if not isinstance(data, list) or not data:
            raise SettingError(f"a recipe is a list of methods, not {data!r}")
        return Recipe(tuple(method for item in data for method in _from_mapping(item)))

    def __str__(self) -> str:
        return " + ".join(_terse(method) for method in self.methods)

    @property
    def changes(self) -> str:
        """The recipe with nothing but what differs from the methods' defaults."""
        return " + ".join(_terse(method, sized=False) for method in self.methods)


# Sums with a name of their own (MAM, UniPELT): functions from settings to a recipe, by name.
NAMED_SUMS: dict[str, Callable[..., Recipe]] = {}


def named_sum(build: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Register a function as a name for the sum that it returns."""
    NAMED_SUMS[build.__name__] = build
    return build


@cache
def methods() -> Mapping[str, type[Method]]:
    """Every method by name, found by importing the files of `espalier.methods`."""
    package = importlib.import_module("espalier.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"espalier.methods.{module.name}")
    return Method.registry


def recipe(source: object) -> Recipe:
    """A recipe from a method, a recipe, JSON data, a name, or text such as "LoRA(rank=4)".

    Text is a sum of calls with literal arguments; names may be lower case. Nothing is evaluated.

    Raises:
        SettingError: An unknown method or setting, or a wrong value, with what was meant.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Method):
        return Recipe((source,))
    return Recipe.from_json(terms(source))


def terms(source: object) -> list[Any]:
    """The terms of a recipe as JSON data, as they were written: nothing is built or checked yet.

    Raises:
        SettingError: A text that cannot be read.
    """
    if isinstance(source, str):
        return list(_parse(source))
    if isinstance(source, Method | Recipe):
        source = source.to_json()
    return list(source) if isinstance(source, list | tuple) else [source]


def maker(term: object) -> Callable[..., Method | Recipe]:
    """What makes the method, or the named sum, of a term: a class or a function of its settings.

    Raises:
        SettingError: No method has that name.
    """
    if not isinstance(term, Mapping) or "method" not in term:
        raise SettingError(f"a method is given as {{'method': name, ...}}, not {term!r}")
    wanted, known = str(term["method"]), {**methods(), **NAMED_SUMS}
    made = {name.lower(): entry for name, entry in known.items()}.get(wanted.lower())
    if made is None:
        raise SettingError(f"no method {wanted!r}; {nearest(wanted, known)}")
    return made


def _parse(text: str) -> Iterable[dict[str, Any]]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise SettingError(
            f"{text!r} is no recipe; write for example 'LoRA(rank=8)' or 'LoRA(rank=8) + IA3()'"
        ) from None
    terms: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    for term in [tree, *reversed(terms)]:
        yield _read_call(term)


def _read_call(term: ast.expr) -> dict[str, Any]:
    """A name or a call with literal arguments as {"method": name, ...}."""
    call = term if isinstance(term, ast.Call) else ast.Call(term, [], [])
    if not isinstance(call.func, ast.Name):
        raise SettingError(
            f"{ast.unparse(term)!r} is no method; write for example 'LoRA(rank=8, alpha=16)', "
            "and join several with +"
        )
    name = call.func.id
    settings: dict[str, Any] = {"method": name}
    for argument in call.args:  # Gated(LoRA()) is the one form without a name
        if not isinstance(argument, ast.Call) or "part" in settings:
            raise SettingError(
                f"{ast.unparse(term)!r} is no method; settings are named, as in 'LoRA(rank=8)'"
            )
        settings["part"] = _read_call(argument)
    for keyword in call.keywords:
        try:
            settings[str(keyword.arg)] = (
                _read_call(keyword.value)
                if isinstance(keyword.value, ast.Call)
                else ast.literal_eval(keyword.value)
            )
        except ValueError:
            raise SettingError(
                f"{name}({ast.unparse(keyword)}): the value must be a number, "
                "text in quotes, True, False, None or a list of these"
            ) from None
    return settings


def _from_mapping(item: object) -> tuple[Method, ...]:
    """The method that JSON data describes; the several of a named sum."""
    made = maker(item)
    assert isinstance(item, Mapping)
    fields = _fields(made)
    settings = {str(key): value for key, value in item.items() if key != "method"}
    for key, value in settings.items():
        if key not in fields:
            raise SettingError(f"{made.__name__} has no setting {key!r}; {nearest(key, fields)}")
        settings[key] = _from_json(value)
    for key, field in fields.items():
        if field.default is field.empty and key not in settings:
            raise SettingError(f"{made.__name__} needs {key}, as in '{made.__name__}({key}=...)'")
    result = made(**settings)
    return result.methods if isinstance(result, Recipe) else (result,)


@cache
def _fields(made: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a method, or a named sum, is made with."""
    return inspect.signature(made).parameters


def _to_json(value: Any) -> Any:
    if isinstance(value, Method):
        return value.to_json()
    return [_to_json(one) for one in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    """Settings as methods hold them: lists are tuples, a method within a method is a method."""
    if isinstance(value, Mapping) and "method" in value:
        parts = _from_mapping(value)
        return parts[0] if len(parts) == 1 else Recipe(parts)
    return tuple(_from_json(one) for one in value) if isinstance(value, list | tuple) else value


def _terse(method: Method, sized: bool = True) -> str:
    """A method with what differs from its defaults, and its size: its first whole number."""
    fields = {f.name: f.default for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    values = {name: getattr(method, name) for name in fields}
    whole = (n for n, v in values.items() if sized and type(v) is int and v > 0)
    shown = {next(whole, None), *(n for n, v in values.items() if v != fields[n])}
    told = (f"{n}={_shown(v, sized)}" for n, v in values.items() if n in shown)
    return f"{type(method).__name__}({', '.join(told)})"


def _shown(value: Any, sized: bool) -> str:
    return _terse(value, sized) if isinstance(value, Method) else repr(value)


def check(method: Method, name: str, ok: bool, what: str) -> None:
    """Raise SettingError unless `ok`, naming the method, the setting, its value and the rule."""
    if not ok:
        value = getattr(method, name)
        raise SettingError(f"{type(method).__name__}({name}={value!r}): {name} must be {what}")


def check_number(method: Method, name: str, rule: Callable[[float], bool], what: str) -> None:
    """The same of a number, which True and False are not, that `rule` must hold for."""
    value = getattr(method, name)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    check(method, name, number and rule(value), what)
