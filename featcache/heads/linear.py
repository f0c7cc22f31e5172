"""Linear heads by our own solvers, returned as fitted scikit-learn estimators."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Many, Params, Raced, mask_of, side_by_side
from featcache.heads.solvers import Solution
from featcache.heads.solvers.passes import SideBySide, TurnedLoss
from featcache.heads.solvers.scaled import solve_ridge

# 45 values from 1e-6 to 1e5, the search space of DINOv2's linear evaluation on small sets (Oquab et al. 2023, appendix B.3)
_LOGISTIC = [{"C": float(f"{value:.4g}")} for value in np.logspace(-6, 5, 45)]
# the costs of VISSL's linear classification (Goyal et al. 2019, section 4)
_COSTS = [{"C": cost} for cost in (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)]
_SELECTING_ALPHA = 100.0
COARSE_CS = _LOGISTIC[::4]
ALPHAS = [{"alpha": float(f"{value:.4g}")} for value in np.logspace(6, -1, 15)]


# Measured on real sets and on random problems, see ``_Race``.
_LOOK, _NEAR, _SETTLED = (
    1e-2,
    1e-4,
    1e-7,
)  # left of what a C has gained: to be looked at; settled if no row is in doubt; settled
_DOUBT, _LOSS_DOUBT = 3.0, 10.0  # next steps
_LOSS_SETTLED = 3e-3
_ROW_LEFT = 1e-5  # above which a row may always be in doubt
_BY_LEFT = 0.5  # of all rows held out, by the root of what is left; and one row more
_LOOSE_TURNS, _MOST_TURNS = 20, 120
_MOST_LOSS = -np.log(np.finfo(np.float64).eps)  # of a row, as scores count it: of a class that no row trains
_FIRST_LOOK, _EVERY = 2, 3  # turns
_ROOM = 4_000_000  # numbers that descents side by side may take, and no fewer than the features


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
    for params, solutions in zip(grid, zip(*by_fold, strict=True), strict=True):
        yield _with_heads(_candidate(params, solutions, (X[fold.val] for fold in folds), classes), solutions)


def _candidate(params: Params, solutions: Sequence[Solution], held: Iterable[X_], classes: int) -> Candidate:
    """Return what each fold's solution answers of the rows (v, d) that it is judged by."""
    predictions = [probabilities(solution, rows, classes) for solution, rows in zip(solutions, held, strict=True)]
    return Candidate(params, np.concatenate(predictions), all(solution.converged for solution in solutions))


def _with_heads(candidate: Candidate, solutions: Sequence[Solution]) -> Candidate:
    """Return a candidate with its solutions as heads, which take the features that the candidate was tried on."""
    return replace(candidate, solutions=tuple(make_pipeline(as_logistic(solution)) for solution in solutions))


@dataclass(frozen=True)
class _Standing:
    """How a C does on the rows held out of all folds: how many are right, and may be, and the log-loss."""

    right: int
    least: float
    most: float
    log_loss: float
    doubt: float
    is_settled: bool

    @property
    def rank(self) -> tuple[int, float]:
        return -self.right, self.log_loss


