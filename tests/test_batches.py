"""What a step is given: packed texts apart, batches made ahead, precision, activations moved."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import espalier as esp
import tiny_runs as tiny
from espalier.data import batches, pack
from espalier.data import separation as separating
from espalier.data.separation import Separation, separation, sizes_of
from espalier.errors import SettingError, TrainingError
from espalier.fast import segments
from espalier.tasks.causal import Causal
from espalier.training import models, prefetch
from espalier.training.loop import Loop
from espalier.training.offload import offloaded

WAYS = ["segments", "positions", "mask"]
DECODERS = pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])


def fit(model: nn.Module, rows: int = 12, **settings: Any) -> esp.RunResult:
    given: dict[str, Any] = {
        "batch": 64, "steps": 4, "warmup": 0, "lr": 0.02, "max_length": 32, "threads": 1,
        "validation_share": 0, "keep": "last", "quiet": True, **settings,
    }  # fmt: skip
    return esp.fit(model, tiny.tokenizer("gpt"), tiny.sums(rows), "LoRA(rank=2)", **given)


def curve(result: esp.RunResult) -> list[tuple[float, float]]:
    lines = [line for line in result.history if line["kind"] == "train"]
    return [(line["loss"], line["grad_norm"]) for line in lines]


# ------------------------------------------------------------------------------------- packing


@DECODERS
@pytest.mark.parametrize("way", WAYS)
def test_packed_and_unpacked_steps_are_the_same(
    make: Callable[[], Any], way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same targets in each step: the same gradient, and the same losses ever after."""
    monkeypatch.setattr(separating, "separation", lambda *_, **__: Separation(way, True, DTYPE))
    forget, grads = Loop._forget, list[list[Tensor]]()

    def forgets(self: Loop) -> None:
        grads.append([p.grad.clone() for p in self.parameters if p.grad is not None])
        forget(self)

    monkeypatch.setattr(Loop, "_forget", forgets)
    apart, packed = (torch.tensor(curve(fit(make(), batching=b))) for b in ("bucket", "pack"))
    assert len(apart) == len(packed) == 4
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[4], grads[0], rtol=1e-5, atol=1e-6)  # before Adam's division


