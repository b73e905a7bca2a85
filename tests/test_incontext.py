"""In-context learning: prompts by hand, likelihoods by hand, which examples, limits, costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import espalier as esp
import tiny_runs as tiny
from command_line import Command, write_rows
from espalier.data import TaskData, read_task
from espalier.errors import SettingError
from espalier.incontext.choosing import choose
from espalier.incontext.prompts import Prompts
from espalier.incontext.scoring import likelihoods
from espalier.tasks import Causal, Row

PLAIN = esp.InContext(shots=2, template="{text} was {label}", after=" and ", calibrate=False)


def reviews(words: Sequence[str] = ("good", "bad")) -> TaskData:
    rows = [{**row, "label": words[row["label"] == "bad"]} for row in tiny.reviews(36)]
    return read_task({"train": rows[:28], "test": rows[28:]}, task="classification")


def ids(text: str) -> list[int]:
    return [tiny.VOCAB.index(word) for word in text.split()]


def log_probabilities(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits[0].log_softmax(-1)


def of_decoder(model: Any, prompt: str, answer: str) -> list[float]:
    """Log-probabilities of an answer's tokens after a prompt, one by one."""
    found, so_far = [], ids(prompt)
    for token in ids(answer):
        found.append(
            float(log_probabilities(model, {"input_ids": torch.tensor([so_far])})[-1, token])
        )
        so_far.append(token)
    return found


def of_encoder(model: Any, source: str, answer: list[int]) -> list[float]:
    """Log-probabilities of an answer's tokens, the source with its end token read first."""
    found, so_far = [], [0]
    given = {"input_ids": torch.tensor([[*ids(source), tiny.VOCAB.index("</s>")]])}
    for token in answer:
        now = {**given, "decoder_input_ids": torch.tensor([so_far])}
        found.append(float(log_probabilities(model, now)[-1, token]))
        so_far.append(token)
    return found


def prompt_of(data: TaskData, query: Row, how: esp.InContext) -> str:
    """The prompt written by hand: the last chosen example first."""
    (shots,) = choose(data.task, data.splits["train"], [query], how)
    names = data.task.labels or ()
    told = [f"{row.values['text']} was {names[row.values['label']]} and " for row in shots]
    return "".join(told[::-1]) + f"{query.values['text']} was"


@pytest.mark.parametrize("words", [("good", "bad"), ("good", "very very bad")])
def test_classes_are_scored_by_their_words_mean_likelihood(words: tuple[str, ...]) -> None:
    data, model = reviews(words), tiny.gpt2().eval()
    found = esp.in_context(model, tiny.tokenizer("plain"), data, PLAIN)
    names, hits, loss = data.task.labels or (), 0, 0.0
    for query, guess in zip(data.splits["test"], found.predictions, strict=True):
        prompt = prompt_of(data, query, PLAIN)
        each = [of_decoder(model, prompt, name) for name in names]
        scores = torch.tensor([sum(own) / len(own) for own in each])
        assert guess == names[int(scores.argmax())]
        hits += int(scores.argmax()) == query.values["label"]
        loss -= float(scores.log_softmax(0)[query.values["label"]])
    count = len(data.splits["test"])
    assert found.metrics["accuracy"] == pytest.approx(hits / count)
    assert found.metrics["loss"] == pytest.approx(loss / count, abs=1e-5)
    assert set(found.metrics) >= {"loss", "accuracy", "f1"}


def test_calibration_takes_away_what_an_empty_query_has() -> None:
    data, model = reviews(), tiny.gpt2().eval()
    how = esp.InContext(shots=2, template="{text} was {label}", after=" and ")
    found = esp.in_context(model, tiny.tokenizer("plain"), data, how, limit=3)
    loss = 0.0
    for query in data.splits["test"][:3]:
        blank = Row({"text": "[UNK]", "label": 0}, "blank")
        scores = []
        for name in data.task.labels or ():
            (own,) = of_decoder(model, prompt_of(data, query, how), name)
            shots = prompt_of(data, query, how).removesuffix(f"{query.values['text']} was")
            (prior,) = of_decoder(model, f"{shots}{blank.values['text']} was", name)
            scores.append(own - prior)
        loss -= float(torch.tensor(scores).log_softmax(0)[query.values["label"]])
    assert found.metrics["loss"] == pytest.approx(loss / 3, abs=1e-5)


