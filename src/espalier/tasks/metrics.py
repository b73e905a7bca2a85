"""Scores as plain functions of predictions and references.

Correlations and F1 come from scikit-learn and scipy; BLEU and ROUGE-L from sacrebleu and
rouge-score, which are optional (`pip install 'espalier[metrics]'`). Everything is a fraction
between 0 and 1 (or -1 and 1) except BLEU (0 to 100, as everybody writes it), errors and losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from espalier.errors import SettingError

UNDEFINED: Any = 0
"""The F1 of a class that nobody has and nobody guessed (scikit-learn's type stub wants a text)."""


def classification_scores(
    predicted: Sequence[int], right: Sequence[int], classes: int
) -> dict[str, float]:
    """accuracy, f1_macro, f1_weighted, matthews; with two classes also f1 of class 1.

    Macro F1 is the mean over the classes that occur among predictions or references.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    scores = {
        "accuracy": accuracy_score(right, predicted),
        "f1_macro": f1_score(right, predicted, average="macro", zero_division=UNDEFINED),
        "f1_weighted": f1_score(right, predicted, average="weighted", zero_division=UNDEFINED),
        "matthews": matthews_corrcoef(right, predicted),
    }
    if classes == 2:
        scores["f1"] = f1_score(right, predicted, pos_label=1, zero_division=UNDEFINED)
    return _floats(scores)


def multilabel_scores(
    predicted: Sequence[Sequence[int]], right: Sequence[Sequence[int]], classes: int
) -> dict[str, float]:
    """f1_micro, f1_macro and accuracy (the whole set of classes right)."""
    import numpy as np
    from sklearn.metrics import accuracy_score, f1_score

    def flags(sets: Sequence[Sequence[int]]) -> np.ndarray:
        table = np.zeros((len(sets), classes), dtype=int)
        for i, ids in enumerate(sets):
            table[i, list(ids)] = 1
        return table

    guess, truth = flags(predicted), flags(right)
    return _floats(
        {
            "f1_micro": f1_score(truth, guess, average="micro", zero_division=UNDEFINED),
            "f1_macro": f1_score(truth, guess, average="macro", zero_division=UNDEFINED),
            "accuracy": accuracy_score(truth, guess),
        }
    )


def regression_scores(predicted: Sequence[float], right: Sequence[float]) -> dict[str, float]:
    """pearson, spearman, mse, mae; a correlation that is not defined counts as 0."""
    import numpy as np
    from scipy.stats import pearsonr, spearmanr

    guess, truth = np.asarray(predicted, dtype=float), np.asarray(right, dtype=float)
    defined = len(guess) > 1 and np.ptp(guess) > 0 and np.ptp(truth) > 0
    correlations: list[Any] = [pearsonr(guess, truth), spearmanr(guess, truth)] if defined else []
    pearson, spearman = (float(c.statistic) for c in correlations) if defined else (0.0, 0.0)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "mse": float(np.mean((guess - truth) ** 2)),
        "mae": float(np.mean(np.abs(guess - truth))),
    }


class TextLoss(NamedTuple):
    """What a language model made of one example, in sums over its target tokens."""

    nats: float
    tokens: int
    right: int


def text_scores(losses: Sequence[TextLoss], chars: Sequence[int]) -> dict[str, float]:
    """Loss (nats per target token), perplexity, token_accuracy, bits_per_character.

    bits_per_character sums the whole loss, that of end tokens included, over the characters of
    the targets: it compares models whose tokenizers differ.
    """
    nats, tokens = math.fsum(x.nats for x in losses), sum(x.tokens for x in losses)
    loss = nats / max(tokens, 1)
    scores = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": sum(x.right for x in losses) / max(tokens, 1),
    }
    if sum(chars):
        scores["bits_per_character"] = nats / math.log(2) / sum(chars)
    return scores


def exact_match(predicted: Sequence[str], right: Sequence[str]) -> float:
    """The share of texts that are equal, white space at the ends aside."""
    if not right:
        return 0.0
    return sum(p.strip() == r.strip() for p, r in zip(predicted, right, strict=True)) / len(right)


def bleu(predicted: Sequence[str], right: Sequence[str]) -> float:
    """Corpus BLEU from 0 to 100, as sacrebleu computes it (13a tokens).

    Raises:
        SettingError: sacrebleu is not installed.
    """
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError:
        raise SettingError(
            "BLEU needs sacrebleu: pip install 'espalier[metrics]' (or: pip install sacrebleu)"
        ) from None
    return float(BLEU().corpus_score(list(predicted), [list(right)]).score)


def rouge_l(predicted: Sequence[str], right: Sequence[str]) -> float:
    """Mean ROUGE-L F1 with stemming, from 0 to 1, as rouge-score computes it.

    Raises:
        SettingError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise SettingError(
            "ROUGE-L needs rouge-score: pip install 'espalier[metrics]' "
            "(or: pip install rouge-score)"
        ) from None
    if not right:
        return 0.0
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    pairs = zip(right, predicted, strict=True)
    return math.fsum(scorer.score(r, p)["rougeL"].fmeasure for r, p in pairs) / len(right)


def generation_scores(predicted: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """exact_match, bleu and rouge_l of generated texts, each from 0 to 1; one reference each."""
    return {
        "exact_match": exact_match(predicted, right),
        "bleu": bleu(predicted, right) / 100,
        "rouge_l": rouge_l(predicted, right),
    }


def _floats(scores: dict[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}
