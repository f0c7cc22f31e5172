"""Descents that are driven from outside, so that many problems share what each evaluation costs: L-BFGS and Newton."""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve, eigvalsh_tridiagonal

Floats = NDArray[np.float64]
Precondition = Callable[[Floats], Floats]

_MEMORY = 12  # pairs of steps that the inverse Hessian is made of (Nocedal and Wright: 3 to 20)
_SUFFICIENT = 1e-4
_SMALLEST_STEP = 1e-6
_NOISE = {False: 3e-7, True: 1e-15}  # of a value, by whether it was computed in float64
_SHORTEST = 1e-10  # of a Newton step: below it rounding decides
_ENOUGH = 0.4  # of the goal, that conjugate gradients may leave where the step will be the last
_NEAR = 30.0  # goals: a step that promises less is hoped to be the last
_NEAR_ASIDE = 10.0  # the same, where problems go down side by side
_FORCING = 0.1  # of the gradient, that they may leave where it will not
_FLAT = 1e-12
_TINY = 1e-9
_MOST_BENDS, _MOST_STEPS = 300, 60  # of one step; of one problem
_WHOLE_STEPS = 20  # 17 at most of 195 random problems of 198, the others had no end
_FEWEST = 3  # products with the second derivatives, before which their spectrum is not believed
_MARGIN, _DOUBT = 1.25, 1.5  # of what a second-order model promises; of what is left of it, seen through that spectrum
_LOOSEST, _TIGHTEST = 0.4, 0.2  # of the gradient, that they may leave where problems go down side by side
_MOST_BENDS_ASIDE = 40  # of one step there
_MOST_MEASURE = 1e30
_OVER = 0.5  # of the slope at a step's start, that it may rise at its end
_FAR = 0.03  # of the value, left above which models are believed less
_MISSED, _MOST_MISSED = 2.0, 20.0
_HALVINGS = 50  # of a step, to find where it leads lowest
_IDLE = 3  # steps in succession that gain no more than rounding


class LBFGS:
    """One smooth convex problem on its way down (Nocedal and Wright 2006, algorithm 7.5; backtracking line search).

    Ask for ``trial``, evaluate there, ``tell`` the value and the gradient; until ``done``. ``decrement`` estimates how far
    the value is above the optimum: half of g'Hg, H the current inverse Hessian. ``gained`` is what the last step brought.
    """

    def __init__(self, start: Floats, precondition: Precondition = lambda gradient: gradient) -> None:
        self.point = start
        self.trial = start
        self.value = np.inf
        self.decrement = np.inf
        self.gained = 0.0
        self.iterations = 0
        self.stalled = False
        self.gradient: Floats = np.zeros_like(start)
        self.precondition = precondition
        self._pairs: deque[tuple[Floats, Floats, float]] = deque(maxlen=_MEMORY)
        self._direction = np.zeros_like(start)
        self._slope = 0.0
        self._step = 1.0

    def tell(self, value: float, gradient: Floats, *, precise: bool = False) -> None:
        """Take the value and the gradient at ``trial``; move there, or try a shorter step."""
        if np.isinf(self.value):
            self._accept(value, gradient)
            return
        noise = _NOISE[precise] * abs(self.value)
        if np.isfinite(value) and value <= self.value + _SUFFICIENT * self._step * self._slope + noise:
            move, change = self.trial - self.point, gradient - self.gradient
            curved = float(np.vdot(move, change))
            if curved > 1e-10 * float(np.linalg.norm(move)) * float(np.linalg.norm(change)):
                self._pairs.append((move, change, 1 / curved))
            self.iterations += 1
            self.gained = self.value - value
            self._accept(value, gradient)
            return
        parabola = -self._slope * self._step**2 / (2 * max(value - self.value - self._step * self._slope, 1e-300))
        shorter = parabola if np.isfinite(parabola) else 0.0
        self._step = float(np.clip(shorter, 0.1 * self._step, 0.5 * self._step))
        if self._step < _SMALLEST_STEP:
            self.stalled = True
        self.trial = self.point + self._step * self._direction

    def restart(self) -> None:
        """Evaluate again where it stands, as when the precision has changed; what was learned of the curvature is kept."""
        self.trial, self.value, self.stalled = self.point, np.inf, False

    def _accept(self, value: float, gradient: Floats) -> None:
        self.point, self.value, self.gradient = self.trial, value, gradient
        direction = self._two_loops()
        slope = float(np.vdot(gradient, direction))
        if slope >= 0 and self._pairs:
            self._pairs.clear()
            direction = -self.precondition(gradient)
            slope = float(np.vdot(gradient, direction))
        self._direction, self._slope, self._step = direction, slope, 1.0
        self.decrement = -slope / 2
        self.stalled = slope >= 0 and bool(gradient.any())
        self.trial = self.point + direction

    def _two_loops(self) -> Floats:
        direction, shares = self.gradient, []
        for move, change, inverse in reversed(self._pairs):
            share = inverse * float(np.vdot(move, direction))
            direction = direction - share * change
            shares.append(share)
        direction = self.precondition(direction)
        for (move, change, inverse), share in zip(self._pairs, reversed(shares), strict=True):
            direction = direction + (share - inverse * float(np.vdot(change, direction))) * move
        return -direction