def test_an_encoder_decoder_reads_the_examples_and_writes_the_word() -> None:
    data, model = reviews(), tiny.t5().eval()
    found = esp.in_context(model, tiny.tokenizer("t5"), data, PLAIN, limit=3)
    for query, guess in zip(data.splits["test"], found.predictions, strict=False):
        names = data.task.labels or ()
        prompt = prompt_of(data, query, PLAIN)
        scores = [of_encoder(model, prompt, ids(name))[0] for name in names]
        assert guess == names[scores.index(max(scores))]


def test_texts_have_the_loss_of_the_answer_and_its_end() -> None:
    rows = tiny.sums(24)
    data = read_task({"train": rows[:16], "test": rows[16:20]}, task="causal")
    model = tiny.llama().eval()
    how = esp.InContext(shots=3, after=" </s> ")
    found = esp.in_context(model, tiny.tokenizer("plain"), data, how)
    nats, tokens = 0.0, 0
    for query in data.splits["test"]:
        (shots,) = choose(data.task, data.splits["train"], [query], how)
        told = [r.values["prompt"] + r.values["completion"] + " </s> " for r in shots][::-1]
        prompt = "".join(told) + query.values["prompt"]
        each = of_decoder(model, prompt, query.values["completion"] + " </s>")
        nats, tokens = nats - sum(each), tokens + len(each)
    assert found.metrics["loss"] == pytest.approx(nats / tokens, abs=1e-5)
    assert {"perplexity", "token_accuracy", "bits_per_character"} <= set(found.metrics)
    assert found.shots == 3


def test_target_texts_of_an_encoder_decoder_end_with_its_end_token() -> None:
    rows = [{"source": row["prompt"], "target": row["completion"].strip()} for row in tiny.sums(20)]
    data = read_task({"train": rows[:16], "test": rows[16:]}, task="seq2seq")
    model, how = (
        tiny.t5().eval(),
        esp.InContext(shots=1, template="{text} is {label}", after=" and "),
    )
    found = esp.in_context(model, tiny.tokenizer("t5"), data, how)
    each: list[float] = []
    for query in data.splits["test"]:
        ((shot,),) = choose(data.task, data.splits["train"], [query], how)
        told = f"{shot.values['source']} is {shot.values['target']} and "
        answer = [*ids(query.values["target"]), tiny.VOCAB.index("</s>")]
        each += of_encoder(model, f"{told}{query.values['source']} is", answer)
    assert found.metrics["loss"] == pytest.approx(-sum(each) / len(each), abs=1e-5)


