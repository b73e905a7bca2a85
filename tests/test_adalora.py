"""AdaLoRA: peft's allocator as an oracle, formulas by hand, plain forms, folders, whole runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import espalier as esp
import tiny_runs as tiny
from espalier.errors import AdapterError, CheckpointError, SettingError, SiteError
from espalier.training import RunConfig, loop
from espalier.training.record import TIME_FIELDS
from zoo import BY_NAME, Case, logits

TARGETS = {
    "bert": ["query", "value", "intermediate.dense"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "t5": ["q", "v", "wo"],
}
TEXT = pytest.mark.parametrize("case", [BY_NAME[n] for n in TARGETS], ids=lambda case: case.name)
WORDS = {"lora_A": "q", "lora_B": "p", "lora_E": "e"}


def adapter_of(model: nn.Module, name: str = "mine") -> Any:
    return model.get_submodule(f"espalier.@{name}")


def triplets(model: nn.Module) -> list[Any]:
    """The deltas of an AdaLoRA, in model order."""
    return adapter_of(model).regimes[0].deltas


def schedule_run(model: nn.Module, batch: dict[str, Tensor], steps: int = 12) -> None:
    """Real steps through a lifecycle, from its beginning to its end."""
    optimiser = torch.optim.AdamW(esp.parameters(model), lr=3e-2)
    esp.Lifecycle(model, steps).follow(optimiser)
    for _ in range(steps):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()


# ----------------------------------------------------------------------- scores, budgets and masks


def invent(model: nn.Module) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Give every number a new value and gradient, and tell of each by path and name."""
    for p in esp.parameters(model):
        p.data.copy_(torch.randn_like(p))
        p.grad = torch.randn_like(p) * torch.rand_like(p) ** 3
    adapter_of(model).show_gradients(True)
    for delta in triplets(model):
        for key in WORDS.values():
            yield delta.site.path, key, delta.t[key].detach(), delta.g[key]


@pytest.mark.parametrize("interval", [1, 4])
def test_budgets_masks_and_ranks_are_those_of_pefts_allocator(interval: int) -> None:
    case = BY_NAME["bert"]
    ours = case.make()
    esp.attach(
        ours, f"AdaLoRA(rank=4, target=2, start=0.2, end=0.3, interval={interval}, "
        "sites='attention.q, attention.v, ffn.in')", "mine", head=False,
    )  # fmt: skip
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=6, tfinal=9, deltaT=interval, total_step=30,
        target_modules=TARGETS["bert"],
    )  # fmt: skip
    theirs = peft.get_peft_model(case.make(), config).base_model
    numbers = {n: p for n, p in theirs.model.named_parameters() if "lora_" in n}
    life = esp.Lifecycle(ours, 30)
    regime = adapter_of(ours).regimes[0]
    settled = []
    for step in range(1, 31):
        held: dict[str, Tensor] = {}
        for path, key, value, gradient in invent(ours):
            word = next(word for word, ours_ in WORDS.items() if ours_ == key)
            p = numbers[f"{path}.{word}.default"]
            p.data.copy_(value.view_as(p))
            p.grad = gradient.reshape(p.shape).clone()
            held[f"{path}.{word}.default"] = value
        assert regime.budget(step) == theirs.rankallocator.budget_schedule(step)[0]
        life.after()
        theirs.update_and_allocate(step)
        for name, value in held.items():
            assert torch.equal(value, numbers[name].view_as(value)), (step, name)
        settled.append(life.settled)
    assert settled == [False] * 20 + [True] * 10
    pattern = theirs.peft_config["default"].rank_pattern
    for delta in triplets(ours):
        expected = pattern[f"{delta.site.path}.lora_E.default"]
        assert (delta.t["stays"] == 1).tolist() == expected
    ranks = [delta.rank for delta in triplets(ours)]
    assert sum(ranks) == 2 * len(ranks)
    assert len(set(ranks)) > 1