class _Race:
    """All C against each other on the rows held out; one that can no longer win is left where it is.

    A row is in doubt while its margin is below ``_DOUBT`` times what the next step would change of margins. A C is settled
    when none is and little is left, and out when it could not be the best with all rows in doubt right. This is no proof:
    of 200 random problems 197 were chosen as when every C is solved (benchmarks/speed/heads.py draws such).
    """

    def __init__(self, loss: TurnedLoss, y: Y_, folds: Sequence[Fold], Cs: Sequence[float], room: int) -> None:
        self.loss, self.Cs, self.room = loss, Cs, room
        self.y_held = [y[fold.val] for fold in folds]
        self.count = sum(map(len, self.y_held))
        self.standings: dict[int, _Standing] = {}
        self.models: dict[int, NDArray[Any]] = {}
        self.leader: _Standing | None = None

    def along(self, numbers: Sequence[int]) -> None:
        """Race these: first loosely, from the strongest penalty to the weakest, each from where the last two point."""
        ordered = sorted(numbers, key=lambda number: self.Cs[number])
        for place, number in enumerate(ordered):
            models = self.models[ordered[place - 1]] if place else solvers.constant_models(self.loss)
            if place > 1:
                ahead = np.log(self.Cs[number] / self.Cs[ordered[place - 1]])
                ahead /= np.log(self.Cs[ordered[place - 1]] / self.Cs[ordered[place - 2]])
                models = models + np.float32(min(ahead, 1.0)) * (models - self.models[ordered[place - 2]])
            group = self._group([number], models)
            while group.turns < _FIRST_LOOK or (group.left.max() > _LOOK and group.turns < _LOOSE_TURNS):
                group.step()
            self._judge(group, np.full(len(self.y_held), number))
        self._decide(sorted(numbers, key=self._order))

    def between(self, numbers: Sequence[int]) -> None:
        """Race these too, each started between its nearest neighbours of those that have raced."""
        before = sorted(self.models)
        for number in numbers:
            low = max((other for other in before if other < number), default=before[0])
            high = min((other for other in before if other > number), default=before[-1])
            share = np.float32((number - low) / (high - low) if high > low else 0)
            self.models[number] = self.models[low] + share * (self.models[high] - self.models[low])
        self._decide(numbers)

    def best(self) -> int:
        """Return which is the best of those that are settled."""
        settled = [number for number, standing in self.standings.items() if standing.is_settled]
        return min(settled or self.standings, key=self._order)

    def _order(self, number: int) -> tuple[Any, ...]:
        return (*self.standings[number].rank, number)

    def won(self, grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold]) -> Raced | None:
        """Solve the best to its end, and those that might still be it; again, where that has changed who is the best.

        ``None`` where none reached its optimum.
        """
        ended: dict[int, Candidate] = {}
        tried, y_true = len(self.standings), np.concatenate(self.y_held)
        while self.standings:
            best = self.best()
            # The best itself too: where each was out by what another might be, none is settled.
            rivals = [
                number
                for number in self.standings
                if number not in ended and (number == best or self._is_rival(number, best))
            ]
            if not rivals:
                return Raced(ended[best], tried, tried - len(self.standings))
            number = min(rivals, key=self._order)
            candidate = ended[number] = self._solved(grid[number], number, X, y, folds)
            if not candidate.converged:
                del self.standings[number]  # and those that it has beaten are in the race again
                self.standings = {left: replace(standing, is_settled=True) for left, standing in self.standings.items()}
                continue
            right = int((candidate.answers.argmax(axis=1) == y_true).sum())
            of_truth = np.maximum(candidate.answers[np.arange(len(y_true)), y_true], np.finfo(np.float64).eps)
            self.standings[number] = _Standing(right, right, right, float(-np.log(of_truth).sum()), 0.0, is_settled=True)
        return None

    def _is_rival(self, number: int, best: int) -> bool:
        """Tell whether one might be as good as the best, or might do so with its rows in doubt right."""
        standing, leader = self.standings[number], self.standings[best]
        if standing.most <= leader.right and not standing.is_settled:
            return False
        return standing.right >= leader.right and standing.log_loss - standing.doubt <= leader.log_loss + leader.doubt

    def _solved(self, params: Params, number: int, X: X_, y: Y_, folds: Sequence[Fold]) -> Candidate:
        tolerance = solvers.tolerance_of(sum(len(fold.train) for fold in folds) * X.shape[1] * self.loss.outputs)
        solutions = solvers.finish(self.loss, self.Cs[number], self.models[number], tolerance)
        for place, fold in enumerate(folds):
            if not solutions[place].converged:  # float32, or a gradient, is not enough to prove it
                ((solutions[place],),) = solvers.solve(X, y, [self.Cs[number]], [mask_of(fold.train, len(y))])
        held = (X[fold.val] for fold in folds)
        return _with_heads(_candidate(params, solutions, held, self.loss.outputs), solutions)

    def _group(self, numbers: Sequence[int], models: NDArray[Any]) -> SideBySide:
        Cs = np.repeat([self.Cs[number] for number in numbers], len(self.y_held))
        return SideBySide(self.loss, np.tile(np.arange(len(self.y_held)), len(numbers)), Cs, models)

    def _decide(self, numbers: Sequence[int]) -> None:
        """Let these go on until each is settled or out, in this order as many side by side as there is room for."""
        together = max(1, self.room // SideBySide.room(self.loss, len(self.y_held)))
        for start in range(0, len(numbers), together):
            company = numbers[start : start + together]
            group = self._group(company, np.concatenate([self.models[number] for number in company]))
            number_of = np.repeat(company, len(self.y_held))
            while len(number_of):
                group.step()
                is_late = group.turns >= _MOST_TURNS or bool(group.descents.stalled.all())
                if group.turns < _FIRST_LOOK or (group.turns % _EVERY and not is_late):
                    continue
                is_open = ~np.isin(number_of, self._judge(group, number_of, is_late=is_late))
                group.keep(is_open)
                number_of = number_of[is_open]

    def _judge(self, group: SideBySide, number_of: NDArray[Any], *, is_late: bool = False) -> list[int]:
        """Note how each C stands, and return which are settled or out."""
        judged, ended = self._judged(group, number_of), []
        for number, seen in judged.items():
            standing = replace(seen, is_settled=seen.is_settled or is_late)
            problems = number_of == number
            self.models[number] = group.weights[problems]
            is_out = self._is_out(standing)
            self.standings[number] = replace(standing, is_settled=standing.is_settled and not is_out)
            if standing.is_settled or is_out:
                ended.append(number)
            if self.standings[number].is_settled and (self.leader is None or standing.rank < self.leader.rank):
                self.leader = standing
        return ended

    def _is_out(self, standing: _Standing) -> bool:
        if standing.most < max((rival.least for rival in self.standings.values()), default=0):
            return True
        if self.leader is None:
            return False
        is_worse = standing.log_loss - standing.doubt > self.leader.log_loss + self.leader.doubt
        return standing.most <= self.leader.right and is_worse

    def _judged(self, group: SideBySide, number_of: NDArray[Any]) -> dict[int, _Standing]:
        seen = np.zeros((5, len(number_of)))
        pairs = np.stack([group.weights, group.moves], axis=1)
        for fold, y_true in enumerate(self.y_held):
            index = np.flatnonzero(group.fold_of == fold)
            if len(index) and len(y_true):
                outputs = pairs[index].reshape(-1, pairs.shape[3]) @ self.loss.held[fold].T
                scores, shifts = np.moveaxis(outputs.reshape(len(index), 2, self.loss.outputs, -1), 1, 0)
                seen[:, index] = _seen(scores, shifts, y_true)
        standings = {}
        for number in dict.fromkeys(number_of.tolist()):
            of = number_of == number
            right, surely, perhaps, log_loss, doubt = (float(total) for total in seen[:, of].sum(axis=1))
            left = float(group.left[of].max())
            around = self.count * _BY_LEFT * left**0.5 + 1 if left <= _LOOK else np.inf
            is_settled = left < _NEAR and surely == perhaps and doubt < _LOSS_SETTLED * log_loss
            perhaps = max(perhaps, right + (left > _ROW_LEFT))
            least, most = max(surely, right - around), min(perhaps, right + around)
            standings[number] = _Standing(int(right), least, most, log_loss, doubt, is_settled or left < _SETTLED)
        return standings


def _seen(scores: NDArray[Any], shifts: NDArray[Any], y_true: Y_) -> NDArray[np.float64]:
    """Return of models with scores (p, k, v), that would change by so much, how many rows are right, surely, and perhaps.

    With these, (5, p), come the log-loss and how far it may be from where it will be.
    """
    row, flat = np.arange(len(y_true)), scores.reshape(len(scores), -1)
    true = y_true * len(y_true) + row
    of_true, shift_of_true = np.take(flat, true, axis=1), np.take(shifts.reshape(len(scores), -1), true, axis=1)
    losses = []
    for outputs, of_right in ((scores, of_true), (scores + shifts, of_true + shift_of_true)):
        highest = outputs.max(axis=1)
        spent = np.log(np.exp(outputs - highest[:, None]).sum(axis=1)) + highest - of_right
        spent = np.minimum(spent, _MOST_LOSS)
        losses.append(spent.sum(axis=1, dtype=np.float64))
    reach = shifts.max(axis=1) - shifts.min(axis=1)
    reach = _DOUBT * np.maximum(reach, np.sqrt(np.mean(reach**2, axis=1, keepdims=True)))
    flat[:, true] = -np.inf
    margins = of_true - scores.max(axis=1)  # of the right class before the best of the others
    counts = [(margins > least).sum(axis=1) for least in (0, reach, -reach)]
    return np.stack([*counts, losses[0], _LOSS_DOUBT * np.abs(losses[1] - losses[0])])


def race_logistic(grid: Sequence[Params], coarse: int, X: X_, y: Y_, folds: Sequence[Fold]) -> Raced | None:
    """Return the best of the coarse C and of those around the best of them, solved to its end; ``None`` of too many rows.

    Best is as of ``search_head``. Those that were left in the race are no worse candidates for it: they were tried.
    """
    Cs = [params["C"] for params in grid]
    with solvers.turned_folds(X, y, [(fold.train, fold.val) for fold in folds]) as loss:
        if loss is None:
            return None
        race = _Race(loss, y, folds, Cs, max(_ROOM, X.size))
        race.along(range(0, len(grid), coarse))
        if coarse > 1:
            at = race.best()
            near = range(max(0, at - coarse + 1), min(len(grid), at + coarse))
            race.between([number for number in near if number not in race.models])
        return race.won(grid, X, y, folds)


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
    alphas = [params["alpha"] for params in grid]

    def attempt(fold: Fold) -> list[Y_]:
        classes = np.unique(y[fold.train])
        solutions = solve_ridge(X, 2.0 * _signs(y, classes) - 1, alphas, mask_of(fold.train, len(y)))
        return [_ridge(classes, *solution, X.shape[1]).predict(X[fold.val]) for solution in solutions]

    for params, predictions in zip(grid, zip(*side_by_side(attempt, folds), strict=True), strict=True):
        yield Candidate(params, np.concatenate(predictions))


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
    """Columns are ranked once a fold; all C of a share are solved together, on all folds."""
    classes = int(y.max()) + 1
    ranked = side_by_side(lambda fold: _by_weight(X[fold.train], y[fold.train]), folds)
    for share in dict.fromkeys(params["share"] for params in grid):
        candidates = [params for params in grid if params["share"] == share]
        picked = [_first(order, share) for order in ranked]
        rows = [
            (X[np.ix_(fold.train, columns)], X[np.ix_(fold.val, columns)])
            for fold, columns in zip(folds, picked, strict=True)
        ]
        yield from tried_on(rows, y, folds, candidates, classes)


def tried_on(
    rows: Sequence[tuple[X_, X_]], y: Y_, folds: Sequence[Fold], candidates: Sequence[Params], classes: int
) -> Iterator[Candidate]:
    """Try C on folds that see features of their own (n, d), one d for all: those of train, and those of val.

    One fold's rows lie behind another's, so that the solver takes all problems at once, as it does where folds share rows.
    """
    bounds = np.cumsum([0, *(len(fold.train) for fold in folds)])
    masks = [mask_of(np.arange(*ends), int(bounds[-1])) for ends in pairwise(bounds)]
    X, y_true = (np.concatenate(parts) for parts in ([train for train, _ in rows], [y[fold.train] for fold in folds]))
    by_fold = solvers.solve(X, y_true, [params["C"] for params in candidates], masks)
    for params, solutions in zip(candidates, zip(*by_fold, strict=True), strict=True):
        yield _candidate(params, solutions, (val for _, val in rows), classes)


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
LOGISTIC = HeadFamily(lambda _: list(_LOGISTIC), _sweep_logistic, _fit_logistic, coarse=4, streams=True, race=race_logistic)
SVM = HeadFamily(lambda _: list(_COSTS), _sweep_svm, _fit_svm)
RIDGE = HeadFamily(lambda _: list(ALPHAS), _sweep_ridge, _fit_ridge, streams=True)
