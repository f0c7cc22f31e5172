"""Heads by distance: nearest neighbours, all numbers of them from one search, and nearest class means."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import VotingClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, normalize

from featcache.evaluation.splits import Fold
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Params, answers
from featcache.heads.linear import linear_estimator

TEMPERATURE = 0.07  # a neighbour weighs exp(cosine / T) (Wu et al. 2018; Caron et al. 2021, DINO, appendix F.1)
_NEIGHBOURS = (20, 10, 5, 1, 100, 200)
_ROWS_AT_ONCE = 512


def _grid(count: int) -> list[Params]:
    return [{"k": k} for k in _NEIGHBOURS if k <= count // 2] or [{"k": 1}]


def _sweep(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
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
            votes.append(_smoothed(vote / vote.sum(axis=1, keepdims=True), weights.shape[1], np.unique(y[fold.train])))
        yield Candidate(params, np.concatenate(votes))


def _smoothed(votes: NDArray[np.float64], count: int, known: Y_) -> NDArray[np.float64]:
    """Return shares of votes (n, classes) of so many neighbours with one vote more, which the known classes share.

    A class without a vote is not impossible: an exact zero would cost all of the log-loss that there is, and only the
    larger k would escape it. One vote in all, however many classes there are, is Perks's prior (1947).
    """
    smoothed = votes * (count / (count + 1))
    smoothed[:, known] += 1 / (count + 1) / len(known)
    return smoothed


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
    """On the unit sphere exp(cosine / T) is a normal density of the distance, which every scikit-learn has at hand.

    The vote that the classes share (``_smoothed``) is a second member of a weighted average.
    """
    density, count = norm(scale=math.sqrt(TEMPERATURE)).pdf, min(params["k"], len(X))
    head = KNeighborsClassifier(count, weights=density, algorithm="brute")
    shared = DummyClassifier(strategy="uniform")
    average = VotingClassifier([("neighbours", head), ("shared", shared)], voting="soft", weights=[count, 1])
    return make_pipeline(Normalizer(), average).fit(X, y), True


def _sweep_centroid(_: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    classes, found = int(y.max()) + 1, []
    for fold in folds:
        head = _fit_centroid({}, X[fold.train], y[fold.train], seed)[0]
        found.append(answers(head, X[fold.val], classes))
    yield Candidate({}, np.concatenate(found))


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
