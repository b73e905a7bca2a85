"""Reading, recognising, errors with file and line, batching, packing, the check."""

from __future__ import annotations

import json

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import tiny_runs
import tiny_text
from espalier.data import (
    batches,
    check,
    in_order,
    pack,
    packing_refusal,
    read_rows,
    read_task,
)
from espalier.errors import DataError, SettingError
from espalier.tasks import IGNORED, Classification, Multilabel

ROWS = [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(20)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# --- forms of files -----------------------------------------------------------------------


def as_jsonl(folder):
    return write(folder / "d.jsonl", ROWS)


def as_json(folder):
    path = folder / "d.json"
    path.write_text(json.dumps(ROWS))
    return path


def as_nested_json(folder):
    path = folder / "d.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    return path


def as_mislabelled_json(folder):
    return write(folder / "d.json", ROWS)


def as_csv(folder):
    path = folder / "d.csv"
    path.write_text("text,label\n" + "".join(f'"{r["text"]}",{r["label"]}\n' for r in ROWS))
    return path


def as_semicolons(folder):
    path = folder / "d.csv"
    path.write_text("text;label\n" + "".join(f"{r['text']};{r['label']}\n" for r in ROWS))
    return path


def as_tsv_with_mark(folder):
    path = folder / "d.tsv"
    text = "text\tlabel\r\n" + "".join(f"{r['text']}\t{r['label']}\r\n" for r in ROWS)
    path.write_bytes(text.encode("utf-8-sig"))
    return path


def as_parquet(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")
    return folder / "d.parquet"


def as_folder(folder):
    write(folder / "train.jsonl", ROWS)
    return folder


def as_saved(folder):
    import datasets

    made = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    made.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def as_list(folder):
    return ROWS


def as_lists_by_split(folder):
    return {"train": ROWS}


def as_data_set(folder):
    import datasets

    return datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})


FORMS = (
    *(as_jsonl, as_json, as_nested_json, as_mislabelled_json, as_csv, as_semicolons),
    *(as_tsv_with_mark, as_parquet, as_folder, as_saved, as_list),
    *(as_lists_by_split, as_data_set),
)


@pytest.mark.parametrize("make", FORMS)
def test_every_form_gives_the_same_rows(make, tmp_path):
    found = read_task(make(tmp_path), validation_share=0)
    assert found.task.name == "classification"
    assert found.task.labels == ("no", "yes")
    rows = [(row.values["text"], row.values["label"]) for row in found.splits["train"]]
    assert rows == [(f"text {i}", i % 2) for i in range(20)]


def test_a_folder_gives_splits_and_label_names(tmp_path):
    for name, rows in (("train", ROWS), ("dev", ROWS[:4]), ("test-00000-of-00001", ROWS[:2])):
        write(tmp_path / f"{name}.jsonl", [r | {"label": r["label"] == "yes"} for r in rows])
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": "no"}]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "dev.jsonl", rows)
    write(tmp_path / "test-00000-of-00001.jsonl", rows[:2])
    (tmp_path / "labels.json").write_text('["yes", "no", "perhaps"]')
    with pytest.raises(DataError, match="mixes"):
        read_task(rows)
    found = read_task(tmp_path)
    assert {name: len(part) for name, part in found.splits.items()} == {
        "train": 3,
        "validation": 3,
        "test": 2,
    }
    assert found.task.labels == ("yes", "no", "perhaps")
    assert [row.values["label"] for row in found.splits["train"]] == [1, 0, 1]


def test_numbers_of_named_classes_are_no_amounts(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a", "label": i % 3} for i in range(6)])
    (tmp_path / "labels.json").write_text('["yes", "no", "perhaps"]')
    with pytest.raises(SettingError, match=r"numbers of classes.*yes, no, perhaps"):
        read_task(str(tmp_path), task="regression")


def test_hub_features_name_the_labels(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=["O", "B-x"])),
        }
    )
    rows = [{"tokens": ["a", "b"], "ner_tags": [0, 1]}]
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "d"))
    found = read_task(tmp_path / "d", validation_share=0)
    assert found.task.name == "tokens"
    assert found.task.labels == ("O", "B-x")
    assert found.splits["train"][0].values["tags"] == [0, 1]


