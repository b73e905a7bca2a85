"""Which modules are a model's task head: the part that trains beside every method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from espalier.errors import SiteError, nearest
from espalier.modules import base_modules
from espalier.places import Sites

Head = Literal["auto"] | bool | Sequence[str]


def head_modules(model: nn.Module, places: Sites, head: Head) -> list[str]:
    """Paths of the modules of the task head: those named, or those that no checkpoint filled.

    transformers marks every parameter that it loads; where nothing is marked (a model made from a
    configuration) the head is what lies outside the backbone and does not predict words.
    """
    if head is False:
        return []
    if head not in ("auto", True):
        names = [head] if isinstance(head, str) else list(head)  # type: ignore[arg-type]
        known = base_modules(model)
        for path in names:
            if path not in known:
                raise SiteError(f"head: no module {path!r} in this model; {nearest(path, known)}")
        return [p for p in known if any(p == n or p.startswith(n + ".") for n in names)]
    owners = {
        path: [p for p in module._parameters.values() if p is not None]
        for path, module in base_modules(model).items()
    }
    loaded = {id(p) for own in owners.values() for p in own if "_is_hf_initialized" in p.__dict__}
    if loaded:
        return [
            path for path, own in owners.items() if own and not any(id(p) in loaded for p in own)
        ]
    words = getattr(model, "get_output_embeddings", lambda: None)()
    if words is not None:
        return []
    return [site.path for site in places if site.role == "head" and not site.tied]
