"""Training through `esp.fit` and `esp.train`: tasks, equivalences, guards, the run folder."""

from __future__ import annotations

import itertools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import espalier as esp
import tiny_runs as tiny
from espalier.checkpoint import read_card
from espalier.errors import AdapterError, CheckpointError, SettingError, TrainingError
from espalier.training import RunConfig
from espalier.training.logs import quiet, screen
from espalier.training.models import writing_task
from espalier.training.threads import Spent, candidates, probe

COMMON: dict[str, Any] = {"quiet": True, "threads": 1, "batch": 8, "warmup": 0}
CLASSES = {"num_labels": 2, "problem_type": "single_label_classification"}


def tag_rows() -> list[dict[str, Any]]:
    rows = []
    for row in tiny.reviews():
        words = row["text"].split()
        rows.append({"tokens": words, "tags": ["B-X" if w in tiny.GOOD else "O" for w in words]})
    return rows


def chat_rows() -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"].strip()},
            ]
        }
        for row in tiny.sums()
    ]


TASKS: dict[str, tuple[Any, str, list[dict[str, Any]]]] = {
    "classification": (lambda: tiny.bert(**CLASSES), "bert", tiny.reviews()),
    "pairs": (
        lambda: tiny.bert(**CLASSES),
        "bert",
        [{"text": r["text"], "text_pair": "it was", "label": r["label"]} for r in tiny.reviews()],
    ),
    "multilabel": (
        lambda: tiny.bert(num_labels=2, problem_type="multi_label_classification"),
        "bert",
        [{"text": r["text"], "labels": [r["label"]]} for r in tiny.reviews()],
    ),
    "regression": (
        lambda: tiny.bert(num_labels=1, problem_type="regression"),
        "bert",
        [
            {"text": r["text"], "label": 1.5 if r["label"] == "good" else -1.0}
            for r in tiny.reviews()
        ],
    ),
    "tokens": (lambda: tiny.bert("TokenClassification", num_labels=2), "bert", tag_rows()),
    "causal text": (tiny.gpt2, "gpt2", [{"text": r["text"]} for r in tiny.reviews()]),
    "causal completion": (tiny.llama, "gpt2", tiny.sums()),
    "causal chat": (tiny.llama, "gpt2", chat_rows()),
    "seq2seq": (
        tiny.t5,
        "t5",
        [{"source": r["prompt"], "target": r["completion"].strip()} for r in tiny.sums()],
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_learns_and_leaves_the_base_alone(name: str) -> None:
    make, words, rows = TASKS[name]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    task = name.split()[0].replace("pairs", "classification")
    head = ["classifier"] if name in ("classification", "pairs", "tokens") else "auto"
    result = esp.fit(
        model, tiny.tokenizer(words), rows, "LoRA(rank=4)", task=task, head=head, lr=0.02,
        epochs=5, max_length=24, **COMMON,
    )  # fmt: skip
    losses = [line["loss"] for line in result.history if line["kind"] == "train"]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert result.steps == len(losses)
    assert set(result.metrics["validation"]) > {"loss"}
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())


def flats(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in esp.parameters(model)])


def trained(**settings: Any) -> torch.Tensor:
    model = tiny.llama()
    esp.fit(
        model, tiny.tokenizer("gpt2"), tiny.sums(32), "LoRA(rank=2)",
        **{**COMMON, "steps": 4, "lr": 0.01, "validation_share": 0,
           "batching": "random", **settings},
    )  # fmt: skip
    return flats(model)


def test_accumulated_micro_batches_equal_one_big_batch() -> None:
    big = trained(batch=16, accumulate=1)
    assert torch.allclose(big, trained(batch=4, accumulate=4), atol=2e-5)
    assert not torch.allclose(big, trained(batch=4, accumulate=1), atol=1e-3)


def test_checkpointing_changes_nothing_but_memory() -> None:
    assert torch.allclose(trained(), trained(checkpointing=True), atol=1e-6)


def test_seed_decides_everything() -> None:
    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(), trained(seed=1))