def test_a_split_without_labels_is_left_out_and_said(tmp_path):
    write(tmp_path / "train.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    write(tmp_path / "test.jsonl", [{"text": "c", "label": -1}])
    found = read_task(tmp_path, validation_share=0)
    assert set(found.splits) == {"train"}
    assert any("test has no labels" in note for note in found.notes)


# --- what goes wrong, with file and line --------------------------------------------------


def test_one_broken_line_in_ten_thousand(tmp_path):
    lines = [json.dumps({"text": f"t {i}", "label": i % 2}) for i in range(10_000)]
    lines[7_776] = '{"text": "t", "label": 1'
    path = tmp_path / "big.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"big\.jsonl:7777: broken JSON"):
        read_task(path)


BAD_ROWS = [
    ({"label": "no"}, r"d\.jsonl:3: no column 'text'; columns found: label"),
    ({"text": None, "label": "no"}, r"d\.jsonl:3: column 'text' is empty"),
    ({"text": float("nan"), "label": "no"}, r"d\.jsonl:3: column 'text' is empty"),
    ({"text": "  ", "label": "no"}, r"d\.jsonl:3: column 'text' is blank"),
    ({"text": 7, "label": "no"}, r"d\.jsonl:3: column 'text' holds a number 7, need text"),
    ({"text": "a", "label": None}, r"d\.jsonl:3: column 'label' has no label"),
    (
        {"text": "a", "label": 1},
        r"mixes kinds of labels: text at d\.jsonl:1, a number at d\.jsonl:3",
    ),
    (["text"], r"d\.jsonl:3: a row is an object"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_bad_row_is_named(row, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_task(write(tmp_path / "d.jsonl", [*ROWS[:2], row]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: the file holds no rows \(0 bytes\)"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.txt", b"\n\n", "holds no rows"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "t\xe9"}\n',
            r"a\.jsonl:2: not UTF-8 \(byte 0xe9\)",
        ),
        ("a.csv", "text,label\n".encode("utf-16"), "UTF-16"),
        ("a.csv", b"text,label\na,b\na,b,c\n", r"a\.csv:3: 3 fields, but the header has 2"),
        ("a.csv", b'text,label\n"a\nb",x\n"c,y\n', r"a\.csv:\d: broken csv"),
        ("a.csv", b"text,text\na,b\n", r"a\.csv:1: the header names 'text' twice"),
        ("a.json", b'{"a": [1], "b": [2]}', "one such list"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', r"a\.json:2: broken JSON"),
        ("a.json", b'[{"text": "a"}, 3]', r"a\.json:row 2: a row is an object"),
        ("a.parquet", b"PAR1 nothing", "not a parquet file"),
        ("a.pkl", b"", "'.pkl' are not understood; known: .jsonl"),
    ],
)
def test_a_bad_file_is_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_task(tmp_path / name)


def test_lines_of_quoted_line_breaks_are_counted(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one\ntwo",x\n,y\n')
    with pytest.raises(DataError, match=r"a\.csv:4: column 'text' is blank"):
        read_task(tmp_path / "a.csv")


def test_a_missing_file_names_its_neighbours(tmp_path):
    write(tmp_path / "reviews.jsonl", ROWS)
    with pytest.raises(DataError, match=r"no such file or folder \(did you mean 'reviews\.jsonl'"):
        read_task(tmp_path / "review.jsonl")


def test_a_name_unknown_offline_says_so():
    with pytest.raises(DataError, match="no such file or folder here, and no data set"):
        read_task("nobody-has-such-a-data-set")


def test_a_folder_without_splits_says_what_it_has(tmp_path):
    write(tmp_path / "one.jsonl", ROWS)
    write(tmp_path / "two.jsonl", ROWS)
    with pytest.raises(DataError, match=r"found one\.jsonl, two\.jsonl"):
        read_task(tmp_path)


def test_a_label_unseen_in_training_is_named(tmp_path):
    train = write(tmp_path / "train.jsonl", ROWS)
    test = write(tmp_path / "test.jsonl", [*ROWS[:3], {"text": "a", "label": "yess"}])
    with pytest.raises(
        DataError, match=r"test\.jsonl:4: label 'yess' .* training has 2 labels: no"
    ):
        read_task(train, test=test)


def test_one_label_is_nothing_to_tell_apart():
    with pytest.raises(DataError, match="only one label in training"):
        read_task([{"text": "a", "label": "x"}])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"tokens": ["a", "b", "c"], "tags": ["O", "B-x"]}],
            "3 words in 'tokens', but 2 tags in 'tags'",
        ),
        ([{"messages": []}], "need a list of"),
        ([{"messages": [{"role": "user", "content": "a"}]}], "no message from the assistant"),
        ([{"messages": [{"role": "robot", "content": "a"}]}], "has role 'robot'"),
        ([{"prompt": "a", "completion": ""}], "column 'completion' is blank"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": "high"}], "label"),
        ([{"text": "a", "label": 0.5}, {"text": "b", "label": float("inf")}], "finite"),
    ],
)
def test_rows_that_teach_nothing_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        read_task(rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "classify"}, "did you mean 'classification'"),
        ({"limit": 0}, "limit=0"),
        ({"validation_share": 1.0}, "validation_share=1.0"),
        ({"system": "Be brief."}, "for conversations"),
        ({"prefix": "say: "}, "for seq2seq"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(SettingError, match=message):
        read_task(ROWS, **settings)


# --- columns and tasks --------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
RECOGNISED = [
    ([{"text": "a", "label": "x"}, {"text": "b", "label": "y"}], "classification", {}),
    ([{"review": "a", "stars": "1"}, {"review": "b", "stars": "5"}], "classification", {}),
    ([{"premise": "a", "hypothesis": "b", "label": i} for i in (0, 1)], "classification", {}),
    ([{"sentence1": "a", "sentence2": "b", "score": i} for i in (0.5, 1)], "regression", {}),
    ([{"text": "a", "label": i} for i in ("0.5", "1")], "regression", {}),
    ([{"text": "a", "labels": ["x", "y"]}], "multilabel", {}),
    ([{"tokens": ["a"], "ner_tags": ["O"]}, {"tokens": ["b"], "ner_tags": ["B-x"]}], "tokens", {}),
    ([{"text": "a b", "tags": "O B-x"}], "tokens", {}),
    ([{"text": "a"}], "causal", {}),
    ([{"text": "a", "id": 3, "url": "b"}], "causal", {}),
    ([{"prompt": "a", "completion": "b"}], "causal", {}),
    ([{"instruction": "a", "input": "", "output": "b", "text": "c"}], "causal", {}),
    ([{"messages": MESSAGES}], "causal", {}),
    (
        [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}],
        "causal",
        {},
    ),
    ([{"question": "a", "answer": "b"}], "causal", {}),
    ([{"source": "a", "target": "b"}], "seq2seq", {}),
    ([{"input": "a", "target": "b", "answer": "c"}], "seq2seq", {}),
    ([{"document": "a", "summary": "b", "id": 1}], "seq2seq", {}),
    # asked for
    ([{"source": "a", "target": "b"}], "causal", {"task": "causal"}),
    ([{"source": "a", "target": "b"}], "causal", {"prefer": "causal"}),
    ([{"prompt": "a", "completion": "b"}], "seq2seq", {"prefer": "seq2seq"}),
    ([{"text": "a", "label": i} for i in (1, 5)], "regression", {"task": "regression"}),
    ([{"text": "a", "label": i} for i in (1, 5)], "classification", {"prefer": "causal"}),
    ([{"text": "a", "label": "x|y"}], "multilabel", {"task": "multilabel"}),
    ([{"text": "a", "label": "x"}], "causal", {"task": "causal"}),
    ([{"q": "a", "a": "b"}], "causal", {"columns": {"prompt": "q", "completion": "a"}}),
    ([{"q": "a", "a": "b"}], "seq2seq", {"columns": {"source": "q", "target": "a"}}),
    ([{"blurb": "a"}], "causal", {"columns": {"text": "blurb"}}),
    (
        [{"note": {"en": "a"}, "kind": i} for i in "xy"],
        "classification",
        {"columns": {"text": "note.en", "label": "kind"}},
    ),
]


