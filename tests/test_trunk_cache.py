"""A frozen trunk runs once: training on its kept states equals training with the trunk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
import tiny_runs as tiny
import zoo
from espalier.errors import SettingError
from espalier.training import RunConfig, trunk_store
from espalier.training.loop import Loop
from espalier.training.trunk_cache import TrunkCache
from espalier.trunk import Replay, State, cut

Fitted = tuple[Any, Any]


def bert(**settings: Any) -> Any:
    return tiny.bert(num_labels=2, **settings)


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {"question": f"the {i % 10} is", "choices": ["good", "very bad", "sad"], "label": i % 3}
        for i in range(count)
    ]


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"source": row["prompt"], "target": row["completion"]} for row in tiny.sums(count)]


# Model, tokenizer, rows, method, further settings, and modules that must not run in training.
# fmt: off
CASES: dict[str, tuple[Any, ...]] = {
    "bert, LoRA above": (
        bert, "bert", tiny.reviews, "LoRA(rank=2, sites='all-linear@last1')", {},
        ["encoder.layer.0"],
    ),
    "bert, a head alone": (
        bert, "bert", tiny.reviews, "HeadOnly()", {"head": ["classifier"]},
        ["encoder.layer.0", "encoder.layer.1"],
    ),
    "llama, the last layer": (
        tiny.llama, "plain", tiny.sums, "PartialTuning(sites='block@last1')", {}, ["layers.0"]
    ),
    "llama, packed": (
        tiny.llama, "plain", tiny.sums, "LoRA(sites='all-linear@last1')",
        {"batching": "pack", "max_length": 24, "validation_share": 0}, ["layers.0"],
    ),
    "llama, several rows of one example": (
        tiny.llama, "plain", questions, "LoRA(rank=2, sites='attention.q@last1')",
        {"task": "choices"}, ["layers.0"],
    ),
    "gpt2, checkpointed": (
        tiny.gpt2, "plain", tiny.sums, "LoRA(sites='ffn.out@last1')", {"checkpointing": True},
        ["h.0"],
    ),
    "t5, both stacks": (
        tiny.t5, "t5", pairs, "PartialTuning(sites='block@last1')", {},
        ["encoder.block.0.layer.0", "encoder.block.0.layer.1"],
    ),
    "bert, a ladder": (
        bert, "bert", tiny.reviews, "LadderSideTuning(reduction=4)", {"head": ["classifier"]},
        ["encoder.layer.0", "encoder.layer.1"],
    ),
    "llama, a ladder": (
        tiny.llama, "plain", tiny.sums, "LadderSideTuning(reduction=4)", {},
        ["layers.0", "layers.1"],
    ),
    "t5, a ladder beside each stack": (
        tiny.t5, "t5", pairs, "LadderSideTuning(reduction=4)", {},
        [f"{stack}.block.{i}.layer.1" for stack in ("encoder", "decoder") for i in (0, 1)],
    ),
    "t5, above in the decoder": (
        tiny.t5, "t5", pairs, "LoRA(sites='decoder/all-linear@last1')", {},
        ["encoder.block.0.layer.1", "encoder.block.1.layer.1", "decoder.block.0.layer.1"],
    ),
}
# fmt: on


def fit(name: str, **settings: Any) -> Fitted:
    """A model and its result, three epochs of batches with padding."""
    make, words, rows, method, more, _ = CASES[name]
    model = make()
    shared = {
        "epochs": 3,
        "validation_share": 0.25,
        "batch": 4,
        "lr": 0.01,
        "threads": 1,
        "quiet": True,
        **more,
    }
    result = esp.fit(model, tiny.tokenizer(words), rows(20), method, **{**shared, **settings})
    return model, result


def numbers(model: nn.Module) -> Tensor:
    return torch.cat([p.detach() for p in esp.parameters(model)])


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch, *ends: str) -> Iterator[list[str]]:
    """The modules with these names that run while the loop does, with more than one row.

    What T5's first block makes of shapes alone is made from one row.
    """
    called: list[str] = []
    run = Loop.run

    def watched(loop: Loop) -> None:
        named = [(path, m) for path, m in loop.job.model.named_modules() if path.endswith(ends)]
        # What is within a block: the block itself is called, and gives what was kept.
        inside = [(path, child) for path, m in named for child in m.children()]
        inside = [pair for pair in inside if not isinstance(pair[1], nn.ModuleList)] or named

        def note(path: str, _m: nn.Module, _args: Any, y: Any) -> None:
            if len(y if isinstance(y, Tensor) else y[0]) > 1:
                called.append(path)

        hooks = [m.register_forward_hook(partial(note, path)) for path, m in inside]
        run(loop)
        for hook in hooks:
            hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", watched)
        yield called


@pytest.mark.parametrize("name", CASES)
def test_training_on_kept_states_equals_training_with_the_trunk(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = CASES[name][-1]
    with counting(monkeypatch, *frozen) as called:
        plain, expected = fit(name)
        assert called
        called.clear()
        cached, found = fit(name, trunk_cache="memory", trunk_dtype="fp32")
        assert not called  # neither in the steps nor in the evaluations
    assert (numbers(cached) - numbers(plain)).norm() < 1e-3 * numbers(plain).norm()
    for split, metrics in expected.metrics.items():
        assert found.metrics[split] == pytest.approx(metrics, rel=1e-4, abs=1e-5)
    same = zoo.logits(cached, {"input_ids": zoo._ids() % 60, **_decoded(cached)})
    torch.testing.assert_close(
        same, zoo.logits(plain, {"input_ids": zoo._ids() % 60, **_decoded(plain)}),
        rtol=1e-3, atol=1e-4,
    )  # fmt: skip


def _decoded(model: Any) -> dict[str, Tensor]:
    return {"decoder_input_ids": zoo._ids(3, 4) % 60} if model.config.is_encoder_decoder else {}


def test_states_in_half_precision_train_nearly_alike() -> None:
    plain, expected = fit("llama, the last layer")
    cached, found = fit("llama, the last layer", trunk_cache="memory")
    assert found.metrics["train"]["loss"] == pytest.approx(expected.metrics["train"]["loss"], 0.02)
    change = (numbers(cached) - numbers(plain)).norm() / numbers(plain).norm()
    assert 0 < change < 0.05


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "bart", "vit"])
def test_states_are_those_of_the_model_in_eval_mode(name: str) -> None:
    """The oracle is transformers' own list of hidden states; the replayed model is unchanged."""
    case = zoo.BY_NAME[name]
    model: Any = case.make()
    batch = case.batch()
    upper = "decoder/attention.q@last1" if name == "bart" else "attention.q@last1"
    esp.attach(model, esp.LoRA(rank=2, sites=upper), head=False)
    for path, parameter in model.espalier.named_parameters():
        nn.init.normal_(parameter, std=0.3) if "matrices" in path else None
    with torch.no_grad():
        whole = model(**batch, output_hidden_states=True)
    found = cut(model, lambda: zoo.logits(model, batch))
    replay, kept = Replay(model, found), dict[State, Tensor]()
    with torch.no_grad(), replay.recording(kept.__setitem__):
        model(**batch)
    if name == "bart":
        listed = [whole.encoder_hidden_states[-1], whole.decoder_hidden_states[1]]
    else:
        listed = [whole.hidden_states[1]]
    for states, expected in zip(kept.values(), listed, strict=True):
        assert torch.equal(states, expected)
    calls: list[str] = []
    lower = [m for p, m in model.named_modules() if ".0." in p and isinstance(m, nn.LayerNorm)]
    hooks = [m.register_forward_hook(lambda *_: calls.append("")) for m in lower]
    with replay.replaying(lambda state, _: kept[state]):
        assert torch.equal(zoo.logits(model, batch), whole.logits)
    assert not calls
    assert torch.equal(zoo.logits(model, batch), whole.logits)
    assert calls or name == "llama"  # whose norms are its own
    for hook in hooks:
        hook.remove()
    replay.leave()
    esp.detach(model, "default")
    assert not [path for path, m in model.named_modules() if "forward" in m.__dict__]


