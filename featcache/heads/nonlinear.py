"""Heads that bend: neighbours, class means, discriminants, a small network, an approximated RBF kernel, boosted trees."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh
from scipy.stats import norm
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.ensemble import HistGradientBoostingClassifier, VotingClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler, normalize
from sklearn.utils import gen_batches

from featcache.evaluation.splits import Fold
from featcache.heads import solvers
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Params, answers, by_estimator, side_by_side
from featcache.heads.linear import as_logistic, linear_estimator, tried_on
from featcache.heads.solvers.scaled import products_on

TEMPERATURE = 0.07  # a neighbour weighs exp(cosine / T) (Wu et al. 2018; Caron et al. 2021, DINO, appendix F.1)
# DINO's k stands first (Caron et al. 2021): of equals the first is taken.
_NEIGHBOURS = (20, 10, 5, 1, 100, 200)
_ROWS_AT_ONCE = 512  # queries whose cosines to all training rows are in memory together
_MIN_FOR_EARLY_STOPPING = 20
_MOST_EPOCHS = 2000  # three hundred did not always do without held-out rows
_LANDMARKS = 768  # rows that stand for all in the kernel (Nyström): the cost grows with their square
_COMPONENTS = 64  # that trees see
# Thresholds of a component. Between two of them lie no more rows than a leaf has at least, 20, as far as 1,280 rows. With
# 255 trees took up to twice as long; accuracies and log-losses of eight sets went up here and down there.
_BINS = 64
# With 15, trees took half as long again; accuracies of ten sets were the same within their error over seeds, log-losses
# 5 % higher.
_LEAVES = 8
# Of more classes a leaf's curvature, p (1 - p) a row, is so little that its values leap, and the loss rises from tree to
# tree: 100 classes of 28 samples came to 6 %, with this penalty to 38 %. Of fewer it costs some sets a little accuracy.
_FEW_CLASSES, _LEAF_PENALTY = 10, 1.0


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


def _sweep_lda(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    shrinkages, classes = [params["shrinkage"] for params in grid], int(y.max()) + 1

    def attempt(fold: Fold) -> list[X_]:
        heads = discriminants(X[fold.train], y[fold.train], shrinkages)
        return [answers(head, X[fold.val], classes) for head in heads]

    for params, predictions in zip(grid, zip(*side_by_side(attempt, folds), strict=True), strict=True):
        yield Candidate(params, np.concatenate(predictions))


def _fit_lda(params: Params, X: X_, y: Y_, _: int) -> tuple[Pipeline, bool]:
    return make_pipeline(*discriminants(X, y, [params["shrinkage"]])), True


def discriminants(X: X_, y: Y_, shrinkages: Sequence[float]) -> list[LinearDiscriminantAnalysis]:
    """Return ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`` fitted for every s, on one product of the features.

    ``covariance_`` (d, d), which no answer needs, is left out of them: it would be most of a head's file.

    Args:
        X: features (n, d).
        y: classes (n,), fewer than rows.
        shrinkages: above 0, at most 1.
    """
    classes, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    means = np.stack([X[index == number].mean(axis=0, dtype=np.float64) for number in range(len(classes))])
    heads = []
    for shrinkage, coefficients in zip(shrinkages, _shrunk_solutions(X, index, means, shrinkages), strict=True):
        head = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage)
        head.classes_, head.priors_, head.means_, head.n_features_in_ = classes, counts / len(y), means, X.shape[1]
        intercept = np.log(head.priors_) - (means.T * coefficients).sum(axis=0) / 2
        # of two classes scikit-learn keeps what speaks for the second
        two = len(classes) == 2
        head.coef_ = np.diff(coefficients.T, axis=0) if two else coefficients.T
        head.intercept_ = np.diff(intercept) if two else intercept
        heads.append(head)
    return heads


def _shrunk_solutions(
    X: X_, index: Y_, means: NDArray[np.float64], shrinkages: Sequence[float]
) -> list[NDArray[np.float64]]:
    """Solve ((1 - s) S + s t) W = means' for every s; S is the covariance (d, d) within classes, t its mean variance.

    Each s takes one Cholesky factorisation, of as many rows as there are features or samples, whichever are fewer: with
    fewer samples it is that of ZZ' instead of S = Z'Z (Woodbury's identity).
    """
    few = len(X) < X.shape[1]

    def centred(block: slice) -> NDArray[np.float64]:  # a block at a time: in float64 all would be twice the features
        rows = (X[:, block] - means[:, block][index]) if few else (X[block] - means[index[block]])
        return rows / math.sqrt(len(X))

    blocks = list(gen_batches(X.shape[1] if few else len(X), _ROWS_AT_ONCE))
    scatter: NDArray[np.float64] = np.zeros((min(X.shape),) * 2)
    targets = np.zeros((len(X), len(means))) if few else means.T
    for block in blocks:
        rows = centred(block)
        scatter += rows @ rows.T if few else rows.T @ rows
        if few:
            targets += rows @ means[:, block].T
    variance = max(np.trace(scatter) / X.shape[1], np.finfo(np.float64).tiny)
    solutions = []
    for shrinkage in shrinkages:
        # Below rounding there would be no factorisation; scikit-learn cuts far larger eigenvalues off.
        ridge = max(shrinkage, 1e-10) * variance
        shrunk = (1 - shrinkage) * scatter
        shrunk[np.diag_indices_from(shrunk)] += ridge
        solution = cho_solve(cho_factor(shrunk, overwrite_a=True, check_finite=False), targets)
        if few:
            by_features = np.concatenate([centred(block).T @ solution for block in blocks])
            solution = (means.T - (1 - shrinkage) * by_features) / ridge
        solutions.append(solution)
    return solutions


def _boosting(_: Params, seed: int, X: X_, y: Y_) -> Pipeline:
    """Trees on the leading components: on hundreds of features most of the time would go into those that matter least."""
    trees = HistGradientBoostingClassifier(
        max_iter=40,
        max_leaf_nodes=_LEAVES,
        max_bins=_BINS,
        learning_rate=0.2,
        l2_regularization=_LEAF_PENALTY if len(np.unique(y)) > _FEW_CLASSES else 0.0,
        early_stopping=False,
        random_state=seed,
    )
    return make_pipeline(PCA(min(_COMPONENTS, *X.shape), random_state=seed), trees)


def draw_landmarks(X: X_, seed: int) -> NDArray[np.int64]:
    """Return the rows that stand for all: those that ``Nystroem`` draws with this seed."""
    return np.random.RandomState(seed).permutation(len(X))[:_LANDMARKS]


def nystroem(width: float, seed: int, landmarks: X_, index: NDArray[np.int64], distances: X_) -> Nystroem:
    """Return ``Nystroem(gamma=width / d, n_components=m)`` as fitted, from distances that all widths share.

    Its inverse root of the landmarks' kernel is made of eigenvectors: a singular value decomposition takes many times longer
    and gives a symmetric matrix the same.

    Args:
        width: of the kernel, in shares of the number of features.
        seed: that drew the landmarks.
        landmarks: rows (m, d).
        index: which of the training rows they are (m,).
        distances: their squared distances from one another (m, m).
    """
    head = Nystroem(gamma=width / landmarks.shape[1], n_components=len(landmarks), random_state=seed)
    similarities = np.exp(-head.gamma * distances, dtype=np.float64)  # small eigenvalues are divided by: float32 blurs them
    with products_on(1):  # threads wait for one another at so many small steps, and take longer than one alone
        values, vectors = eigh(similarities, driver="evd", overwrite_a=True, check_finite=False)
    roots = np.sqrt(np.maximum(np.abs(values), 1e-12)) * np.where(values < 0, -1, 1)
    head.normalization_ = ((vectors / roots) @ vectors.T).astype(distances.dtype)
    head.components_, head.component_indices_ = landmarks, index
    head.n_features_in_ = landmarks.shape[1]
    head._n_features_out = len(landmarks)  # noqa: SLF001 - what its own fit sets
    return head


def _mapped(kernel: Nystroem, distances: X_, width: int) -> X_:
    """Return ``kernel.transform`` of rows by their squared distances (n, m) from its landmarks, with zeros up to a width."""
    mapped: X_ = np.zeros((len(distances), width), distances.dtype)
    for block in gen_batches(len(distances), _ROWS_AT_ONCE):
        mapped[block, : distances.shape[1]] = np.exp(-kernel.gamma * distances[block]) @ kernel.normalization_.T
    return mapped


def _sweep_rbf(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    """Distances are measured once a fold, each width's kernel is mapped once, and all its C are solved together."""

    def measured(fold: Fold) -> tuple[X_, NDArray[np.int64], X_]:
        rows = StandardScaler().fit(X[fold.train]).transform(X[np.concatenate([fold.train, fold.val])])
        index = draw_landmarks(fold.train, seed)
        return rows[index], index, euclidean_distances(rows, rows[index], squared=True)

    by_fold = side_by_side(measured, folds)
    widest = max(len(index) for _, index, _ in by_fold)
    for width in dict.fromkeys(params["width"] for params in grid):

        def mapped(measures: tuple[X_, NDArray[np.int64], X_], width: float = width) -> X_:
            landmarks, index, distances = measures
            return _mapped(nystroem(width, seed, landmarks, index, distances[index]), distances, widest)

        parts = [(len(fold.train), rows) for fold, rows in zip(folds, side_by_side(mapped, by_fold), strict=True)]
        candidates = [params for params in grid if params["width"] == width]
        yield from tried_on([(rows[:count], rows[count:]) for count, rows in parts], y, folds, candidates, int(y.max()) + 1)


def _fit_rbf(params: Params, X: X_, y: Y_, seed: int) -> tuple[Pipeline, bool]:
    scaler = StandardScaler().fit(X)
    rows, index = scaler.transform(X), draw_landmarks(X, seed)
    distances = euclidean_distances(rows, rows[index], squared=True)
    kernel = nystroem(params["width"], seed, rows[index], index, distances[index])
    ((solution,),) = solvers.solve(_mapped(kernel, distances, len(index)), y, [params["C"]])
    return make_pipeline(scaler, kernel, as_logistic(solution)), solution.converged


KNN = HeadFamily(_neighbour_counts, _sweep_knn, _fit_knn)
CENTROID = HeadFamily(lambda _: [{}], _sweep_centroid, _fit_centroid)
MLP = HeadFamily(lambda _: [{"alpha": alpha} for alpha in (1.0, 1e-2)], *by_estimator(_mlp))
LDA = HeadFamily(lambda _: [{"shrinkage": share} for share in (0.9, 0.5, 0.1, 0.01)], _sweep_lda, _fit_lda)
RBF = HeadFamily(
    lambda _: [{"width": width, "C": C} for width in (0.1, 0.3, 1.0) for C in (1e-4, 1e-3, 1e-2, 0.1, 1.0)],
    _sweep_rbf,
    _fit_rbf,
)
BOOSTING = HeadFamily(lambda _: [{}], *by_estimator(_boosting))
