"""Linear heads by our own solvers, returned as fitted scikit-learn estimators."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import LabelBinarizer, Normalizer, normalize
from sklearn.svm import LinearSVC

from featcache.evaluation.splits import Fold
from featcache.heads import solvers
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Many, Params, mask_of
from featcache.heads.solvers import Solution
from featcache.heads.solvers.scaled import solve_ridge

# 45 values from 1e-6 to 1e5, the search space of DINOv2's linear evaluation on small sets (Oquab et al. 2023, appendix B.3)
_LOGISTIC = [{"C": float(f"{value:.4g}")} for value in np.logspace(-6, 5, 45)]
# the costs of VISSL's linear classification (Goyal et al. 2019, section 4)
_COSTS = [{"C": cost} for cost in (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)]
_SELECTING_ALPHA = 100.0
COARSE_CS = _LOGISTIC[::4]
ALPHAS = [{"alpha": float(f"{value:.4g}")} for value in np.logspace(6, -1, 15)]


def _masks(folds: Sequence[Fold], count: int) -> list[NDArray[np.bool_]]:
    return [mask_of(fold.train, count) for fold in folds]


def as_logistic(solution: Solution, classes: NDArray[Any] | None = None) -> LogisticRegression:
    """Return a solution as scikit-learn's fitted estimator, with the standardisation in its weights."""
    head = LogisticRegression(C=solution.C, tol=solvers.TOLERANCE)
    head.classes_ = solution.classes if classes is None else classes[solution.classes]
    head.coef_, head.intercept_ = solution.coefficients, solution.intercept
    head.n_features_in_ = solution.coefficients.shape[1]
    head.n_iter_ = np.array([solution.iterations], dtype=np.int32)
    return head


def probabilities(solution: Solution, X: X_, classes: int) -> NDArray[np.float64]:
    """Return a solution's probabilities (n, classes)."""
    scores = X @ solution.coefficients.T.astype(X.dtype) + solution.intercept.astype(X.dtype)
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    shares = np.zeros((len(X), classes))
    shares[:, solution.classes] = softmax(scores, axis=1)
    return shares


