"""Diff pruning: the gates' law and gradients, one sample per step, the choice, what is kept."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import espalier as esp
import tiny_runs as tiny
from espalier.errors import AdapterError, SettingError, SiteError
from espalier.plain.pruned import HardConcrete, uniform
from espalier.training import RunConfig
from espalier.training.loop import Loop
from zoo import BY_NAME, logits

BERT, GPT2, LLAMA = (BY_NAME[name] for name in ("bert", "gpt2", "llama"))
DRAWS = 200_000


def adapter_of(model: nn.Module) -> Any:
    return model.get_submodule("espalier.@mine")


def grafted(case: Any = BERT, method: str = "DiffPruning(share=0.05)", **how: Any) -> Any:
    """A model whose gates and differences are somewhere in the middle of training."""
    model = case.make()
    esp.attach(model, method, "mine", **{"head": False, **how})
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in esp.parameters(model):
            p.copy_(torch.randn(p.shape, generator=draws))
        adapter = adapter_of(model)
        adapter.vectors.mul_(0.02)
    return model


def settled(model: nn.Module) -> nn.Module:
    """The same with its scalars chosen."""
    assert esp.Lifecycle(model, steps=1, done=1).settled
    return model


def tensors(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Every number of the adapter by kind and parameter: "w", "alpha", "group"."""
    found: dict[str, dict[str, Tensor]] = {}
    for label, value in adapter_of(model).named():
        name, _, kind = label.removeprefix("0/").replace("/", ".").rpartition(".")
        found.setdefault(kind, {})[name] = value
    return found


