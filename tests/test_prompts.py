"""Soft prompts against the bare model fed with embeddings: cat(P, E(x)), mask and positions."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn import functional as F

import espalier as esp
from espalier.errors import AdapterError, SettingError, SiteError
from espalier.graft import find
from zoo import BY_NAME, VOCAB, gpt2, llama, logits, t5, train

L = 4
RANDOM = f"PromptTuning(length={L}, init='random')"
WRITERS = ("gpt2", "llama")
PAIRS = ("t5", "bart")


def made(name: str, recipe: str = RANDOM) -> Any:
    model: Any = BY_NAME[name].make()
    esp.attach(model, recipe, "mine")
    return model


def remade(name: str, kind: str = "", **settings: Any) -> Any:
    """A bare model of a family, of another class or with other settings."""
    model: Any = BY_NAME[name].make()
    model.config.update(settings)
    torch.manual_seed(7)
    return (getattr(tf, kind) if kind else type(model))(model.config).eval()


def rows(model: nn.Module, name: str = "mine") -> Tensor:
    """The rows of a prompt (L, D), apart from everything."""
    delta = next(d for d in find(model).adapters[name].deltas if d.embeds)
    return delta.embed(delta.t, False).detach().clone()


def ids(count: int = 3, tokens: int = 9, seed: int = 1) -> Tensor:
    return torch.randint(5, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(seed))


def spelled(model: Any, words: Tensor, prompt: Tensor | None = None) -> Tensor:
    """The embeddings [P; E(x)] (B, L + T, D); the model is bare from now on."""
    prompt = rows(model) if prompt is None else prompt
    esp.activate(model, None)
    table = model.get_encoder().embed_tokens if model.config.is_encoder_decoder else None
    table = table or model.get_input_embeddings()
    with torch.no_grad():
        return torch.cat([prompt.expand(len(words), -1, -1), table(words)], 1)


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> None:
    torch.testing.assert_close(a, b, atol=within, rtol=within)


def padded(words: Tensor, by: int, left: bool) -> tuple[Tensor, Tensor]:
    """One row with `by` padding ids, and its mask."""
    pad, ones = torch.zeros(1, by, dtype=torch.long), torch.ones_like(words)
    parts = [(pad, pad), (words, ones)] if left else [(words, ones), (pad, pad)]
    one, two = zip(*parts, strict=True)
    return torch.cat(one, 1), torch.cat(two, 1)


# -------------------------------------------------------------------------- equal to embeddings


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_a_decoder_equals_the_base_on_embeddings(name: str, masked: bool) -> None:
    model, words = made(name), ids()
    given = {"attention_mask": torch.ones_like(words)} if masked else {}
    out = model(input_ids=words, labels=words, **given)
    with torch.no_grad():
        bare = model(inputs_embeds=spelled(model, words)).logits[:, L:]
    close(out.logits, bare)
    close(out.loss, F.cross_entropy(bare[:, :-1].flatten(0, 1), words[:, 1:].flatten()))


@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_decoder_reads_the_prompt_in_its_encoder_alone(name: str) -> None:
    model, words, answer = made(name), ids(), ids(3, 5, seed=2)
    mask = torch.ones_like(words)
    mask[1, 6:] = 0
    mask[2, :2] = 0
    given = logits(model, {"input_ids": words, "attention_mask": mask, "labels": answer})
    alone = logits(model, {"input_ids": words[:1], "labels": answer[:1]})
    close(given[:1], alone)
    embedded, prompt = spelled(model, words), rows(model)
    wide = torch.cat([torch.ones(3, L, dtype=torch.long), mask], 1)
    embedded[2, 2 : 2 + L], embedded[2, :2] = prompt, embedded[2, L : L + 2]  # after the padding
    wide[2, :2], wide[2, 2 : 2 + L] = 0, 1
    with torch.no_grad():
        bare = model(inputs_embeds=embedded, attention_mask=wide, labels=answer).logits
    close(given, bare)


def test_the_pooler_reads_the_first_token_of_the_text() -> None:
    model, words = made("bert"), ids()
    found = logits(model, {"input_ids": words})
    with torch.no_grad():
        states = model.bert(inputs_embeds=spelled(model, words)).last_hidden_state
        first = model.bert.pooler(states[:, L:])
        virtual = model.bert.pooler(states)
        close(found, model.espalier and _head(model, first))
    assert (found - _head(model, virtual)).abs().max() > 1e-4


def _head(model: Any, pooled: Tensor) -> Tensor:
    esp.activate(model, "mine")  # the head is trained with the prompt
    with torch.no_grad():
        return model.classifier(pooled)


def test_an_image_equals_rows_put_in_by_hand() -> None:
    model, batch = made("vit"), BY_NAME["vit"].batch()
    found, prompt = logits(model, batch), rows(model)
    with torch.no_grad():
        x = model.vit.embeddings(batch["pixel_values"])
        x = torch.cat([x[:, :1], prompt.expand(3, -1, -1), x[:, 1:]], 1)
        esp.activate(model, None)
        for layer in model.vit.layers:
            x = layer(x)
        pooled = model.vit.layernorm(x)[:, 0]
    close(found, _head(model, pooled))


@pytest.mark.parametrize("name", ["bert", *WRITERS, *PAIRS])
def test_rows_of_real_words_are_those_words(name: str) -> None:
    model: Any = BY_NAME[name].make()
    base = model.get_encoder() if name in PAIRS else model.base_model
    esp.attach(model, "PromptTuning(length=3, init='text', text=(11, 12, 13))")
    words = ids()
    longer = torch.cat([torch.tensor([[11, 12, 13]]).expand(3, -1), words], 1)
    with torch.no_grad():
        found = base(words).last_hidden_state
        esp.activate(model, None)
        whole = base(longer).last_hidden_state
    close(found, whole if name in PAIRS else whole[:, 3:])


def test_words_given_as_embeddings_and_by_position_get_the_prompt_too() -> None:
    model, words = made("llama"), ids()
    positions = torch.arange(9)[None]
    expected = logits(model, {"input_ids": words})
    features = model.model.embed_tokens(words)
    close(logits(model, {"inputs_embeds": features}), expected)
    close(logits(model, {"input_ids": words, "position_ids": positions}), expected)
    with torch.no_grad():
        close(model.model(words, None, positions).last_hidden_state, model.model(words)[0])


def test_what_the_model_tells_besides_is_of_the_text_too() -> None:
    model, words = made("gpt2"), ids()
    out = model(words, output_hidden_states=True)
    bare = model(inputs_embeds=spelled(model, words), output_hidden_states=True)
    assert len(out.hidden_states) == 3
    for mine, theirs in zip(out.hidden_states, bare.hidden_states, strict=True):
        close(mine, theirs[:, L:])


def test_token_types_are_embedded_without_the_prompt() -> None:
    model, words = made("gpt2"), ids()
    types = ids(seed=5)
    with torch.no_grad():
        found = model(words, token_type_ids=types).logits
        wide = torch.cat([types[:, :1].expand(-1, L), types], 1)
        bare = model(inputs_embeds=spelled(model, words), token_type_ids=wide).logits
    close(found, bare[:, L:])


# ---------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("name", WRITERS)
def test_a_left_padded_row_equals_the_row_alone(name: str) -> None:
    model, words = made(name), ids(1)
    train(model, {"input_ids": words, "labels": words})
    row, mask = padded(words, 4, left=True)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    batch = {"input_ids": row, "attention_mask": mask, "position_ids": positions}
    close(logits(model, batch)[:, 4:], logits(model, {"input_ids": words}), 1e-5)


@pytest.mark.parametrize("template", ["", ", template=(1, 2, 1)"])
@pytest.mark.parametrize("name", ["bert", *PAIRS])
def test_a_right_padded_row_equals_the_row_alone(name: str, template: str) -> None:
    model, words = made(name, f"PromptTuning(init='random'{template})"), ids(1)
    words[0, 3] = 2
    row, mask = padded(words, 4, left=False)
    more = {"labels": ids(1, 5)} if name in PAIRS else {}
    alone = logits(model, {"input_ids": words, **more})
    close(logits(model, {"input_ids": row, "attention_mask": mask, **more}), alone, 1e-5)


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_a_classifying_decoder_pools_the_last_real_token(family: str, left: bool) -> None:
    settings: Any = {"num_labels": 3, "pad_token_id": 0}
    model = remade(family.lower(), f"{family}ForSequenceClassification", **settings)
    esp.attach(model, RANDOM, "mine")
    words = ids(1)
    row, mask = padded(words, 4, left)
    given = {"input_ids": row, "attention_mask": mask}
    if left:
        given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    found = logits(model, given)
    with torch.no_grad():
        embedded = spelled(model, words)
        esp.activate(model, None)
        state = model.base_model(inputs_embeds=embedded).last_hidden_state[:, -1]
        esp.activate(model, "mine")
        close(found, model.score(state), 1e-5)
    assert model(**given, labels=torch.tensor([1])).loss.isfinite()


def test_an_encoder_decoder_classifies_as_its_base_does_on_embeddings() -> None:
    model = remade("bart", "BartForSequenceClassification", num_labels=3)
    words = ids()
    words[:, -1] = 2
    esp.attach(model, RANDOM, "mine", head=False)
    found = logits(model, {"input_ids": words})
    embedded = spelled(model, words)
    with torch.no_grad():
        states = model.model.encoder(inputs_embeds=embedded)
        close(found, model(input_ids=words, encoder_outputs=states).logits)


# ------------------------------------------------------------------------------------- generation

HOW = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sample": {"do_sample": True, "top_k": 20},
}
NEW = {"max_new_tokens": 7, "min_new_tokens": 7}


def strong(model: Any) -> Any:
    """The model with a base that minds every word; a random one writes the same after any."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and "espalier" not in name:
                p.mul_(6)
    return model


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", WRITERS)
def test_generation_equals_the_base_on_embeddings(name: str, how: str) -> None:
    model = strong(made(name))
    short, long = ids(1, 6, seed=3), ids(1)
    row, mask = padded(short, 3, left=True)
    words, mask = torch.cat([row, long]), torch.cat([mask, torch.ones_like(long)])
    given = {"input_ids": words, "attention_mask": mask}
    texts = []
    for cache in (True, False):
        torch.manual_seed(5)
        texts.append(model.generate(**given, use_cache=cache, **HOW[how], **NEW))
    assert torch.equal(*texts)
    assert torch.equal(texts[0][:1, :9], words[:1])
    prompt = rows(model)
    embedded = spelled(model, words)
    embedded[0] = torch.cat([embedded[0, L : L + 3], prompt, embedded[0, L + 3 :]])
    wide = torch.cat([mask[:, :3], torch.ones(2, L, dtype=torch.long), mask[:, 3:]], 1)
    torch.manual_seed(5)
    bare = model.generate(inputs_embeds=embedded, attention_mask=wide, **HOW[how], **NEW)
    assert torch.equal(texts[0][:, 9:], bare)
    torch.manual_seed(5)
    assert not torch.equal(model.generate(**given, **HOW[how], **NEW), texts[0])


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pytest.mark.parametrize("name", PAIRS)
def test_an_encoder_decoder_generates_as_its_base_on_embeddings(name: str, how: str) -> None:
    model, words = strong(made(name)), ids(2)
    mask = torch.ones_like(words)
    mask[1, 5:] = 0
    given = {"attention_mask": mask, **HOW[how], **NEW}
    found = model.generate(input_ids=words, **given)
    assert torch.equal(found, model.generate(input_ids=words, use_cache=False, **given))
    given["attention_mask"] = torch.cat([torch.ones(2, L, dtype=torch.long), mask], 1)
    assert torch.equal(found, model.generate(inputs_embeds=spelled(model, words), **given))