def _sweep_logistic(grid: Sequence[Params], X: Many, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    classes = int(y.max()) + 1
    by_fold = solvers.solve(X, y, [params["C"] for params in grid], _masks(folds, len(y)))
    for number, params in enumerate(grid):
        solutions = [solutions_of_fold[number] for solutions_of_fold in by_fold]
        predictions = [
            probabilities(solution, X[fold.val], classes) for solution, fold in zip(solutions, folds, strict=True)
        ]
        fitted = tuple(make_pipeline(as_logistic(solution)) for solution in solutions)
        yield Candidate(params, np.concatenate(predictions), all(solution.converged for solution in solutions), fitted)


def _fit_logistic(params: Params, X: Many, y: Y_, _: int) -> tuple[Pipeline, bool]:
    ((solution,),) = solvers.solve(X, y, [params["C"]])
    return make_pipeline(as_logistic(solution)), solution.converged


def _signs(y: Y_, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the outputs of one against the rest (n, k) bool; of two classes only the second is one."""
    return np.equal(y[:, None], classes if len(classes) > 2 else classes[1:])


def _sweep_svm(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    # Unit length: a hinge's margin of 1 then means the same for features of any scale.
    X, classes = normalize(X), np.unique(y)
    costs = [params["C"] for params in grid]
    by_fold = solvers.solve(X, _signs(y, classes), costs, _masks(folds, len(y)), loss="squared_hinge", standardise=False)
    for number, params in enumerate(grid):
        solutions = [solutions_of_fold[number] for solutions_of_fold in by_fold]
        predictions = [_decided(solution, X[fold.val], classes) for solution, fold in zip(solutions, folds, strict=True)]
        yield Candidate(params, np.concatenate(predictions), all(solution.converged for solution in solutions))


def _decided(solution: Solution, X: X_, classes: NDArray[np.int64]) -> Y_:
    scores = X @ solution.coefficients.T.astype(X.dtype) + solution.intercept.astype(X.dtype)
    chosen: Y_ = classes[(scores[:, 0] > 0).astype(int) if len(classes) == 2 else scores.argmax(axis=1)]
    return chosen


def _fit_svm(params: Params, X: X_, y: Y_, _: int) -> tuple[Pipeline, bool]:
    classes = np.unique(y)
    ((solution,),) = solvers.solve(normalize(X), _signs(y, classes), [params["C"]], loss="squared_hinge", standardise=False)
    head = LinearSVC(C=params["C"])
    head.classes_, head.n_features_in_, head.n_iter_ = classes, X.shape[1], solution.iterations
    head.coef_, head.intercept_ = solution.coefficients, solution.intercept
    return make_pipeline(Normalizer().fit(X), head), solution.converged


def _sweep_ridge(grid: Sequence[Params], X: Many, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    alphas, by_fold = [params["alpha"] for params in grid], []
    for fold, mask in zip(folds, _masks(folds, len(y)), strict=True):
        classes = np.unique(y[fold.train])
        solutions = solve_ridge(X, 2.0 * _signs(y, classes) - 1, alphas, mask)
        by_fold.append([_ridge(classes, *solution, X.shape[1]).predict(X[fold.val]) for solution in solutions])
    for number, params in enumerate(grid):
        yield Candidate(params, np.concatenate([solutions[number] for solutions in by_fold]))


def _fit_ridge(params: Params, X: Many, y: Y_, _: int) -> tuple[Pipeline, bool]:
    classes = np.unique(y)
    ((coefficients, intercept),) = solve_ridge(X, 2.0 * _signs(y, classes) - 1, [params["alpha"]])
    return make_pipeline(_ridge(classes, coefficients, intercept, X.shape[1], params["alpha"])), True


def _ridge(
    classes: NDArray[np.int64], coefficients: NDArray[Any], intercept: NDArray[Any], width: int, alpha: float = 1.0
) -> RidgeClassifier:
    head = RidgeClassifier(alpha=alpha)
    head._label_binarizer = LabelBinarizer(pos_label=1, neg_label=-1).fit(classes)  # noqa: SLF001 - what older versions read
    if not hasattr(head, "classes_"):
        head.classes_ = classes
    head.coef_, head.intercept_, head.n_features_in_ = coefficients, intercept, width
    return head


def _sweep_selected(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    """Each share's columns are picked once a fold, and all its C are solved together."""
    classes = int(y.max()) + 1
    ranked = [_by_weight(X[fold.train], y[fold.train]) for fold in folds]
    for share in dict.fromkeys(params["share"] for params in grid):
        candidates = [params for params in grid if params["share"] == share]
        by_fold = []
        for fold, order in zip(folds, ranked, strict=True):
            columns = _first(order, share)
            (solutions,) = solvers.solve(
                X[np.ix_(fold.train, columns)], y[fold.train], [params["C"] for params in candidates]
            )
            by_fold.append(
                [
                    (probabilities(solution, X[np.ix_(fold.val, columns)], classes), solution.converged)
                    for solution in solutions
                ]
            )
        for number, params in enumerate(candidates):
            predictions = [attempts[number][0] for attempts in by_fold]
            yield Candidate(params, np.concatenate(predictions), all(attempts[number][1] for attempts in by_fold))


def _fit_selected(params: Params, X: X_, y: Y_, _: int) -> tuple[Pipeline, bool]:
    """The columns that are left out have weight zero: what comes back is one plain logistic head."""
    columns = _first(_by_weight(X, y), params["share"])
    ((solution,),) = solvers.solve(X[:, columns], y, [params["C"]])
    head = as_logistic(solution)
    head.coef_ = np.zeros((len(solution.coefficients), X.shape[1]))
    head.coef_[:, columns], head.n_features_in_ = solution.coefficients, X.shape[1]
    return make_pipeline(head), solution.converged


def _by_weight(X: X_, y: Y_) -> NDArray[np.int64]:
    """Return columns by how much a ridge head uses them, over all classes (Evci et al. 2022, Head2Toe, section 3.2)."""
    ((coefficients, _),) = solve_ridge(X, 2.0 * _signs(y, np.unique(y)) - 1, [_SELECTING_ALPHA])
    return np.argsort(-np.linalg.norm(coefficients * X.std(axis=0), axis=0), kind="stable")


def _first(order: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    return np.sort(order[: max(1, round(share * len(order)))])


def linear_weights(head: Pipeline, classes: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a logistic head as one linear map: weights (classes, d), bias (classes,).

    Its softmax gives the head's probabilities; a class that the head never saw gets a bias of minus 30.
    """
    model = head[-1]
    coefficients, intercept = model.coef_.astype(np.float64), model.intercept_.astype(np.float64)
    if len(model.classes_) == 2:  # scikit-learn keeps one row for two classes
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercept = np.concatenate([-intercept, intercept]) / 2
    weights, bias = np.zeros((classes, coefficients.shape[1])), np.full(classes, -30.0)
    # -30: a class without a training row gets a probability near 0, and its logit stays a number.
    weights[model.classes_] = coefficients
    bias[model.classes_] = intercept
    return weights, bias


def linear_estimator(weights: NDArray[np.float64], bias: NDArray[np.float64]) -> Pipeline:
    """Return a linear map to logits, weights (classes, d), bias (classes,), as scikit-learn's fitted estimator."""
    head = LogisticRegression()
    # scikit-learn keeps the second class's row alone.
    if len(weights) == 2:
        weights, bias = weights[1:] - weights[:1], bias[1:] - bias[:1]
    head.coef_, head.intercept_, head.classes_ = weights, bias, np.arange(max(2, len(weights)))
    head.n_features_in_, head.n_iter_ = weights.shape[1], np.array([0], dtype=np.int32)
    return make_pipeline(head)


SELECTED = HeadFamily(
    lambda _: [{"share": share, "C": C} for share in (0.05, 0.1, 0.25, 0.5) for C in (1e-4, 1e-3, 1e-2, 0.1, 1.0)],
    _sweep_selected,
    _fit_selected,
)
LOGISTIC = HeadFamily(lambda _: list(_LOGISTIC), _sweep_logistic, _fit_logistic, coarse=4, streams=True)
SVM = HeadFamily(lambda _: list(_COSTS), _sweep_svm, _fit_svm)
RIDGE = HeadFamily(lambda _: list(ALPHAS), _sweep_ridge, _fit_ridge, streams=True)
