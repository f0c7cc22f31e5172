"""Heads for several labels an image, and for numbers."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import LabelBinarizer, Normalizer

from featcache.errors import DataError, UsageError
from featcache.heads.base import X_, Params, mask_of
from featcache.heads.linear import ALPHAS, COARSE_CS
from featcache.heads.nonlinear import KNN
from featcache.heads.solvers import linear
from featcache.heads.solvers.linear import Solution
from featcache.heads.solvers.scaled import solve_ridge
from featcache.progress import logger

Labels = NDArray[np.bool_]
Numbers = NDArray[np.float64]
Index = NDArray[np.int64]
NUMBER_HEADS = ("ridge", "knn")
_REMEDY = "Look for extreme values in the features."


def sweep_labels(
    X: X_, Y: Labels, train: Index, val: Index, grid: Sequence[Params] | None = None
) -> Iterator[tuple[Params, Numbers]]:
    """Yield each C with the probabilities (v, k) that its heads give the validation rows.

    A C whose optimum was not reached is left out, with a warning.

    Raises:
        DataError: no optimum was reached.
    """
    grid = list(grid or COARSE_CS)
    mask = mask_of(train, len(X))
    (found,) = linear.solve(X, Y, [params["C"] for params in grid], [mask], loss="sigmoid")
    reached = [(params, one) for params, one in zip(grid, found, strict=True) if one.converged]
    if not reached:
        raise DataError(f"`target` labels: none of {len(grid)} candidates reached its optimum. {_REMEDY}")
    if len(reached) < len(grid):
        left_out = len(grid) - len(reached)
        logger.warning("labels: %d of %d candidates did not reach their optimum and are left out", left_out, len(grid))
    for params, one in reached:
        yield params, _probabilities(one, X[val])


def train_labels(params: Params, X: X_, Y: Labels) -> OneVsRestClassifier:
    """Return a fitted head for each label, as scikit-learn's own.

    Raises:
        DataError: the optimum was not reached.
    """
    ((found,),) = linear.solve(X, Y, [params["C"]], loss="sigmoid")
    if not found.converged:
        raise DataError(f"`target` labels: the fit with C={params['C']:g} did not reach its optimum. {_REMEDY}")
    joined = OneVsRestClassifier(LogisticRegression(C=params["C"]))
    joined.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(Y.astype(np.int64))
    joined.classes_, joined.n_features_in_ = joined.label_binarizer_.classes_, X.shape[1]
    joined.estimators_ = []
    for weights, intercept in zip(found.coefficients, found.intercept, strict=True):
        head = LogisticRegression(C=params["C"])
        head.classes_, head.n_features_in_ = np.array([0, 1]), X.shape[1]
        head.coef_, head.intercept_, head.n_iter_ = weights[None], intercept[None], np.array([found.iterations])
        joined.estimators_.append(head)
    return joined


def sweep_numbers(
    head: str, X: X_, y: Numbers, train: Index, val: Index, grid: Sequence[Params] | None = None
) -> Iterator[tuple[Params, Numbers]]:
    """Yield parameters with the numbers (v,) that they give the validation rows.

    Raises:
        UsageError: there is no such head for numbers.
    """
    if head == "ridge":
        candidates = list(grid or ALPHAS)
        mask = mask_of(train, len(X))
        found = solve_ridge(X, y[:, None], [params["alpha"] for params in candidates], mask)
        for params, (coefficients, intercept) in zip(candidates, found, strict=True):
            yield params, (X[val] @ coefficients.T + intercept)[:, 0]
        return
    for params in grid or KNN.grid(len(train)):
        yield params, train_number(head, params, X[train], y[train]).predict(X[val])


def train_number(head: str, params: Params, X: X_, y: Numbers) -> Pipeline:
    """Return a fitted regression.

    Raises:
        UsageError: there is no such head for numbers.
    """
    if head == "ridge":
        ((coefficients, intercept),) = solve_ridge(X, y[:, None], [params["alpha"]])
        model = Ridge(alpha=params["alpha"])
        model.coef_, model.intercept_, model.n_features_in_ = coefficients[0], float(intercept[0]), X.shape[1]
        return make_pipeline(model)
    if head == "knn":
        neighbours = KNeighborsRegressor(min(params["k"], len(X)), weights="distance", algorithm="brute")
        return make_pipeline(Normalizer(), neighbours).fit(X, y)
    raise UsageError(f"`heads` {head}: for numbers choose from {', '.join(NUMBER_HEADS)}.")


def _probabilities(solution: Solution, X: X_) -> Numbers:
    scores = X @ solution.coefficients.T + solution.intercept
    found: Numbers = 1 / (1 + np.exp(-np.clip(scores, -500, 500)))
    return found
