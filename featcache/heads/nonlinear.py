"""Heads that take longer: linear discriminants, a small network, an approximated RBF kernel, boosted trees."""

from collections.abc import Iterator, Sequence

import numpy as np
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from featcache.evaluation.splits import Fold
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Params, plain
from featcache.heads.linear import as_logistic, probabilities
from featcache.heads.solvers import linear

_MIN_FOR_EARLY_STOPPING = 20
_MOST_EPOCHS = 2000  # three hundred did not always do without held-out rows
_LANDMARKS = 768
_COMPONENTS = 64


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


def _kernel(width: float, X: X_, seed: int) -> Pipeline:
    landmarks = Nystroem(gamma=width / X.shape[1], n_components=min(_LANDMARKS, len(X)), random_state=seed)
    return make_pipeline(StandardScaler(), landmarks)


def _sweep_rbf(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    """Each width's kernel is mapped once, and all its C are solved together."""
    classes = int(y.max()) + 1
    for width in dict.fromkeys(params["width"] for params in grid):
        several = [params for params in grid if params["width"] == width]
        answers: list[list[X_]] = [[] for _ in several]
        converged = [True] * len(several)
        for fold in folds:
            kernel = _kernel(width, X[fold.train], seed).fit(X[fold.train])
            train, val = kernel.transform(X[fold.train]), kernel.transform(X[fold.val])
            (solutions,) = linear.solve(train, y[fold.train], [params["C"] for params in several])
            for number, solution in enumerate(solutions):
                answers[number].append(probabilities(solution, val, classes))
                converged[number] &= solution.converged
        for params, found, good in zip(several, answers, converged, strict=True):
            yield Candidate(params, np.concatenate(found), good)


def _fit_rbf(params: Params, X: X_, y: Y_, seed: int) -> tuple[Pipeline, bool]:
    kernel = _kernel(params["width"], X, seed).fit(X)
    ((solution,),) = linear.solve(kernel.transform(X), y, [params["C"]])
    return make_pipeline(*(step for _, step in kernel.steps), as_logistic(solution)), solution.converged


MLP = HeadFamily(lambda _: [{"alpha": alpha} for alpha in (1.0, 1e-2)], *plain(_mlp))
LDA = HeadFamily(lambda _: [{"shrinkage": share} for share in (0.9, 0.5, 0.1, 0.01)], *plain(_lda))
RBF = HeadFamily(
    lambda _: [{"width": width, "C": C} for width in (0.1, 0.3, 1.0) for C in (1e-4, 1e-3, 1e-2, 0.1, 1.0)],
    _sweep_rbf,
    _fit_rbf,
)
BOOSTING = HeadFamily(lambda _: [{}], *plain(_boosting))
