"""Every command: what comes out, what it prints, and how it ends."""

from __future__ import annotations

import csv
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

import espalier as esp
import tiny_runs as tiny
from command_line import Command, World, make_world, read_rows, write_rows
from espalier.commands import COMMANDS, main
from espalier.training import RunConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def espalier(capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(capsys)


# ----------------------------------------------------------------------------------------- help


def test_overview_loads_nothing_heavy() -> None:
    code = (
        "import sys; from espalier.commands import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'pydantic', 'datasets', 'numpy'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_no_commands_help_loads_torch_or_transformers() -> None:
    code = (
        "import sys; from espalier.commands import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    assert not main([name, '--help']), name\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "    assert not heavy, (name, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_as_a_module_and_with_an_unknown_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "espalier", "trian"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "train" in done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name: str, espalier: Command) -> None:
    words = [name, "check", "--help"] if name == "data" else [name, "--help"]
    said = espalier(*words)
    assert said.code == 0
    assert f"espalier {name}" in said.out.rpartition("Example")[2]


def test_version_and_nothing_at_all(espalier: Command) -> None:
    assert espalier("--version").out.strip() == f"espalier {esp.__version__}"
    assert "quickstart" in espalier().out


# ---------------------------------------------------------------------------------------- train


def test_every_setting_of_a_run_is_a_flag(
    espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = espalier("train", "--help").out
    assert [n for n in RunConfig.model_fields if f"--{n.replace('_', '-')}" not in text] == []


def test_flags_go_before_the_file_and_methods_take_flags(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    config = tmp_path / "run.yaml"
    settings = {"model": world.bert, "train": str(world.reviews), "steps": 5, "method": "lora"}
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    words = ["--config", config, "--steps", 1, "--sites", "attention.q", "--rank=3", "--quiet"]
    said = espalier("train", *words, "--threads", 1, "--warmup", 0, "--out", tmp_path / "run")
    assert said.code == 0, said.err
    kept = RunConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert kept.steps == 1
    assert esp.recipe(kept.method) == esp.recipe("LoRA(rank=3, sites='attention.q')")


def test_methods_settings_go_to_the_part_that_has_them(world: World, espalier: Command) -> None:
    words = world.train("--method", "LoRA() + HeadOnly()", "--rank", 2, "--dry-run")
    said = espalier(*words)
    assert said.code == 0, said.err
    assert "LoRA(rank=2) + HeadOnly()" in said.out
    doubled = world.train("--method", "LoRA() + LoRA()", "--rank", 2)
    espalier.fails(*doubled, saying=["both have a setting rank"])


def test_train_says_what_it_made_and_what_to_type_next(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    said = espalier(*world.train("--out", tmp_path / "run"))
    assert said.code == 0
    assert f"espalier predict {tmp_path / 'run'}" in said.out
    assert {p.name for p in (tmp_path / "run").iterdir()} >= {"adapter", "config.yaml", "README.md"}


def test_what_to_type_next_has_the_columns_of_the_data(
    world: World, tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text_a": r["text"], "text_b": "a day", "label": r["label"]} for r in tiny.reviews(16)]
    words, run = world.train("--out", tmp_path / "run"), tmp_path / "run"
    words[words.index("--train") + 1] = write_rows(tmp_path / "pairs.jsonl", rows)
    said = espalier(*words)
    (line,) = (line for line in said.out.splitlines() if "| espalier predict" in line)
    echo, row, _, _, *rest = shlex.split(line)
    assert (echo, rest) == ("echo", ["predict", str(run), "--data", "-"])
    monkeypatch.setattr("sys.stdin", io.StringIO(row + "\n"))
    assert espalier(*rest).code == 0


def test_dry_run_writes_nothing(
    world: World, tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = espalier(*world.train("--dry-run"))
    assert said.code == 0
    assert "loss" in said.out
    assert list(tmp_path.iterdir()) == []


def test_print_config_is_yaml_with_every_key(espalier: Command) -> None:
    said = espalier("train", "--method", "lora", "--print-config")
    found = yaml.safe_load(said.out)
    assert set(found) == set(RunConfig.model_fields)
    assert found["method"]["rank"] == 8
    RunConfig(**found)


@pytest.mark.parametrize(
    ("flag", "right"),
    [
        ("--learning_rate", "--lr"),
        ("--lora_r", "--rank 8"),
        ("--per_device_train_batch_size", "--batch"),
        ("--base_model", "--model"),
        ("--num-train-epochs", "--epochs"),
        ("--packing", "--batching pack"),
        ("--epoch", "--epochs"),
        ("--rnak", "--rank"),
        ("--max_lenght", "--max-length"),
    ],
)
def test_foreign_and_misspelt_flags_are_named(
    flag: str, right: str, world: World, espalier: Command
) -> None:
    espalier.fails(*world.train(flag, 4), saying=["no flag", right])


def test_a_stopped_run_says_how_to_go_on(
    world: World, tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    from espalier.training.loop import Loop

    step, count = Loop._step, 0

    def stopping(self: Loop, *words: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return step(self, *words)

    monkeypatch.setattr(Loop, "_step", stopping)
    run, early = tmp_path / "run", tmp_path / "early"
    words = world.train("--steps", 4, "--save-every", 2, "--quiet", "--out")
    said = espalier(*words, run)
    assert said.code == 130
    again = f"espalier train --config {run / 'config.yaml'} --resume"
    assert again in said.err
    assert "step 2 is the last that was saved" in said.err
    assert espalier(*again.split()[1:]).code == 0
    assert len(read_rows(run / "metrics.jsonl")) >= 4
    count = 2
    said = espalier(*words, early, "--save-every", 3)
    assert said.code == 130
    assert "nothing was kept" in said.err
    assert "every 3 steps, --save-every N" in said.err


# ------------------------------------------------------------------------- eval, predict, generate


def test_eval_repeats_the_figures_of_the_run(world: World, espalier: Command) -> None:
    said = espalier("eval", world.classifier, "--json")
    found = json.loads(said.out)
    kept = json.loads((world.classifier / "result.json").read_text())["metrics"]["test"]
    assert found["rows"] == 12
    assert found["accuracy"] == pytest.approx(kept["accuracy"])
    assert found["loss"] == pytest.approx(kept["loss"], rel=1e-5)
    assert "accuracy" in espalier("eval", world.classifier, "--data", world.test).out


def test_eval_of_rows_held_out_of_training(world: World, espalier: Command) -> None:
    found = json.loads(espalier("eval", world.writer, "--json").out)
    kept = json.loads((world.writer / "result.json").read_text())["metrics"]["validation"]
    assert found["loss"] == pytest.approx(kept["loss"], rel=1e-5)


@pytest.fixture(scope="module")
def parted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three splits."""
    folder, rows = tmp_path_factory.mktemp("parted"), tiny.reviews(60)
    for name, some in (("train", rows[:30]), ("validation", rows[30:45]), ("test", rows[45:])):
        write_rows(folder / f"{name}.jsonl", some)
    return folder


@pytest.fixture(scope="module")
def parted_run(world: World, parted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the three splits of a folder, ten rows of each."""
    run = tmp_path_factory.mktemp("runs") / "run"
    words = world.train("--quiet", "--limit", 10, "--out", run)
    words[words.index("--train") + 1] = parted
    assert main([str(word) for word in words]) == 0
    return run


def test_eval_takes_the_runs_own_test_rows_and_says_which(
    world: World, parted: Path, parted_run: Path, espalier: Command
) -> None:
    kept = json.loads((parted_run / "result.json").read_text())["metrics"]
    for asked, split in (([], "test"), (["--split", "validation"], "validation")):
        found = json.loads(espalier("eval", parted_run, "--json", *asked).out)
        assert (found["data"], found["split"], found["rows"]) == (str(parted), split, 10)
        assert found["loss"] == pytest.approx(kept[split]["loss"], rel=1e-5)
    espalier.fails("eval", parted_run, "--split", "dev", saying=["--split must be", "'dev'"])
    espalier.fails("eval", world.writer, "--split", "test", saying=["no test rows", "validation"])
    assert json.loads(espalier("eval", world.writer, "--json").out)["split"] == "validation"


def test_eval_reads_test_rows_in_the_terms_of_the_adapter(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    run, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    rows = tiny.reviews(60)
    write_rows(data / "train.jsonl", rows[:40])
    write_rows(data / "test.jsonl", rows[40:])
    words = world.train("--quiet", "--validation-share", 0.4, "--out", run)
    words[words.index("--train") + 1] = data
    assert espalier(*words).code == 0
    kept = json.loads((run / "result.json").read_text())["metrics"]["test"]

    def found() -> dict[str, Any]:
        return json.loads(espalier("eval", run, "--json").out)

    assert found()["accuracy"] == kept["accuracy"]
    renamed = {"good": "A", "bad": "B"}
    write_rows(data / "train.jsonl", [r | {"label": renamed[r["label"]]} for r in rows[:40]])
    assert found()["accuracy"] == kept["accuracy"]
    write_rows(data / "train.jsonl", [*rows[:40], {"text": "so so", "label": "awful"}])
    assert found()["accuracy"] == kept["accuracy"]
    (data / "train.jsonl").unlink()
    assert found()["accuracy"] == kept["accuracy"]
    write_rows(data / "test.jsonl", [r | {"label": renamed[r["label"]]} for r in rows[40:]])
    espalier.fails(
        "eval", run, saying=["test.jsonl:1", "'A'" if rows[40]["label"] == "good" else "'B'"]
    )


@pytest.mark.parametrize("change", ["renamed", "new class", "column"])
def test_eval_refuses_rows_set_aside_from_training_data_that_has_changed(
    change: str, world: World, tmp_path: Path, espalier: Command
) -> None:
    rows, run = tiny.reviews(40), tmp_path / "run"
    file = write_rows(tmp_path / "reviews.jsonl", rows)
    words = world.train("--quiet", "--validation-share", 0.4, "--out", run)
    words[words.index("--train") + 1] = file
    assert espalier(*words).code == 0
    assert espalier("eval", run).code == 0
    if change == "renamed":
        renamed = {"good": "A", "bad": "B"}
        write_rows(file, [r | {"label": renamed[r["label"]]} for r in rows])
        saying = ["labels then: bad, good; now: A, B"]
    elif change == "new class":
        write_rows(file, [*rows, {"text": "so so", "label": "awful"}])
        saying = ["labels then: bad, good; now: awful, bad, good"]
    else:
        write_rows(file, [{"sentence": r["text"], "label": r["label"]} for r in rows])
        saying = ["columns then: text, label; now: sentence, label"]
    espalier.fails("eval", run, saying=["data has changed since the run", "--data", *saying])
    espalier.fails("eval", run, "--split", "train", saying=saying)
    espalier.fails("eval", run, "--data", file, "--split", "test", saying=["is one file"])


def test_eval_of_other_data_names_the_split_it_takes(
    parted: Path, parted_run: Path, espalier: Command
) -> None:
    words = ["eval", parted_run, "--json", "--data"]
    found = json.loads(espalier(*words, parted, "--split", "train").out)
    assert (found["data"], found["split"], found["rows"]) == (str(parted), "train", 30)
    assert json.loads(espalier(*words, parted / "train.jsonl").out)["split"] is None
    espalier.fails("eval", parted_run, "--data", parted, "--split", "x", saying=["--split must"])


def test_titles_stay_whole_in_a_narrow_terminal(
    world: World, parted: Path, parted_run: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    said = espalier("eval", parted_run).out
    assert said.splitlines()[0] == f"{parted_run} on the test rows of {parted}, fp32"
    card = espalier("inspect", world.classifier).out
    assert card.splitlines()[0] == f"Adapter in {world.classifier}"


def test_eval_computes_in_what_the_run_computed_in(
    world: World, tmp_path: Path, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.training.models.has_bf16_units", lambda: True)
    run = tmp_path / "run"
    assert espalier(*world.train("--precision", "bf16", "--quiet", "--out", run)).code == 0
    kept = json.loads((run / "result.json").read_text())["metrics"]["validation"]
    found = json.loads(espalier("eval", run, "--json").out)
    assert found["precision"] == "bf16"
    assert found["loss"] == pytest.approx(kept["loss"], rel=1e-5)
    monkeypatch.setattr("espalier.training.models.has_bf16_units", lambda: False)
    assert json.loads(espalier("eval", run, "--json").out)["precision"] == "fp32"


def test_one_class_for_all_rows_is_said(world: World, tmp_path: Path, espalier: Command) -> None:
    model = tiny.bert(num_labels=2)
    with torch.no_grad():
        model.classifier.bias.copy_(torch.tensor([3.0, -3.0]))
    base = tiny.save_model(tmp_path / "base", model, tiny.tokenizer("bert"))
    run, doubt = tmp_path / "run", "answers with one class, 'bad', for all"
    words = world.train("--lr", 1e-6, "--head-lr", 1e-6, "--out", run)
    words[words.index("--model") + 1] = base
    said = espalier(*words)
    assert said.out.count(doubt) == 1, said.out
    assert doubt in json.loads((run / "result.json").read_text())["doubt"]
    assert doubt in espalier("eval", run).out
    assert doubt in json.loads(espalier("eval", run, "--json").out)["doubt"]
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "a sad day", "label": "bad"}] * 3)
    assert doubt not in espalier("eval", run, "--data", bad).out  # it is right


def test_predict_hands_rows_back_in_order(world: World, tmp_path: Path, espalier: Command) -> None:
    out = tmp_path / "predictions.jsonl"
    assert espalier("predict", world.classifier, "--data", world.test, "--out", out).code == 0
    rows, given = read_rows(out), read_rows(world.test)
    assert [{"text": r["text"], "label": r["label"]} for r in rows] == given
    assert all(r["prediction"] in ("good", "bad") and 0.5 <= r["probability"] <= 1 for r in rows)
    some = espalier("predict", world.classifier, "--data", world.test, "--limit", 2).out
    assert [json.loads(line) for line in some.splitlines()] == rows[:2]
    saying = ["is there already", "--overwrite"]
    again = ("predict", world.classifier, "--data", world.test, "--out")
    espalier.fails(*again, out, saying=saying)
    espalier.fails(*again, world.test, saying=saying)  # its own input
    assert read_rows(world.test) == given
    assert espalier(*again, out, "--overwrite", "--limit", 1).code == 0
    assert read_rows(out) == rows[:1]
    assert espalier(*again, tmp_path / "p.csv").code == 0
    with (tmp_path / "p.csv").open(newline="") as file:
        assert [row["prediction"] for row in csv.DictReader(file)] == [
            r["prediction"] for r in rows
        ]
    espalier.fails("predict", world.classifier, out, saying=["is a file", "--data"])
    one = espalier("predict", world.classifier, given[0]["text"])
    assert json.loads(one.out)["prediction"] == rows[0]["prediction"]


def test_predict_reads_stdin(
    world: World, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO('a good film\n\n{"text": "a sad day", "id": 7}\n'))
    said = espalier("predict", world.classifier, "--data", "-")
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [row["text"] for row in rows] == ["a good film", "a sad day"]
    assert rows[1]["id"] == 7


def test_predict_finds_other_columns_when_told(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    data = write_rows(tmp_path / "new.jsonl", [{"review": "a good film"}])
    espalier.fails("predict", world.classifier, "--data", data, saying=["review"])
    said = espalier("predict", world.classifier, "--data", data, "--columns", "text=review")
    assert json.loads(said.out)["review"] == "a good film"


def test_generate_matches_greedy_decoding_by_hand(world: World, espalier: Command) -> None:
    said = espalier("generate", world.writer, "--prompt", "3 and 4 is")
    model = transformers.AutoModelForCausalLM.from_pretrained(world.llama)
    words = transformers.AutoTokenizer.from_pretrained(world.llama)
    esp.load(model, world.writer)
    ids = words("3 and 4 is", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(5):
        best = model(ids).logits[0, -1].argmax()
        ids = torch.cat([ids, best.view(1, 1)], 1)
        if best == words.eos_token_id:
            break
    assert said.out.strip() == words.decode(ids[0, start:], skip_special_tokens=True).strip()


def test_generate_from_a_file_equals_one_by_one(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    prompts = ["3 and 4 is", "it was 5 and 2 is", "1 and 0 is"]
    data = write_rows(tmp_path / "prompts.jsonl", [{"prompt": prompt} for prompt in prompts])
    out = tmp_path / "answers.jsonl"
    assert espalier("generate", world.writer, "--data", data, "--out", out).code == 0
    together = [row["prediction"] for row in read_rows(out)]
    alone = [espalier("generate", world.writer, "--prompt", p).out.strip() for p in prompts]
    assert together == alone


def test_generate_refuses_what_makes_no_sense(world: World, espalier: Command) -> None:
    ask = ["generate", world.writer, "--prompt", "x"]
    espalier.fails(*ask, "--temperature", -1, saying=["temperature must be at least 0"])
    espalier.fails("generate", world.classifier, "--prompt", "x", saying=["use: espalier predict"])
    espalier.fails("generate", world.writer, saying=["--prompt or --data"])
    espalier.fails("generate", world.writer, "3 and", "4", saying=["--prompt '3 and 4'"])


def test_chat_answers_line_by_line(
    world: World, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("3 and 4 is\n\n1 and 0 is\n/quit\nnever\n"))
    said = espalier("chat", world.writer)
    assert said.code == 0
    expected = [espalier("generate", world.writer, "--prompt", p).out.strip()
                for p in ("3 and 4 is", "1 and 0 is")]  # fmt: skip
    assert [line.strip() for line in said.out.splitlines()] == expected


def test_chat_uses_template_and_system_text_of_training(
    tmp_path: Path, world: World, espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    roles = {"user": "prompt", "assistant": "completion"}
    turns = [
        [{"role": role, "content": row[key]} for role, key in roles.items()]
        for row in tiny.sums(16)
    ]
    data = write_rows(tmp_path / "chat.jsonl", [{"messages": turn} for turn in turns])
    template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    words = ["--model", world.llama, "--train", data, "--system", "it was a lovely day"]
    run = tmp_path / "run"
    more = ["--chat-template", template, "--max-new-tokens", 3, "--steps", 1, "--threads", 1]
    assert espalier("train", *words, *more, "--warmup", 0, "--quiet", "--out", run).code == 0
    seen: list[str] = []
    generate = transformers.LlamaForCausalLM.generate

    def listening(self: Any, *given: Any, **settings: Any) -> Any:
        ids = settings["input_ids"][0]
        seen.append(tokens.decode(ids))
        return generate(self, *given, **settings)

    tokens = transformers.AutoTokenizer.from_pretrained(world.llama)
    monkeypatch.setattr(transformers.LlamaForCausalLM, "generate", listening)
    monkeypatch.setattr("sys.stdin", io.StringIO("1 and 2 is\n3 and 4 is\n"))
    assert espalier("chat", run).code == 0
    assert len(seen) == 2
    assert all("it was a lovely day" in text for text in seen)
    assert "1 and 2 is" in seen[1]  # the second question stands after the first


WORDS = [row["text"] for row in tiny.reviews(16)]
OTHERS: dict[str, tuple[str, list[dict[str, Any]], type]] = {
    "regression": ("bert", [{"text": t, "label": len(t) / 10} for t in WORDS], float),
    "multilabel": ("bert", [{"text": t, "labels": ["x", "y"][: len(t) % 3]} for t in WORDS], list),
    "tokens": (
        "bert",
        [{"tokens": t.split(), "tags": [*["O" for _ in t.split()][1:], "B-X"]} for t in WORDS],
        list,
    ),
    "seq2seq": ("t5", [{"source": t, "target": t[:8]} for t in WORDS], str),
}


@pytest.mark.parametrize("task", OTHERS)
def test_other_tasks_predict_and_evaluate(
    task: str, tmp_path: Path, world: World, espalier: Command
) -> None:
    model, rows, kind = OTHERS[task]
    if model == "t5":
        tiny.save_model(tmp_path / "t5", tiny.t5(), tiny.tokenizer("t5"))
    base = world.bert if model == "bert" else tmp_path / "t5"
    data, run = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "run"
    words = ["--train", data, "--task", task, "--steps", 1, "--warmup", 0, "--threads", 1]
    said = espalier("train", "--model", base, *words, "--quiet", "--out", run)
    assert said.code == 0, said.err
    said = espalier("predict", run, "--data", data)
    assert said.code == 0, said.err
    found = [json.loads(line)["prediction"] for line in said.out.splitlines()]
    assert len(found) == len(rows)
    assert all(isinstance(prediction, kind) for prediction in found)
    assert json.loads(espalier("eval", run, "--data", data, "--json").out)["rows"] == len(rows)
    if task != "tokens":
        assert espalier("predict", run, WORDS[0]).code == 0


# ---------------------------------------------------------------------- inspect, data check, doctor


def test_inspect_shows_places_plans_and_cards(world: World, espalier: Command) -> None:
    assert "attention.q" in espalier("inspect", world.bert).out
    picked = espalier("inspect", world.bert, "--sites", "attention.q, attention.v")
    assert "4 of" in picked.out
    lora = ["--method", "lora", "--rank", 2, "--sites", "attention.q"]
    plan = espalier("inspect", world.bert, *lora)
    assert "256" in plan.out  # two layers of 2 × (32 + 32)
    card = espalier("inspect", world.classifier)
    assert "LoRA(rank=4)" in card.out
    assert "good" in card.out
    espalier.fails("inspect", world.bert, "--sites", "attention.x", saying=["attention.x"])
    espalier.fails("inspect", world.root, saying=["neither a model nor an adapter"])


def test_data_check_reports_and_refuses(world: World, tmp_path: Path, espalier: Command) -> None:
    words = ["data", "check", world.reviews, world.test, "--model", world.bert]
    said = espalier(*words, "--max-length", 4)
    assert said.code == 0
    assert "48" in said.out
    assert "before cutting (limit 4)" in said.out
    assert "tokens" not in espalier(*words[:4]).out
    found = json.loads(espalier(*words, "--json").out)
    assert found["splits"]["train"]["rows"] == 48
    espalier.fails("data", "check", tmp_path / "none.jsonl", saying=["none.jsonl"])


def test_doctor_finds_this_installation_sound(
    espalier: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = json.loads(espalier("doctor", "--json").out)
    assert found["sound"]
    assert {"torch", "bitsandbytes"} <= {library["name"] for library in found["libraries"]}
    assert found["machine"]["cores"] >= 1


def test_doctor_names_the_fix(espalier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from espalier import doctor

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        doctor,
        "LIBRARIES",
        {"nowhere": ("nowhere_at_all", "a test", "quant"), "lost": ("lost_at_all", "a test", "")},
    )
    said = espalier("doctor")
    assert said.code == 2
    assert "pip install 'espalier[quant]'" in said.out


# -------------------------------------------------------------------------------- merge, export


def test_merging_what_was_trained_in_bf16_keeps_the_numbers_of_an_fp32_base(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    run, out = tmp_path / "run", tmp_path / "merged"
    assert espalier(*world.train("--precision", "bf16", "--quiet", "--out", run)).code == 0
    said = espalier("merge", run, "--out", out)
    assert "all in fp32" in said.out
    assert all(x.dtype == torch.float32 for x in load_file(out / "model.safetensors").values())


def test_merged_folder_stands_alone(world: World, tmp_path: Path, espalier: Command) -> None:
    out = tmp_path / "merged"
    said = espalier("merge", world.classifier, "--out", out)
    assert said.code == 0, said.err
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    settings = {"num_labels": 2}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(world.bert, **settings)
    esp.load(model.eval(), world.classifier)
    words = transformers.AutoTokenizer.from_pretrained(out)
    batch = words("a good film", return_tensors="pt")
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert merged.config.id2label == {0: "bad", 1: "good"}
    espalier.fails("merge", world.classifier, "--out", out, saying=["not empty"])


def test_merged_writer_keeps_its_stop_token(
    world: World, tmp_path: Path, espalier: Command
) -> None:
    assert espalier("export", world.writer, "--to", "merged", "--out", tmp_path / "m").code == 0
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "m")
    assert settings.eos_token_id in (4, [4])


def test_export_is_what_peft_reads(world: World, tmp_path: Path, espalier: Command) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "peft"
    assert espalier("export", world.writer, "--to", "peft", "--out", out).code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(world.llama).eval()
    theirs = peft.PeftModel.from_pretrained(model, out)
    ids = torch.tensor([[5, 6, 7]])
    logits = theirs(ids).logits
    ours = transformers.AutoModelForCausalLM.from_pretrained(world.llama).eval()
    esp.load(ours, world.writer)
    torch.testing.assert_close(ours(ids).logits, logits, atol=1e-5, rtol=0)
    espalier.fails("export", world.writer, "--to", "gguf", saying=["peft or merged"])


# --------------------------------------------------------------------------------------- outcomes


def test_a_bug_is_told_apart(espalier: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.doctor.examine", lambda: 1 / 0)
    said = espalier("doctor")
    assert said.code == 1
    assert "bug in Espalier" in said.err
    assert "ZeroDivisionError" in said.err


def test_debug_shows_the_traceback(world: World, espalier: Command) -> None:
    said = espalier("--debug", "eval", world.root / "nowhere")
    assert said.code == 2
    assert "Traceback" in said.err


def test_ctrl_c_has_its_own_code(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("espalier.doctor.examine", stop)
    assert main(["doctor"]) == 130