DTYPE = torch.float32
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2}, "segments"),
    "mistral": ({"num_key_value_heads": 2, "sliding_window": 4}, "segments"),
    "gemma2": ({"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}, "positions"),
    "falcon": ({"ffn_hidden_size": 64, "alibi": False}, "mask or positions"),  # since 5.24
    "mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, "mask"),
}


def decoder(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(5)
    config = tf.AutoConfig.for_model(kind, **SMALL, **settings)
    return tf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_way_is_found_by_trial_and_texts_are_what_they_are_alone(kind: str) -> None:
    settings, way = KINDS[kind]
    model = decoder(kind, settings)
    found = separation(model, 24)
    assert isinstance(found, Separation)
    assert found.way in way.split(" or ")
    rows = pack(texts(11, 5, 7, 9, 3), 16)
    assert len({len(row["input_ids"]) for row in rows}) > 1  # so that one of them is padded
    batch = found.batch(Causal().collate(rows, tiny.tokenizer("gpt")), sizes_of(rows))
    with torch.no_grad(), found.holding(model, sizes_of(rows)):
        together = model(**Causal().inputs(batch)).logits
    for row, logits in zip(rows, together, strict=True):
        for at in split(row):
            ids = torch.tensor([row["input_ids"]])[:, at]
            with torch.no_grad():
                torch.testing.assert_close(logits[at], model(ids).logits[0], rtol=1e-4, atol=1e-4)


def texts(*lengths: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    made = [[rng.randrange(5, 60) for _ in range(length)] for length in lengths]
    return [{"input_ids": i, "labels": i, "full": 0, "cut": 0, "chars": len(i)} for i in made]


def split(row: dict[str, Any]) -> list[slice]:
    bounds, start = [], 0
    for size in sizes_of([row])[0]:
        bounds.append(slice(start, start + size))
        start += size
    return bounds


def test_a_prefix_has_its_own_keys_so_packed_texts_are_told_apart_otherwise() -> None:
    model = tiny.llama()
    esp.attach(model, "PrefixTuning(length=3)")
    found = separation(model, 24)
    assert isinstance(found, Separation)
    assert found.way == "positions"


def test_windows_longer_than_any_short_text_are_noticed() -> None:
    """A mask hides other texts, but a model that takes a mask as it is forgets its window."""
    model = decoder("mistral", {"num_key_value_heads": 2, "sliding_window": 12})
    works = separating._works
    mask = Separation("mask", True, DTYPE)
    assert works(model, mask, 12)
    assert not works(model, mask, 40)


def test_a_run_that_would_mix_its_texts_is_refused_and_leaves_no_adapter() -> None:
    model = decoder("bloom", {"n_layer": 2, "n_head": 4})
    with pytest.raises(SettingError, match=r"see each other\. Use bucket"):
        fit(model, batching="pack")
    esp.attach(model, "LoRA(rank=2)")  # the name is free


@DECODERS
def test_no_mask_is_made_for_segments_and_the_model_is_as_it_was(make: Callable[[], Any]) -> None:
    model = make().eval()
    before, seen = model.config._attn_implementation, []
    inner = segments.attention

    def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(args[3])
        return inner(module, *args, **kwargs)

    rows = pack(texts(6, 5, 4), 16)
    found = Separation("segments", True, DTYPE)
    batch = found.batch(Causal().collate(rows, tiny.tokenizer("gpt")), sizes_of(rows))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(segments, "attention", watched)
        with found.holding(model, sizes_of(rows)):
            model(**Causal().inputs(batch))
    assert seen == [None, None]
    assert model.config._attn_implementation == before
    assert segments.held() is None


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packing_goes_with_checkpointing_eight_bits_and_a_bf16_base(checkpointing: bool) -> None:
    pytest.importorskip("bitsandbytes")
    model = tiny.llama().to(torch.bfloat16)
    result = fit(model, batching="pack", checkpointing=checkpointing, optimizer="adamw_8bit")
    losses = [loss for loss, _ in curve(result)]
    assert losses[-1] < losses[0]


def test_attention_of_texts_in_bf16_takes_no_more_than_rounding_from_that_in_fp32() -> None:
    module = SimpleNamespace(training=True, is_causal=True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, 12, 8) for heads in (4, 2, 2))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with segments.holding(nn.Module(), [[5, 7], [9]]):
            out, _ = segments.attention(module, *given, None)  # type: ignore[arg-type]
        out.square().sum().backward()
        assert not out[1, 9:].any()  # padding
        found.append([out.detach().float(), *(x.grad.float() for x in given)])  # type: ignore[union-attr]
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0.05)


# ------------------------------------------------------------------------------------- batches


def lengths(count: int = 2000) -> list[int]:
    """Like instructions with answers: a median of 90 tokens, a long tail."""
    rng = random.Random(0)
    return [max(8, min(512, int(rng.lognormvariate(4.5, 0.8)))) for _ in range(count)]


def test_buckets_and_packing_compute_little_more_than_the_real_tokens() -> None:
    rows = texts(*lengths())
    real = sum(len(row["input_ids"]) for row in rows)

    def computed(examples: list[dict[str, Any]], how: Any) -> float:
        groups = batches(examples, 8, how=how, seed=1)
        widths = [max(len(examples[i]["input_ids"]) for i in group) for group in groups]
        return sum(w * len(g) for w, g in zip(widths, groups, strict=True)) / real

    assert computed(rows, "bucket") <= 1.06
    assert computed(pack(rows, 512), "pack") <= 1.02
    assert computed(rows, "random") > 1.8


def test_batches_are_made_ahead_in_order_and_only_a_few() -> None:
    made: list[int] = []

    def make(item: int) -> int:
        made.append(item)
        return 10 * item

    coming = prefetch.ahead(make, range(20))
    assert next(coming) == (0, 0)
    assert max(made, default=0) <= prefetch.AHEAD
    assert [*coming] == [(i, 10 * i) for i in range(1, 20)]
    assert made == [*range(20)]


def test_an_error_in_the_thread_is_raised_in_its_turn_and_names_the_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inner = Causal.collate

    def collate(self: Causal, examples: Any, tokenizer: Any) -> Any:
        if any(example.get("broken") for example in examples):
            raise ValueError("it is broken")
        return inner(self, examples, tokenizer)

    encode = Causal.encode

    def spoil(self: Causal, rows: Any, *how: Any) -> Any:
        examples = encode(self, rows, *how)
        for row, example in zip(rows, examples, strict=True):
            if row.where.endswith("row 7"):
                example["broken"] = 1
        return examples

    monkeypatch.setattr(Causal, "collate", collate)
    monkeypatch.setattr(Causal, "encode", spoil)
    with pytest.raises(TrainingError, match=r"No batch can be made of [^,]*row 7: it is broken"):
        fit(tiny.llama(), batch=2, steps=6)
    assert not [t for t in threading.enumerate() if t.name.startswith("espalier-batches")]


@pytest.mark.parametrize("batching", ["bucket", "pack"])
def test_a_stopped_run_goes_on_with_the_batches_it_would_have_met(
    batching: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save_model(tmp_path / "base", tiny.llama(), tiny.tokenizer("gpt"))
    data = tmp_path / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.sums(30)))

    def run(name: str, **more: Any) -> list[tuple[float, float]]:
        config = esp.RunConfig(
            model=base, train=str(data), out=tmp_path / name, batching=batching, batch=2,  # type: ignore[arg-type]
            steps=9, warmup=0, max_length=24, save_every=2, threads=1, quiet=True,
            validation_share=0, **more,
        )  # fmt: skip
        return curve(esp.train(config))

    whole = run("whole")
    inner = Loop._step

    def stops(self: Loop, *given: Any) -> None:
        if self.at.step == 5:
            raise KeyboardInterrupt
        inner(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_step", stops)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert run("stopped", resume=True) == whole
    a, b = ((tmp_path / name / "adapter").rglob("*.safetensors") for name in ("whole", "stopped"))
    assert [path.read_bytes() for path in a] == [path.read_bytes() for path in b]


# ------------------------------------------------------------------------- precision and memory


def test_auto_is_bf16_for_wide_models_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cpu, wide, narrow = torch.device("cpu"), tf.BertConfig(hidden_size=256), tiny.llama().config
    monkeypatch.setattr(models, "has_bf16_units", lambda: True)
    assert models.precision_of("auto", cpu, wide) == "bf16"
    assert models.precision_of("auto", cpu, narrow) == "fp32"
    assert models.precision_of("auto", cpu, wide, trained="fp32") == "fp32"
    assert models.precision_of("auto", cpu, narrow, trained="bf16") == "bf16"
    assert models.precision_of("fp32", cpu, wide) == "fp32"
    monkeypatch.setattr(models, "has_bf16_units", lambda: False)
    assert models.precision_of("auto", cpu, wide) == "fp32"
    assert models.precision_of("auto", cpu, wide, trained="bf16") == "fp32"
    assert models.precision_of("bf16", cpu, narrow) == "bf16"


class Shelf:
    """A store that keeps copies in a list."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []
        self.fetched = 0

    def takes(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point()

    def put(self, tensor: Tensor) -> int:
        self.kept.append(tensor.detach().clone())
        return len(self.kept) - 1

    def get(self, kept: int) -> Tensor:
        self.fetched += 1
        return self.kept[kept]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_moved_activations_give_the_same_gradients(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("espalier.training.offload.SMALLEST", 1)
    found = []
    for shelf in (None, Shelf()):
        model = tiny.llama().train()
        esp.attach(model, "LoRA(rank=2)")
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))
        with offloaded(model, shelf):
            model(ids, labels=ids, use_cache=False).loss.backward()
        found.append([p.grad for p in esp.parameters(model)])
        if shelf:
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            assert shelf.fetched >= len(shelf.kept) > 4
            assert not own & {tensor.untyped_storage().data_ptr() for tensor in shelf.kept}
            inputs = [tuple(tensor.shape) for tensor in shelf.kept]
            if checkpointing:  # the blocks' inputs are there, and little more
                assert inputs.count((2, 9, 32)) >= 2
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_what_several_operations_save_is_moved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("espalier.training.offload.SMALLEST", 1)
    model, shelf = nn.Linear(3, 3), Shelf()
    weights = [torch.randn(4, 4, requires_grad=True) for _ in range(3)]
    with offloaded(model, shelf):
        x = torch.randn(5, 4).sin()
        y = sum(x @ w for w in weights)
        model(y[:, :3]).sum().backward()  # type: ignore[index]
    same = [tensor for tensor in shelf.kept if tensor.shape == x.shape and torch.equal(tensor, x)]
    assert len(same) == 1
    assert all(w.grad is not None for w in weights)


def test_moving_activations_on_a_cpu_is_refused_rather_than_ignored() -> None:
    model = tiny.llama()
    with pytest.raises(SettingError, match=r"offload='cpu' .* computes on cpu.*checkpointing"):
        fit(model, offload="cpu")
    esp.attach(model, "LoRA(rank=2)")  # the name is free
