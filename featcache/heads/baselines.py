"""Baselines that need no backbone: what they reach, a backbone's features must beat to be worth anything.

On one published remote-sensing set a nearest neighbour on statistics beats a large frozen transformer's: without
baselines nobody would see it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.decoding import SMALL, STATISTICS, small_rows, statistics
from featcache.evaluation import Columns, alone
from featcache.evaluation.metrics import (
    AnyScores,
    Gap,
    Kind,
    NumberScores,
    TestResult,
    decode_correct,
    encode_correct,
    evaluate,
    evaluate_on_test,
    kind_of,
    paired_gap,
    scores_from,
)
from featcache.evaluation.splits import Fold, Index, Split

if TYPE_CHECKING:
    from featcache.heads import FittedHead

_MUCH = 0.5  # of what the best head adds to the answer that looks at no sample: from there a column alone is told of
_STRENGTHS = (1.0, 10.0, 100.0)  # C of the logistic regression, 1 / alpha of the ridge


@dataclass(frozen=True)
class Baseline:
    """A trivial method on the test split."""

    name: str
    val: AnyScores
    tested: TestResult
    seconds: float = 0.0

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``controls`` of ``featcache fit``."""
        return {"control": self.name, "val": asdict(self.val), "test": asdict(self.tested.scores)}

    @property
    def stored(self) -> dict[str, Any]:
        """All of it as plain data."""
        return self.summary | {"right": encode_correct(self.tested.right), "seconds": self.seconds}

    @classmethod
    def read(cls, kind: Kind, stored: Mapping[str, Any]) -> "Baseline":
        """Return a baseline from plain data; which classes it answered with is not kept."""
        scores, right = scores_from(kind, stored["test"]), decode_correct(stored["right"])
        tested = TestResult(scores, right, np.empty(0, np.int64))
        return cls(stored["control"], scores_from(kind, stored["val"]), tested, stored["seconds"])


# of each kind of task: what is fitted on statistics, and on small rows
_HEADS: dict[Kind, tuple[str, str]] = {
    "label": ("knn", "logistic"),
    "labels": ("logistic", "logistic"),
    "number": ("knn", "ridge"),
}
_SHOWN = {"knn": "kNN"}


def baselines(thumbnails: NDArray[np.uint8], y: NDArray[Any], split: Split, seed: int = 0) -> list[Baseline]:
    """Return the answer that looks at no sample, a head on statistics of thumbnails and one on these made smaller.

    Args:
        thumbnails: uint8 (n, 32, 32, 3).
        y: classes (n,), which labels there are (n, k), or numbers (n,).
        split: which samples train, choose and test.
        seed: of the heads' own randomness.
    """
    on_statistics, on_small = _HEADS[kind_of(y)]
    return [
        blind(y, split),
        on_rows(STATISTICS, on_statistics, statistics(thumbnails), y, split, seed),
        # the solver scales levels by itself
        _fitted(f"{SMALL} + {on_small}", on_small, small_rows(thumbnails), y, split, seed),
    ]


def on_rows(title: str, head: str, X: NDArray[np.float32], y: NDArray[Any], split: Split, seed: int) -> Baseline:
    """Return a head on rows (n, d) of a few measures, scaled by what trains; the table calls it by what they measure."""
    rows = _SearchRows(*_by_fold(X, y, split), standardised(X, split.train_val))
    return _searched(f"{title} + {_SHOWN.get(head, head)}", head, rows, (y, split), seed)


class _SearchRows(NamedTuple):
    """What a head is searched on, with labels and folds, and what it is fitted on in the end."""

    searched: NDArray[Any]
    labels: NDArray[Any]
    folds: tuple[Fold, ...]
    X: NDArray[Any]