class Descents:
    """Convex problems on their way down side by side, each by Newton steps that conjugate gradients look for.

    (Nocedal and Wright 2006, algorithm 7.1; Eisenstat and Walker 1996, choice 1, of how far they look.) Driven from outside:
    ``begin``; while some ``waits`` tell them what they ``look`` at, ``lengths`` of their moves from where they stand; then
    ``tell`` of those that bend the second derivative along their vector of ``asked``, of the others the gradient there, and
    ``turn`` with an approximate inverse of the second derivatives times ``rests``.

    Args:
        points: from where they start (p, k, r + 1).
        tolerance: the share of a value to which half of the squared gradient by the weights is to fall in the end; ``None``
            where steps need not lead there.
    """

    def __init__(self, points: NDArray[Any], tolerance: float | None = None) -> None:
        count = len(points)
        self.points, self._tolerance = points, tolerance
        self.moves, self.directions, self.gradients, self.rests = (np.zeros_like(points) for _ in range(4))
        self.values, self.decrements = np.full(count, np.inf), np.full(count, np.inf)
        self.bends, self.stalled, self.arrived = (np.zeros(count, bool) for _ in range(3))
        self.lengths, self.strides = np.ones(count), np.zeros(count)  # of moves, and of the last directions in them
        self._slopes, self._forcing = np.zeros(count), np.full(count, _LOOSEST)
        # Squared lengths of what conjugate gradients leave, now and at first, and what they promise to gain.
        self._measures, self._firsts, self._promised = np.zeros(count), np.zeros(count), np.zeros(count)
        self._missed = np.full(count, _MISSED)  # by how much the first length tells less than they then find
        self._counts, self._idle = np.zeros(count, np.int64), np.zeros(count, np.int64)

    @property
    def asked(self) -> NDArray[Any]:
        """Directions (p, k, r + 1) of those that bend, of the others where they look."""
        if self.bends.all():
            return self.directions
        trials: NDArray[Any] = self.points + _each(self.lengths, self.points) * self.moves
        return np.where(self.bends[:, None, None], self.directions, trials) if self.bends.any() else trials

    @property
    def ahead(self) -> NDArray[Any]:
        """The steps (p, k, r + 1) as far as they are found: at first where the approximate second derivatives lead."""
        return np.where((self._counts > 0)[:, None, None], self.moves, self.directions)

    @property
    def waits(self) -> NDArray[np.bool_]:
        """Which have still to look (p,)."""
        waits: NDArray[np.bool_] = ~(self.bends | self.arrived | self.stalled)
        return waits

    def begin(self) -> None:
        """Begin a turn."""
        self.arrived = np.zeros(len(self.values), bool)

    def look(self, values: Floats, ends: Floats) -> None:
        """Take values and slopes along the moves (p,): who looks has arrived there, or is to look nearer."""
        waits, is_first = self.waits, np.isinf(self.values)
        rounding = _NOISE[self.points.dtype == np.float64] * np.abs(np.where(is_first, 0, self.values))
        promised = np.where(is_first, np.inf, self.values + _SUFFICIENT * self.lengths * self._slopes + rounding)
        is_lower = waits & np.isfinite(values) & (values <= promised)
        # Where the first rows come right the curvature falls, and steps lead across the valley: half of one leads lower.
        is_over = is_lower & ~is_first & (ends > _OVER * -self._slopes) & (self.lengths == 1)
        is_over &= -self._slopes > _TINY * np.abs(values)
        arrived = is_lower & ~is_over
        refused = waits & ~arrived
        self.arrived = self.arrived | arrived
        self._idle = np.where(arrived & ~is_first & (self.values - values <= rounding), self._idle + 1, self._idle)
        if refused.any():
            with np.errstate(over="ignore", invalid="ignore"):
                self.lengths = np.where(refused, self._shorter(values, ends), self.lengths)
        self.values = np.where(arrived, values, self.values)
        # Who cannot go on has arrived too: there is nowhere else to stand.
        self.stalled = self.stalled | (refused & (self.lengths < _SMALLEST_STEP)) | (self._idle >= _IDLE)

    def tell(self, vectors: NDArray[Any]) -> None:
        """Take gradients, or second derivatives (p, k, r + 1), and let those that have arrived move."""
        if self.bends.any():
            self._bend(vectors if self.bends.all() else np.where(self.bends[:, None, None], vectors, 0))
        if self.arrived.all():
            self.points = self.points + _each(self.lengths, self.points) * self.moves
            self.gradients, self.rests, self.moves = vectors, vectors.copy(), np.zeros_like(self.moves)
        elif self.arrived.any():
            here = np.flatnonzero(self.arrived)
            self.points[here] += _each(self.lengths[here], self.points) * self.moves[here]
            self.gradients[here] = self.rests[here] = vectors[here]
            self.moves[here] = 0

    def _bend(self, vectors: NDArray[Any]) -> None:
        curved = _dots(self.directions, vectors)
        is_curved = self.bends & (curved > 0) & np.isfinite(curved)
        lengths = self.strides = np.where(is_curved, self._measures / np.where(is_curved, curved, 1), 0)
        self.moves += _each(lengths, vectors) * self.directions
        self.rests += _each(lengths, vectors) * vectors
        self._promised += lengths * self._measures / 2
        self._counts += self.bends
        self._counts[self.bends & ~is_curved] = _MOST_BENDS_ASIDE

    def _shorter(self, values: Floats, ends: Floats) -> Floats:
        """Return the lengths (p,) to try where steps were too long, as values there say, or slopes."""
        starts, lengths = self._slopes, self.lengths
        lost = values - self.values - lengths * starts
        by_values = -starts * lengths**2 / (2 * np.maximum(lost, 1e-300))
        is_over = ends > _OVER * -starts
        middle = starts + ends - 3 * (values - self.values)  # the cubic of both values and slopes (Nocedal and Wright, 3.59)
        root = np.sqrt(np.maximum(middle**2 - starts * ends, 0))
        by_slopes = 1 - (ends + root - middle) / np.where(is_over, ends - starts + 2 * root, 1)
        by_values = np.clip(np.where(np.isfinite(by_values), by_values, 0), 0.1 * lengths, 0.5 * lengths)
        by_ends: NDArray[np.bool_] = is_over & (lengths == 1) & np.isfinite(by_slopes)
        return np.where(by_ends, np.clip(by_slopes, 0.1, 0.9), by_values)

    def turn(self, turned: NDArray[Any]) -> None:
        """Take an approximate inverse times ``rests``: conjugate gradients start, go on, or have a step to be tried."""
        measures, arrived, goes_on = _dots(self.rests, turned), self.arrived, self.bends
        is_lost = ~(measures <= _MOST_MEASURE)  # beyond float32: whoever asked goes another way
        if is_lost.any():
            self.stalled |= is_lost
            measures[is_lost], self.rests[is_lost], self.directions[is_lost] = 0, 0, 0
            turned = np.where(is_lost[:, None, None], 0, turned)
        if arrived.any():
            self._arrive(measures)
        shares = np.where(goes_on, measures / np.where(self._measures > 0, self._measures, 1), np.where(arrived, 0, 1))
        self.directions *= _each(shares, turned)
        self.directions -= turned if (arrived | goes_on).all() else np.where((arrived | goes_on)[:, None, None], turned, 0)
        self._measures = np.where(arrived | goes_on, measures, self._measures)
        enough = goes_on & (self._is_enough() | (self._counts >= _MOST_BENDS_ASIDE))
        self.bends = (goes_on & ~enough) | arrived
        self.lengths[enough] = 1.0
        if enough.any():
            self._slopes = np.where(enough, np.minimum(_dots(self.gradients, self.moves), 0), self._slopes)

    def _arrive(self, measures: Floats) -> None:
        """Note what is left where problems have moved to, and how far the model was to be believed on the way."""
        came = self.arrived & (self._firsts > 0)
        before = np.sqrt(np.where(came, self._firsts, 1))
        differs = np.abs(np.sqrt(np.maximum(measures, 0)) - np.sqrt(np.maximum(self._measures, 0))) / before
        missed = 2 * self._promised / np.where(came, self._firsts, 1)
        self._missed = np.where(came, np.clip(missed, 1.0, _MOST_MISSED), self._missed)
        self.decrements = np.where(self.arrived, self._missed * measures / 2, self.decrements)
        differs = np.where(self.decrements > _FAR * self.values, _LOOSEST, np.clip(differs, _TIGHTEST, _LOOSEST))
        self._forcing = np.where(came, differs, self._forcing)
        self._firsts = np.where(self.arrived, measures, self._firsts)
        self._promised[self.arrived], self._counts[self.arrived] = 0, 0

    def _is_enough(self) -> NDArray[np.bool_]:
        is_far: NDArray[np.bool_] = self._measures <= self._forcing**2 * self._firsts
        if self._tolerance is None:
            return is_far
        goal = self._tolerance * self.values
        by_weights = _dots(self.rests, self.rests) - np.einsum("pk,pk->p", self.rests[:, :, -1], self.rests[:, :, -1])
        is_last: NDArray[np.bool_] = by_weights / 2 <= _ENOUGH * goal
        return is_last | (is_far & (self._promised > _NEAR_ASIDE * goal))

    def keep(self, is_open: NDArray[np.bool_]) -> None:
        """Leave the other problems where they are."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                setattr(self, name, value[is_open])


def _dots(vectors: NDArray[Any], by: NDArray[Any]) -> Floats:
    """Return the inner product (p,) of each problem's vectors (p, k, r)."""
    return np.array([np.vdot(*pair) for pair in zip(vectors, by, strict=True)], np.float64)


