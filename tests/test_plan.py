"""Planning: what is foretold without memory is what is counted on real tensors, byte for byte."""

from __future__ import annotations

import dataclasses
import gc
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import espalier as esp
import table
import tiny_runs as tiny
import zoo
from command_line import Command, write_rows
from espalier.errors import CheckpointError, SettingError, TrainingError
from espalier.fast import drop
from espalier.planning import fit
from espalier.planning.estimate import moments, of_step
from espalier.planning.rehearsal import Rehearsal
from espalier.planning.setup import Setup, of_model, task_named
from espalier.planning.trace import Course, Held, Tracer
from espalier.recipes import recipe
from espalier.training import RunConfig
from espalier.training.evaluate import inputs
from espalier.training.models import checkpointed
from graded import saved_bytes

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing"),
    pytest.mark.filterwarnings("ignore:A single label was found"),
]
RECIPES = ("LoRA(sites='all-linear')", "FullTuning()", "PrefixTuning(length=4)")


def setup_of(model: Any, method: str, **changes: Any) -> Setup:
    known = of_model(model, task_named(None, model.config))
    sizes = {"batch": 3, "length": 9, "target_length": 5}
    return Setup(**known, recipe=recipe(method), **sizes | changes)


def counted(model: Any, setup: Setup, vocabulary: int, batch: dict[str, Tensor]) -> Course:
    """The second step on real tensors under the same watch."""
    esp.attach(model, setup.recipe)
    adapter = next(iter(model.espalier.adapters.values()))
    own = [t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values())]
    standing = {
        "weights": [t for t in own if t is not None],
        "adapter": list(adapter.runs.values()),
        "activations": list(batch.values()),
    }
    tracer = Tracer({}, 0)
    model.train()
    gc.disable()  # what only it frees is counted as not freed
    with checkpointed(model, setup.checkpointing):
        for _ in range(2):  # the first finds out what can be quick
            for parameter in esp.parameters(model):
                parameter.grad = None
            tracer = Tracer(standing, vocabulary)
            with tracer:
                given = inputs(setup.task, batch, setup.device, model.dtype)
                loss = setup.task.loss(model(**given), batch) * 1.0
                tracer.mark("backward")
                loss.backward()
    gc.enable()
    return tracer.course


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_saved_and_peak_bytes_are_those_of_a_real_step(family: str, method: str) -> None:
    case = zoo.BY_NAME[family]
    model = case.make()
    batch = {key: value.clone() for key, value in case.batch().items()}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -1] = 0  # texts of one length alone need no mask
    for checkpointing in (False, True):
        setup = setup_of(model, method, checkpointing=checkpointing)
        rehearsal = Rehearsal(setup)
        told = rehearsal.step(setup)
        real = counted(case.make(), setup, rehearsal.vocabulary, batch)
        assert told.saved() == real.saved()
        assert max(told.line()) == max(real.line())


