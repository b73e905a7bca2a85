"""Bases in 4 and 8 bits: codes, memory, every method on them, dense merging, optimisers, runs."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import espalier as esp
import tiny_runs
from espalier.quantised import measure, quantisable
from espalier.storage import Storage, footprint
from espalier.streaming import write_merged
from espalier.training.optimizers import moments, optimizer, put_moments
from table import METHODS, base_values
from zoo import BY_NAME, logits, train

bnb = pytest.importorskip("bitsandbytes")
functional = bnb.functional

QUANTISED = "there are no numbers that could be trained"
REFUSED = {
    **dict.fromkeys(
        ("full", "last-layer", "sparse", "said", "diffpruning", "diffpruning-flat"), QUANTISED
    ),
    ("llama", "bitfit"): "no biases to train",
    ("llama", "head"): "trains nothing here",
}
_BASES: dict[tuple[str, str], tuple[nn.Module, nn.Module]] = {}


def bases(name: str, kind: str) -> tuple[Any, Any]:
    """A family's model quantised, and the same with dense weights of the codes' values."""
    if (name, kind) not in _BASES:
        quantised = BY_NAME[name].make()
        esp.quantize(quantised, kind)
        dense = copy.deepcopy(quantised)
        esp.dequantize(dense)
        _BASES[name, kind] = quantised, dense
    return copy.deepcopy(_BASES[name, kind])


def hosts_of(model: nn.Module) -> dict[str, Any]:
    return {n: m for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --------------------------------------------------------------------------------- codes and bits


def nf4_table() -> Tensor:
    """The table of NF4 from quantiles of the normal distribution."""
    end = 1 - (1 / 30 + 1 / 32) / 2
    above = torch.special.ndtri(torch.linspace(end, 0.5, 9, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, 8, dtype=torch.float64)[:-1])
    table = torch.cat((below, torch.zeros(1, dtype=torch.float64), above)).sort().values
    return (table / table.max()).float()


def by_hand(weight: Tensor, table: Tensor) -> Tensor:
    """Packed codes of a weight: blocks of 64, nearest entry, the lower one at a midpoint."""
    flat = torch.cat((weight.flatten(), torch.zeros(-weight.numel() % 64))).view(-1, 64)
    scaled = flat * (1 / flat.abs().amax(1, keepdim=True).clamp(min=1e-38))
    codes = torch.bucketize(scaled.flatten(), (table[1:] + table[:-1]) / 2)[: weight.numel()]
    return (codes[::2] << 4 | codes[1::2]).to(torch.uint8)


def test_nf4_codes_equal_bitsandbytes_and_a_quantiser_by_hand_bit_for_bit() -> None:
    dense: Any = BY_NAME["llama"].make()
    model = BY_NAME["llama"].make()
    esp.quantize(model, "nf4")
    table = nf4_table()
    assert torch.allclose(table, functional.get_4bit_type("nf4", device="cpu"), atol=2e-7)
    assert len(hosts_of(model)) == 14
    for path, host in hosts_of(model).items():
        weight = dense.get_submodule(path).weight.detach()
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        assert torch.equal(host.weight.data, packed)
        assert torch.equal(packed.flatten(), by_hand(weight, state.code))
        assert torch.equal(host.weight.quant_state.absmax, state.absmax)
        assert torch.equal(host.weight.quant_state.state2.absmax, state.state2.absmax)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_bits_of_a_number_are_the_papers(kind: str) -> None:
    assert Storage(kind).bits == 4 + 8 / 64 + 32 / (64 * 256)
    assert Storage(kind, double=False).bits == 4.5
    large = Storage(kind).size(1024, 1024) - 64 - 1028  # without the tables
    assert 8 * large / 2**20 == Storage(kind).bits


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize(("kind", "double"), [("nf4", True), ("fp4", False), ("int8", True)])
def test_memory_is_what_the_arithmetic_says_to_the_byte(name: str, kind: str, double: bool) -> None:
    with torch.device("meta"):
        unbuilt = type(BY_NAME[name].make())(BY_NAME[name].make().config)
    places = esp.sites(unbuilt)
    paths = quantisable(unbuilt, places)
    told = footprint(unbuilt, places, paths, Storage(kind, double), torch.float32)
    model = BY_NAME[name].make()
    found = esp.quantize(model, kind, double=double)
    assert told.total == found.total == found.measured
    assert measure(model) == found


def test_counting_counts_numbers_and_not_bytes() -> None:
    plain, (packed, _) = BY_NAME["llama"].make(), bases("llama", "nf4")
    for model in (plain, packed):
        esp.attach(model, "LoRA(rank=2)", "a")
    assert esp.account(packed, "a") == esp.account(plain, "a")


# ------------------------------------------------------------------------------- every method on it


@pytest.mark.parametrize("recipe", METHODS)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_on_4_bits_a_method_trains_as_on_the_dense_weights(
    name: str, recipe: str, tmp_path: Path
) -> None:
    packed, dense = bases(name, "nf4")
    why = REFUSED.get((name, recipe), REFUSED.get(recipe))
    if why:
        with pytest.raises(esp.errors.SiteError, match=why):
            esp.attach(packed, METHODS[recipe], "a")
        return
    batch, before = BY_NAME[name].batch(), base_values(packed)
    for model in (packed, dense):
        torch.manual_seed(1)
        esp.attach(model, METHODS[recipe], "a")
        train(model, batch, steps=1)
    assert far(logits(packed, batch), logits(dense, batch)) < 1e-5
    for mine, other in zip(esp.parameters(packed), esp.parameters(dense), strict=True):
        assert mine.grad is not None
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-7)  # type: ignore[arg-type]
    assert all(torch.equal(p, before[n]) for n, p in base_values(packed).items())
    esp.save(packed, "a", tmp_path)
    fresh = bases(name, "nf4")[0]
    esp.load(fresh, tmp_path, "a")
    assert torch.equal(logits(fresh, batch), logits(packed, batch))


@pytest.mark.parametrize("recipe", ["lora", "dora", "pissa", "ia3", "bitfit", "pile"])
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_on_8_bits_a_method_trains_as_on_the_dense_weights(name: str, recipe: str) -> None:
    if (name, recipe) == ("t5", "bitfit"):
        recipe = "bitfit-create"
    packed, dense = bases(name, "int8")
    batch = BY_NAME[name].batch()
    for model in (packed, dense):
        torch.manual_seed(1)
        esp.attach(model, METHODS[recipe], "a")
        for module in model.modules():  # in training, 8-bit weights meet inputs in full precision
            module.training = isinstance(module, bnb.nn.Linear8bitLt)
        train(model, batch, steps=1)
    assert far(logits(packed, batch), logits(dense, batch)) < 1e-5
    assert far(logits(packed.eval(), batch), logits(dense, batch)) < 0.05  # inputs in 8 bits too


def test_a_slice_of_a_fused_conv1d_is_adapted_on_4_bits_as_on_the_dense_one() -> None:
    packed, dense = bases("gpt2", "nf4")
    batch = BY_NAME["gpt2"].batch()
    for model in (packed, dense):
        torch.manual_seed(1)
        esp.attach(model, "LoRA(rank=2, sites='attention.q, attention.v')", "a")
        train(model, batch)
    assert far(logits(packed, batch), logits(dense, batch)) < 1e-5


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_norms_of_a_bf16_base_compute_in_fp32(name: str) -> None:
    model = BY_NAME[name].make().to(torch.bfloat16)
    esp.quantize(model, "nf4")
    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    assert norms
    assert all(p.dtype == torch.float32 for m in norms for p in m.parameters())
    batch = BY_NAME[name].batch()
    seen: list[torch.dtype] = []
    norms[0].register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    out = logits(model, batch)
    assert out.dtype == torch.bfloat16
    assert seen == [torch.bfloat16]
    assert far(out.float(), logits(bases(name, "nf4")[1], batch)) < 0.05
    esp.attach(model, "LoRA(rank=2)", "a")
    assert math.isfinite(train(model, batch))


def wide_llama() -> Any:
    """A Llama whose widths bitsandbytes can repack on the CPU."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval()


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="only some processors repack")
def test_a_base_repacked_for_evaluation_trains_all_the_same() -> None:
    model, ids = wide_llama(), torch.arange(8).view(1, 8)
    esp.quantize(model, "nf4")
    expected = logits(model, {"input_ids": ids})
    for host in hosts_of(model).values():
        host.support_avx512bf16_for_cpu = True  # as bitsandbytes makes them
    logits(model, {"input_ids": ids})
    assert all(host.weight.quant_state.packing_format_for_cpu for host in hosts_of(model).values())
    esp.attach(model, "LoRA(rank=2)", "a")
    model(input_ids=ids, labels=ids).loss.backward()
    assert not esp.dead_sites(model)
    assert far(logits(model, {"input_ids": ids}), expected) < 0.02  # its scales were rounded
    esp.detach(model, "a")
    assert all(host.support_avx512bf16_for_cpu for host in hosts_of(model).values())


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="only some processors repack")
def test_evaluation_repacks_nothing_with_adapters_or_without(tmp_path: Path) -> None:
    model, batch = wide_llama(), {"input_ids": torch.arange(8).view(1, 8)}

    def repacked(one: nn.Module) -> bool:
        logits(one.eval(), batch)
        states = [host.weight.quant_state for host in hosts_of(one).values()]
        assert states
        return any(getattr(state, "packing_format_for_cpu", False) for state in states)

    esp.quantize(model, "nf4")
    assert not repacked(model)
    esp.attach(model, "LoRA(rank=2)", "a")
    assert not repacked(model)
    esp.activate(model, None)
    assert not repacked(model)
    assert not repacked(copy.deepcopy(model))
    esp.save(model, "a", tmp_path)
    esp.detach(model, "a")
    assert not repacked(model)
    esp.load(model, tmp_path, "a")
    assert not repacked(model)


