"""Baselines of texts that need no backbone: counted words are often hard to beat, and lengths can give labels away."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import Pipeline, make_pipeline

from featcache.evaluation.metrics import Kind, evaluate, evaluate_on_test, kind_of
from featcache.evaluation.splits import Split
from featcache.heads.baselines import Baseline, blind, on_rows
from featcache.heads.search import predict_with

_STRENGTHS = (1.0, 10.0, 100.0)  # C of the logistic regression, 1 / alpha of the ridge
_WORDS: dict[Kind, Callable[[float], Any]] = {
    # one class against the rest by liblinear: L-BFGS of all classes takes a hundred times longer on sparse counts
    "label": lambda strength: OneVsRestClassifier(LogisticRegression(C=strength, solver="liblinear")),
    "labels": lambda strength: OneVsRestClassifier(LogisticRegression(C=strength, solver="liblinear")),
    "number": lambda strength: Ridge(alpha=1 / strength),
}


def text_baselines(texts: Sequence[str], y: NDArray[Any], split: Split, seed: int = 0) -> list[Baseline]:
    """Return the answer that looks at no text, a head on lengths alone, and one on weighted counts of words and pairs.

    Counts are weighted by TF-IDF as scikit-learn does it; the penalty is chosen on validation.

    Args:
        texts: of all samples (n,).
        y: classes (n,), which labels there are (n, k), or numbers (n,).
        split: which texts train, choose and test.
        seed: of the heads' own randomness.
    """
    head = "ridge" if kind_of(y) == "number" else "logistic"
    return [blind(y, split), on_rows("length", head, lengths(texts), y, split, seed), _on_words(texts, y, split)]


def lengths(texts: Sequence[str]) -> NDArray[np.float32]:
    """Return how long texts are (n, 3): the logarithms of their characters and words, and characters a word."""
    characters = np.array([len(text) for text in texts], np.float32)
    words = np.array([len(text.split()) for text in texts], np.float32)
    return np.stack([np.log1p(characters), np.log1p(words), characters / np.maximum(words, 1)], axis=1)


def _on_words(texts: Sequence[str], y: NDArray[Any], split: Split) -> Baseline:
    kind, all_texts, started = kind_of(y), np.array(texts, dtype=object), time.monotonic()
    classes = int(y.max()) + 1 if kind == "label" else 0
    answers: dict[float, list[NDArray[Any]]] = {strength: [] for strength in _STRENGTHS}
    for fold in split.folds:
        # each fold counts the words of its own training texts: those of others would tell which words matter there
        counts = _word_counts()
        train = counts.fit_transform(all_texts[fold.train])
        for strength in _STRENGTHS:
            model = make_pipeline(counts, _WORDS[kind](strength).fit(train, y[fold.train]))
            answers[strength].append(predict_with(model, all_texts[fold.val], kind, classes))
    y_true = np.concatenate([y[fold.val] for fold in split.folds])
    vals = {strength: evaluate(y_true, np.concatenate(parts)) for strength, parts in answers.items()}
    best = min(vals, key=lambda strength: vals[strength].rank)
    fitted: Pipeline = make_pipeline(_word_counts(), _WORDS[kind](best)).fit(all_texts[split.train_val], y[split.train_val])
    seconds = time.monotonic() - started
    tested = evaluate_on_test(lambda index: predict_with(fitted, all_texts[index], kind, classes), y, split)
    name = "ridge" if kind == "number" else "logistic"
    return Baseline(f"TF-IDF + {name}", vals[best], tested, seconds)


def _word_counts() -> TfidfVectorizer:
    # words of one character too: without them texts of languages that write one a word would be empty
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")  # noqa: S106