@pytest.mark.parametrize("method", ["LoRA(rank=2)", "FullTuning()"])
def test_bf16_keeps_the_trained_numbers_in_fp32(method: str) -> None:
    model = tiny.llama()
    result = esp.fit(
        model, tiny.tokenizer("gpt2"), tiny.sums(), method, precision="bf16", lr=0.01, epochs=3,
        **COMMON,
    )  # fmt: skip
    losses = [line["loss"] for line in result.history if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in esp.parameters(model)} == {torch.float32}


def test_numbers_as_labels_train_on_a_bf16_base() -> None:
    make, words, rows = TASKS["regression"]
    model = make().bfloat16()
    result = esp.fit(model, tiny.tokenizer(words), rows, steps=3, lr=0.01, **COMMON)
    assert result.steps == 3
    assert model.dtype == torch.bfloat16


def test_packed_rows_train(tmp_path: Path) -> None:
    result = esp.fit(
        tiny.llama(), tiny.tokenizer("gpt2"), tiny.sums(), batching="pack", max_length=32,
        lr=0.02, epochs=10, **{**COMMON, "batch": 2},
    )  # fmt: skip
    losses = [line["loss"] for line in result.history if line["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]


def test_packing_is_refused_where_rows_would_mix() -> None:
    with pytest.raises(SettingError, match="pack' is for causal"):
        esp.fit(tiny.bert(**CLASSES), tiny.tokenizer(), tiny.reviews(), batching="pack", quiet=True)


def test_best_is_kept_and_early_stopping_stops() -> None:
    model = tiny.bert(**CLASSES)
    result = esp.fit(
        model, tiny.tokenizer(), tiny.reviews(), lr=0.5, epochs=20, evaluate_every=2, patience=2,
        **COMMON,
    )  # fmt: skip
    checks = [line for line in result.history if line["kind"] == "validation"]
    best = max(checks, key=lambda line: (line["accuracy"], -line["loss"]))
    assert result.best["step"] == best["step"]
    assert result.steps == checks[-1]["step"] == best["step"] + 4
    assert result.metrics["validation"]["accuracy"] == best["accuracy"]


def test_among_equals_the_lower_loss_is_the_best(capsys: pytest.CaptureFixture[str]) -> None:
    result = esp.fit(
        tiny.bert(**CLASSES), tiny.tokenizer(), tiny.reviews(), lr=1e-6, head_lr=1e-6,
        **{**COMMON, "quiet": False},
    )  # fmt: skip
    first, *_, last = [line for line in result.history if line["kind"] == "validation"]
    assert first["accuracy"] == last["accuracy"]
    assert first["loss"] > last["loss"]
    assert (result.best["step"], result.metric) == (last["step"], "accuracy")
    said = capsys.readouterr().out
    assert "best so far, by accuracy" in said
    assert f"kept from step {last['step']}: the best accuracy on validation data" in said
    assert f"({last['accuracy']:.4g})" in said


def test_patience_is_for_the_metric_and_a_lower_loss_is_kept_all_the_same() -> None:
    result = esp.fit(
        tiny.bert(**CLASSES), tiny.tokenizer(), tiny.reviews(), lr=1e-6, head_lr=1e-6, patience=2,
        **COMMON | {"epochs": 20},
    )  # fmt: skip
    checks = [line for line in result.history if line["kind"] == "validation"]
    first, *_, last = checks
    assert len(checks) == 3
    assert first["accuracy"] == last["accuracy"]
    assert first["loss"] > last["loss"]
    assert result.best["step"] == last["step"]


@pytest.mark.parametrize(("dtype", "said"), [(torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_the_card_says_what_a_base_in_hand_computed_in(
    dtype: torch.dtype, said: str, tmp_path: Path
) -> None:
    model, out = tiny.bert(**CLASSES).to(dtype), tmp_path / "run"
    esp.fit(model, tiny.tokenizer(), tiny.reviews(), out=out, precision="fp32", **COMMON)
    assert read_card(out)["extras"]["precision"] == said


def test_keep_last(capsys: pytest.CaptureFixture[str]) -> None:
    result = esp.fit(
        tiny.bert(**CLASSES), tiny.tokenizer(), tiny.reviews(), lr=0.5, epochs=4, keep="last",
        **{**COMMON, "quiet": False},
    )  # fmt: skip
    last = [line for line in result.history if line["kind"] == "validation"][-1]
    assert result.metrics["validation"]["loss"] == last["loss"]
    assert "kept from" not in (said := capsys.readouterr().out)
    assert f"step {result.best['step']:.0f} had the best accuracy" in said


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = tiny.bert(**CLASSES)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[tiny.VOCAB.index("dull")] = float("nan")
    with pytest.raises(TrainingError) as caught:
        esp.fit(model, tiny.tokenizer(), tiny.reviews(), **COMMON)
    text = str(caught.value)
    assert "step 1" in text
    assert "row" in text
    assert "word_embeddings" in text
    assert "float32" in text
    assert not any(key.startswith("espalier") for key in model.state_dict())


def test_a_site_without_gradient_is_named() -> None:
    model = tiny.bert(**CLASSES)
    esp.attach(model, esp.LoRA(sites="attention.q"), head=False)
    layer = model.bert.encoder.layer[0].attention.self.query
    inner = layer.forward
    layer.forward = lambda x: inner(x).detach()
    with pytest.raises(TrainingError, match=r"never had a gradient.*layer\.0\."):
        esp.fit(model, tiny.tokenizer(), tiny.reviews(), None, **COMMON)


def test_out_of_memory_says_what_a_step_takes_and_what_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    model = tiny.bert(**CLASSES)
    monkeypatch.setattr(model.bert.encoder, "forward", full)
    with pytest.raises(TrainingError) as caught:
        esp.fit(model, tiny.tokenizer(), tiny.reviews(), **COMMON)
    text = str(caught.value)
    assert "with batch=8 and up to 11 tokens" in text
    assert "A step takes" in text
    assert "activations" in text
    assert "1. batch=4 with accumulate=2 (the same step)" in text
    assert "espalier plan --model BertForSequenceClassification" in text


def test_a_run_folder_holds_everything(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", tiny.bert(**CLASSES), tiny.tokenizer())
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews()))
    config = RunConfig(
        model=base, train=str(data), test=str(data), out=tmp_path / "run", method="LoRA(rank=2)",
        head=["classifier"], epochs=2, lr=0.01, tensorboard=True, **COMMON,
    )  # fmt: skip
    result = esp.train(config)
    folder = result.folder
    assert folder == tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "loss.png", "adapter", "README.md", "log.txt",
        "result.json", "tensorboard",
    }  # fmt: skip
    again = RunConfig.from_yaml(folder / "config.yaml")
    assert again.lr == 0.01
    assert again.max_length == 48  # the model's own limit
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines].count("validation") == 2
    assert lines[-1]["kind"] == "test"
    card = esp.read_card(folder / "adapter")
    assert card["extras"]["task"] == "classification"
    assert card["extras"]["labels"] == ["bad", "good"]
    readme = (folder / "README.md").read_text()
    assert f"{result.metrics['test']['accuracy']:.4g}" in readme
    assert yaml.safe_load(readme.split("---")[1])["base_model"] == base
    with pytest.raises(SettingError, match="not empty"):
        esp.train(config)
    assert esp.train(config.replace(resume=True)).metrics == result.metrics
    assert esp.train(config.replace(overwrite=True, steps=2)).steps == 2


def test_a_new_head_is_trained_and_saved_with_the_adapter(tmp_path: Path) -> None:
    plain = tiny.bert("MaskedLM")
    base = tiny.save_model(tmp_path / "base", plain, tiny.tokenizer())
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews()))
    result = esp.train(
        RunConfig(model=base, train=str(data), out=tmp_path / "run", steps=2, **COMMON)
    )
    assert "classifier" in esp.read_card(tmp_path / "run")["head"]
    assert result.account["head"] > 0


