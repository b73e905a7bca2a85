"""Scores against independent oracles: scikit-learn, scipy, seqeval, sacrebleu, hand counts."""

from __future__ import annotations

import math
import random
import sys
import warnings

import numpy as np
import pytest

from espalier.errors import SettingError
from espalier.tasks import Multilabel, metrics
from espalier.tasks.metrics import TextLoss
from espalier.tasks.spans import entity_scores, spans


def test_classification_by_hand():
    scores = metrics.classification_scores([1, 1, 0, 0, 1], [1, 0, 0, 0, 1], 2)
    assert scores["accuracy"] == pytest.approx(4 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1))  # 2 hits, 1 false, 0 missed
    f1_zero = 2 * 2 / (2 * 2 + 1)
    assert scores["f1_macro"] == pytest.approx((scores["f1"] + f1_zero) / 2)
    # tp 2, tn 2, fp 1, fn 0
    assert scores["matthews"] == pytest.approx((2 * 2 - 0) / math.sqrt(3 * 2 * 3 * 2))


def test_classification_of_three_classes_by_hand():
    scores = metrics.classification_scores([0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0], 3)
    each = [2 * 1 / (2 + 2), 2 * 1 / (1 + 2), 2 * 2 / (3 + 2)]
    assert scores["f1_macro"] == pytest.approx(sum(each) / 3)
    assert scores["f1_weighted"] == pytest.approx((2 * each[0] + 2 * each[1] + 2 * each[2]) / 6)
    assert "f1" not in scores


def test_multilabel_by_hand():
    scores = metrics.multilabel_scores([[0, 1], [], [2]], [[0], [1], [2]], 3)
    assert scores["f1_micro"] == pytest.approx(2 * 2 / (3 + 3))
    assert scores["f1_macro"] == pytest.approx((1 + 0 + 1) / 3)
    assert scores["accuracy"] == pytest.approx(1 / 3)


def test_regression_against_numpy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=50), rng.normal(size=50)
    scores = metrics.regression_scores(list(a), list(b))
    assert scores["pearson"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert scores["mse"] == pytest.approx(((a - b) ** 2).mean())
    assert scores["mae"] == pytest.approx(np.abs(a - b).mean())


def test_correlation_with_a_constant_is_nought():
    scores = metrics.regression_scores([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])
    assert scores["pearson"] == scores["spearman"] == 0.0


def test_text_scores_by_hand():
    losses = [TextLoss(2.0, 4, 1), TextLoss(6.0, 4, 3)]
    scores = metrics.text_scores(losses, [10, 6])
    assert scores["loss"] == pytest.approx(1.0)
    assert scores["perplexity"] == pytest.approx(math.e)
    assert scores["token_accuracy"] == pytest.approx(0.5)
    assert scores["bits_per_character"] == pytest.approx(8.0 / math.log(2) / 16)


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-x I-x O B-x", [("x", 0, 2), ("x", 3, 4)]),
        ("I-x I-x", [("x", 0, 2)]),  # an opening I counts as B
        ("B-x I-y", [("x", 0, 1), ("y", 1, 2)]),
        ("B-x B-x", [("x", 0, 1), ("x", 1, 2)]),
        ("O O", []),
        ("S-x B-y E-y", [("x", 0, 1), ("y", 1, 3)]),
        ("", []),
    ],
)
def test_spans(tags, found):
    assert spans(tags.split()) == found


def test_entity_scores_against_seqeval():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from seqeval import metrics as seqeval
    rng = random.Random(1)
    tags = ["O", "B-per", "I-per", "B-loc", "I-loc", "B-a-b", "I-a-b"]
    truth = [[rng.choice(tags) for _ in range(rng.randint(1, 12))] for _ in range(80)]
    guess = [[rng.choice([t, rng.choice(tags)]) for t in row] for row in truth]
    ours = entity_scores(guess, truth)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ours["f1"] == pytest.approx(seqeval.f1_score(truth, guess))
        assert ours["precision"] == pytest.approx(seqeval.precision_score(truth, guess))
        assert ours["recall"] == pytest.approx(seqeval.recall_score(truth, guess))
        assert ours["f1_macro"] == pytest.approx(seqeval.f1_score(truth, guess, average="macro"))
        assert ours["accuracy"] == pytest.approx(seqeval.accuracy_score(truth, guess))


def test_exact_match_looks_past_white_space_at_the_ends():
    assert metrics.exact_match(["a b ", "c", "D"], ["a b", " c", "d"]) == pytest.approx(2 / 3)


def test_bleu_of_known_texts():
    assert metrics.bleu(["the cat sat on the mat"], ["the cat sat on the mat"]) == pytest.approx(
        100
    )
    # by hand: n-gram precisions 5/6, 3/5, 1/4, and 0/3 smoothed to 1/(2*3); lengths are equal
    expected = 100 * (5 / 6 * 3 / 5 * 1 / 4 * 1 / 6) ** 0.25
    found = metrics.bleu(["the cat sat in the mat"], ["the cat sat on the mat"])
    assert found == pytest.approx(expected, rel=1e-6)


def test_rouge_l_by_hand():
    # longest common subsequence "the cat the mat": 4 of 5 and 4 of 6 words
    precision, recall = 4 / 5, 4 / 6
    expected = 2 * precision * recall / (precision + recall)
    found = metrics.rouge_l(["the cat near the mat"], ["the cat sat on the mat"])
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("function", "module"), [(metrics.bleu, "sacrebleu"), (metrics.rouge_l, "rouge_score")]
)
def test_missing_extras_are_named(monkeypatch, function, module):
    for name in [n for n in sys.modules if n == module or n.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SettingError, match=r"pip install 'espalier\[metrics\]'"):
        function(["a"], ["a"])


def test_the_same_labels_for_all_rows_are_said():
    task = Multilabel({"text": "text", "label": "labels"}, ("a", "b", "c"))
    assert "gives all 2 rows no label:" in (task.doubt([[], []], [[0], [1]]) or "")
    same = task.doubt([[0, 2], [0, 2]], [[0], [1]])
    assert "gives all 2 rows the same labels, a, c:" in (same or "")
    assert "class" not in (same or "")
    assert task.doubt([[], [1]], [[0], [1]]) is None
    assert task.doubt([[], []], [[], []]) is None  # it is right