def test_a_score_by_hand() -> None:
    """Three steps of one triplet, a number at a time."""
    model = BY_NAME["bert"].make()
    esp.attach(model, "AdaLoRA(rank=3, target=1, beta1=0.8, beta2=0.7)", "mine", head=False)
    life = esp.Lifecycle(model, 100)
    delta, at = triplets(model)[2], 1
    rows: list[list[tuple[float, float]]] = []
    groups: list[str] = []
    for _ in range(3):
        seen = {(path, key): (w, g) for path, key, w, g in invent(model)}
        here: list[tuple[float, float]] = []
        groups = []
        for key in ("p", "e", "q"):
            w, g = seen[delta.site.path, key]
            w, g = (w[:, at], g[:, at]) if key == "p" else (w[at].view(-1), g[at].view(-1))
            here += list(zip(w.tolist(), g.tolist(), strict=True))
            groups += [key] * len(w)
        rows.append(here)
        life.after()
    totals: dict[str, list[float]] = {"p": [], "e": [], "q": []}
    for number, group in enumerate(groups):
        mean = spread = 0.0
        for here in rows:
            w, g = here[number]
            mean = 0.8 * mean + 0.2 * abs(w * g)
            spread = 0.7 * spread + 0.3 * abs(abs(w * g) - mean)
        totals[group].append(mean * spread)
    expected = sum(sum(some) / len(some) for some in totals.values())
    found = adapter_of(model).regimes[0].scores()[2 * 3 + at]
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_of_equal_triplets_the_earlier_stay_and_exactly_as_many_as_may() -> None:
    model = BY_NAME["llama"].make()
    esp.attach(
        model, "AdaLoRA(rank=3, target=2, end=0.5, sites='attention.q, attention.o')", "mine"
    )
    life = esp.Lifecycle(model, 6)
    for _ in range(3):
        for p in esp.parameters(model):
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        life.after()
    count = len(triplets(model))
    stays = torch.cat([delta.t["stays"] for delta in triplets(model)])
    assert stays.tolist() == [1.0] * 2 * count + [0.0] * count
    assert [one.rank for one in esp.ranks(model)][:2] == [3, 3]


def test_a_target_of_the_first_rank_prunes_nothing() -> None:
    case = BY_NAME["bert"]
    model = case.make()
    esp.attach(model, "AdaLoRA(rank=2, target=2)", "mine")
    schedule_run(model, case.batch(), steps=5)
    assert {one.rank for one in esp.ranks(model)} == {2}


def test_what_is_pruned_can_come_back_until_the_final_phase() -> None:
    case = BY_NAME["bert"]
    model, batch = case.make(), case.batch()
    esp.attach(model, "AdaLoRA(rank=4, target=1, start=0.1, end=0.4, interval=3)", "mine")
    optimiser = torch.optim.AdamW(esp.parameters(model), lr=3e-2)
    life = esp.Lifecycle(model, 20).follow(optimiser)
    grown, zeros = [], []
    for _ in range(20):
        optimiser.zero_grad()
        model(**batch).loss.backward()
        optimiser.step()
        cut = torch.cat([d.t["stays"] == 0 for d in triplets(model)])
        weights = torch.cat([d.t["e"].detach() for d in triplets(model)])
        grown.append(bool((weights[cut] != 0).any()))
        zeros.append(int((weights == 0).sum()))
    assert not any(grown[11:])  # step 12 is the last pruning
    assert any(grown[3:11])
    assert zeros[2] > 0
    assert len(set(zeros[11:])) == 1
    assert life.settled


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_shortest_training_ends_at_its_target(total: int) -> None:
    case = BY_NAME["bert"]
    model = case.make()
    esp.attach(model, "AdaLoRA(rank=3, target=2, start=0.45, end=0.5)", "mine")
    schedule_run(model, case.batch(), steps=total)
    ranks = [one.rank for one in esp.ranks(model)]
    assert sum(ranks) == 2 * len(ranks)


# ------------------------------------------------------------------------------------- the penalty


