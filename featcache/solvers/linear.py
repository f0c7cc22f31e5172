"""Multinomial logistic regression, exactly: every penalty and every fold in shared passes over the features.

Each fold's problems are solved from the strongest penalty to the weakest, each started from where the last two point. The
inverse Hessian that L-BFGS starts from is a Kronecker product: the mean covariance of a row's class indicator, times the
covariance of the features, plus the penalty (the block structure of Böhning 1992, with probabilities in place of his bound).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh

from featcache.machine import cores
from featcache.solvers import newton
from featcache.solvers.lbfgs import Descent, Precondition
from featcache.solvers.passes import Loss, Passes
from featcache.solvers.scaled import Floats, Rows, Streamed, products_on, scaled

TOLERANCE = 3e-5
_LARGE, _SMALL_TOLERANCE = 5_000_000, 1e-7  # rows x features x outputs
_DOUBLE_FROM = 1e-7  # a tolerance that products in float32 do not reach
_MAX_ITERATIONS = 1000
_FEW = 4  # problems for which a factorisation each is cheaper than the axes of all
_GAINED = 3  # tolerances that the last step may have gained: where it gained more, more is left than is estimated
_REFRESH = 6  # evaluations after which the curvature is measured anew
_NEVER, _ALWAYS = -1e30, 30.0  # intercepts of classes without and with every training row
_NO_CURVATURE = 1e-100
_FLAT = 0.7  # rows a feature up to which the rows' own space is the smaller one to work in
_AFFORDABLE = 2e10  # products for all second derivatives of a problem that has stalled
_LEAD = 100.0  # the greatest C that is started from a constant model; and the step of what leads up to a greater one
_WIDTH = 48  # columns from which on a product is efficient


@dataclass(frozen=True)
class Solution:
    """The minimiser of C * (sum of log-losses) + |W|^2 / 2, in the features' own units, and how well it was reached.

    ``classes`` (k,) are those that the fold trains on; ``coefficients`` (k, d) and ``intercept`` (k,) have one row for two
    of them, as scikit-learn keeps them. ``objective`` is the value reached; ``excess`` estimates its distance to the
    optimum, relative to it; ``gradient`` is the largest component, relative to the objective, in standardised units. Where
    features were standardised, |W| is that of their weights.
    """

    C: float
    classes: NDArray[np.int64]
    coefficients: Floats
    intercept: Floats
    objective: float
    excess: float
    gradient: float
    iterations: int
    converged: bool
    float64: bool


def solve(
    X: Rows | Streamed,
    y: NDArray[Any],
    Cs: Sequence[float],
    folds: Sequence[NDArray[np.bool_]] | None = None,
    *,
    loss: Loss = "softmax",
    standardise: bool = True,
    tolerance: float | None = None,
    max_iterations: int = _MAX_ITERATIONS,
    in_memory: bool = True,
) -> list[list[Solution]]:
    """Minimise scikit-learn's ``LogisticRegression`` objective for every C on every fold.

    Args:
        X: features (n, d), finite; an array, or ``Streamed`` where they do not fit into memory.
        y: classes 0..k-1 (n,); labels (n, k) bool for the losses that take each label by itself.
        Cs: inverse penalties; solutions come in this order.
        folds: for each fold the rows that train, (n,) bool; all rows as one fold if left out.
        loss: "softmax"; "sigmoid" for ``OneVsRestClassifier(LogisticRegression())``'s objective; "squared_hinge" for
            ``LinearSVC``'s, its intercept not penalised.
        standardise: penalise the weights of (x - mean) / standard deviation, both over the fold's rows.
        tolerance: stop where the objective's estimated distance to the optimum falls below this share of it: 3e-5, and 1e-7
            where that costs next to nothing, if left out.
        max_iterations: of one problem.
        in_memory: keep a float32 copy of the features.

    Returns:
        For each fold the solutions, one a C.

    Raises:
        ValueError: a fold trains on fewer than two classes.
    """
    folds = [np.ones(len(y), dtype=bool)] if folds is None else folds
    if in_memory and isinstance(X, np.ndarray) and max(map(np.count_nonzero, folds)) <= _FLAT * X.shape[1]:
        return [_in_row_space(X[rows], y[rows], Cs, loss, standardise, tolerance, max_iterations) for rows in folds]
    with scaled(X, folds, standardise=standardise, in_memory=in_memory) as features:
        passes = Passes(features, y, loss)
        if tolerance is None:
            tolerance = TOLERANCE if X.shape[0] * X.shape[1] * passes.outputs >= _LARGE else _SMALL_TOLERANCE
        solver = _Path(passes, [y[rows] for rows in folds], tolerance, max_iterations)
        order = np.argsort(Cs, kind="stable")
        found = solver.run([float(Cs[index]) for index in order])
    back = np.argsort(order)
    return [[solutions[index] for index in back] for solutions in found]


def _in_row_space(
    X: Rows,
    y: NDArray[Any],
    Cs: Sequence[float],
    loss: Loss,
    standardise: bool,  # noqa: FBT001
    tolerance: float | None,
    max_iterations: int,
) -> list[Solution]:
    """Solve in as many coordinates as there are rows: the weights are sums of rows (representer theorem: Kimeldorf 1971)."""
    with scaled(X, [np.ones(len(y), dtype=bool)], standardise=standardise, in_memory=False) as features:
        (fold,) = features.folds
    rows = (X.astype(np.float64) - fold.mean) / fold.scale
    values, vectors = eigh(rows @ rows.T, driver="evd", overwrite_a=True, check_finite=False)
    there = values >= values[-1] * len(y) * np.finfo(np.float64).eps
    lengths, vectors = np.sqrt(np.maximum(values[there], 0)), vectors[:, there]
    ((*found,),) = solve(
        vectors * lengths, y, Cs, loss=loss, standardise=False, tolerance=tolerance, max_iterations=max_iterations
    )
    shorter = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)  # all 0 where rows are all the same
    axes = (vectors * shorter).T @ rows / fold.scale
    back = []
    for solution in found:
        coefficients = solution.coefficients @ axes
        back.append(replace(solution, coefficients=coefficients, intercept=solution.intercept - coefficients @ fold.mean))
    return back


@dataclass
class _Problem:
    """One C on one fold: its descent, in coordinates (k, d + 1), the intercept last."""

    fold: int
    C: float
    descent: Descent
    double: bool
    done: bool = False
    converged: bool = False


class _Path:
    def __init__(self, passes: Passes, y: Sequence[NDArray[Any]], tolerance: float, max_iterations: int) -> None:
        self.passes = passes
        self.folds = passes.features.folds
        self.outputs = passes.outputs
        self.softmax = all(some.ndim == 1 for some in y)
        self.tolerance = tolerance
        self.max_iterations = max_iterations
        self.double = tolerance < _DOUBLE_FROM
        self.gram = passes.features.gram(sampled=not self.double)
        self.axes: tuple[Floats, Floats] | None = None
        self.starts, self.free = zip(*(self._start(some) for some in y), strict=True)

    def _start(self, y: NDArray[Any]) -> tuple[Floats, NDArray[np.bool_]]:
        """Return a fold's constant model (k, d + 1), and for which of its k outputs there is something to learn."""
        start = np.zeros((self.outputs, self.passes.features.width + 1))
        shares = np.bincount(y, minlength=self.outputs) / len(y) if self.softmax else y.mean(axis=0)
        if self.softmax:
            free = shares > 0
            if free.sum() < 2:
                raise ValueError("every fold must train on two classes at least")
            start[:, -1] = np.where(free, np.log(np.where(free, shares, 1)), _NEVER)
        else:
            free = (shares > 0) & (shares < 1)
            start[:, -1] = np.where(free, 0, np.where(shares > 0, _ALWAYS, -_ALWAYS))
        return start, free

    def run(self, Cs: Sequence[float]) -> list[list[Solution]]:
        """Solve for ascending C, on all folds; some neighbouring C at a time where one would make products too narrow."""
        if len(Cs) * len(self.folds) > _FEW:
            with products_on(cores()):
                kind: Any = np.float64 if self.double else np.float32
                values, vectors = eigh(self.gram.astype(kind), driver="evd", check_finite=False)
            self.axes = np.maximum(values, 0).astype(np.float64), vectors.astype(np.float64)
        number, lead = len(self.folds), [Cs[0]]
        while lead[0] > _LEAD:
            lead.insert(0, lead[0] / _LEAD)
        Cs = [*lead[:-1], *Cs]
        found: list[list[Solution]] = [[] for _ in range(number)]
        points: list[list[Floats]] = [[] for _ in range(number)]
        together = max(1, _WIDTH // (number * self.outputs))
        for start in range(0, len(Cs), together):
            group = [
                self._problem(fold, C, Cs[:start], points[fold])
                for fold in range(number)
                for C in Cs[start : start + together]
            ]
            self._descend(group)
            for problem in group:
                points[problem.fold] = [*points[problem.fold][-1:], problem.descent.point]
                found[problem.fold].append(self._solution(problem))
        return [solutions[len(lead) - 1 :] for solutions in found]

    def _problem(self, fold: int, C: float, before: Sequence[float], points: Sequence[Floats]) -> _Problem:
        if not points:
            start = self.starts[fold]
        elif len(points) == 1 or before[-1] == before[-2]:
            start = points[-1]
        else:
            ahead = np.log(C / before[-1]) / np.log(before[-1] / before[-2])
            start = points[-1] + min(ahead, 1.0) * (points[-1] - points[-2])
        return _Problem(fold, C, Descent(start), self.double)

    def _descend(self, problems: Sequence[_Problem]) -> None:
        for turn in count():
            refresh = turn % _REFRESH == 0
            for double in (False, True):
                active = [problem for problem in problems if not problem.done and problem.double is double]
                if not active:
                    continue
                trials = np.stack([problem.descent.trial for problem in active])
                folds = [problem.fold for problem in active]
                slopes = self.passes.slopes(folds, trials[:, :, :-1], trials[:, :, -1], curvature=refresh, precise=double)
                for number, problem in enumerate(active):
                    if refresh:
                        problem.descent.precondition = self._preconditioner(problem, slopes.curvature[number])
                    self._tell(
                        problem, trials[number], slopes.loss[number], slopes.weights[number], slopes.intercept[number]
                    )
            if all(problem.done for problem in problems):
                break
        for problem in problems:
            if not problem.converged and self.softmax and self._second_order_cost(problem) <= _AFFORDABLE:
                self._by_newton(problem)

    def _second_order_cost(self, problem: _Problem) -> float:
        """Return the products that all second derivatives take."""
        coordinates = float(self.free[problem.fold].sum() * problem.descent.point.shape[1])
        return self.folds[problem.fold].count * coordinates * coordinates

    def _by_newton(self, problem: _Problem) -> None:
        """Finish a small problem that has stalled."""
        features, fold, descent = self.passes.features, self.folds[problem.fold], problem.descent
        trains, free = features.trains[problem.fold], np.flatnonzero(self.free[problem.fold])
        rows = features.block(slice(0, len(features.order)), np.float64)[trains]
        rows = (rows * features.scale + features.mean - fold.mean) / fold.scale
        y = np.searchsorted(free, self.passes.y[trains])
        end = newton.minimise(rows, y, self._scale_of(problem), descent.point[free], self.tolerance)
        point, gradient = descent.point.copy(), np.zeros_like(descent.point)
        point[free], gradient[free] = end.point, end.gradient
        descent.point, descent.value, descent.gradient, descent.decrement = point, end.value, gradient, end.decrement
        descent.iterations += end.steps
        problem.converged, problem.double = end.converged, True

    def _tell(self, problem: _Problem, trial: Floats, loss: float, by_weights: Floats, by_intercept: Floats) -> None:
        scale = self._scale_of(problem)
        value = scale * loss + float(np.vdot(trial[:, :-1], trial[:, :-1])) / 2
        gradient = np.concatenate([scale * by_weights + trial[:, :-1], scale * by_intercept[:, None]], axis=1)
        gradient[~self.free[problem.fold]] = 0
        descent = problem.descent
        descent.tell(value, gradient, precise=problem.double)
        goal = self.tolerance * descent.value
        problem.converged = descent.decrement <= goal and descent.gained <= _GAINED * goal
        if descent.stalled and not problem.converged and not problem.double:
            problem.double = True
            descent.restart()
            return
        problem.done = problem.converged or descent.stalled or descent.iterations >= self.max_iterations

    def _preconditioner(self, problem: _Problem, curvature: Floats) -> Precondition:
        fold = self.folds[problem.fold]
        if curvature.ndim == 2:
            spread, turn = np.linalg.eigh(curvature)
        else:
            spread, turn = curvature, None
        weight = self._scale_of(problem) * fold.count * np.maximum(spread, 0.0)
        flat = weight <= max(1e-9 * weight.max(initial=0.0), _NO_CURVATURE)
        by_intercept = np.where(flat, 0.0, 1 / np.where(flat, 1.0, weight))
        inside = (
            self._by_axes(weight) if self.axes is not None else self._by_factor(weight[~flat].mean() if any(~flat) else 0.0)
        )

        def apply(gradient: Floats) -> Floats:
            turned = turn.T @ gradient if turn is not None else gradient
            both = np.concatenate([inside(turned[:, :-1]), turned[:, -1:] * by_intercept[:, None]], axis=1)
            return turn @ both if turn is not None else both

        return apply

    def _by_axes(self, weight: Floats) -> Precondition:
        """Invert weight x gram + 1 for each output by the gram's axes: found once, for many problems."""
        values, vectors = self.axes or (np.empty(0), np.empty(0))
        shrink = 1 / (weight[:, None] * values + 1)
        return lambda rows: ((rows @ vectors) * shrink) @ vectors.T

    def _by_factor(self, weight: float) -> Precondition:
        """Invert it for all outputs at once, with their mean weight, by a factorisation that few problems can afford."""
        matrix: Any = (weight * self.gram).astype(np.float64 if self.double else np.float32)
        rounding = float(np.finfo(matrix.dtype).eps) * float(np.trace(matrix))
        matrix[np.diag_indices_from(matrix)] += 1 + 10 * rounding
        factor = cho_factor(matrix, overwrite_a=True, check_finite=False)
        return lambda rows: cho_solve(factor, rows.T.astype(matrix.dtype), check_finite=False).T.astype(np.float64)

    def _scale_of(self, problem: _Problem) -> float:
        """Return C, for two classes half of it: two opposite rows of weights then count as scikit-learn's one."""
        return problem.C / 2 if self.softmax and self.free[problem.fold].sum() == 2 else problem.C

    def _solution(self, problem: _Problem) -> Solution:
        descent, fold = problem.descent, self.folds[problem.fold]
        classes = np.flatnonzero(self.free[problem.fold]) if self.softmax else np.arange(self.outputs)
        weights = descent.point[classes, :-1] / fold.scale
        intercept = descent.point[classes, -1] - weights @ fold.mean
        objective = descent.value
        if not self.softmax:
            pass
        elif len(classes) == 2:
            weights, intercept, objective = weights[1:] - weights[:1], intercept[1:] - intercept[:1], 2 * objective
        else:
            intercept = intercept - intercept.mean()
        return Solution(
            problem.C,
            classes,
            weights,
            intercept,
            objective,
            excess=descent.decrement / descent.value,
            gradient=float(np.abs(descent.gradient).max() / descent.value),
            iterations=descent.iterations,
            converged=problem.converged,
            float64=problem.double,
        )