def test_what_cannot_be_quantised_says_why() -> None:
    model = BY_NAME["llama"].make()
    with pytest.raises(esp.errors.SettingError, match="nf4, fp4, int8"):
        esp.quantize(model, "nf5")
    with pytest.raises(esp.errors.SettingError, match="no quantised weights"):
        esp.dequantize(model)
    with pytest.raises(esp.errors.SiteError, match="no linear weight"):
        esp.quantize(nn.Sequential(nn.Linear(2, 2)))
    esp.attach(model, "LoRA(rank=2)", "a")
    with pytest.raises(esp.errors.AdapterError, match="do it first, then attach"):
        esp.quantize(model)
    esp.detach(model, "a")
    esp.quantize(model, skip="*.down_proj, model.layers.0.*")
    assert set(hosts_of(model)) == {
        *(f"model.layers.1.self_attn.{x}_proj" for x in "qkvo"),
        *(f"model.layers.1.mlp.{x}_proj" for x in ("gate", "up")),
    }
    with pytest.raises(esp.errors.AdapterError, match="already, to nf4"):
        esp.quantize(model)


# ----------------------------------------------------------------------------------------- merging

MERGED = {
    "llama": "LoRA(rank=4, sites='all-linear, embedding', dora=False) + IA3()",
    "gpt2": "LoRA(rank=2, sites='attention.q') + BitFit()",
    "t5": "LoRA(rank=2, sites='ffn.*, attention.*, embedding')",
    "bert": "LoRA(rank=2, dora=True)",
}


