"""Parity with huggingface/peft's other types: (IA)³, prompts, prefixes and norms, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import espalier as esp
from espalier.errors import CheckpointError
from zoo import BY_NAME, Case, logits

TEXT = [BY_NAME[name] for name in ("bert", "gpt2", "llama", "t5")]
WRITERS = [BY_NAME[name] for name in ("gpt2", "llama", "t5", "bart")]
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TINY = {"vocab_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}


def seeded(kind: type, config: type, **settings: object) -> nn.Module:
    """A tiny model that is the same each time."""
    torch.manual_seed(7)
    return kind(config(**{**TINY, "hidden_size": 24, "intermediate_size": 40, **settings})).eval()


def judge() -> nn.Module:
    """A Llama that classifies by its last token."""
    return seeded(
        tf.LlamaForSequenceClassification, tf.LlamaConfig, num_key_value_heads=2, pad_token_id=0
    )


def tagger() -> nn.Module:
    """A BERT that labels words."""
    return seeded(tf.BertForTokenClassification, tf.BertConfig)


def distilled() -> nn.Module:
    """A DistilBERT that labels words: its config has names of its own."""
    return seeded(
        tf.DistilBertForTokenClassification, tf.DistilBertConfig, n_layers=2, hidden_dim=40
    )


def reader() -> nn.Module:
    """A RoBERTa whose head has several layers."""
    return seeded(tf.RobertaForSequenceClassification, tf.RobertaConfig)


MORE = {
    "judge": Case("judge", judge, BY_NAME["bert"].batch, True),
    "tagger": Case("tagger", tagger, BY_NAME["bert"].batch, True),
    "distilled": Case("distilled", distilled, BY_NAME["bert"].batch, True),
    "reader": Case("reader", reader, BY_NAME["bert"].batch, True),
}


def asked(case: Case) -> dict[str, Tensor]:
    """A batch without labels, which peft does not widen; a seq2seq's words for its decoder."""
    batch = case.batch()
    labels = batch.pop("labels")
    return {**batch, "decoder_input_ids": labels} if case.name in ("t5", "bart") else batch