def test_processors_limits_and_streams_know_the_text_alone() -> None:
    model, words = strong(made("llama")), ids(1)
    seen: list[Tensor] = []

    class Keeper(tf.generation.streamers.BaseStreamer):
        def put(self, value: Tensor) -> None:
            seen.append(value.flatten())

        def end(self) -> None:
            seen.append(torch.tensor([], dtype=torch.long))

    how = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "do_sample": False}
    out = model.generate(
        words, max_length=16, min_length=16, streamer=Keeper(), return_dict_in_generate=True, **how
    )
    assert torch.equal(torch.cat(seen), out.sequences[0])
    assert out.sequences.shape == (1, 16)
    text = words
    penalty = tf.RepetitionPenaltyLogitsProcessor(1.8)
    grams = tf.NoRepeatNGramLogitsProcessor(2)
    for _ in range(7):
        scores = logits(model, {"input_ids": text})[:, -1]
        scores[:, 2] = -torch.inf  # no end before the minimum
        text = torch.cat([text, grams(text, penalty(text, scores)).argmax(1, keepdim=True)], 1)
    assert torch.equal(out.sequences, text)


def test_a_cache_is_gone_on_with_and_drafts_are_taken_back() -> None:
    model, words = strong(made("gpt2")), ids(1, 6)
    how = {"do_sample": False, **NEW}
    first = model.generate(words, return_dict_in_generate=True, **how)
    longer = torch.cat([first.sequences, ids(1, 3, seed=4)], 1)
    fresh = model.generate(longer, **how)
    again = model.generate(longer, past_key_values=first.past_key_values, **how)
    assert torch.equal(fresh, again)
    loop = torch.cat([words, words, words], 1)
    drafted = model.generate(loop, prompt_lookup_num_tokens=3, **how)
    assert torch.equal(drafted, model.generate(loop, **how))
    chunks = model.generate(loop, prefill_chunk_size=5, **how)
    assert torch.equal(chunks, model.generate(loop, **how))


