"""Losses by scores (p, k, r) of many linear models at once: values, slopes, second derivatives; nothing is cancelled."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logsumexp, xlogy

Floats = NDArray[np.float64]
Rows = NDArray[Any]
Loss = Literal["softmax", "sigmoid", "squared_hinge"]

_UNLIKELY = 1e-6  # of the likeliest class's probability


def softmax_slopes(outputs: Rows, true: NDArray[np.int64], counts: Rows, curvature: str) -> tuple[Floats, Floats]:
    """Return the losses (p,) of outputs (p, k, r), C-contiguous, and the "whole" curvature, its "diagonal" or "none" (0,).

    ``true`` (p, r) says where in all outputs those of the right classes lie. The outputs become the losses' derivatives.
    """
    flat = outputs.reshape(-1)
    outputs -= outputs.max(axis=1, keepdims=True)
    score_of_true = flat[true]
    np.exp(outputs, out=outputs)
    of_true = flat[true]
    flat[true] = 0
    of_others = outputs.sum(axis=1)  # without the right class: 1 - p and log(p) of a p near 1 keep their digits
    total = of_others + of_true
    near = np.log1p(of_others / np.maximum(of_true, _UNLIKELY))
    spent = (np.where(of_true > _UNLIKELY, near, np.log(total) - score_of_true) * counts).sum(axis=1, dtype=np.float64)
    flat[true] = of_true
    outputs *= (counts / total)[:, None]
    bent = np.zeros(0)
    if curvature == "whole":
        bent = -np.matmul(outputs, outputs.transpose(0, 2, 1)).astype(np.float64)
        diagonal = np.arange(outputs.shape[1])
        bent[:, diagonal, diagonal] += outputs.sum(axis=2, dtype=np.float64)
    elif curvature == "diagonal":
        bent = (outputs * (1 - outputs)).sum(axis=2, dtype=np.float64)
    flat[true] = -of_others / total * counts
    return spent, bent


def _sigmoid(outputs: Rows, signs: Rows, counts: Rows) -> tuple[Floats, Floats]:
    """As softmax_slopes, for labels one by one: log(1 + exp(-margin))."""
    outputs *= signs
    spent = (np.logaddexp(0, -outputs) * counts).sum(axis=(1, 2), dtype=np.float64)
    wrong = counts / (1 + np.exp(np.minimum(outputs, 80)))
    curvature = (wrong * (1 - wrong)).sum(axis=2, dtype=np.float64)
    np.multiply(wrong, -signs, out=outputs)
    return spent, curvature


def _squared_hinge(outputs: Rows, signs: Rows, counts: Rows) -> tuple[Floats, Floats]:
    """As _sigmoid: max(0, 1 - margin) squared."""
    outputs *= signs
    slack = np.maximum(0, 1 - outputs) * counts
    spent = np.einsum("pkr,pkr->p", slack, slack, dtype=np.float64)
    curvature = 2 * (slack > 0).sum(axis=2, dtype=np.float64)
    np.multiply(slack, -2 * signs, out=outputs)
    return spent, curvature


def seen_by(loss: Loss, scores: Rows, right: NDArray[np.bool_]) -> tuple[Floats, Rows, Floats]:
    """Return losses (p,), derivatives (p, k, n) by scores, and second ones by intercepts (p, k, k).

    Args:
        loss: of one class among k, or of each label by itself.
        scores: of p models (p, k, n), C-contiguous; they become the derivatives.
        right: which class, or which labels, each row has (k, n).
    """
    count, outputs, rows = scores.shape
    counts = np.ones((1, rows), scores.dtype)
    if loss == "softmax":
        place = right.argmax(axis=0) * rows + np.arange(rows) + np.arange(count)[:, None] * (outputs * rows)
        spent, curvature = softmax_slopes(scores, place, counts, "whole")
        return spent, scores, curvature
    spent, curvature = ONE_BY_ONE[loss](scores, np.where(right, 1.0, -1.0), counts)
    return spent, scores, curvature[:, :, None] * np.eye(outputs)


def _shares(outputs: Rows) -> Rows:
    """Return the softmax (p, k, r) of outputs."""
    shares: Rows = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return shares


def softmax_bend(outputs: Rows, moves: Rows, y_true: NDArray[np.int64], counts: Rows) -> None:
    """Turn moves of outputs (p, k, r) into those of the losses' derivatives."""
    shares = _shares(outputs)
    moves -= moves[:, None, y_true, np.arange(len(y_true))]  # nothing is cancelled where the right class is nearly certain
    moves -= (shares * moves).sum(axis=1, keepdims=True)
    moves *= shares
    moves *= counts


def _sigmoid_bend(outputs: Rows, moves: Rows, signs: Rows, counts: Rows) -> None:
    wrong = expit(-outputs * signs)
    moves *= wrong * (1 - wrong) * counts