def test_the_penalty_is_the_mean_of_norms_and_no_part_of_the_loss() -> None:
    case = BY_NAME["bert"]
    model, batch = case.make(), case.batch()
    where = "sites='attention.v, ffn.in'"
    recipe = f"AdaLoRA(rank=4, target=2, alpha=40, orthogonality=0.5, {where})"
    esp.attach(model, recipe, "mine", head=False)
    for p in esp.parameters(model):
        p.data.normal_(std=0.3)
    life = esp.Lifecycle(model, 10)
    config = peft.AdaLoraConfig(
        init_r=4, target_modules=["value", "intermediate.dense"], total_step=10, lora_alpha=40,
        orth_reg_weight=0.5, task_type="SEQ_CLS",
    )  # fmt: skip
    theirs = peft.get_peft_model(case.make(), config)
    for name, p in theirs.named_parameters():
        path, _, word = name.removeprefix("base_model.model.").rpartition(".lora_")
        for delta in triplets(model):
            if word and delta.site.path == path:
                p.data.copy_(delta.t[WORDS[f"lora_{word[0]}"]].detach().view_as(p))
    plain = model(**batch).loss.item()  # of the model as peft has it beneath
    assert plain == pytest.approx(theirs.base_model.model(**batch).loss.item(), abs=1e-5)
    norms = []
    for delta in triplets(model):
        p, q = delta.t["p"].detach(), delta.t["q"].detach()
        norms += [torch.linalg.matrix_norm(g - torch.eye(4)) for g in (p.T @ p, q @ q.T)]
    value = float(life.penalise())
    assert value == pytest.approx(0.5 * float(torch.stack(norms).mean()), rel=1e-5)
    with_it = theirs(**batch).loss
    assert value == pytest.approx(with_it.item() - plain, abs=1e-5)
    with_it.backward()
    grads = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    model(**batch).loss.backward()  # adds to what the penalty left
    adapter_of(model).show_gradients(True)
    for delta in triplets(model):
        for word, key in WORDS.items():
            expected = grads[f"base_model.model.{delta.site.path}.{word}.default"]
            assert torch.allclose(delta.g[key], expected.view_as(delta.g[key]), atol=1e-5)
            assert delta.g[key].abs().max() > 1e-4


def test_without_a_weight_there_is_no_penalty() -> None:
    model = BY_NAME["bert"].make()
    esp.attach(model, "AdaLoRA(orthogonality=0)", "mine")
    assert esp.Lifecycle(model, 10).penalise() == 0
    assert all(p.grad is None for p in esp.parameters(model))


# ---------------------------------------------------------------------------- plain, merged, stored


def trained(case: Case, recipe: str) -> nn.Module:
    model = case.make()
    esp.attach(model, recipe, "mine")
    schedule_run(model, case.batch())
    return model


@TEXT
def test_plain_merged_and_saved_equal_trained(case: Case, tmp_path: Path) -> None:
    batch = case.batch()
    sites = "attention.q, attention.v, ffn.out" if case.name == "gpt2" else "all-linear"
    model = trained(case, f"AdaLoRA(rank=3, target=1, alpha=5.0, sites='{sites}')")
    expected, ranks = logits(model, batch), [one.rank for one in esp.ranks(model)]
    assert not torch.allclose(expected, logits(case.make(), batch), atol=1e-3)
    assert sum(ranks) == len(ranks)
    assert 0 in ranks
    esp.save(model, "mine", tmp_path / "rich")
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=2e-5)
    esp.unmerge(model)
    assert esp.to_plain(model, "mine")
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)
    assert [one.rank for one in esp.ranks(model)] == ranks
    assert f"ranks={tuple(ranks)}" in str(adapter_of(model).recipe)
    esp.merge(model)
    assert torch.allclose(logits(model, batch), expected, atol=2e-5)
    esp.unmerge(model)
    model(**batch).loss.backward()
    assert esp.dead_sites(model) == []
    esp.save(model, "mine", tmp_path / "plain")
    for folder in ("rich", "plain"):
        again = case.make()
        esp.load(again, tmp_path / folder, "again")
        assert torch.allclose(logits(again, batch), expected, atol=1e-5)
        assert [one.rank for one in esp.ranks(again)] == ranks


