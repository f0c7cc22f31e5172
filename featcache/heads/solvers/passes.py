"""One pass over the features for many linear models at once: their losses and gradients."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from featcache.heads.solvers import newton
from featcache.heads.solvers.losses import (
    AHEAD,
    BENT,
    GUESSING,
    ONE_BY_ONE,
    Loss,
    softmax_ahead,
    softmax_bend,
    softmax_slopes,
)
from featcache.heads.solvers.newton import Floats
from featcache.heads.solvers.scaled import Rows, ScaledRows, TurnedRows, even_slices, returned_zeros, takes_small_products
from featcache.resources import Threads, cores

_NARROW = 128  # rows of weights
_FEW_COLUMNS = 48  # outputs of all models, up to which a block's products are short
_AS_THEY_LIE, _ROUND = 1_000_000, 32  # multiplications of a product that OpenBLAS does not rearrange operands for first
_NO_VALUE = 1e-300
_FLAT = 1e-6  # of the greatest curvature: what rounding leaves of none
_MAIN_COLUMNS, _SOME_ROWS = 96, 256  # whose means are taken off; of a part, that tell how columns spread
_VECTORS, _STATES = 10, 5  # that a problem which goes down takes, of its size and of its scores'
_SHARED = 10_000_000  # multiplications of a product, from which on a second thread pays
_PART, _LEAST_PART_ROWS = 100_000, 512  # scores that leave a core's cache to the products; rows, for these to be efficient
_THIN = 48  # rows of vectors, up to which rows times vectors is faster than vectors times rows
_ALONE, _FILL = 3, 3  # vectors that are multiplied one by one; of zeros, that are cheaper than an odd number
WHOLE_CURVATURE = 256  # classes; above it only the diagonal


@dataclass
class Gradients:
    """Of p models: losses summed over rows (p,), and gradients by weights (p, k, d) and intercepts (p, k).

    ``curvature`` (p, k, k) is the mean of diag(q) - q q', q a row's probabilities; its diagonal (p, k) where there are many
    classes, or outputs stand for themselves.
    """

    loss: Floats
    weights: Floats
    intercept: Floats
    curvature: Floats

    def __iadd__(self, addend: "Gradients") -> Self:
        self.loss += addend.loss
        self.weights += addend.weights
        self.intercept += addend.intercept
        self.curvature += addend.curvature
        return self


@dataclass
class Ahead:
    """Of p models after a step each: losses (p,), derivatives by weights (p, k, d) and intercepts (p, k), and curvature.

    ``dual_weights`` and ``dual_intercept`` are the same derivatives with, in place of the losses', those that the losses'
    second-order model at the step's start predicts; ``gap`` (p,) is by how much these miss the losses, summed over rows, in
    Fenchel and Young's inequality.
    """

    loss: Floats
    weights: Floats
    intercept: Floats
    curvature: Floats
    gap: Floats
    dual_weights: Floats
    dual_intercept: Floats

    def __iadd__(self, addend: "Ahead") -> Self:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(addend, name))
        return self


class BatchedLoss:
    """Evaluates linear models on scaled features.

    Args:
        features: scaled, with the folds that models train on.
        y: classes 0..k-1 (n,), or which of k labels each row has (n, k) bool.
        loss: log-loss of one class among k; or of each label by itself, by log-loss or squared hinge.
    """

    def __init__(self, features: ScaledRows, y: NDArray[Any], loss: Loss) -> None:
        self.features = features
        self.outputs = int(y.max()) + 1 if loss == "softmax" else y.shape[1]
        self.loss = loss
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
    ) -> Gradients:
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
        first, *shares = self.features.shared(lambda part: self._sums(part, fold_of, flat, offset, kind, curvature), blocks)
        for share in shares:
            first += share
        first.weights = first.weights * stretch + first.intercept[:, :, None] * shift
        first.curvature /= np.array([fold.count for fold in folds]).reshape(-1, *[1] * (first.curvature.ndim - 1))
        return first

    def _sums(
        self,
        blocks: Sequence[slice],
        fold_of: Sequence[int],
        weights: Rows,
        offset: Rows,
        kind: type,
        curvature: bool,  # noqa: FBT001
    ) -> Gradients:
        count, outputs, width = weights.shape
        is_whole = self._signs is None and outputs <= WHOLE_CURVATURE
        bent = (count, outputs, outputs) if is_whole else (count, outputs)
        sums = Gradients(np.zeros(count), np.zeros((count, outputs, width)), np.zeros((count, outputs)), np.zeros(bent))
        packed: dict[tuple[int, ...], tuple[Rows, Rows]] = {}
        for block in blocks:
            active = tuple(number for number, fold in enumerate(fold_of) if self.features.trains[fold][block].any())
            if not active:
                continue
            index: Any = slice(None) if len(active) == count else list(active)
            if active not in packed:
                packed[active] = weights[index].reshape(-1, width), offset[index][:, :, None]
            flat, start = packed[active]
            rows = self.features.block(block, kind)
            wide = _products(flat, rows)
            values = wide.reshape(len(active), outputs, len(rows))
            values += start
            counts: Rows = np.stack([self.features.trains[fold_of[number]][block] for number in active]).astype(kind)
            with np.errstate(over="ignore", invalid="ignore"):  # of a step that is too long: its loss is not finite
                if self._signs is None:
                    wanted_part = ("whole" if is_whole else "diagonal") if curvature else "none"
                    place = np.arange(len(values))[:, None] * (outputs * len(rows)) + self.y[block] * len(rows)
                    loss, curved = softmax_slopes(values, place + np.arange(len(rows)), counts, wanted_part)
                else:
                    loss, curved = ONE_BY_ONE[self.loss](values, self._signs[:, block], counts[:, None])
            sums.loss[index] += loss
            if curvature:
                sums.curvature[index] += curved
            sums.intercept[index] += values.sum(axis=2, dtype=np.float64)
            sums.weights[index] += _summed_products(wide, rows).reshape(len(active), outputs, width)
        return sums

    def bends(self, fold_of: Sequence[int], points: Floats, moves: Floats, *, precise: bool) -> tuple[Floats, Floats]:
        """Return the losses' second derivatives at p models times a direction each: by weights (p, k, d), intercepts (p, k).

        Args:
            fold_of: the fold of each model (p,).
            points: models (p, k, d + 1), the intercept last, in their own folds' coordinates.
            moves: directions (p, k, d + 1).
            precise: multiply in float64.
        """
        count, outputs, width = len(points), self.outputs, self.features.width

        def bend_blocks(blocks: Sequence[slice], flat: Rows, offset: Rows, kind: type) -> tuple[Floats, Floats]:
            weights, intercept = np.zeros((count, outputs, width)), np.zeros((count, outputs))
            for block, active, rows, scores, shifts, counts in self._pairs(blocks, fold_of, flat, offset, kind):
                if self._signs is None:
                    softmax_bend(scores, shifts, self.y[block], counts[:, None])
                else:
                    BENT[self.loss](scores, shifts, self._signs[:, block], counts[:, None])
                intercept[active] += shifts.sum(axis=2, dtype=np.float64)
                products = _summed_products(shifts.reshape(-1, len(rows)), rows)
                weights[active] += products.reshape(len(shifts), outputs, width)
            return weights, intercept

        (weights, intercept), stretch, shift = self._both(bend_blocks, fold_of, points, moves, precise=precise)
        return weights * stretch + intercept[:, :, None] * shift, intercept

    def ahead(self, fold_of: Sequence[int], points: Floats, moves: Floats, *, precise: bool) -> Ahead:
        """Return what p models are after a step each, and what their second-order models said of it; see ``bends``."""
        count, outputs, width = len(points), self.outputs, self.features.width

        def look_ahead(blocks: Sequence[slice], flat: Rows, offset: Rows, kind: type) -> tuple[Ahead]:
            def zeros(*shape: int) -> Floats:
                return np.zeros((count, *shape))

            bent = zeros(outputs, outputs) if self._signs is None else zeros(outputs)
            sums = Ahead(
                zeros(), zeros(outputs, width), zeros(outputs), bent, zeros(), zeros(outputs, width), zeros(outputs)
            )
            for block, active, rows, narrow, moved, counts in self._pairs(blocks, fold_of, flat, offset, kind):
                scores, shifts = narrow.astype(np.float64), moved.astype(np.float64)
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # of a step that is too long
                    if self._signs is None:
                        loss, gap, slopes, dual, bent = softmax_ahead(scores, shifts, self.y[block], counts)
                    else:
                        signs = self._signs[:, block].astype(np.float64)
                        loss, gap, slopes, dual, bent = AHEAD[self.loss](scores, shifts, signs, counts[:, None])
                sums.loss[active] += loss
                sums.gap[active] += gap
                sums.curvature[active] += bent
                sums.intercept[active] += slopes.sum(axis=2)
                sums.dual_intercept[active] += dual.sum(axis=2)
                pairs: Rows = np.concatenate([slopes.reshape(-1, len(rows)), dual.reshape(-1, len(rows))]).astype(kind)
                products = _summed_products(pairs, rows).reshape(2, len(loss), outputs, width)
                sums.weights[active] += products[0]
                sums.dual_weights[active] += products[1]
            return (sums,)

        (sums,), stretch, shift = self._both(look_ahead, fold_of, points, moves, precise=precise)
        assert isinstance(sums, Ahead)
        sums.weights = sums.weights * stretch + sums.intercept[:, :, None] * shift
        sums.dual_weights = sums.dual_weights * stretch + sums.dual_intercept[:, :, None] * shift
        counts = np.array([self.features.folds[number].count for number in fold_of])
        sums.curvature /= counts.reshape(-1, *[1] * (sums.curvature.ndim - 1))
        return sums

    def _both(
        self, evaluate: Any, fold_of: Sequence[int], points: Floats, moves: Floats, *, precise: bool
    ) -> tuple[Any, Floats, Floats]:
        """Sum over all blocks what a function finds for points and moves, given in the coordinates of the cached rows."""
        kind: type = np.float64 if precise else np.float32
        folds = [self.features.folds[number] for number in fold_of]
        stretch = np.stack([self.features.scale / fold.scale for fold in folds])[:, None]
        shift = np.stack([(self.features.mean - fold.mean) / fold.scale for fold in folds])[:, None]
        pairs = np.stack([points, moves], axis=1)  # (p, 2, k, d + 1)
        flat: Rows = (pairs[..., :-1] * stretch[:, None]).astype(kind)
        offset = (pairs[..., -1] + (pairs[..., :-1] * shift[:, None]).sum(axis=3)).astype(kind)
        blocks = self.features.blocks if offset.size > _FEW_COLUMNS or precise else self.features.long_blocks
        first, *shares = self.features.shared(lambda share: evaluate(share, flat, offset, kind), blocks)
        for share in shares:
            for total, addend in zip(first, share, strict=True):
                total += addend  # noqa: PLW2901 - in place
        return first, stretch, shift

    def _pairs(
        self, blocks: Sequence[slice], fold_of: Sequence[int], flat: Rows, offset: Rows, kind: type
    ) -> Iterator[tuple[slice, Any, Rows, Rows, Rows, Rows]]:
        """Yield each block with the models that train on it, its rows, and these models' scores and moves (p, k, r)."""
        count, _, outputs, width = flat.shape
        for block in blocks:
            active = [number for number, fold in enumerate(fold_of) if self.features.trains[fold][block].any()]
            if not active:
                continue
            index: Any = slice(None) if len(active) == count else active
            rows = self.features.block(block, kind)
            wide = _products(flat[index].reshape(-1, width), rows).reshape(len(active), 2, outputs, len(rows))
            wide += offset[index][..., None]
            counts: Rows = np.stack([self.features.trains[fold_of[number]][block] for number in active]).astype(kind)
            yield block, index, rows, wide[:, 0], np.ascontiguousarray(wide[:, 1]), counts


