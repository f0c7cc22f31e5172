"""Linear heads by our own solvers, returned as fitted scikit-learn estimators."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import LabelBinarizer, Normalizer, normalize
from sklearn.svm import LinearSVC

from featcache.evaluation.metrics import log_loss
from featcache.evaluation.splits import Fold
from featcache.heads import solvers
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Many, Params, Raced, mask_of, side_by_side
from featcache.heads.solvers import Solution
from featcache.heads.solvers.passes import SideBySide, TurnedLoss
from featcache.heads.solvers.scaled import even_slices, solve_ridge

# 45 values from 1e-6 to 1e5, the search space of DINOv2's linear evaluation on small sets (Oquab et al. 2023, appendix B.3)
_LOGISTIC = [{"C": float(f"{value:.4g}")} for value in np.logspace(-6, 5, 45)]
# the costs of VISSL's linear classification (Goyal et al. 2019, section 4)
_COSTS = [{"C": cost} for cost in (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)]
_SELECTING_ALPHA = 100.0
COARSE_CS = _LOGISTIC[::4]
ALPHAS = [{"alpha": float(f"{value:.4g}")} for value in np.logspace(6, -1, 15)]


_NEAR = 1.02  # times the lowest log-loss
_NEGLIGIBLE = 1e-3  # nats a row, below which one log-loss is as good as another
# Measured on real sets and on random problems, see ``_Race``.
_FIRST_C = 1e-3  # from where C are walked along
_LOOK, _SETTLED = 7e-3, 1e-7  # left of what a C has gained: to be looked at; settled
_DOUBT = 4.0  # roots of what is left, divided by that of the rows: how far a loss may be from its end
_LESS = 0.25  # of another's doubt: what it is of less to lessen
_LOOSE_TURNS, _MOST_TURNS = 20, 120
# Measured on real sets, parts of them and random problems, see ``_CostRace``.
_LEAST_RACED = 20_000_000  # rows x columns x classes, below which a race takes as long as solving all to their end
_LOOSE_COST = 1e-3  # left of a cost's objective, to be judged
_SURE_ROWS, _UNSURE = 2.0, 2.0  # right answers that a cost may gain or lose, and times those that its next step changes
_CHANCE = 2.0  # standard deviations of a difference by chance, that a cost is behind the best when it has lost
# Costs in succession that have lost, and times a cost up to which no answer has changed: greater ones are left out.
_LOST_COSTS, _SAME_COSTS = 2, 10
_JUDGED_ROWS = 256  # at a time
_MOST_LOSS = -np.log(np.finfo(np.float64).eps)  # of a row, as scores count it: of a class that no row trains


def _masks(folds: Sequence[Fold], count: int) -> list[NDArray[np.bool_]]:
    return [mask_of(fold.train, count) for fold in folds]


def near(losses: Iterable[float]) -> float:
    """Return up to where a log-loss, nats a row, is as good as the lowest of some."""
    return max(_NEAR * min(losses), _NEGLIGIBLE)


def first_near(losses: Sequence[float]) -> int:
    """Return which is the first of log-losses, nats a row, that is near to the lowest of them.

    So C is chosen, of the most regular models first: by the log-loss, since accuracies of a few hundred rows tie or differ
    by chance; and by no more than tells models apart (a margin as in Breiman et al. 1984, section 3.4.3, in place of its
    one standard error). benchmarks/choice.md has what other rules came to.
    """
    return int(np.argmax(np.array(losses) <= near(losses)))


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
        yield _with_heads(_candidate(params, solutions, (_blocks(X, fold.val) for fold in folds), classes), solutions)


def _blocks(X: Many, rows: NDArray[np.int64]) -> Iterator[X_]:
    """Yield some of the features (v, d) after others: a copy of all would be a fifth of them."""
    return (X[block] for block in np.array_split(rows, -(-len(rows) // _JUDGED_ROWS) or 1))


def _candidate(params: Params, solutions: Sequence[Solution], held: Iterable[Iterable[X_]], classes: int) -> Candidate:
    """Return what each fold's solution answers of the rows (v, d) that it is judged by, in blocks."""
    pairs = zip(solutions, held, strict=True)
    predictions = [probabilities(solution, rows, classes) for solution, blocks in pairs for rows in blocks]
    return Candidate(params, np.concatenate(predictions), all(solution.converged for solution in solutions))