def _squared_hinge_bend(outputs: Rows, moves: Rows, signs: Rows, counts: Rows) -> None:
    moves *= 2 * (outputs * signs < 1) * counts


BENT = {"sigmoid": _sigmoid_bend, "squared_hinge": _squared_hinge_bend}
_Seen = tuple[Floats, Floats, Floats, Floats, Floats]


def softmax_ahead(outputs: Floats, moves: Floats, y_true: NDArray[np.int64], counts: Rows) -> _Seen:
    """Return losses (p,), gaps (p,), derivatives, predicted ones (p, k, r) and curvature, when outputs have moved.

    A row's gap is the divergence of its new probabilities from what was predicted of them: p (1 + z), where z is the move
    less its mean. Written by p and z alone nothing is cancelled, however near to 0 or 1 probabilities are.
    """
    shares = _shares(outputs)
    z = moves - (shares * moves).sum(axis=1, keepdims=True)
    rise = np.log1p((shares * np.expm1(np.minimum(z, 700))).sum(axis=1, keepdims=True))
    raised = np.maximum(1 + z, 0)  # what falls below no probability stays there: the prediction needs to be one
    dual = shares * raised
    total = dual.sum(axis=1, keepdims=True)
    dual /= total
    ratios = np.log(np.where(raised > 0, raised / total, 1)) - z + rise
    gap = ((dual * ratios).sum(axis=1) * counts).sum(axis=1)
    after = outputs + moves
    row = np.arange(len(y_true))
    loss = ((logsumexp(after, axis=1) - after[:, y_true, row]) * counts).sum(axis=1)
    slopes = _shares(after) * counts[:, None]
    curvature = -np.matmul(slopes, slopes.transpose(0, 2, 1))
    diagonal = np.arange(slopes.shape[1])
    curvature[:, diagonal, diagonal] += slopes.sum(axis=2)
    dual *= counts[:, None]
    slopes[:, y_true, row] -= counts
    dual[:, y_true, row] -= counts
    return loss, np.maximum(gap, 0), slopes, dual, curvature


def _sigmoid_ahead(outputs: Floats, moves: Floats, signs: Floats, counts: Rows) -> _Seen:
    """As softmax_ahead, of two classes: a label is right or wrong."""
    margins, steps = outputs * signs, moves * signs
    wrong, after = expit(-margins), margins + steps
    right = expit(margins)
    right_z, wrong_z = wrong * steps, -right * steps
    rise = np.log1p(right * np.expm1(np.minimum(right_z, 700)) + wrong * np.expm1(np.minimum(wrong_z, 700)))
    dual = np.clip(wrong * (1 + wrong_z), 0, 1)
    dual_right = np.clip(right * (1 + right_z), 0, 1)
    gap = xlogy(dual, np.maximum(1 + wrong_z, 0)) + dual * (rise - wrong_z)
    gap += xlogy(dual_right, np.maximum(1 + right_z, 0)) + dual_right * (rise - right_z)
    slopes = expit(-after)
    loss = (np.logaddexp(0, -after) * counts).sum(axis=(1, 2))
    curvature = (slopes * (1 - slopes) * counts).sum(axis=2)
    return loss, np.maximum((gap * counts).sum(axis=(1, 2)), 0), -signs * slopes * counts, -signs * dual * counts, curvature


def _squared_hinge_ahead(outputs: Floats, moves: Floats, signs: Floats, counts: Rows) -> _Seen:
    """As softmax_ahead, of the loss max(0, 1 - margin) squared, whose conjugate is u^2 / 4 - u of u above 0."""
    margins, steps = outputs * signs, moves * signs
    after = margins + steps
    predicted = 2 * np.maximum(0, 1 - after) * (margins < 1)
    slack = np.maximum(0, 1 - after)
    gap = np.where(after < 1, (slack - predicted / 2) ** 2, predicted * (after - 1) + predicted**2 / 4)
    loss = (slack**2 * counts).sum(axis=(1, 2))
    curvature = 2 * ((slack > 0) * counts).sum(axis=2)
    return loss, (gap * counts).sum(axis=(1, 2)), -2 * signs * slack * counts, -signs * predicted * counts, curvature


# Of the best constant model, a row and output, by the share of the rows that have it.
GUESSING: dict[Loss, Callable[[Floats], Any]] = {
    "softmax": lambda share: -xlogy(share, share),
    "sigmoid": lambda share: -xlogy(share, share) - xlogy(1 - share, 1 - share),
    "squared_hinge": lambda share: 4 * share * (1 - share),
}
AHEAD = {"sigmoid": _sigmoid_ahead, "squared_hinge": _squared_hinge_ahead}
ONE_BY_ONE = {"sigmoid": _sigmoid, "squared_hinge": _squared_hinge}