def _each(values: Floats, like: NDArray[Any]) -> NDArray[Any]:
    """Return a number for each problem (p, 1, 1), in the vectors' precision."""
    return values[:, None, None].astype(like.dtype)


def of_squared_hinge(
    rows: Floats, gram: Floats | None, signs: Floats, start: tuple[Floats, float], C: float
) -> tuple[Floats, float]:
    """Return the weights (d,) and intercept of one label's squared hinge, from near ones, by Newton's method.

    Each step leads to the least squares of the rows that are inside the margin, until those stay the same: all of the way at
    first, which takes few steps where it ends; else as far as the objective falls, which then may take a step a row (Keerthi
    and DeCoste 2005, sections 3 and 4).

    Args:
        rows: (n, d).
        gram: their products with one another (n, n), where they are fewer than features.
        signs: 1 where a row has the label, else -1 (n,).
        start: weights (d,) and intercept.
        C: by which losses are multiplied.
    """
    best_of = partial(_least_squares_inside, rows, gram, signs, C)
    weights, intercept = start
    margins = signs * (rows @ weights + intercept)
    with suppress(LinAlgError):  # beyond float64: whoever asked looks at what came out, and goes another way
        ended = _by_whole_steps(best_of, margins)
        if ended is not None:
            return ended
        for _ in range(_MOST_STEPS):
            is_active = margins < 1
            if not is_active.any():
                break
            to_weights, to_intercept, to_margins = best_of(is_active)
            if np.array_equal(is_active, to_margins < 1):
                return to_weights, to_intercept
            move, change = to_weights - weights, to_margins - margins
            length = _lowest(margins, change, float(np.vdot(weights, move)), float(np.vdot(move, move)), C)
            weights, intercept = weights + length * move, intercept + length * (to_intercept - intercept)
            margins = margins + length * change
    return weights, intercept