def test_a_recurrent_state_holds_the_prompt_too() -> None:
    config = tf.MambaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, state_size=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(7)
    model = strong(tf.MambaForCausalLM(config).eval())
    esp.attach(model, RANDOM, "mine")
    words, how = ids(2), {"do_sample": False, **NEW}
    cached = model.generate(words, **how)
    assert torch.equal(cached, model.generate(words, use_cache=False, **how))
    esp.activate(model, None)
    assert not torch.equal(cached, model.generate(words, **how))


def test_a_cache_without_room_or_of_another_adapter_is_refused() -> None:
    model, words = made("llama"), ids(1)
    with pytest.raises(AdapterError, match="no room for a soft prompt"):
        model.generate(words, cache_implementation="static", **NEW)
    esp.activate(model, None)
    cache = model(words).past_key_values
    esp.activate(model, "mine")
    with pytest.raises(AdapterError, match="filled while other adapters"):
        model(words[:, :1], past_key_values=cache, attention_mask=torch.ones(1, 10))


# ------------------------------------------------------------------------- several, and templates


def test_prompts_stack_in_the_order_in_which_they_are_active() -> None:
    model, words = made("gpt2"), ids()
    esp.attach(model, "PromptTuning(length=2) + LoRA(rank=2, sites='embedding')", "second")
    esp.activate(model, ["second", "mine"])
    found = logits(model, {"input_ids": words})
    both = torch.cat([rows(model, "second"), rows(model)])
    close(found, logits(model, {"inputs_embeds": spelled(model, words, both)})[:, 6:])
    esp.activate(model, ["mine", "second"])
    assert (logits(model, {"input_ids": words}) - found).abs().max() > 1e-4
    esp.activate(model, {"second": 1.0})
    train(model, {"input_ids": words, "labels": words})
    moved = logits(model, {"input_ids": words})
    table = next(d for d in find(model).adapters["second"].deltas if not d.embeds)
    change = F.embedding(words, table.t["a"].T) @ table.t["b"].T * table.scale  # type: ignore[attr-defined]
    embedded = spelled(model, words, rows(model, "second"))
    embedded[:, 2:] += change.detach()  # the words are changed, the prompt is not
    close(moved, logits(model, {"inputs_embeds": embedded})[:, 2:], 1e-5)


