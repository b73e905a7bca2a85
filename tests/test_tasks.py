"""Tasks: masks by construction, truncation, alignment of tags, the same prompt at inference."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import tiny_text
from espalier.data import read_task
from espalier.errors import DataError, SettingError
from espalier.tasks import IGNORED, TASKS, Row, task_from_extras
from espalier.tasks.chat import DEFAULT_TEMPLATE
from tiny_text import BARE, CHATML, FORGETFUL, INST, MARKED

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "Green."},
]
SHORT_TALK = TALK[1:]


def data(*rows, **settings):
    return read_task(list(rows), validation_share=0, **settings)


def encoded(tokenizer, *rows, max_length=None, **settings):
    found = data(*rows, **settings)
    return found.task, found.task.encode(found.splits["train"], tokenizer, max_length)


def learned(tokenizer, example):
    return tokenizer.decode([t for t in example["labels"] if t != IGNORED])


def whole(tokenizer, example):
    return tokenizer.decode(example["input_ids"])


# --- prompt and completion ----------------------------------------------------------------


@pytest.mark.parametrize("bos", [False, True])
def test_only_the_completion_and_the_end_are_learned(bos):
    tokenizer = tiny_text.byte_bpe(bos=bos)
    _, [example] = encoded(tokenizer, {"prompt": "Name a colour:", "completion": " Blue"})
    assert whole(tokenizer, example) == "<s>" * bos + "Name a colour: Blue</s>"
    assert learned(tokenizer, example) == " Blue</s>"
    assert example["chars"] == len(" Blue")
    assert example["cut"] == 0


def test_text_that_occurs_twice_cannot_confuse_the_mask():
    tokenizer = tiny_text.byte_bpe()
    _, [example] = encoded(tokenizer, {"prompt": "Blue Blue Blue", "completion": " Blue"})
    assert learned(tokenizer, example) == " Blue</s>"


def test_the_final_end_token_is_learned_where_it_is_also_the_padding():
    tokenizer = tiny_text.byte_bpe(pad=False)
    tokenizer.pad_token = tokenizer.eos_token
    task, examples = encoded(
        tokenizer,
        {"prompt": "a", "completion": " b"},
        {"prompt": "What is the capital", "completion": " of France? Paris"},
    )
    batch = task.collate(examples, tokenizer)
    end = tokenizer.eos_token_id
    for labels, mask in zip(batch["labels"], batch["attention_mask"], strict=True):
        size = int(mask.sum())
        assert labels[size - 1] == end
        assert (labels[size:] == IGNORED).all()


def test_a_completion_that_brings_its_end_gets_no_second_one():
    tokenizer = tiny_text.byte_bpe()
    _, [example] = encoded(tokenizer, {"prompt": "a", "completion": " b</s>"})
    assert example["labels"].count(tokenizer.eos_token_id) == 1


def test_a_tokenizer_without_an_end_is_refused():
    tokenizer = tiny_text.byte_bpe()
    tokenizer.eos_token = None
    with pytest.raises(SettingError, match="never learn to stop"):
        encoded(tokenizer, {"prompt": "a", "completion": " b"})


@pytest.mark.parametrize(
    "make", [tiny_text.byte_bpe, tiny_text.metaspace, lambda: tiny_text.byte_bpe(bos=True)]
)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Name a colour:", " Blue"),
        ("Name a colour: ", "Blue"),
        ("Name a col", "our"),  # a word parted in the middle
        ("Question?\n\n", "\n\nAnswer"),
        ("é", "é"),
    ],
)
def test_the_prompt_at_inference_is_what_training_had(make, prompt, completion):
    tokenizer = make()
    task, [example] = encoded(tokenizer, {"prompt": prompt, "completion": completion})
    ids = task.prompt(prompt, tokenizer)
    assert example["input_ids"][: len(ids)] == ids
    assert all(label == IGNORED for label in example["labels"][: len(ids)])
    assert all(label != IGNORED for label in example["labels"][len(ids) :])
    assert task.prompt({"prompt": prompt, "completion": completion}, tokenizer) == ids


def test_cutting_takes_the_start_of_the_prompt_and_keeps_the_answer():
    tokenizer = tiny_text.byte_bpe(bos=True)
    row = {"prompt": "The quick brown fox jumps over the lazy dog. Name a", "completion": " colour"}
    _, [full] = encoded(tokenizer, row)
    _, [example] = encoded(tokenizer, row, max_length=8)
    assert len(example["input_ids"]) == 8
    assert example["full"] == len(full["input_ids"])
    assert example["input_ids"][0] == tokenizer.bos_token_id
    assert example["input_ids"][1:] == full["input_ids"][-7:]
    assert learned(tokenizer, example) == " colour</s>"
    assert example["cut"] == 0


def test_an_answer_too_long_by_itself_loses_its_end_and_is_counted():
    tokenizer = tiny_text.byte_bpe()
    row = {"prompt": "Name a colour:", "completion": " green and blue" * 20}
    _, [example] = encoded(tokenizer, row, max_length=16)
    assert len(example["input_ids"]) == 16
    assert example["cut"] == 1
    assert sum(label == IGNORED for label in example["labels"]) == 4
    assert tokenizer.eos_token_id not in example["input_ids"]


# --- conversations ------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_only_the_assistants_turns_are_learned(template):
    tokenizer = tiny_text.byte_bpe(template=template)
    _, [example] = encoded(tokenizer, {"messages": TALK})
    runs = learned(tokenizer, example).replace("<|im_end|>\n", "<|im_end|>")
    assert runs == "Blue.<|im_end|>Green.<|im_end|>"
    text = tokenizer.apply_chat_template(TALK, tokenize=False)
    assert whole(tokenizer, example).rstrip() == text.rstrip()


def test_the_default_template_is_used_saved_and_learned_with_its_end():
    tokenizer = tiny_text.byte_bpe()
    task, [example] = encoded(tokenizer, {"messages": TALK})
    assert learned(tokenizer, example) == "Blue.</s>Green.</s>"
    assert whole(tokenizer, example) == (
        "<s>Be brief.\n\n### Instruction:\nName a colour.\n\n### Response:\nBlue.</s>\n\n"
        "### Instruction:\nAnother?\n\n### Response:\nGreen.</s>"
    )
    assert task.extras(tokenizer)["chat_template"] == DEFAULT_TEMPLATE


def test_a_template_without_an_end_of_turn_still_learns_to_stop():
    tokenizer = tiny_text.byte_bpe(template=BARE)
    task, [example] = encoded(tokenizer, {"messages": TALK})
    assert example["labels"][-1] == tokenizer.eos_token_id
    assert task.stop_ids(tokenizer) == [tokenizer.eos_token_id]


@pytest.mark.parametrize("template", [None, CHATML, MARKED, BARE, INST])
@pytest.mark.parametrize("turns", [2, 4])
def test_a_conversation_asks_as_it_was_trained(template, turns):
    tokenizer = tiny_text.byte_bpe(template=template)
    messages = SHORT_TALK[:turns]
    task, [example] = encoded(tokenizer, {"messages": messages})
    ids = task.prompt(messages[:-1], tokenizer)
    assert example["input_ids"][: len(ids)] == ids
    assert all(label != IGNORED for label in example["labels"][len(ids) :])
    assert task.prompt({"messages": messages}, tokenizer) == ids
    if turns == 2:
        assert task.prompt("Name a colour.", tokenizer) == ids


def test_stop_tokens_are_the_end_of_text_and_of_turn():
    tokenizer = tiny_text.byte_bpe(template=CHATML)
    task, _ = encoded(tokenizer, {"messages": TALK})
    names = tokenizer.convert_ids_to_tokens(task.stop_ids(tokenizer))
    assert names == ["</s>", "<|im_end|>"]


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_there_are_none():
    tokenizer = tiny_text.byte_bpe(template=FORGETFUL)
    with pytest.raises(DataError, match=r"train:row 1: the chat template rewrites"):
        encoded(tokenizer, {"messages": SHORT_TALK})
    _, [example] = encoded(tokenizer, {"messages": SHORT_TALK[:2]})
    assert learned(tokenizer, example) == "<think></think>Blue.<|im_end|>\n"


def test_a_template_that_refuses_a_role_is_a_data_error():
    tokenizer = tiny_text.byte_bpe(template=INST)
    with pytest.raises(DataError, match=r"row 1: the chat template refuses.*no system here"):
        encoded(tokenizer, {"messages": TALK})


def test_the_system_text_stands_before_conversations_that_bring_none():
    tokenizer = tiny_text.byte_bpe(template=CHATML)
    task, examples = encoded(
        tokenizer, {"messages": TALK}, {"messages": SHORT_TALK}, system="Talk."
    )
    texts = [whole(tokenizer, e) for e in examples]
    assert "Be brief." in texts[0]
    assert "Talk." not in texts[0]
    assert texts[1].startswith("<|im_start|>system\nTalk.<|im_end|>")
    assert tokenizer.decode(task.prompt("Hi", tokenizer)).startswith("<|im_start|>system\nTalk.")


def test_words_after_the_last_answer_are_dropped():
    tokenizer = tiny_text.byte_bpe(template=CHATML)
    _, [a] = encoded(tokenizer, {"messages": TALK})
    _, [b] = encoded(tokenizer, {"messages": [*TALK, {"role": "user", "content": "Bye"}]})
    assert a == b


def test_alpaca_and_sharegpt_become_conversations():
    tokenizer = tiny_text.byte_bpe(template=CHATML)
    talk = [{"role": "user", "content": "Add.\n\n1 2"}, {"role": "assistant", "content": "3"}]
    _, expected = encoded(tokenizer, {"messages": talk})
    alpaca = {"instruction": "Add.", "input": "1 2", "output": "3"}
    shared = [{"from": "human", "value": "Add.\n\n1 2"}, {"from": "gpt", "value": "3"}]
    task, found = encoded(tokenizer, alpaca)
    assert found == expected
    assert encoded(tokenizer, {"conversations": shared})[1] == expected
    parts = [{"role": "user", "content": [{"type": "text", "text": "Add.\n\n1 2"}]}, talk[1]]
    assert encoded(tokenizer, {"messages": parts})[1] == expected
    assert task.prompt({"instruction": "Add.", "input": "1 2"}, tokenizer) == task.prompt(
        "Add.\n\n1 2", tokenizer
    )


def test_a_cut_conversation_keeps_its_last_answer():
    tokenizer = tiny_text.byte_bpe(template=CHATML)
    _, [example] = encoded(tokenizer, {"messages": TALK}, max_length=24)
    assert len(example["input_ids"]) == 24
    assert learned(tokenizer, example).endswith("Green.<|im_end|>\n")
    assert example["cut"] == int("Blue." not in learned(tokenizer, example))


# --- plain text ---------------------------------------------------------------------------


def test_plain_text_becomes_blocks_with_an_end_after_each_text():
    tokenizer = tiny_text.byte_bpe()
    _, blocks = encoded(tokenizer, {"text": "Hello there!"}, {"text": "Goodbye."}, max_length=4)
    targets = [token for block in blocks for token in block["labels"] if token != IGNORED]
    first = blocks[0]["input_ids"][:1]
    assert tokenizer.decode(first + targets) == "Hello there!</s>Goodbye.</s>"
    assert all(len(block["input_ids"]) == 4 for block in blocks[:-1])
    assert all(block["labels"][1:] == block["input_ids"][1:] for block in blocks)
    assert sum(block["chars"] for block in blocks) == len("Hello there!Goodbye.") - len(
        tokenizer.decode(first)
    )


def test_a_text_file_is_one_text(tmp_path):
    text = "First line.\n\nSecond part,\nstill.\n\n\nThird.\n"
    (tmp_path / "a.txt").write_text(text)
    tokenizer = tiny_text.byte_bpe()
    found = read_task(tmp_path / "a.txt", validation_share=0)
    [block] = found.task.encode(found.splits["train"], tokenizer, 999)
    assert whole(tokenizer, block) == text + "</s>"
    assert [row.where for row in found.splits["train"]] == ["a.txt:1", "a.txt:3", "a.txt:7"]
    parts = read_task(tmp_path / "a.txt", validation_share=0, documents="paragraphs")
    [block] = parts.task.encode(parts.splits["train"], tokenizer, 999)
    assert whole(tokenizer, block).count("</s>") == 3


def test_language_model_scores_follow_from_the_logits():
    tokenizer = tiny_text.byte_bpe()
    rows = [{"prompt": "a", "completion": " colour"}, {"prompt": "Name a", "completion": " fox"}]
    task, examples = encoded(tokenizer, *rows)
    batch = task.collate(examples, tokenizer)
    logits = torch.randn(*batch["input_ids"].shape, len(tokenizer))
    predictions = task.predict(SimpleNamespace(logits=logits), batch)
    nats, right, count = 0.0, 0, 0
    for i, example in enumerate(examples):
        for at, label in enumerate(example["labels"]):
            if label != IGNORED:
                nats -= logits[i, at - 1].log_softmax(-1)[label].item()
                right += int(logits[i, at - 1].argmax() == label)
                count += 1
    scores = task.score(predictions, task.references(batch))
    assert scores["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert scores["token_accuracy"] == pytest.approx(right / count)
    chars = len(" colour fox")
    assert scores["bits_per_character"] == pytest.approx(nats / 0.6931471805599453 / chars)


# --- words and tags -----------------------------------------------------------------------

TAGGED = {
    "tokens": ["i", "am", "playing", "in", "new", "yorker"],
    "tags": ["O", "O", "O", "O", "B-x", "I-x"],
}


def test_the_first_piece_of_each_word_carries_its_tag():
    tokenizer = tiny_text.word_pieces()
    task, [example] = encoded(tokenizer, TAGGED)
    pieces = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert pieces == ["[CLS]", "i", "am", "play", "##ing", "in", "new", "york", "##er", "[SEP]"]
    names = [None if i == IGNORED else task.labels[i] for i in example["labels"]]
    assert names == [None, "O", "O", "O", None, "O", "B-x", "I-x", None, None]


@pytest.mark.parametrize(
    "make", [tiny_text.byte_bpe, lambda: tiny_text.byte_bpe(bos=True), tiny_text.metaspace]
)
def test_words_given_one_by_one_look_as_in_running_text(make):
    tokenizer = make()
    task, [example] = encoded(tokenizer, TAGGED)
    running = tokenizer(" ".join(TAGGED["tokens"]))["input_ids"]
    assert example["input_ids"] == running
    assert [task.labels[i] for i in example["labels"] if i != IGNORED] == TAGGED["tags"]


def test_tokenizers_without_word_ids_encode_word_by_word():
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    task, [example] = encoded(tokenizer, TAGGED)
    assert example["input_ids"] == tokenizer(" ".join(TAGGED["tokens"]))["input_ids"]
    assert [task.labels[i] for i in example["labels"] if i != IGNORED] == TAGGED["tags"]


def test_words_beyond_the_limit_are_not_scored():
    tokenizer = tiny_text.word_pieces()
    task, [example] = encoded(tokenizer, TAGGED, max_length=6)
    pieces = tokenizer.convert_ids_to_tokens(example["input_ids"])
    assert pieces == ["[CLS]", "i", "am", "play", "##ing", "[SEP]"]
    assert example["cut"] == 1
    assert example["full"] == 10
    batch = task.collate([example], tokenizer)
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), 3).float()
    [tags] = task.predict(SimpleNamespace(logits=logits), batch)
    assert task.decode(tags) == ["O", "O", "O"]
    assert tags == task.references(batch)[0]


def test_prediction_without_tags():
    tokenizer = tiny_text.word_pieces()
    found = data(TAGGED)
    rows = [found.task.read(Row({"tokens": TAGGED["tokens"]}, "x"), labelled=False)]
    batch = found.task.collate(found.task.encode(rows, tokenizer, None), tokenizer)
    assert "labels" not in found.task.inputs(batch)
    assert set(found.task.inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    logits = torch.zeros(*batch["input_ids"].shape, 3)
    [tags] = found.task.predict(SimpleNamespace(logits=logits), batch)
    assert len(tags) == len(TAGGED["tokens"])


# --- labels and numbers -------------------------------------------------------------------


def test_classification_batch_and_guess():
    tokenizer = tiny_text.word_pieces()
    task, examples = encoded(
        tokenizer, {"text": "a b", "label": "no"}, {"text": "a b c d", "label": "yes"}
    )
    batch = task.collate(examples, tokenizer)
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].sum(-1).tolist() == [4, 6]
    guesses = task.predict(SimpleNamespace(logits=torch.tensor([[0.0, 0.0], [0.0, 2.0]])), batch)
    assert task.decode(guesses[1]) == "yes"
    assert guesses[1].probability == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert task.model_settings()["id2label"] == {0: "no", 1: "yes"}


def test_a_pair_loses_from_its_longer_part():
    tokenizer = tiny_text.word_pieces()
    rows = [
        {"sentence1": "a " * 20, "sentence2": "b c", "label": "x"},
        {"sentence1": "a", "sentence2": "b", "label": "y"},
    ]
    _, examples = encoded(tokenizer, *rows, max_length=8)
    text = tokenizer.convert_ids_to_tokens(examples[0]["input_ids"])
    assert text == ["[CLS]", "a", "a", "a", "[SEP]", "b", "c", "[SEP]"]
    assert examples[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert [e["full"] for e in examples] == [25, 5]


def test_multilabel_batch_and_sets():
    tokenizer = tiny_text.word_pieces()
    rows = [{"text": "a", "labels": ["x", "z"]}, {"text": "b", "labels": []}]
    rows.append({"text": "c", "labels": ["y"]})
    task, examples = encoded(tokenizer, *rows)
    assert task.labels == ("x", "y", "z")
    batch = task.collate(examples, tokenizer)
    assert batch["labels"].tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert task.references(batch) == [[0, 2], [], [1]]
    outputs = SimpleNamespace(logits=torch.tensor([[3.0, -1.0, 0.1]] * 3))
    assert task.decode(task.predict(outputs, batch)[0]) == ["x", "z"]


def test_regression_batch():
    tokenizer = tiny_text.word_pieces()
    task, examples = encoded(tokenizer, {"text": "a", "label": 0.5}, {"text": "b", "label": 2.0})
    batch = task.collate(examples, tokenizer)
    assert batch["labels"].dtype == torch.float32
    assert task.predict(SimpleNamespace(logits=torch.tensor([[1.0], [2.0]])), batch) == [1.0, 2.0]
    assert task.model_settings() == {"num_labels": 1, "problem_type": "regression"}


def test_sequence_to_sequence_batch():
    tokenizer = tiny_text.byte_bpe()
    rows = [{"source": "Name a colour.", "target": "Blue."}, {"source": "a", "target": "Green fox"}]
    task, examples = encoded(tokenizer, *rows, prefix="say: ")
    assert tokenizer.decode(examples[0]["input_ids"]) == "say: Name a colour."
    assert tokenizer.decode(examples[0]["labels"]) == "Blue.</s>"
    batch = task.collate(examples, tokenizer)
    assert batch["labels"].shape[0] == 2
    assert "chars" not in task.inputs(batch)
    assert task.references(batch) == [len("Blue."), len("Green fox")]
    assert task.prompt("Name a colour.", tokenizer) == examples[0]["input_ids"]
    logits = torch.randn(*batch["labels"].shape, len(tokenizer))
    scores = task.score(task.predict(SimpleNamespace(logits=logits), batch), task.references(batch))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())
    assert scores["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_cut_target_does_not_learn_to_stop():
    tokenizer = tiny_text.byte_bpe()
    _, [example] = encoded(
        tokenizer, {"source": "a", "target": "Green fox over the lazy dog"}, max_length=3
    )
    assert example["cut"] == 1
    assert tokenizer.eos_token_id not in example["labels"]


# --- kept with the adapter ----------------------------------------------------------------

KEPT = {
    "classification": ({"review": "a", "stars": 1}, {"review": "b", "stars": 2}),
    "multilabel": ({"text": "a", "labels": ["x"]}, {"text": "b", "labels": ["y"]}),
    "regression": ({"text": "a", "label": 1.5}, {"text": "b", "label": 2.5}),
    "tokens": (TAGGED,),
    "causal": ({"messages": SHORT_TALK},),
    "seq2seq": ({"source": "a", "target": "b"},),
    "choices": ({"prompt": "a", "choices": ["b", "c"], "label": 0},),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_survives_its_extras(name):
    tokenizer = tiny_text.byte_bpe(template=CHATML)
    task = data(*KEPT[name]).task
    assert task.name == name
    kept = json.loads(json.dumps(task.extras(tokenizer)))
    again = task_from_extras(kept | {"generation": {"top_p": 1}})
    if name == "causal":
        assert again.chat_template == CHATML
        assert again.prompt("Hi", tokenizer) == task.prompt("Hi", tokenizer)
        other = tiny_text.byte_bpe(template=BARE)
        assert again.prompt("Hi", other) == task.prompt("Hi", tokenizer)
    else:
        assert again == task


def test_extras_without_a_task_are_named():
    with pytest.raises(SettingError, match="does not say what task"):
        task_from_extras({"labels": ["a"]})


def test_a_classifier_does_not_generate():
    with pytest.raises(SettingError, match="does not generate"):
        data(*KEPT["classification"]).task.prompt("a", tiny_text.byte_bpe())


@pytest.mark.parametrize("name", TASKS)
def test_previews_show_what_is_learned(name):
    found = data(*KEPT[name])
    row = found.splits["train"][0]
    for tokenizer in (None, tiny_text.byte_bpe(template=CHATML)):
        pieces = found.task.preview(row, tokenizer, 64)
        assert any(piece.learned for piece in pieces)
        assert not all(piece.learned for piece in pieces)
