"""Multiple choice: T-Few's three losses by hand, encoding, ranking, and whole runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import espalier as esp
import tiny_runs as tiny
import tiny_text
from command_line import Command
from espalier.data import check, read_task
from espalier.errors import DataError, SettingError
from espalier.tasks import IGNORED, Choices, task_from_extras
from espalier.tasks.ranking import (
    choice_scores,
    gold_loss,
    length_normalised_loss,
    token_nats,
    unlikelihood_loss,
)

# --- the losses -------------------------------------------------------------------------------

# Three choices of 2, 1 and 3 tokens, the first is right.
CHANCES = [[0.5, 0.25], [0.8], [0.1, 0.5, 0.2]]
VOCAB = 7


def logits_of(chances: list[list[float]], shift: bool) -> tuple[Tensor, Tensor]:
    """Logits (N, T, V) that give the targets (N, T) these chances, with noise where nothing is."""
    width = max(map(len, chances)) + 1
    logits, targets = (
        torch.randn(len(chances), width, VOCAB),
        torch.full((len(chances), width), IGNORED),
    )
    for n, row in enumerate(chances):
        for t, p in enumerate(row):
            at = t + 1 if shift else t
            targets[n, at] = (3 * n + t) % VOCAB
            logits[n, t] = math.log((1 - p) / (VOCAB - 1)) + 2
            logits[n, t, targets[n, at]] = math.log(p) + 2
    return logits, targets


@pytest.mark.parametrize("shift", [False, True])
def test_the_three_losses_of_an_example_computed_by_hand(shift: bool) -> None:
    nats, seen = token_nats(*logits_of(CHANCES, shift), shift)
    assert seen.sum(1).tolist() == [2, 1, 3]
    known = (nats, seen, [3], [0])
    assert float(gold_loss(*known)) == pytest.approx((math.log(2) + math.log(4)) / 2)
    scores = [-1.5 * math.log(2), math.log(0.8), math.log(0.01) / 3]
    assert choice_scores(nats, seen).tolist() == pytest.approx(scores, rel=1e-5)
    among = sum(math.exp(s) for s in scores)
    assert float(length_normalised_loss(*known)) == pytest.approx(math.log(among) - scores[0])
    wrong = [0.8, 0.1, 0.5, 0.2]
    expected = -sum(math.log(1 - p + 0.01) for p in wrong) / 4
    assert float(unlikelihood_loss(*known)) == pytest.approx(expected, rel=1e-5)


def test_length_counts_to_a_power() -> None:
    nats, seen = token_nats(*logits_of(CHANCES, False), False)
    assert choice_scores(nats, seen, power=0).tolist() == pytest.approx(
        [math.log(0.125), math.log(0.8), math.log(0.01)], rel=1e-5
    )
    assert choice_scores(nats, seen, power=2)[2].item() == pytest.approx(math.log(0.01) / 9)
    plain = length_normalised_loss(nats, seen, [3], [0], power=0)
    assert float(plain) == pytest.approx(math.log(0.125 + 0.8 + 0.01) - math.log(0.125), rel=1e-5)


def test_a_batch_is_the_mean_over_its_examples_however_many_choices_they_have() -> None:
    other = [[0.3, 0.9], [0.6, 0.6]]
    both = token_nats(*logits_of(CHANCES + other, False), False)
    alone = [token_nats(*logits_of(c, False), False) for c in (CHANCES, other)]
    for loss in (gold_loss, length_normalised_loss, unlikelihood_loss):
        one, two = (float(loss(*a, [len(a[0])], [r])) for a, r in zip(alone, (2, 1), strict=True))
        assert float(loss(*both, [3, 2], [2, 1])) == pytest.approx((one + two) / 2, rel=1e-5)


def test_a_certain_wrong_token_costs_much_but_not_everything() -> None:
    nats, seen = torch.zeros(2, 1, requires_grad=True), torch.ones(2, 1, dtype=torch.bool)
    loss = unlikelihood_loss(nats, seen, [2], [0])
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-math.log(0.01), rel=1e-4)
    assert nats.grad is not None
    assert nats.grad.isfinite().all()


# --- rows -------------------------------------------------------------------------------------

ROW = {"question": "Name a colour.", "choices": ["Blue", "Seven"], "label": 0}


def data(*rows: dict[str, Any], **settings: Any) -> Any:
    return read_task(list(rows), validation_share=0, **{"task": "choices", **settings})


@pytest.mark.parametrize(
    ("row", "right"),
    [
        (ROW, 0),
        (ROW | {"label": "Seven"}, 1),
        (ROW | {"label": "1"}, 1),
        (ROW | {"choices": ["1", "0"], "label": "0"}, 1),  # a text comes before a number
        (ROW | {"choices": ["1", "0"], "label": 0}, 0),
        (ROW | {"choices": "Blue | Seven", "label": "Blue"}, 0),
        ({"prompt": "a", "options": ["x", "y"], "answer": "y"}, 1),
        ({"premise": "a", "endings": ["x", "y", "z"], "label": 2}, 2),
    ],
)
def test_rows_are_read(row: dict[str, Any], right: int) -> None:
    assert data(row).splits["train"][0].values["label"] == right


def test_columns_alone_say_it_where_nothing_else_fits() -> None:
    rows = [{"prompt": "a", "choices": ["x", "y"], "label": 0}]
    found = read_task(rows, validation_share=0, prefer="seq2seq")
    assert isinstance(found.task, Choices)
    assert found.task.auto_model == "AutoModelForSeq2SeqLM"
    with pytest.raises(DataError, match=r"more than one task; choose .*task='choices'"):
        read_task([ROW, ROW | {"label": 1}], validation_share=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["Blue"]}, "need at least two choices"),
        ({"choices": ["Blue", "Blue"]}, "at least two choices that differ"),
        ({"choices": ["Red", "Blue", "Blue"], "label": 1}, "the right choice 'Blue' stands there"),
        ({"choices": ["Blue", " "]}, "choice 1 is ' ', need a text"),
        ({"choices": ["Blue", 7]}, "choice 1 is 7, need a text"),
        ({"choices": 3}, "a number 3, need a list of texts"),
        ({"label": 2}, r"2, which is none of the choices .* no number from 0 to 1"),
        ({"label": "Red"}, "'Red', which is none of the choices"),
        ({"label": None}, "is empty, need the right choice"),
        ({"label": True}, "True, which is none"),
        ({"question": ""}, "is blank"),
    ],
)
def test_rows_that_cannot_be_used_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"train:row 2: .*{message}"):
        data(ROW, ROW | change)


def test_a_form_without_choices_says_what_is_needed() -> None:
    with pytest.raises(DataError, match=r"no choices form .* question \+ choices"):
        data({"text": "a", "label": 1})


# --- encoding ---------------------------------------------------------------------------------


def test_each_choice_is_encoded_as_the_answer_with_its_end() -> None:
    tokenizer = tiny_text.byte_bpe(bos=True)
    found = data(ROW, ROW | {"choices": ["Red", "Green and blue", "No"], "label": 2})
    examples = found.task.encode(found.splits["train"], tokenizer, None)
    batch = found.task.collate(examples, tokenizer)
    assert batch["counts"].tolist() == [2, 3]
    assert batch["labels"].tolist() == [0, 2]
    assert found.task.inputs(batch).keys() == {"input_ids", "attention_mask"}
    texts, answers = [], []
    for ids, mask, targets in zip(
        batch["input_ids"], batch["attention_mask"], batch["targets"], strict=True
    ):
        texts.append(tokenizer.decode(ids[: int(mask.sum())]))
        answers.append(tokenizer.decode(targets[targets != IGNORED]))
        assert (targets != IGNORED).sum() == int(mask.sum()) - len(
            tokenizer("Name a colour.")["input_ids"]
        )
    assert texts[0] == "<s>Name a colour. Blue</s>"
    assert answers == [" Blue</s>", " Seven</s>", " Red</s>", " Green and blue</s>", " No</s>"]


def test_an_encoder_decoder_reads_the_question_and_writes_the_choice() -> None:
    tokenizer = tiny.tokenizer("t5")
    rows = [{"question": "it was", "choices": ["good", "bad"], "label": 1}]
    found = data(*rows, prefer="seq2seq", prefix="1 and ")
    batch = found.task.collate(found.task.encode(found.splits["train"], tokenizer, 16), tokenizer)
    given = found.task.inputs(batch)
    assert torch.equal(given["labels"], batch["targets"])
    assert tokenizer.decode(batch["input_ids"][0]).startswith("1 and it was")
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])


def test_a_cut_choice_is_counted() -> None:
    tokenizer = tiny_text.byte_bpe()
    found = data(ROW | {"choices": ["Blue", "green and blue" * 9]})
    report = check(found, tokenizer, 12)
    assert report.splits["train"].answers_cut == 1
    assert [piece.learned for piece in report.previews[0]] == [False, True, False]


def test_the_likeliest_for_its_length_is_taken() -> None:
    task = Choices({"question": "q", "choices": "c", "label": "l"}, None, "seq2seq")
    logits, targets = logits_of(CHANCES, False)
    batch = {"targets": targets, "counts": torch.tensor([3]), "labels": torch.tensor([1])}
    [guess] = task.predict(SimpleNamespace(logits=logits), batch)
    assert guess.id == 1
    assert guess.probability == pytest.approx(0.8 / (0.5**1.5 + 0.8 + 0.01 ** (1 / 3)), rel=1e-5)
    assert task.score([guess], task.references(batch)) == {"accuracy": 1.0}
    assert task.decode(guess) == 1
    assert task_from_extras(json.loads(json.dumps(task.extras()))) == task


@pytest.fixture
def espalier(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


# --- runs -------------------------------------------------------------------------------------


def sums(count: int = 48) -> list[dict[str, Any]]:
    """Which of two numbers is named first."""
    rows = []
    for i in range(count):
        a, b = i % 10, (i * 7 + i // 10 + 1) % 10
        pair = [str(a), f"{b} {b}"]
        if a != b:
            rows.append({"question": f"{a} and {b} is", "choices": pair[:: 1 - 2 * (i % 2)],
                         "label": i % 2})  # fmt: skip
    return rows


def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    writer = "seq2seq" if model.config.is_encoder_decoder else "causal"
    found = data(*rows, prefer=writer)
    batch = found.task.collate(found.task.encode(found.splits["train"], tokenizer, 24), tokenizer)
    with torch.no_grad():
        outputs = model.eval()(**found.task.inputs(batch))
    return found.task.score(found.task.predict(outputs, batch), batch["labels"].tolist())[
        "accuracy"
    ]


@pytest.mark.parametrize(
    ("make", "words", "method"),
    [(tiny.llama, "gpt2", "IA3()"), (tiny.t5, "t5", "IA3() + LoRA(rank=4)")],
)
def test_training_ranks_the_right_choice_first(make: Any, words: str, method: str) -> None:
    model, rows = make(), sums()
    untrained = accuracy(model, tiny.tokenizer(words), rows)
    result = esp.fit(
        model, tiny.tokenizer(words), rows, method, task="choices", validation=rows, epochs=6,
        lr=0.05, batch=8, quiet=True, threads=1, max_length=24,
    )  # fmt: skip
    checks = [line for line in result.history if line["kind"] == "validation"]
    assert set(result.metrics["validation"]) == {"loss", "accuracy"}
    assert checks[-1]["loss"] < 0.85 * checks[0]["loss"]
    assert result.metrics["validation"]["accuracy"] >= 0.8
    assert untrained < 0.7


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    found = []
    for batch, accumulate in ((16, 1), (4, 4)):
        model = tiny.llama()
        esp.fit(
            model, tiny.tokenizer("gpt2"), sums(32), "IA3()", task="choices", steps=2, lr=0.01,
            batch=batch, accumulate=accumulate, batching="random", validation_share=0, quiet=True,
            threads=1, warmup=0,
        )  # fmt: skip
        found.append(torch.cat([p.detach() for p in esp.parameters(model)]))
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], torch.ones_like(found[0]), atol=1e-3)


def test_the_commands_train_predict_and_evaluate(
    tmp_path: Path,
    espalier: Command,
) -> None:
    base = tiny.save_model(tmp_path / "t5", tiny.t5(), tiny.tokenizer("t5"))
    file, run = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = sums(16)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--task", "choices", "--method", "ia3", "--steps", 2, "--warmup", 0, "--threads", 1]
    said = espalier("train", "--model", base, "--train", file, *words, "--out", run)
    assert said.code == 0, said.err
    assert esp.read_card(run)["extras"]["writer"] == "seq2seq"  # the base decides
    said = espalier("predict", run, "--data", file)
    assert said.code == 0, said.err
    found = [json.loads(line) for line in said.out.splitlines()]
    assert all(line["prediction"] in (0, 1) for line in found)
    assert all(0.5 <= line["probability"] <= 1 for line in found)
    said = espalier("eval", run, "--data", file, "--json")
    assert {"loss", "accuracy", "rows"} <= json.loads(said.out).keys()
    said = espalier("generate", run, "--prompt", "1 and 2 is")
    assert said.code == 2
    assert "writes no text" in said.err


def test_text_is_not_generated_and_rows_are_not_packed() -> None:
    with pytest.raises(SettingError, match="pack' is for causal"):
        esp.RunConfig(model="m", train="t", task="choices", batching="pack")
    with pytest.raises(SettingError, match="generate is for the tasks causal and seq2seq"):
        esp.RunConfig(model="m", train="t", task="choices", generate=True)
