"""One pass over the features for many linear models at once: their losses and gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from featcache.solvers.scaled import Floats, Rows, Scaled

Loss = Literal["softmax", "sigmoid", "squared_hinge"]

_NARROW = 128  # rows of weights
_FEW_COLUMNS = 48  # outputs of all models, up to which a block's products are short
_AS_THEY_LIE, _ROUND = 1_000_000, 32  # multiplications of a product that OpenBLAS does not rearrange operands for first
WHOLE_CURVATURE = 256  # classes; above it only the diagonal


@dataclass
class Slopes:
    """Of p models: losses summed over rows (p,), and gradients by weights (p, k, d) and intercepts (p, k).

    ``curvature`` (p, k, k) is the mean of diag(q) - q q', q a row's probabilities; its diagonal (p, k) where there are many
    classes, or outputs stand for themselves.
    """

    loss: Floats
    weights: Floats
    intercept: Floats
    curvature: Floats

    def __iadd__(self, other: "Slopes") -> Self:
        self.loss += other.loss
        self.weights += other.weights
        self.intercept += other.intercept
        self.curvature += other.curvature
        return self


class Passes:
    """Evaluates linear models on scaled features.

    Args:
        features: scaled, with the folds that models train on.
        y: classes 0..k-1 (n,), or which of k labels each row has (n, k) bool.
        loss: log-loss of one class among k; or of each label by itself, by log-loss or squared hinge.
    """

    def __init__(self, features: Scaled, y: NDArray[Any], loss: Loss) -> None:
        self.features = features
        self.outputs = int(y.max()) + 1 if loss == "softmax" else y.shape[1]
        self._loss = loss
        self.y = y[features.order]
        self._signs = np.where(self.y.T, 1, -1).astype(np.float32) if loss != "softmax" else None

    def slopes(
        self,
        fold_of: Sequence[int],
        weights: Floats,
        intercept: Floats,
        *,
        curvature: bool = False,
        precise: bool = False,
    ) -> Slopes:
        """Return losses and gradients of p models in their own folds' coordinates.

        Args:
            fold_of: the fold of each model (p,).
            weights: (p, k, d).
            intercept: (p, k).
            curvature: gather it too, else it is zero.
            precise: multiply in float64.
        """
        kind: type = np.float64 if precise else np.float32
        folds = [self.features.folds[number] for number in fold_of]
        stretch = np.stack([self.features.scale / fold.scale for fold in folds])[:, None]
        shift = np.stack([(self.features.mean - fold.mean) / fold.scale for fold in folds])[:, None]
        flat: Rows = (weights * stretch).astype(kind)
        offset = (intercept + (weights * shift).sum(axis=2)).astype(kind)
        blocks = self.features.blocks if offset.size > _FEW_COLUMNS or precise else self.features.long_blocks
        first, *others = self.features.shared(lambda some: self._some(some, fold_of, flat, offset, kind, curvature), blocks)
        for other in others:
            first += other
        first.weights = first.weights * stretch + first.intercept[:, :, None] * shift
        first.curvature /= np.array([fold.count for fold in folds]).reshape(-1, *[1] * (first.curvature.ndim - 1))
        return first

    def _some(
        self,
        blocks: Sequence[slice],
        fold_of: Sequence[int],
        weights: Rows,
        offset: Rows,
        kind: type,
        curvature: bool,  # noqa: FBT001
    ) -> Slopes:
        count, outputs, width = weights.shape
        whole = self._signs is None and outputs <= WHOLE_CURVATURE
        bent = (count, outputs, outputs) if whole else (count, outputs)
        sums = Slopes(np.zeros(count), np.zeros((count, outputs, width)), np.zeros((count, outputs)), np.zeros(bent))
        packed: dict[tuple[int, ...], tuple[Rows, Rows]] = {}
        for block in blocks:
            active = tuple(number for number, fold in enumerate(fold_of) if self.features.trains[fold][block].any())
            if not active:
                continue
            index: Any = slice(None) if len(active) == count else list(active)
            if active not in packed:
                packed[active] = weights[index].reshape(-1, width), offset[index][:, :, None]
            some, start = packed[active]
            rows = self.features.block(block, kind)
            wide = _products(some, rows)
            values = wide.reshape(len(active), outputs, len(rows))
            values += start
            counts: Rows = np.stack([self.features.trains[fold_of[number]][block] for number in active]).astype(kind)
            with np.errstate(over="ignore", invalid="ignore"):  # of a step that is too long: its loss is not finite
                if self._signs is None:
                    wish = ("whole" if whole else "diagonal") if curvature else "none"
                    loss, found = _softmax(values, self.y[block], counts, wish)
                else:
                    loss, found = _ONE_BY_ONE[self._loss](values, self._signs[:, block], counts[:, None])
            sums.loss[index] += loss
            if curvature:
                sums.curvature[index] += found
            sums.intercept[index] += values.sum(axis=2, dtype=np.float64)
            sums.weights[index] += _summed_products(wide, rows).reshape(len(active), outputs, width)
        return sums


def _products(weights: Rows, rows: Rows) -> Rows:
    """Return weights (m, d) times rows (r, d) as (m, r), in the order in which BLAS is the faster one."""
    if not weights.any():
        return np.zeros((len(weights), len(rows)), weights.dtype)
    if weights.dtype == np.float64 or len(weights) > _NARROW:
        return weights @ rows.T
    turned, out = np.ascontiguousarray(weights.T), np.empty((len(rows), len(weights)), weights.dtype)
    pieces, step = _pieces(len(rows), weights.size)
    whole = pieces * step
    by_piece = rows[:whole].reshape(pieces, step, rows.shape[1])
    np.matmul(by_piece, turned, out=out[:whole].reshape(pieces, step, len(weights)))
    np.matmul(rows[whole:], turned, out=out[whole:])
    return np.ascontiguousarray(out.T)


def _summed_products(values: Rows, rows: Rows) -> Rows:
    """Return values (m, r) times rows (r, d), (m, d)."""
    pieces, step = _pieces(len(rows), len(values) * rows.shape[1])
    whole = pieces * step
    by_piece = values[:, :whole].reshape(len(values), pieces, step).transpose(1, 0, 2)
    total: Rows = np.matmul(by_piece, rows[:whole].reshape(pieces, step, rows.shape[1])).sum(axis=0)
    return total + values[:, whole:] @ rows[whole:] if whole < len(rows) else total


def _pieces(rows: int, cost: int) -> tuple[int, int]:
    """Return number and length of pieces whose products, ``cost`` operations a row, BLAS takes as they lie.

    They go into one call, in which the interpreter is not waited for between them. A rest may be left over; where no piece
    is small enough, all rows are one.
    """
    step = _AS_THEY_LIE // max(1, cost) // _ROUND * _ROUND
    return (rows // step, step) if 0 < step < rows else (1, rows)


def _softmax(outputs: Rows, truth: NDArray[np.int64], counts: Rows, curvature: str) -> tuple[Floats, Floats]:
    """Return the losses (p,) of outputs (p, k, r), C-contiguous, and the "whole" curvature, its "diagonal" or "none" (0,).

    The outputs become the losses' derivatives.
    """
    flat, true = outputs.reshape(len(outputs), -1), truth * len(truth) + np.arange(len(truth))
    outputs -= outputs.max(axis=1, keepdims=True)
    of_truth = np.take(flat, true, axis=1)
    np.exp(outputs, out=outputs)
    total = outputs.sum(axis=1)
    spent = ((np.log(total) - of_truth) * counts).sum(axis=1, dtype=np.float64)
    outputs *= (counts / total)[:, None]
    found = np.zeros(0)
    if curvature == "whole":
        found = -np.matmul(outputs, outputs.transpose(0, 2, 1)).astype(np.float64)
        diagonal = np.arange(outputs.shape[1])
        found[:, diagonal, diagonal] += outputs.sum(axis=2, dtype=np.float64)
    elif curvature == "diagonal":
        found = (outputs * (1 - outputs)).sum(axis=2, dtype=np.float64)
    flat[:, true] = np.take(flat, true, axis=1) - counts
    return spent, found


def _sigmoid(outputs: Rows, signs: Rows, counts: Rows) -> tuple[Floats, Floats]:
    """As _softmax, for labels one by one: log(1 + exp(-margin))."""
    outputs *= signs
    spent = (np.logaddexp(0, -outputs) * counts).sum(axis=(1, 2), dtype=np.float64)
    wrong = counts / (1 + np.exp(np.minimum(outputs, 80)))
    found = (wrong * (1 - wrong)).sum(axis=2, dtype=np.float64)
    np.multiply(wrong, -signs, out=outputs)
    return spent, found


def _squared_hinge(outputs: Rows, signs: Rows, counts: Rows) -> tuple[Floats, Floats]:
    """As _sigmoid: max(0, 1 - margin) squared."""
    outputs *= signs
    slack = np.maximum(0, 1 - outputs) * counts
    spent = np.einsum("pkr,pkr->p", slack, slack, dtype=np.float64)
    found = 2 * (slack > 0).sum(axis=2, dtype=np.float64)
    np.multiply(slack, -2 * signs, out=outputs)
    return spent, found


_ONE_BY_ONE = {"sigmoid": _sigmoid, "squared_hinge": _squared_hinge}
