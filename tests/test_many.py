"""Several processes: DDP and FSDP2 equal one process, runs resume on another number, one launcher.

One pair of processes, on gloo, does all of `many_worker.py`; the tests read what it left.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import espalier as esp
import many_worker as many
import tiny_runs as tiny
import zoo
from espalier.commands import launch, main
from espalier.errors import SettingError, TrainingError
from espalier.sharding import blocks
from espalier.training import processes, state

WEIGHTS = "adapter/adapter.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one process, two, and one again did their parts."""
    path = tmp_path_factory.mktemp("many")
    rows = [json.dumps(row) for row in tiny.reviews(48)]
    (path / "rows.jsonl").write_text("\n".join(rows))
    tiny.save_model(path / "base", tiny.bert(), tiny.tokenizer("bert"))
    many.fit(path / "whole", accumulate=2)
    many.fit(path / "one-two", many.STOP, accumulate=2)
    command = [sys.executable, "-m", "espalier", "launch", "--num-processes", "2", "--cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, many.__file__, str(path)], env=environment, capture_output=True, text=True
    )
    (path / "out.txt").write_text(done.stdout)
    (path / "err.txt").write_text(done.stderr)
    assert (path / "found-0.safetensors").is_file(), done.stdout + done.stderr[-4000:]
    many.fit(path / "two-one", resume=True, accumulate=2)
    many.from_files(str(path / "base"), str(path / "rows.jsonl"), path / "files", accumulate=2)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(folder / f"found-{rank}.safetensors") for rank in (0, 1)]


_ALONE: dict[tuple[str, bool], dict[str, torch.Tensor]] = {}


def alone(recipe: str, half: bool = False) -> dict[str, torch.Tensor]:
    """What one process comes to."""
    if (recipe, half) not in _ALONE:
        _ALONE[recipe, half] = many.loop(many.model(recipe, half=half))
    return _ALONE[recipe, half]


def check(found: list[dict[str, torch.Tensor]], case: str, recipe: str) -> None:
    one = alone(recipe)
    fresh = torch.cat([p.detach().flatten() for p in esp.parameters(many.model(recipe))])
    assert not torch.allclose(one["numbers"], fresh, atol=1e-5)  # it has trained
    for rank in (0, 1):
        numbers = found[rank][f"{case}/numbers"]
        torch.testing.assert_close(numbers, one["numbers"], atol=1e-6, rtol=1e-5)
        outputs = found[rank].get(f"{case}/outputs")
        if outputs is not None:
            torch.testing.assert_close(outputs, one["outputs"], atol=5e-5, rtol=1e-4)
    assert torch.equal(*(found[rank][f"{case}/numbers"] for rank in (0, 1)))


@pytest.mark.parametrize("case", [*many.RECIPES, "lora plain", "lora reentrant", "lora beside"])
def test_data_parallel_equals_one_process(case: str, found: Any) -> None:
    check(found, f"ddp {case}", many.RECIPES[case.split()[0]])


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("name", [*many.RECIPES, *many.READING])
def test_a_sharded_base_equals_one_process(name: str, order: str, found: Any) -> None:
    check(found, f"fsdp {name} {order}", {**many.RECIPES, **many.READING}[name])


@pytest.mark.parametrize("kind", ["plain", "reentrant"])
def test_a_sharded_base_can_be_checkpointed(kind: str, found: Any) -> None:
    check(found, f"fsdp mam {kind}", many.RECIPES["mam"])


def test_a_sharded_base_can_be_in_bf16(found: Any) -> None:
    one, two = alone(many.RECIPES["lora"], half=True), found[0]
    gap = (two["fsdp lora half/numbers"] - one["numbers"]).abs().max()
    fresh = torch.cat([p.flatten() for p in esp.parameters(many.model(many.RECIPES["lora"]))])
    assert two["fsdp lora half/numbers"].dtype == torch.float32
    assert gap < 0.05 * (one["numbers"] - fresh).abs().max()


def test_the_trainer_of_transformers_equals_one_process(found: Any) -> None:
    check(found, "trainer lora", many.RECIPES["lora"])  # whose steps see all rows, too