@pytest.mark.parametrize(("rows", "task", "settings"), RECOGNISED)
def test_columns_say_the_task(rows, task, settings):
    found = read_task(rows, validation_share=0, **settings)
    assert found.task.name == task
    assert found.notes[0].startswith(f"read as {task} (")


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        (
            {"text": "a b", "tags": "O B-x", "intent": "x"},
            {},
            "choose task='classification'.*tokens",
        ),
        ({"text": "a", "label": 1.0}, {}, "choose task='classification'.*task='regression'"),
        ({"title": "a", "body": "b", "label": "x"}, {}, r"choose columns=.*'body'.*'title'"),
        ({"source": "a", "input": "b", "target": "c"}, {}, "more than one way for seq2seq"),
        ({"text": "a", "grade": "x"}, {}, r"Choose task='causal'.*columns=\{'label': 'grade'\}"),
        ({"review_text": "a", "verdict": "x"}, {}, "no known form fits the columns found: review_"),
        ({"text": "a"}, {"task": "tokens"}, r"no tokens form .*Needed: tokens \+ tags"),
        ({"text": "a", "label": "x"}, {"columns": {"txt": "text"}}, "unknown name 'txt': did you"),
        (
            {"review": "a", "label": "x"},
            {"columns": {"text": "reviews"}},
            "no column 'reviews'; found: review, label .did you mean 'review'",
        ),
    ],
)
def test_what_is_unclear_is_asked(row, settings, message):
    with pytest.raises(DataError, match=message):
        read_task([row, row], **settings)