class TurnedLoss:
    """What models on turned folds are evaluated on.

    Args:
        folds: rows of each fold, the last column ones.
        y: classes 0..k-1 of all rows (m,), or which of k labels each row has (m, k) bool.
        loss: log-loss of one class among k; or of each label by itself, by log-loss or squared hinge.
    """

    def __init__(self, folds: Sequence[TurnedRows], y: NDArray[Any], loss: Loss = "softmax") -> None:
        self.folds, self.loss = folds, loss
        self.outputs = int(y.max()) + 1 if loss == "softmax" else y.shape[1]
        self.width = max(fold.rows.shape[1] for fold in folds)
        self.main = min(_MAIN_COLUMNS, self.width - 1)
        self.counts = np.array([len(fold.rows) for fold in folds])
        self.rows = [_padded(fold.rows, self.width) for fold in folds]
        self.held = [_padded(fold.held, self.width) for fold in folds]
        self.targets = [y[fold.train] for fold in folds]
        self.shares = np.stack([self._shares_of(labels) for labels in self.targets])
        is_trained = (self.shares > 0)[:, :, None]
        self.evens = (is_trained / is_trained.sum(axis=1, keepdims=True)).astype(np.float32)  # of a sum over its classes
        self.guessing = self.counts * GUESSING[loss](self.shares).sum(axis=1)
        # C, of two classes half of it: two opposite rows of weights then count as scikit-learn's one
        is_pair = (loss == "softmax") & (np.count_nonzero(self.shares, axis=1) == 2)
        self.shares_of_C = np.where(is_pair, 0.5, 1.0)
        self.threads = Threads()

    def _shares_of(self, y: NDArray[Any]) -> Floats:
        """Return which share of a fold's rows has each class or label (k,)."""
        shares: Floats = np.bincount(y, minlength=self.outputs) / len(y) if self.loss == "softmax" else y.mean(axis=0)
        return shares

    def shares_of_work(self, multiplications: int) -> int:
        """Return into how many a product is to be divided: threads take time to be woken, what is little is done by one."""
        return cores() if multiplications > _SHARED else 1

    def close(self) -> None:
        """Let the threads end."""
        self.threads.close()