def _by_whole_steps(
    best_of: Callable[[NDArray[np.bool_]], tuple[Floats, float, Floats]], margins: Floats
) -> tuple[Floats, float] | None:
    """Return where rows inside the margin stay the same, if whole steps lead there."""
    for _ in range(_WHOLE_STEPS):
        is_active = margins < 1
        if not is_active.any():
            break
        weights, intercept, margins = best_of(is_active)
        if np.array_equal(is_active, margins < 1):
            return weights, intercept
    return None


def _least_squares_inside(
    rows: Floats, gram: Floats | None, signs: Floats, C: float, is_active: NDArray[np.bool_]
) -> tuple[Floats, float, Floats]:
    """Return weights, intercept and all rows' margins (n,) of the least squares of those inside the margin."""
    if gram is None:
        weights, intercept = _least_squares(rows[is_active], signs[is_active], C)
        return weights, intercept, signs * (rows @ weights + intercept)
    shares, intercept = _least_squares_by_rows(gram, np.flatnonzero(is_active), signs[is_active], C)
    return shares @ rows, intercept, signs * (gram @ shares + intercept)


def _least_squares(rows: Floats, targets: Floats, C: float) -> tuple[Floats, float]:
    """Return what minimises C |targets - rows w - b|^2 + |w|^2 / 2 (Chapelle 2007, section 3)."""
    mean, level = rows.mean(axis=0), float(targets.mean())
    centred = rows - mean  # with a column of ones instead, what the intercept takes would cancel
    hessian = centred.T @ centred
    hessian[np.diag_indices_from(hessian)] += 1 / (2 * C)
    weights = cho_solve(cho_factor(hessian, check_finite=False), centred.T @ (targets - level))
    return weights, level - float(mean @ weights)


