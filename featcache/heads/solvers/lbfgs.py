"""Limited-memory BFGS that is driven from outside, so that many problems can share what each evaluation costs."""

from collections import deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Precondition = Callable[[Floats], Floats]

_MEMORY = 12
_SUFFICIENT = 1e-4
_SMALLEST_STEP = 1e-6
_NOISE = {False: 3e-7, True: 1e-15}  # of a value, by whether it was computed in float64


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
        found, shares = self.gradient, []
        for move, change, inverse in reversed(self._pairs):
            share = inverse * float(np.vdot(move, found))
            found = found - share * change
            shares.append(share)
        found = self.precondition(found)
        for (move, change, inverse), share in zip(self._pairs, reversed(shares), strict=True):
            found = found + (share - inverse * float(np.vdot(change, found))) * move
        return -found