def test_over_four_bits() -> None:
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32))
    weight = bnb.nn.Params4bit(torch.randn(64, 64) / 8, requires_grad=False, quant_type="nf4")
    model[0].weight = weight.to("cpu")
    model.eval()
    esp.attach(model, "AdaLoRA(rank=4, target=2, alpha=6, sites='*')", "mine", head=False)
    x, delta = torch.randn(3, 64), triplets(model)[0]
    before = model(x)
    delta.t["e"].data.normal_()
    change = 1.5 * x @ (delta.t["p"] * delta.t["e"] @ delta.t["q"]).T
    assert torch.allclose(model(x), before + change, atol=1e-5)
    with pytest.raises(AdapterError, match="4-bit"):
        esp.merge(model)


def test_ranks_print_roles_by_layers() -> None:
    model = BY_NAME["bert"].make()
    esp.attach(model, "LoRA(rank=3, sites='attention.q, ffn.in', ranks=(3, 0, 2, 1))", "mine")
    lines = str(esp.ranks(model)).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "0", "1"], ["attention.q", "3", "2"], ["ffn.in", "0", "1"],
    ]  # fmt: skip
    esp.attach(model, "BitFit()", "other")
    with pytest.raises(AdapterError, match="no change of a low rank"):
        esp.ranks(model)


# ---------------------------------------------------------------------- LoRA with a rank per place


def test_a_lora_with_ranks_keeps_the_scale_of_its_rank() -> None:
    case = BY_NAME["bert"]
    ranks, places = (4, 0, 2, 1), "attention.q, ffn.in"
    model, batch = case.make(), case.batch()
    esp.attach(model, esp.LoRA(rank=4, alpha=6, sites=places, ranks=ranks), "mine", head=False)
    parts = [d for d in adapter_of(model).deltas if d.trained]
    assert [len(d.t["a"]) for d in parts] == [4, 2, 1]
    for p in esp.parameters(model):
        p.data.normal_(std=0.2)
    by_hand = case.make()
    for delta in parts:
        weight = by_hand.get_submodule(delta.site.path).weight
        weight.data += 6 / 4 * delta.t["b"].detach() @ delta.t["a"].detach()
    assert torch.allclose(logits(model, batch), logits(by_hand, batch), atol=1e-5)
    model(**batch).loss.backward()
    assert esp.dead_sites(model) == []
    account = esp.account(model, "mine")
    assert account.trained == sum(d.t[key].numel() for d in parts for key in "ab")
    assert account.changed == sum(d.site.n_in * d.site.n_out for d in parts)


