"""Keys of other tools, and Espalier's words for them; errors about settings as plain sentences.

Nothing is accepted under two names: a foreign key is refused, and the refusal names the key to
write instead. Names come from Hugging Face's TrainingArguments, LLaMA-Factory, axolotl, unsloth,
litgpt and peft.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from espalier.errors import nearest
from espalier.wording import setting

_KEYS: dict[str, str] = {
    "model": "model_name_or_path base_model model_name model_id pretrained_model_name_or_path "
    "checkpoint_dir",
    "method": "adapter peft_type finetuning_type peft_config lora use_peft",
    "train": "dataset datasets data dataset_name data_path train_file train_data train_dataset",
    "validation": "validation_file eval_dataset eval_file val_data valid_file test_datasets",
    "test": "test_file test_dataset",
    "columns": "dataset_text_field text_column label_column field_messages",
    "limit": "max_samples max_train_samples",
    "validation_share": "val_set_size val_size split_dataset_ratio",
    "max_length": "sequence_len cutoff_len max_seq_length max_seq_len model_max_length seq_len",
    "system": "default_system system_prompt system_message",
    "epochs": "num_train_epochs num_epochs n_epochs epoch",
    "steps": "max_steps train_iters",
    "batch": "per_device_train_batch_size micro_batch_size train_batch_size batch_size",
    "eval_batch": "per_device_eval_batch_size eval_batch_size",
    "accumulate": "gradient_accumulation_steps grad_accumulation",
    "lr": "learning_rate",
    "schedule": "lr_scheduler_type lr_scheduler",
    "warmup": "warmup_ratio warmup_steps lr_warmup_steps",
    "clip": "max_grad_norm gradient_clipping grad_clip max_norm",
    "precision": "bf16 fp16 fp32 tf32 mixed_precision dtype torch_dtype",
    "quantize": "load_in_4bit load_in_8bit quantization_bit quantization bnb_4bit_quant_type",
    "double_quantization": "bnb_4bit_use_double_quant use_nested_quant double_quant",
    "optimizer": "optim optim_type",
    "checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "offload": "activation_offloading offload_activations cpu_offload",
    "compile": "torch_compile torch_compile_backend torch_compile_mode",
    "evaluate_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval",
    "save_every": "save_steps save_strategy saves_per_epoch save_interval",
    "patience": "early_stopping_patience early_stopping",
    "keep": "load_best_model_at_end save_total_limit metric_for_best_model",
    "seed": "random_seed data_seed",
    "out": "output_dir out_dir output output_path",
    "resume": "resume_from_checkpoint",
    "overwrite": "overwrite_output_dir",
    "tensorboard": "report_to logging_dir",
    "generate": "predict_with_generate",
    "max_new_tokens": "generation_max_length max_target_length",
}

_SENTENCES: dict[str, str] = {
    "sample_packing": "write batching: pack",
    "packing": "write batching: pack",
    "group_by_length": "write batching: bucket (the default)",
    "lora_r": "write method: LoRA(rank=8)",
    "lora_rank": "write method: LoRA(rank=8)",
    "r": "write method: LoRA(rank=8)",
    "rank": "write method: LoRA(rank=8)",
    "lora_alpha": "write method: LoRA(alpha=16)",
    "alpha": "write method: LoRA(alpha=16)",
    "lora_dropout": "write method: LoRA(dropout=0.05)",
    "dropout": "write method: LoRA(dropout=0.05)",
    "lora_target": "write method: LoRA(sites='all-linear')",
    "lora_target_modules": "write method: LoRA(sites='all-linear')",
    "target_modules": "write method: LoRA(sites='all-linear')",
    "lora_target_linear": "write method: LoRA(sites='all-linear')",
    "sites": "write method: LoRA(sites='all-linear')",
    "use_rslora": "write method: LoRA(rslora=True)",
    "modules_to_save": "write head: [module names]",
    "logging_steps": "leave it out: every step is written to metrics.jsonl",
    "do_train": "leave it out: `espalier train` trains",
    "do_eval": "leave it out: a validation set is evaluated when there is one",
    "template": "leave it out for the tokenizer's own, or write chat_template with one in Jinja",
}

ALIASES: dict[str, str] = {
    alias: f"write {key}" for key, names in _KEYS.items() for alias in names.split()
} | _SENTENCES


def unknown_key(key: str, known: Iterable[str]) -> str:
    """One sentence on an unknown setting: Espalier's word for it, or the nearest right keys."""
    plain = key.lower().replace("-", "_").strip()
    known = list(known)
    if plain in known:
        return f"There is no setting {key!r}: write {plain}."
    if plain in ALIASES:
        return f"There is no setting {key!r}: {ALIASES[plain]}."
    close = difflib.get_close_matches(plain, [*known, *ALIASES], n=1, cutoff=0.75)
    if close and close[0] in ALIASES:
        return f"There is no setting {key!r}: for {close[0]}, {ALIASES[close[0]]}."
    return f"There is no setting {key!r}; {nearest(plain, known)}"


def _options(text: str) -> str:
    return text.replace("'", "").replace(" or ", ", ")


def _sentence(key: str, error: Mapping[str, Any], description: str) -> str:
    got, context = error.get("input"), error.get("ctx") or {}
    bounds = {
        "greater_than": ("must be more than", "gt"),
        "greater_than_equal": ("must be at least", "ge"),
        "less_than": ("must be less than", "lt"),
        "less_than_equal": ("must be at most", "le"),
    }
    kind, key = error["type"], setting(key)
    if kind == "missing":
        return f"{key} is missing: {description}"
    if kind in bounds:
        words, name = bounds[kind]
        return f"{key} {words} {context[name]:g}; got {got!r}."
    if kind == "literal_error":
        words = _options(str(context["expected"]))
        hint = nearest(str(got), words.split(", ")) if isinstance(got, str) else ""
        hint = f"; {hint}" if hint.startswith("did") else "."
        return f"{key} must be one of {words}; got {got!r}{hint}"
    if kind == "value_error":
        return str(context.get("error", error["msg"]))
    return f"{key}: {str(error['msg'])[0].lower()}{str(error['msg'])[1:]}; got {got!r}."


def sentences(errors: Iterable[Mapping[str, Any]], descriptions: Mapping[str, str]) -> list[str]:
    """One sentence per wrong setting out of pydantic's list of errors.

    A value that fits no member of a union makes several pydantic errors; it gets one sentence
    which tells what the setting takes.
    """
    by_key: dict[str, list[Mapping[str, Any]]] = {}
    for error in errors:
        by_key.setdefault(str(error["loc"][0]) if error["loc"] else "", []).append(error)
    out = []
    for key, group in by_key.items():
        if group[0]["type"] == "extra_forbidden":
            out.append(unknown_key(key, descriptions))
        elif len(group) > 1:
            got = group[0].get("input")
            out.append(f"{setting(key)} does not take {got!r}: {descriptions[key]}")
        else:
            out.append(_sentence(key, group[0], descriptions.get(key, "")))
    return out