def _with_heads(candidate: Candidate, solutions: Sequence[Solution]) -> Candidate:
    """Return a candidate with its solutions as heads, which take the features that the candidate was tried on."""
    return replace(candidate, solutions=tuple(make_pipeline(as_logistic(solution)) for solution in solutions))


class _Standing(NamedTuple):
    """The log-loss of a C on the rows held out, summed, and how far that may be from where it will be."""

    log_loss: float
    doubt: float

    @property
    def least(self) -> float:
        """The least that the log-loss may come to."""
        return self.log_loss - self.doubt if np.isfinite(self.doubt) else -np.inf


class _Race:
    """C against each other, ascending, until it is known which is the first whose log-loss held out is near the lowest.

    That loss falls with C and then rises, so that C are walked along from a middle one until it does. How far a C's loss may
    be from where it will be is told by the root of what its objective may still lose: no proof, but random problems are
    chosen as when every C is solved (benchmarks/speed/heads.py draws such).
    """

    def __init__(self, loss: TurnedLoss, y: Y_, folds: Sequence[Fold], Cs: Sequence[float], room: int) -> None:
        self.loss, self.Cs, self.room = loss, Cs, room
        self.y_held = [y[fold.val] for fold in folds]
        self.count = sum(map(len, self.y_held))
        self.standings: dict[int, _Standing] = {}
        self.models: dict[int, NDArray[Any]] = {}
        self.settled: set[int] = set()
        self.doubted = 1.0

    def along(self, step: int) -> None:
        """Race every so many C loosely, to where the loss has clearly risen on both sides of the lowest."""
        ordered = list(range(0, len(self.Cs), step))
        first = max((place for place, number in enumerate(ordered) if self.Cs[number] <= _FIRST_C), default=0)
        self._walk(ordered[first:])
        if first and not self.is_out(ordered[first]):
            self._walk(ordered[first::-1])

    def _walk(self, numbers: Sequence[int]) -> None:
        """Race one after another, each from where the last two point, until one is out, or its loss is negligible."""
        for place, number in enumerate(numbers):
            if number in self.standings:
                continue
            models = self.models[numbers[place - 1]] if place else solvers.constant_models(self.loss)
            if place > 1:
                ahead = np.log(self.Cs[number] / self.Cs[numbers[place - 1]])
                ahead /= np.log(self.Cs[numbers[place - 1]] / self.Cs[numbers[place - 2]])
                models = models + np.float32(np.clip(ahead, 0, 1)) * (models - self.models[numbers[place - 2]])
            # Beyond the lowest none comes first; before it only those that are out.
            ends = self.has_risen if numbers[0] < numbers[-1] else self.is_out
            if not self._look_at(number, models, ends) or self.is_in(number, 0.0):
                return

    def _look_at(self, number: int, models: NDArray[Any], ends: Callable[[int], bool]) -> bool:
        """Race one loosely, or to where it ends the walk; tell whether that goes on: few turns were enough."""
        group, number_of = self._group([number], models[None]), np.full(len(self.y_held), number)
        while not group.turns or (group.left.max() > _LOOK and group.turns < _LOOSE_TURNS):
            group.step()
            if is_judged := bool(group.arrived.any() and np.isfinite(group.left).all()):
                self._judge(group, number_of, [number])
                if len(self.standings) > 1 and ends(number):
                    return False
        if not is_judged:
            self._judge(group, number_of, [number])
        return bool(group.left.max() <= _LOOK) and not (len(self.standings) > 1 and ends(number))

    def between(self) -> None:
        """Race those too that may be the first near the lowest, or the lowest, each started between its neighbours."""
        while True:
            added = self._next() - self.standings.keys()
            models = {number: self._started(number) for number in added}
            self.models |= models
            self.standings |= dict.fromkeys(added, _Standing(np.inf, np.inf))
            self._decide()
            if not added:
                return

    def _next(self) -> set[int]:
        """Return which are where the loss is expected to come near the lowest, and where it is expected to be the lowest."""
        raced, first = sorted(self.standings), self.first()
        numbers = {self._vertex()}
        if (at := raced.index(first)) and raced[at - 1] < first - 1:
            numbers |= self._crossing(raced[at - 1], first)
        elif numbers <= {*raced} and not self.is_in(first, self._floor()):
            lowest = self._lowest()
            numbers = {number for number in (lowest - 1, lowest + 1) if 0 <= number < len(self.Cs)}
        return numbers

    def _crossing(self, before: int, first: int) -> set[int]:
        """Return which is expected to be the first near the lowest, and the one before, where a parabola leads there."""
        expected = self._parabola(first)
        limit = self._near(self.standings[self._lowest()].log_loss)
        between = range(before + 1, first)
        crossing = next((number for number in between if expected(number) <= limit), first)
        return {number for number in (crossing - 1, crossing) if before < number < first}

    def _lowest(self) -> int:
        return min(self.standings, key=lambda number: self.standings[number].log_loss)

    def _floor(self) -> float:
        """Return how low the loss may be of one beside the lowest that is not raced."""
        lowest = self._lowest()
        log_loss, doubt = self.standings[lowest]
        if {lowest - 1, lowest + 1} - self.standings.keys() - {-1, len(self.Cs)}:
            parabola = self._parabola(lowest)
            log_loss -= 2 * max(0.0, log_loss - min(parabola(lowest + step) for step in np.linspace(-1, 1, 21)))
        return log_loss - doubt

    def _parabola(self, number: int) -> Callable[[float], float]:
        """Return the parabola through the losses of one and of those raced on both sides of it, or the nearest ones."""
        raced = sorted(self.standings)
        place = int(np.clip(raced.index(number) - 1, 0, max(0, len(raced) - 3)))
        at = raced[place : place + 3]
        losses = [self.standings[number].log_loss for number in at]
        shape = np.polyfit(np.array(at) - number, losses, len(at) - 1)
        return lambda where: float(np.polyval(shape, where - number))

    def _started(self, number: int) -> NDArray[Any]:
        """Return models between those of its neighbours."""
        raced = sorted(self.models)
        low = max((other for other in raced if other < number), default=raced[0])
        high = min((other for other in raced if other > number), default=raced[-1])
        share = np.float32((number - low) / (high - low) if high > low else 0)
        models: NDArray[Any] = self.models[low] + share * (self.models[high] - self.models[low])
        return models

    def _vertex(self) -> int:
        """Return where a parabola through the lowest and those raced next to it has its lowest point."""
        raced = sorted(self.standings)
        place = raced.index(min(raced, key=lambda number: self.standings[number].log_loss))
        if place in (0, len(raced) - 1):
            return raced[place]
        at = raced[place - 1 : place + 2]
        (curvature, slope, _) = np.polyfit(np.array(at) - at[1], [self.standings[number].log_loss for number in at], 2)
        return int(np.clip(round(at[1] - slope / (2 * curvature)), at[0] + 1, at[2] - 1)) if curvature > 0 else at[1]

    def first(self) -> int:
        """Return which is the first near the lowest, as far as is known."""
        limit = self._near(min(log_loss for log_loss, _ in self.standings.values()))
        return min(number for number, standing in self.standings.items() if standing.log_loss <= limit)

    def is_out(self, number: int) -> bool:
        """Tell whether one is surely not near the lowest."""
        return self.standings[number].least > self._near(min(sum(standing) for standing in self.standings.values()))

    def has_risen(self, number: int) -> bool:
        """Tell whether one's loss is surely above the lowest."""
        return self.standings[number].least > min(sum(standing) for standing in self.standings.values())

    def is_in(self, number: int, lowest: float | None = None) -> bool:
        """Tell whether one is surely near the lowest, or a loss that is given."""
        if lowest is None:
            lowest = min(standing.least for standing in self.standings.values())
        return sum(self.standings[number]) <= self._near(lowest)

    def _near(self, lowest: float) -> float:
        return near([lowest / self.count]) * self.count

    def is_decided(self) -> bool:
        """Tell whether the first is surely near the lowest, and all before it surely are not."""
        first = self.first()
        return self.is_in(first) and all(self.is_out(number) for number in self.standings if number < first)

    def won(self, grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold]) -> Raced | None:
        """Solve the first near the lowest to its end, and those that leave it in doubt; ``None`` where none has an end."""
        ended: dict[int, Candidate] = {}
        tried, y_true = len(self.standings), np.concatenate(self.y_held)
        while self.standings:
            if self.first() in ended:
                self._decide()  # an end may be further than was doubted
            number = self.first()
            if number in ended:
                if self.is_decided():
                    return Raced(ended[number], tried, tried - len(self.standings), self.loss.folds[0].whole_axes)
                number = self._doubtful(ended)
            candidate = ended[number] = self._solved(grid[number], number, X, y, folds)
            if not candidate.converged:
                del self.standings[number]
                continue
            self._note(number, self.count * log_loss(y_true, candidate.answers), 0.0)
            self.settled.add(number)
        return None

    def _doubtful(self, ended: Collection[int]) -> int:
        """Return one whose loss in doubt keeps the first from being decided: it may be the lowest, or come before."""
        open_numbers = [number for number in self.standings if number not in ended]
        before = [number for number in open_numbers if number < self.first() and not self.is_out(number)]
        if before and self.is_in(self.first()):
            return min(before)
        return min(open_numbers, key=lambda number: self.standings[number].least)

    def _solved(self, params: Params, number: int, X: X_, y: Y_, folds: Sequence[Fold]) -> Candidate:
        tolerance = solvers.tolerance_of(sum(len(fold.train) for fold in folds) * X.shape[1] * self.loss.outputs)
        solutions = solvers.finish(self.loss, self.Cs[number], self.models[number], tolerance)
        for place, fold in enumerate(folds):
            if not solutions[place].converged:  # float32, or a gradient, is not enough to prove it
                ((solutions[place],),) = solvers.solve(X, y, [self.Cs[number]], [mask_of(fold.train, len(y))])
        held = (_blocks(X, fold.val) for fold in folds)
        return _with_heads(_candidate(params, solutions, held, self.loss.outputs), solutions)

    def _group(self, numbers: Sequence[int], models: NDArray[Any]) -> SideBySide:
        """Return some C on every fold side by side, from models (c, f, k, r + 1); fold by fold."""
        Cs = np.tile([self.Cs[number] for number in numbers], len(self.y_held))
        by_fold = np.swapaxes(models, 0, 1).reshape(-1, *models.shape[2:])
        return SideBySide(self.loss, np.repeat(np.arange(len(self.y_held)), len(numbers)), Cs, by_fold)

    def _decide(self) -> None:
        """Let those that matter go on until all is decided, in this order as many side by side as there is room for."""
        taken = SideBySide.room(self.loss.outputs, self.loss.width, max(self.loss.counts))
        together = max(1, self.room // (len(self.y_held) * taken))
        turns = 0
        while turns < _MOST_TURNS and not self.is_decided():
            # The most doubtful first; of those not raced yet the greatest C, whose loss says what is near the lowest.
            company = sorted(self._open(), key=lambda number: (-self.standings[number].doubt, -number))[:together]
            if not company:
                return
            group = self._group(company, np.stack([self.models[number] for number in company]))
            number_of = np.tile(company, len(self.y_held))
            while len(number_of) and not group.descents.stalled.all():
                group.step()
                if group.turns == 1 or not group.arrived.any():
                    continue
                self._judge(group, number_of, {*number_of[group.arrived].tolist()})
                is_open = self._open()
                # One that was out before the lowest loss was known better, and has been left behind: all of them again.
                if (
                    self.is_decided()
                    or group.turns + turns >= _MOST_TURNS
                    or (len(company) < together and is_open - {*number_of})
                ):
                    break
                goes_on = np.isin(number_of, [*is_open])
                group.keep(goes_on)
                number_of = number_of[goes_on]
            turns += group.turns

    def _open(self) -> set[int]:
        """Return those that are to go on: of two that keep the first from being decided the more doubtful, or both."""
        first, lowest = self.first(), min(self.standings, key=lambda number: sum(self.standings[number]))
        pairs = [(number, lowest) for number in self.standings if number < first and not self.is_out(number)]
        pairs += [(first, number) for number in self.standings if not self.is_in(first, self.standings[number].least)]
        doubt = {number: standing.doubt for number, standing in self.standings.items()}
        is_open = {pair[place] for pair in pairs for place in (0, 1) if doubt[pair[place]] >= _LESS * doubt[pair[1 - place]]}
        return is_open - self.settled

    def _judge(self, group: SideBySide, number_of: NDArray[Any], numbers: Collection[int]) -> None:
        """Note how some C stand."""
        seen, is_new = np.zeros((2, len(number_of))), np.isin(number_of, [*numbers])
        for fold, y_true in enumerate(self.y_held):
            index = np.flatnonzero(is_new & (group.fold_of == fold))
            if len(index) and len(y_true):
                models = np.concatenate([group.weights[index], group.ahead[index]])
                seen[:, index] = self._log_losses(fold, models).reshape(2, -1)
        for number in numbers:
            of = number_of == number
            self.models[number] = group.weights[of]
            log_loss, ahead = (float(total) for total in seen[:, of].sum(axis=1))
            left = float(group.left[of].max())
            # Errors of rows cancel in part, the more of them there are.
            doubt = max(abs(ahead - log_loss), _DOUBT * log_loss * (left / self.count) ** 0.5)
            self._note(number, log_loss, doubt)
            if left < _SETTLED or group.descents.stalled[of].any():
                self.settled.add(number)

    def _log_losses(self, fold: int, models: NDArray[Any]) -> NDArray[np.float64]:
        """Return the log-losses (p,) of models (p, k, r + 1) of a fold on its rows held out, summed."""
        held, y_true, flat = self.loss.held[fold], self.y_held[fold], models.reshape(-1, self.loss.width)

        def of_block(block: slice) -> NDArray[np.float64]:
            return _losses((flat @ held[block].T).reshape(*models.shape[:2], -1), y_true[block])

        shares = self.loss.shares_of_work(flat.size * len(held))
        blocks = even_slices(len(held), _JUDGED_ROWS, shares)
        losses: NDArray[np.float64] = np.sum(self.loss.threads.map(of_block, blocks, shares), axis=0)
        return losses

    def _note(self, number: int, log_loss: float, doubt: float) -> None:
        """Note where one stands. Has it moved by more than was doubted of it, all are doubted so many times more."""
        before = self.standings.get(number)
        if before is not None and 0 < before.doubt < np.inf:
            more = max(1.0, abs(log_loss - before.log_loss) / before.doubt)
            self.doubted *= more
            self.standings = {
                key: standing._replace(doubt=more * standing.doubt) for key, standing in self.standings.items()
            }
        self.standings[number] = _Standing(log_loss, self.doubted * doubt)


def _losses(outputs: NDArray[Any], y_true: Y_) -> NDArray[np.float64]:
    """Return the log-losses (p,) of models with outputs (p, k, v), each row's as far as scores count it."""
    highest = outputs.max(axis=1)
    of_truth = outputs[:, y_true, np.arange(len(y_true))]
    spent = np.log(np.exp(outputs - highest[:, None]).sum(axis=1)) + highest - of_truth
    total: NDArray[np.float64] = np.minimum(spent, _MOST_LOSS).sum(axis=1, dtype=np.float64)
    return total


def race_logistic(grid: Sequence[Params], coarse: int, X: X_, y: Y_, folds: Sequence[Fold]) -> Raced | None:
    """Return the first of ascending C whose log-loss is near the lowest, solved to its end; ``None`` of too many rows.

    Every ``coarse``-th is tried first. Those that were left in the race are no worse candidates for it: they were tried.
    """
    Cs = [params["C"] for params in grid]
    with solvers.turned_folds(X, y, [(fold.train, fold.val) for fold in folds]) as loss:
        if loss is None:
            return None
        race = _Race(loss, y, folds, Cs, solvers.room_of(X))
        race.along(coarse)
        race.between()
        return race.won(grid, X, y, folds)


def _fit_logistic(params: Params, X: Many, y: Y_, _: int) -> tuple[Pipeline, bool]:
    ((solution,),) = solvers.solve(X, y, [params["C"]])
    return make_pipeline(as_logistic(solution)), solution.converged


def _refit_logistic(params: Params, X: X_, y: Y_, rows: NDArray[np.int64], near: Any) -> tuple[Pipeline, bool]:
    """Fit from where the search's heads of this C, which trained on parts of the rows, are on average."""
    models = [linear_weights(head, int(y.max()) + 1) for head in near.solutions]
    weights, intercept = (np.mean(parts, axis=0) for parts in zip(*models, strict=True))
    (solution,) = solvers.solve_from(X, y, params["C"], (weights, intercept), [rows], near.axes)
    return make_pipeline(as_logistic(solution)), solution.converged


def _cross_logistic(params: Params, X: X_, y: Y_, folds: Sequence[Fold], head: Pipeline, axes: Any) -> Candidate:
    """Fit on each fold's train from where the head of all rows is, which has seen but a few more."""
    classes = int(y.max()) + 1
    model = linear_weights(head, classes)
    solutions = solvers.solve_from(X, y, params["C"], model, [fold.train for fold in folds], axes)
    return _candidate(params, solutions, (_blocks(X, fold.val) for fold in folds), classes)


def _signs(y: Y_, classes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return the outputs of one against the rest (n, k) bool; of two classes only the second is one."""
    return np.equal(y[:, None], classes if len(classes) > 2 else classes[1:])


class _Loose(NamedTuple):
    """A cost that was solved loosely: its models (f, k, r + 1), and which of the rows held out they have right (v,).

    ``unsure``: how many of these the next step would change. ``fits``: weights are more of the objective than losses are, so
    that models near their limit, whatever the cost.
    """

    models: NDArray[Any]
    is_right: NDArray[np.bool_]
    unsure: int
    fits: bool

    @property
    def score(self) -> int:
        """How many rows it has right."""
        return int(np.count_nonzero(self.is_right))


class _CostRace:
    """Costs of an SVM against each other: which has the most rows held out right, of equals the first that is given.

    The greatest seldom win, and would take most of the time. So each is solved loosely, the least first, until two in
    succession have clearly lost, or answers no longer change; those that may have won are solved to their end. That is no
    proof: on all of the real sets the cost is that of solving all, of 148 random problems it was on 147, and on the other
    one row apart.
    """

    def __init__(self, loss: TurnedLoss, y: Y_, folds: Sequence[Fold], costs: Sequence[float]) -> None:
        self.loss, self.costs, self.classes = loss, costs, np.unique(y)
        self.y_held = [y[fold.val] for fold in folds]
        self.loose: dict[int, _Loose] = {}
        self.doubted = 1.0

    def walk(self) -> None:
        """Solve costs loosely, each started from the last, until greater ones can hardly win."""
        lost, before, same_since = 0, None, np.inf
        for number in np.argsort(self.costs, kind="stable").tolist():
            cost, models = self.costs[number], before.models if before else solvers.constant_models(self.loss)
            loose = self.loose[number] = self._loosely(cost, models)
            best = max(self.loose.values(), key=lambda each: each.score)
            apart = np.count_nonzero(best.is_right != loose.is_right)
            is_lost = best.score - loose.score > max(self._doubt(loose), _CHANCE * apart**0.5)
            lost = lost + 1 if is_lost else 0
            is_same = before is not None and loose.fits and np.array_equal(before.is_right, loose.is_right)
            same_since = min(same_since, cost) if is_same else np.inf
            if lost == _LOST_COSTS or cost >= _SAME_COSTS * same_since:
                return
            before = loose

    def _loosely(self, cost: float, models: NDArray[Any]) -> _Loose:
        group = SideBySide(self.loss, np.arange(len(models)), np.full(len(models), cost), models)
        is_near = False
        while not is_near and group.turns < _MOST_TURNS and not group.descents.stalled.all():
            group.step()
            is_near = bool(group.left.max() <= _LOOSE_COST)
        is_right = self._right(group.weights)
        unsure = int(np.count_nonzero(is_right != self._right(group.ahead)))
        by_weights = np.einsum("pkr,pkr->p", *[group.weights[:, :, :-1]] * 2, dtype=np.float64)
        return _Loose(group.weights, is_right, unsure, bool((by_weights >= group.descents.values).all()))

    def _right(self, models: NDArray[Any]) -> NDArray[np.bool_]:
        """Return which rows held out models (f, k, r + 1) have right."""
        by_fold = zip(models, self.loss.held, self.y_held, strict=True)
        return np.concatenate([_classes_by_score(held @ model.T, self.classes) == y for model, held, y in by_fold])

    def _doubt(self, loose: _Loose) -> float:
        """Return by how much a cost's number of right answers may change on the way to its end."""
        return self.doubted * (_SURE_ROWS + _UNSURE * loose.unsure)

    def won(self, solved: Callable[[int, NDArray[Any]], Candidate]) -> Raced | None:
        """Solve those that may have won, by their number and models, the likeliest first; ``None`` where none has an end."""
        ended: dict[int, tuple[int, Candidate]] = {}
        open_numbers, y_true = {*self.loose}, np.concatenate(self.y_held)
        while open_numbers:
            number = min(open_numbers, key=lambda each: (-self.loose[each].score, each))
            candidate = solved(number, self.loose[number].models)
            open_numbers.remove(number)
            if not candidate.converged:
                del self.loose[number]
                continue
            count = int(np.count_nonzero(candidate.answers == y_true))
            ended[number] = count, candidate
            # Where more has changed than was doubted, all are doubted so many times more.
            self.doubted *= max(1.0, abs(count - self.loose[number].score) / self._doubt(self.loose[number]))
            best = min(ended, key=lambda each: (-ended[each][0], each))
            most = {each: self.loose[each].score + self._doubt(self.loose[each]) for each in open_numbers}
            open_numbers = {each for each in most if (-most[each], each) < (-ended[best][0], best)}
        return Raced(ended[best][1], len(self.costs), len(self.costs) - len(self.loose)) if ended else None


def race_svm(grid: Sequence[Params], _: int, X: X_, y: Y_, folds: Sequence[Fold]) -> Raced | None:
    """Return the first cost of those with the most rows held out right, at its end; ``None`` of too few or too many rows."""
    classes, costs = np.unique(y), [params["C"] for params in grid]
    if sum(len(fold.train) for fold in folds) * X.shape[1] * len(classes) < _LEAST_RACED:
        return None
    X = normalize(X)
    signs, splits = _signs(y, classes), [(fold.train, fold.val) for fold in folds]
    with solvers.turned_folds(X, signs, splits, loss="squared_hinge", standardise=False) as loss:
        if loss is None:
            return None

        def solved(number: int, models: NDArray[Any]) -> Candidate:
            solutions = solvers.finish(loss, costs[number], models, solvers.TOLERANCE)
            for place, mask in enumerate(_masks(folds, len(y))):
                if not solutions[place].converged:
                    ((solutions[place],),) = _solve_svm(X, signs, [costs[number]], [mask], solvers.TOLERANCE)
            return _svm_candidate(grid[number], solutions, X, folds, classes)

        race = _CostRace(loss, y, folds, costs)
        race.walk()
        return race.won(solved)


def _solve_svm(
    X: X_,
    signs: NDArray[np.bool_],
    costs: Sequence[float],
    masks: Sequence[NDArray[np.bool_]] | None = None,
    tolerance: float | None = None,
) -> list[list[Solution]]:
    return solvers.solve(X, signs, costs, masks, loss="squared_hinge", standardise=False, tolerance=tolerance)


def _sweep_svm(grid: Sequence[Params], X: X_, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    # Unit length: a hinge's margin of 1 then means the same for features of any scale.
    X, classes = normalize(X), np.unique(y)
    # Accuracies choose, and do not move below that (the same costs on six small sets): only the refit goes further.
    costs, share = [params["C"] for params in grid], solvers.TOLERANCE
    by_fold = _solve_svm(X, _signs(y, classes), costs, _masks(folds, len(y)), share)
    for params, solutions in zip(grid, zip(*by_fold, strict=True), strict=True):
        yield _svm_candidate(params, solutions, X, folds, classes)


def _svm_candidate(
    params: Params, solutions: Sequence[Solution], X: X_, folds: Sequence[Fold], classes: NDArray[np.int64]
) -> Candidate:
    """Return what each fold's solution answers of its val, given rows of unit length (n, d)."""
    predictions = [
        _classes_by_score(
            X[fold.val] @ solution.coefficients.T.astype(X.dtype) + solution.intercept.astype(X.dtype), classes
        )
        for solution, fold in zip(solutions, folds, strict=True)
    ]
    return Candidate(params, np.concatenate(predictions), all(solution.converged for solution in solutions))


def _classes_by_score(scores: NDArray[Any], classes: NDArray[np.int64]) -> Y_:
    """Return the classes (n,) of scores (n, k), of two classes (n, 1)."""
    chosen: Y_ = classes[(scores[:, 0] > 0).astype(int) if len(classes) == 2 else scores.argmax(axis=1)]
    return chosen


def _fit_svm(params: Params, X: X_, y: Y_, _: int) -> tuple[Pipeline, bool]:
    classes = np.unique(y)
    ((solution,),) = _solve_svm(normalize(X), _signs(y, classes), [params["C"]])
    head = LinearSVC(C=params["C"])
    head.classes_, head.n_features_in_, head.n_iter_ = classes, X.shape[1], solution.iterations
    head.coef_, head.intercept_ = solution.coefficients, solution.intercept
    return make_pipeline(Normalizer().fit(X), head), solution.converged


def _sweep_ridge(grid: Sequence[Params], X: Many, y: Y_, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    alphas = [params["alpha"] for params in grid]

    def attempt(fold: Fold) -> list[Y_]:
        classes = np.unique(y[fold.train])
        solutions = solve_ridge(X, 2.0 * _signs(y, classes) - 1, alphas, mask_of(fold.train, len(y)))
        held = np.asarray(X[fold.val], np.float64)
        # What the head that is refitted says: made and asked for each alpha, scikit-learn's would take a millisecond more.
        return [_classes_by_score(held @ weights.T + intercept, classes) for weights, intercept in solutions]

    for params, predictions in zip(grid, zip(*side_by_side(attempt, folds), strict=True), strict=True):
        yield Candidate(params, np.concatenate(predictions))


def _fit_ridge(params: Params, X: Many, y: Y_, _: int) -> tuple[Pipeline, bool]:
    classes = np.unique(y)
    ((coefficients, intercept),) = solve_ridge(X, 2.0 * _signs(y, classes) - 1, [params["alpha"]])
    return make_pipeline(_ridge(classes, coefficients, intercept, params["alpha"])), True


def _ridge(classes: NDArray[np.int64], coefficients: NDArray[Any], intercept: NDArray[Any], alpha: float) -> RidgeClassifier:
    head = RidgeClassifier(alpha=alpha)
    head._label_binarizer = LabelBinarizer(pos_label=1, neg_label=-1).fit(classes)  # noqa: SLF001 - what older versions read
    if not hasattr(head, "classes_"):
        head.classes_ = classes
    head.coef_, head.intercept_, head.n_features_in_ = coefficients, intercept, coefficients.shape[1]
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
        yield _candidate(params, solutions, ([val] for _, val in rows), classes)


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
LOGISTIC = HeadFamily(
    lambda _: list(_LOGISTIC),
    _sweep_logistic,
    _fit_logistic,
    coarse=4,
    streams=True,
    race=race_logistic,
    refit=_refit_logistic,
    cross=_cross_logistic,
    by_loss=True,
)
SVM = HeadFamily(lambda _: list(_COSTS), _sweep_svm, _fit_svm, race=race_svm)
RIDGE = HeadFamily(lambda _: list(ALPHAS), _sweep_ridge, _fit_ridge, streams=True)