def _least_squares_by_rows(gram: Floats, active: NDArray[np.int64], targets: Floats, C: float) -> tuple[Floats, float]:
    """Return the same of some rows in the space of all: the shares (n,) of rows that are the weights, and the intercept."""
    products, level = gram[np.ix_(active, active)], float(targets.mean())
    means = products.mean(axis=0)
    hessian = products - means - (means - means.mean())[:, None]
    hessian[np.diag_indices_from(hessian)] += 1 / (2 * C)
    deviations = cho_solve(cho_factor(hessian, overwrite_a=True, check_finite=False), targets - level)
    shares = np.zeros(len(gram))
    shares[active] = deviations - deviations.mean()
    return shares, level - float(means @ shares[active])


def _lowest(margins: Floats, change: Floats, slope: float, curvature: float, C: float) -> float:
    """Return the share of a step, at most 1, at which the objective is the lowest; its slope rises piece by piece.

    ``slope`` and ``curvature`` are the penalty's along the step.
    """

    def slope_at(share: float) -> float:
        slack = np.maximum(0, 1 - margins - share * change)
        return slope + share * curvature - 2 * C * float(slack @ change)

    if slope_at(1.0) <= 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if slope_at(middle) > 0 else (middle, high)
    return low


@dataclass(frozen=True)
class Evaluation:
    """A problem after a step: its value and gradient (k, d + 1), and what bounds its distance to the optimum.

    The losses' derivatives that the second-order model predicts are a point of the dual problem: ``gap`` is what they lose
    on the losses, ``residual`` (k, d + 1) what their gradient leaves. ``stiffness`` (k, k) or (k,) is the value's second
    derivative by the intercepts.
    """

    value: float
    gradient: Floats
    gap: float
    residual: Floats
    stiffness: Floats


