"""What a person writes: methods, and recipes that join them with `+`; JSON and text both ways."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from espalier.deltas import Delta
from espalier.errors import SettingError, nearest

if TYPE_CHECKING:
    from torch import nn

    from espalier.places import Site, Sites


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
    def identity(self) -> bool:
        """Whether a fresh adapter changes nothing; papers that say otherwise override it."""
        return True

    def plain(self) -> Method:
        """The method whose deltas serve what this one trained; itself where nothing is richer."""
        return self

    def __add__(self, other: Method | Recipe) -> Recipe:
        return Recipe((self,)) + other

    def to_json(self) -> dict[str, Any]:
        """The method's name and every setting, as JSON data."""
        return {"method": type(self).__name__, **dataclasses.asdict(self)}  # type: ignore[call-overload]


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

    def plain(self) -> Recipe:
        """The recipe that serves what this one trained."""
        return Recipe(tuple(method.plain() for method in self.methods))

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
        return Recipe(tuple(_from_mapping(item) for item in data))

    def __str__(self) -> str:
        return " + ".join(_terse(method) for method in self.methods)


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
    if isinstance(source, str):
        return Recipe(tuple(_parse(source)))
    return Recipe.from_json(source)


def _parse(text: str) -> Iterable[Method]:
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise SettingError(f"{text!r} is no recipe; write for example 'LoRA(rank=8)'") from None
    terms: list[ast.expr] = []
    while isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        terms.append(tree.right)
        tree = tree.left
    for term in [tree, *reversed(terms)]:
        call = term if isinstance(term, ast.Call) else ast.Call(term, [], [])
        if not isinstance(call.func, ast.Name) or call.args:
            raise SettingError(
                f"{ast.unparse(term)!r} is no method; write for example 'LoRA(rank=8, alpha=16)'"
            )
        settings: dict[str, Any] = {"method": call.func.id}
        for keyword in call.keywords:
            try:
                settings[str(keyword.arg)] = ast.literal_eval(keyword.value)
            except ValueError:
                raise SettingError(
                    f"{call.func.id}({ast.unparse(keyword)}): the value must be a number, "
                    "text in quotes, True, False or None"
                ) from None
        yield _from_mapping(settings)


def _from_mapping(item: object) -> Method:
    if not isinstance(item, Mapping) or "method" not in item:
        raise SettingError(f"a method is given as {{'method': name, ...}}, not {item!r}")
    by_lower = {name.lower(): cls for name, cls in methods().items()}
    cls = by_lower.get(str(item["method"]).lower())
    if cls is None:
        raise SettingError(
            f"no method {item['method']!r}; {nearest(str(item['method']), methods())}"
        )
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    settings = {str(key): value for key, value in item.items() if key != "method"}
    for key in settings:
        if key not in fields:
            raise SettingError(f"{cls.__name__} has no setting {key!r}; {nearest(key, fields)}")
    return cls(**settings)


def _terse(method: Method) -> str:
    fields = dataclasses.fields(method)  # type: ignore[arg-type]
    changed = (
        f"{field.name}={getattr(method, field.name)!r}"
        for field in fields
        if getattr(method, field.name) != field.default
    )
    return f"{type(method).__name__}({', '.join(changed)})"


def check(method: Method, name: str, ok: bool, what: str) -> None:
    """Raise SettingError unless `ok`, naming the method, the setting, its value and the rule."""
    if not ok:
        value = getattr(method, name)
        raise SettingError(f"{type(method).__name__}({name}={value!r}): {name} must be {what}")