def test_a_template_puts_words_before_within_and_after_the_text() -> None:
    model = remade("bert", "BertForTokenClassification")
    esp.attach(model, "PromptTuning(template=(1, 2, 1), init='random')", "mine", head=False)
    words = ids(2, 8)
    mask = torch.ones_like(words)
    mask[0, 6:] = 0
    types = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 1, 1]])
    found = logits(model, {"input_ids": words, "attention_mask": mask, "token_type_ids": types})
    prompt = rows(model)
    esp.activate(model, None)
    for row, (second, end) in enumerate([(3, 6), (5, 8)]):
        text = model.bert.embeddings.word_embeddings(words[row]).detach()
        parts = [prompt[:1], text[:second], prompt[1:3], text[second:end], prompt[3:]]
        kinds = torch.tensor([[0] * (1 + second + 2) + [1] * (end - second + 1)])
        kept = [*range(1, 1 + second), *range(3 + second, 3 + end)]
        bare = logits(model, {"inputs_embeds": torch.cat(parts)[None], "token_type_ids": kinds})
        close(found[row, :end], bare[0, kept])


def test_without_types_the_first_separator_parts_the_text() -> None:
    model = made("llama", "PromptTuning(template=(1, 2, 0), init='random')")
    words = ids(2)
    words[0, 4] = 2  # the end token of this model; the second row has but one segment
    found, prompt = logits(model, {"input_ids": words}), rows(model)
    text = spelled(model, words, prompt[:0])
    first = torch.cat([prompt[:1], text[0, :5], prompt[1:], text[0, 5:]])[None]
    bare = logits(model, {"inputs_embeds": first})[0]
    close(found[0], torch.cat([bare[1:6], bare[8:]]))
    whole = torch.cat([prompt, text[1]])[None]
    close(found[1], logits(model, {"inputs_embeds": whole})[0, 3:])
    esp.activate(model, "mine")
    how = {"do_sample": False, **NEW}
    cached = model.generate(words[:1], **how)
    assert torch.equal(cached, model.generate(words[:1], use_cache=False, **how))


