"""Multinomial logistic regression, exactly: every penalty and every fold in shared passes over the features.

Each fold's problems are solved from the strongest penalty to the weakest, each started from where the last two point. The
inverse Hessian that L-BFGS starts from is a Kronecker product: the mean covariance of a row's class indicator, times the
covariance of the features, plus the penalty (the block structure of Böhning 1992, with probabilities in place of his bound).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import compress, count, product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigh
from scipy.special import logit, softmax

from featcache.heads.solvers import newton
from featcache.heads.solvers.losses import Loss, seen_by
from featcache.heads.solvers.newton import LBFGS, Precondition
from featcache.heads.solvers.passes import Ahead, BatchedLoss, SideBySide, TurnedLoss
from featcache.heads.solvers.scaled import Axes, Floats, Rows, TurnedRows, products_on, scaled
from featcache.resources import Threads, cores

if TYPE_CHECKING:
    from featcache.store import LazyRows


TOLERANCE = 1e-4
_LARGE, _SMALL_TOLERANCE = 5_000_000, 1e-7  # rows x features x outputs
_DOUBLE_FROM = 1e-7  # a tolerance that products in float32 do not reach
_MAX_ITERATIONS = 150  # of L-BFGS, before Newton's method takes over
_FEW = 4  # problems for which a factorisation each is cheaper than the axes of all
_TRIGGER = 0.4  # tolerances that L-BFGS estimates to be left when it is believed to be near
_REFRESH = 6  # evaluations after which the curvature is measured anew
# Numbers that turned rows, problems side by side on them, and one alone of each fold may take, however few the features.
_MOST_TURNED, _LEAST_ROOM, _LEAST_ALONE = 16_000_000, 2_000_000, 20_000_000
_TURNED_ALONE = 1_000_000  # numbers, up to which turning always pays
_TALL, _MANY_CS = 12, 3  # rows a column, up to which it pays above that; costs of an SVM, from which on it does anyway
_MOST_TURNS = 200
_FEWEST_HINGE_TURNS, _MOST_HINGE_TURNS = 60, 600  # before Newton's method on the rows inside the margin takes over
_LEADS = (1.0, 10.0, 100.0, 1e3, 1e4)  # that lead to a greater C
_INSIDE = 0.2  # of the tolerance, to which the gradient in float32 is brought
_FURTHER = 0.3  # of it, to which it is brought where float64 saw more
_SEEN = 50_000  # scores in float64 at a time
_LEVELLINGS = 3  # Newton steps that put the intercepts to their best
_LEVEL = 1e-3  # of the tolerance, that may be left of that
_NEVER, _ALWAYS = -1e30, 30.0  # intercepts of classes without and with every training row
_NO_CURVATURE = 1e-100
_FLAT = 0.7  # rows a feature up to which the rows' own space is the smaller one to work in
_CHEAP, _AFFORDABLE = 5e7, 4e10  # operations of all second derivatives: less than conjugate gradients'; as a last resort
_STEEPEST = {"softmax": 0.5, "sigmoid": 0.25, "squared_hinge": 2.0}  # second derivative of a loss, at most
_LEAD, _LEAD_STEP = (
    1.0,
    10.0,
)  # the greatest C that is started from a constant model; the step of what leads to a greater one
_FAR = 0.5  # of the loss of guessing
_LEAD_TOLERANCE = 1e-2
_WIDTH = 48  # columns from which on a product is efficient


@dataclass(frozen=True)
class Solution:
    """The minimiser of C * (sum of log-losses) + |W|^2 / 2, in the features' own units, and how well it was reached.

    ``classes`` (k,) are those that the fold trains on; ``coefficients`` (k, d) and ``intercept`` (k,) have one row for two
    of them, as scikit-learn keeps them. ``objective`` is the value reached; ``excess`` bounds its distance to the
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
    X: "Rows | LazyRows",
    y: NDArray[Any],
    Cs: Sequence[float],
    folds: Sequence[NDArray[np.bool_]] | None = None,
    *,
    loss: Loss = "softmax",
    standardise: bool = True,
    tolerance: float | None = None,
) -> list[list[Solution]]:
    """Return for each fold the minimisers of scikit-learn's ``LogisticRegression`` objective, one a C.

    Args:
        X: features (n, d), finite; an array, or ``LazyRows`` where they do not fit into memory.
        y: classes 0..k-1 (n,); labels (n, k) bool for the losses that take each label by itself.
        Cs: inverse penalties; solutions come in this order.
        folds: for each fold the rows that train, (n,) bool; all rows as one fold if left out.
        loss: "softmax"; "sigmoid" for ``OneVsRestClassifier(LogisticRegression())``'s objective; "squared_hinge" for
            ``LinearSVC``'s, its intercept not penalised.
        standardise: penalise the weights of (x - mean) / standard deviation, both over the fold's rows.
        tolerance: the share of the objective to which the bound of its distance to the optimum is to fall: 1e-4, and 1e-7
            where that costs next to nothing, if left out.

    Raises:
        ValueError: a fold trains on fewer than two classes.
    """
    folds = [np.ones(len(y), dtype=bool)] if folds is None else folds
    terms = _Terms(loss, standardise, tolerance)
    is_within = tolerance is None or tolerance >= _DOUBLE_FROM
    is_paid_for = not _is_tall(X) or (loss == "squared_hinge" and len(Cs) >= _MANY_CS)
    if isinstance(X, np.ndarray) and is_paid_for and is_within:
        return _turned_or_else(X, y, Cs, folds, terms)
    return _by_passes(X, y, Cs, folds, terms)


