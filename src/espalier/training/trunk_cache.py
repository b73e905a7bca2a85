"""The trunk cache: what lies below all that trains runs once, and every epoch reads its states.

Before the first step the frozen trunk runs over the training and the validation examples, in eval
mode and without a graph, and the states that training needs are kept, padding left out. From then
on its blocks do not run: each epoch, the first too, is given the kept states. So what a step
computes does not depend on where or when its states were made; a resumed run fills memory again
with the same numbers. Frozen modules below the cut are without dropout for that reason.

That the model gives the same loss with kept states as without is tried on two examples before
anything is filled: a model that does more between its blocks than hand states on is refused.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from espalier import identity
from espalier.errors import CheckpointError, SettingError
from espalier.graft import find, get
from espalier.routes import encoders
from espalier.training import trunk_store as store
from espalier.training.evaluate import evaluating, inputs
from espalier.training.memory import in_words
from espalier.training.progress import duration
from espalier.training.state import fingerprint
from espalier.trunk import Cut, Replay, State, cut
from espalier.verbs import only_active
from espalier.wording import setting

if TYPE_CHECKING:
    from espalier.training.job import Job

Examples = Sequence[dict[str, Any]]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MARGIN = 0.9  # the share of free memory, or of a free disk, that may be taken


@contextlib.contextmanager
def trunk_cache(job: Job) -> Iterator[TrunkCache | None]:
    """The job with a trunk cache while it lasts, if its settings ask for one.

    Raises:
        SettingError: No block can be left out, or the states take too much room.
    """
    if job.config.trunk_cache == "none":
        yield None
        return
    job.trunk = TrunkCache(job)
    try:
        yield job.trunk
    finally:
        job.trunk.close()
        job.trunk = None


class TrunkCache:
    """The kept states of a job's examples; `fill` makes them.

    Raises:
        SettingError: No block can be left out, or the states take too much room.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.dtype = DTYPES[job.config.trunk_dtype]
        by_length = sorted(job.train, key=lambda example: len(example["input_ids"]))
        few = [by_length[0], by_length[-1]]
        batch, again = job.collate(few), job.collate(few)
        if any(not torch.equal(batch[name], again[name]) for name in batch):
            raise SettingError(
                f"{self._setting}: the task makes other inputs of an example each time"
            )
        self.cut = self._cut(few, batch)
        self.stores: list[tuple[Examples, store.Store]] = []
        self.replay = Replay(job.model, self.cut)
        try:
            self._try(few, batch)
            splits = [split for split in (job.train, job.validation) if split]
            self.layouts = [(split, self._layout(split)) for split in splits]
            self._check_room()
        except BaseException:
            self.replay.leave()
            raise

    def close(self) -> None:
        """Let the blocks run again, and forget the states."""
        self.replay.leave()
        self.stores = []

    @property
    def plan(self) -> list[str]:
        """What is left out and what that takes, in two lines."""
        size = sum(layout.bytes for _, layout in self.layouts)
        tokens = sum(layout.tokens for _, layout in self.layouts)
        kept = ", ".join(sorted({str(state.width) for state in self.cut.states}))
        what = f"{self._number} of {kept} numbers ({self.job.config.trunk_dtype})"
        where = "in memory" if self.job.config.trunk_cache == "memory" else f"in {self.root}"
        lines = [
            f"trunk cache: {self.cut}",
            f"  {what} for each of {tokens:,} tokens: {in_words(size)} {where}",
        ]
        seen = self.job.config.epochs
        if self.job.config.steps is None and seen <= 1:
            lines.append("  the run sees each example once: a cache pays from the second epoch on")
        return lines

    @property
    def _setting(self) -> str:
        return setting("trunk_cache", self.job.config.trunk_cache)

    @property
    def _number(self) -> str:
        number = len(self.cut.states)
        return f"{number} state{'s' * (number > 1)}"

    @property
    def root(self) -> Path:
        """The folder of all states that were kept on disk."""
        folder = self.job.config.trunk_folder
        return folder if folder else Path.home() / ".cache" / "espalier" / "trunk"

    # ------------------------------------------------------------------------------------ using it

    @contextlib.contextmanager
    def giving(self, examples: Examples, some: Sequence[int]) -> Iterator[None]:
        """Passes over a batch of these examples, and their backward, with kept states.

        Examples of which none are kept pass as ever.
        """
        held = next((kept for split, kept in self.stores if split is examples), None)
        if held is None:
            yield
            return
        with self.replay.replaying(store.Batch(held, some)):
            yield

    def fill(self) -> None:
        """Run the trunk over every example, or find the states on disk."""
        start = time.perf_counter()
        for examples, layout in self.layouts:
            on_disk = self.job.config.trunk_cache == "disk"
            data = self._on_disk(examples, layout) if on_disk else self._run(examples, layout)
            self.stores.append((examples, store.Store(layout, data)))
        self.job.screen.say(f"trunk cache: ready in {duration(time.perf_counter() - start)}")

    # --------------------------------------------------------------------------------- preparing it

    def _cut(self, few: Examples, batch: Mapping[str, Tensor]) -> Cut:
        try:
            return cut(self.job.model, lambda: self._loss(few, batch))
        except SettingError as error:
            raise SettingError(f"{self._setting}: {error}") from None

    def _loss(self, few: Examples, batch: Mapping[str, Tensor]) -> float:
        job = self.job
        with evaluating(job.model), job.autocast(), job.apart(few):
            given = inputs(job.task, batch, job.accelerator.device, job.model.dtype)
            return float(job.task.loss(job.model(**given), batch))

    def _try(self, few: Examples, batch: Mapping[str, Tensor]) -> None:
        """Refuse a model whose loss changes when its blocks' states are given."""
        layout = self._layout(few, torch.float32, [[0, 1]])
        kept = store.Store(layout, self._run(few, layout))
        live = self._loss(few, batch)
        with self.replay.replaying(store.Batch(kept, [0, 1])):
            given = self._loss(few, batch)
        slack = 1e-3 if self.job.precision == "fp32" else 3e-2
        if not (math.isclose(live, given, rel_tol=slack, abs_tol=slack) or math.isnan(live)):
            raise SettingError(
                f"{self._setting}: with kept states the loss of two examples is {given:.6g}, and "
                f"{live:.6g} without: {type(self.job.model).__name__} does more between its blocks "
                "than hand states on, so none can be left out"
            )

    def _layout(
        self,
        examples: Examples,
        dtype: torch.dtype | None = None,
        passes: list[list[int]] | None = None,
    ) -> store.Layout:
        from espalier.data import in_order

        job = self.job
        passes = passes or in_order(examples, job.config.batch_in_evaluation)
        states: dict[str, list[State]] = {}
        for state in self.cut.states:
            states.setdefault(state.stack, []).append(state)
        rows, total = [(0, 0)] * len(examples), 0
        lengths: dict[str, list[int]] = {stack: [] for stack in states}
        two = bool(encoders(job.model, find(job.model).places))
        for some in passes:
            own = [examples[i] for i in some]
            batch = job.collate(own)
            counts = [1] * len(own)
            if len(batch["input_ids"]) != len(own):  # an example of several rows
                counts = [len(job.collate([e])["input_ids"]) for e in own]
            for i, count in zip(some, counts, strict=True):
                rows[i], total = (total, total + count), total + count
            given = job.task.inputs(batch)
            for stack, found in lengths.items():
                found += _read(given, own) if stack == "decoder" and two else _text(given, own)
        parts = job.accelerator.num_processes
        return store.Layout(passes, rows, lengths, states, dtype or self.dtype, parts)

    def _check_room(self) -> None:
        config, size = self.job.config, sum(layout.bytes for _, layout in self.layouts)
        tokens = sum(layout.tokens for _, layout in self.layouts)
        takes = f"{self._setting}: {self._number} of {tokens:,} tokens take {in_words(size)}"
        ways = "let the method act in fewer stacks or layers, or use fewer or shorter examples"
        if size > config.trunk_limit * 1e9:
            raise SettingError(
                f"{takes}, more than {setting('trunk_limit', config.trunk_limit)} (GB). "
                f"Raise it, or {ways}"
            )
        if config.trunk_cache == "memory":
            import psutil

            free = psutil.virtual_memory().available
            where = f"of memory are free; use {setting('trunk_cache', 'disk')}"
        else:
            size = sum(at.bytes for split, at in self.layouts if not self._found(split, at))
            there = next(p for p in (self.root, *self.root.absolute().parents) if p.exists())
            free, where = shutil.disk_usage(there).free, f"are free in {self.root}"
        if size > _MARGIN * free:
            raise SettingError(f"{takes}, and {in_words(free)} {where}, or {ways}")

    # ----------------------------------------------------------------------------------- filling it

    def _run(self, examples: Examples, layout: store.Layout) -> dict[str, list[Tensor]]:
        """All states, in memory."""
        data: dict[str, list[Tensor]] = {stack: [] for stack in layout.lengths}
        for number in range(len(layout.spans())):
            shards = {
                stack: store.Memory(layout.shape(stack, number), layout.dtype) for stack in data
            }
            self._fill(examples, layout, number, shards)
            for stack, shard in shards.items():
                data[stack].append(shard.data)
        return data

    def _found(self, examples: Examples, layout: store.Layout) -> bool:
        what = self._what(examples, layout)
        return store.is_whole(self.root / store.key(what), what)

    def _on_disk(self, examples: Examples, layout: store.Layout) -> dict[str, list[Tensor]]:
        """All states on disk: found there, or made by all processes together."""
        from accelerate.utils import broadcast_object_list

        accelerator = self.job.accelerator
        what = self._what(examples, layout)
        folder = self.root / store.key(what)
        plan: list[Any] = [store.is_whole(folder, what), store.being_written(folder)]
        if accelerator.num_processes > 1:
            broadcast_object_list(plan)
        whole, writing = plan
        if not whole:
            try:
                self._write(examples, layout, writing)
                if accelerator.is_main_process:
                    store.finish(writing, folder, what)
            except OSError as error:
                shutil.rmtree(writing, ignore_errors=True)
                raise CheckpointError(
                    f"The trunk's states cannot be written to {self.root}: {error}"
                ) from error
            accelerator.wait_for_everyone()
        return store.mapped(folder, layout)

    def _write(self, examples: Examples, layout: store.Layout, writing: Path) -> None:
        accelerator = self.job.accelerator
        if accelerator.is_main_process:
            self.root.mkdir(parents=True, exist_ok=True)
            store.make_room(self.root, layout.bytes, self.job.config.trunk_limit * 1e9)
            writing.mkdir()
        accelerator.wait_for_everyone()
        spans = range(len(layout.spans()))
        for number in spans[accelerator.process_index :: accelerator.num_processes]:
            shards = {
                stack: store.OnDisk(
                    writing / f"{stack}-{number}.safetensors",
                    layout.shape(stack, number),
                    layout.dtype,
                )
                for stack in layout.lengths
            }
            self._fill(examples, layout, number, shards)
        accelerator.wait_for_everyone()

    def _fill(
        self,
        examples: Examples,
        layout: store.Layout,
        number: int,
        shards: Mapping[str, store.Memory | store.OnDisk],
    ) -> None:
        """The passes of one shard."""
        first, last = layout.spans()[number]
        with evaluating(self.job.model), self.job.autocast():
            for some in layout.passes[first:last]:
                for stack, found in self._pass(examples, layout, some).items():
                    shards[stack].add(found)
        for shard in shards.values():
            shard.close()

    def _pass(self, examples: Examples, layout: store.Layout, some: list[int]) -> dict[str, Tensor]:
        """The states of a few examples, by stack: (tokens, states, width)."""
        job, rows = self.job, layout.rows_of(some)
        found: dict[State, Tensor] = {}

        def sink(state: State, tensor: Tensor) -> None:
            lengths = torch.tensor([layout.lengths[state.stack][row] for row in rows])
            real = torch.arange(tensor.shape[1]) < lengths[:, None]
            found[state] = tensor[real.to(tensor.device)].to("cpu", layout.dtype)

        own = [examples[i] for i in some]
        given = inputs(job.task, job.collate(own), job.accelerator.device, job.model.dtype)
        with job.apart(own), self.replay.recording(sink):
            job.model(**given)
        return {
            stack: torch.stack([found[state] for state in states], 1)
            for stack, states in layout.states.items()
        }

    def _what(self, examples: Examples, layout: store.Layout) -> dict[str, Any]:
        """All that decides the states, as JSON values."""
        model = self.job.model
        base = identity.of(model, get(model, only_active(model)).head)
        settings = model.config.to_dict()
        for name in ("_name_or_path", "transformers_version", "use_cache"):
            settings.pop(name, None)
        return {
            "class": base["class"],
            "values": identity.digest(model, self.cut.below),
            "config": store.key({"settings": repr(sorted(settings.items(), key=str))}),
            "data": fingerprint(examples),
            "states": [[state.path, state.given] for state in self.cut.states],
            "dtype": self.job.config.trunk_dtype,
            "precision": self.job.precision,
            "shards": layout.spans(),
            "versions": [version("torch"), version("transformers")],
        }


def _text(given: Mapping[str, Any], own: Examples) -> list[int]:
    """Tokens of each row of the text."""
    mask = given.get("attention_mask")
    if mask is None or mask.dim() == 4:  # packed
        return [len(e["input_ids"]) for e in own]
    return _real(mask)


def _read(given: Mapping[str, Any], own: Examples) -> list[int]:
    """Tokens of each row that a decoder reads beside a text: its own, or made of the labels."""
    mask, labels = given.get("decoder_attention_mask"), given.get("labels")
    if mask is not None:
        return _real(mask)
    if isinstance(labels, Tensor) and labels.dim() == 2:
        return _real(labels != -100)
    return [len(e["input_ids"]) for e in own]


def _real(mask: Tensor) -> list[int]:
    """The tokens of each row up to the last real one; padding stands on the right."""
    places = torch.arange(1, mask.shape[1] + 1)
    return (places * (mask != 0)).amax(1).tolist()