# ------------------------------------------------------------------------------- made by networks


def _linears(t: dict[str, Tensor], x: Tensor) -> Tensor:
    return F.linear(F.linear(x, t["w1"], t["b1"]).relu(), t["w2"], t["b2"])


@pytest.mark.parametrize("hidden", [None, 5])
def test_the_lstm_is_pytorchs(hidden: int | None) -> None:
    model = made("bert", f"PTuning(length=3, hidden={hidden})")
    t = {k: v.detach() for k, v in find(model).adapters["mine"].deltas[0].t.items()}
    size = hidden or 12
    other = nn.LSTM(24, size, 2, bidirectional=True, batch_first=True)
    names = {"in": "ih", "state": "hh"}
    with torch.no_grad():
        for layer in (0, 1):
            for side, ending in (("forward", ""), ("backward", "_reverse")):
                for mine, theirs in names.items():
                    for kind, long in (("w", "weight"), ("b", "bias")):
                        own = t[f"{kind}_{mine}_{layer}_{side}"]
                        getattr(other, f"{long}_{theirs}_l{layer}{ending}").copy_(own)
        close(rows(model), _linears(t, other(t["e"][None])[0][0]))


def test_the_mlp_is_two_linears_with_a_relu() -> None:
    model = made("t5", "PTuning(length=1, encoder='mlp')")
    t = {k: v.detach() for k, v in find(model).adapters["mine"].deltas[0].t.items()}
    close(rows(model), _linears(t, t["e"]))


@pytest.mark.parametrize("encoder", ["lstm", "mlp"])
def test_the_plain_form_gives_what_the_network_gave(encoder: str, tmp_path: Path) -> None:
    model = made("bert", f"PTuning(template=(2, 0, 1), encoder='{encoder}')")
    batch = BY_NAME["bert"].batch()
    train(model, batch)
    assert esp.dead_sites(model) == []
    expected, account = logits(model, batch), esp.account(model, "mine")
    assert esp.to_plain(model, "mine")
    assert torch.equal(logits(model, batch), expected)
    assert str(find(model).adapters["mine"].recipe) == (
        "PromptTuning(length=3, template=(2, 0, 1))"
    )
    assert account.kept == 3 * 24 + account.head
    esp.save(model, "mine", tmp_path)
    fresh = BY_NAME["bert"].make()
    esp.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, batch), expected)


def test_counts_on_bert_base_are_the_papers() -> None:
    with torch.device("meta"):
        model = tf.BertModel(tf.BertConfig())
    esp.attach(model, "PTuning(length=9)", "made")
    made_ = esp.account(model, "made")
    assert (made_.trained, made_.kept) == (8_278_272, 6_912)
    esp.attach(model, "PTuning(length=20, encoder='mlp')", "mlp")
    assert esp.account(model, "mlp").trained == 20 * 768 + 2 * (768 * 768 + 768)
    for length, count in ((20, 15_360), (100, 76_800)):
        esp.attach(model, f"PromptTuning(length={length}, init='random')", str(length))
        assert esp.account(model, str(length)).trained == count