def base(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_parameters()
    return {n: p.detach() for n, p in named if not n.startswith("espalier.")}


# --- the gates --------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [-2.0, 0.5, 5.0])
def test_gates_are_zero_and_one_as_often_as_the_law_says(alpha: float) -> None:
    u = uniform(torch.tensor([3, 17]), torch.device("cpu"), 4, DRAWS)
    z = HardConcrete(1.0, -1.5, 1.5).gate(torch.full((DRAWS,), alpha), u)
    assert (z == 0).float().mean() == pytest.approx(1 / (1 + math.exp(alpha)), abs=0.0035)
    one = 1 / (1 + math.exp(math.log(5) - alpha))
    assert (z == 1).float().mean() == pytest.approx(one, abs=0.0035)
    assert (z.min(), z.max()) == (0, 1)


def test_limits_and_temperature_enter_the_probability_of_a_closed_gate() -> None:
    law, alpha = HardConcrete(2 / 3, -0.1, 1.1), torch.tensor([0.3])
    u = uniform(torch.tensor([8, 1]), torch.device("cpu"), 0, DRAWS)
    open_ = (law.gate(alpha.expand(DRAWS), u) != 0).float().mean()
    assert law.alive(alpha).item() == pytest.approx(
        1 / (1 + math.exp(-(0.3 - 2 / 3 * math.log(0.1 / 1.1))))
    )
    assert open_ == pytest.approx(law.alive(alpha).item(), abs=0.0035)
    ends = torch.tensor([math.inf, -math.inf])
    assert law.gate(ends, u[:2]).tolist() == law.gate(ends, None).tolist() == [1, 0]


def test_noise_is_uniform_and_other_for_every_seed_step_and_tensor() -> None:
    keys = [((1, 0), 0), ((2, 0), 0), ((1, 1), 0), ((1, 0), 1), ((0, 1), 0), ((2**31 - 2, 9), 5)]
    device = torch.device("cpu")
    rows = torch.stack([uniform(torch.tensor(k), device, s, 50_000) for k, s in keys])
    assert rows.min() > 0
    assert rows.max() < 1
    assert torch.allclose(rows.mean(1), torch.tensor(0.5), atol=0.006)
    counts = torch.stack([row.histc(50, 0, 1) for row in rows])
    assert (((counts - 1000) ** 2 / 1000).sum(1) < 90).all()  # χ² with 49 degrees of freedom
    lagged = torch.cat((rows, rows[:1].roll(1), rows[:1].roll(2), rows[:1].roll(64)))
    assert (torch.corrcoef(lagged).fill_diagonal_(0).abs() < 0.025).all()


class One(nn.Module):
    """A linear layer with a known gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.host = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.host(x)


@pytest.mark.parametrize("slow", [1.0, 0.25])
@pytest.mark.parametrize("structured", [True, False])
def test_gradients_are_the_hand_written_ones(structured: bool, slow: float) -> None:
    torch.manual_seed(0)
    model, x, c = One().train(), torch.randn(3, 5), torch.randn(3, 4)
    method = esp.DiffPruning(sites="host", structured=structured, slow=slow)
    esp.attach(model, method, "mine", head=False)
    esp.Lifecycle(model, steps=9, done=3)
    adapter, held = adapter_of(model), tensors(model)
    with torch.no_grad():
        for value in (*held["w"].values(), *held["alpha"].values()):
            value.normal_()
        for value in held.get("group", {}).values():
            value.fill_(0.4)
    (model(x) * c).sum().backward()
    grads = {
        slot.label: slot.of(f.grad) for k, f in adapter.flat.items() for slot in adapter.slots[k]
    }
    for number, (name, g) in enumerate({"weight": c.T @ x, "bias": c.sum(0)}.items()):
        w, alpha = held["w"][f"host.{name}"].double(), held["alpha"][f"host.{name}"].double()
        w = slow * w  # but w's own gradient is that of the difference

        def law(alpha: Tensor, stream: int) -> tuple[Tensor, Tensor]:
            u = uniform(held["noise"]["host"], alpha.device, stream, len(alpha)).double()
            s = 1 / (1 + torch.exp(-(torch.log(u) - torch.log(1 - u) + alpha)))
            inside = (s * 3 - 1.5 > 0) & (s * 3 - 1.5 < 1)
            return (s * 3 - 1.5).clamp(0, 1), inside * 3 * s * (1 - s)

        z, slope = law(alpha, 2 * number)
        z_g, slope_g = torch.ones(1), torch.zeros(1)
        if structured:
            z_g, slope_g = law(held["group"][f"host.{name}"].double(), 2 * number + 1)
            want = (g.flatten() * w * z * slope_g).sum()
            torch.testing.assert_close(grads[f"0/host/{name}.group"].double(), want[None])
        found = grads[f"0/host/{name}.w"], grads[f"0/host/{name}.alpha"]
        torch.testing.assert_close(found[0].double(), g.flatten() * z * z_g, atol=1e-5, rtol=1e-4)
        want = g.flatten() * w * z_g * slope
        torch.testing.assert_close(found[1].double(), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("structured", [True, False])
def test_the_penalty_is_the_papers_product_over_tied_tensors_once(structured: bool) -> None:
    how = f"structured={structured}, penalty=0.01, temperature=0.5, low=-0.2, high=1.3"
    model = grafted(GPT2, f"DiffPruning({how})")
    held, shift = tensors(model), 0.5 * math.log(0.2 / 1.3)
    want = 0.0
    for name, alpha in held["alpha"].items():
        alive = torch.sigmoid(alpha.double() - shift).sum()
        group = held["group"][name].double() if structured else torch.tensor([math.inf])
        want += 0.01 * float(alive * torch.sigmoid(group - shift))
    life = esp.Lifecycle(model, steps=10)
    assert float(life.penalise()) == pytest.approx(want, rel=1e-5)
    assert len(held["alpha"]) == len(base(GPT2.make()))  # the tied embedding has gates once
    assert esp.Lifecycle(settled(model), steps=10).penalise() == 0


# --- one sample per step ----------------------------------------------------------------------


def gradients(model: nn.Module, *batches: dict[str, Tensor]) -> list[Tensor]:
    """The gradient of the mean loss over micro-batches."""
    for p in esp.parameters(model):
        p.grad = None
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return [p.grad.clone() for p in esp.parameters(model) if p.grad is not None]


def without_dropout(model: Any) -> Any:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def test_micro_batches_of_a_step_share_a_sample_and_steps_do_not() -> None:
    model = without_dropout(grafted())
    life = esp.Lifecycle(model, steps=10)
    ids, labels = torch.randint(5, 90, (4, 9)), torch.tensor([0, 2, 1, 0])
    whole = {"input_ids": ids, "labels": labels}
    halves = [{k: v[at : at + 2] for k, v in whole.items()} for at in (0, 2)]
    torch.manual_seed(1)
    first = gradients(model, whole)
    torch.manual_seed(2)  # nothing is drawn from torch's own generator
    for a, b in zip(first, gradients(model, *halves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    sampled = logits(model, whole)
    life.after()
    assert not torch.equal(logits(model, whole), sampled)
    esp.Lifecycle(model, steps=10)  # the first step again
    assert torch.equal(logits(model, whole), sampled)
    model.eval()
    assert torch.equal(logits(model, whole), logits(model, whole))
    assert not torch.equal(logits(model, whole), sampled)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_sees_the_sample_of_the_first_pass(reentrant: bool) -> None:
    model, batch = without_dropout(grafted(LLAMA)), LLAMA.batch()
    esp.Lifecycle(model, steps=10, done=2)
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for a, b in zip(plain, gradients(model, batch), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_processes_that_start_alike_sample_alike_whatever_they_draw_besides() -> None:
    outputs = []
    for other in (1, 2):
        torch.manual_seed(0)
        model = BERT.make()
        esp.attach(model, "DiffPruning(start=0.5)", "mine", head=False)
        with torch.no_grad():
            adapter_of(model).vectors.fill_(0.03)
        torch.manual_seed(other)
        life = esp.Lifecycle(without_dropout(model), steps=4)
        life.after()
        outputs.append(logits(model, BERT.batch()))
    assert torch.equal(*outputs)


def test_the_sampled_stage_compiles_to_one_graph_for_all_steps() -> None:
    torch.compiler.reset()
    model, x = One().train(), torch.randn(3, 5)
    esp.attach(model, "DiffPruning(sites='host', start=0.5)", "mine", head=False)
    with torch.no_grad():
        adapter_of(model).vectors.normal_()
    life, outputs = esp.Lifecycle(model, steps=10), []
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], model(x))
        outputs[-1].sum().backward()
        life.after()
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1])
    torch.compiler.reset()


# --- the choice -------------------------------------------------------------------------------


def mean_differences(model: nn.Module) -> Tensor:
    """|z·w| of all tensors end to end, by the formula."""
    held, found = tensors(model), []
    for name, w in held["w"].items():
        z = (torch.sigmoid(held["alpha"][name]) * 3 - 1.5).clamp(0, 1)
        z_g = (torch.sigmoid(held["group"][name]) * 3 - 1.5).clamp(0, 1)
        found.append((z * z_g * w).abs())
    return torch.cat(found)


@pytest.mark.parametrize("case", [BERT, GPT2, LLAMA], ids=lambda case: case.name)
def test_exactly_the_largest_differences_of_all_tensors_are_kept(case: Any) -> None:
    model = grafted(case, "DiffPruning(share=0.03)")
    size = sum(p.numel() for p in case.make().parameters())
    count = math.floor(0.03 * size + 0.5)
    score = mean_differences(model)
    assert len(score) == size
    raw = torch.cat(list(tensors(model)["w"].values()))
    settled(model)
    held = tensors(model)
    alpha = torch.cat(list(held["alpha"].values()))
    kept = alpha == math.inf
    assert (alpha[~kept] == -math.inf).all()
    assert all(float(g) == math.inf for g in held["group"].values())
    assert int(kept.sum()) == count
    assert score[kept].min() >= score[~kept].max()
    assert torch.equal(torch.cat(list(held["w"].values())), raw / 128)  # on from the raw difference
    account = esp.account(model, "mine")
    assert (account.changed, account.kept, account.bytes) == (count, count, 8 * count)
    untouched = base(case.make())
    esp.merge(model)
    changed = sum(int((p != untouched[n]).sum()) for n, p in base(model).items())
    assert changed <= count
    assert changed > 0.98 * count  # the largest differences are not lost in rounding


def test_a_part_that_keeps_nothing_is_the_base_bit_for_bit() -> None:
    model = settled(grafted(BERT, "DiffPruning(share=0.001)"))
    untouched = base(BERT.make())
    kept = tensors(model)["alpha"]
    esp.merge(model)
    for name, p in base(model).items():
        if name in kept:
            same = (kept[name] < 0).view_as(p)
            assert torch.equal(p[same], untouched[name][same])
    assert any((alpha < 0).all() for alpha in kept.values())


@pytest.mark.parametrize("fused", [False, True])
def test_what_is_decided_stays_and_nothing_becomes_nan(fused: bool, tmp_path: Path) -> None:
    model, batch = BERT.make().train(), BERT.batch()
    esp.attach(model, "DiffPruning(share=0.02, settle=0.5)", "mine")
    rates = esp.groups(model, weight_decay=0.1, learning_rate=1e-5)
    optimiser = torch.optim.AdamW(rates, fused=fused)
    life, masks, differences = esp.Lifecycle(model, steps=8).follow(optimiser), [], []
    account = esp.account(model, "mine")
    for _ in range(8):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        norm = nn.utils.clip_grad_norm_(esp.parameters(model), 1.0, error_if_nonfinite=True)
        assert norm > 0
        optimiser.step()
        assert not any(p.isnan().any() for p in esp.parameters(model))
        masks.append(torch.cat(list(tensors(model)["alpha"].values())))
        differences.append(torch.cat(list(tensors(model)["w"].values())))
    assert [bool(alpha.isinf().any()) for alpha in masks] == [False] * 3 + [True] * 5
    assert all(torch.equal(masks[3], alpha) for alpha in masks[4:])
    kept = masks[3] > 0
    assert (differences[-1] - differences[3])[kept].abs().max() > 0
    assert life.settled
    assert esp.account(model, "mine") == account  # counted rightly before it is chosen
    model.eval()
    assert esp.dead_sites(model) == []
    expected = logits(model, batch)
    esp.save(model, "mine", tmp_path)
    fresh = BERT.make()
    esp.load(fresh, tmp_path, "mine", trainable=True)
    assert torch.equal(logits(fresh, batch), expected)
    assert esp.Lifecycle(fresh, steps=4).settled  # trained on, it keeps its mask
    assert torch.equal(logits(copy.deepcopy(fresh), batch), expected)
    assert torch.equal(torch.cat(list(tensors(fresh)["alpha"].values())), masks[3])


def test_logits_learn_faster_than_differences_as_in_the_paper() -> None:
    model = BERT.make()
    esp.attach(model, esp.DiffPruning(), "mine", head=False)
    rates = {g["name"]: g["lr"] for g in esp.groups(model, 0.1, esp.DiffPruning.learning_rate)}
    assert sorted(rates.values()) == pytest.approx([1e-2, 0.1])
    assert all(g["weight_decay"] == 0 for g in esp.groups(model, 0.1, 1.0))


def test_differences_move_slowly_until_they_are_chosen_and_then_at_their_rate() -> None:
    torch.manual_seed(0)
    model, x = One().train(), torch.randn(3, 5)
    method = esp.DiffPruning(sites="host", share=0.5, settle=0.5, slow=1 / 64, start=90.0)
    esp.attach(model, method, "mine", head=False)
    optimiser = torch.optim.SGD(esp.groups(model, learning_rate=0.01))
    life, outputs = esp.Lifecycle(model, steps=2).follow(optimiser), [model(x)]
    weight, bias = model.host.weight.detach(), model.host.bias.detach()
    for step in range(2):
        optimiser.zero_grad()
        model(x).sum().backward()
        optimiser.step()
        outputs.append(model(x))
        kept = {n: (alpha > 0).view(-1) for n, alpha in tensors(model)["alpha"].items()}
        moves = {"host.weight": x.sum(0).expand(4, 5).flatten(), "host.bias": torch.full((4,), 3.0)}
        factor = 1 / 64 if step == 0 else 1 / 64 + 1
        change = {n: -0.01 * factor * move * kept[n] for n, move in moves.items()}
        new = weight + change["host.weight"].view(4, 5), bias + change["host.bias"]
        torch.testing.assert_close(outputs[-1], nn.functional.linear(x, *new))
        assert sum(int(k.sum()) for k in kept.values()) == 12
    assert life.settled


# --- what is kept -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [BERT, GPT2], ids=lambda case: case.name)
def test_the_plain_form_is_a_sparse_difference_with_the_same_bits(
    case: Any, dtype: torch.dtype, tmp_path: Path
) -> None:
    batch = case.batch()
    model = case.make().to(dtype)
    esp.attach(model, "DiffPruning(share=0.04)", "mine")
    with torch.no_grad():
        adapter_of(model).vectors.normal_(std=0.05)
    settled(model)
    expected, account = logits(model, batch), esp.account(model, "mine")
    assert not torch.equal(expected, logits(case.make().to(dtype), batch))
    assert esp.to_plain(model, "mine")
    assert torch.equal(logits(model, batch), expected)
    after = esp.account(model, "mine")
    for key in ("changed", "kept", "bytes", "rank", "head"):
        assert getattr(after, key) == getattr(account, key)
    esp.save(model, "mine", tmp_path)
    assert esp.read_card(tmp_path)["recipe"][0]["method"] == "PartialTuning"
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        kinds = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert kinds == {"torch.float32", "torch.int32"}
    fresh = case.make().to(dtype)
    esp.load(fresh, tmp_path, "again", trainable=True)
    assert torch.equal(logits(fresh, batch), expected)
    fresh(**batch).loss.backward()
    assert esp.dead_sites(fresh) == []  # and can be trained on
    esp.merge(fresh)
    assert torch.equal(logits(fresh, batch), expected)


def test_differences_smaller_than_a_bf16_weights_grain_survive_until_the_one_cast() -> None:
    torch.manual_seed(0)
    model = One().eval().bfloat16()
    esp.attach(model, "DiffPruning(sites='host', slow=1)", "mine", head=False)
    weight = model.host.weight.detach().clone()
    eye, small = torch.eye(5, dtype=torch.bfloat16), weight.abs().float().flatten() * 2**-11
    held = tensors(model)["w"]
    held["host.bias"].copy_(-model.host.bias.detach().float())
    for _ in range(20):  # each alone is below half a unit in the last place
        held["host.weight"].add_(small)
    with torch.no_grad():
        found = model(eye).T
    change = held["host.weight"].view(4, 5)
    assert torch.equal(found, (weight.float() + change).bfloat16())
    assert not torch.equal(found, weight)


def test_before_the_choice_the_plain_form_is_refused_with_what_to_do() -> None:
    model, batch = grafted(), BERT.batch()
    before = logits(model, batch)
    with pytest.raises(AdapterError, match=r"not chosen yet.*esp\.Lifecycle\(model, steps=1, don"):
        esp.to_plain(model, "mine")
    assert torch.equal(logits(model, batch), before)
    settled(model)
    assert esp.to_plain(model, "mine")


def test_a_bf16_adapter_does_not_round_the_fp32_base_that_it_adds_to() -> None:
    model = One().eval()
    method = "DiffPruning(sites='host', slow=1)"
    esp.attach(model, method, "mine", head=False, dtype=torch.bfloat16)
    held, x = tensors(model)["w"]["host.weight"], torch.randn(3, 5)
    held[7] = 0.5
    expected = model.host.weight.detach().clone()
    expected[1, 2] += 0.5
    settled(model)
    for _ in range(2):
        with torch.no_grad():
            found = model(x)
        assert torch.equal(found, nn.functional.linear(x, expected, model.host.bias))
        esp.to_plain(model, "mine")


def test_a_new_head_trains_whole_and_is_no_part_of_the_row() -> None:
    sizes = {n: p.numel() for n, p in BERT.make().named_parameters()}
    head = sum(n for name, n in sizes.items() if name.startswith("classifier"))
    pooler = sum(n for name, n in sizes.items() if ".pooler." in name)
    for chosen, spared in (("auto", head), (["classifier", "bert.pooler"], head + pooler)):
        for method in ("DiffPruning()", "PartialTuning(sites='*', mask='random', share=1.0)"):
            model = BERT.make()
            esp.attach(model, method, "mine", head=chosen)
            account, rest = esp.account(model, "mine"), sum(sizes.values()) - spared
            assert account.head == spared
            if "Partial" in method:
                assert account.trained == rest
            else:
                assert account.trained == 2 * rest + len(tensors(model)["alpha"])
    with pytest.raises(SiteError, match="only the task head classifier is selected"):
        esp.attach(BERT.make(), "DiffPruning(sites='classifier')", "mine")


def test_a_mask_that_is_to_be_given_does_not_train_without() -> None:
    model = BERT.make()
    esp.attach(model, "PartialTuning(mask='given')", "mine")
    assert torch.equal(logits(model, BERT.batch()), logits(BERT.make(), BERT.batch()))
    with pytest.raises(AdapterError, match="to be given, and none were"):
        model(**BERT.batch())


@pytest.mark.parametrize(
    "setting",
    ["share=0", "share=2", "settle=1", "settle=-0.1", "penalty=-1", "start='x'", "rate=0",
     "slow=0", "slow=2",
     "temperature=0", "low=0.1", "high=1", "structured=1", "sites=3"],
)  # fmt: skip
def test_wrong_settings_are_refused(setting: str) -> None:
    with pytest.raises(SettingError, match=rf"DiffPruning\({setting.partition('=')[0]}="):
        esp.recipe(f"DiffPruning({setting})")


# --- the trainer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run with dropout that was never stopped: 9 steps, decided after the fifth."""
    folder = tmp_path_factory.mktemp("diffpruning")
    model = tiny.bert(dropout=0.1, num_labels=2)
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews(24)))
    config = RunConfig(
        model=tiny.save_model(folder / "base", model, tiny.tokenizer()), train=str(data),
        method="DiffPruning(share=0.02, rate=30.0, settle=0.45)", batch=4, accumulate=2, epochs=3,
        lr=0.01, save_every=2, threads=1, quiet=True, head=["classifier"], validation_share=0,
        out=folder / "whole",
    )  # fmt: skip
    result = esp.train(config)
    assert len([line for line in result.history if line["kind"] == "train"]) == 9
    return config


@pytest.mark.parametrize("stopped_at", [4, 8], ids=["sampled", "decided"])
def test_a_run_resumed_in_either_stage_ends_as_if_never_stopped(
    whole: RunConfig, stopped_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, calls = Loop._step, []

    def counted(loop: Loop, *given: Any) -> None:
        calls.append(1)
        if len(calls) == stopped_at:
            raise KeyboardInterrupt
        inner(loop, *given)

    config = whole.replace(out=tmp_path / "run")
    monkeypatch.setattr(Loop, "_step", counted)
    with pytest.raises(KeyboardInterrupt):
        esp.train(config)
    monkeypatch.setattr(Loop, "_step", inner)
    esp.train(config.replace(resume=True))
    assert whole.out is not None
    for folder in ("adapter", "adapter-as-trained"):
        held = [Path(at) / folder / "adapter.safetensors" for at in (whole.out, tmp_path / "run")]
        assert held[0].read_bytes() == held[1].read_bytes()
    card = esp.read_card(tmp_path / "run" / "adapter")
    assert card["recipe"][0]["mask"] == "given"