# ------------------------------------------------------------------------------------- on disk


def test_states_on_disk_are_found_again_and_never_those_of_other_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    inner = TrunkCache._pass

    def counted(self: TrunkCache, examples: Any, layout: Any, some: list[int]) -> Any:
        passes.append(len(some)) if layout.dtype == torch.bfloat16 else None  # no trial
        return inner(self, examples, layout, some)

    monkeypatch.setattr(TrunkCache, "_pass", counted)
    monkeypatch.setattr(trunk_store, "SHARD", 2000)  # several files
    on_disk = {"trunk_cache": "disk", "trunk_folder": tmp_path}
    name = "t5, above in the decoder"
    memory, _ = fit(name, trunk_cache="memory")
    passes.clear()
    first, _ = fit(name, **on_disk)
    assert sum(passes) == 20
    assert len(list(tmp_path.glob("*/encoder-*.safetensors"))) > 2
    assert torch.equal(numbers(first), numbers(memory))
    passes.clear()
    with monkeypatch.context() as full:  # what is there already needs no room
        full.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
        full.setattr("espalier.training.folders.check_space", lambda *_: None)
        again, _ = fit(name, **on_disk)
    assert not passes
    assert torch.equal(numbers(again), numbers(memory))
    fit(name, limit=12, **on_disk)  # other data
    assert sum(passes) == 12
    passes.clear()
    folders = {path.parent for path in tmp_path.glob("*/index.json")}
    assert len(folders) == 3  # train, validation, and train without its last rows
    for path in tmp_path.glob("*/decoder-0.safetensors"):  # damaged
        path.write_bytes(path.read_bytes()[:-4])
    mended, _ = fit(name, **on_disk)
    assert sum(passes) == 20
    assert torch.equal(numbers(mended), numbers(memory))
    assert {path.parent for path in tmp_path.glob("*/index.json")} == folders
    assert not list(tmp_path.glob("writing-*"))