def test_label_order_does_not_depend_on_the_order_of_rows():
    rows = [{"text": "a", "label": i} for i in (10, 9, 2)]
    assert read_task(rows).task.labels == read_task(rows[::-1]).task.labels == ("2", "9", "10")


def test_flags_are_read_as_sets():
    rows = [{"text": "a", "labels": [0, 1, 1]}, {"text": "b", "labels": [0, 0, 0]}]
    found = read_task(rows, label_names=["x", "y", "z"], validation_share=0)
    assert [row.values["labels"] for row in found.splits["train"]] == [[1, 2], []]


def test_further_rows_for_a_known_task(tmp_path):
    task = read_task(ROWS).task
    path = write(tmp_path / "new.jsonl", [{"text": "a"}, {"text": "b"}])
    assert [r.values for r in read_rows(path, task, labelled=False)] == [
        {"text": "a"},
        {"text": "b"},
    ]
    with pytest.raises(DataError, match=r"new\.jsonl:1: no column 'label'|no classification form"):
        read_rows(path, task)
    other = write(tmp_path / "other.jsonl", [{"review": "a", "stars": "yes"}])
    [row] = read_rows(other, task)
    assert row.values == {"text": "a", "label": 1}
    [row] = read_rows(other, task, columns={"text": "review"}, labelled=False)
    assert row.values == {"text": "a"}


# --- splits -------------------------------------------------------------------------------