def adapted(name: str, folder: Path) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A quantised base with a trained adapter, a batch and its outputs; `folder` gets the base."""
    original: Any = BY_NAME[name].make()
    original.save_pretrained(folder, max_shard_size="20KB")
    model = bases(name, "nf4")[0]
    torch.manual_seed(1)
    esp.attach(model, MERGED[name], "a")
    batch = BY_NAME[name].batch()
    train(model, batch, steps=4)
    return model, batch, logits(model, batch)


@pytest.mark.parametrize("name", MERGED)
def test_a_merge_onto_dequantised_weights_gives_the_outputs_of_the_quantised_model(
    name: str, tmp_path: Path
) -> None:
    model, batch, expected = adapted(name, tmp_path / "base")
    before = base_values(model)
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        out = write_merged(model, "a", tmp_path / "base", tmp_path / str(dtype), dtype=dtype)
        loaded, info = type(model).from_pretrained(out, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert loaded.dtype == dtype
        assert far(logits(loaded.float().eval(), batch), expected) < slack
    assert torch.equal(logits(model, batch), expected)  # the model in hand is as it was
    assert all(torch.equal(p, before[n]) for n, p in base_values(model).items())
    index = json.loads((tmp_path / "base/model.safetensors.index.json").read_text())
    mine = json.loads((out / "model.safetensors.index.json").read_text())
    assert mine["weight_map"].items() >= index["weight_map"].items()
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_merge_onto_original_weights_is_the_adapter_on_the_unquantised_base(
    name: str, tmp_path: Path
) -> None:
    model, batch, quantised = adapted(name, tmp_path / "base")
    esp.save(model, "a", tmp_path / "adapter")
    plain = BY_NAME[name].make()
    esp.load(plain, tmp_path / "adapter", "a")
    how: dict[str, Any] = {"dtype": torch.float32, "onto": "original"}
    out = write_merged(model, "a", tmp_path / "base", tmp_path / "merged", **how)
    merged = logits(type(model).from_pretrained(out).eval(), batch)
    assert far(merged, logits(plain, batch)) < 1e-5
    assert far(merged, quantised) > 1e-3  # another model than the one that was trained


def test_biases_that_the_model_does_not_have_are_not_written(tmp_path: Path) -> None:
    model, plain = bases("llama", "nf4")
    plain.save_pretrained(tmp_path / "base")
    esp.attach(model, "BitFit(create=True)", "a")
    with pytest.raises(esp.errors.AdapterError, match="would get a bias"):
        write_merged(model, "a", tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_into_few_bits_refuses_and_says_what_to_do(tmp_path: Path) -> None:
    model, batch, before = adapted("llama", tmp_path)
    with pytest.raises(esp.errors.AdapterError, match=r"write_merged.*esp\.dequantize"):
        esp.merge(model, "a", untie=True)
    assert torch.equal(logits(model, batch), before)
    esp.save(model, "a", tmp_path / "a")
    esp.detach(model, "a")
    esp.dequantize(model)
    esp.load(model, tmp_path / "a", "a")
    esp.merge(model, "a", unload=True, untie=True)
    assert far(logits(model, batch), before) < 1e-5


# -------------------------------------------------------------------------------------- optimisers


def steps(made: torch.optim.Optimizer, p: nn.Parameter, seeds: range) -> Tensor:
    for seed in seeds:
        p.grad = torch.randn(p.shape, generator=torch.Generator(p.device.type).manual_seed(seed))
        made.step()
    return p.detach().clone()


@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_what_an_optimiser_remembers_goes_on_bit_for_bit(name: str) -> None:
    def fresh(values: Tensor) -> tuple[torch.optim.Optimizer, nn.Parameter]:
        p = nn.Parameter(values.clone())
        return optimizer(name, [{"params": [p], "weight_decay": 0.1, "lr": 1e-2}], 1e-3)[0], p

    start = torch.linspace(-1, 1, 6000).view(2, 3000)
    whole = steps(*fresh(start), range(6))
    first, p = fresh(start)
    middle = steps(first, p, range(3))
    second, q = fresh(middle)
    put_moments(second, moments(first))
    assert torch.equal(steps(second, q, range(3, 6)), whole)


def test_8_bit_moments_stay_near_those_of_32_bits() -> None:
    ends = {}
    for name in ("adamw", "adamw_8bit"):
        p = nn.Parameter(torch.linspace(-1, 1, 6000))
        made, note = optimizer(name, [{"params": [p]}], 1e-2)
        ends[name] = steps(made, p, range(8))
        assert note is None
        sizes = {v.dtype for v in made.state[p].values() if isinstance(v, Tensor) and v.numel() > 1}
        assert (torch.uint8 in sizes) == (name == "adamw_8bit")
    moved = far(ends["adamw"], torch.linspace(-1, 1, 6000))
    assert 0 < far(ends["adamw_8bit"], ends["adamw"]) < 0.1 * moved


def test_on_a_cpu_a_paged_optimiser_says_what_it_is_instead() -> None:
    p = nn.Parameter(torch.zeros(5000))
    made, note = optimizer("paged_adamw", [{"params": [p]}], 1e-3)
    assert isinstance(made, torch.optim.AdamW)
    assert note == (
        "optimizer: paging needs a CUDA device; here torch's AdamW, by the same arithmetic."
    )
    made, note = optimizer("paged_adamw_8bit", [{"params": [p]}], 1e-3)
    assert "8-bit moments, not paged" in str(note)
    assert not getattr(made, "is_paged", True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="paging needs a CUDA device")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paged_moments_are_paged_also_after_they_were_put_back(name: str) -> None:
    p = nn.Parameter(torch.linspace(-1, 1, 400_000, device="cuda"))
    made, note = optimizer(name, [{"params": [p]}], 1e-3)
    steps(made, p, range(2))
    q = nn.Parameter(p.detach().clone())
    second, _ = optimizer(name, [{"params": [q]}], 1e-3)
    put_moments(second, moments(made))
    assert note is None
    assert second.state[q]["state1"].is_paged
    assert torch.equal(steps(made, p, range(2, 4)), steps(second, q, range(2, 4)))


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base's folder, and the run folder of an adapter trained on it in 4 bits."""
    folder = tmp_path_factory.mktemp("quantised")
    base = tiny_runs.save_model(folder / "base", tiny_runs.llama(), tiny_runs.tokenizer("gpt"))
    rows = folder / "sums.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny_runs.sums(24))))
    esp.train(
        esp.RunConfig(
            model=base,
            train=str(rows),
            quantize="fp4",
            double_quantization=False,
            epochs=1,
            optimizer="adamw_8bit",
            threads=1,
            lr=1e-2,
            out=folder / "run",
        )
    )
    return Path(base), folder / "run"