def test_another_base_has_other_states(tmp_path: Path) -> None:
    on_disk = {"trunk_cache": "disk", "trunk_folder": tmp_path}
    fit("bert, LoRA above", **on_disk)
    before = set(tmp_path.iterdir())
    upper, lower = bert(), bert()
    with torch.no_grad():
        upper.bert.encoder.layer[1].output.dense.weight.mul_(1.1)
        lower.bert.encoder.layer[0].output.dense.weight.mul_(1.1)
    made = [(upper, 0), (lower, 2)]  # what lies above the cut does not count
    for model, new in made:
        method = "LoRA(rank=2, sites='all-linear@last1')"
        more = {"threads": 1, "quiet": True, "validation_share": 0.25}
        esp.fit(model, tiny.tokenizer(), tiny.reviews(20), method, batch=4, **more, **on_disk)
        assert len(set(tmp_path.iterdir()) - before) == new


def test_room_is_made_of_the_longest_unused_states_and_of_nothing_else(tmp_path: Path) -> None:
    import os

    names = ["a" * 24, "b" * 24, "photos", "writing-" + "c" * 24 + "-7"]
    for age, name in enumerate(names):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.safetensors").write_bytes(b"0" * 100)
        (tmp_path / name / "index.json").touch()
        os.utime(tmp_path / name / "index.json", (1e9 + age, 1e9 + age))
    trunk_store.make_room(tmp_path, 50, 260)
    assert {path.name for path in tmp_path.iterdir()} == set(names) - {"a" * 24}
    trunk_store.make_room(tmp_path, 50, 10)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "LoRA()"}, r"acts at bert\.encoder\.layer\.0\.\S+, in the first block"),
        ({"method": "LoRA(sites='embedding')"}, r"acts at bert\.embeddings\S+, below the blocks"),
        ({"method": "PromptTuning(length=2)"}, "puts words among those of the text"),
        ({"method": "PTuningV2(length=2)"}, r"in the first block.*block@last2"),
        ({"trunk_limit": 1e-6}, r"1 state of 1\d\d tokens take 1\d kB, more than trunk_limit=1e"),
        ({"trunk_cache": "none", "trunk_folder": "x"}, "trunk_folder is for trunk_cache='disk'"),
    ],
)  # fmt: skip
def test_what_cannot_be_cached_is_refused_with_the_first_place_in_the_way(
    settings: dict[str, Any], message: str
) -> None:
    model, method = bert(), settings.pop("method", "LoRA(rank=2, sites='all-linear@last1')")
    asked = {"trunk_cache": "memory", "quiet": True, "threads": 1, **settings}
    with pytest.raises(SettingError, match=message):
        esp.fit(model, tiny.tokenizer(), tiny.reviews(20), method, **asked)
    assert not [path for path, m in model.named_modules() if "forward" in m.__dict__]