# ------------------------------------------------------------------------------------------ starts


@pytest.mark.parametrize("name", ["bert", "bart", "t5"])
def test_rows_start_as_different_words_of_the_vocabulary(name: str) -> None:
    model = made(name, "PromptTuning(length=30)")
    inside = model.get_encoder() if name in PAIRS else model.bert.embeddings
    table = inside.embed_tokens if name in PAIRS else inside.word_embeddings
    with torch.no_grad():
        words = table(torch.arange(VOCAB))  # as they leave the embedding, BART's scaled
    same = (rows(model)[:, None] == words).all(-1)
    assert same.any(1).all()
    chosen = same.int().argmax(1)
    assert len(set(chosen.tolist())) == 30
    special = {model.config.pad_token_id, model.config.eos_token_id}
    assert not special & set(chosen.tolist())


def test_random_rows_lie_on_both_sides_of_zero() -> None:
    found = rows(made("llama", "PromptTuning(length=100, init='random')"))
    assert -0.5 <= found.min() < -0.45
    assert 0.45 < found.max() <= 0.5
    assert abs(found.mean()) < 0.03


def test_rows_start_from_given_words() -> None:
    model = made("bart", "PromptTuning(length=5, init='text', text=(7, 8))")
    table = model.get_encoder().embed_tokens
    close(rows(model), table(torch.tensor([7, 8, 7, 8, 7])).detach())
    esp.attach(model, "PromptTuning(length=3, init='labels', labels=((7,), (8, 9)))", "labels")
    found = rows(model, "labels")
    close(found[0], table(torch.tensor(7)).detach())
    close(found[1], table(torch.tensor([8, 9])).mean(0).detach())


def test_words_are_typed_as_they_are() -> None:
    from espalier.commands.flags import method_settings

    typed = ["--init", "text", "--length", "3", "--text", "Mood: good"]
    (found,) = method_settings(typed, "PromptTuning()")
    assert (found["text"], found["length"]) == ("Mood: good", 3)
    (found,) = method_settings(["--init", "text", "--text", "[7, 8]"], "PromptTuning()")
    assert found["text"] == [7, 8]
    typed = ["--init", "labels", "--labels", "[good, bad]", "--template", "[1, 0, 2]"]
    (found,) = method_settings(typed, "PromptTuning()")
    assert (found["labels"], found["template"]) == (["good", "bad"], [1, 0, 2])


def test_words_are_found_by_the_models_own_tokenizer(tmp_path: Path) -> None:
    from tiny_runs import bert as with_words
    from tiny_runs import tokenizer

    model, words = with_words(), tokenizer()
    words.save_pretrained(tmp_path)
    with pytest.raises(SettingError, match="takes a tokenizer, and none is found"):
        esp.attach(model, "PromptTuning(length=2, init='text', text='good film')")
    model.config._name_or_path = str(tmp_path)
    esp.attach(model, "PromptTuning(length=2, init='labels', labels=['good', 'bad'])", "mine")
    wanted = words(["good bad"], add_special_tokens=False).input_ids[0]
    close(rows(model), model.bert.embeddings.word_embeddings(torch.tensor(wanted)).detach())
    esp.save(model, "mine", tmp_path / "kept")
    fresh = with_words()  # knows no tokenizer any more, and needs none
    esp.load(fresh, tmp_path / "kept", "again")
    assert torch.equal(rows(fresh, "again"), rows(model))


# ------------------------------------------------------------------------------- life of a prompt


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_every_row_trains_and_the_base_does_not(name: str) -> None:
    model, batch = made(name), BY_NAME[name].batch()
    model(**batch).loss.backward()
    flat = find(model).adapters["mine"].flat["matrices"]
    assert flat.shape == (L * 24,)  # of an encoder-decoder no second set for the decoder
    assert flat.grad is not None
    assert flat.grad.view(L, -1).abs().sum(1).min() > 0
    assert [
        n for n, p in model.named_parameters() if p.grad is not None and "espalier" not in n
    ] == []