@pytest.mark.parametrize(
    ("make", "kind", "task", "form"),
    [(tiny.llama, "gpt2", "causal", "completion"), (tiny.t5, "t5", "seq2seq", "")],
)
def test_the_base_decides_what_columns_leave_open(
    make: Any, kind: str, task: str, form: str, tmp_path: Path
) -> None:
    base = tiny.save_model(tmp_path / "base", make(), tiny.tokenizer(kind))
    data = tmp_path / "train.jsonl"
    rows = [{"source": r["prompt"], "target": r["completion"].strip()} for r in tiny.sums()]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    esp.train(RunConfig(model=base, train=str(data), out=folder, steps=1, **COMMON))
    extras = esp.read_card(folder)["extras"]
    assert (extras["task"], extras.get("form", "")) == (task, form)
    assert RunConfig.from_yaml(folder / "config.yaml").task == task
    result = esp.fit(make(), tiny.tokenizer(kind), rows, steps=1, **COMMON)
    assert "perplexity" in result.metrics["validation"]


def test_an_encoder_leaves_the_task_to_the_columns(tmp_path: Path) -> None:
    assert writing_task(tiny.bert().config) is None
    assert writing_task(tiny.gpt2().config) == "causal"
    with pytest.raises(SettingError, match="task is seq2seq"):
        esp.fit(
            tiny.bert("MaskedLM"), tiny.tokenizer(), [{"source": "a", "target": "b"}] * 9,
            batching="pack", **COMMON,
        )  # fmt: skip


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.save_model(tmp_path / "base", tiny.bert(**CLASSES), tiny.tokenizer())
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews()))
    before = sorted(tmp_path.rglob("*"))
    config = RunConfig(
        model=base, train=str(data), out=tmp_path / "run", dry_run=True, head=["classifier"]
    )
    assert esp.train(config).steps == 0
    assert sorted(tmp_path.rglob("*")) == before
    said = capsys.readouterr().out
    assert "LoRA" in said
    assert "in use" in said