def solve_from(
    X: Rows,
    y: NDArray[np.int64],
    C: float,
    model: tuple[Floats, Floats],
    folds: Sequence[NDArray[np.int64]],
    axes: Axes | None = None,
) -> list[Solution]:
    """Return the minimisers as ``solve`` does, of one C, one a fold, started from a model near them.

    Args:
        X: features (n, d), finite.
        y: classes 0..k-1 (n,).
        C: inverse penalty.
        model: weights by features in their own units (k, d), and intercepts (k,).
        folds: positions of each fold's rows (n,).
        axes: of other rows, where they serve these too.

    Raises:
        ValueError: a fold has fewer than two classes.
    """
    solutions: list[Solution] = []
    with turned_folds(X, y, [(rows, np.zeros(0, np.int64)) for rows in folds], axes=axes) as loss:
        if loss is not None:
            starts = constant_models(loss)
            for start, fold in zip(starts, loss.folds, strict=True):
                is_used = start[:, -1] > _NEVER
                turned = fold.models(*model)[is_used]
                start[is_used, : turned.shape[1] - 1], start[is_used, -1] = turned[:, :-1], turned[:, -1]
            solutions = finish(loss, C, starts, tolerance_of(sum(map(len, folds)) * X.shape[1] * loss.outputs))
    if solutions and all(solution.converged for solution in solutions):
        return solutions
    return [solution for (solution,) in solve(X, y, [C], [np.isin(np.arange(len(y)), rows) for rows in folds])]


@dataclass(frozen=True)
class _Terms:
    """What ``solve`` was asked for besides the problems."""

    loss: Loss
    standardise: bool
    tolerance: float | None


def _turned_or_else(
    X: Rows, y: NDArray[Any], Cs: Sequence[float], folds: Sequence[NDArray[np.bool_]], terms: _Terms
) -> list[list[Solution]]:
    """Solve on turned rows, from the strongest penalty to the weakest; what is not proven there is solved by passes."""
    tolerance = terms.tolerance or tolerance_of(X.size * (int(y.max()) + 1 if terms.loss == "softmax" else y.shape[1]))
    solutions: list[dict[float, Solution]] = [{} for _ in folds]
    nobody = np.zeros(0, np.int64)
    splits = [(np.flatnonzero(rows), nobody) for rows in folds]
    with turned_folds(X, y, splits, loss=terms.loss, standardise=terms.standardise) as evaluated:
        if evaluated is not None:
            ordered = sorted({float(C) for C in Cs})
            descended = _descended(evaluated, ordered, tolerance)
            for C, state, proofs in zip(ordered, descended, proven(evaluated, ordered, descended, tolerance), strict=True):
                for of_fold, solution in zip(solutions, _further(evaluated, state, proofs, tolerance), strict=True):
                    of_fold[C] = solution
    for rows, of_fold in zip(folds, solutions, strict=True):
        open_Cs = [float(C) for C in Cs if C not in of_fold or not of_fold[C].converged]
        if open_Cs:
            (by_passes,) = _by_passes(X, y, open_Cs, [rows], replace(terms, tolerance=tolerance))
            of_fold |= dict(zip(open_Cs, by_passes, strict=True))
    return [[of_fold[float(C)] for C in Cs] for of_fold in solutions]


def _is_tall(X: "Rows | LazyRows") -> bool:
    """Tell whether there are so many rows a column that a C is solved sooner by these than by turning and descending."""
    rows, columns = X.shape
    return bool(rows * columns > _TURNED_ALONE and rows > _TALL * columns)