@pytest.mark.parametrize("name", BY_NAME)
def test_detaching_leaves_nothing(name: str) -> None:
    untouched, batch = BY_NAME[name].make(), BY_NAME[name].batch()
    model = made(name, "PTuning(length=3)")
    train(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), logits(model, batch))
    esp.attach(model, "LoRA(rank=2)", "other", head=False)
    esp.activate(model, ["mine", "other"])
    esp.detach(model, "mine")
    esp.activate(model, None)
    assert torch.equal(logits(model, batch), logits(untouched, batch))
    esp.detach(model, "other")
    for mine, theirs in zip(model.modules(), untouched.modules(), strict=True):
        assert sorted(mine.__dict__) == sorted(theirs.__dict__)
    train(twin, batch)
    esp.detach(twin, "mine")
    assert torch.equal(logits(twin, batch), logits(untouched, batch))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit"])
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    found = []
    for checkpointed in (False, True):
        model, batch = made(name, "PTuning(length=3)"), BY_NAME[name].batch()
        if name in ("bert", "llama"):
            batch["attention_mask"] = torch.ones(3, 9)
            batch["attention_mask"][0, :3] = 0
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        model.config.use_cache = False
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        for p in esp.parameters(model):
            p.data.normal_()
        model(**batch).loss.backward()
        found.append([p.grad.clone() for p in esp.parameters(model) if p.grad is not None])
    for one, two in zip(*found, strict=True):
        close(one, two, 1e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_graph_also_when_attached_after_compile(name: str) -> None:
    torch._dynamo.reset()
    model = remade(name, num_hidden_layers=1, num_decoder_layers=1)
    batch = BY_NAME[name].batch()
    batch["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    if name == "llama":
        compiled(**batch)
    esp.attach(model, "PTuning(length=3)" if name == "t5" else RANDOM, "mine")
    out = compiled(**batch)
    out.loss.backward()
    assert all(p.grad is not None for p in esp.parameters(model))
    close(out.logits, logits(model, batch), 1e-5)
    torch._dynamo.reset()


def test_a_bf16_base_keeps_its_type_and_the_prompt_its_own() -> None:
    model, words = llama().to(torch.bfloat16), ids()
    esp.attach(model, "PTuning(length=3)", "mine")
    out = model(words, labels=words)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in esp.parameters(model))


def test_a_run_leaves_room_for_the_prompt(tmp_path: Path) -> None:
    import tiny_runs as tiny

    base = tiny.save_model(tmp_path / "gpt2", tiny.gpt2(), tiny.tokenizer("gpt2"))
    rows_ = tiny.sums(16)
    rows_[0]["prompt"] = "the film " * 40
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    settings: dict[str, Any] = {
        "model": base, "train": str(tmp_path / "sums.jsonl"), "steps": 1, "warmup": 0,
        "threads": 1, "quiet": True, "method": "PromptTuning(length=10)", "generate": True,
        "max_new_tokens": 2, "out": tmp_path / "run",
    }  # fmt: skip
    esp.train(esp.RunConfig(**settings))
    assert esp.read_card(tmp_path / "run")["extras"]["max_length"] == 48 - 10
    settings |= {"batching": "pack", "out": tmp_path / "packed", "generate": False}
    with pytest.raises(SettingError, match="before the first of several texts alone"):
        esp.train(esp.RunConfig(**settings))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equal_to_pefts_prompts(name: str) -> None:
    from peft import PromptEncoderConfig, PromptTuningConfig, get_peft_model

    words, base = ids(), BY_NAME[name].make()
    theirs: Any = get_peft_model(
        BY_NAME[name].make(),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L),
    )
    esp.attach(base, RANDOM, "mine")
    prompt = theirs.prompt_encoder["default"].embedding.weight
    find(base).adapters["mine"].flat["matrices"].data.copy_(prompt.detach().flatten())
    labels = words.clone()
    labels[:, 0] = -100  # theirs has the prompt predict the first word, ours leaves it out
    ours, other = base(words, labels=labels), theirs(input_ids=words, labels=labels)
    close(ours.logits, other.logits[:, L:], 1e-5)
    (ours.loss + other.loss).backward()
    grad = find(base).adapters["mine"].flat["matrices"].grad
    assert grad is not None
    close(grad, prompt.grad.flatten(), 1e-5)

    made_: Any = get_peft_model(
        BY_NAME[name].make(),
        PromptEncoderConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=L, encoder_hidden_size=12,
            encoder_reparameterization_type="LSTM", encoder_num_layers=2,
        ),
    )  # fmt: skip
    esp.attach(base, f"PTuning(length={L})", "made")
    encoder = made_.prompt_encoder["default"]
    numbers = [encoder.embedding.weight, *encoder.lstm_head.parameters()]
    numbers += [p for i in (0, 2) for p in encoder.mlp_head[i].parameters()]
    delta = find(base).adapters["made"].deltas[0]
    mine = [delta.t[name] for name in delta.trained]
    with torch.no_grad():
        for own, number in zip(mine, numbers, strict=True):
            own.copy_(number)
        close(base(words).logits, made_(input_ids=words).logits[:, L:], 1e-5)


