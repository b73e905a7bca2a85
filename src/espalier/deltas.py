"""What stands in the model: deltas, and the numbers that they declare.

A delta is a small change at one site, with the ports it needs and no others. It declares its
numbers as `Trained` specifications; the adapter that it belongs to lays all of them into flat
buffers and hands views back (adapter.py). That is why every port receives its tensors `t` as an
argument: the caller has cast them to the type of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from espalier.errors import SiteError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from espalier.places import Site

Tensors: TypeAlias = "Mapping[str, Tensor]"


@dataclass(slots=True, eq=False)
class Trained:
    """Numbers that a delta trains: their shape and how they start.

    `init` fills the zeroed view in place; None leaves zeros. Two deltas that hold the same
    `Trained` object share its numbers. `rate` multiplies the learning rate of these numbers;
    those of a task `head` may have a learning rate of their own.
    """

    shape: tuple[int, ...]
    init: Callable[[Tensor], object] | None = None
    rate: float = 1.0
    head: bool = False

    @property
    def kind(self) -> str:
        """The flat buffer that holds them. Weight decay is for matrices only, never for vectors."""
        kind = "matrices" if len(self.shape) > 1 else "vectors"
        if self.head:
            kind = f"head_{kind}"
        return kind if self.rate == 1 else f"{kind}_x{self.rate:g}".replace(".", "_")


@dataclass(slots=True, eq=False)
class Kept(Trained):
    """Numbers that are saved with the delta but never trained.

    Whole ones are int32; `wide` ones, which may reach 2³¹, are int64. Those set `aside` are a
    regime's alone: ports are not given them.
    """

    whole: bool = False
    wide: bool = False
    aside: bool = False

    @property
    def kind(self) -> str:
        """The flat buffer that holds them."""
        if not self.whole:
            return "kept"
        return "indices_wide" if self.wide else "indices"


class Call(NamedTuple):
    """One call of a module: its input and output, how to call it again, all that it was given."""

    x: Tensor
    y: Tensor
    again: Callable[[Tensor], Tensor]
    args: tuple[Any, ...]  # x among them, unless it was given by name
    kwargs: dict[str, Any]


class Product(NamedTuple):
    """s · drop(x) Aᵀ Bᵀ, which is all that a delta adds to y: A (R, D_in), B (D_out, R).

    With a `stretch` σ (D_out,) all of y but its bias then grows by σ: z + σ ⊙ z. A delta that may
    have one says so (`stretches`).
    """

    a: Tensor
    b: Tensor
    scale: float
    dropout: float = 0.0  # in training only
    stretch: Tensor | None = None


class Batch(NamedTuple):
    """What a forward pass of the whole model was given, for deltas that mind it.

    `mask` (B, T) is 1 on real tokens, of the encoder's text where there are two stacks; None
    means all are real. `decoder_mask` is the decoder's. `continuing`: it goes on from a cache.
    """

    mask: Tensor | None
    decoder_mask: Tensor | None
    continuing: bool
    training: bool


class Regime:
    """What a method does to its numbers while they train, besides following the gradient.

    All deltas of one attached method share one, which overrides what it needs. A `Lifecycle`
    (lifecycle.py) drives it; steps are optimiser steps. What must survive a stop is in `Kept`
    numbers of the deltas, and in nothing else. Numbers are changed in place through `.data`; their
    gradients are in `delta.g` while `before_step` and `after_step` run, and only then.

    Attributes:
        deltas: Those that share it, in model order.
        total: Steps of the whole training; 0 until a lifecycle has begun.
    """

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.total = 0

    def start(self, total: int, done: int) -> None:
        """Told how many steps there will be, and how many are done, before the next one."""
        self.total = total

    def penalty(self) -> Tensor | None:
        """A scalar that is added to the loss of each step, in training only, once per step."""
        return None

    def before_step(self, step: int) -> None:
        """Told before step 1, 2, … when its gradients are complete and its numbers the old ones."""

    def after_step(self, step: int) -> None:
        """Told after step 1, 2, … when the numbers are new and the gradients still there."""

    def report(self) -> Mapping[str, Sequence[float]]:
        """What a run's record keeps at each evaluation: by name, a number for each delta."""
        return {}

    @property
    def settled(self) -> bool:
        """Whether what stands now may be kept as the result, as it may at the end."""
        return True