def test_every_place_may_have_rank_0(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    model, batch = case.make(), case.batch()
    esp.attach(model, "LoRA(sites='attention.q', ranks=(0, 0))", "mine")
    assert torch.equal(logits(model, batch), logits(case.make(), batch))
    assert esp.parameters(model) == []
    esp.save(model, "mine", tmp_path)
    esp.load(case.make(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ("LoRA(sites='attention.q', ranks=(1, 2, 3))", SiteError, "takes 2 of this model"),
        ("LoRA(ranks=(1, -1))", SettingError, "at least 0"),
        ("LoRA(ranks=(1, 0), dora=True)", SettingError, "False where a rank is 0"),
        ("AdaLoRA(rank=2)", SettingError, "target must be at most rank, 2"),
        ("AdaLoRA(target=0)", SettingError, "at least 1"),
        ("AdaLoRA(start=0.5, end=0.5)", SettingError, "below 1 - start, 0.5"),
        ("AdaLoRA(beta1=1.0)", SettingError, "below 1"),
        ("AdaLoRA(orthogonality=-1)", SettingError, "at least 0"),
        ("AdaLoRA(sites='embedding.*')", SiteError, "AdaLoRA cannot stand on .* an embedding"),
        ("AdaLoRA(sites='ffn')", SiteError, r"write 'ffn\.\*'"),
        ("AdaLoRA(sites='block@last1')", SiteError, "whole block.* write 'all-linear', .*@1'"),
        ("Gated(AdaLoRA())", SiteError, "schedule of their own"),
    ],
)
def test_what_cannot_be_is_said(settings: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        esp.attach(BY_NAME["bert"].make(), settings)


# ---------------------------------------------------------------------------------- peft's folders


def asked(case: Case) -> dict[str, Tensor]:
    """A batch without labels: with them peft's AdaLoRA fails in inference mode."""
    batch = case.batch()
    labels = batch.pop("labels")
    return {**batch, "decoder_input_ids": labels} if case.name == "t5" else batch


@TEXT
@pytest.mark.parametrize("pruned", [False, True], ids=["whole", "pruned"])
def test_their_folder_here(case: Case, pruned: bool, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(
        init_r=4, target_r=1, total_step=20, tinit=2, tfinal=6, deltaT=3, lora_alpha=7,
        target_modules=TARGETS[case.name], beta1=0.8, beta2=0.9, orth_reg_weight=0.2,
        modules_to_save=["classifier"] if case.has_new_head else None,
    )  # fmt: skip
    other = peft.get_peft_model(case.make(), config).eval()
    for p in other.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.3)
    if pruned:
        for step in (1, 14):
            for p in other.parameters():
                p.grad = torch.randn_like(p) if p.requires_grad else None
            other.base_model.update_and_allocate(step)
        kept = other.peft_config["default"].rank_pattern.values()
        assert [] < sorted(map(sum, kept)) != [4] * len(kept)
    expected = logits(other, asked(case))
    other.save_pretrained(tmp_path)
    ours = case.make()
    esp.load(ours, tmp_path, "mine", trainable=True)
    assert torch.allclose(logits(ours, asked(case)), expected, atol=1e-5)
    assert not torch.allclose(logits(case.make(), asked(case)), expected, atol=1e-2)
    method = adapter_of(ours).recipe.methods[0]
    assert (method.rank, method.target, method.alpha, method.interval) == (4, 1, 7, 3)
    assert (method.start, method.end, method.beta1, method.beta2) == (0.1, 0.3, 0.8, 0.9)
    assert method.orthogonality == 0.2
    esp.to_plain(ours, "mine")
    assert torch.allclose(logits(ours, asked(case)), expected, atol=1e-5)


OURS = {
    "bert": "all-linear",
    "gpt2": "attention.q, attention.v, ffn.out",  # two slices of one layer, and whole layers
    "llama": "attention.*",
    "t5": "all-linear",
}


@TEXT
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys")  # so peft speaks of its own
@pytest.mark.parametrize("form", ["as trained", "plain"])
def test_our_folder_there(case: Case, form: str, tmp_path: Path) -> None:
    ours = trained(case, f"AdaLoRA(rank=3, target=1, alpha=5.0, sites='{OURS[case.name]}')")
    expected = logits(ours, asked(case))
    if form == "plain":
        esp.to_plain(ours, "mine")
    esp.save(ours, "mine", tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == ("LORA" if form == "plain" else "ADALORA")
    assert config["rank_pattern"]
    other = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()
    assert torch.allclose(logits(other, asked(case)), expected, atol=1e-5)
    assert torch.allclose(logits(other.merge_and_unload(), asked(case)), expected, atol=2e-5)
    again = case.make()
    esp.load(again, tmp_path, "again")
    assert torch.allclose(logits(again, asked(case)), expected, atol=1e-5)
    # The two slices of GPT-2's qkv are one change there, whose scale is in B.
    assert len(adapter_of(again, "again").recipe.methods) == 1 or case.name == "gpt2"
    assert esp.account(again, "again").rank == esp.account(ours, "mine").rank


def test_a_fresh_one_trains_on_there(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    ours = case.make()
    esp.attach(ours, "AdaLoRA(rank=3, target=2)", "mine")
    esp.save(ours, "mine", tmp_path, format="peft")
    other = peft.PeftModel.from_pretrained(case.make(), str(tmp_path), is_trainable=True)
    shapes = {n: tuple(p.shape) for n, p in other.named_parameters() if "lora_E" in n}
    assert set(shapes.values()) == {(3, 1)}
    other(**case.batch()).loss.backward()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_r": 5}, "4 of 5 triplets"),
        ({"rank_pattern": {"model.layers.0.self_attn.q_proj.lora_E": [True] * 3}}, "3 of 3"),
        ({"a_setting_of_next_year": 1}, "a_setting_of_next_year"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], named: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"])
    peft.get_peft_model(case.make(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=named):
        esp.load(case.make(), tmp_path)


# -------------------------------------------------------------------------------------- whole runs

RECIPE = "AdaLoRA(rank=3, target=1, start=0.1, end=0.3, interval=2, dropout=0.1)"
STEPS = 12


def config(folder: Path, **changes: Any) -> RunConfig:
    """A run with dropout, shuffled rows and evaluations, on a model in a folder."""
    base = folder / "base"
    if not base.exists():
        tiny.save_model(base, tiny.bert(dropout=0.1, num_labels=2), tiny.tokenizer())
        rows = "".join(json.dumps(row) + "\n" for row in tiny.reviews(40))
        (folder / "train.jsonl").write_text(rows)
    settings = {
        "model": str(base), "train": str(folder / "train.jsonl"), "method": RECIPE, "batch": 4,
        "steps": STEPS, "lr": 0.02, "save_every": 3, "evaluate_every": 2, "head": ["classifier"],
        "threads": 1, "quiet": True, "precision": "fp32",
    }  # fmt: skip
    return RunConfig(**{**settings, **changes})


def lasting(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIME_FIELDS} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nobody stopped, beside its data."""
    folder = tmp_path_factory.mktemp("adalora")
    esp.train(config(folder, out=folder / "whole"))
    return folder


@pytest.mark.parametrize("stop", [5, 11], ids=["while pruning", "in the final phase"])
def test_stopped_and_resumed_equals_never_stopped(
    whole: Path, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, calls = loop.Loop._step, []

    def stopped(self: loop.Loop, *given: Any) -> None:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        inner(self, *given)

    monkeypatch.setattr(loop.Loop, "_step", stopped)
    with pytest.raises(KeyboardInterrupt):
        esp.train(config(whole, out=tmp_path / "run"))
    monkeypatch.undo()
    esp.train(config(whole, out=tmp_path / "run", resume=True))
    assert lasting(tmp_path / "run") == lasting(whole / "whole")
    for part in ("adapter", "adapter-as-trained"):
        name = f"{part}/adapter.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (whole / "whole" / name).read_bytes()


def test_a_run_tells_of_its_ranks_and_keeps_none_from_before_they_are_final(whole: Path) -> None:
    lines = lasting(whole / "whole")
    told = [line for line in lines if line["kind"] == "places"]
    assert [line["step"] for line in told] == [2, 4, 6, 8, 10, 12]
    sums = [sum(rank for *_, rank in line["rank"]) for line in told]
    places = len(told[0]["rank"])
    assert sums[0] > sums[2] > sums[-1] == places  # an average of 1
    assert ["encoder", 0, "attention.q"] in [place[:3] for place in told[0]["rank"]]
    assert (whole / "whole" / "rank.png").stat().st_size > 1000
    result = json.loads((whole / "whole" / "result.json").read_text())
    assert result["best"]["step"] >= STEPS - 3
    model = tiny.bert(num_labels=2)
    esp.load(model, whole / "whole", check_base=False)
    assert sum(one.rank for one in esp.ranks(model)) == places
    assert esp.read_card(whole / "whole")["recipe"][0]["method"] == "LoRA"


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    def numbers(batch: int, accumulate: int) -> Tensor:
        model = tiny.bert(num_labels=2)
        esp.attach(model, RECIPE.replace("0.1)", "0.0)"), "mine", head=["classifier"])
        esp.fit(
            model, tiny.tokenizer(), tiny.reviews(40), batch=batch, accumulate=accumulate, steps=8,
            batching="random", lr=0.02, validation_share=0, threads=1, quiet=True,
            precision="fp32",
        )  # fmt: skip
        return torch.cat([p.detach() for p in esp.parameters(model)])

    big = numbers(8, 1)
    assert torch.allclose(big, numbers(4, 2), atol=2e-5)
    other = numbers(4, 1)
    assert other.shape != big.shape or not torch.allclose(big, other, atol=1e-3)
