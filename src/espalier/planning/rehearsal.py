"""One training step of a model that takes no memory, watched."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from espalier import hosts
from espalier.errors import EspalierError, SettingError
from espalier.fast.gated import act_of
from espalier.fast.norm import norm_law
from espalier.fast.quick import QuickFeed, QuickNorm, quicken
from espalier.modules import base_modules
from espalier.planning import base
from espalier.planning.setup import CHOICES, Setup
from espalier.planning.trace import Course, Tracer
from espalier.training import models
from espalier.training.evaluate import inputs
from espalier.verbs import activate, install, parameters, prepare

if TYPE_CHECKING:
    from espalier.graft import Graft

NAME = "plan"


class Rehearsal:
    """A base with its adapter, without memory, for steps of any batch and length.

    Args:
        setup: The settings.

    Raises:
        EspalierError: The recipe cannot stand on this base, or reads numbers that it lacks.
    """

    def __init__(self, setup: Setup) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.setup = setup
        # Constants that fast paths keep are real.
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        model = setup.make(setup.dtype, setup.storage)
        with self._told():
            graft, adapter = prepare(
                model, setup.recipe, NAME, head=setup.head, dtype=torch.float32, fresh=False
            )
            install(model, graft, adapter)
        with self._pretending():
            base.pretend(model, setup.device)
            for delta in adapter.deltas:  # they read what they could on "meta"
                vars(delta)["ready"] = _nothing
            activate(model, NAME)
            for delta in adapter.deltas:
                del vars(delta)["ready"]
            quicken(graft, model)
        graft._quick = True  # it would be done at the first pass
        _settle_quick(graft)
        self.model: Any = model
        self.adapter = adapter
        self.plans: dict[object, Any] = {}  # of the steps that were watched
        words = getattr(model, "get_output_embeddings", lambda: None)()
        weight = getattr(words, "weight", None)
        self.vocabulary = 0 if weight is None else int(weight.shape[0])

    @contextlib.contextmanager
    def _pretending(self) -> Iterator[None]:
        # What only the collector of cycles frees goes at any time: it is counted as not freed.
        collects = gc.isenabled()
        gc.disable()
        try:
            with self._told(), self.mode:
                yield
        finally:
            if collects:
                gc.enable()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what asks for numbers in words of ours."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # our views look at addresses, which fakes lack
            try:
                yield
            except (EspalierError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                if not _reads_numbers(error):
                    raise
                raise SettingError(
                    f"{self.setup.recipe} looks at the base's numbers or its own while it runs, "
                    f"which a plan does not have ({type(error).__name__})"
                ) from error

    @property
    def weights(self) -> list[Tensor]:
        """The base's tensors."""
        held: list[Tensor] = []
        for module in base_modules(self.model).values():
            tensors = (*module._parameters.values(), *module._buffers.values())
            held += [tensor for tensor in tensors if tensor is not None]
        return held + base.beside(self.model)

    @property
    def standing(self) -> int:
        """Bytes of the base and the adapter, each storage once."""
        tensors = (*self.weights, *self.adapter.runs.values())
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    @property
    def trained(self) -> int:
        """Numbers that train."""
        return sum(flat.numel() for flat in self.adapter.flat.values())

    @property
    def numbers(self) -> int:
        """Numbers of the base, tied ones once; those in few bits as what they stand for."""
        modules = base_modules(self.model).values()
        held = (p for module in modules for p in module._parameters.values() if p is not None)
        return sum({id(p): hosts.count(p) for p in held}.values())

    def step(self, setup: Setup) -> Course:
        """A forward and backward pass of the last micro-batch of a step, in training."""
        with self._pretending(), models.checkpointed(self.model, setup.checkpointing):
            self.model.train()
            trained = parameters(self.model)
            for parameter in trained:  # earlier micro-batches left theirs
                parameter.grad = torch.zeros_like(parameter) if setup.accumulate > 1 else None
            batch = given(setup, setup.batch)
            tracer = self._tracer(batch, trained, setup.task.name)
            with tracer:
                loss = self._loss(setup, batch)
                tracer.rename("workspace", "activations")
                tracer.mark("backward")
                loss.backward()
                tracer.call([p.grad for p in trained], "gradients")
                del loss
            for parameter in trained:
                parameter.grad = None
        return tracer.course

    def look(self, setup: Setup, rows: int) -> Course:
        """A forward pass without gradients, as in evaluation."""
        with self._pretending(), torch.no_grad():
            self.model.eval()
            batch = given(setup, rows)
            tracer = self._tracer(batch, [], setup.task.name)
            with tracer:
                self._loss(setup, batch)
        return tracer.course

    def _tracer(self, batch: dict[str, Tensor], trained: list[nn.Parameter], task: str) -> Tracer:
        standing: dict[str, list[Any]] = {
            "weights": self.weights,
            "adapter": list(self.adapter.runs.values()),
            "gradients": [p.grad for p in trained if p.grad is not None],
            "activations": list(batch.values()),
        }
        labels = batch["labels"]
        # A decoder that foretells the next word has nothing to say of a row's first label.
        many = labels.numel() - len(labels) * (task == "causal")
        return Tracer(standing, self.vocabulary, {labels.numel(): many})

    def _loss(self, setup: Setup, batch: dict[str, Tensor]) -> Tensor:
        mixed = setup.precision == "bf16" and self.model.dtype == torch.float32
        autocast: Any = contextlib.nullcontext()
        if mixed:
            autocast = torch.autocast(setup.device.type, torch.bfloat16)
        with autocast:
            taken = inputs(setup.task, batch, setup.device, self.model.dtype)
            return setup.task.loss(self.model(**taken), batch) * 1.0