def test_rows_set_aside_share_no_input_and_do_not_depend_on_order():
    rows = [*ROWS, *ROWS[:10]]
    found = read_task(rows, validation_share=0.2, seed=1)
    texts = {n: {r.values["text"] for r in part} for n, part in found.splits.items()}
    assert not texts["train"] & texts["validation"]
    assert texts["validation"]
    assert any("set aside" in note for note in found.notes)
    again = read_task(rows[::-1], validation_share=0.2, seed=1)
    assert {r.values["text"] for r in again.splits["validation"]} == texts["validation"]
    other = read_task(rows, validation_share=0.2, seed=2)
    assert {r.values["text"] for r in other.splits["validation"]} != texts["validation"]


def test_the_limit_keeps_labels_and_order():
    found = read_task(ROWS, limit=5, validation_share=0.25)
    assert len(found.splits["train"]) == 5
    assert found.task.labels == ("no", "yes")
    numbers = [int(row.values["text"].split()[1]) for row in found.splits["train"]]
    assert numbers == sorted(numbers)


def test_a_limit_keeps_the_same_training_rows_with_and_without_validation_data():
    def kept(**settings):
        return [row.values["text"] for row in read_task(**settings).splits["train"]]

    alone = kept(train=ROWS, limit=9, validation_share=0.25)
    assert len(alone) == 9
    assert kept(train=ROWS, validation=ROWS[:4], limit=9) == alone
    assert kept(train=ROWS, limit=9, validation_share=0) == alone
    assert set(kept(train=ROWS, limit=5, validation_share=0.25)) < set(alone)
    assert kept(train=ROWS, limit=9, validation_share=0, seed=1) != alone


def test_label_names_in_other_capitals_mean_the_same(tmp_path):
    rows = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
    write(tmp_path / "test.jsonl", rows)
    for names in (["No ", "YES"], ["No", "Maybe"]):
        (tmp_path / "labels.json").write_text(json.dumps(names))
        task = Classification({"text": "text", "label": "label"}, ("no", "yes"), True)
        if names[1] == "YES":
            assert len(read_rows(tmp_path / "test.jsonl", task)) == 20
        else:
            with pytest.raises(DataError, match="label 1 is 'Maybe'"):
                read_rows(tmp_path / "test.jsonl", task)


def test_flags_must_stand_in_the_order_of_training(tmp_path):
    write(tmp_path / "test.jsonl", [{"text": "a text", "labels": [0, 1, 0]}])
    (tmp_path / "labels.json").write_text(json.dumps(["a", "c", "b"]))
    columns = {"text": "text", "label": "labels"}
    task = Multilabel(columns, ("a", "b", "c"), flags=True)
    with pytest.raises(DataError, match="label 1 is 'c' by the label names of this data"):
        read_rows(tmp_path / "test.jsonl", task)


def test_numbers_of_classes_must_mean_what_they_mean_in_training(tmp_path):
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder, names in ((mine, ["no", "yes"]), (other, ["yes", "no"])):
        folder.mkdir()
        (folder / "labels.json").write_text(json.dumps(names))
        rows = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
        write(folder / "train.jsonl", rows)
    data = read_task(str(mine / "train.jsonl"), test=str(mine / "train.jsonl"))
    meant = "label 0 is 'yes' by the label names of this data, and 'no' by those of training"
    with pytest.raises(DataError, match=meant):
        read_task(str(mine / "train.jsonl"), test=str(other / "train.jsonl"))
    with pytest.raises(DataError, match=meant):
        read_rows(str(other / "train.jsonl"), data.task)
    write(other / "train.jsonl", ROWS)  # names, which mean themselves
    assert read_rows(str(other / "train.jsonl"), data.task)[0].values["label"] == 0
    given = {"test": str(other / "train.jsonl"), "label_names": ["no", "yes"]}
    assert len(read_task(str(mine / "train.jsonl"), **given).splits["test"]) == 20