class Delta:
    """A change at one site. Subclasses are final and override the ports they need.

    Ports (x is the host's input, y its output, both cut to the site's rows where it has rows;
    at a span x is what the entering module was given):
        before(t, x, training) -> x       the host's input, changed
        after(t, x, y, training) -> y     the host's output, changed
        attend(t, x, training) -> k, v    extra keys and values for an attention (`attends`; then
                                          no other port is used; x is the queries where nothing
                                          is watched)
        embed(t, training) -> rows        embeddings of extra words before the text (`embeds`)
        product(t) -> Product             what `after` does, where it adds a product of two factors
                                          and no more than stretches what then is there; it may
                                          then be computed another way
        fold(t, w, b) -> (w, b)           the same change on a float weight; absent: cannot merge
        effective(t, own, training)       what stands in for the host's own parameters, by name
                                          (`replaces`; then no other port is used)
        begin(batch)                      told before every forward pass of the whole model
        ready()                           told when active, moved or loaded: what Python must know
                                          of kept numbers is read from `self.t` here
        rest()                            told when not active any more: what was kept from earlier
                                          passes goes
        calibrate(squares)                given what `measures` asks for
        plain(t) -> t                     the numbers of the plain form that `Method.plain` builds

    Attributes:
        watches: Paths of modules; `seen` holds their latest calls when a port is used, the site's
            own, too, when `after` is. The end of a watched module around the site empties it.
        regime: What happens to its numbers while they train, shared by all deltas of its method.
        gaps: How many of the rows that it embeds stand before the text, between its two segments,
            and after it.
    """

    replaces: ClassVar[bool] = False
    attends: bool = False
    embeds: bool = False
    gaps: tuple[int, int, int] = (0, 0, 0)
    reads_host: bool = False  # t brings the host's "weight" (out, in) and "bias"
    measures: bool = False  # before training it asks for E[(∂loss/∂p)²] of what is `measured`
    idle: bool = False  # it may rightly get no gradient
    gates: bool = False  # a gate around it comes as t["gate"] and multiplies its own branch
    stretches: bool = False  # its product has a stretch
    taps: bool = False  # it reads others' outputs, detached, and changes nothing before its own

    def __init__(self, site: Site, **trained: Trained) -> None:
        self.site = site
        self.trained = trained
        kept = [(key, own) for key, own in trained.items() if isinstance(own, Kept)]
        self.aside = tuple([key for key, own in kept if own.aside])
        self.t: dict[str, Tensor] = {}  # views of the adapter's buffers, put here by the adapter
        self.cast: dict[str, Tensor] = {}  # the same in the base's type, while a pass trains
        self.watches: tuple[str, ...] = ()
        self.seen: dict[str, Call] = {}
        self.regime: Regime | None = None
        self.g: dict[str, Tensor] = {}  # gradients of t, for the regime, while it is told of a step
        if site.enter is not None and site.enter != site.path:
            self.watches = (site.enter,)

    def before(self, t: Tensors, x: Tensor, training: bool) -> Tensor:
        """The input for the host; the unchanged `x` by default."""
        return x

    def after(self, t: Tensors, x: Tensor, y: Tensor, training: bool) -> Tensor:
        """The host's output with the change; the unchanged `y` by default."""
        return y

    def attend(self, t: Tensors, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
        """Keys (1 or B, L, h_kv·d_h) and values to attend to besides the text's own."""
        raise NotImplementedError

    def embed(self, t: Tensors, training: bool) -> Tensor:
        """Rows (L, D) that stand for L extra words before the text."""
        raise NotImplementedError

    def begin(self, batch: Batch) -> None:
        """Told before every forward pass of the whole model."""

    def ready(self) -> None:
        """Told when its adapter was made active, moved or loaded."""

    def rest(self) -> None:
        """Told while its adapter is not active: what it keeps from earlier passes can go."""

    def calibrate(self, squares: Tensors) -> None:
        """Given the mean squared gradient of each parameter that is `measured`, by its key."""

    def product(self, t: Tensors) -> Product | None:
        """What `after` does to y, where that is one product with two factors; else None."""
        return None

    def fold(self, t: Tensors, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias with the change folded in, fp32. Raises where it cannot."""
        raise SiteError(f"{type(self).__name__} at {self.site.path} cannot be merged into a weight")

    def effective(self, t: Tensors, own: Tensors, training: bool) -> Tensors:
        """What stands in for the host's parameters `own`, by name; the numbers themselves."""
        return t

    def plain(self, t: Tensors) -> Tensors:
        """The numbers of the plain delta that serves what this one trained."""
        return t

    def gate_input(self, x: Tensor, y: Tensor) -> Tensor:
        """What a gate over this change reads, (…, gate_width); by default what enters."""
        return x

    @property
    def gate_width(self) -> int:
        """Width of what a gate over this change reads."""
        return self.site.n_in

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the host's parameters that this delta stands in for."""
        return tuple(self.trained) if self.replaces else ()

    @property
    def measured(self) -> dict[str, tuple[str, str]]:
        """The base's parameters that `calibrate` is told of, as (path, name) by a key."""
        return {name: (self.site.path, name) for name in self.parameters}

    @property
    def mergeable(self) -> bool:
        """Whether the change can be written into the base's weights."""
        return self.replaces or type(self).fold is not Delta.fold

    def changed(self, host: nn.Module) -> tuple[int, int | None]:
        """(scalars of the base-shaped model that differ once merged, bound on the change's rank).

        A rank of None means not bounded by the method. What cannot be merged changes none.
        """
        return 0, 0

    def __getstate__(self) -> dict[str, Any]:
        # Views cannot be copied; the adapter makes them anew.
        return {**self.__dict__, "t": {}, "cast": {}, "seen": {}, "g": {}}