def test_memory_that_is_not_free_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    free = psutil.virtual_memory()._replace(available=10_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    with pytest.raises(SettingError, match="10 kB of memory are free; use trunk_cache='disk'"):
        fit("bert, LoRA above", trunk_cache="memory")


def test_a_model_that_does_more_between_its_blocks_is_refused() -> None:
    """Here the pooler reads what the first block gives, past the second."""
    model, seen = bert(), []
    model.bert.encoder.layer[0].register_forward_hook(lambda _m, _a, y: seen.append(y))
    model.bert.pooler.register_forward_pre_hook(lambda _m, args: (args[0] + seen[-1],))
    with pytest.raises(SettingError, match="BertForSequenceClassification does more between"):
        esp.fit(
            model, tiny.tokenizer(), tiny.reviews(20), "HeadOnly()", head=["classifier"],
            trunk_cache="memory", quiet=True, threads=1,
        )  # fmt: skip


def test_layers_that_share_one_block_are_refused() -> None:
    import transformers as tf

    config = tf.AlbertConfig(
        vocab_size=tiny.SIZE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, embedding_size=16,
    )  # fmt: skip
    model = tf.AlbertForSequenceClassification(config)
    with pytest.raises(SettingError, match="share one block"):
        esp.fit(
            model, tiny.tokenizer(), tiny.reviews(20), "HeadOnly()", head=["classifier"],
            trunk_cache="memory", quiet=True, threads=1,
        )  # fmt: skip


# ------------------------------------------------------------------------------------ whole runs


def test_a_resumed_run_equals_one_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_model(tmp_path / "base", bert(dropout=0.1), tiny.tokenizer())
    data = tmp_path / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.reviews(40)))
    settings: dict[str, Any] = {
        "model": base, "train": str(data), "method": "LoRA(rank=2, sites='all-linear@last1')",
        "batch": 4, "epochs": 3, "lr": 0.01, "save_every": 4, "head": ["classifier"], "threads": 1,
        "quiet": True, "trunk_cache": "memory",
    }  # fmt: skip
    esp.train(RunConfig(**settings, out=tmp_path / "whole"))
    step, out = Loop._step, tmp_path / "stopped"

    def stopping(loop: Loop, *given: Any) -> None:
        if loop.at.step == 14:
            raise KeyboardInterrupt
        step(loop, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            esp.train(RunConfig(**settings, out=out))
    with pytest.raises(SettingError, match="trunk_cache: was 'memory', now 'none'"):
        esp.train(RunConfig(**{**settings, "trunk_cache": "none"}, out=out, resume=True))
    esp.train(RunConfig(**settings, out=out, resume=True))
    weights = "adapter/adapter.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_the_plan_says_what_is_left_out_and_what_it_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit("t5, above in the decoder", trunk_cache="memory", quiet=False, dry_run=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "of 4 blocks the encoder's lowest 2 and the decoder's lowest 1 run once" in said
    assert "2 states of 32 numbers (bf16)" in said
    assert "kB in memory" in said