def test_plain_text_gives_up_its_end():
    found = read_task([{"text": f"{i}"} for i in range(10)], validation_share=0.3)
    assert [row.values["text"] for row in found.splits["validation"]] == ["7", "8", "9"]


# --- batches ------------------------------------------------------------------------------


def of_lengths(*lengths):
    return [
        {"input_ids": [1] * n, "labels": [1] * n, "full": n, "cut": 0, "chars": n} for n in lengths
    ]


@pytest.mark.parametrize("how", ["bucket", "random", "pack"])
def test_batches_hold_each_example_once_and_repeat(how):
    examples = of_lengths(*(i % 37 + 1 for i in range(103)))
    groups = batches(examples, 8, how=how, seed=3, epoch=1)
    assert sorted(i for group in groups for i in group) == list(range(103))
    assert all(len(group) <= 8 for group in groups)
    assert groups == batches(examples, 8, how=how, seed=3, epoch=1)
    assert groups != batches(examples, 8, how=how, seed=3, epoch=2)
    assert groups != batches(examples, 8, how=how, seed=4, epoch=1)


def test_buckets_waste_little():
    examples = of_lengths(*((i * 7919) % 120 + 1 for i in range(1000)))

    def waste(how):
        groups = batches(examples, 8, how=how)
        sizes = [[len(examples[i]["input_ids"]) for i in group] for group in groups]
        return sum(max(s) * len(s) for s in sizes) / sum(map(sum, sizes))

    assert waste("bucket") < 1.1
    assert waste("random") > 1.4


def test_evaluation_begins_with_the_longest():
    groups = in_order(of_lengths(3, 9, 1, 5), 2)
    assert groups == [[1, 3], [0, 2]]


def test_batch_settings_are_checked():
    with pytest.raises(SettingError, match="batch=0"):
        batches(of_lengths(1), 0)
    with pytest.raises(SettingError, match="must be 'bucket'"):
        batches(of_lengths(1), 1, how="sorted")  # type: ignore[arg-type]


# --- packing ------------------------------------------------------------------------------


def test_packing_fits_best_and_loses_nothing():
    packed = pack(of_lengths(6, 4, 5, 5, 3, 2), 10)
    assert sorted(len(p["input_ids"]) for p in packed) == [5, 10, 10]
    assert sum(p["chars"] for p in packed) == 25
    for row in packed:
        starts = [i for i, at in enumerate(row["position_ids"]) if at == 0]
        assert all(row["labels"][i] == IGNORED for i in starts)
        assert row["segments"][-1] == len(starts) - 1


def test_packing_refuses_what_it_cannot_pack():
    with pytest.raises(SettingError, match="has 11 tokens"):
        pack(of_lengths(11), 10)
    with pytest.raises(SettingError, match="causal"):
        pack([{"input_ids": [1], "labels": 1}], 10)
    assert pack([], 10) == []


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny_runs.llama, tiny_runs.gpt2])
def test_packed_logits_equal_separate_ones(make, attention):
    model = make().eval()
    model.set_attn_implementation(attention)
    assert packing_refusal(model) is None
    tokenizer = tiny_runs.tokenizer("gpt")
    data = read_task(tiny_runs.sums(13), validation_share=0)
    examples = data.task.encode(data.splits["train"], tokenizer, 32)
    packed = pack(examples, 32)
    assert len(packed) > 1
    assert len({len(p["input_ids"]) for p in packed}) > 1  # so that one of them is padded
    batch = data.task.collate(packed, tokenizer)
    assert "attention_mask" not in batch
    assert "segments" not in data.task.inputs(batch)
    with torch.no_grad():
        together = model(**data.task.inputs(batch))
        seen = 0
        for row, logits in zip(packed, together.logits, strict=True):
            for segment in range(row["segments"][-1] + 1):
                at = [i for i, s in enumerate(row["segments"]) if s == segment]
                ids = torch.tensor([[row["input_ids"][i] for i in at]])
                alone = model(input_ids=ids).logits[0]
                assert torch.allclose(logits[at], alone, atol=1e-5)
                seen += 1
        apart = data.task.collate(examples, tokenizer)
        separate = model(**data.task.inputs(apart))
    assert seen == len(examples)
    assert together.loss.item() == pytest.approx(separate.loss.item(), abs=1e-5)
    a = data.task.score(data.task.predict(together, batch), data.task.references(batch))
    b = data.task.score(data.task.predict(separate, apart), data.task.references(apart))
    assert a == pytest.approx(b, rel=1e-6, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("bloom", {}, "see each other"),  # counts positions from a mask of two dimensions
        ("mamba", {}, "see each other"),
    ],
)
def test_models_that_would_mix_segments_are_found_out(kind, settings, reason):
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        kind, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **small, **settings
    )
    model = AutoModelForCausalLM.from_config(config).train()
    assert reason in (packing_refusal(model) or "")
    assert model.training


