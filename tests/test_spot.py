"""Prompts of one task for another (SPoT): read, compared, mixed, trained on; and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import espalier as esp
import tiny_runs as tiny
from command_line import Command, write_rows
from espalier.errors import CheckpointError, SettingError
from espalier.graft import find
from espalier.plain.transfer import shares
from zoo import BY_NAME, logits, train


@pytest.fixture
def espalier(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


def rows(model: nn.Module, name: str) -> Tensor:
    delta = next(d for d in find(model).adapters[name].deltas if d.embeds)
    return delta.embed(delta.t, False).detach().clone()


def task(folder: Path, number: int, family: str = "bert", length: int = 4) -> Tensor:
    """A prompt trained a little on batch number so-and-so, saved; its rows."""
    model, batch = BY_NAME[family].make(), BY_NAME[family].batch()
    batch["labels"] = (batch["labels"] + number) % 3
    torch.manual_seed(number)
    esp.attach(model, f"PromptTuning(length={length})", "task")
    train(model, batch, steps=2 + number, rate=3e-2)
    esp.save(model, "task", folder)
    return rows(model, "task")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[Tensor]]:
    """Four tasks on one base; the last one is the target."""
    folder = tmp_path_factory.mktemp("tasks")
    names = [str(folder / f"task{i}") for i in range(4)]
    return names, [task(Path(name), i) for i, name in enumerate(names)]


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_one_source_is_taken_bit_by_bit(saved: tuple[list[str], list[Tensor]]) -> None:
    names, prompts = saved
    model: nn.Module = BY_NAME["bert"].make()
    esp.attach(model, esp.SPoT(source=names[0]), "mine")
    assert torch.equal(rows(model, "mine"), prompts[0])
    again: nn.Module = BY_NAME["bert"].make()
    esp.load(again, names[0], "theirs")
    batch = BY_NAME["bert"].batch()
    with torch.no_grad():
        states = [m.bert(batch["input_ids"]).last_hidden_state for m in (model, again)]  # type: ignore[operator]
    assert torch.equal(*states)


def test_similarities_are_the_papers(saved: tuple[list[str], list[Tensor]]) -> None:
    for one in saved[1]:
        for other in saved[1]:
            a, b = one.double().numpy(), other.double().numpy()
            pairs = np.mean([[cosine(x, y) for y in b] for x in a])
            assert esp.prompt_similarity(one, other) == pytest.approx(cosine(a.mean(0), b.mean(0)))
            assert esp.prompt_similarity(one, other, "words") == pytest.approx(pairs)
        assert esp.prompt_similarity(one, one) == pytest.approx(1)
    shuffled = saved[1][0][[2, 0, 3, 1]]
    assert esp.prompt_similarity(shuffled, saved[1][0]) == pytest.approx(1)


@pytest.mark.parametrize("metric", ["mean", "words"])
def test_sources_are_ranked_by_likeness(saved: tuple[list[str], list[Tensor]], metric: str) -> None:
    names, prompts = saved
    found = esp.rank_prompts(names[3], names[:3], metric)
    similarities = {
        n: esp.prompt_similarity(prompts[3], p, metric) for n, p in zip(names, prompts, strict=True)
    }
    assert [name for name, _ in found] == sorted(names[:3], key=lambda n: -similarities[n])
    assert found == [(name, pytest.approx(similarities[name])) for name, _ in found]


def test_shares_sum_to_one_and_leave_out_what_does_not_help() -> None:
    assert shares([0.2, 0.6, -0.5]) == pytest.approx([0.25, 0.75, 0])
    assert shares([0.2, 0.5, 0.3], top=2) == pytest.approx([0, 0.625, 0.375])
    assert sum(shares([0.31, 0.07, 0.44])) == pytest.approx(1)
    with pytest.raises(SettingError, match="no source resembles the target"):
        shares([-0.1, 0.0])


def test_several_sources_are_mixed_by_likeness(saved: tuple[list[str], list[Tensor]]) -> None:
    names, prompts = saved
    model: nn.Module = BY_NAME["bert"].make()
    method = esp.SPoT(source=tuple(names[:3]), target=names[3], metric="mean", top=2)
    esp.attach(model, method, "mine")
    similar = [esp.prompt_similarity(prompts[3], p) for p in prompts[:3]]
    best = sorted(range(3), key=lambda i: -similar[i])[:2]
    worth = np.array([max(similar[i], 0) for i in best])
    wanted = sum(w * prompts[i] for w, i in zip(worth / worth.sum(), best, strict=True))
    torch.testing.assert_close(rows(model, "mine"), wanted, atol=1e-6, rtol=1e-6)


def test_saved_it_needs_its_sources_no_more(tmp_path: Path) -> None:
    task(tmp_path / "source", 0)
    model, batch = BY_NAME["bert"].make(), BY_NAME["bert"].batch()
    esp.attach(model, esp.SPoT(source=str(tmp_path / "source")), "mine")
    train(model, batch)
    expected = logits(model, batch)
    for name in ("adapter.safetensors", "adapter.json"):
        (tmp_path / "source" / name).unlink()
    esp.save(model, "mine", tmp_path / "kept")
    fresh = BY_NAME["bert"].make()
    esp.load(fresh, tmp_path / "kept", "again")
    assert torch.equal(logits(fresh, batch), expected)
    assert esp.to_plain(fresh, "again")
    assert find(fresh).adapters["again"].recipe == esp.recipe("PromptTuning(length=4)")
    assert torch.equal(logits(fresh, batch), expected)
    esp.save(fresh, "again", tmp_path / "plain")
    assert "source" not in (tmp_path / "plain" / "adapter.json").read_text()


def test_a_made_prompt_is_a_source_once_it_is_plain(tmp_path: Path) -> None:
    model = BY_NAME["t5"].make()
    esp.attach(model, "PTuning(length=3, encoder='mlp') + LoRA(rank=2)", "made")
    esp.save(model, "made", tmp_path / "rich")
    with pytest.raises(CheckpointError, match=r"holds no soft prompts; .* made plain by"):
        esp.SPoT(source=str(tmp_path / "rich"))
    esp.to_plain(model, "made")
    esp.save(model, "made", tmp_path / "plain")
    fresh = BY_NAME["t5"].make()
    esp.attach(fresh, esp.SPoT(source=str(tmp_path / "plain")), "mine")
    assert torch.equal(rows(fresh, "mine"), rows(model, "made"))


def test_other_bases_and_lengths_are_refused(
    saved: tuple[list[str], list[Tensor]], tmp_path: Path
) -> None:
    names = saved[0]
    other = BY_NAME["bert"].make()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        esp.attach(other, esp.SPoT(source=names[0]))
    assert "espalier" not in dict(other.named_children())
    esp.attach(other, "PromptTuning(length=4)", "foreign", head=False)
    esp.save(other, "foreign", tmp_path / "foreign")
    with pytest.raises(CheckpointError, match="prompts of different bases"):
        esp.rank_prompts(names[0], [tmp_path / "foreign"])
    task(tmp_path / "short", 0, length=3)
    with pytest.raises(CheckpointError, match=r"differ in size: .*4 words .*3 words"):
        esp.rank_prompts(names[0], [tmp_path / "short"])
    with pytest.raises(CheckpointError, match=r"has 4 words of width 24, but SPoT\(length=5\)"):
        esp.attach(BY_NAME["bert"].make(), esp.SPoT(source=names[0], length=5))
    with pytest.raises(SettingError, match="target must be a folder where sources are several"):
        esp.SPoT(source=(names[0], names[1]))
    with pytest.raises(SettingError, match="metric must be one of mean, words"):
        esp.SPoT(source=names[0], metric="euclid")
    with pytest.raises(SettingError, match="metric must be one of mean, words"):
        esp.rank_prompts(names[0], names[1:], "euclid")
    with pytest.raises(CheckpointError, match="there is no folder"):
        esp.SPoT(source=str(tmp_path / "nowhere"))


def test_the_command_trains_ranks_and_transfers(tmp_path: Path, espalier: Command) -> None:
    base = tiny.save_model(tmp_path / "bert", tiny.bert(), tiny.tokenizer())
    data = [
        write_rows(tmp_path / f"{name}.jsonl", tiny.reviews(48)[at : at + 24])
        for name, at in (("a", 0), ("b", 12), ("own", 24))
    ]
    common = ["--model", base, "--steps", 2, "--warmup", 0, "--batch", 8, "--threads", 1, "--quiet"]
    method = "PromptTuning(length=3)"
    made = espalier(
        *("spot", "sources", *data[:2], *common, "--method", method, "--out", tmp_path / "spot")
    )
    assert made.code == 0, made.err
    own = tmp_path / "own-prompt"
    espalier("train", *common, "--train", data[2], "--method", method, "--out", own)
    spots = [tmp_path / "spot" / name for name in ("a", "b")]
    said = espalier("spot", "rank", own, *spots, "--json")
    assert said.code == 0, said.err
    ranked = json.loads(said.out)
    assert ranked == dict(esp.rank_prompts(own, spots))
    table = espalier("spot", "rank", own, *spots, "--metric", "words").out
    assert str(spots[0]) in "".join(line.split(" ")[0] for line in table.splitlines())
    run = tmp_path / "run"
    words = ["spot", "transfer", *spots, "--target", own, *common, "--train", data[2], "--out", run]
    said = espalier(*words)
    assert said.code == 0, said.err
    (kept,) = esp.read_card(run)["recipe"]
    assert (kept["method"], kept["length"]) == ("PromptTuning", 3)
    (trained,) = esp.read_card(run / "adapter-as-trained")["recipe"]
    assert (trained["method"], trained["target"]) == ("SPoT", str(own))
    espalier.fails(*words[:4], *common, "--train", data[2], saying=["target must be a folder"])
    same = [data[0], tmp_path / "x" / "a.csv"]
    espalier.fails("spot", "sources", *same, *common, saying=["two tasks would share a folder"])
