"""Trained, kept and changed scalars on bert-base, from its configuration alone (no weights)."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import BertConfig, BertModel

import espalier as esp


@functools.cache
def bert_base() -> BertModel:
    with torch.device("meta"):
        return BertModel(BertConfig())


def counted(recipe: str) -> esp.accounting.Account:  # type: ignore[name-defined]
    model = bert_base()
    esp.attach(model, recipe, "mine", head=False)
    try:
        return esp.account(model, "mine")
    finally:
        esp.detach(model, "mine")


QV = "sites='attention.q, attention.v'"
TRAINED = {
    f"LoRA(rank=8, {QV})": 294_912,
    f"LoRA(rank=8, rslora=True, {QV})": 294_912,
    f"LoRA(rank=8, plus=16, {QV})": 294_912,
    f"LoRA(rank=8, dora=True, {QV})": 313_344,
    f"LoRA(rank=8, init='pissa', {QV})": 294_912,
    f"LoRA(rank=8, freeze_a=True, {QV})": 147_456,
    "LoRA(rank=8, sites='attention.*')": 589_824,
    f"AdaLoRA(rank=12, {QV})": 442_656,
    "AdaLoRA(rank=12)": 1_991_520,
    "LoRA(rank=8, sites='ffn.in', ranks=(8, 4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0))": 13 * 3_840,
    "LoRA(rank=8)": 1_327_104,
    "LoRA(rank=8, sites='all-linear, pooler')": 1_339_392,
    "BitFit()": 102_912,
    "IA3()": 55_296,
    "SerialAdapter(bottleneck=48)": 1_789_056,
    "SerialAdapter(bottleneck=64)": 2_379_264,
    "SerialAdapter(bottleneck=48, style='pfeiffer')": 894_528,
    "ParallelAdapter(bottleneck=512)": 9_452_544,
    "ParallelAdapter(bottleneck=384)": 7_091_712,
    "Compacter(bottleneck=24, p=4)": 57_088,
    "PromptTuning(length=20)": 15_360,
    "PromptTuning(length=100)": 76_800,
    "PTuning(template=(3, 3, 3))": 8_278_272,
    "PrefixTuning(length=10, hidden=512)": 9_857_024,
    "PrefixTuning(length=20, hidden=512)": 9_864_704,
    "PrefixTuning(length=30, hidden=800)": 15_402_272,
    "PTuningV2(length=20)": 368_640,
    "MAM(length=30, hidden=800, bottleneck=512)": 24_854_816,
    "UniPELT()": 11_083_376,
    "PartialTuning(sites='attention.*')": 28_348_416,
    "PartialTuning(sites='block@last1')": 7_087_872,
    "PartialTuning(sites='norm')": 38_400,
    "PartialTuning(sites='ffn.*')": 56_669_184,
    "IntrinsicSAID()": 20_000,
    "IntrinsicSAID(dimension=1608)": 1_608,
    "LadderSideTuning()": 2_376_300,
    "FullTuning()": 109_482_240,
    "DiffPruning()": 2 * 109_482_240 + 199,  # a logit for each of the 199 tensors
    "DiffPruning(structured=False)": 2 * 109_482_240,
}
KEPT = {
    "PrefixTuning(length=10)": 184_320,
    "PrefixTuning(length=30)": 552_960,
    "PrefixTuning(length=200)": 3_686_400,
    "PTuning(template=(3, 3, 3))": 6_912,
    "MAM()": 10_005_504,
    "MAM(length=16, bottleneck=16)": 599_232,
    "UniPELT()": 1_410_672,
    "DiffPruning()": 547_411,
    "DiffPruning(share=0.001)": 109_482,
    f"LoRA(rank=8, init='pissa', {QV})": 2 * 294_912,
    f"AdaLoRA(rank=12, target=8, {QV})": 294_912,
    f"LoRA(rank=8, {QV})": 294_912,
}
CHANGED = {
    f"LoRA(rank=8, {QV})": (14_155_776, 8),
    f"LoRA(rank=8, dora=True, {QV})": (14_155_776, None),
    f"LoRA(rank=8, init='pissa', {QV})": (14_155_776, 16),
    f"LoRA(rank=8, freeze_a=True, {QV})": (14_155_776, 8),
    "LoRA(rank=8)": (84_934_656, 8),
    f"AdaLoRA(rank=12, {QV})": (14_155_776, 12),
    "BitFit()": (102_912, 0),
    "DiffPruning()": (547_411, None),
    "PartialTuning(sites='norm')": (38_400, 0),
    "PartialTuning(sites='attention.*')": (28_348_416, None),
    "IntrinsicSAID()": (109_482_240, None),
    "SerialAdapter(bottleneck=48)": (0, 0),
}


@pytest.mark.parametrize("recipe", TRAINED)
def test_trained(recipe: str) -> None:
    assert counted(recipe).trained == TRAINED[recipe]


@pytest.mark.parametrize("recipe", KEPT)
def test_kept(recipe: str) -> None:
    assert counted(recipe).kept == KEPT[recipe]


@pytest.mark.parametrize("recipe", CHANGED)
def test_changed_and_rank(recipe: str) -> None:
    account = counted(recipe)
    assert (account.changed, account.rank) == CHANGED[recipe]


def test_ia3_changes_whole_weights_once_merged() -> None:
    """Keys, values and W2 with the biases of keys and values, which are scaled with them."""
    account = counted("IA3()")
    assert account.changed == 42_485_760
    assert account.rank is None
