"""An adapter merged onto a quantised base, written weight by weight as an ordinary 16-bit model.

Writing the merged weights back in 4 bits would lose most of a small change, so they are written
dense: the values that the codes stand for, which are what the adapter was trained on, and the
change on top. The base's own files give names and order. In memory there is the quantised model
and one dense weight at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from espalier import container, hosts
from espalier.container import Container
from espalier.errors import AdapterError, CheckpointError, SettingError
from espalier.folding import Fold, collect, fold_dense, folded, refuse
from espalier.graft import find
from espalier.modules import base_modules, unwrap
from espalier.places import Site
from espalier.verbs import Choice, resolve

ONTO = ("dequantised", "original")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Produce = Callable[[], Tensor]


@dataclass(slots=True)
class _Entry:
    """A tensor to write: its key, what it will be like, and how to make it."""

    key: str
    like: Tensor
    make: Produce


class _Writing:
    """What the merged model is made of; `files` are the base's."""

    def __init__(
        self, model: nn.Module, folds: dict[str, list[Fold]], files: list[Path], dtype: torch.dtype
    ) -> None:
        self.dtype = dtype
        self.modules = base_modules(model)
        self.files = [container.open_file(path) for path in files]
        packed = {s.path: s for s in find(model).places.whole if s.bits and not (s.span or s.rows)}
        self.packed: dict[str, Site] = packed
        self.folds = {path: folds.get(path, []) for path in packed}
        self.biases: dict[str, Tensor] = {}
        self.prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.originals: dict[str, tuple[Container, str]] = {}

    def own(self) -> dict[str, tuple[str, str]]:
        """(path, name) of all that a checkpoint of the merged model holds, by key; ties once."""
        seen: set[int] = set()
        found: dict[str, tuple[str, str]] = {}
        for path, module in self.modules.items():
            kept = {k: b for k, b in module._buffers.items() if _persistent(module, k)}
            for name, tensor in {**module._parameters, **kept}.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{path}.{name}" if path else name] = path, name
        return found

    def merged(self, path: str) -> tuple[Tensor, Tensor | None]:
        """A quantised host's weight and bias with the change, (out, in), fp32."""
        host, site = self.modules[path], self.packed[path]
        w, b = hosts.dense(host, site), hosts.bias(host)
        if path in self.originals:
            opened, key = self.originals[path]
            w = opened.tensor(key).to(w.device, torch.float32)
            w = w.T if _transposed(host) else w
        return folded(host, self.folds[path], w, b)

    def entry(self, key: str, path: str, name: str) -> _Entry:
        """How to write one tensor of the model under a key."""
        host = self.modules[path]
        if path in self.packed and name == "weight":
            site = self.packed[path]
            shape = (site.n_in, site.n_out) if _transposed(host) else (site.n_out, site.n_in)
            like = torch.empty(shape, dtype=self.dtype, device="meta")
            return _Entry(key, like, lambda: self._weight(path))
        tensor = self.biases.get(path) if name == "bias" else None
        if tensor is None:
            tensor = host._parameters.get(name, host._buffers.get(name))
        assert tensor is not None
        held = tensor.detach()
        dtype = self.dtype if held.is_floating_point() else held.dtype
        like = torch.empty(held.shape, dtype=dtype, device="meta")
        return _Entry(key, like, lambda: held.to(dtype))

    def _weight(self, path: str) -> Tensor:
        w = self.merged(path)[0]
        return (w.T if _transposed(self.modules[path]) else w).to(self.dtype)

    def shards(self) -> dict[str, list[_Entry]]:
        """What to write into each file: the base's keys in its order, then what it has not."""
        left = self.own()
        found: dict[str, list[_Entry]] = {}
        for opened in self.files:
            entries = found[opened.path.name] = []
            for key in opened.entries:
                mine = next((c for c in self._called(key) if c in left), None)
                if mine is not None:
                    entries.append(self.entry(key, *left.pop(mine)))
        last = found[self.files[-1].path.name]
        last += [self.entry(key, path, name) for key, (path, name) in left.items()]
        return {name: entries for name, entries in found.items() if entries}

    def take_biases(self) -> None:
        """Fold the biases of all that is quantised; they are small.

        Raises:
            AdapterError: One stands where the model has none, and would not be loaded again.
        """
        for path, deltas in self.folds.items():
            if all(delta.replaces for delta, _ in deltas):
                continue
            bias = self.merged(path)[1]
            if bias is not None and hosts.bias(self.modules[path]) is None:
                raise AdapterError(
                    f"{path} would get a bias, which this kind of model does not have and would "
                    "not load again. Keep the adapter active instead"
                )
            if bias is not None:
                self.biases[path] = bias

    def take_originals(self) -> None:
        """Find the base's own dense weights for all that is quantised."""
        for opened in self.files:
            for key in opened.entries:
                for name in self._called(key):
                    path = name.removesuffix(".weight")
                    if path != name and path in self.packed:
                        self.originals[path] = opened, key
        if lacking := self.packed.keys() - self.originals.keys():
            raise CheckpointError(
                f"{self.files[0].path.parent} holds no {min(lacking)}.weight by that name, so the "
                "original weights cannot be taken; merge onto the dequantised ones"
            )

    def _called(self, key: str) -> tuple[str, str, str]:
        """What a checkpoint's key may be called in the model: as it is, or with another prefix."""
        return key, self.prefix + key, key.removeprefix(self.prefix)