@dataclass(frozen=True)
class Terms:
    """What a problem's last way down keeps to.

    Attributes:
        goal: the share of the value to which the bound is to fall.
        free: which of the k outputs there is something to learn for.
        top: an upper bound of the value's second derivatives by the weights.
        scale: by which losses are multiplied.
        proven: the bound is a proof; else conjugate gradients' own view of the curvature may be believed, with a margin.
    """

    goal: float
    free: NDArray[np.bool_]
    top: float
    scale: float
    proven: bool


class Finish:
    """One problem's last way down: Newton steps by conjugate gradients (Nocedal and Wright 2006, algorithm 7.1).

    Driven from outside, as ``LBFGS``: while ``asks`` is "bend", evaluate the second derivative along ``direction`` and
    tell it; while it is "look", evaluate the problem at ``point`` plus ``move``; where it is "begin", call that.

    What is left is bounded at every look. The penalty alone makes the value grow by half of the squared distance, so that
    half of the squared gradient by the weights is a bound once the intercepts, which have no penalty, are at their best. So
    is the duality gap of what the second-order model predicted: the Newton decrement where that model is right, and a bound
    where it is not.

    Args:
        point: weights and, last, intercepts (k, d + 1).
        terms: what stays as it is on the whole way.
        precise: evaluated in float64.
        solve: gives the exact Newton direction at a point and its gradient, in place of conjugate gradients.
    """

    def __init__(
        self,
        point: Floats,
        terms: Terms,
        *,
        precise: bool,
        solve: Callable[[Floats, Floats], Floats] | None = None,
    ) -> None:
        self.point = point
        self.value = np.inf
        self.gradient: Floats = np.zeros_like(point)
        self.bound = np.inf
        self.steps = 0
        self.bends = 0
        self.converged = False
        self.asks: Literal["bend", "look", "begin", ""] = "look"
        self.move: Floats = np.zeros_like(point)
        self.direction: Floats = np.zeros_like(point)
        self.precise = precise
        self._goal, self._free, self._top, self._proven = terms.goal, terms.free, terms.top, terms.proven
        self._solve = solve
        self.scale = terms.scale
        self._length, self._slope, self._idle = 1.0, 0.0, 0
        self._stiffness: Floats = np.zeros(1)
        self._left = np.inf
        self.least = 0.0
        self.rest = self.move

    def tell_look(self, seen: Evaluation) -> None:
        """Take what is seen at ``point`` plus ``move``; stay there, or ask for a shorter step."""
        noise = _NOISE[self.precise] * abs(self.value) if np.isfinite(self.value) else np.inf
        if -self._slope <= _TINY * abs(self.value):
            noise = max(noise, _TINY * abs(self.value))  # sums of large terms round more: the bound tells what is reached
        if not seen.value <= self.value + _SUFFICIENT * self._length * self._slope + noise:
            self._length /= 4
            self.move = self.move / 4
            if self._length < _SHORTEST:
                self.asks = ""
            return
        first = np.isinf(self.value)
        self._idle = self._idle + 1 if not first and self.value - seen.value <= noise else 0
        self.point, self.value = self.point + self.move, seen.value
        self.gradient = np.where(self._free[:, None], seen.gradient, 0)
        self._stiffness = seen.stiffness
        residual = self.distance(np.where(self._free[:, None], seen.residual, 0))
        if not self._proven and self._length == 1:
            residual = min(residual, _DOUBT * self._left)
        self.bound = min(self.distance(self.gradient), seen.gap + residual)
        self.converged = bool(self.bound <= self._goal * self.value)
        self.steps += not first
        self.asks = "" if self.converged or self.steps >= _MOST_STEPS or self._idle >= _IDLE else "begin"

    def begin(self, precondition: Callable[[Floats], Floats]) -> None:
        """Start a step, with an approximate inverse of the second derivatives at ``point``."""
        self._length, self._left, self.least = 1.0, np.inf, 0.0
        if self._solve is not None:
            self.move = self._solve(self.point, self.gradient)
            self._step()
            return
        self._precondition = precondition
        self.move = np.zeros_like(self.point)
        self.rest = self.gradient
        turned = precondition(self.rest)
        self._measure = self._first = float(np.vdot(self.rest, turned))
        self._promised = 0.0
        self._lengths: list[float] = []
        self._shares: list[float] = []
        self.direction = -turned
        self._levelling = False
        self.asks = "bend"

    def take_over(self, before: "Finish", precondition: Callable[[Floats], Floats]) -> None:
        """Try what was found of the curvature at the same point, of losses that counted less: its direction may serve."""
        if self._proven or not before.converged or not before.least > 0:
            return
        more = self.scale / before.scale
        rest = more * before.rest
        rest[:, :-1] -= (more - 1) * (self.point + before.move)[:, :-1]
        promised = -float(np.vdot(self.gradient, before.move) + np.vdot(before.move, rest)) / 2
        remainder = float(np.vdot(rest, precondition(rest))) / min(before.least, 1.0)
        bound = _MARGIN * promised + _DOUBT * remainder
        if bound <= self._goal * self.value:
            self.bound, self.converged, self.asks = bound, True, ""
            self.move, self.rest, self.least = before.move, rest, before.least

    def tell_bend(self, bend: Floats) -> None:
        """Take the second derivative (k, d + 1) along ``direction``."""
        bend = np.where(self._free[:, None], bend, 0)
        self.bends += 1
        if self._levelling:
            self.move, self.rest = self.move + self.direction, self.rest + bend
            self._step()
            return
        curved = float(np.vdot(self.direction, bend))
        if not curved > 0:
            self._step()
            return
        length, before = self._measure / curved, self._measure
        self.move = self.move + length * self.direction
        self.rest = self.rest + length * bend
        self._promised += length * before / 2
        turned = self._precondition(self.rest)
        self._measure = float(np.vdot(self.rest, turned))
        self._lengths.append(length)
        self._shares.append(self._measure / before)
        self.direction = -turned + self._shares[-1] * self.direction
        self._left = self._remainder()
        goal = self._goal * self.value
        estimate = _MARGIN * self._promised + _DOUBT * self._left
        if not self._proven and estimate <= goal and len(self._lengths) >= _FEWEST:
            self.bound, self.converged, self.asks = estimate, True, ""
        elif self._promised > _NEAR * goal and self._measure <= _FORCING**2 * self._first:
            self._step()
        elif self._left <= _ENOUGH * goal or len(self._lengths) >= _MOST_BENDS:
            self._level()

    def distance(self, gradient: Floats) -> float:
        """Bound the distance to the optimum of what has this gradient (k, d + 1) and at least the penalty's curvature."""
        share, by_weights = self._share(gradient), float(np.linalg.norm(gradient[:, :-1]))
        levelled = (share + (by_weights + np.sqrt(self._top * share)) ** 2) / 2
        within = 1 + float(np.abs(self.point[self._free, -1]).max(initial=0))  # how far intercepts may be from their best
        return float(min(levelled, by_weights**2 / 2 + within * float(np.abs(gradient[:, -1]).sum())))

    def _remainder(self) -> float:
        """Bound what the model's value has above its least; unless it is to be proven, by the curvatures seen so far.

        The least of them relative to the preconditioner is an eigenvalue of the tridiagonal matrix that conjugate gradients
        build (Golub and Meurant 2010, section 12.1), or a little above one.
        """
        bound = float(np.linalg.norm(self.rest[:, :-1])) ** 2 / 2 + self._share(self.rest) / 2
        if self._proven:
            return bound
        lengths, shares = np.array(self._lengths), np.array(self._shares)
        diagonal = 1 / lengths
        diagonal[1:] += shares[:-1] / lengths[:-1]
        beside = np.sqrt(shares[:-1]) / lengths[:-1]
        self.least = float(eigvalsh_tridiagonal(diagonal, beside, select="i", select_range=(0, 0))[0])
        return bound if len(lengths) < _FEWEST else min(bound, self._measure / max(self.least, 1e-300))

    def _share(self, gradient: Floats) -> float:
        return max(float(np.vdot(gradient[:, -1], self._lift(gradient))), 0.0)

    def _lift(self, gradient: Floats) -> Floats:
        """Return by how much the intercepts (k,) are to fall for their part of a gradient to vanish."""
        if self._stiffness.ndim == 1:
            is_stiff = self._stiffness > _FLAT * self._stiffness.max(initial=0)
            return np.where(is_stiff, gradient[:, -1] / np.where(is_stiff, self._stiffness, 1), 0)
        values, vectors = np.linalg.eigh(self._stiffness)
        is_stiff = values > _FLAT * max(values[-1], 0)
        turned = vectors.T @ gradient[:, -1]
        lifted: Floats = vectors @ np.where(is_stiff, turned / np.where(is_stiff, values, 1), 0)
        return lifted

    def _level(self) -> None:
        """Put the intercepts of the model to their best before the step, where what they leave would weaken its proof."""
        if not self._proven or self._top * self._share(self.rest) <= _ENOUGH * self._goal * self.value:
            self._step()
            return
        self._levelling = True
        self.direction = np.zeros_like(self.point)
        self.direction[:, -1] = -self._lift(self.rest)

    def _step(self) -> None:
        self._slope = min(float(np.vdot(self.gradient, self.move)), 0.0)
        self.asks = "look"


