"""Heads for several labels an image, one output each, and for numbers."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import LabelBinarizer, Normalizer

from featcache.evaluation.splits import Fold
from featcache.heads.base import X_, Candidate, HeadFamily, Params, mask_of
from featcache.heads.linear import ALPHAS, COARSE_CS
from featcache.heads.nonlinear import KNN
from featcache.heads.solvers import linear
from featcache.heads.solvers.scaled import solve_ridge

Labels = NDArray[np.bool_]
Numbers = NDArray[np.float64]


def _sweep_labels(grid: Sequence[Params], X: X_, Y: Labels, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    """One C for all labels: one each would be chosen on the few images that have a rare one."""
    masks = [mask_of(fold.train, len(X)) for fold in folds]
    solved = linear.solve(X, Y, [params["C"] for params in grid], masks, loss="sigmoid")
    for number, params in enumerate(grid):
        solutions = [of_fold[number] for of_fold in solved]
        answers = [
            expit(X[fold.val] @ solution.coefficients.T + solution.intercept)
            for solution, fold in zip(solutions, folds, strict=True)
        ]
        yield Candidate(params, np.concatenate(answers), all(solution.converged for solution in solutions))


def _fit_labels(params: Params, X: X_, Y: Labels, _: int) -> tuple[Any, bool]:
    """Return a fitted head for each label, as scikit-learn's own."""
    ((solution,),) = linear.solve(X, Y, [params["C"]], loss="sigmoid")
    joined = OneVsRestClassifier(LogisticRegression(C=params["C"]))
    joined.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(Y.astype(np.int64))
    joined.classes_, joined.n_features_in_ = joined.label_binarizer_.classes_, X.shape[1]
    joined.estimators_ = []
    for weights, intercept in zip(solution.coefficients, solution.intercept, strict=True):
        head = LogisticRegression(C=params["C"])
        head.classes_, head.n_features_in_ = np.array([0, 1]), X.shape[1]
        head.coef_, head.intercept_, head.n_iter_ = weights[None], intercept[None], np.array([solution.iterations])
        joined.estimators_.append(head)
    return joined, solution.converged


def _sweep_number_ridge(grid: Sequence[Params], X: X_, y: Numbers, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    alphas = [params["alpha"] for params in grid]
    solved = [solve_ridge(X, y[:, None], alphas, mask_of(fold.train, len(X))) for fold in folds]
    answers = [
        [(X[fold.val] @ coefficients.T + intercept)[:, 0] for coefficients, intercept in of_fold]
        for of_fold, fold in zip(solved, folds, strict=True)
    ]
    for number, params in enumerate(grid):
        yield Candidate(params, np.concatenate([of_fold[number] for of_fold in answers]))


def _fit_number_ridge(params: Params, X: X_, y: Numbers, _: int) -> tuple[Pipeline, bool]:
    ((coefficients, intercept),) = solve_ridge(X, y[:, None], [params["alpha"]])
    model = Ridge(alpha=params["alpha"])
    model.coef_, model.intercept_, model.n_features_in_ = coefficients[0], float(intercept[0]), X.shape[1]
    return make_pipeline(model), True


def _sweep_number_knn(grid: Sequence[Params], X: X_, y: Numbers, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    for params in grid:
        heads = [_fit_number_knn(params, X[fold.train], y[fold.train], seed)[0] for fold in folds]
        yield Candidate(params, np.concatenate([head.predict(X[fold.val]) for head, fold in zip(heads, folds, strict=True)]))


def _fit_number_knn(params: Params, X: X_, y: Numbers, _: int) -> tuple[Pipeline, bool]:
    neighbours = KNeighborsRegressor(min(params["k"], len(X)), weights="distance", algorithm="brute")
    return make_pipeline(Normalizer(), neighbours).fit(X, y), True


LABEL_HEADS: Mapping[str, HeadFamily] = {
    # every fourth C: scores of ranked labels change more slowly with it than accuracies do
    "logistic": HeadFamily(lambda _: list(COARSE_CS), _sweep_labels, _fit_labels),
}
NUMBER_HEADS: Mapping[str, HeadFamily] = {
    "ridge": HeadFamily(lambda _: list(ALPHAS), _sweep_number_ridge, _fit_number_ridge),
    "knn": HeadFamily(KNN.grid, _sweep_number_knn, _fit_number_knn),
}