def _searched(name: str, head: str, rows: _SearchRows, asked: tuple[NDArray[Any], Split], seed: int) -> Baseline:
    from featcache.heads.search import predict_with, search_head, train

    (y, split), X, started = asked, rows.X, time.monotonic()
    kind = kind_of(y)
    classes = int(y.max()) + 1 if kind == "label" else 0
    search = search_head(head, rows.searched, rows.labels, rows.folds, seed)
    estimator = train(head, search.params, X[split.train_val], y[split.train_val], seed)
    seconds = time.monotonic() - started
    tested = evaluate_on_test(predict_with(estimator, X[split.test], kind, classes), y, split)
    return Baseline(name, search.val, tested, seconds)


def of_columns(columns: Columns, y: NDArray[Any], split: Split, seed: int = 0) -> list[Baseline]:
    """Return what a linear head reaches on all columns together, without a sample, and then on each alone.

    Args:
        columns: of the samples.
        y: as of ``baselines``.
        split: which samples train, choose and test.
        seed: of the heads' own randomness.
    """
    kind, train = kind_of(y), split.train
    head = _HEADS[kind][1]
    parts = [
        alone(column, [row[place] for row in columns.values], train)
        for place, column in enumerate(columns.coder(train).columns)
    ]
    named = [(f"columns + {head}", np.concatenate(parts, axis=1)), *zip(columns.names, parts, strict=True)]
    return [_fitted(name, head, X, y, split, seed) for name, X in named]


def _fitted(name: str, head: str, X: NDArray[np.float32], y: NDArray[Any], split: Split, seed: int) -> Baseline:
    return _searched(name, head, _SearchRows(X, y, split.folds, X), (y, split), seed)


def warning_of_columns(lone: Sequence[Baseline], blind: Baseline, head: "FittedHead", method: str) -> list[str]:
    """Return what is to be said of columns that tell the label alone: it may have been written down from it.

    Args:
        lone: each column alone.
        blind: the answer that looks at nothing.
        head: the best on validation, of sample and columns.
        method: what tables call it.
    """
    least, of_head = blind.tested.scores.primary[0], head.tested.scores.primary[0]
    warnings = []
    for column in lone:
        reached, interval = column.tested.scores.primary
        is_sure = interval is not None and interval[0] > least
        if not is_sure or reached < least + _MUCH * (of_head - least):
            continue
        is_share = not isinstance(column.val, NumberScores)
        told, nothing, most = (
            f"{100 * value:.1f} %" if is_share else f"R2 {value:.3f}" for value in (reached, least, of_head)
        )
        warnings.append(
            f"the column {column.name!a} alone reaches {told} ({blind.name} {nothing}, {method} {most}): is it known before "
            "the label is, and not written down from it?"
        )
    return warnings


def best_on_validation(results: Sequence[Baseline]) -> Baseline:
    """Return the baseline that the best head is compared with: chosen as heads are, without the test split."""
    return max(results, key=lambda baseline: baseline.val.primary[0])


def gap_to(best: Baseline, head: "FittedHead", shared: Split, keep: Index, split: Split) -> Gap | None:
    """Return by how much a head is more accurate than a baseline, paired; ``None`` where a task has no right answers.

    Args:
        best: the baseline that is best on validation.
        head: the head that is.
        shared: the split of the samples that both have looked at.
        keep: those samples.
        split: the head's own split.
    """
    if not len(head.tested.right):
        return None
    return paired_gap(head.tested.right[np.isin(split.test, keep)], best.tested.right, groups=shared.test_groups)


def warning_of(best: Baseline, head: "FittedHead", method: str, between: Gap | None) -> str:
    """Return what is to be said where a baseline does as well as a head, "" where it does not.

    Args:
        best: the baseline that is best on validation.
        head: the head that is.
        method: what tables call it.
        between: what ``gap_to`` says of the two.
    """
    of_best, of_head = best.tested.scores.primary[0], head.tested.scores.primary[0]
    if between is not None:
        of_head = of_best + between.points / 100  # on the samples that both have looked at
        as_good = between.is_noise or between.points < 0
    else:  # no samples that one has right and the other has not: the head's own interval says what is noise
        interval = head.tested.scores.primary[1]
        as_good = of_best >= (interval[0] if interval else of_head)
    if not as_good:
        return ""
    is_share = not isinstance(best.val, NumberScores)
    first, second = (f"{100 * value:.1f} %" if is_share else f"R2 {value:.3f}" for value in (of_best, of_head))
    return f"{best.name} reaches {first} without a backbone, {method} {second}: this data set may not need one"