def direction(matrix: Floats, gradient: Floats) -> Floats:
    """Return -H^-1 g; where rounding has left H without an inverse, its diagonal is raised by as little as helps."""
    diagonal = np.einsum("ii->i", matrix)
    more = float(diagonal.max()) * len(matrix) * np.finfo(np.float64).eps
    while True:
        try:
            factor = cho_factor(matrix, lower=True, check_finite=False)
        except LinAlgError:
            diagonal += more
            more *= 100
            continue
        step: Floats = -cho_solve(factor, gradient.reshape(-1), check_finite=False).reshape(gradient.shape)
        return step


def hessian(affine: Floats, shares: Floats, C: float) -> Floats:
    """Return the matrix of second derivatives (k (d + 1), k (d + 1)) of C * (sum of log-losses) + |W|^2 / 2.

    Args:
        affine: rows (n, d + 1), the last column ones.
        shares: probabilities (n, k).
        C: inverse penalty. Intercepts that all rise together cost something, so that there is an inverse.
    """
    outputs, width = shares.shape[1], affine.shape[1]
    blocks = np.empty((outputs, width, outputs, width))
    for row in range(outputs):
        for column in range(row + 1):
            weight = C * shares[:, row] * ((row == column) - shares[:, column])
            blocks[row, :, column] = blocks[column, :, row] = (affine * weight[:, None]).T @ affine
    for row in range(outputs):
        diagonal = np.einsum("ii->i", blocks[row, :, row])
        diagonal[:-1] += 1
    blocks[:, -1, :, -1] += np.trace(blocks[:, -1, :, -1]) / outputs + 1
    return blocks.reshape(outputs * width, outputs * width)