def test_encoder_decoders_are_not_packed():
    assert "encoder-decoder" in (packing_refusal(tiny_runs.t5()) or "")


# --- the check ----------------------------------------------------------------------------


def test_the_check_counts():
    train = [
        {"text": "a b c d", "label": "x"},
        {"text": "A, b C d!", "label": "y"},  # the same but for case and punctuation
        {"text": "i am in berlin", "label": "x"},
        {"text": "playing " * 10, "label": "x"},
    ]
    test = [{"text": "I am in Berlin.", "label": "x"}, {"text": "new york", "label": "y"}]
    data = read_task(train, test=test, validation_share=0, label_names=["x", "y", "z"])
    report = check(data, tiny_text.word_pieces(), max_length=8)
    found = report.to_json()
    first, last = found["splits"]["train"], found["splits"]["test"]
    assert (first["rows"], last["rows"]) == (4, 2)
    assert first["labels"] == {"x": 3, "y": 1}
    assert first["duplicates"] == 1
    assert first["contradictions"] == 1
    assert last["in_train"] == 1
    assert first["truncated"] == pytest.approx(1 / 4)
    assert first["tokens"]["longest"] == 22
    assert any("without a row in training: z" in note for note in found["notes"])
    assert json.loads(json.dumps(found)) == found


def test_the_check_counts_cut_answers_and_rows_without_target():
    rows = [{"prompt": "a", "completion": " colour"}, {"prompt": "a", "completion": " fox" * 40}]
    data = read_task(rows, validation_share=0)
    found = check(data, tiny_text.byte_bpe(), max_length=12).splits["train"]
    assert found.truncated == found.answers_cut == 0.5
    assert found.without_target == []
    tagged = [{"tokens": ["a", "b"], "tags": ["O", "B-x"]}]
    found = check(read_task(tagged), tiny_text.word_pieces(), max_length=2).splits["train"]
    assert found.without_target == ["train:row 1"]


def test_the_check_tokenises_a_sample_of_large_data(monkeypatch):
    monkeypatch.setattr("espalier.data.checking.SAMPLE", 6)
    report = check(read_task(ROWS, validation_share=0), tiny_text.word_pieces())
    assert (report.splits["train"].rows, report.splits["train"].tokenised) == (20, 6)
    console = Console(width=100)
    with console.capture() as got:
        console.print(report)
    assert "a sample" in got.get()


def test_the_check_needs_no_tokenizer_and_prints_what_the_loss_sees():
    data = read_task([{"prompt": "Name a colour:", "completion": " Blue"}], validation_share=0)
    console = Console(width=100, record=True, force_terminal=True, color_system="standard")
    with console.capture() as got:
        console.print(check(data))
        console.print(check(data, tiny_text.byte_bpe(), 64))
    text = got.get()
    assert "\x1b[2mName a colour:" in text  # dim
    assert "\x1b[1;32m Blue</s>" in text  # green, with the end that is learned
    assert "rows truncated" in text