def losses(run: Path) -> list[tuple[str, int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


@pytest.mark.parametrize("run", ["one-two", "two-one"])
def test_a_run_goes_on_with_another_number_of_processes(run: str, folder: Path) -> None:
    whole, changed = losses(folder / "whole"), losses(folder / run)
    assert [line[:2] for line in whole] == [line[:2] for line in changed]
    for was, now in zip(whole, changed, strict=True):
        assert was[2] == pytest.approx(now[2], abs=1e-6)
    a, b = (load_file(folder / one / WEIGHTS) for one in ("whole", run))
    for key, value in a.items():
        torch.testing.assert_close(value, b[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("run", ["files-fsdp", "files-hybrid"])
def test_a_run_over_a_sharded_base_equals_one_process(run: str, folder: Path) -> None:
    for was, now in zip(losses(folder / "files"), losses(folder / run), strict=True):
        assert was[:2] == now[:2]
        assert was[2] == pytest.approx(now[2], abs=1e-6)
    model, rows = tiny.bert(num_labels=2), torch.randint(5, 60, (2, 8))
    both = []
    for one in ("files", run):
        esp.load(model, folder / one, name=one, check_base=False)
        both.append(model.eval()(input_ids=rows).logits)
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4)


def test_one_process_saves_and_all_load_what_is_whole_in_each(found: Any, folder: Path) -> None:
    model = tiny.llama()
    esp.load(model, folder / "saved")  # compares the base's values, noted before it was cut
    assert esp.read_card(folder / "saved")["base"]["class"] == "LlamaForCausalLM"
    assert list(esp.active(model)) == ["saved"]
    for rank in (0, 1):
        assert all(found[rank][f"checks/{what}"] for what in ("merge", "twice", "calibrate"))
    assert found[0]["checks/generates"] == 13 + many.ROWS - 2


def test_processes_start_alike_and_drop_out_apart(found: Any) -> None:
    assert not torch.equal(found[0]["drawn/drawn"], found[1]["drawn/drawn"])


def test_the_launcher_says_who_ended_the_others(folder: Path) -> None:
    assert "process 1 of 2 ended (exit code 7)" in (folder / "err.txt").read_text()
    out = (folder / "out.txt").read_text()
    assert [f"process {rank} is done" in out for rank in (0, 1)] == [True, True]
    assert "Traceback" not in (folder / "err.txt").read_text()
    assert "SIGKILL, as when the machine's memory is full" in launch.ended(3, 8, -9)


# ------------------------------------------------------------------------------------ one process


def test_blocks_are_found_in_any_model() -> None:
    assert blocks(zoo.llama()) == ["model.layers.0", "model.layers.1"]
    assert blocks(zoo.bert()) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert [p.split(".")[0] for p in blocks(zoo.t5())] == ["decoder"] * 2 + ["encoder"] * 2


def test_nothing_is_sharded_without_processes() -> None:
    with pytest.raises(SettingError, match="espalier launch"):
        esp.shard(tiny.llama())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quantize": "nf4"}, "36 GB"),
        ({"trunk_cache": "memory"}, "choose one"),
        ({"compile": "layers"}, "choose one"),
        ({"offload": "cpu"}, "choose one"),
        ({"batch": "auto"}, "give a number"),
        ({"generate": True, "task": "seq2seq"}, "encoder alone"),
    ],
)
def test_settings_that_no_shard_keeps_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        esp.RunConfig(model="m", train="t", sharding="fsdp", **settings)


def test_deepspeed_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="pip install deepspeed"):
        processes.accelerator(esp.RunConfig(model="m", train="t", sharding="zero3"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SettingError, match="sharding='zero3'"):
        processes.accelerator(esp.RunConfig(model="m", train="t"))


def test_one_process_says_that_nothing_is_spread(capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"batch": 4, "threads": 1, "sharding": "fsdp", "dry_run": True}
    esp.fit(tiny.llama(), tiny.tokenizer("gpt2"), tiny.sums(8), "IA3()", **settings)
    assert "sharding='fsdp' does nothing in one process" in capsys.readouterr().out


def test_other_steps_are_not_resumed(folder: Path) -> None:
    config = esp.RunConfig(model="m", train="t", accumulate=3)
    run = {"fixed": {"config": config.to_dict(), "processes": 2, "data": "", "total": 1}}
    (folder / "run.json").write_text(json.dumps({**run, "position": {}, "offset": 0}))
    fixed = state.Fixed(config, 1, 3, "", 1)
    with pytest.raises(SettingError, match="Write accumulate=2"):
        state.read_position(folder, fixed)
    with pytest.raises(SettingError, match="number of processes that divides 6"):
        state.read_position(folder, state.Fixed(config, 1, 4, "", 1))
    state.read_position(folder, state.Fixed(config.replace(accumulate=2), 1, 3, "", 1))


def test_a_process_whose_others_are_gone_says_so() -> None:
    class Two:
        num_processes, process_index = 2, 1

    with (
        pytest.raises(TrainingError, match="Process 1 of 2 waited in vain"),
        processes.together(Two()),  # type: ignore[arg-type]
    ):
        raise RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1234")
    with pytest.raises(RuntimeError, match="shapes"), processes.together(Two()):  # type: ignore[arg-type]
        raise RuntimeError("shapes do not fit")


def test_the_launcher_hands_accelerate_what_is_not_its_default() -> None:
    from accelerate.commands.launch import launch_command_parser

    options = {"num_processes": 16, "num_machines": 2, "machine_rank": 1}
    options |= {"main_process_ip": "10.0.0.1", "main_process_port": 29500, "gpu_ids": None}
    words = launch.arguments(options, [], ["--config", "run.yaml", "--rank", "8"])
    args = launch_command_parser().parse_args(words)
    assert (args.num_processes, args.num_machines, args.machine_rank) == (16, 2, 1)
    assert (args.main_process_ip, args.main_process_port) == ("10.0.0.1", 29500)
    assert (args.mixed_precision, args.multi_gpu, args.module) == ("no", True, True)
    assert args.training_script == "espalier"
    assert args.training_script_args == ["train", "--config", "run.yaml", "--rank", "8"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--num-machines 2", "--main-process-ip 10.0.0.1"),
        ("--num-machines 2 --num-processes 3", "shared evenly"),
        ("--num-machines 2 --machine-rank 2 --main-process-ip a", "from 0 to 1"),
        ("--num-processes 0", "at least 1"),
    ],
)
def test_the_launcher_refuses_what_cannot_be(words: str, said: str, capsys: Any) -> None:
    assert main(["launch", "--cpu", *words.split()]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What processes would have been started with."""
    words: list[list[str]] = []

    def stand_in(args: Any) -> None:
        words.append(list(args.training_script_args))

    monkeypatch.setattr("accelerate.commands.launch.multi_gpu_launcher", stand_in)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the launcher sets both, for its processes
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return words


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rang", "3"], "did you mean '--rank'"),
        (["--rank", "none"], "rank must be a whole number"),
        (["--batch", "0"], "batch must be at least 1"),
        (["--method", "lorra"], "no method 'lorra'"),
    ],
)
def test_mistakes_are_said_once_before_processes_start(
    words: list[str], said: str, started: list[list[str]], capsys: Any
) -> None:
    common = ["launch", "--cpu", "--num-processes", "2", "--model", "m", "--train", "t.csv"]
    assert main([*common, *words]) == 2
    assert capsys.readouterr().err.count(said) == 1
    assert started == []
    assert main(common) == 0
    assert len(started) == 1


def test_the_launcher_chooses_the_folder_and_keeps_a_chosen_one(
    started: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["launch", "--cpu", "--num-processes", "2", "--model", "m", "--train", "mail.csv"]
    assert main(common) == main([*common, "--rank", "4"]) == main([*common, "--out", "mine"]) == 0
    assert [words[words.index("--out") + 1] for words in started] == [
        "runs/mail-lora",
        "runs/mail-lora-rank-4",
        "mine",
    ]


def test_a_stopped_launch_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = tmp_path / "run"

    def stopped(_: Any) -> None:
        (run / "state" / "step-40").mkdir(parents=True)
        (run / "state" / "step-40" / "run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("accelerate.commands.launch.multi_gpu_launcher", stopped)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    words = ["--cpu", "--num-processes", "2", "--model", "m", "--train", "t.csv", "--out", run]
    assert main(["launch", *map(str, words)]) == 130
    said = " ".join(capsys.readouterr().err.split())
    assert "step 40 is the last that was saved" in said
    again = f"espalier launch --num-processes 2 --cpu --config {run / 'config.yaml'} --resume"
    assert again in said
    assert said.count("Stopped") == 1
    # The words that it names are such as it takes.
    (run / "config.yaml").write_text(esp.RunConfig(model="m", train="t.csv", out=run).to_yaml())
    started: list[Any] = []
    monkeypatch.setattr("accelerate.commands.launch.multi_gpu_launcher", started.append)
    assert main(again.split()[1:]) == 0
    assert started[0].num_processes == 2


def test_one_process_runs_without_a_launcher(folder: Path, capsys: Any) -> None:
    words = ["--model", str(folder / "base"), "--train", str(folder / "rows.jsonl"), "--dry-run"]
    assert main(["launch", "--cpu", *words, "--batch", "4", "--rank", "3", "--threads", "1"]) == 0
    assert "LoRA(rank=3)" in capsys.readouterr().out
    assert main(["launch", "--cpu", *words, "--batch", "0"]) == 2