def test_a_dry_fit_leaves_the_model_bare() -> None:
    model = tiny.bert(**CLASSES)
    keys = set(model.state_dict())
    esp.fit(model, tiny.tokenizer(), tiny.reviews(), dry_run=True, **COMMON)
    assert set(model.state_dict()) == keys
    assert all(p.grad is None for p in model.parameters())


def test_generated_answers_are_scored() -> None:
    result = esp.fit(
        tiny.llama(), tiny.tokenizer("gpt2"), tiny.sums(), lr=0.02, epochs=2, generate=True,
        max_new_tokens=4, **COMMON,
    )  # fmt: skip
    written = [result.metrics["validation"][name] for name in ("exact_match", "bleu", "rouge_l")]
    assert all(0 <= score <= 1 for score in written)


def test_training_goes_on_with_an_attached_adapter() -> None:
    model = tiny.bert(**CLASSES)
    esp.attach(model, esp.LoRA(rank=2), name="mine", head=["classifier"])
    before = flats(model)
    esp.fit(model, tiny.tokenizer(), tiny.reviews(), None, steps=2, lr=0.01, **COMMON)
    assert esp.active(model) == {"mine": 1.0}
    assert not torch.equal(before, flats(model))
    esp.attach(model, esp.LoRA(rank=2), name="second", head=False)
    esp.activate(model, ["mine", "second"])
    with pytest.raises(AdapterError, match="one adapter should be active, found 'mine', 'second'"):
        esp.fit(model, tiny.tokenizer(), tiny.reviews(), None, steps=1, **COMMON)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batc": 4}, ["'batc'", "'batch'"]),
        ({"per_device_train_batch_size": 4}, ["write batch"]),
        ({"learning_rate": 1}, ["write lr"]),
        ({"num_train_epochs": 1}, ["write epochs"]),
        ({"lora_r": 8}, ["method: LoRA(rank=8)"]),
        ({"model_name_or_path": "x"}, ["write model"]),
        ({"cutoff_len": 8}, ["write max_length"]),
        ({"batch": 0}, ["batch must be at least 1 or auto; got 0"]),
        ({"schedule": "cosin"}, ["did you mean 'cosine'"]),
        ({"threads": "many"}, ["threads does not take 'many'"]),
        ({"lr": "fast"}, ["lr:", "'fast'"]),
        ({"resume": True}, ["resume needs out"]),
        ({"resume": True, "overwrite": True, "out": "x"}, ["choose one"]),
        ({"patience": 2, "validation_share": 0}, ["patience needs validation data"]),
        ({"warmup": 10, "steps": 5}, ["warmup takes 10 steps"]),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        RunConfig(**{"model": "m", "train": "t", **settings})
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_settings_travel_through_yaml(tmp_path: Path) -> None:
    config = RunConfig(model="m", train="t", lr=1e-4, out=tmp_path, method={"method": "LoRA"})
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    assert RunConfig.from_yaml(path) == config
    assert RunConfig.from_yaml(path, {"batch": 2}).batch == 2
    path.write_text("model: m\ntrain: t\nlr: 1e-4\n")  # which YAML reads as text
    assert RunConfig.from_yaml(path).lr == 1e-4
    path.write_text("model: [")
    with pytest.raises(SettingError, match="not valid YAML"):
        RunConfig.from_yaml(path)
    with pytest.raises(SettingError, match="no config file"):
        RunConfig.from_yaml(tmp_path / "none.yaml")