def test_a_run_loads_its_base_in_few_bits_and_so_does_whoever_opens_it(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from espalier.generation import open_adapter

    base, run = trained
    assert esp.read_card(run)["base"]["quantised"] == {"kind": "fp4", "double": False}
    assert not list(run.rglob("*model*.safetensors"))
    at = open_adapter(run)
    hand = tf.AutoModelForCausalLM.from_pretrained(base)
    esp.quantize(hand, "fp4", double=False)
    for path, host in hosts_of(hand).items():
        assert torch.equal(at.model.get_submodule(path).weight, host.weight)
    assert len(hosts_of(at.model)) == len(hosts_of(hand)) == 14
    esp.load(hand, run, "adapter")
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    assert torch.equal(logits(at.model, ids), logits(hand.eval(), ids))
    assert not hosts_of(open_adapter(run, quantize="none").model)


def test_the_command_merges_it_densely_and_prints_the_error(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from espalier.commands.merge import merge_into

    _, run = trained
    errors = {}
    for onto in ("dequantised", "original"):
        merge_into(str(run), tmp_path / onto, None, "auto", onto)
        said = " ".join(capsys.readouterr().out.split())
        errors[onto] = float(said.partition("with the adapter by ")[2].split()[0])
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / onto, dtype="auto")
        assert model.dtype == torch.bfloat16
        assert not hosts_of(model)
    assert errors["dequantised"] < 0.02 < errors["original"]


def test_settings_of_a_quantised_run() -> None:
    given: dict[str, Any] = {"model": "m", "train": "t"}
    assert esp.RunConfig(**given).storage is None
    assert esp.RunConfig(**given, quantize="none").quantize is None
    assert esp.RunConfig(**given, quantize="int8").storage == Storage("int8")
    with pytest.raises(esp.errors.SettingError, match="write quantize"):
        esp.RunConfig(**given, load_in_4bit=True)
    model, words = tiny_runs.bert(), tiny_runs.tokenizer()
    with pytest.raises(esp.errors.SettingError, match=r"esp\.quantize"):
        esp.fit(model, words, tiny_runs.reviews(8), quantize="nf4")


def test_a_ladder_takes_its_rows_from_weights_that_were_turned_to_be_packed() -> None:
    found = []
    for model in bases("gpt2", "nf4"):
        torch.manual_seed(3)
        esp.attach(model, "LadderSideTuning(reduction=2)", "mine")
        found.append(logits(model, BY_NAME["gpt2"].batch()))
    assert torch.allclose(*found, atol=1e-4)
