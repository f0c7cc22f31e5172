"""Heads that bend: neighbours, class means, discriminants, a small network, an approximated RBF kernel, boosted trees."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, VotingClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler, normalize

from featcache.evaluation.splits import Fold
from featcache.heads import solvers
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Params, answers, by_estimator
from featcache.heads.linear import as_logistic, linear_estimator, probabilities

TEMPERATURE = 0.07  # a neighbour weighs exp(cosine / T) (Wu et al. 2018; Caron et al. 2021, DINO, appendix F.1)
# DINO's k stands first (Caron et al. 2021): of equals the first is taken.
_NEIGHBOURS = (20, 10, 5, 1, 100, 200)
_ROWS_AT_ONCE = 512  # queries whose cosines to all training rows are in memory together
_MIN_FOR_EARLY_STOPPING = 20
_MOST_EPOCHS = 2000  # three hundred did not always do without held-out rows
_LANDMARKS = 768  # rows that stand for all in the kernel (Nyström): the cost grows with their square
_COMPONENTS = 64  # that trees see


def _neighbour_counts(count: int) -> list[Params]:
    return [{"k": k} for k in _NEIGHBOURS if k <= count // 2] or [{"k": 1}]


def _sweep_knn(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    X, classes = normalize(X), int(y.max()) + 1
    most = max(params["k"] for params in grid)
    nearest = [_nearest(X[fold.train], X[fold.val], min(most, len(fold.train))) for fold in folds]
    for params in grid:
        votes = []
        for (index, cosines), fold in zip(nearest, folds, strict=True):
            weights = np.exp((cosines[:, : params["k"]] - cosines[:, :1]) / TEMPERATURE)
            vote = np.zeros((len(fold.val), classes))
            labels = y[fold.train][index[:, : params["k"]]]
            np.add.at(vote, (np.arange(len(vote))[:, None], labels), weights)
            votes.append(_smoothed(vote / vote.sum(axis=1, keepdims=True), weights.shape[1], np.unique(y[fold.train])))
        yield Candidate(params, np.concatenate(votes))


def _smoothed(votes: NDArray[np.float64], count: int, classes_there: Y_) -> NDArray[np.float64]:
    """Return shares of votes (n, classes) of so many neighbours with one vote more, which the known classes share.

    A class without a vote is not impossible: an exact zero would cost all of the log-loss that there is, and only the
    larger k would escape it. One vote in all, however many classes there are, is Perks's prior (1947).
    """
    smoothed = votes * (count / (count + 1))
    smoothed[:, classes_there] += 1 / (count + 1) / len(classes_there)
    return smoothed


def _nearest(train: X_, rows: X_, count: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the positions and the cosines of the nearest training rows (n, count), the nearest first."""
    index, cosines = np.empty((len(rows), count), np.int64), np.empty((len(rows), count))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        block = slice(start, start + _ROWS_AT_ONCE)
        all_cosines = rows[block] @ train.T
        # Partition first: sorting all cosines of a row for the nearest few would take most of the time.
        near = np.argpartition(-all_cosines, count - 1, axis=1)[:, :count]
        values = np.take_along_axis(all_cosines, near, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        index[block] = np.take_along_axis(near, order, axis=1)
        cosines[block] = np.take_along_axis(values, order, axis=1)
    return index, cosines


def _fit_knn(params: Params, X: X_, y: Y_, _: int) -> tuple[Pipeline, bool]:
    """On the unit sphere exp(cosine / T) is a normal density of the distance, which every scikit-learn has at hand.

    The vote that the classes share (``_smoothed``) is a second member of a weighted average.
    """
    density, count = norm(scale=math.sqrt(TEMPERATURE)).pdf, min(params["k"], len(X))
    head = KNeighborsClassifier(count, weights=density, algorithm="brute")
    shared = DummyClassifier(strategy="uniform")
    average = VotingClassifier([("neighbours", head), ("shared", shared)], voting="soft", weights=[count, 1])
    return make_pipeline(Normalizer(), average).fit(X, y), True


def _sweep_centroid(_: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    classes, predictions = int(y.max()) + 1, []
    for fold in folds:
        head = _fit_centroid({}, X[fold.train], y[fold.train], seed)[0]
        predictions.append(answers(head, X[fold.val], classes))
    yield Candidate({}, np.concatenate(predictions))


def _fit_centroid(_: Params, X: X_, y: Y_, __: int) -> tuple[Pipeline, bool]:
    """A softmax over squared distances is linear (Snell et al. 2017, section 2.4): the nearest mean is the likeliest class.

    Not scikit-learn's NearestCentroid, whose probabilities are of another rule than its answers.
    """
    unit, classes = normalize(X), np.unique(y)
    means = np.stack([unit[y == number].mean(axis=0, dtype=np.float64) for number in classes])
    head = linear_estimator(means / TEMPERATURE, -(means**2).sum(axis=1) / (2 * TEMPERATURE))[-1]
    head.classes_ = classes
    return make_pipeline(Normalizer().fit(X), head), True


def _mlp(params: Params, seed: int, _: X_, y: Y_) -> Pipeline:
    """A network has no optimum to be near to: stopping early is its regulariser.

    It counts as converged where its own rule has ended it: five epochs in succession without a gain on held-out rows, or,
    where there are too few to hold out, on the training loss. One that uses up its epochs was still on its way.
    """
    counts = np.unique(y, return_counts=True)[1]
    network = MLPClassifier(
        hidden_layer_sizes=(256,),
        alpha=params["alpha"],
        early_stopping=len(y) >= _MIN_FOR_EARLY_STOPPING * len(counts) and int(counts.min()) > 1,
        n_iter_no_change=5,
        max_iter=_MOST_EPOCHS,
        random_state=seed,
    )
    return make_pipeline(StandardScaler(), network)


def _lda(params: Params, _: int, __: X_, ___: Y_) -> Pipeline:
    return make_pipeline(LinearDiscriminantAnalysis(solver="lsqr", shrinkage=params["shrinkage"]))


def _boosting(_: Params, seed: int, X: X_, __: Y_) -> Pipeline:
    """Trees on the leading components: on hundreds of features most of the time would go into those that matter least."""
    trees = HistGradientBoostingClassifier(
        max_iter=40, max_leaf_nodes=15, learning_rate=0.2, early_stopping=False, random_state=seed
    )
    return make_pipeline(PCA(min(_COMPONENTS, *X.shape), random_state=seed), trees)


def _rbf_features(width: float, X: X_, seed: int) -> Pipeline:
    landmarks = Nystroem(gamma=width / X.shape[1], n_components=min(_LANDMARKS, len(X)), random_state=seed)
    return make_pipeline(StandardScaler(), landmarks)


def _sweep_rbf(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    """Each width's kernel is mapped once, and all its C are solved together."""
    classes = int(y.max()) + 1
    for width in dict.fromkeys(params["width"] for params in grid):
        candidates = [params for params in grid if params["width"] == width]
        predictions: list[list[X_]] = [[] for _ in candidates]
        converged = [True] * len(candidates)
        for fold in folds:
            kernel = _rbf_features(width, X[fold.train], seed).fit(X[fold.train])
            train, val = kernel.transform(X[fold.train]), kernel.transform(X[fold.val])
            (solutions,) = solvers.solve(train, y[fold.train], [params["C"] for params in candidates])
            for number, solution in enumerate(solutions):
                predictions[number].append(probabilities(solution, val, classes))
                converged[number] &= solution.converged
        for params, rows, is_optimal in zip(candidates, predictions, converged, strict=True):
            yield Candidate(params, np.concatenate(rows), is_optimal)


def _fit_rbf(params: Params, X: X_, y: Y_, seed: int) -> tuple[Pipeline, bool]:
    kernel = _rbf_features(params["width"], X, seed).fit(X)
    ((solution,),) = solvers.solve(kernel.transform(X), y, [params["C"]])
    return make_pipeline(*(step for _, step in kernel.steps), as_logistic(solution)), solution.converged


KNN = HeadFamily(_neighbour_counts, _sweep_knn, _fit_knn)
CENTROID = HeadFamily(lambda _: [{}], _sweep_centroid, _fit_centroid)
MLP = HeadFamily(lambda _: [{"alpha": alpha} for alpha in (1.0, 1e-2)], *by_estimator(_mlp))
LDA = HeadFamily(lambda _: [{"shrinkage": share} for share in (0.9, 0.5, 0.1, 0.01)], *by_estimator(_lda))
RBF = HeadFamily(
    lambda _: [{"width": width, "C": C} for width in (0.1, 0.3, 1.0) for C in (1e-4, 1e-3, 1e-2, 0.1, 1.0)],
    _sweep_rbf,
    _fit_rbf,
)
BOOSTING = HeadFamily(lambda _: [{}], *by_estimator(_boosting))