def shaken(model: nn.Module, trained: list[nn.Parameter]) -> nn.Module:
    """The model with other numbers in what trains."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in trained:
            p.add_(torch.randn_like(p) * 0.3)
    return model.eval()


def theirs(case: Case, config: peft.PeftConfig) -> Any:
    """A peft model with numbers that are not those of the start."""
    model = peft.get_peft_model(case.make(), config)
    return shaken(model, [p for p in model.parameters() if p.requires_grad])


def ours(case: Case, recipe: str, **how: object) -> nn.Module:
    """A model with our adapter "mine", numbers not those of the start."""
    model = case.make()
    esp.attach(model, recipe, "mine", **how)  # type: ignore[arg-type]
    return shaken(model, esp.parameters(model))


def text_only(given: Tensor, like: Tensor) -> Tensor:
    """Outputs of the text's own tokens; peft's begin with those of its virtual ones."""
    return given[:, given.shape[1] - like.shape[1] :] if given.dim() == 3 else given


def check_equal(there: Tensor, here: Tensor, base: Tensor) -> None:
    """To 1e-5, and far better than what the adapter changes."""
    change = float((here - base).abs().max())
    assert change > 5e-5
    assert torch.allclose(text_only(there, here), here, rtol=0, atol=min(1e-5, change / 20))


def check_read(case: Case, other: Any, folder: Path) -> nn.Module:
    """What peft saved gives the same here; returns our model."""
    other.save_pretrained(folder)
    model, batch = case.make(), asked(case)
    base = logits(model, batch)
    esp.load(model, folder, "mine")
    check_equal(logits(other, batch), logits(model, batch), base)
    return model


def check_written(case: Case, model: nn.Module, folder: Path, kind: str) -> dict:
    """What we save gives the same in peft, and here again; returns the settings."""
    esp.save(model, "mine", folder, format="peft")
    config, state = json.loads((folder / CONFIG).read_text()), load_file(folder / FILE)
    assert config["peft_type"] == kind
    other = peft.get_peft_model(case.make(), peft.PeftConfig.from_pretrained(str(folder)))
    result = peft.set_peft_model_state_dict(other, state)
    assert set(result.unexpected_keys) <= {"prompt_embeddings"}  # it goes to the prompt's encoder
    assert set(peft.get_peft_model_state_dict(other)) == set(state)
    through_disk = peft.PeftModel.from_pretrained(case.make(), str(folder)).eval()
    again, batch = case.make(), asked(case)
    base = logits(again, batch)
    esp.load(again, folder, "again")
    for there in (other.eval(), through_disk, again):
        check_equal(logits(there, batch), logits(model, batch), base)
    return config


def rewritten(folder: Path, **change: object) -> None:
    """Change settings of a saved folder."""
    file = folder / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))


# ------------------------------------------------------------------------------------------ (IA)³

SCALED = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
}


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_their_ia3_here(case: Case, tmp_path: Path) -> None:
    targets, inner = SCALED[case.name]
    config = peft.IA3Config(
        target_modules=targets,
        feedforward_modules=inner,
        modules_to_save=["classifier"] if case.has_new_head else None,
    )
    check_read(case, theirs(case, config), tmp_path)


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_our_ia3_there(case: Case, tmp_path: Path) -> None:
    check_written(case, ours(case, "IA3()"), tmp_path, "IA3")


def test_scales_of_slices_become_one_of_the_whole_with_ones_elsewhere(tmp_path: Path) -> None:
    case = BY_NAME["gpt2"]
    model = ours(case, "IA3(hidden='') + IA3(sites='attention.v', hidden='')")
    config = check_written(case, model, tmp_path, "IA3")
    assert config["fan_in_fan_out"] is True
    assert config["feedforward_modules"] == []
    scale = load_file(tmp_path / FILE)["base_model.model.transformer.h.0.attn.c_attn.ia3_l"]
    assert scale.shape == (72, 1)
    assert bool((scale[:24] == 1).all())
    assert not bool((scale[24:] == 1).any())


def test_what_enters_and_what_leaves_one_layer_cannot_both_be_scaled_there(tmp_path: Path) -> None:
    model = ours(BY_NAME["llama"], "IA3(sites='ffn.out', hidden='ffn.out')")
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj.*scales both"):
        esp.save(model, "mine", tmp_path, format="peft")


def test_a_scale_of_another_width_is_named(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    theirs(case, config).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    save_file({key: value[:7] for key, value in state.items()}, tmp_path / FILE)
    with pytest.raises(CheckpointError, match=r"q_proj has shape \(7, 1\).*\(24, 1\) or \(1, 24\)"):
        esp.load(case.make(), tmp_path)


# ---------------------------------------------------------------------------------------- prompts

TASKS = {"gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "bart": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize("case", WRITERS, ids=lambda case: case.name)
def test_their_prompt_here(case: Case, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type=TASKS[case.name], num_virtual_tokens=4)
    check_read(case, theirs(case, config), tmp_path)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
def test_their_p_tuning_is_read_as_the_prompt_that_it_made(encoder: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        encoder_hidden_size=8,
        encoder_reparameterization_type=encoder,
    )
    model = check_read(case, theirs(case, config), tmp_path)
    assert "PromptTuning(length=4)" in str(model.get_submodule("espalier.@mine").recipe)


HEADED = [MORE[name] for name in ("judge", "tagger", "distilled")]


@pytest.mark.parametrize("case", [*WRITERS, *HEADED], ids=lambda case: case.name)
def test_our_prompt_there(case: Case, tmp_path: Path) -> None:
    config = check_written(case, ours(case, "PromptTuning(length=4)"), tmp_path, "PROMPT_TUNING")
    assert (config["num_virtual_tokens"], config["token_dim"]) == (4, 24)


@pytest.mark.parametrize("recipe", ["PTuning(length=4)", "PromptTuning(length=4) + PTuning()"])
def test_our_p_tuning_goes_there_as_its_rows(recipe: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    check_written(case, ours(case, recipe), tmp_path, "PROMPT_TUNING")


@pytest.mark.parametrize("recipe", ["PromptTuning(length=4)", "PTuningV2(length=4)"])
def test_generation_goes_on_alike(recipe: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    model: Any = ours(case, recipe)
    ids = case.batch()["input_ids"]
    esp.save(model, "mine", tmp_path, format="peft")
    other: Any = peft.PeftModel.from_pretrained(case.make(), str(tmp_path)).eval()
    how = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    made = model.generate(ids, **how)
    # Word by word: peft's own `generate` puts prompts elsewhere since transformers 5.24.
    for _ in range(5):
        with torch.no_grad():
            last = other(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
        ids = torch.cat((ids, last.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(ids, made)


@pytest.mark.parametrize(
    ("case", "recipe", "named"),
    [
        (BY_NAME["bert"], "PromptTuning(length=4)", "pools the first of its virtual tokens"),
        (BY_NAME["vit"], "PromptTuning(length=4)", "of which ViTForImageClassification is none"),
        (MORE["tagger"], "PromptTuning(template=(2, 0, 2))", r"template \(2, 0, 2\)"),
        (BY_NAME["llama"], "PromptTuning() + LoRA()", "LowRank, Prompt together"),
        (BY_NAME["llama"], "PromptTuning() + FullTuning()", "replaces model.embed_tokens.weight"),
    ],
)
def test_what_is_no_prompt_of_theirs_is_not_written(
    case: Case, recipe: str, named: str, tmp_path: Path
) -> None:
    model = ours(case, recipe)
    with pytest.raises(CheckpointError, match=named):
        esp.save(model, "mine", tmp_path, format="peft")
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_only_the_text_of_ours_gets_is_refused(tmp_path: Path) -> None:
    def make() -> nn.Module:
        sides = {"encoder_layers": 2, "decoder_layers": 2, "scale_embedding": True}
        return seeded(
            tf.PegasusForConditionalGeneration,
            tf.PegasusConfig,
            **{**sides, "d_model": 24, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
            encoder_attention_heads=4,
            decoder_attention_heads=4,
        )

    model = ours(Case("scaled", make, BY_NAME["t5"].batch, False), "PromptTuning(length=4)")
    with pytest.raises(CheckpointError, match="without the scale that Pegasus"):
        esp.save(model, "mine", tmp_path, format="peft")


def test_a_prompt_before_a_pooled_token_is_not_read(tmp_path: Path) -> None:
    case = BY_NAME["bert"]
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs(case, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pools the first of its virtual tokens"):
        esp.load(case.make(), tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_virtual_tokens": 3}, "4 rows for num_virtual_tokens=3"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        ({"a_setting_of_next_year": 3}, "a_setting_of_next_year"),
        ({"peft_type": "CPT"}, "CPT"),
    ],
)
def test_prompts_that_we_do_not_know_are_named(change: dict, named: str, tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs(case, config).save_pretrained(tmp_path)
    rewritten(tmp_path, **change)
    model = case.make()
    with pytest.raises(CheckpointError, match=named):
        esp.load(model, tmp_path, "mine")
    assert "espalier" not in model._modules


# --------------------------------------------------------------------------------------- prefixes


def stretched() -> nn.Module:
    """A Llama whose rotary embedding is stretched, and scaled."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}
    return seeded(
        tf.LlamaForCausalLM,
        tf.LlamaConfig,
        num_key_value_heads=2,
        rope_parameters={**rope, "original_max_position_embeddings": 16},
    )


