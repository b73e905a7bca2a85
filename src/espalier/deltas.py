"""What a person writes and what stands in the model: methods, recipes and deltas.

A Method is a frozen dataclass of settings. It builds one Delta per site: a small change that is
the identity when fresh, with the ports it needs and no others. Methods join into a Recipe with `+`.

A delta declares its numbers as `Trained` specifications; the adapter that it belongs to lays all
of them into flat buffers and hands views back (adapter.py). That is why every port receives its
tensors `t` as an argument: the caller has cast them to the type of the computation.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from espalier.errors import SettingError, SiteError, nearest
from espalier.places import CHILD

if TYPE_CHECKING:
    from torch import Tensor, nn

    from espalier.places import Site, Sites

Tensors: TypeAlias = "Mapping[str, Tensor]"


@dataclass(slots=True, eq=False)
class Trained:
    """Numbers that a delta trains: their shape and how they start.

    `init` fills the zeroed view in place; None leaves zeros. Two deltas that hold the same
    `Trained` object share its numbers.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], object] | None = None

    @property
    def decays(self) -> bool:
        """Whether weight decay may apply: to matrices, never to vectors (biases, scales, norms)."""
        return len(self.shape) > 1


class Delta:
    """A change at one site. Subclasses are final and override the ports they need.

    Ports (x is the host's input, y its output, both cut to the site's rows where it has rows):
        after(t, x, y, training) -> y     the changed output
        fold(t, w, b) -> (w, b)           the same change on a float weight; absent: cannot merge
        replaces                          True: the tensors stand in for the host's own parameters
                                          of the same names, and no other port is used
    """

    replaces: ClassVar[bool] = False

    def __init__(self, site: Site, **trained: Trained) -> None:
        self.site = site
        self.trained = trained
        self.t: dict[str, Tensor] = {}  # views of the adapter's buffers, put here by the adapter

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The host's output with the change; the unchanged `y` by default."""
        return y

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias with the change folded in, fp32. Raises where it cannot."""
        raise SiteError(f"{type(self).__name__} at {self.site.path} cannot be merged into a weight")

    @property
    def mergeable(self) -> bool:
        """Whether the change can be written into the base's weights."""
        return self.replaces or type(self).fold is not Delta.fold

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """(scalars of the base-shaped model that differ once merged, bound on the change's rank).

        A rank of None means not bounded by the method.
        """
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "t": {}}  # views cannot be copied; the adapter makes them anew


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile` or data parallelism put around it."""
    while True:
        if "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
        elif type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model._modules["module"]
        else:
            return model
        assert inner is not None
        model = inner


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of the base by path; what Espalier put beside them is left out."""
    return {
        path: module
        for path, module in unwrap(model).named_modules()
        if path.partition(".")[0] != CHILD
    }


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
