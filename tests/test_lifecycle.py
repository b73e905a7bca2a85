"""What methods do while they train: any loop, the trainer and transformers.Trainer drive it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import espalier as esp
import tiny_runs as tiny
import zoo
from espalier.deltas import Regime
from espalier.errors import SettingError
from espalier.plain.lowrank import LowRank
from espalier.recipes import Method
from espalier.training import AdapterCallback
from test_hf_trainer import trainer

told: list[tuple[str, int]] = []


class Pull(Regime):
    """A penalty ½ w ‖b‖², a note of every step, and B halved after the first of them."""

    def penalty(self) -> Tensor:
        return 0.5 * 3.0 * torch.stack([d.t["b"].square().sum() for d in self.deltas]).sum()

    def before_step(self, step: int) -> None:
        told.append(("before", step))
        assert self.deltas[0].g["b"].shape == self.deltas[0].t["b"].shape

    def after_step(self, step: int) -> None:
        told.append(("after", step))
        self.deltas[0].t["a"].data.fill_(step)
        self.done = step

    @property
    def settled(self) -> bool:
        return self.total > 0 and self.done == self.total

    done = 0


class Half(LowRank):
    """A low-rank delta whose plain form is a LoRA of twice its B."""

    def plain(self, t: Any) -> Any:
        return {"a": t["a"], "b": t["b"]}


@dataclass(frozen=True)
class Pulled(Method):
    """A LoRA on queries with a regime."""

    sites: str = "attention.q"

    def deltas(self, model: Any, places: Any) -> list[Any]:
        regime = Pull()
        for site in places.select(self.sites):
            a = esp.Trained((2, site.n_in), torch.nn.init.normal_)
            delta = Half(site, 1.0, a=a, b=esp.Trained((site.n_out, 2), torch.nn.init.normal_))
            delta.regime = regime
            regime.deltas.append(delta)
        return list(regime.deltas)

    def plain(self, deltas: Any = ()) -> Method:
        return esp.LoRA(rank=2, alpha=2, sites=self.sites)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    told.clear()
    yield
    Method.registry.pop("Pulled", None)
    Method.registry["Pulled"] = Pulled


def grafted() -> Any:
    torch.manual_seed(0)
    model = zoo.BY_NAME["bert"].make().train()
    esp.attach(model, Pulled(), "mine", head=False)
    return model


def test_an_optimiser_that_is_followed_gets_the_penaltys_gradient_and_tells_of_steps() -> None:
    model, batch = grafted(), zoo.BY_NAME["bert"].batch()
    delta = next(iter(model.espalier.adapters["mine"].deltas))
    (flat,) = esp.parameters(model)
    optimiser = torch.optim.SGD([flat], lr=0.01)
    life = esp.Lifecycle(model, steps=2).follow(optimiser)
    model.eval()
    model(**batch).loss.backward()
    loss_alone = flat.grad.clone()
    before = delta.t["b"].detach().clone()
    adapter = model.espalier.adapters["mine"]
    slot = next(s for s in adapter.slots["matrices"] if adapter.users[s.label][0][1] == "b")
    assert not life.settled
    optimiser.step()
    pulled = before - 0.01 * (slot.of(loss_alone) + 3.0 * before)
    torch.testing.assert_close(delta.t["b"].detach(), pulled)
    assert bool((delta.t["a"] == 1).all())
    optimiser.step()
    assert told == [("before", 1), ("after", 1), ("before", 2), ("after", 2)]
    assert life.settled
    assert delta.g == {}
    life.leave()
    optimiser.step()
    assert len(told) == 4


def test_it_follows_one_optimiser_once() -> None:
    model = grafted()
    first, second = (torch.optim.SGD(esp.parameters(model), lr=0.01) for _ in range(2))
    life = esp.Lifecycle(model, steps=2).follow(first).follow(first)
    first.step()
    assert told == [("before", 1), ("after", 1)]
    life.follow(second)
    first.step()
    assert len(told) == 2


def test_the_trainer_drives_it_once_per_optimiser_step_and_ends_in_the_plain_form(
    tmp_path: Path,
) -> None:
    model = tiny.bert(num_labels=2)
    result = esp.fit(
        model, tiny.tokenizer(), tiny.reviews(), Pulled(), steps=4, accumulate=2, batch=4,
        out=tmp_path / "run", quiet=True, evaluate_every=1,
    )  # fmt: skip
    assert told == [(what, step) for step in range(1, 5) for what in ("before", "after")]
    assert result.best["step"] == 4  # what is not settled is never the best
    card = esp.read_card(tmp_path / "run" / "adapter")
    assert card["recipe"][0]["method"] == "LoRA"
    card = esp.read_card(tmp_path / "run" / "adapter-as-trained")
    assert card["recipe"][0]["method"] == "Pulled"


def test_the_penalty_is_no_part_of_the_reported_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def losses() -> list[float]:
        model = tiny.bert(num_labels=2)
        rows = tiny.reviews()
        result = esp.fit(model, tiny.tokenizer(), rows, Pulled(), steps=2, quiet=True)
        return [line["loss"] for line in result.history if line["kind"] == "train"]

    with_penalty = losses()
    monkeypatch.setattr(Pull, "penalty", lambda self: None)
    without = losses()
    assert with_penalty[0] == without[0]
    assert with_penalty[1] != without[1]  # its gradient was used


def test_transformers_trainer_drives_it_through_the_callback(tmp_path: Path) -> None:
    model = tiny.bert(num_labels=2)
    esp.attach(model, Pulled(), "mine", head=["classifier"])
    run = trainer(model, tmp_path, [AdapterCallback()], max_steps=3, gradient_accumulation_steps=2)
    run.train()
    assert told == [(what, step) for step in range(1, 4) for what in ("before", "after")]
    assert esp.read_card(tmp_path / "adapter")["recipe"][0]["method"] == "LoRA"
    assert esp.read_card(tmp_path / "adapter-as-trained")["recipe"][0]["method"] == "Pulled"


def test_a_best_checkpoint_that_may_not_be_settled_is_refused_at_the_start(tmp_path: Path) -> None:
    model = tiny.bert(num_labels=2)
    esp.attach(model, Pulled(), "mine", head=["classifier"])
    run = trainer(model, tmp_path, [AdapterCallback()], max_steps=3)
    run.args.load_best_model_at_end = True
    with pytest.raises(SettingError, match="load_best_model_at_end"):
        run.train()
    assert told == []


def test_a_best_checkpoint_is_refused_also_where_a_resumed_training_has_settled_by_now(
    tmp_path: Path,
) -> None:
    model = tiny.bert(num_labels=2)
    esp.attach(model, esp.AdaLoRA(), "mine", head=["classifier"])
    assert esp.Lifecycle(model, 4, done=4).settled
    run = trainer(model, tmp_path, [AdapterCallback()], max_steps=4)
    run.args.load_best_model_at_end = True
    run.state.global_step, run.state.max_steps = 4, 4
    optimizer = torch.optim.SGD(esp.parameters(model), lr=0.1)
    with pytest.raises(SettingError, match="an adapter whose ranks or masks are not final"):
        AdapterCallback().on_train_begin(run.args, run.state, run.control, model, optimizer)


def test_training_without_a_lifecycle_is_told_of_once() -> None:
    model, batch = grafted(), zoo.BY_NAME["bert"].batch()
    with pytest.warns(UserWarning, match="nothing drives here"):
        model(**batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
        model.eval()
        model(**batch)


def test_what_is_frozen_needs_no_lifecycle() -> None:
    model, batch = grafted(), zoo.BY_NAME["bert"].batch()
    esp.freeze(model, "mine")
    esp.attach(model, esp.LoRA(), "other")
    esp.activate(model, ["mine", "other"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**batch)
    esp.thaw(model, "mine")
    with pytest.warns(UserWarning, match="'mine'.*nothing drives here"):
        model(**batch)


@pytest.mark.parametrize(("steps", "done"), [(0, 0), (2, 3), (True, 0), (2, -1)])
def test_wrong_step_counts_are_refused(steps: int, done: int) -> None:
    with pytest.raises(SettingError, match=r"Lifecycle\((steps|done)="):
        esp.Lifecycle(grafted(), steps, done)


def test_a_gate_around_such_a_method_is_refused() -> None:
    with pytest.raises(esp.errors.SiteError, match="schedule of their own"):
        esp.attach(zoo.BY_NAME["bert"].make(), esp.Gated(Pulled()), "mine")
