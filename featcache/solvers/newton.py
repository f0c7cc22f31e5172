"""Newton's method for one small multinomial problem, where L-BFGS does not get on: few rows that classes divide exactly."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.special import log_softmax

from featcache.solvers.scaled import Floats

_MOST_STEPS = 200
_SUFFICIENT = 1e-4
_SHORTEST = 1e-10


@dataclass(frozen=True)
class Minimum:
    """Where Newton's method ended: the point (k, d + 1), value and gradient, and half of g' H^-1 g as of ``Descent``."""

    point: Floats
    value: float
    gradient: Floats
    decrement: float
    steps: int
    converged: bool


def minimise(rows: Floats, y: NDArray[np.int64], C: float, start: Floats, tolerance: float) -> Minimum:
    """Minimise C * (sum of log-losses) + |W|^2 / 2 with damped steps (Boyd and Vandenberghe 2004, section 9.5.2).

    Args:
        rows: features (n, d).
        y: classes 0..k-1 (n,), each of them there.
        C: inverse penalty.
        start: weights and, last, intercepts (k, d + 1).
        tolerance: of the decrement, relative to the value.
    """
    affine = np.concatenate([rows, np.ones((len(rows), 1))], axis=1)
    truth = np.equal(y[:, None], np.arange(len(start))).astype(np.float64)
    point, value, steps = start, _value(affine, truth, C, start), 0
    while True:
        logs = log_softmax(affine @ point.T, axis=1)
        gradient = C * (np.exp(logs) - truth).T @ affine
        gradient[:, :-1] += point[:, :-1]
        direction = -_solved(_hessian(affine, np.exp(logs), C), gradient)
        slope = float(np.vdot(gradient, direction))
        converged = -slope / 2 <= tolerance * value
        if converged or steps == _MOST_STEPS:
            break
        length = 1.0
        while (found := _value(affine, truth, C, point + length * direction)) > value + _SUFFICIENT * length * slope:
            length /= 2
            if length < _SHORTEST:
                return Minimum(point, value, gradient, -slope / 2, steps, converged=False)
        point, value, steps = point + length * direction, found, steps + 1
    return Minimum(point, value, gradient, -slope / 2, steps, converged)


def _value(affine: Floats, truth: Floats, C: float, point: Floats) -> float:
    loss = -float((log_softmax(affine @ point.T, axis=1) * truth).sum())
    return C * loss + float(np.vdot(point[:, :-1], point[:, :-1])) / 2


def _hessian(affine: Floats, shares: Floats, C: float) -> Floats:
    """Return the matrix of second derivatives (k (d + 1), k (d + 1)); intercepts that all rise together cost something."""
    outputs, width = shares.shape[1], affine.shape[1]
    whole = np.empty((outputs, width, outputs, width))
    for one in range(outputs):
        for other in range(one + 1):
            weight = C * shares[:, one] * ((one == other) - shares[:, other])
            whole[one, :, other] = whole[other, :, one] = (affine * weight[:, None]).T @ affine
    for one in range(outputs):
        diagonal = np.einsum("ii->i", whole[one, :, one])
        diagonal[:-1] += 1
    whole[:, -1, :, -1] += np.trace(whole[:, -1, :, -1]) / outputs + 1
    return whole.reshape(outputs * width, outputs * width)


def _solved(matrix: Floats, gradient: Floats) -> Floats:
    """Return H^-1 g; where rounding has left H without an inverse, its diagonal is raised by as little as helps."""
    diagonal = np.einsum("ii->i", matrix)
    more = float(diagonal.max()) * len(matrix) * np.finfo(np.float64).eps
    while True:
        try:
            factor = cho_factor(matrix, lower=True, check_finite=False)
        except LinAlgError:
            diagonal += more
            more *= 100
            continue
        found: Floats = cho_solve(factor, gradient.reshape(-1), check_finite=False).reshape(gradient.shape)
        return found
