"""Prefixes that start as the keys and values of real words."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from espalier.adapter import Adapter
from espalier.attention import StandIn, caller
from espalier.deltas import Delta
from espalier.errors import SettingError
from espalier.graft import find, get
from espalier.modules import base_modules, unwrap
from espalier.verbs import activate

Target = tuple[Delta, Tensor, Tensor]  # whose keys (L, K) and values (L, V) these are to be


class _Listener(StandIn):
    """Keeps the keys and values (B, h_kv, T, d_h) that an attention attends to."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.heard: tuple[Tensor, Tensor] | None = None

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Any:
        """The model's own attention, having kept what it is of."""
        self.heard = (k, v)
        return self.own(q, k, v, mask, kwargs)


def prefix_from_text(
    model: nn.Module,
    name: str,
    input_ids: Tensor,
    *,
    steps: int = 500,
    learning_rate: float = 1e-4,
    **inputs: Any,
) -> float:
    """Start an adapter's prefixes as the keys and values that real words have in the bare model.

    Keys and values that train themselves are set; where a network makes them it is regressed onto
    them with Adam (mean squared error), its embeddings included.

    Args:
        model: A model with the adapter; it need not be active.
        name: The adapter.
        input_ids: (1, L) ids, as many as the prefixes are long.
        steps: Of the regression.
        learning_rate: Of the regression.
        **inputs: What else the model needs: `decoder_input_ids` of an encoder-decoder.

    Returns:
        The mean squared error that is left, 0.0 where nothing had to be regressed.

    Raises:
        AdapterError: No such adapter, or one is merged into the base.
        SettingError: It has no prefix, or one of another length; or it is frozen.
    """
    adapter = get(model, name)
    wanted = [d for d in adapter.deltas if d.attends and "keys" in d.plain(d.t)]
    if not wanted:
        raise SettingError(f"{name!r} is {adapter.recipe}, which has no prefix to start from text")
    targets = _listen(model, wanted, {"input_ids": input_ids, **inputs})
    made = [target for target in targets if "keys" not in target[0].t]
    with torch.no_grad():
        for delta, keys, values in targets:
            if "keys" in delta.t:
                delta.t["keys"].data.copy_(keys)
                delta.t["values"].data.copy_(values)
    return _regress(adapter, made, steps, learning_rate) if made else 0.0


def _listen(model: nn.Module, deltas: list[Delta], inputs: dict[str, Any]) -> list[Target]:
    """Runs the bare model on the text and cuts what each delta's attention attended to."""
    graft, modules = find(model), base_modules(model)
    calls = [caller(modules, delta.site) for delta in deltas]
    live, modes = dict(graft.live), [(m, m.training) for m in model.modules()]
    activate(model, None)
    ears = {path: _Listener(module) for path, module in calls}
    try:
        model.eval()
        for ear in ears.values():
            ear.enter()
        with torch.no_grad():
            unwrap(model)(**inputs)
    finally:
        for ear in ears.values():
            ear.leave()
        for module, mode in modes:
            module.training = mode
        activate(model, live)
    return [
        _target(delta, ears[path].heard) for delta, (path, _) in zip(deltas, calls, strict=True)
    ]


def _target(delta: Delta, heard: tuple[Tensor, Tensor] | None) -> Target:
    """What (1, h_kv, T, d_h) was heard, as the prefix's keys and values (L, h_kv·d_h)."""
    if heard is None:
        raise SettingError(f"{delta.site.path} did not run; give all inputs that the model takes")
    wanted = delta.plain(delta.t)["keys"]
    keys, values = (part.transpose(1, 2).flatten(2) for part in heard)
    if keys.shape != (1, *wanted.shape):
        raise SettingError(
            f"the text has {len(keys)} rows of {keys.shape[1]} tokens, the prefix at "
            f"{delta.site.path} is {len(wanted)} long; give one row of {len(wanted)} tokens, or "
            f"set length={keys.shape[1]}"
        )
    return delta, keys[0].to(wanted), values[0].to(wanted)


def _regress(adapter: Adapter, targets: list[Target], steps: int, learning_rate: float) -> float:
    """Trains what makes keys and values; the rest of the adapter gets no gradient."""
    trained = [flat for flat in adapter.flat.values() if flat.requires_grad]
    if not trained:
        raise SettingError(f"{adapter.name!r} is frozen; call esp.thaw(model, {adapter.name!r})")
    adapter.sync()
    optimiser = torch.optim.Adam(trained, lr=learning_rate)
    for _ in range(steps):
        optimiser.zero_grad()
        _error(targets).backward()
        optimiser.step()
    optimiser.zero_grad()
    with torch.no_grad():
        return float(_error(targets))


def _error(targets: list[Target]) -> Tensor:
    """Mean squared error over all keys and values."""
    errors = []
    for delta, keys, values in targets:
        made = delta.plain(delta.t)
        errors += [F.mse_loss(made["keys"], keys), F.mse_loss(made["values"], values)]
    return torch.stack(errors).mean()
