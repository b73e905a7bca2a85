"""The table of every method on every family: recipes, and which pairs refuse with which reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import SiteError
from zoo import CASES, Case

METHODS = {
    "lora": "LoRA(rank=4, alpha=8)",
    "lora-qv": "LoRA(rank=2, alpha=2, rslora=True, sites='attention.q, attention.v')",
    "lora-two": "LoRA(rank=3, sites='attention.*') + LoRA(rank=2, sites='ffn.*', bias='lora_only')",
    "dora": "LoRA(rank=3, alpha=5, dora=True)",
    "pissa": "LoRA(rank=2, alpha=4, init='pissa')",
    "lora-fa": "LoRA(rank=4, freeze_a=True)",
    "lora-plus": "LoRA(rank=2, plus=4.0)",
    "adalora": "AdaLoRA(rank=3, target=2)",
    "houlsby": "SerialAdapter(bottleneck=4)",
    "pfeiffer": "SerialAdapter(style='pfeiffer', bottleneck=4)",
    "parallel": "ParallelAdapter(bottleneck=4)",
    "parallel-attention": "ParallelAdapter(bottleneck=4, scale=2.0, sites='attention')",
    "compacter": "Compacter(bottleneck=4, p=2)",
    "prompt": "PromptTuning(length=3)",
    "ptuning": "PTuning(length=3)",
    "prefix": "PrefixTuning(length=3, hidden=5)",
    "ptuning2": "PTuningV2(length=3)",
    "ia3": "IA3()",
    "bitfit": "BitFit()",
    "bitfit-create": "BitFit(create=True)",
    "norms": "PartialTuning(sites='norm')",
    "last-layer": "PartialTuning(sites='block@last1')",
    "sparse": "PartialTuning(sites='all-linear', mask='magnitude', share=0.05)",
    "diffpruning": "DiffPruning(share=0.05)",
    "diffpruning-flat": "DiffPruning(sites='attention.*', share=0.2, structured=False, settle=0)",
    "mam": "MAM(length=2, hidden=5, bottleneck=4)",
    "unipelt": "UniPELT(length=2, hidden=5, bottleneck=4, rank=2)",
    "pile": "PrefixTuning(length=2, reparametrize=False) + SerialAdapter(bottleneck=3) + IA3() + "
    "LoRA(rank=2) + ParallelAdapter(bottleneck=3) + PromptTuning(length=2)",
    "said": "IntrinsicSAID(dimension=150)",
    "full": "FullTuning()",
    "ladder": "LadderSideTuning(reduction=2)",
    "head": "HeadOnly()",
}
TABLE = [(case, recipe) for case in CASES for recipe in METHODS]
IDS = [f"{case.name}-{recipe}" for case, recipe in TABLE]
# Pairs that cannot be, by what they say.
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "head"): "trains nothing here" for name in ("gpt2", "llama", "t5", "bart")},
    **{(name, "bitfit"): "no biases to train" for name in ("llama", "t5")},
}


def grafted(case: Case, recipe: str) -> nn.Module:
    """A model with the adapter attached; a pair that refuses is checked to do so, and skipped."""
    model = case.make()
    reason = REFUSED.get((case.name, recipe))
    if reason is not None:
        before = snapshot(model)
        with pytest.raises(SiteError, match=reason):
            esp.attach(model, METHODS[recipe], "mine")
        same(before, snapshot(model))
        pytest.skip("refuses, and says why")
    esp.attach(model, METHODS[recipe], "mine")
    return model


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything that could be observed of a model: classes, dictionaries, tensors, flags."""
    seen: dict[str, object] = {}
    for path, module in model.named_modules():
        seen[f"{path} class"] = type(module)
        seen[f"{path} dict"] = sorted(module.__dict__)
        hooks = (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._forward_pre_hooks_with_kwargs,
        )
        seen[f"{path} hooks"] = [len(some) for some in hooks]
    for name, p in model.named_parameters():
        seen[f"{name} values"] = p.detach().clone()
        seen[f"{name} identity"] = (id(p), p.data_ptr(), p.requires_grad, p.dtype)
    for name, b in model.named_buffers():
        seen[f"{name} values"] = b.detach().clone()
    seen["keys"] = list(model.state_dict())
    return seen


def same(a: dict[str, object], b: dict[str, object]) -> None:
    """Two snapshots agree bit for bit."""
    assert a.keys() == b.keys()
    for key, value in a.items():
        other = b[key]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            assert torch.equal(value, other), key
        else:
            assert value == other, key


def base_values(model: nn.Module) -> dict[str, Tensor]:
    """The base's parameters, copied."""
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if not n.startswith("espalier.")}