class _Curved(NamedTuple):
    """How losses of p problems are curved, summed over rows.

    ``outputs`` (p, k): their second derivative by each output; ``columns`` (p, k, m): this times the main columns;
    ``squares`` (p, r + 1): over some rows alone, and over outputs, this times the columns' squares.
    """

    outputs: Floats
    columns: Rows
    squares: Rows


class _Part:
    """Some rows of every fold, on one core, and where problems side by side stand there: scores (p, k, n), and their moves.

    Folds with fewer rows are filled up with rows that count nothing, so that what is not a product is done for all at once.

    Args:
        loss: has the rows.
        block: which of each fold's.
        fold_of: the fold of each problem (p,), ascending.
        models: from where they start (p, k, r + 1).
    """

    def __init__(self, loss: TurnedLoss, block: slice, fold_of: NDArray[np.int64], models: Rows) -> None:
        self.kind, self.main, self.rows = loss.loss, loss.main, [rows[block] for rows in loss.rows]
        self.count = max(map(len, self.rows))
        targets = [y[block] for y in loss.targets]
        self._uses = np.stack([np.arange(self.count) < len(y) for y in targets]).astype(models.dtype)
        filled = np.stack([np.concatenate([y, np.zeros((self.count - len(y), *y.shape[1:]), y.dtype)]) for y in targets])
        if loss.loss == "softmax":
            self._y = filled * self.count + np.arange(self.count)
        else:
            self._y = np.where(filled.transpose(0, 2, 1), 1, -1).astype(models.dtype)
        self._fold(fold_of)
        self._strides = np.zeros(0)
        self._bending: Any = slice(0)
        self._stand(returned_zeros((4, *models.shape[:2], self.count), models.dtype))
        if models[:, :, :-1].any():
            self._multiply_by(models, fold_of, self._scores)
        else:
            self._scores[:] = models[:, :, -1:]

    def _stand(self, states: Rows) -> None:
        self._states = states
        self._scores, self._moved, self._slopes, self._ahead = states

    def _fold(self, fold_of: NDArray[np.int64]) -> None:
        self._fold_of = fold_of
        self._uses_of, self._y_of = self._uses[fold_of], self._y[fold_of]

    def look(self, index: Any, lengths: Rows) -> tuple[Floats, Floats]:
        """Return losses and slopes along the moves (q,) of some problems, so many moves from where they stand."""
        self._catch_up()
        moved = self._moved[index]
        is_whole = isinstance(index, slice)
        outputs = np.multiply(lengths[:, None, None], moved, out=self._slopes if is_whole else None)
        outputs += self._scores[index]
        uses, y_true = self._uses_of[index], self._y_of[index]
        with np.errstate(over="ignore", invalid="ignore"):  # of a step that is too long: its loss is not finite
            if self.kind == "softmax":
                losses, _ = softmax_slopes(outputs, _places(y_true, outputs), uses, "none")
            else:
                losses, _ = ONE_BY_ONE[self.kind](outputs, y_true, uses[:, None])
        if not is_whole:
            self._slopes[index] = outputs
        ends = np.einsum("pkn,pkn->pk", outputs, moved).sum(axis=1, dtype=np.float64)
        return losses, ends

    def curved(self, index: NDArray[np.int64]) -> "_Curved":
        """Return how the losses of some problems are curved where they stand."""
        by_output = self._curvature(self._slopes[index])
        by_row, width = by_output.sum(axis=1), self.rows[0].shape[1]
        columns = np.zeros((*by_output.shape[:2], self.main), by_output.dtype)
        squares = np.zeros((len(by_output), width), by_output.dtype)
        for rows, of in zip(self.rows, self._slices(self._fold_of[index]), strict=True):
            if of.start < of.stop:
                np.matmul(by_output[of, :, : len(rows)], rows[:, : self.main], out=columns[of])
                sampled = slice(None, len(rows), -(-len(rows) // _SOME_ROWS))
                squares[of] = by_row[of, sampled] @ np.square(rows[sampled])
        return _Curved(by_output.sum(axis=2, dtype=np.float64), columns, squares)

    def _curvature(self, slopes: Rows) -> Rows:
        """Return the second derivatives (q, k, n) by one output alone, given the first."""
        sizes: Rows = np.abs(slopes)
        if self.kind == "squared_hinge":
            return np.where(sizes > 0, slopes.dtype.type(2), 0)
        sizes *= 1 - sizes
        return sizes

    def products(self, directions: Rows, bends: NDArray[np.bool_], arrived: NDArray[np.bool_], lengths: Rows) -> Rows:
        """Return derivatives (p, k, r + 1), of those that bend the second along their directions; move who has arrived."""
        self._catch_up()
        if arrived.any():
            index = slice(None) if arrived.all() else arrived
            moved = self._moved[index]
            moved *= lengths[index, None, None]
            self._scores[index] += moved
            self._moved[index] = 0
        outputs = self._slopes
        if bends.any():
            self._bending = slice(None) if bends.all() else np.flatnonzero(bends)
            ahead = self._ahead[: np.count_nonzero(bends)]
            self._multiply_by(directions[self._bending], self._fold_of[self._bending], ahead)
            bent = self._bent(ahead, self._slopes[self._bending], self._bending)
            if bends.all():
                outputs = bent
            else:
                outputs = outputs.copy()
                outputs[self._bending] = bent
        total = np.empty((len(outputs), *directions.shape[1:]), directions.dtype)
        for rows, of in zip(self.rows, self._slices(self._fold_of), strict=True):
            part = outputs[of].reshape(-1, self.count)[:, : len(rows)]
            _sum_up(part, rows, total[of].reshape(-1, rows.shape[1]))
        return total

    def advance(self, strides: Rows) -> None:
        """Let the moves of those that have bent (q,) grow by so many of their directions."""
        self._strides = strides

    def keep(self, is_open: NDArray[np.bool_], fold_of: NDArray[np.int64]) -> None:
        """Leave the other problems."""
        self._catch_up()
        self._stand(np.compress(is_open, self._states, axis=1))
        self._fold(fold_of)

    def _catch_up(self) -> None:
        if len(self._strides):
            ahead = self._ahead[: len(self._strides)]
            ahead *= self._strides[:, None, None]
            self._moved[self._bending] += ahead
            self._strides = self._strides[:0]

    def _slices(self, fold_of: NDArray[np.int64]) -> Iterator[slice]:
        """Return which of problems, sorted by fold, are each fold's."""
        bounds = np.searchsorted(fold_of, np.arange(len(self.rows) + 1)).tolist()
        return (slice(*pair) for pair in pairwise(bounds))

    def _multiply_by(self, vectors: Rows, fold_of: NDArray[np.int64], out: Rows) -> None:
        """Put vectors (q, k, r + 1) times their folds' rows into (q, k, n)."""
        for rows, of in zip(self.rows, self._slices(fold_of), strict=True):
            scores = out[of].reshape(-1, self.count)
            _multiply(vectors[of].reshape(-1, vectors.shape[2]), rows, scores[:, : len(rows)])
            scores[:, len(rows) :] = 0

    def _bent(self, moves: Rows, slopes: Rows, index: Any) -> Rows:
        """Return by how much the losses' slopes change when outputs move (q, k, n)."""
        if self.kind == "softmax":
            places = _places(self._y_of[index], moves)
            # Nothing is cancelled where the right class is nearly certain: less its move, its slope does not count in the
            # mean, and one is missing from it afterwards.
            bent: Rows = moves - moves.reshape(-1)[places][:, None]
            mean = np.einsum("pkn,pkn->pn", slopes, bent)
            bent -= mean[:, None]
            bent *= slopes
            bent.reshape(-1)[places] -= mean
        else:
            bent = moves * self._curvature(slopes)
        return bent


def _places(y_true: NDArray[np.int64], outputs: Rows) -> NDArray[np.int64]:
    """Return where in all outputs (p, k, n) those of the right classes lie (p, n), given where in a problem's."""
    places: NDArray[np.int64] = y_true + np.arange(len(outputs))[:, None] * (outputs.size // max(1, len(outputs)))
    return places


# OpenBLAS rearranges both operands of a product first, which takes longer than to read the rows once for each of a few
# vectors; and it takes vectors by fours or eights, and longer for the odd ones among them than for as many more.


def _multiply(vectors: Rows, rows: Rows, out: Rows) -> None:
    """Put vectors (m, r) times rows (n, r) into (m, n)."""
    count = len(vectors)
    if _is_small(vectors.size * len(rows)):
        out[:] = (rows @ np.ascontiguousarray(vectors.T)).T
    elif count <= _ALONE:
        for vector, scores in zip(vectors, out, strict=True):
            scores[:] = rows @ vector
    elif count > _THIN:
        np.matmul(vectors, rows.T, out=out)
    else:
        more = -count % 8
        out[:] = (rows @ _with_zeros(vectors, more if more <= _FILL else 0).T)[:, :count].T  # in the faster order


def _sum_up(values: Rows, rows: Rows, out: Rows) -> None:
    """Put values (m, n) times rows (n, r) into (m, r)."""
    count = len(values)
    if count <= _ALONE and not _is_small(values.size * rows.shape[1]):
        for value, total in zip(values, out, strict=True):
            total[:] = value @ rows
    elif count > _THIN or not count % 4 or _is_small(values.size * rows.shape[1]):
        np.matmul(values, rows, out=out)
    else:
        out[:] = (_with_zeros(values, -count % 4) @ rows)[:count]


def _is_small(multiplications: int) -> bool:
    """Tell whether a product is one that is multiplied as it lies."""
    return multiplications <= _AS_THEY_LIE and takes_small_products()


def _with_zeros(vectors: Rows, more: int) -> Rows:
    """Return vectors with so many of zeros behind them."""
    return np.concatenate([vectors, np.zeros((more, vectors.shape[1]), vectors.dtype)]) if more else vectors


def _padded(rows: Rows, width: int) -> Rows:
    """Return affine rows with columns of zeros before the last, so that all folds have one width."""
    missing = width - rows.shape[1]
    return np.insert(rows, [rows.shape[1] - 1] * missing, 0, axis=1) if missing else rows


class SideBySide:
    """Problems, a fold and a C each, that go down side by side.

    Conjugate gradients take the second derivatives for those by each output alone: the penalty, and the columns' variance
    about that output's mean, where rows weigh as their losses are curved. Means that are taken off are how an intercept
    follows the weights. Steps of classes are kept to those that sum to nothing, as the optimum's weights do. Scores are
    kept beside the models, so that looking along a step takes no product.

    Args:
        loss: evaluates them.
        fold_of: the fold of each (p,), ascending.
        C: by which losses are multiplied (p,).
        weights: from where they start (p, k, r + 1).
        tolerance: see ``newton.Descents``.
    """

    def __init__(
        self, loss: TurnedLoss, fold_of: NDArray[np.int64], C: Floats, weights: Rows, tolerance: float | None = None
    ) -> None:
        self.loss, self.fold_of = loss, fold_of
        self.C = C * loss.shares_of_C[fold_of]
        if loss.loss == "softmax":
            weights = weights.copy()
            weights[:, :, :-1] -= loss.evens[fold_of] * weights[:, :, :-1].sum(axis=1, keepdims=True)
        self.descents = newton.Descents(weights, tolerance)
        rows = int(max(loss.counts))
        self._shares = loss.shares_of_work(weights.size * rows)
        fitting = max(_LEAST_PART_ROWS, _PART // (weights.shape[0] * weights.shape[1]))
        blocks = even_slices(rows, fitting, self._shares)
        self._parts = loss.threads.map(lambda block: _Part(loss, block, fold_of, weights), blocks)
        self._shrinks = np.zeros_like(weights)
        self._means = np.zeros((*weights.shape[:2], loss.main), weights.dtype)
        self.turns = 0

    @staticmethod
    def room(outputs: int, width: int, rows: int) -> int:
        """Return how many numbers a problem takes."""
        return outputs * (_VECTORS * width + _STATES * rows)

    @property
    def weights(self) -> Rows:
        """The models (p, k, r + 1)."""
        return self.descents.points

    @property
    def ahead(self) -> Rows:
        """Where the models are about to go (p, k, r + 1), as far as is known."""
        models: Rows = self.descents.points + self.descents.ahead
        return models

    @property
    def left(self) -> Floats:
        """What is estimated to be left (p,), as a share of each value, or of what has been gained if that is less."""
        gained = self.C * self.loss.guessing[self.fold_of] - self.descents.values
        shares: Floats = self.descents.decrements / np.maximum(np.minimum(self.descents.values, gained), _NO_VALUE)
        return shares

    @property
    def slopes(self) -> Rows:
        """The derivatives (p, k, r + 1) by the models."""
        return self.descents.gradients

    @property
    def arrived(self) -> NDArray[np.bool_]:
        """Which have moved in the last turn (p,)."""
        return self.descents.arrived

    def step(self) -> None:
        """Evaluate every problem, or its second derivative along a direction, once."""
        descents = self.descents
        descents.begin()
        if not descents.bends.all():
            self._look()
        bends, arrived, lengths = descents.bends, descents.arrived, descents.lengths.astype(descents.points.dtype)
        asked = descents.asked
        vectors = self._sum(lambda part: part.products(asked, bends, arrived, lengths))
        vectors *= self.C[:, None, None].astype(asked.dtype)
        vectors[:, :, :-1] += asked[:, :, :-1]
        descents.tell(vectors)
        for part in self._parts:
            part.advance(descents.strides[bends].astype(asked.dtype))
        descents.turn(self._precondition(descents.rests))
        self.turns += 1

    def keep(self, is_open: NDArray[np.bool_]) -> None:
        """Leave the other problems where they are."""
        self.descents.keep(is_open)
        self.fold_of, self.C = self.fold_of[is_open], self.C[is_open]
        for part in self._parts:
            part.keep(is_open, self.fold_of)
        self._shrinks, self._means = self._shrinks[is_open], self._means[is_open]

    def _each(self, act: "Callable[[_Part], Any]") -> list[Any]:
        shares = self.loss.threads.by_share(lambda parts: [act(part) for part in parts], self._parts, self._shares)
        return [result for share in shares for result in share]

    def _sum(self, act: "Callable[[_Part], Rows]") -> Rows:
        """Return the sum over all parts, a part's own let go before the next."""

        def add_up(parts: "Sequence[_Part]") -> Rows:
            first, *following = parts
            total = act(first)
            for part in following:
                total += act(part)
            return total

        total: Rows
        total, *addends = self.loss.threads.by_share(add_up, self._parts, self._shares)
        for addend in addends:
            total += addend
        return total

    def _look(self) -> None:
        """Look along the steps of those that do not bend, nearer and nearer, until each is where it is to go on from."""
        descents = self.descents
        points, moves = descents.points[:, :, :-1], descents.moves[:, :, :-1]
        lengths_now, across, squares = (
            _inner_products(*pair) for pair in ((points, points), (points, moves), (moves, moves))
        )
        values, ends = np.full((2, len(points)), np.inf)
        while (waits := descents.waits).any():
            index: Any = slice(None) if waits.all() else np.flatnonzero(waits)
            lengths, C = descents.lengths[index], self.C[index]
            trials = lengths.astype(points.dtype)
            seen = [sum(each) for each in zip(*self._each(lambda part: part.look(index, trials)), strict=True)]  # noqa: B023
            values[index] = C * seen[0] + (lengths_now[index] + lengths * (2 * across[index] + lengths * squares[index])) / 2
            ends[index] = C * seen[1] + across[index] + lengths * squares[index]
            descents.look(values, ends)
        self._shape()

    def _shape(self) -> None:
        """Take the curvature of those that have just arrived."""
        arrived = np.flatnonzero(self.descents.arrived)
        parts = zip(*self._each(lambda part: part.curved(arrived)), strict=True)
        outputs, columns, squares = (sum(part) for part in parts)
        is_flat = outputs <= _FLAT * outputs.max(axis=1, keepdims=True)  # of no row
        means = columns / np.where(is_flat, np.inf, outputs)[:, :, None].astype(columns.dtype)
        spread = squares / np.maximum(squares[:, -1:], _NO_VALUE)  # the last column is of ones
        shares = outputs / np.maximum(outputs.sum(axis=1, keepdims=True), _NO_VALUE)
        spread[:, : self.loss.main] -= np.einsum("pk,pkm->pm", shares, np.square(means))
        losses_part = (self.C[arrived, None] * outputs).astype(spread.dtype)
        stiff = losses_part[:, :, None] * np.maximum(spread, 0)[:, None]
        stiff[:, :, :-1] += 1
        stiff[:, :, -1][is_flat] = np.inf
        self._shrinks[arrived], self._means[arrived] = 1 / stiff, means

    def _precondition(self, vectors: Rows) -> Rows:
        main = self.loss.main
        inverse = vectors.copy()
        inverse[:, :, :main] -= self._means * vectors[:, :, -1:]
        inverse *= self._shrinks
        inverse[:, :, -1] -= np.einsum("pkm,pkm->pk", self._means, inverse[:, :, :main])
        if self.loss.loss == "softmax":
            inverse -= self.loss.evens[self.fold_of] * inverse.sum(axis=1, keepdims=True)
        return inverse


def _inner_products(vectors: Rows, by: Rows) -> Floats:
    """Return the inner product (p,) of each problem's vectors (p, k, r): summed in float64 over k."""
    return np.einsum("pkr,pkr->pk", vectors, by).sum(axis=1, dtype=np.float64)  # type: ignore[no-any-return]


def _products(weights: Rows, rows: Rows) -> Rows:
    """Return weights (m, d) times rows (r, d) as (m, r), in the order in which BLAS is the faster one."""
    if not weights.any():
        return np.zeros((len(weights), len(rows)), weights.dtype)
    if weights.dtype == np.float64 or len(weights) > _NARROW:
        return weights @ rows.T
    turned, out = np.ascontiguousarray(weights.T), np.empty((len(rows), len(weights)), weights.dtype)
    pieces, step = _pieces(len(rows), weights.size)
    even = pieces * step
    by_piece = rows[:even].reshape(pieces, step, rows.shape[1])
    np.matmul(by_piece, turned, out=out[:even].reshape(pieces, step, len(weights)))
    np.matmul(rows[even:], turned, out=out[even:])
    return np.ascontiguousarray(out.T)


def _summed_products(values: Rows, rows: Rows) -> Rows:
    """Return values (m, r) times rows (r, d), (m, d)."""
    pieces, step = _pieces(len(rows), len(values) * rows.shape[1])
    even = pieces * step
    by_piece = values[:, :even].reshape(len(values), pieces, step).transpose(1, 0, 2)
    total: Rows = np.matmul(by_piece, rows[:even].reshape(pieces, step, rows.shape[1])).sum(axis=0)
    return total + values[:, even:] @ rows[even:] if even < len(rows) else total


def _pieces(rows: int, cost: int) -> tuple[int, int]:
    """Return number and length of pieces whose products, ``cost`` operations a row, BLAS takes as they lie.

    They go into one call, in which the interpreter is not waited for between them. A rest may be left over; where no piece
    is small enough, all rows are one.
    """
    step = _AS_THEY_LIE // max(1, cost) // _ROUND * _ROUND
    return (rows // step, step) if 0 < step < rows else (1, rows)