def blind(y: NDArray[Any], split: Split) -> Baseline:
    """Return the commonest class, each label's share of the samples, or the mean, whatever a sample shows."""
    kind = kind_of(y)

    def constant(train: Index, count: int) -> NDArray[Any]:
        seen = y[train]
        answer = np.bincount(seen).argmax() if kind == "label" else seen.mean(axis=0)
        return np.broadcast_to(answer, (count, *np.shape(answer)))

    y_true = np.concatenate([y[fold.val] for fold in split.folds])
    answers = np.concatenate([constant(fold.train, len(fold.val)) for fold in split.folds])
    name = {"label": "majority class", "labels": "shares of labels", "number": "mean"}[kind]
    tested = evaluate_on_test(constant(split.train_val, len(split.test)), y, split)
    return Baseline(name, evaluate(y_true, answers), tested)


def _by_fold(X: NDArray[np.float32], y: NDArray[Any], split: Split) -> tuple[NDArray[Any], NDArray[Any], tuple[Fold, ...]]:
    """Return the rows once a fold, each time scaled by that fold's training samples alone, with labels and folds."""
    rows = np.concatenate([standardised(X, fold.train) for fold in split.folds])
    shifts = [number * len(X) for number in range(len(split.folds))]
    folds = tuple(Fold(fold.train + shift, fold.val + shift) for fold, shift in zip(split.folds, shifts, strict=True))
    return rows, np.concatenate([y] * len(folds)), folds


def standardised(X: NDArray[np.float32], train: Index) -> NDArray[np.float32]:
    """Return rows (n, d) by the mean and spread of the training rows (k,)."""
    seen = X[train].astype(np.float64)
    scaled: NDArray[np.float32] = ((X - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-6)).astype(np.float32)
    return scaled


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
    from sklearn.pipeline import Pipeline, make_pipeline

    from featcache.heads.search import predict_with

    kind, all_texts, started = kind_of(y), np.array(texts, dtype=object), time.monotonic()
    classes = int(y.max()) + 1 if kind == "label" else 0
    answers: dict[float, list[NDArray[Any]]] = {strength: [] for strength in _STRENGTHS}
    for fold in split.folds:
        # each fold counts the words of its own training texts: those of others would tell which words matter there
        counts = _word_counts()
        train = counts.fit_transform(all_texts[fold.train])
        for strength in _STRENGTHS:
            model = make_pipeline(counts, _on_counts(kind, strength).fit(train, y[fold.train]))
            answers[strength].append(predict_with(model, all_texts[fold.val], kind, classes))
    y_true = np.concatenate([y[fold.val] for fold in split.folds])
    vals = {strength: evaluate(y_true, np.concatenate(parts)) for strength, parts in answers.items()}
    best = min(vals, key=lambda strength: vals[strength].rank)
    fitted: Pipeline = make_pipeline(_word_counts(), _on_counts(kind, best)).fit(
        all_texts[split.train_val], y[split.train_val]
    )
    seconds = time.monotonic() - started
    tested = evaluate_on_test(predict_with(fitted, all_texts[split.test], kind, classes), y, split)
    name = "ridge" if kind == "number" else "logistic"
    return Baseline(f"TF-IDF + {name}", vals[best], tested, seconds)


def _word_counts() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    # words of one character too: without them texts of languages that write one a word would be empty
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")  # noqa: S106


def _on_counts(kind: Kind, strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsRestClassifier

    if kind == "number":
        return Ridge(alpha=1 / strength)
    # one class against the rest by liblinear: L-BFGS of all classes takes a hundred times longer on sparse counts
    return OneVsRestClassifier(LogisticRegression(C=strength, solver="liblinear"))
