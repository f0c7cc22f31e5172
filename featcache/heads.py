"""The heads: scikit-learn estimators on embeddings, each with the search space that its validation split chooses from."""

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from featcache.errors import UsageError
from featcache.metrics import Scores, score
from featcache.progress import progress
from featcache.splits import Split

Params = dict[str, Any]
X_ = NDArray[Any]
Y_ = NDArray[np.int64]

_MIN_FOR_EARLY_STOPPING = 20


@dataclass(frozen=True)
class HeadFamily:
    """How a kind of head is built, and which parameters are tried, the most regular first.

    ``refine`` gives the neighbours of the best value of a first, coarse pass.
    """

    build: Callable[[Params, int, Y_], Pipeline]
    grid: Callable[[int], list[Params]]
    refine: Callable[[Params], list[Params]] = lambda _: []


@dataclass(frozen=True)
class Chosen:
    """The parameters that did best on validation, and every candidate's accuracy there."""

    params: Params
    val: Scores
    tried: int
    unconverged: int


def _logistic(params: Params, seed: int, _: Y_) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(C=params["C"], max_iter=2000, random_state=seed))


def _ridge(params: Params, seed: int, _: Y_) -> Pipeline:
    return make_pipeline(StandardScaler(), RidgeClassifier(alpha=params["alpha"], random_state=seed))


def _knn(params: Params, _: int, __: Y_) -> Pipeline:
    """On the unit sphere Euclidean order is cosine order (protocol of Caron et al. 2021, DINO, appendix F.1)."""
    return make_pipeline(Normalizer(), KNeighborsClassifier(params["k"], weights="distance", algorithm="brute"))


def _mlp(params: Params, seed: int, y: Y_) -> Pipeline:
    counts = np.unique(y, return_counts=True)[1]
    network = MLPClassifier(
        hidden_layer_sizes=(256,),
        alpha=params["alpha"],
        early_stopping=len(y) >= _MIN_FOR_EARLY_STOPPING * len(counts) and int(counts.min()) > 1,
        n_iter_no_change=10,
        max_iter=300,
        random_state=seed,
    )
    return make_pipeline(StandardScaler(), network)


def _powers(low: float, high: float, count: int, name: str) -> list[Params]:
    return [{name: float(f"{value:.4g}")} for value in np.logspace(low, high, count)]


HEADS: Mapping[str, HeadFamily] = {
    "logistic": HeadFamily(
        _logistic,
        grid=lambda _: _powers(-5, 1, 7, "C"),
        refine=lambda best: [{"C": float(f"{best['C'] * factor:.4g}")} for factor in (10**-0.5, 10**0.5)],
    ),
    "mlp": HeadFamily(_mlp, grid=lambda _: [{"alpha": alpha} for alpha in (10.0, 1.0, 1e-2)]),
    "knn": HeadFamily(
        _knn,
        grid=lambda n: [{"k": k} for k in (20, 10, 5, 1, 100, 200) if k <= n // 2] or [{"k": 1}],
    ),
    "ridge": HeadFamily(_ridge, grid=lambda _: list(reversed(_powers(-1, 6, 15, "alpha")))),
}


def require_head(name: str) -> None:
    """Check a head's name.

    Raises:
        UsageError: there is no such head.
    """
    if name not in HEADS:
        raise UsageError(f"--head {name}: choose from {', '.join(HEADS)}.")


def choose(name: str, X: X_, y: Y_, split: Split, seed: int) -> Chosen:
    """Fit a head on train with every candidate and return the one that does best on val.

    Best is the highest accuracy, then the lowest log-loss, then the more regular one. Candidates are fitted side by side,
    one BLAS thread each: faster on these shapes than one after the other with all threads.
    """
    family = HEADS[name]
    outcomes = _try_all(family, family.grid(len(split.train)), X, y, split, seed)
    best = min(outcomes, key=lambda outcome: outcome[1].rank)
    neighbours = family.refine(best[0])
    if neighbours:
        outcomes += _try_all(family, neighbours, X, y, split, seed)
        best = min(outcomes, key=lambda outcome: outcome[1].rank)
    return Chosen(best[0], best[1], len(outcomes), sum(not converged for _, _, converged in outcomes))


def train(name: str, params: Params, X: X_, y: Y_, seed: int) -> tuple[Pipeline, bool]:
    """Fit a head; return it and whether its optimiser converged."""
    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        head = HEADS[name].build(params, seed, y).fit(X, y)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return head, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


def answers(head: Pipeline, X: X_, classes: int) -> NDArray[Any]:
    """Return probabilities (n, classes) of a head, or its predicted classes (n,) where it knows no probabilities."""
    if not hasattr(head, "predict_proba"):
        return np.asarray(head.predict(X), dtype=np.int64)
    probabilities = np.zeros((len(X), classes))
    probabilities[:, head.classes_] = head.predict_proba(X)
    return probabilities


def linear_weights(head: Pipeline, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a logistic head as one linear map with its standardisation folded in: weights (classes, d), bias (classes,).

    Its softmax gives the head's probabilities; a class that the head never saw gets a bias of minus 30.
    """
    scaler, model = head[0], head[-1]
    coefficients, intercept = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weights, bias = np.zeros((classes, coefficients.shape[1])), np.full(classes, -30.0)
    weights[model.classes_] = coefficients / scaler.scale_
    bias[model.classes_] = intercept - weights[model.classes_] @ scaler.mean_
    return weights, bias


def _try_all(
    family: HeadFamily, grid: list[Params], X: X_, y: Y_, split: Split, seed: int
) -> list[tuple[Params, Scores, bool]]:
    classes = int(y.max()) + 1
    train_rows, val_rows = X[split.train], X[split.val]

    def attempt(params: Params) -> tuple[Params, Scores, bool]:
        head = family.build(params, seed, y[split.train]).fit(train_rows, y[split.train])
        return params, score(y[split.val], answers(head, val_rows, classes)), _converged(head)

    outcomes = []
    with threadpool_limits(1), warnings.catch_warnings(), progress(len(grid), "choose", unit="fit") as bar:
        warnings.simplefilter("ignore", ConvergenceWarning)  # counted by _converged and reported, not lost
        jobs = Parallel(n_jobs=min(len(grid), os.cpu_count() or 1), prefer="threads", return_as="generator")
        for outcome in jobs(delayed(attempt)(params) for params in grid):
            outcomes.append(outcome)
            bar.update(1)
    return outcomes


def _converged(head: Pipeline) -> bool:
    model = head[-1]
    taken = getattr(model, "n_iter_", None)
    allowed = getattr(model, "max_iter", None)
    return taken is None or allowed is None or int(np.max(taken)) < allowed