# ---------------------------------------------------------------------------------------- refusals


def test_a_prompt_is_there_or_not() -> None:
    model = made("bert")
    with pytest.raises(AdapterError, match=r"its weight must be 1, not 0\.5"):
        esp.activate(model, {"mine": 0.5})
    with pytest.raises(AdapterError, match="cannot be merged"):
        esp.merge(model)


@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_a_text_too_long_for_the_positions_is_refused(name: str) -> None:
    model = made(name)
    limit = model.config.max_position_embeddings
    with pytest.raises(
        AdapterError, match=rf"{limit - 3} tokens and a prompt of 4 .* has {limit} positions"
    ):
        model(input_ids=ids(1, limit - 3))
    assert model(input_ids=ids(1, limit - 4)) is not None


def test_roberta_counts_positions_from_its_padding_id_on() -> None:
    torch.manual_seed(7)
    config = tf.RobertaConfig(
        vocab_size=VOCAB, hidden_size=24, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=40, max_position_embeddings=22, pad_token_id=1,
    )  # fmt: skip
    model = tf.RobertaModel(config).eval()
    esp.attach(model, RANDOM, "mine")
    with pytest.raises(AdapterError, match="has 20 positions; use at most 16 tokens"):
        model(ids(1, 17))
    model(ids(1, 16))
    words = ids(1)
    row = torch.cat([words, torch.ones(1, 3, dtype=torch.long)], 1)
    mask = (row != 1).long()
    with torch.no_grad():
        alone, padded_ = model(words)[0], model(row, attention_mask=mask)[0]
    close(padded_[:, :9], alone)


def test_where_no_words_can_enter_says_so() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(SiteError, match="it embeds no words"):
        esp.attach(net, "PromptTuning()", head=False)
    with pytest.raises(SiteError, match="no token of a decoder sees them"):
        esp.attach(gpt2(), "PTuning(template=(3, 0, 3))")
    with pytest.raises(SiteError, match="an image has no segments"):
        made("vit", "PTuning(template=(1, 1, 0))")
    with pytest.raises(SettingError, match="images have no words to start from"):
        made("vit", "PromptTuning(length=2, init='text', text=(1, 2))")
    model = t5()
    with pytest.raises(SettingError, match="at least one of 0 to 95"):
        esp.attach(model, "PromptTuning(init='text', text=(96,))")
    assert "espalier" not in dict(model.named_children())
    mask = torch.ones(1, 9, 9)
    with pytest.raises(AdapterError, match="one number per word, not one of shape"):
        made("bert")(input_ids=ids(1), attention_mask=mask)


@pytest.mark.parametrize(
    ("recipe", "what"),
    [
        ("PromptTuning(length=0)", "length must be at least 1"),
        ("PromptTuning(init='words')", "init must be one of vocabulary, random, text, labels"),
        ("PromptTuning(init='text')", "text must be words, or token ids, with init='text'"),
        ("PromptTuning(text='good')", "text must be left out, or with init='text'"),
        ("PromptTuning(length=1, init='labels', labels=('a', 'b'))", "at most 1 of them"),
        ("PromptTuning(template=(1, 2))", "template must be three numbers"),
        ("PTuning(template=(0, 0, 0))", "template must be three numbers"),
        ("PTuning(encoder='gru')", "encoder must be one of lstm, mlp"),
        ("PTuning(hidden=0)", "hidden must be a whole number"),
    ],
)
def test_wrong_settings_are_refused(recipe: str, what: str) -> None:
    with pytest.raises(SettingError, match=what.replace("(", r"\(")):
        esp.recipe(recipe)