def test_choices_are_ranked_and_conversations_shown_as_turns() -> None:
    rows = [
        {"question": f"the film {n} was", "choices": ["very good", "bad"], "label": n % 2}
        for n in range(8)
    ]
    data = read_task({"train": rows[:6], "test": rows[6:]}, task="choices", prefer="causal")
    model = tiny.gpt2().eval()
    how = esp.InContext(shots=0, template="{text} {label}")
    found = esp.in_context(model, tiny.tokenizer("plain"), data, how)
    for query, guess in zip(data.splits["test"], found.predictions, strict=True):
        each = [of_decoder(model, query.values["question"], c) for c in query.values["choices"]]
        scores = [sum(own) / len(own) for own in each]
        assert guess == scores.index(max(scores))
    turns = [
        {
            "messages": [
                {"role": "user", "content": f"{n} and"},
                {"role": "assistant", "content": "it"},
            ]
        }
        for n in range(6)
    ]
    chat = read_task(
        {"train": turns[:4], "test": turns[4:]},
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    prompts = Prompts(chat.task, tiny.tokenizer("plain"), how, False, None)
    shots = chat.splits["train"][:2]
    (one,) = prompts.ask(chat.splits["test"][0], shots).candidates
    first = [row.values["messages"][0]["content"] for row in shots[::-1]]
    told = " it ".join([*first, "4 and"]) + " it"
    assert " ".join(tiny.VOCAB[token] for token in one.ids) == told
    assert one.scored == (8,)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5"])
def test_batches_score_as_one_by_one(family: str) -> None:
    """Padding is seen by nobody, wherever a prompt's answer ends."""
    data, model = reviews(("good", "very very bad")), getattr(tiny, family)().eval()
    kind = "t5" if family == "t5" else "plain"
    prompts = Prompts(data.task, tiny.tokenizer(kind), PLAIN, family == "t5", None)
    rows = data.splits["train"]
    asked = [prompts.ask(row, rows[: n % 4]) for n, row in enumerate(rows[4:12])]
    candidates = [one for query in asked for one in query.candidates]
    assert len({one.length for one in candidates}) > 3
    together, sizes = likelihoods(model, candidates, 16)
    alone = [likelihoods(model, [one], 1)[0][0] for one in candidates]
    for a, b in zip(together, alone, strict=True):
        assert (a.tokens, a.right) == (b.tokens, b.right)
        assert a.nats == pytest.approx(b.nats, abs=1e-4)
    assert len(sizes) == len(candidates)


def test_words_of_one_token_share_one_context() -> None:
    data, model = reviews(), tiny.gpt2().eval()
    prompts = Prompts(data.task, tiny.tokenizer("plain"), PLAIN, False, None)
    candidates = prompts.ask(data.splits["test"][0], data.splits["train"][:1]).candidates
    assert len(candidates) == 2
    assert len(likelihoods(model, candidates, 8)[1]) == 1


def test_examples_by_seed_are_balanced_and_never_the_query_itself() -> None:
    rows = [{"text": f"film {n}", "label": "bad" if n < 12 else "good"} for n in range(40)]
    data = read_task({"train": rows, "test": rows[:6]}, task="classification")
    how = esp.InContext(shots=6, seed=3)
    chosen = choose(data.task, data.splits["train"], data.splits["test"], how)
    for query, shots in zip(data.splits["test"], chosen, strict=True):
        texts = [row.values["text"] for row in shots]
        assert query.values["text"] not in texts
        assert len(set(texts)) == 6
        assert sum(data.task.classes(row) == ["bad"] for row in shots) == 3
    outside = [Row({"text": "other", "label": 0}, "outside")]
    again = choose(data.task, data.splits["train"], outside, how)
    assert again == choose(data.task, data.splits["train"], outside, how)
    other = esp.InContext(shots=6, seed=4)
    assert again != choose(data.task, data.splits["train"], outside, other)


def test_likeness_finds_the_near_duplicate_and_shows_it_last() -> None:
    texts = ["a sad day we saw", "it is a lovely book and day", "the film was dull", "quite a day"]
    rows = [{"text": text, "label": n % 2} for n, text in enumerate(texts)]
    queries = [{"text": "the film was very dull", "label": 1}, {"text": texts[1], "label": 1}]
    data = read_task({"train": rows, "test": queries}, task="classification")
    how = esp.InContext(shots=2, choose="similar")
    first, second = choose(data.task, data.splits["train"], data.splits["test"], how)
    assert first[0].values["text"] == texts[2]
    assert texts[1] not in [row.values["text"] for row in second]
    prompts = Prompts(data.task, tiny.tokenizer("plain"), PLAIN, False, None)
    (one, _) = prompts.ask(data.splits["test"][0], first).candidates
    shown = " ".join(tiny.VOCAB[token] for token in one.ids)
    assert shown.index("film was dull") > shown.index(first[1].values["text"])


def test_where_the_limit_leaves_no_room_there_are_fewer_examples_never_cut_ones() -> None:
    data, model = reviews(), tiny.gpt2().eval()
    tight = esp.InContext(shots=12, template="{text} was {label}", after=" and ", max_length=25)
    found = esp.in_context(model, tiny.tokenizer("plain"), data, tight)
    assert found.fewer == found.queries
    assert 0 < found.shots < 12
    assert found.cut == 0
    prompts = Prompts(data.task, tiny.tokenizer("plain"), tight, False, 25)
    rows, query = data.splits["train"][:12], data.splits["test"][0]
    asked = prompts.ask(query, rows)
    assert max(one.length for one in asked.candidates) <= 25
    free = Prompts(data.task, tiny.tokenizer("plain"), tight, False, None)
    assert asked.candidates == free.ask(query, rows[: asked.shots]).candidates
    assert any(one.length > 25 for one in free.ask(query, rows[: asked.shots + 1]).candidates)
    least = esp.InContext(shots=2, template="{text} was {label}", after=" and ", max_length=2)
    assert esp.in_context(model, tiny.tokenizer("plain"), data, least).cut == found.queries


def test_a_prompt_that_was_trained_takes_its_room_from_the_examples() -> None:
    data, model, plain = reviews(), tiny.gpt2().eval(), tiny.tokenizer("plain")
    how = esp.InContext(shots=12, template="{text} was {label}", after=" and ")
    bare = esp.in_context(model, plain, data, how, limit=2)
    esp.attach(model, esp.PromptTuning(length=20))
    prompted = esp.in_context(model, plain, data, how, limit=2)
    assert prompted.shots < bare.shots
    assert prompted.metrics != bare.metrics


def test_costs_are_counted_and_the_model_is_as_it_was() -> None:
    data, model = reviews(), tiny.gpt2().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = esp.in_context(model, tiny.tokenizer("plain"), data, PLAIN)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    cost, queries = found.cost, data.splits["test"]
    prompts = [len(ids(prompt_of(data, query, PLAIN))) for query in queries]
    bare = [len(ids(query.values["text"])) + 1 for query in queries]
    assert cost.trained == 0
    assert cost.prompt_tokens == pytest.approx(sum(prompts) / len(prompts))
    assert cost.bare_tokens == pytest.approx(sum(bare) / len(bare))
    assert cost.tokens == sum(prompts)  # one context for both words
    size = sum(p.numel() for p in model.parameters())
    flops = [sum(2 * size * n + 2 * 2 * 32 * n**2 for n in counts) for counts in (prompts, bare)]
    assert cost.flops == pytest.approx(flops[0] / len(queries))
    assert cost.flops_ratio == pytest.approx(flops[0] / flops[1])
    assert found.bare.keys() == found.metrics.keys()


def test_what_cannot_be_is_said() -> None:
    data, plain = reviews(), tiny.tokenizer("plain")
    with pytest.raises(SettingError, match="writes no text"):
        esp.in_context(tiny.bert(), plain, data)
    with pytest.raises(SettingError, match="1 words for 2 labels"):
        esp.in_context(tiny.gpt2(), plain, data, esp.InContext(words=("good",)))
    with pytest.raises(SettingError, match="plain text"):
        Prompts(Causal({"text": "text"}), plain, esp.InContext(), False, None)
    with pytest.raises(SettingError, match="limit must be"):
        esp.in_context(tiny.llama(), tiny.tokenizer("plain"), reviews(), limit=0)
    with pytest.raises(SettingError, match="template must be"):
        esp.InContext(template="{text}")
    with pytest.raises(SettingError, match="choose must be"):
        esp.InContext(choose="best")
    with pytest.raises(SettingError, match="shots must be"):
        esp.InContext(shots=-1)


def test_the_command_prints_metrics_and_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    espalier = Command(capsys)
    model = tiny.save_model(tmp_path / "model", tiny.gpt2(), tiny.tokenizer("plain"))
    rows = tiny.reviews(24)
    train = write_rows(tmp_path / "train.jsonl", rows[:16])
    test = write_rows(tmp_path / "test.jsonl", rows[16:])
    words = ["incontext", "--model", model, "--train", train, "--test", test, "--shots", 2]
    said = espalier(*words, "--template", "{text} was {label}", "--json")
    assert said.code == 0, said
    found = json.loads(said.out)
    assert found["queries"] == 8
    assert found["shots"] == 2
    assert found["cost"]["trained"] == 0
    assert set(found["bare"]) == set(found["metrics"]) > {"accuracy", "loss"}
    table = espalier(*words, "--choose", "similar", "--max-length", 14, "--no-calibrate").out
    assert "accuracy" in table
    assert "left no room" in table
    bert = tiny.save_model(tmp_path / "bert", tiny.bert().bert, tiny.tokenizer("bert"))
    saying = ["writes no text"]
    espalier.fails("incontext", "--model", bert, "--train", train, saying=saying)
