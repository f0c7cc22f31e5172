"""Targets that are not one class: several labels an image, or a number."""

import math
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import heads
from featcache.errors import DataError
from featcache.evaluation.metrics import (
    LabelScores,
    NumberScores,
    label_scores,
    labels_on_test,
    number_scores,
    numbers_on_test,
)
from featcache.evaluation.splits import Split
from featcache.store.rows import Features


@dataclass(frozen=True)
class FittedTarget:
    """A head for several labels or for a number: what was chosen, and its scores on validation and, once, on test."""

    target: str
    head: str
    estimator: Any
    params: dict[str, Any]
    names: tuple[str, ...]
    val: LabelScores | NumberScores
    test: LabelScores | NumberScores
    seconds: float

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``heads`` of ``featcache fit``, without its file."""
        return {
            "head": self.head,
            "target": self.target,
            "best_params": self.params,
            "val": asdict(self.val),
            "test": asdict(self.test),
            "seconds": round(self.seconds, 3),
        }


def labels_of(features: Features) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return which labels each image has (n, k), and their names: a manifest writes them with ``;`` or ``|`` between.

    Raises:
        DataError: there is only one label.
    """
    sets = [{part.strip() for part in re.split(r"[;|]", name) if part.strip()} for name in features.classes]
    names = tuple(sorted(set().union(*sets)))
    if len(names) < 2:
        raise DataError(f"`target` labels: only one label ({''.join(names)}); write ; between several, as in cat;dog.")
    table = np.array([[name in some for name in names] for some in sets])
    return table[features.y], names


def numbers_of(features: Features) -> NDArray[np.float64]:
    """Return each image's number (n,).

    Raises:
        DataError: a label is none.
    """
    values = []
    for name in features.classes:
        try:
            values.append(float(name))
        except ValueError:
            raise DataError(f"`target` number: the label {name!r} is no number.") from None
        if not math.isfinite(values[-1]):
            raise DataError(f"`target` number: the label {name!r} is not finite.")
    return np.array(values)[features.y]


def fit_labels(features: Features, split: Split, grid: Sequence[dict[str, Any]] | None = None) -> FittedTarget:
    """Train a logistic head for each label, one C for all: the one of highest mean average precision on validation.

    Args:
        features: embeddings X (n, d), whose class names are sets of labels.
        split: which images train, choose and test.
        grid: values of C to choose from.
    """
    X, (Y, names) = np.ascontiguousarray(features.X, dtype=np.float32), labels_of(features)
    started = time.monotonic()
    attempts = heads.sweep_labels(X, Y, split.train, split.val, grid)
    scored = [(label_scores(Y[split.val], answers), params) for params, answers in attempts]
    val, params = max(scored, key=lambda one: (one[0].mean_average_precision, -one[1]["C"]))
    estimator = heads.train_labels(params, X[split.train_val], Y[split.train_val])
    seconds = time.monotonic() - started
    test = labels_on_test(lambda index: estimator.predict_proba(X[index]), Y, split)
    return FittedTarget("labels", "logistic", estimator, params, names, val, test, seconds)


def fit_number(features: Features, split: Split, head: str, grid: Sequence[dict[str, Any]] | None = None) -> FittedTarget:
    """Train a ridge or a nearest-neighbour regression: the parameters of least squared error on validation.

    Args:
        features: embeddings X (n, d), whose class names are numbers.
        split: which images train, choose and test.
        head: ``ridge`` or ``knn``.
        grid: parameters to choose from.
    """
    X, y = np.ascontiguousarray(features.X, dtype=np.float32), numbers_of(features)
    started = time.monotonic()
    attempts = heads.sweep_numbers(head, X, y, split.train, split.val, grid)
    scored = [(number_scores(y[split.val], answers), params) for params, answers in attempts]
    val, params = max(scored, key=lambda one: one[0].r2)
    estimator = heads.train_number(head, params, X[split.train_val], y[split.train_val])
    seconds = time.monotonic() - started
    test = numbers_on_test(lambda index: estimator.predict(X[index]), y, split)
    return FittedTarget("number", head, estimator, params, (), val, test, seconds)