def _descended(loss: TurnedLoss, Cs: Sequence[float], tolerance: float) -> "list[Descended]":
    """Bring every fold's models of ascending C, each started from the last, to where they are hoped to be proven."""
    descended = []
    models = constant_models(loss)
    lead = [C for C in _LEADS if Cs[0] > C]
    for C in [*lead, *Cs]:
        state = descend(loss, C, models, _LEAD_TOLERANCE if C in lead else tolerance)
        models = state.models
        if C not in lead:
            descended.append(state)
    return descended


def _by_passes(
    X: "Rows | LazyRows", y: NDArray[Any], Cs: Sequence[float], folds: Sequence[NDArray[np.bool_]], terms: _Terms
) -> list[list[Solution]]:
    in_memory = isinstance(X, np.ndarray)  # else every pass reads the rows again, instead of a float32 copy of them
    if isinstance(X, np.ndarray) and max(map(np.count_nonzero, folds)) <= _FLAT * X.shape[1]:
        return [_in_row_space(X[rows], y[rows], Cs, terms) for rows in folds]
    with scaled(X, folds, standardise=terms.standardise, in_memory=in_memory) as features:
        passes = BatchedLoss(features, y, terms.loss)
        solver = _Path(
            passes,
            [y[rows] for rows in folds],
            terms.tolerance or tolerance_of(X.shape[0] * X.shape[1] * passes.outputs),
        )
        order = np.argsort(Cs, kind="stable")
        solutions_by_fold = solver.run([float(Cs[index]) for index in order])
    back = np.argsort(order)
    return [[solutions[index] for index in back] for solutions in solutions_by_fold]


@contextmanager
def turned_folds(
    X: Rows,
    y: NDArray[Any],
    folds: Sequence[tuple[NDArray[Any], NDArray[Any]]],
    *,
    loss: Loss = "softmax",
    standardise: bool = True,
    axes: Axes | None = None,
) -> Iterator[TurnedLoss | None]:
    """Yield what evaluates models on folds, positions of rows that train and that judge, turned to their axes.

    ``None`` where that would take much more memory than the features do, or a label has no rows or all of a fold's: its
    intercept has no optimum. Inside, matrix products use one core each.

    Raises:
        ValueError: a fold trains on fewer than two classes.
    """
    if loss == "softmax" and any(len(np.unique(y[train])) < 2 for train, _ in folds):
        raise ValueError("every fold must train on two classes at least")
    is_constant = loss != "softmax" and any((y[train] == y[train[0]]).all(axis=0).any() for train, _ in folds)
    outputs = int(y.max()) + 1 if loss == "softmax" else y.shape[1]
    if is_constant or not _fits(X, outputs, [len(train) for train, _ in folds]):
        yield None
        return
    with products_on(1), Threads() as threads:
        first = TurnedRows(X, *folds[0], standardise=standardise, axes=axes, each=threads.map)
        axes = first.whole_axes
        following = threads.map(lambda fold: TurnedRows(X, *fold, standardise=standardise, axes=axes), folds[1:])
        turned = [first, *following]
        evaluated = TurnedLoss(turned, y, loss)
        try:
            yield evaluated
        finally:
            evaluated.close()