@pytest.mark.parametrize("small", [0, drop.SMALL])
def test_saved_bytes_agree_with_autograd_own_hooks(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another oracle: what autograd says it saves, each storage once, parameters left out."""
    monkeypatch.setattr(drop, "SMALL", small)  # the base's dropout by a seed, and torch's own
    model = zoo.bert()
    setup = setup_of(model, RECIPES[0])
    told = Rehearsal(setup).step(setup).saved()
    esp.attach(model, setup.recipe)
    model.train()
    batch = zoo.BY_NAME["bert"].batch()
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, -1] = 0
    kept = saved_bytes(model, batch)
    # Besides what is saved, the loss itself and the probabilities it was taken from are there.
    assert kept <= told <= 1.1 * kept


def test_the_line_of_what_is_held() -> None:
    held = [Held(10, 0, "weights"), Held(5, 1, "workspace", 2), Held(7, 3, "workspace", 3)]
    course = Course(held, length=3, extra={2: 100}, marks={"backward": 2})
    assert course.line() == [10, 15, 115, 17]
    assert course.parts(2) == {"weights": 10, "workspace": 105}
    with Tracer({}, 0) as tracer:
        x = torch.ones(4, 8)
        y = x @ torch.ones(8, 2)
        del x
        y = y + 1
    line = tracer.course.line()
    assert max(line) == 4 * (32 + 16 + 8)
    assert line[-1] == 4 * (8 + 8 + 16) - 4 * 16  # the two results
    work = tracer.course.work
    assert (work.kernels, work.gemms) == (4, 1)  # two fillings, a product, a sum
    assert work.flops == 2 * 4 * 8 * 2
    assert work.fed == 4 * (4 * 8 + 8 * 2 + 4 * 2)
    with Tracer({}, 0) as again:
        y.addmm_(torch.ones(4, 8), torch.ones(8, 2))
    assert again.course.work.flops == work.flops  # in place it is the same product


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_what_products_leave_with_the_library(threads: Callable[[int], None]) -> None:
    def left(*products: tuple[int, int, int], dtype: torch.dtype = torch.float32) -> int:
        with FakeTensorMode(), Tracer({}, 0) as tracer:
            for rows, inner, columns in products:
                torch.empty(rows, inner, dtype=dtype) @ torch.empty(inner, columns, dtype=dtype)
        return tracer.course.panels.bytes

    small, large = (1024, 256, 512), (1024, 256, 2048)
    threads(1)
    assert left(small) == 4 * 256 * (512 + 400)
    assert left(large, small, large) == left(large)  # what fits takes what is there
    assert left(small, large) == left(small) + left(large)  # what does not gets its own
    assert left((1024, 256, 10**6)) == left((1024, 256, 10**7))  # a panel at a time
    assert left((64, 256, 512)) == 0
    assert left(small, dtype=torch.bfloat16) == 0
    threads(2)
    assert left((64, 256, 512)) > 0
    threads(4)
    assert left(large) == 4 * 4 * 256 * (512 + 400)  # columns are shared out, rows are not


def test_libraries_are_a_part_of_the_plan(threads: Callable[[int], None]) -> None:
    model = zoo.llama()
    threads(1)
    one = esp.plan(model, "LoRA()", batch=64, length=16, device="cpu")
    threads(4)
    four = esp.plan(model, "LoRA()", batch=64, length=16, device="cpu")
    more = four.parts["libraries"] - one.parts["libraries"]
    assert one.parts["libraries"] > 0 < more
    assert four.peak - one.peak == more == four.evaluation - one.evaluation


def test_more_of_everything_takes_more_and_checkpointing_less() -> None:
    model = zoo.llama()
    setup = setup_of(model, "IA3()", batch=4, length=16)
    rehearsal = Rehearsal(setup)

    def peak(**changes: Any) -> int:
        return of_step(rehearsal, dataclasses.replace(setup, **changes)).peak

    base = peak()
    assert peak(batch=2) < base < peak(batch=8)
    assert peak(length=8) < base < peak(length=32)
    assert peak(checkpointing=True) < base
    assert base <= peak(accumulate=4)
    assert Rehearsal(setup).step(setup).line() == Rehearsal(setup).step(setup).line()


def test_weights_in_four_bits_are_counted_as_they_are_stored() -> None:
    pytest.importorskip("bitsandbytes")
    model = zoo.llama()
    plain = esp.plan(model, "LoRA()", batch=2, length=8, device="cpu")
    packed = esp.plan(model, "LoRA()", batch=2, length=8, device="cpu", quantize="nf4")
    told = esp.quantize(model, "nf4")
    buffers = sum(b.nbytes for b in model.buffers())
    assert packed.parts["weights"] == (told.measured or 0) + buffers
    assert packed.parts["weights"] < plain.parts["weights"]
    assert packed.total == plain.total


def test_moments_of_the_optimisers() -> None:
    assert moments([5000, 100], "adamw") == 8 * 5100
    eight = moments([5000, 100], "adamw_8bit")
    import bitsandbytes as bnb

    numbers = [torch.nn.Parameter(torch.ones(n)) for n in (5000, 100)]
    made = bnb.optim.AdamW8bit(numbers, lr=1e-3)
    for parameter in numbers:
        parameter.grad = torch.ones_like(parameter)
    made.step()
    held = {t.data_ptr(): t.nbytes for s in made.state.values() for t in s.values()
            if isinstance(t, Tensor)}  # fmt: skip
    assert eight == pytest.approx(sum(held.values()), abs=64)


def folder_of(tmp_path: Path, **changes: Any) -> str:
    config = tf.LlamaConfig(
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
           "num_attention_heads": 4, "tie_word_embeddings": False, "pad_token_id": 0, **changes},
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_a_configuration_alone_is_enough_and_ways_out_fit(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    whole = esp.plan(folder, "LoRA()", batch=8, length=64, device="cpu")
    named = esp.plan(f"{folder}/config.json", "LoRA()", batch=8, length=64, device="cpu")
    assert whole.parts == named.parts
    rest = whole.parts["weights"] + whole.parts["adapter"] + whole.parts["optimiser"]
    found = esp.plan(
        folder, "LoRA()", batch=8, length=64, device="cpu", memory=rest + (whole.needed - rest) // 3
    )
    last = found.ways[-1]
    assert last.fits
    assert last.plan.setup.batch * last.plan.setup.accumulate == 8  # the same step
    assert last.plan.needed <= (found.memory or 0) < whole.needed
    # The next larger batch that keeps the step does not fit.
    larger = dataclasses.replace(last.plan.setup, batch=2 * last.plan.setup.batch)
    assert of_step(Rehearsal(larger), larger).needed > (found.memory or 0)
    assert f"--batch {last.plan.setup.batch}" in fit.command(last.plan.setup)


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_ways_out_ask_for_nothing_that_later_ones_made_needless(
    tmp_path: Path, share: float
) -> None:
    folder, how = folder_of(tmp_path), {"batch": 4, "length": 256, "device": "cpu"}
    small = esp.plan(folder, "LoRA(sites='attention.q, attention.v')", **how).needed  # type: ignore[arg-type]
    whole = esp.plan(folder, "FullTuning()", **how).needed  # type: ignore[arg-type]
    memory = round(small + share * (whole - small))
    found = esp.plan(folder, "FullTuning()", **how, memory=memory)  # type: ignore[arg-type]
    last = found.ways[-1]
    assert last.fits
    for names in (("optimizer",), ("checkpointing",), ("length", "target_length")):
        back = {name: getattr(found.setup, name) for name in names}
        undone = dataclasses.replace(last.plan.setup, **back)
        if undone != last.plan.setup:
            assert of_step(Rehearsal(undone), undone).needed > memory


def test_the_command_says_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command(capsys)
    words = ["plan", "--model", folder_of(tmp_path), "--method", "lora", "--rank", 4]
    words += [
        "--batch",
        4,
        "--length",
        32,
        "--device",
        "cpu",
        "--sites",
        "attention.q, attention.v",
    ]
    said = command(*words, "--memory", "1GB")
    assert said.code == 0
    for part in ("weights", "activations", "peak of a step", "TFLOP", "It fits in 1.0 GB"):
        assert part in said.out
    told = json.loads(command(*words, "--json").out)
    assert told["peak"] == sum(told["parts"].values())
    assert told["trained"] == 2 * 4 * 2 * 2 * 64  # layers × rank × (q, v) × (in + out)
    said = command(*words, "--memory", "100kB")
    assert "Nothing that is known here makes it fit" in said.out


def test_bad_input_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = Command(capsys)
    folder = folder_of(tmp_path)
    command.fails("plan", "--model", tmp_path / "none", saying=["There is no model folder"])
    command.fails("plan", "--model", folder, "--memory", "lots", saying=["memory", "'lots'"])
    command.fails("plan", "--model", folder, "--batch", 0, saying=["batch", "at least 1"])
    command.fails("plan", "--model", folder, "--rang", 4, saying=["no flag --rang", "rank"])
    for flag in ("--train", "--limit", "--steps", "--max_length", "--learning_rate"):
        saying = ["`espalier plan` takes no --", "reads no data", "--batch, --length"]
        command.fails("plan", "--model", folder, flag, 4, saying=saying)
    command.fails("plan", "--model", folder, "--lenght", 4, saying=["did you mean '--length'"])
    command.fails("inspect", folder, "--train", "x", saying=["`espalier inspect` takes no --train"])
    command.fails("plan", "--model", folder, "--task", "seq2seq", saying=["llama", "seq2seq"])
    with pytest.raises(CheckpointError):
        esp.plan(str(tmp_path / "config.txt"))
    assert fit.bytes_of("24GB") == 24 * 10**9
    assert fit.bytes_of("1.5 GiB") == 3 * 2**29
    assert fit.bytes_of(800) == 800


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    base = tiny.save_model(tmp_path / "bert", tiny.bert(num_labels=2), tiny.tokenizer())
    data = write_rows(tmp_path / "train.jsonl", tiny.reviews(40))
    return {
        "model": base, "train": str(data), "method": "LoRA(rank=2)", "batch": "auto", "epochs": 2,
        "threads": 1, "quiet": True, "head": ["classifier"], "out": tmp_path / "run",
    }  # fmt: skip


def test_batch_auto_keeps_the_step_and_resumes(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(**run)
    with pytest.raises(SettingError, match="settled"):
        config.rows  # noqa: B018
    roomy = esp.train(config.replace(out=run["out"].with_name("roomy"), steps=1, warmup=0))
    assert RunConfig.from_yaml((roomy.folder or Path()) / "config.yaml").batch == 16

    model = tiny.bert(num_labels=2)
    whole = esp.plan(model, "LoRA(rank=2)", batch=16, length=12, device="cpu", head=["classifier"])
    part = esp.plan(model, "LoRA(rank=2)", batch=4, length=12, device="cpu", head=["classifier"])
    room = (whole.needed + part.needed) // 2
    monkeypatch.setattr("espalier.planning.auto.available", lambda *_: room)
    monkeypatch.setattr("espalier.training.finish.keep", _stopped)
    with pytest.raises(KeyboardInterrupt):
        esp.train(config)
    written = RunConfig.from_yaml(run["out"] / "config.yaml")
    assert written.rows < 16
    assert written.rows_per_step == 16
    monkeypatch.undo()  # there is room for more now, and it goes on as it began
    result = esp.train(config.replace(resume=True))
    assert result.steps == 2 * 3  # 36 rows in steps of 16


def _stopped(*_: object) -> None:
    raise KeyboardInterrupt


def test_batch_auto_says_when_nothing_fits(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.planning.auto.available", lambda *_: 1000)
    with pytest.raises(SettingError, match=r"(?s)no room for one example.*A step takes .*weights"):
        esp.train(RunConfig(**run))
    assert not run["out"].exists()


def test_out_of_memory_points_to_the_plan(
    run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("espalier.training.loop.Loop.run", full)
    with pytest.raises(TrainingError) as caught:
        esp.train(RunConfig(**run | {"batch": 16}))
    said = str(caught.value)
    for part in ("batch=16", "A step takes", "activations", "espalier plan --model", "--memory"):
        assert part in said
    assert "1. batch=" in said
    monkeypatch.setattr("espalier.planning.auto.of_step", full)
    with pytest.raises(TrainingError, match=r"(?s)What helps.*1\. batch=4 with accumulate=4"):
        esp.train(RunConfig(**run | {"batch": 16, "overwrite": True}))


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("dora", "sparse", "diffpruning", "pile", "ladder")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in table.METHODS
    ],
)
def test_every_recipe_can_be_planned(name: str) -> None:
    found = esp.plan(zoo.bert(), table.METHODS[name], batch=2, length=8, device="cpu")
    assert found.peak > found.parts["weights"] > 0
    assert found.trained > 0