def test_mistakes_are_found_before_the_data_is_read(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": str(tmp_path / "no model"), "train": "nowhere.jsonl"}
    with pytest.raises(SettingError, match="LoRRA"):
        esp.train(RunConfig(**settings, method="LoRRA()"))
    filled = tmp_path / "filled"
    filled.mkdir()
    (filled / "thesis.txt").write_text("precious")
    with pytest.raises(SettingError, match="not empty"):
        esp.train(RunConfig(**settings, out=filled))
    with pytest.raises(SettingError, match="no run"):
        esp.train(RunConfig(**settings, out=filled, overwrite=True))
    with pytest.raises(SettingError, match="no run to resume"):
        esp.train(RunConfig(**settings, out=filled, resume=True))
    with pytest.raises(CheckpointError, match="is a file"):
        esp.train(RunConfig(**settings, out=filled / "thesis.txt"))
    assert (filled / "thesis.txt").read_text() == "precious"


def test_no_space_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier.training import folders

    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="1 kB are free"):
        esp.train(RunConfig(model="m", train="t", out=tmp_path / "run"))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews()))
    with pytest.raises(CheckpointError, match="no model folder"):
        esp.train(RunConfig(model=str(tmp_path / "gone"), train=str(data), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_library_noise_goes_to_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.txt"
    with quiet(log):
        logging.getLogger("transformers.some.module").error("the weights are new")
        logging.getLogger("datasets").error("slow disk")
        print("a library prints")
        print("and to stderr", file=sys.stderr)
        screen().write("a person reads this\n")
    print("afterwards")
    shown = capsys.readouterr()
    assert shown.out == "a person reads this\nafterwards\n"
    assert shown.err == ""
    text = log.read_text()
    for words in ("the weights are new", "slow disk", "a library prints", "and to stderr"):
        assert words in text


def test_threads_are_probed_and_put_back() -> None:
    before = torch.get_num_threads()
    assert candidates(6) == [1, 2, 4, 6]
    assert probe(16, 16, seconds=0.01) >= 1
    assert torch.get_num_threads() == before


# Rounds of one, two and four threads: seconds on the clock, and the share of it on each core.
_MACHINES: dict[str, tuple[int, dict[int, list[tuple[float, float]]]]] = {
    "idle": (4, {1: [(4, 1)], 2: [(2.1, 0.95)], 4: [(1.2, 0.9)]}),
    "two cores shared, one moment free": (1, {1: [(4, 1)], 2: [(2, 1), *3 * [(40, 0.5)]]}),
    "a busy moment in five": (2, {1: [(4, 1)], 2: [(30, 0.9), *4 * [(2.1, 0.9)]]}),
    "as fast with two": (1, {1: [(4, 1)], 2: [(3.8, 0.95)]}),
    "four are for others": (2, {1: [(4, 1)], 2: [(2.2, 0.95)], 4: [(1.8, 0.4)]}),
    "two gain nothing, four do": (4, {1: [(4, 1)], 2: [(4, 1)], 4: [(2, 1)]}),
}


@pytest.mark.parametrize("machine", _MACHINES)
def test_more_threads_are_taken_where_they_reliably_gain(
    machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, rounds = _MACHINES[machine]
    monkeypatch.setattr("espalier.training.threads.usable_cores", lambda: max(rounds))
    turns = {number: itertools.cycle(taken) for number, taken in rounds.items()}
    order: list[int] = []

    def timed(number: int) -> Spent:
        order.append(number)
        wall, share = next(turns[number])
        return Spent(wall, wall * share * number)

    assert probe(16, 16, seconds=200, timed=timed) == best
    assert order == len(order) // len(rounds) * [*rounds]  # in turns, or one had the bad moments
