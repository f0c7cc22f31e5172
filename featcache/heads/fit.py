"""Train a head on cached features: choose on validation, refit on train and validation, test once."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import VotingClassifier
from sklearn.preprocessing import LabelEncoder

from featcache import heads
from featcache.errors import DataError, UsageError
from featcache.evaluation.metrics import Scores, TestResult, best_temperature, score, scores_on_test
from featcache.evaluation.splits import Fold, Split
from featcache.heads import Params
from featcache.store.rows import Features

MEMBERS = ("logistic", "knn", "lda", "rbf", "mlp", "boosting")
_AT_MOST = 3


@dataclass(frozen=True)
class FittedHead:
    """A head, what was chosen for it, its validation scores before the refit and its test scores after.

    ``answers`` are those on validation (n, classes) or (n,), ``temperature`` what scales its logits best there.
    ``solutions`` gave them: what the search fitted with these parameters, one a fold.
    """

    name: str
    estimator: Any
    params: dict[str, Any]
    val: Scores
    tested: TestResult
    seconds: float
    notes: tuple[str, ...]
    answers: NDArray[Any] = field(repr=False)
    temperature: float | None = None
    solutions: tuple[Any, ...] = field(default=(), repr=False)


def fit(
    features: Features, split: Split, name: str, *, seed: int = 0, grid: Sequence[Params] | None = None, views: int = 1
) -> FittedHead:
    """Train one head.

    Args:
        features: embeddings X (n, d) float, of several views (n, views, d); labels y (n,).
        split: which images train, choose and test.
        name: a key of ``heads.HEADS``.
        seed: of the head's own randomness.
        grid: parameters to choose from instead of the head's own.
        views: how many views there are: each trains, and answers are averaged over them.

    Raises:
        UsageError: there is no such head.
        DataError: the features are no embeddings; or no candidate, or not the final fit, reached its optimum.
    """
    heads.require_head(name)
    X = _embeddings(features, views)
    y = np.repeat(features.y, views)
    folds = [Fold(_rows(fold.train, views), _rows(fold.val, views)) for fold in split.folds]
    rows = _rows(split.train_val, views)
    started = time.monotonic()
    chosen = heads.search_head(name, X, y, folds, seed, grid, views)
    estimator = heads.train(name, chosen.params, heads.some_of(X, rows), y[rows], seed)
    seconds = time.monotonic() - started
    notes = []
    if chosen.unconverged:
        notes.append(
            f"{name}: {chosen.unconverged} of {chosen.tried} candidates did not reach their optimum and are left out"
        )
    head = _tested(name, estimator, chosen.params, chosen.answers, features, split, seconds, notes, views)
    return replace(head, solutions=chosen.solutions)


def ensemble(features: Features, split: Split, fitted: Sequence[FittedHead], views: int = 1) -> FittedHead:
    """Average the probabilities of the best few heads; how many is chosen on validation.

    Raises:
        UsageError: none of the heads gives probabilities.
    """
    started = time.monotonic()
    known = sorted((head for head in fitted if head.answers.ndim == 2), key=lambda head: head.val.rank)
    if not known:
        raise UsageError(f"`heads` ensemble averages probabilities: give some of {', '.join(MEMBERS)} too.")
    truth = _truth(features.y, split)
    averages = [
        np.mean([head.answers for head in known[:count]], axis=0) for count in range(1, min(_AT_MOST, len(known)) + 1)
    ]
    best = min(range(len(averages)), key=lambda number: score(truth, averages[number]).rank)
    members = known[: best + 1]
    estimator = VotingClassifier([(head.name, head.estimator) for head in members], voting="soft")
    estimator.estimators_ = [head.estimator for head in members]
    estimator.le_ = LabelEncoder().fit(features.y[split.train_val])
    estimator.classes_ = estimator.le_.classes_
    seconds = time.monotonic() - started + sum(head.seconds for head in members)
    params = {"members": [head.name for head in members]}
    return _tested(heads.ENSEMBLE, estimator, params, averages[best], features, split, seconds, [], views)


def members_of(names: Sequence[str]) -> list[str]:
    """Return the heads to fit for those asked for: an ensemble that is alone brings its usual members."""
    if heads.ENSEMBLE in names and not set(names) & set(MEMBERS):
        return [*heads.in_order([*names, *MEMBERS[:4]])]
    return heads.in_order(names)


def _tested(
    name: str,
    estimator: Any,
    params: Mapping[str, Any],
    answers: NDArray[Any],
    features: Features,
    split: Split,
    seconds: float,
    notes: Sequence[str],
    views: int,
) -> FittedHead:
    X, y, truth = _embeddings(features, views), features.y, _truth(features.y, split)
    temperature = best_temperature(truth, answers) if answers.ndim == 2 else None
    classes = len(features.classes)
    tested = scores_on_test(
        lambda index: heads.over_views(heads.answers(estimator, X[_rows(index, views)], classes), views),
        y,
        split,
        temperature,
    )
    val = score(truth, answers, temperature)
    return FittedHead(name, estimator, dict(params), val, tested, seconds, tuple(notes), answers, temperature)


def _embeddings(features: Features, views: int) -> heads.Many:
    """Return one row a view (n * views, d), the views of an image one after the other."""
    shape = features.X.shape
    if len(shape) != (2 if views == 1 else 3) or (views > 1 and shape[1] != views):
        raise DataError(f"heads train on embeddings (n, d), these features are {shape}: extract at the cut pooled.")
    return heads.as_rows(features.X)


def _rows(images: NDArray[np.int64], views: int) -> NDArray[np.int64]:
    return (images[:, None] * views + np.arange(views)).reshape(-1)


def _truth(y: NDArray[np.int64], split: Split) -> NDArray[np.int64]:
    return np.concatenate([y[fold.val] for fold in split.folds])