def room_of(X: Rows, least: int = _LEAST_ROOM) -> int:
    """Return how many numbers, at least so many, what moves on turned features (n, d) may take, beside a copy of these."""
    return max(least, X.size // 4)


def _fits(X: Rows, outputs: int, rows: Sequence[int]) -> bool:
    """Tell whether folds of so many rows may be turned, and a problem of each be solved there."""
    turned = sum(count * min(X.shape[1], count) for count in rows)
    moving = len(rows) * SideBySide.room(outputs, X.shape[1], max(rows))
    return turned <= max(_MOST_TURNED, X.size) and moving <= room_of(X, _LEAST_ALONE)


def tolerance_of(size: int) -> float:
    """Return to which share of the objective a problem of so many rows x features x outputs is solved."""
    return TOLERANCE if size >= _LARGE else _SMALL_TOLERANCE


def constant_models(loss: TurnedLoss) -> Rows:
    """Return each fold's model without weights (f, k, r + 1)."""
    models = np.zeros((*loss.shares.shape, loss.width), np.float32)
    if loss.loss == "softmax":
        models[:, :, -1] = np.where(loss.shares > 0, np.log(np.where(loss.shares > 0, loss.shares, 1)), _NEVER)
    else:
        models[:, :, -1] = logit(loss.shares) if loss.loss == "sigmoid" else 2 * loss.shares - 1
    return models


class Descended(NamedTuple):
    """The models (f, k, r + 1) of all folds after so many turns."""

    models: Rows
    turns: int


def descend(loss: TurnedLoss, C: float, models: Rows, tolerance: float) -> Descended:
    """Bring one C on every fold to where the gradient in float32 bounds what is left."""
    group = SideBySide(loss, np.arange(len(models)), np.full(len(models), C), models, _INSIDE * tolerance)
    models = models.copy()
    most_turns = _hinge_turns(loss) if loss.loss == "squared_hinge" else _MOST_TURNS
    while len(group.fold_of):
        group.step()
        by_weights = group.slopes[:, :, :-1]
        bound = np.einsum("pkr,pkr->p", by_weights, by_weights, dtype=np.float64) / 2
        is_near = (bound <= _INSIDE * tolerance * group.descents.values) & (group.left <= tolerance)
        is_near |= group.descents.stalled | (group.turns >= most_turns)
        if is_near.any():
            models[group.fold_of[is_near]] = group.weights[is_near]
            group.keep(~is_near)
    return Descended(models, group.turns)


def _hinge_turns(loss: TurnedLoss) -> int:
    """Return how many turns may be taken before Newton's method: about as many as its few steps for a label cost."""
    rows, width = max(loss.counts), loss.width
    cost_in_turns = 0.4 * (width + width**2 / (3 * rows)) if rows > width else rows**2 / (8 * width)
    return int(np.clip(cost_in_turns, _FEWEST_HINGE_TURNS, _MOST_HINGE_TURNS))


def proven(loss: TurnedLoss, Cs: Sequence[float], descended: Sequence[Descended], tolerance: float) -> list[list[Solution]]:
    """Return for each C the models of all folds as solutions, with what float64 says of them."""

    def of_fold(number: int) -> list[Solution]:
        proof = _Proof(loss.loss, loss.folds[number], loss.targets[number], tolerance)
        return proof.of([proof.model(C, state.models[number], state.turns) for C, state in zip(Cs, descended, strict=True)])

    by_fold = loss.threads.map(of_fold, range(len(loss.folds)))
    return [list(of_C) for of_C in zip(*by_fold, strict=True)]


def _further(loss: TurnedLoss, state: Descended, solutions: list[Solution], tolerance: float) -> list[Solution]:
    """Bring one C further where float64 has seen a little more than float32: from there it takes a few turns."""
    if loss.loss == "squared_hinge" or all(solution.converged for solution in solutions):
        return solutions
    C = solutions[0].C
    (again,) = proven(loss, [C], [descend(loss, C, state.models, _FURTHER * tolerance)], tolerance)
    return [min(pair, key=lambda solution: solution.excess) for pair in zip(solutions, again, strict=True)]


def finish(loss: TurnedLoss, C: float, models: Rows, tolerance: float) -> list[Solution]:
    """Bring one C on every fold to its optimum: float32 until the gradient bounds what is left, then float64 tells it."""
    descended = descend(loss, C, models, tolerance)
    (solutions,) = proven(loss, [C], [descended], tolerance)
    return _further(loss, descended, solutions, tolerance)


class _Proof:
    """One fold's models, their distance to the optimum bounded by the gradient in float64 on the rows as they come.

    Args:
        loss: what is summed.
        fold: the rows that train.
        y: their classes (n,), or which labels they have (n, k).
        tolerance: the share of the objective to which the bound is to fall.
    """

    def __init__(self, loss: Loss, fold: TurnedRows, y: NDArray[Any], tolerance: float) -> None:
        self.loss, self.fold, self.tolerance = loss, fold, tolerance
        self.classes = np.unique(y) if loss == "softmax" else np.arange(y.shape[1])
        self.right: NDArray[np.bool_] = self.classes[:, None] == y if loss == "softmax" else y.T
        self.is_pair = loss == "softmax" and len(self.classes) == 2

    def model(self, C: float, turned: Rows, turns: int) -> "_Model":
        """Return a model (k, r + 1) of turned rows as one of standardised features."""
        of_classes = turned[self.classes].astype(np.float64)
        return _Model(C, self.fold.back(of_classes[:, :-1]), of_classes[:, -1], turns)

    def of(self, models: "Sequence[_Model]") -> list[Solution]:
        """Return models as solutions; of squared hinges those that are not proven are finished first."""
        solutions = self._judged(models)
        is_open = [not solution.converged for solution in solutions]
        if self.loss == "squared_hinge" and any(is_open):
            finished = iter(self._judged(list(self._finished(compress(models, is_open)))))
            solutions = [next(finished) if is_left else each for each, is_left in zip(solutions, is_open, strict=True)]
        return solutions

    def _finished(self, models: "Iterable[_Model]") -> "Iterator[_Model]":
        rows, signs = self.fold.exactly(slice(None)) / self.fold.scale, np.where(self.right, 1.0, -1.0)
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else None
        for C, weights, intercept, turns in models:
            starts = zip(weights, intercept, strict=True)
            by_label = [newton.of_squared_hinge(rows, gram, *each, C) for each in zip(signs, starts, strict=True)]
            ended_weights, ended_intercept = (np.array(parts) for parts in zip(*by_label, strict=True))
            yield _Model(C, ended_weights, ended_intercept, turns)

    def _judged(self, models: "Sequence[_Model]") -> list[Solution]:
        """Return models as solutions; the rows are read twice for all of them."""
        weights = np.concatenate([model.weights for model in models])
        without = self.fold.exact_products(weights).reshape(len(models), len(self.classes), -1)
        intercepts = np.stack([model.intercept for model in models])
        scales = np.array([self._scale_of(model.C) for model in models])
        most = max(1, _SEEN // len(weights))

        def seen(block: slice) -> tuple[Floats, Floats, Floats]:
            return seen_by(self.loss, without[:, :, block] + intercepts[:, :, None], self.right[:, block])

        def see(block: slice) -> tuple[Floats, Floats, Floats]:
            spent, slopes, stiffness = seen(block)
            return spent, slopes.sum(axis=2), stiffness

        for further in reversed(range(_LEVELLINGS + 1)):
            spent, rests, stiffness = (sum(parts) for parts in zip(*self.fold.by_blocks(see, most), strict=True))
            if not further or (_far(intercepts, rests) <= _LEVEL * self.tolerance * spent).all():
                break
            lifts = np.matmul(np.linalg.pinv(stiffness, rcond=1e-12, hermitian=True), rests[:, :, None])
            intercepts = intercepts - lifts[:, :, 0]
        # The slopes are worked out once more: to keep them all would take as much memory as the scores.
        by_weights = self.fold.exact_sums(lambda block: seen(block)[1].reshape(len(weights), -1), len(weights))
        by_weights = by_weights.reshape(len(models), len(self.classes), -1)
        gradients = np.stack([model.weights for model in models]) + scales[:, None, None] * by_weights
        bounds = np.einsum("mkd,mkd->m", gradients, gradients) / 2 + scales * _far(intercepts, rests)
        levelled = [model._replace(intercept=intercept) for model, intercept in zip(models, intercepts, strict=True)]
        return list(map(self._solution, levelled, scales * spent, np.abs(gradients).max(axis=(1, 2)), bounds))

    def _scale_of(self, C: float) -> float:
        return C / 2 if self.is_pair else C

    def _solution(self, model: "_Model", spent: float, gradient: float, bound: float) -> Solution:
        C, weights, intercept, turns = model
        value = float(spent + np.vdot(weights, weights) / 2)
        weights = weights / self.fold.scale
        intercept = intercept - weights @ self.fold.mean
        objective, excess = value, float(bound) / value
        if self.is_pair:
            weights, intercept, objective = weights[1:] - weights[:1], intercept[1:] - intercept[:1], 2 * value
        elif self.loss == "softmax":
            intercept = intercept - intercept.mean()
        return Solution(
            C,
            self.classes,
            weights,
            intercept,
            objective,
            excess=excess,
            gradient=float(gradient) / objective,
            iterations=turns,
            converged=excess <= self.tolerance,
            float64=False,
        )


def _far(intercepts: Floats, rests: Floats) -> Floats:
    """Bound, by losses' derivatives by intercepts (m, k), what is to be gained along these, a multiple of C."""
    gains: Floats = (1 + np.abs(intercepts).max(axis=1)) * np.abs(rests).sum(axis=1)
    return gains


class _Model(NamedTuple):
    """A model of standardised features, weights (k, d) and intercepts (k,), found in so many turns."""

    C: float
    weights: Floats
    intercept: Floats
    turns: int


def _in_row_space(X: Rows, y: NDArray[Any], Cs: Sequence[float], terms: _Terms) -> list[Solution]:
    """Solve in as many coordinates as there are rows: the weights are sums of rows (representer theorem: Kimeldorf 1971)."""
    everybody = [np.ones(len(y), dtype=bool)]
    with scaled(X, everybody, standardise=terms.standardise, in_memory=False) as features:
        (fold,) = features.folds
    rows = (X.astype(np.float64) - fold.mean) / fold.scale
    values, vectors = eigh(rows @ rows.T, driver="evd", overwrite_a=True, check_finite=False)
    is_axis = values >= values[-1] * len(y) * np.finfo(np.float64).eps
    lengths, vectors = np.sqrt(np.maximum(values[is_axis], 0)), vectors[:, is_axis]
    (solutions,) = _by_passes(vectors * lengths, y, Cs, everybody, replace(terms, standardise=False))
    shorter = np.divide(1, lengths, out=np.zeros_like(lengths), where=lengths > 0)  # all 0 where rows are all the same
    axes = (vectors * shorter).T @ rows / fold.scale
    back = []
    for solution in solutions:
        coefficients = solution.coefficients @ axes
        back.append(replace(solution, coefficients=coefficients, intercept=solution.intercept - coefficients @ fold.mean))
    return back


@dataclass
class _Problem:
    """One C on one fold: its descent, in coordinates (k, d + 1), the intercept last."""

    fold: int
    C: float
    descent: LBFGS
    double: bool
    is_near: bool = False
    curvature: Floats = field(default_factory=lambda: np.zeros(1))
    end: newton.Finish | None = None


class _Path:
    def __init__(self, passes: BatchedLoss, y: Sequence[NDArray[Any]], tolerance: float) -> None:
        self.passes = passes
        self.folds = passes.features.folds
        self.outputs = passes.outputs
        self.softmax = all(labels.ndim == 1 for labels in y)
        self.tolerance = tolerance
        self.double = tolerance < _DOUBLE_FROM
        size = len(passes.features.order) * passes.features.width * passes.outputs
        self.precise = self.double or size < _LARGE
        self.gram = passes.features.gram(sampled=not self.double)
        self.spread = float(np.trace(self.gram))
        self.axes: tuple[Floats, Floats] | None = None
        self.starts, self.free = zip(*(self._start(labels) for labels in y), strict=True)

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
        number = len(self.folds)
        solutions: list[list[Solution]] = [[] for _ in range(number)]
        points: list[list[Floats]] = [[] for _ in range(number)]
        ends: list[newton.Finish | None] = [None] * number
        before: list[float] = []
        for group, leads in self._groups(Cs):
            problems = [self._problem(fold, C, before, points[fold]) for fold in range(number) for C in group]
            self._descend(problems, _LEAD_TOLERANCE if leads else _TRIGGER * self.tolerance)
            if not leads:
                self._finish(problems, ends)
            for problem in problems:
                point = problem.descent.point
                if problem.end is not None:
                    point, ends[problem.fold] = problem.end.point, problem.end
                    solutions[problem.fold].append(self._solution(problem, problem.end))
                points[problem.fold] = [*points[problem.fold][-1:], point]
            before += group
        return solutions

    def _groups(self, Cs: Sequence[float]) -> list[tuple[list[float], bool]]:
        """Return which C are solved side by side, and whether they only lead to those that were asked for."""
        lead = [Cs[0]]
        while lead[0] > _LEAD:
            lead.insert(0, lead[0] / _LEAD_STEP)
        groups = [([C], True) for C in lead[:-1]]
        together = max(1, _WIDTH // (len(self.folds) * self.outputs))
        begun: list[float] = []
        for C in Cs:
            if begun and (len(begun) == together or max(begun[0] * _LEAD_STEP, _LEAD) < C):
                groups.append((begun, False))
                begun = []
            begun.append(C)
        return [*groups, (begun, False)]

    def _problem(self, fold: int, C: float, before: Sequence[float], points: Sequence[Floats]) -> _Problem:
        if not points:
            start = self.starts[fold]
        elif len(points) == 1 or before[-1] == before[-2]:
            start = points[-1]
        else:
            ahead = np.log(C / before[-1]) / np.log(before[-1] / before[-2])
            start = points[-1] + min(ahead, 1.0) * (points[-1] - points[-2])
        return _Problem(fold, C, LBFGS(start), self.double)

    def _descend(self, problems: Sequence[_Problem], tolerance: float) -> None:
        """Bring problems near to their optimum, by L-BFGS."""
        for turn in count():
            refresh = turn % _REFRESH == 0
            for double in (False, True):
                active = [problem for problem in problems if not problem.is_near and problem.double is double]
                if not active:
                    continue
                trials = np.stack([problem.descent.trial for problem in active])
                folds = [problem.fold for problem in active]
                slopes = self.passes.slopes(folds, trials[:, :, :-1], trials[:, :, -1], curvature=refresh, precise=double)
                for number, problem in enumerate(active):
                    if refresh:
                        problem.curvature = slopes.curvature[number]
                        problem.descent.precondition = self._preconditioner(problem, problem.curvature)
                    gradient = self._whole(problem, slopes.weights[number], slopes.intercept[number], trials[number])
                    self._tell(problem, trials[number], slopes.loss[number], gradient, tolerance)
            if all(problem.is_near for problem in problems):
                break

    def _finish(self, problems: Sequence[_Problem], before: Sequence[newton.Finish | None]) -> None:
        """Bring problems to their optimum and prove it: an estimate of L-BFGS knows nothing of where it has not been.

        What float32 does not bring there is begun again in float64, what conjugate gradients do not by factorisations.
        """
        ends = [self._end(problem, before[problem.fold]) for problem in problems]
        self._to_their_ends(problems, ends)
        for number, problem in enumerate(problems):
            if not ends[number].converged and not ends[number].precise:
                ends[number] = self._new_end(problem, ends[number].point, precise=True)
        self._to_their_ends(problems, ends)
        for number, problem in enumerate(problems):
            if not ends[number].converged and self.softmax and self._unknowns(problem, _AFFORDABLE):
                ends[number] = self._new_end(problem, ends[number].point, precise=True, exactly=True)
        self._to_their_ends(problems, ends)
        for problem, end in zip(problems, ends, strict=True):
            problem.end = end

    def _to_their_ends(self, problems: Sequence[_Problem], ends: Sequence[newton.Finish]) -> None:
        while True:
            for problem, end in zip(problems, ends, strict=True):
                if end.asks == "begin":
                    end.begin(self._preconditioner(problem, problem.curvature))
            waiting = [pair for pair in zip(problems, ends, strict=True) if pair[1].asks]
            if not waiting:
                break
            for asked, precise in product(("bend", "look"), (False, True)):
                active = [pair for pair in waiting if pair[1].asks == asked and pair[1].precise is precise]
                if not active:
                    continue
                folds = [problem.fold for problem, _ in active]
                points = np.stack([end.point for _, end in active])
                if asked == "bend":
                    moves = np.stack([end.direction for _, end in active])
                    weights, intercept = self.passes.bends(folds, points, moves, precise=precise)
                    for number, (problem, end) in enumerate(active):
                        end.tell_bend(self._whole(problem, weights[number], intercept[number], moves[number]))
                else:
                    moves = np.stack([end.move for _, end in active])
                    ahead = self.passes.ahead(folds, points, moves, precise=precise)
                    for number, (problem, end) in enumerate(active):
                        self._look(problem, end, ahead, number, points[number] + moves[number])

    def _unknowns(self, problem: _Problem, most: float) -> bool:
        """Tell whether all second derivatives take at most so many operations."""
        unknowns = float(self.free[problem.fold].sum()) * problem.descent.point.shape[1]
        return bool(max(self.folds[problem.fold].count, unknowns) * unknowns * unknowns <= most)

    def _fits(self, problem: _Problem) -> bool:
        """Tell whether losses have fallen far below guessing: few rows have curvature left then, which products miss."""
        guessing = np.log(max(2, self.free[problem.fold].sum())) if self.softmax else np.log(2) * self.outputs
        return bool(problem.descent.value < _FAR * self._scale_of(problem) * self.folds[problem.fold].count * guessing)

    def _new_end(self, problem: _Problem, point: Floats, *, precise: bool, exactly: bool = False) -> newton.Finish:
        scale, fold = self._scale_of(problem), self.folds[problem.fold]
        return newton.Finish(
            point,
            newton.Terms(
                goal=self.tolerance,
                free=self.free[problem.fold],
                top=1 + scale * fold.count * _STEEPEST[self.passes.loss] * self.spread,
                scale=scale,
                proven=self.precise or self._fits(problem),
            ),
            precise=precise,
            solve=self._exactly(problem) if exactly else None,
        )

    def _end(self, problem: _Problem, before: newton.Finish | None) -> newton.Finish:
        descent, fold, scale = problem.descent, self.folds[problem.fold], self._scale_of(problem)
        precise = problem.double or self.precise
        point = descent.point if np.isfinite(descent.point).all() else self.starts[problem.fold]
        exactly = self.softmax and precise and self._unknowns(problem, _CHEAP)
        end = self._new_end(problem, point, precise=precise, exactly=exactly)
        if not precise and np.isfinite(descent.value):
            end.tell_look(
                newton.Evaluation(
                    descent.value, descent.gradient, np.inf, descent.gradient, scale * fold.count * problem.curvature
                )
            )
            if before is not None and end.asks == "begin" and np.array_equal(end.point, before.point):
                end.take_over(before, self._preconditioner(problem, problem.curvature))
        return end

    def _look(self, problem: _Problem, end: newton.Finish, ahead: Ahead, number: int, point: Floats) -> None:
        scale, fold = self._scale_of(problem), self.folds[problem.fold]
        problem.curvature = ahead.curvature[number]
        end.tell_look(
            newton.Evaluation(
                scale * float(ahead.loss[number]) + float(np.vdot(point[:, :-1], point[:, :-1])) / 2,
                self._whole(problem, ahead.weights[number], ahead.intercept[number], point),
                scale * float(ahead.gap[number]),
                self._whole(problem, ahead.dual_weights[number], ahead.dual_intercept[number], point),
                scale * fold.count * problem.curvature,
            )
        )

    def _whole(self, problem: _Problem, by_weights: Floats, by_intercept: Floats, point: Floats) -> Floats:
        """Return the objective's derivatives (k, d + 1) from the losses', with the penalty's."""
        scale = self._scale_of(problem)
        return np.concatenate([scale * by_weights + point[:, :-1], scale * by_intercept[:, None]], axis=1)

    def _exactly(self, problem: _Problem) -> Callable[[Floats, Floats], Floats]:
        """Return what solves for Newton's direction of a problem of few unknowns, by a factorisation."""
        features, fold = self.passes.features, self.folds[problem.fold]
        trains, free = features.trains[problem.fold], np.flatnonzero(self.free[problem.fold])

        def solve(point: Floats, gradient: Floats) -> Floats:
            rows = features.block(slice(0, len(features.order)), np.float64)[trains]
            rows = (rows * features.scale + features.mean - fold.mean) / fold.scale
            affine = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
            shares = softmax(affine @ point[free].T, axis=1)
            move = np.zeros_like(point)
            move[free] = newton.direction(newton.hessian(affine, shares, self._scale_of(problem)), gradient[free])
            return move

        return solve

    def _tell(self, problem: _Problem, trial: Floats, loss: float, gradient: Floats, tolerance: float) -> None:
        value = self._scale_of(problem) * loss + float(np.vdot(trial[:, :-1], trial[:, :-1])) / 2
        gradient[~self.free[problem.fold]] = 0
        descent = problem.descent
        descent.tell(value, gradient, precise=problem.double)
        near = descent.decrement <= tolerance * descent.value
        if descent.stalled and not near and not problem.double:
            problem.double = True
            descent.restart()
            return
        problem.is_near = near or descent.stalled or descent.iterations >= _MAX_ITERATIONS

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
            parts = np.concatenate([inside(turned[:, :-1]), turned[:, -1:] * by_intercept[:, None]], axis=1)
            return turn @ parts if turn is not None else parts

        return apply

    def _by_axes(self, weight: Floats) -> Precondition:
        """Invert weight x gram + 1 for each output by the gram's axes: found once, for many problems."""
        values, vectors = self.axes or (np.empty(0), np.empty(0))
        shrink = 1 / (weight[:, None] * values + 1)
        return lambda rows: ((rows @ vectors) * shrink) @ vectors.T

    def _by_factor(self, weight: float) -> Precondition:
        """Invert it for all outputs at once, with their mean weight, by a factorisation that few problems can afford."""
        kind: Any = np.float64 if self.double else np.float32
        matrix = weight * self.gram
        more = 10 * float(np.finfo(kind).eps) * float(np.trace(matrix))
        while True:
            raised = matrix.astype(kind)
            raised[np.diag_indices_from(raised)] += 1 + more
            try:
                factor = cho_factor(raised, overwrite_a=True, check_finite=False)
                break
            except LinAlgError:  # of a row that lies far out float32 keeps nothing else
                more *= 100 if kind is np.float64 else 1
                kind = np.float64
        return lambda rows: cho_solve(factor, rows.T.astype(kind), check_finite=False).T.astype(np.float64)

    def _scale_of(self, problem: _Problem) -> float:
        """Return C, for two classes half of it: two opposite rows of weights then count as scikit-learn's one."""
        return problem.C / 2 if self.softmax and self.free[problem.fold].sum() == 2 else problem.C

    def _solution(self, problem: _Problem, end: newton.Finish) -> Solution:
        fold = self.folds[problem.fold]
        classes = np.flatnonzero(self.free[problem.fold]) if self.softmax else np.arange(self.outputs)
        weights = end.point[classes, :-1] / fold.scale
        intercept = end.point[classes, -1] - weights @ fold.mean
        objective = end.value
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
            excess=end.bound / end.value,
            gradient=float(np.abs(end.gradient).max() / end.value),
            iterations=problem.descent.iterations + end.bends + end.steps,
            converged=end.converged,
            float64=end.precise,
        )
