"""Which heads there are, and how one is chosen on validation and trained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.pipeline import Pipeline

from featcache.errors import DataError, UsageError, did_you_mean
from featcache.evaluation.metrics import Scores, score
from featcache.evaluation.splits import Fold
from featcache.heads.base import Y_, Candidate, HeadFamily, Many, Params
from featcache.heads.linear import LOGISTIC, RIDGE, SELECTED, SVM
from featcache.heads.nonlinear import BOOSTING, CENTROID, KNN, LDA, MLP, RBF
from featcache.progress import progress

# in the order of their cost
HEADS: Mapping[str, HeadFamily] = {
    "centroid": CENTROID,
    "ridge": RIDGE,
    "knn": KNN,
    "logistic": LOGISTIC,
    "svm": SVM,
    "selected": SELECTED,
    "lda": LDA,
    "rbf": RBF,
    "mlp": MLP,
    "boosting": BOOSTING,
}
ENSEMBLE = "ensemble"
ALL = "all"


@dataclass(frozen=True)
class SearchResult:
    """The parameters that did best on validation, with their answers there (n, classes) or (n,).

    ``unconverged`` counts the candidates, of all that were ``tried``, whose optimum was not reached: they were left out.
    ``solutions`` are the heads that gave the answers, one a fold, each fitted on that fold's train; only logistic has them.
    """

    params: Params
    val: Scores
    answers: Any
    tried: int
    unconverged: int
    solutions: tuple[Pipeline, ...] = ()


def require_head(name: str) -> None:
    """Check a head's name.

    Raises:
        UsageError: there is no such head.
    """
    names = [*HEADS, ENSEMBLE, ALL]
    if name not in names:
        raise UsageError(f"`heads` {name}: choose from {', '.join(names)}.{did_you_mean(name, names)}")


def require_params(name: str, grid: Sequence[Params]) -> None:
    """Check values to choose from.

    Raises:
        UsageError: the head takes other parameters, or other values.
    """
    known = set(HEADS[name].grid(1000)[0]) if name in HEADS else set()
    for params in grid:
        if set(params) != known:
            taken = ", ".join(sorted(known)) or "no parameter"
            raise UsageError(f"`grid` {', '.join(sorted(params))}: {name} takes {taken}.")
        for key, value in params.items():
            most = 1 if key in {"share", "shrinkage"} else math.inf
            if not 0 < value <= most or value == math.inf or (key == "k" and value % 1):
                wanted = "a whole number" if key == "k" else "a number up to 1" if most == 1 else "a number"
                raise UsageError(f"`grid` {key}={value:g}: {wanted}, above 0, is needed.")


def in_order(names: Sequence[str]) -> list[str]:
    """Return heads to run for those asked for, the cheapest first: ``all`` stands for each, an ensemble needs members."""
    wanted = set(names) | ({*HEADS, ENSEMBLE} if ALL in names else set())
    return [name for name in (*HEADS, ENSEMBLE) if name in wanted]


def search_head(
    name: str, X: Many, y: Y_, folds: Sequence[Fold], seed: int, grid: Sequence[Params] | None = None, views: int = 1
) -> SearchResult:
    """Fit a head on every fold's train with every candidate and return the one that does best on all their val together.

    Best is the highest accuracy, then the lowest log-loss, then the more regular one. A candidate whose optimum was not
    reached on some fold is left out and counted: its answers are not those of its parameters.

    Args:
        name: a key of ``HEADS``.
        X: features (n, d).
        y: classes (n,).
        folds: which rows train and which choose.
        seed: of the head's own randomness.
        grid: parameters to try instead of the family's own.
        views: how many rows in succession are views of one image: each trains, their answers are averaged.

    Raises:
        DataError: no candidate reached its optimum, or there are too few images for this head.
        UsageError: more neighbours are asked for than there are images.
    """
    family = HEADS[name]
    everything = list(grid) if grid is not None else family.grid(min(len(fold.train) for fold in folds))
    step = 1 if grid is not None else family.coarse
    _require_rows(name, y, folds, grid or ())
    truth = np.concatenate([y[fold.val] for fold in folds])[::views]
    with progress(len(everything[::step]), f"choose {name}", unit="fit") as bar:
        outcomes: list[tuple[Candidate, Scores]] = []
        tried = 0

        def best() -> tuple[Candidate, Scores]:
            return min(outcomes, key=lambda outcome: (outcome[1].rank, everything.index(outcome[0].params)))

        def try_all(candidates: Sequence[Params]) -> None:
            nonlocal tried
            for attempt in family.evaluate_grid(candidates, X, y, folds, seed):
                tried += 1
                bar.update(1)
                if not attempt.converged:
                    continue
                pooled = replace(attempt, answers=over_views(attempt.answers, views))
                outcomes.append((pooled, score(truth, pooled.answers)))
                leader = best()[0]  # of the others the weights would only take memory: classes x d doubles a fold and C
                outcomes[:] = [(replace(a, solutions=a.solutions if a is leader else ()), val) for a, val in outcomes]

        try_all(everything[::step])
        if not outcomes and step > 1:
            try_all([params for number, params in enumerate(everything) if number % step])
        if not outcomes:
            raise DataError(
                f"`heads` {name}: none of {tried} candidates reached its optimum on every fold. Look for extreme values in "
                "the features, try stronger penalties with `grid`, or take another head."
            )
        if step > 1 and tried == len(everything[::step]):
            try_all(family.refine(everything, best()[0].params))
    attempt, val = best()
    return SearchResult(attempt.params, val, attempt.answers, tried, tried - len(outcomes), attempt.solutions)


def _require_rows(name: str, y: Y_, folds: Sequence[Fold], grid: Sequence[Params]) -> None:
    least = min(len(fold.train) for fold in folds)
    if too_many := [params["k"] for params in grid if params.get("k", 0) > least]:
        raise UsageError(f"`grid` k={too_many[0]}: {least} images train, so that there are no more neighbours than that.")
    if name == "lda" and any(len(fold.train) <= len(np.unique(y[fold.train])) for fold in folds):
        raise DataError(
            f"`heads` lda: {least} images of {len(np.unique(y))} classes train: more images than classes are needed."
        )


def over_views(answers: NDArray[Any], views: int) -> NDArray[Any]:
    """Average the probabilities (n * views, classes) of an image's views; classes alone (n * views,) are put to the vote."""
    if views == 1:
        return answers
    if answers.ndim == 2:
        averages: NDArray[Any] = answers.reshape(-1, views, answers.shape[1]).mean(axis=1)
        return averages
    votes = np.stack([np.bincount(row, minlength=int(answers.max()) + 1) for row in answers.reshape(-1, views)])
    chosen: NDArray[Any] = votes.argmax(axis=1)
    return chosen


def train(name: str, params: Params, X: Many, y: Y_, seed: int) -> Pipeline:
    """Fit a head with some parameters.

    Raises:
        DataError: its optimum was not reached: what was fitted is no head of these parameters, and nothing may use it.
    """
    estimator, converged = HEADS[name].fit(params, X, y, seed)
    if not converged:
        with_ = ", ".join(f"{key}={value:g}" for key, value in params.items())
        raise DataError(
            f"`heads` {name}: the fit with {with_} on {len(y)} rows did not reach its optimum. Look for extreme values in "
            "the features, give a stronger penalty with `grid`, or take another head."
        )
    return estimator
