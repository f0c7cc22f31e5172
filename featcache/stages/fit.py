"""Train a head on cached features: choose on validation, refit on train and validation, test once."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import VotingClassifier
from sklearn.preprocessing import LabelEncoder

from featcache import heads
from featcache.errors import DataError, UsageError
from featcache.heads import Params
from featcache.metrics import Scores, Tested, best_temperature, score, scores_on_test
from featcache.splits import Split
from featcache.store import Features

_MEMBERS = ("logistic", "knn", "lda", "rbf", "mlp", "boosting")
_AT_MOST = 3


@dataclass(frozen=True)
class FittedHead:
    """A head, what was chosen for it, its validation scores before the refit and its test scores after.

    ``answers`` are those on validation (n, classes) or (n,), ``temperature`` what scales its logits best there.
    """

    name: str
    estimator: Any
    params: dict[str, Any]
    val: Scores
    tested: Tested
    seconds: float
    notes: tuple[str, ...]
    answers: NDArray[Any] = field(repr=False)
    temperature: float | None = None


def fit(features: Features, split: Split, name: str, *, seed: int = 0, grid: Sequence[Params] | None = None) -> FittedHead:
    """Train one head.

    Args:
        features: embeddings X (n, d) float, labels y (n,).
        split: which images train, choose and test.
        name: a key of ``heads.HEADS``.
        seed: of the head's own randomness.
        grid: parameters to choose from instead of the head's own.

    Raises:
        UsageError: there is no such head.
        DataError: the features are no embeddings.
    """
    heads.require_head(name)
    X, y = _embeddings(features), features.y
    started = time.monotonic()
    chosen = heads.choose(name, X, y, split.folds, seed, grid)
    estimator, converged = heads.train(name, chosen.params, X[split.train_val], y[split.train_val], seed)
    seconds = time.monotonic() - started
    notes = [] if converged else [f"{name}: the final fit did not converge"]
    if chosen.unconverged:
        notes.append(f"{name}: {chosen.unconverged} of {chosen.tried} candidates did not converge")
    return _tested(name, estimator, chosen.params, chosen.answers, features, split, seconds, notes)


def ensemble(features: Features, split: Split, fitted: Sequence[FittedHead]) -> FittedHead:
    """Average the probabilities of the best few heads; how many is chosen on validation.

    Raises:
        UsageError: none of the heads gives probabilities.
    """
    started = time.monotonic()
    known = sorted((head for head in fitted if head.answers.ndim == 2), key=lambda head: head.val.rank)
    if not known:
        raise UsageError(f"--head ensemble averages probabilities: give some of {', '.join(_MEMBERS)} too.")
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
    return _tested(heads.ENSEMBLE, estimator, params, averages[best], features, split, seconds, [])


def members_of(names: Sequence[str]) -> list[str]:
    """Return the heads to fit for those asked for: an ensemble that is alone brings its usual members."""
    if heads.ENSEMBLE in names and not set(names) & set(_MEMBERS):
        return [*heads.in_order([*names, *_MEMBERS[:4]])]
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
) -> FittedHead:
    X, y, truth = _embeddings(features), features.y, _truth(features.y, split)
    temperature = best_temperature(truth, answers) if answers.ndim == 2 else None
    tested = scores_on_test(lambda index: heads.answers(estimator, X[index], len(features.classes)), y, split, temperature)
    val = score(truth, answers, temperature)
    return FittedHead(name, estimator, dict(params), val, tested, seconds, tuple(notes), answers, temperature)


def _embeddings(features: Features) -> NDArray[np.float32]:
    if features.X.ndim != 2:
        raise DataError(
            f"heads train on embeddings (n, d), these features are {features.X.shape}: extract at the cut `pooled`."
        )
    return np.ascontiguousarray(features.X, dtype=np.float32)


def _truth(y: NDArray[np.int64], split: Split) -> NDArray[np.int64]:
    return np.concatenate([y[fold.val] for fold in split.folds])