def paired() -> nn.Module:
    """A Cohere: its rotary embedding turns neighbours, not halves."""
    return seeded(tf.CohereForCausalLM, tf.CohereConfig, num_key_value_heads=2)


TURNING = [
    BY_NAME["llama"],
    MORE["judge"],
    Case("yarn", stretched, BY_NAME["llama"].batch, False),
    Case("pairs", paired, BY_NAME["llama"].batch, False),
]


@pytest.mark.usefixtures("peft_finds_caches")
@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("case", TURNING, ids=lambda case: case.name)
def test_their_prefix_here(case: Case, project: bool, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(
        task_type="SEQ_CLS" if case.has_new_head else "CAUSAL_LM",
        num_virtual_tokens=5,
        prefix_projection=project,
        encoder_hidden_size=8,
    )
    check_read(case, theirs(case, config), tmp_path)


@pytest.mark.usefixtures("peft_finds_caches")
@pytest.mark.parametrize("recipe", ["PTuningV2(length=5)", "PrefixTuning(length=5, hidden=8)"])
@pytest.mark.parametrize("case", TURNING, ids=lambda case: case.name)
def test_our_prefix_there(case: Case, recipe: str, tmp_path: Path) -> None:
    config = check_written(case, ours(case, recipe), tmp_path, "PREFIX_TUNING")
    assert (config["num_layers"], config["num_attention_heads"]) == (2, 2)


@pytest.mark.parametrize(
    ("case", "recipe", "named"),
    [
        (BY_NAME["bert"], "PTuningV2()", "BertForSequenceClassification takes none"),
        (BY_NAME["gpt2"], "PTuningV2()", "GPT2LMHeadModel has none"),
        (BY_NAME["t5"], "PTuningV2()", "an encoder-decoder"),
        (BY_NAME["llama"], "PTuningV2(sites='attention@0')", "none in layer 1"),
        (
            BY_NAME["llama"],
            "PTuningV2(length=2, sites='attention@0') + PTuningV2(length=3, sites='attention@1')",
            r"as long and as wide in every layer.*\(2, 12\), \(3, 12\)",
        ),
    ],
)
def test_prefixes_that_would_differ_there_are_not_written(
    case: Case, recipe: str, named: str, tmp_path: Path
) -> None:
    model = ours(case, recipe)
    with pytest.raises(CheckpointError, match=named):
        esp.save(model, "mine", tmp_path, format="peft")


@pytest.mark.parametrize("case", [BY_NAME["gpt2"], BY_NAME["t5"]], ids=lambda case: case.name)
def test_prefixes_that_would_differ_here_are_not_read(case: Case, tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type=TASKS[case.name], num_virtual_tokens=5)
    theirs(case, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no prefix of peft's is equal here"):
        esp.load(case.make(), tmp_path)


def test_a_prefix_that_a_window_leaves_behind_is_not_written(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return seeded(
            tf.MistralForCausalLM, tf.MistralConfig, num_key_value_heads=2, sliding_window=4
        )

    model = ours(Case("window", make, BY_NAME["llama"].batch, False), "PTuningV2()")
    with pytest.raises(CheckpointError, match="leaves a prefix behind by a sliding window"):
        esp.save(model, "mine", tmp_path, format="peft")


def test_a_prefix_for_more_layers_is_named(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, num_layers=3)
    theirs(case, config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"\(5, 72\), this model's 2 layers need \(5, 48\)"):
        esp.load(case.make(), tmp_path)


# ------------------------------------------------------------------------------------------ norms

NORMS = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
}


@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_their_norms_here(case: Case, tmp_path: Path) -> None:
    head = ["classifier"] if case.has_new_head else None
    config = peft.LNTuningConfig(target_modules=NORMS[case.name], modules_to_save=head)
    check_read(case, theirs(case, config), tmp_path)


@pytest.mark.parametrize("sites", ["norm", "norm@1"])
@pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)
def test_our_norms_there(case: Case, sites: str, tmp_path: Path) -> None:
    model = ours(case, f"PartialTuning(sites={sites!r})")
    config = check_written(case, model, tmp_path, "LN_TUNING")
    assert all("norm" in path.lower() or ".ln_" in path for path in config["target_modules"])


def test_where_only_biases_of_norms_train_weights_go_along_as_they_are(tmp_path: Path) -> None:
    case = BY_NAME["gpt2"]
    model = ours(case, "PartialTuning(sites='norm', kinds='bias')")
    check_written(case, model, tmp_path, "LN_TUNING")
    state = load_file(tmp_path / FILE)
    key = "base_model.model.transformer.ln_f.ln_tuning_layers.weight"
    assert torch.equal(state[key], case.make().get_parameter("transformer.ln_f.weight"))


@pytest.mark.parametrize("recipe", ["BitFit()", "PartialTuning(sites='norm, attention.q')"])
def test_what_is_no_norm_is_not_written(recipe: str, tmp_path: Path) -> None:
    model = ours(BY_NAME["bert"], recipe)
    with pytest.raises(CheckpointError, match=r"norms and heads|only replaces parameters"):
        esp.save(model, "mine", tmp_path, format="peft")


def test_copies_of_layers_that_are_no_norms_are_read_too(tmp_path: Path) -> None:
    case = BY_NAME["llama"]
    config = peft.LNTuningConfig(target_modules=["o_proj", "lm_head"])
    check_read(case, theirs(case, config), tmp_path)


def test_a_copy_of_one_of_two_tied_tables_is_refused(tmp_path: Path) -> None:
    case = BY_NAME["gpt2"]
    theirs(case, peft.LNTuningConfig(target_modules=["lm_head"])).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tied to"):
        esp.load(case.make(), tmp_path)


# ------------------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("head", ["auto", False])
@pytest.mark.parametrize("recipe", ["LoRA(rank=2)", "IA3()", "PartialTuning(sites='norm')"])
def test_heads_of_several_layers_go_along(recipe: str, head: str | bool, tmp_path: Path) -> None:
    case = MORE["reader"]
    kind = {"L": "LORA", "I": "IA3", "P": "LN_TUNING"}[recipe[0]]
    config = check_written(case, ours(case, recipe, head=head), tmp_path, kind)
    assert config["modules_to_save"] == ["classifier"]


def test_their_head_comes_with_a_prompt(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    model = check_read(MORE["judge"], theirs(MORE["judge"], config), tmp_path)
    assert model.get_submodule("espalier.@mine").head == ("score",)
