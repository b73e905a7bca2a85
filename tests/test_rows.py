"""Rows of one batch on different adapters: each row is what it is alone with its adapter active."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import espalier as esp
from espalier.errors import AdapterError, SettingError
from espalier.fast.grouped import blocks_of
from espalier.graft import find
from table import METHODS
from zoo import BY_NAME, logits

Choice = Any
BERT, GPT2, LLAMA, T5 = (BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5"))
MIXED = ["a", None, "b"]


def moved(model: nn.Module, method: object, *names: str) -> nn.Module:
    """Adapters whose numbers are far from where they started, and far from each other."""
    for seed, name in enumerate(names):
        esp.attach(model, method, name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in esp.parameters(model):
                p.add_(0.3 * torch.randn(p.shape, generator=noise))
    return model


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


def alone(model: nn.Module, batch: dict[str, Tensor], choices: Sequence[Choice]) -> Tensor:
    """The logits of each row by itself, with its own adapters active."""
    found = []
    for row, choice in enumerate(choices):
        esp.activate(model, choice)
        found.append(logits(model, {k: v[row : row + 1] for k, v in batch.items()}))
    return torch.cat(found)


def check(model: nn.Module, batch: dict[str, Tensor], choices: Sequence[Choice]) -> None:
    """Rows together are rows alone, with a graph and without; and no two choices give the same."""
    want = alone(model, batch, choices)
    esp.activate(model, None)
    with esp.rows(model, choices):
        served = logits(model, batch)
        trained = model(**batch).logits
    close(served, want)
    close(trained, want)
    assert esp.active(model) == {}
    turned = alone(model, batch, [*choices[1:], choices[0]])
    differ = [a != b for a, b in zip(choices, [*choices[1:], choices[0]], strict=True)]
    apart = (want - turned).flatten(1).abs().amax(1) > 1e-2
    assert apart.tolist() == differ


PAIRS = [
    *((case, recipe) for case in (BERT, GPT2, LLAMA, T5) for recipe in ("dora", "unipelt", "mam")),
    *((case, recipe) for case in (BERT, GPT2) for recipe in ("lora-two", "pfeiffer", "full")),
    *((LLAMA, recipe) for recipe in ("adalora", "houlsby", "ia3", "ptuning2", "sparse", "said")),
    *((T5, recipe) for recipe in ("parallel", "prefix", "norms", "bitfit-create")),
    (BERT, "bitfit"),
]


@pytest.mark.parametrize(("case", "recipe"), PAIRS, ids=[f"{c.name}-{r}" for c, r in PAIRS])
def test_each_row_is_what_it_is_alone(case: Any, recipe: str) -> None:
    check(moved(case.make(), METHODS[recipe], "a", "b"), case.batch(), MIXED)


@pytest.mark.parametrize("case", [BERT, GPT2, T5], ids=lambda case: case.name)
def test_prompts_of_one_length_go_together(case: Any) -> None:
    model = moved(case.make(), METHODS["pile"], "a", "b")
    check(model, case.batch(), ["a", "b", "a"])


def test_methods_stacks_and_weights_go_together_in_one_batch() -> None:
    model, batch = LLAMA.make(), LLAMA.batch()
    batch = {k: torch.cat([v, v]) for k, v in batch.items()}
    kinds = {
        "low": "lora-two",
        "keys": "ptuning2",
        "more": "prefix",
        "scales": "ia3",
        "dora": "dora",
    }
    for name, recipe in kinds.items():
        moved(model, METHODS[recipe], name)
    stacked = ["low", "dora", "scales"]
    weighted = {"keys": 0.5, "low": -0.5}
    check(model, batch, [stacked, "keys", None, weighted, "more", {"scales": 2.0, "more": 1.0}])


@pytest.mark.parametrize("ids", [1, 2, 40])
def test_products_of_many_rows_are_sorted_and_those_of_few_are_not(ids: int) -> None:
    model = LLAMA.make()
    for name, rank in (("a", 2), ("b", 5), ("c", 3)):
        moved(model, esp.LoRA(rank=rank, sites="attention.*, ffn.in"), name)
    words = torch.randint(5, 96, (4 * ids, 3), generator=torch.Generator().manual_seed(1))
    choices: list[Choice] = ([None, "c", "a", "c"] if ids < 40 else ["a", "c", "c", "c"]) * ids
    choices[1] = {"b": 0.5, "a": 0.5}
    choices[-1] = "b"
    want = alone(model, {"input_ids": words}, choices)
    with esp.rows(model, choices):
        close(logits(model, {"input_ids": words}), want)
        with torch.no_grad():
            for p in esp.parameters(model):
                p.mul_(1.5)
    changed = alone(model, {"input_ids": words}, choices)
    with esp.rows(model, choices):
        assert not torch.allclose(changed, want)
        close(logits(model, {"input_ids": words}), changed)


def linear_in_bf16(*names: str) -> nn.Module:
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(24, 40, dtype=torch.bfloat16)

        def forward(self, inputs_embeds: Tensor) -> Tensor:
            return self.up(inputs_embeds)

    torch.manual_seed(0)
    return moved(Linear().eval(), esp.LoRA(rank=4, sites="other"), *names)


def apart(found: Tensor, want: Tensor) -> float:
    """The largest difference as a share of the largest number: 16 bits round to 2⁻⁸."""
    return float((found - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("words", [1, 3])
@torch.no_grad()
def test_many_rows_in_16_bits_have_their_own_adapters_alone(words: int) -> None:
    model = linear_in_bf16("a", "b", "c")
    choices: list[Choice] = [["b"], None, {"c": 0.5, "a": 2.0}, "a", "b"] * 4
    x = torch.randn(20, words, 24, dtype=torch.bfloat16)
    want = []
    for row, choice in enumerate(choices):
        esp.activate(model, choice)
        want.append(model(inputs_embeds=x[row : row + 1]))
    with esp.rows(model, choices):
        found = model(inputs_embeds=x)
        more = model(inputs_embeds=x.repeat_interleave(2, 0))
    assert apart(found, torch.cat(want)) < 2**-6
    assert apart(more, found.repeat_interleave(2, 0)) < 2**-6
    assert apart(found[0], found[3]) > 0.1


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@torch.no_grad()
def test_an_adapter_that_is_not_finite_spoils_its_own_rows_only(value: float) -> None:
    model = linear_in_bf16("a", "broken")
    x = torch.randn(20, 1, 24, dtype=torch.bfloat16)
    esp.activate(model, "a")
    want = model(inputs_embeds=x)
    esp.activate(model, "broken")
    for p in esp.parameters(model):
        p.fill_(value)
    with esp.rows(model, ["a", "broken"] * 10):
        found = model(inputs_embeds=x)
    assert apart(found[::2], want[::2]) < 2**-6
    assert not found[1::2].isfinite().any()


def test_blocks_hold_every_row_once() -> None:
    whose = [0] * 60 + [2] * 3 + [-1] * 7 + [1] * 2
    blocks = blocks_of(whose, 3, torch.device("cpu"))
    assert blocks.order is not None
    assert blocks.real is not None
    assert blocks.whose is not None
    assert blocks.count <= 6
    size = len(blocks.order) // blocks.count
    placed = [(int(blocks.order[at]), int(blocks.whose[at // size])) for at in blocks.real]
    assert sorted(placed) == [(row, one) for row, one in enumerate(whose) if one >= 0]


def test_fused_slices_of_one_host_are_one_product() -> None:
    model = GPT2.make()
    moved(model, esp.LoRA(rank=2, sites="attention.q, attention.v"), "a")
    moved(model, esp.LoRA(rank=3, sites="attention.k, ffn.*"), "b")
    check(model, GPT2.batch(), ["a", ["a", "b"], "b"])


def test_a_bf16_base_serves_rows() -> None:
    model = moved(LLAMA.make(), esp.LoRA(rank=2), "a", "b")
    batch = LLAMA.batch()
    want = alone(model, batch, MIXED)
    nn.Module.to(model, torch.bfloat16)
    for p in find(model).parameters():
        p.data = p.data.float()
    with esp.rows(model, MIXED):
        got = logits(model, batch)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.05)


# --- generation ---------------------------------------------------------------------------------

TEXTS: list[list[int]] = [[11, 12, 13, 14, 15], [21, 22], [31, 32, 33], [41, 42, 43, 44]]
CHOICES = ["a", None, "b", "a"]


def padded(texts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(t)) + t for t in texts])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def written(
    model: nn.Module, texts: list[list[int]], choices: Sequence[Choice], **how: Any
) -> list[list[int]]:
    """What `generate` writes after the texts, all rows at once."""
    given = padded(texts)
    torch.manual_seed(0)
    with esp.rows(model, choices):
        out = model.generate(**given, max_new_tokens=5, eos_token_id=None, pad_token_id=0, **how)  # type: ignore[operator]
    start = 0 if model.config.is_encoder_decoder else given["input_ids"].shape[1]  # type: ignore[union-attr]
    return out[:, start:].tolist()


GENERATES = [(GPT2, "lora-qv"), (LLAMA, "lora"), (LLAMA, "prefix"), (LLAMA, "unipelt")]
GENERATES += [(LLAMA, "houlsby"), (T5, "lora-qv"), (T5, "unipelt")]


@pytest.mark.parametrize(("case", "recipe"), GENERATES, ids=[f"{c.name}-{r}" for c, r in GENERATES])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams"],
)
def test_generated_rows_are_those_generated_alone(
    case: Any, recipe: str, how: dict[str, Any]
) -> None:
    model = moved(case.make(), METHODS[recipe], "a", "b")
    together = written(model, TEXTS, CHOICES, **how)
    each = len(together) // len(TEXTS)
    for row, (text, choice) in enumerate(zip(TEXTS, CHOICES, strict=True)):
        assert written(model, [text], [choice], **how) == together[row * each : (row + 1) * each]
    assert written(model, TEXTS, ["b", "a", None, None], **how) != together


def test_prompts_and_sampled_sequences_are_on_their_rows() -> None:
    model = moved(LLAMA.make(), METHODS["prompt"], "a", "b")
    choices = ["a", "b", "b", "a"]
    together = written(model, TEXTS, choices)
    for row, (text, choice) in enumerate(zip(TEXTS, choices, strict=True)):
        assert written(model, [text], [choice]) == together[row : row + 1]
    several = written(model, TEXTS, choices, do_sample=True, top_k=1, num_return_sequences=3)
    assert several == [one for one in together for _ in range(3)]


def test_the_fast_path_of_one_adapter_writes_what_the_plain_one_does() -> None:
    model = moved(GPT2.make(), METHODS["lora-qv"], "a", "b")
    esp.activate(model, {"a": 0.5, "b": 2.0})
    batch = GPT2.batch()
    plain = model(**batch).logits.detach()
    torch.testing.assert_close(logits(model, batch), plain)
    with torch.no_grad():
        for p in esp.parameters(model):
            p.mul_(2)
    assert not torch.allclose(logits(model, batch), plain)
    torch.testing.assert_close(logits(model, batch), model(**batch).logits.detach())


# --- training and compiling -----------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["lora-two", "unipelt", "bitfit-create"])
def test_gradients_reach_each_adapter_from_its_own_rows(recipe: str) -> None:
    model = moved(LLAMA.make(), METHODS[recipe], "a", "b").train()
    batch = LLAMA.batch()
    with esp.rows(model, MIXED):
        model(**batch).logits[:, -1].square().sum().backward()
    for row, name in ((0, "a"), (2, "b")):
        esp.activate(model, name)
        flats = esp.parameters(model)
        together = [p.grad.clone() for p in flats if p.grad is not None]
        for p in flats:
            p.grad = None
        model(batch["input_ids"][row : row + 1]).logits[:, -1].square().sum().backward()
        apart = [p.grad for p in flats]
        torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_run_their_rows_again(reentrant: bool) -> None:
    model = moved(LLAMA.make(), METHODS["lora-two"], "a", "b").train()
    batch = LLAMA.batch()
    found = []
    for again in (False, True):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})  # type: ignore[operator]
            model.enable_input_require_grads()  # type: ignore[operator]
        with esp.rows(model, MIXED):
            model(**batch).loss.backward()
            found.append([p.grad.clone() for p in esp.parameters(model) if p.grad is not None])
            model.zero_grad()
    torch.testing.assert_close(found[1], found[0])


def test_a_compiled_model_serves_rows() -> None:
    model, batch = moved(LLAMA.make(), "LoRA(rank=2, sites='attention.q')", "a"), LLAMA.batch()
    moved(model, METHODS["ptuning2"], "b")
    want = alone(model, batch, MIXED)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    with esp.rows(compiled, MIXED), torch.no_grad():
        close(compiled(**batch).logits, want)


# --- heads and refusals ---------------------------------------------------------------------------


def test_rows_have_the_heads_of_their_adapters() -> None:
    model = BERT.make()
    for name in ("a", "b"):
        esp.attach(model, "LoRA(rank=2)", name, head=["classifier"])
        with torch.no_grad():
            for p in esp.parameters(model):
                p.normal_(std=0.2)
    check(model, BERT.batch(), ["a", "b", None])


def test_what_cannot_share_a_batch_says_so_before_it_runs() -> None:
    model = moved(LLAMA.make(), METHODS["ladder"], "ladder")
    moved(model, METHODS["prompt"], "three")
    moved(model, "PromptTuning(length=2)", "two")
    moved(model, METHODS["unipelt"], "gated")
    esp.activate(model, "gated")
    for choices, why in (
        (["ladder", None], "a network of its own"),
        (["three", "two"], "3, 2 words of soft prompts"),
        (["three", None], "3, 0 words of soft prompts"),
        (["gated", {"gated": 0.5}], "the rows of one choice only"),
        (["nobody", None], "no adapter 'nobody'"),
    ):
        with pytest.raises(AdapterError, match=why), esp.rows(model, choices):
            pass
        assert esp.active(model) == {"gated": 1.0}
    t5 = moved(T5.make(), METHODS["full"], "full")
    with pytest.raises(AdapterError, match="a table that all rows"), esp.rows(t5, ["full", None]):
        pass
    for wrong in ("a", [], {"a": 1.0}):
        with pytest.raises(SettingError, match="a choice for each row"), esp.rows(model, wrong):  # type: ignore[arg-type]
            pass


def test_a_batch_of_another_size_is_refused_and_the_model_left_as_it_was() -> None:
    model, batch = moved(BERT.make(), METHODS["full"], "a", "b"), BERT.batch()
    before = sorted(model.bert.encoder.layer[0].output.dense.__dict__)  # type: ignore[union-attr, index]
    with pytest.raises(AdapterError, match="2 choices, but the model 3 rows"):  # noqa: SIM117
        with esp.rows(model, ["a", "b"]):
            model(**batch)
    assert esp.active(model) == {"b": 1.0}
    assert sorted(model.bert.encoder.layer[0].output.dense.__dict__) == before  # type: ignore[union-attr, index]
    with esp.rows(model, MIXED):
        for refused in (
            lambda: esp.activate(model, "a"),
            lambda: esp.detach(model, "a"),
            lambda: esp.merge(model),
        ):
            with pytest.raises(AdapterError, match=r"leave `with esp.rows"):
                refused()
    torch.testing.assert_close(alone(model, batch, ["b"]), alone(model, batch, ["b"]))


class Picky(nn.Module):
    """Some words of a batch, whichever rows they are from, go through a layer of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.expert = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        x, few = self.words(input_ids), input_ids > 4
        return x.masked_scatter(few[..., None], self.expert(x[few]))


def test_words_picked_out_of_their_rows_are_refused_whatever_their_number() -> None:
    model = moved(Picky().eval(), "LoRA(rank=2, sites='expert')", "a", "b")
    picked = torch.tensor([[5, 1, 1], [5, 6, 7]])  # one word of the first row, three of the other
    with (
        torch.no_grad(),
        esp.rows(model, ["a", "b"]),
        pytest.raises(AdapterError, match="cannot be told"),
    ):
        model(input_ids=picked)


def test_rows_with_one_choice_are_that_choice() -> None:
    model, batch = moved(LLAMA.make(), METHODS["ladder"], "side"), LLAMA.batch()
    want = logits(model, batch)
    esp.activate(model, None)
    with esp.rows(model, ["side"] * 3):
        torch.testing.assert_close(logits(model, batch), want)
