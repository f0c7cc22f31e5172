"""Heads by distance: nearest neighbours, all numbers of them from one search, and nearest class means."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, normalize

from featcache.heads.base import X_, Y_, Attempt, HeadFamily, Params, answers
from featcache.heads.linear import linear_estimator
from featcache.splits import Fold

TEMPERATURE = 0.07  # a neighbour weighs exp(cosine / T) (Wu et al. 2018; Caron et al. 2021, DINO, appendix F.1)
_NEIGHBOURS = (20, 10, 5, 1, 100, 200)
_ROWS_AT_ONCE = 512


def _grid(count: int) -> list[Params]:
    return [{"k": k} for k in _NEIGHBOURS if k <= count // 2] or [{"k": 1}]


def _sweep(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Attempt]:
    X, classes = normalize(X), int(y.max()) + 1
    most = max(params["k"] for params in grid)
    found = [_nearest(X[fold.train], X[fold.val], min(most, len(fold.train))) for fold in folds]
    for params in grid:
        votes = []
        for (index, cosines), fold in zip(found, folds, strict=True):
            weights = np.exp((cosines[:, : params["k"]] - cosines[:, :1]) / TEMPERATURE)
            vote = np.zeros((len(fold.val), classes))
            labels = y[fold.train][index[:, : params["k"]]]
            np.add.at(vote, (np.arange(len(vote))[:, None], labels), weights)
            votes.append(vote / vote.sum(axis=1, keepdims=True))
        yield Attempt(params, np.concatenate(votes))


def _nearest(train: X_, rows: X_, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the positions and the cosines of the nearest training rows (n, count), the nearest first."""
    index, cosines = np.empty((len(rows), count), np.int64), np.empty((len(rows), count))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        all_cosines = rows[block] @ train.T
        near = np.argpartition(-all_cosines, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(all_cosines, near, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        index[block] = np.take_along_axis(near, order, axis=1)
        cosines[block] = np.take_along_axis(values, order, axis=1)
    return index, cosines


def _fit(params: Params, X: X_, y: Y_, _: int) -> tuple[Pipeline, bool]:
    """On the unit sphere exp(cosine / T) is a normal density of the distance, which every scikit-learn has at hand."""
    density = norm(scale=math.sqrt(TEMPERATURE)).pdf
    head = KNeighborsClassifier(min(params["k"], len(X)), weights=density, algorithm="brute")
    return make_pipeline(Normalizer(), head).fit(X, y), True


def _sweep_centroid(_: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], seed: int) -> Iterator[Attempt]:
    classes, found = int(y.max()) + 1, []
    for fold in folds:
        head = _fit_centroid({}, X[fold.train], y[fold.train], seed)[0]
        found.append(answers(head, X[fold.val], classes))
    yield Attempt({}, np.concatenate(found))


def _fit_centroid(_: Params, X: X_, y: Y_, __: int) -> tuple[Pipeline, bool]:
    """A softmax over squared distances is linear (Snell et al. 2017, section 2.4): the nearest mean is the likeliest class.

    Not scikit-learn's NearestCentroid, whose probabilities are of another rule than its answers.
    """
    unit, classes = normalize(X), np.unique(y)
    means = np.stack([unit[y == one].mean(axis=0, dtype=np.float64) for one in classes])
    head = linear_estimator(means / TEMPERATURE, -(means**2).sum(axis=1) / (2 * TEMPERATURE))[-1]
    head.classes_ = classes
    return make_pipeline(Normalizer().fit(X), head), True


KNN = HeadFamily(_grid, _sweep, _fit)
CENTROID = HeadFamily(lambda _: [{}], _sweep_centroid, _fit_centroid)