def write_merged(
    model: nn.Module,
    choice: Choice,
    base: str | Path,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    onto: str = "dequantised",
) -> Path:
    """Write adapters merged onto a quantised base as a dense model; the model in hand is unchanged.

    Args:
        model: A quantised model with adapters.
        choice: As for `activate`; the active ones where it is None.
        base: The folder, or name on the hub, that the base was loaded from; its safetensors files
            give names and order, and the weights for "original".
        folder: Made if need be. Gets the weights and the configuration, no tokenizer.
        dtype: The type of the weights.
        onto: "dequantised": what the codes stand for, which gives the outputs of the model in hand.
            "original": the base's weights before quantisation; then the adapter also acts
            without the quantisation error that it was trained with.

    Returns:
        The folder.

    Raises:
        AdapterError: Something cannot be merged.
        SettingError: An unknown `onto`.
        CheckpointError: The base's files cannot be read, or hold other names.
    """
    if onto not in ONTO:
        raise SettingError(f"onto is dequantised or original, not {onto!r}")
    model, folder = unwrap(model), Path(folder)
    graft = find(model)
    live = resolve(graft, dict(graft.live) if choice is None else choice)
    folds = collect(graft, live)
    refuse(base_modules(model), folds, untie=True, dense=True)
    files = weight_files(str(base))
    before, graft.live = graft.live, ()
    graft.refresh()
    undo: list[hosts.Undo] = []
    try:
        fold_dense(model, folds, undo)
        work = _Writing(model, folds, files, dtype)
        if onto == "original":
            work.take_originals()
        work.take_biases()
        _write(work.shards(), folder)
        _configure(model, folder, dtype)
    finally:
        for step in reversed(undo):
            step()
        graft.live = before
        graft.refresh()
    return folder


def _write(shards: dict[str, list[_Entry]], folder: Path) -> None:
    single = len(shards) == 1
    where: dict[str, str] = {}
    total = 0
    for name, entries in shards.items():
        name = SINGLE if single else name
        where |= {entry.key: name for entry in entries}
        total += sum(entry.like.nbytes for entry in entries)
        named = [(entry.key, entry.like) for entry in entries]
        container.write(folder / name, named, _made(entries), {"format": "pt"})
    if not single:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        container.write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")


@torch.no_grad()
def _made(entries: list[_Entry]) -> Iterator[Tensor]:
    """The tensors, each made when it is written."""
    for entry in entries:
        yield entry.make()


def _configure(model: Any, folder: Path, dtype: torch.dtype) -> None:
    """The model's configuration without a word of quantisation."""
    config = deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype, config.architectures = dtype, [type(model).__name__]
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def weight_files(base: str) -> list[Path]:
    """The safetensors files of a model folder, or of a model on the hub, in order.

    Raises:
        CheckpointError: There are none.
    """
    for name in (INDEX, SINGLE):
        path = _found(base, name)
        if path is None:
            continue
        if name == SINGLE:
            return [path]
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        found = [_found(base, name) for name in names]
        if all(found):
            return [file for file in found if file]
    raise CheckpointError(
        f"{base} holds no safetensors files, whose names the merged model would take"
    )


def _found(base: str, name: str) -> Path | None:
    if Path(base).is_dir():
        path = Path(base) / name
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    try:
        found = cached_file(base, name)
    except OSError:
        return None
    return Path(found) if found else None


def _persistent(module: nn.Module, name: str) -> bool:
    return module._buffers[name] is not None and name not in module._non_persistent_buffers_set


def _transposed(host: nn.Module) -> bool:
    """Whether the base keeps this host's weight as (in, out): it was a Conv1D."""
    return getattr(host, "source_cls", nn.Linear) is not nn.Linear