def given(setup: Setup, rows: int) -> dict[str, Tensor]:
    """A batch of a task in tensors without memory, all rows of full length."""
    device, task = setup.device, setup.task

    def ids(count: int, length: int) -> Tensor:
        return torch.zeros(count, length, dtype=torch.long, device=device)

    count = rows * CHOICES if task.name == "choices" else rows
    batch = {"input_ids": ids(count, setup.length)}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    if task.name in ("causal", "tokens"):
        batch["labels"] = ids(rows, setup.length)
    elif task.name == "seq2seq":
        batch["labels"] = ids(rows, setup.target_length)
    elif task.name == "multilabel":
        batch["labels"] = torch.zeros(rows, len(task.labels or ()), device=device)
    elif task.name == "regression":
        batch["labels"] = torch.zeros(rows, device=device)
    elif task.name == "choices":
        raise SettingError("a plan for the task choices is made as causal or seq2seq, 4 times the "
                           "batch: --task causal")  # fmt: skip
    else:
        batch["labels"] = torch.zeros(rows, dtype=torch.long, device=device)
    return batch


def _nothing() -> None:
    """Stands for a delta's `ready`."""


def _settle_quick(graft: Graft) -> None:
    """Find out with numbers what is else found out at first use: which modules fast paths know."""
    for seat in graft.seats.values():
        quick = seat.quick
        if isinstance(quick, QuickFeed):
            quick.tried, quick.act = True, act_of(seat.host, quick.names)
        elif isinstance(quick, QuickNorm):
            own = seat.host._parameters.get("weight")
            if own is not None:
                rows = torch.empty(1, own.shape[-1], dtype=own.dtype)
                quick.tried, quick.law = True, norm_law(seat.host, rows)


def _reads_numbers(error: Exception) -> bool:
    from torch._subclasses import fake_tensor

    kinds = (
        fake_tensor.DataDependentOutputException,
        fake_tensor.DynamicOutputShapeException,
        fake_tensor.UnsupportedFakeTensorException,
        NotImplementedError,
    )
    return isinstance(error, kinds)
