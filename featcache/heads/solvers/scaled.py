"""Features by blocks of rows on all cores: centred, scaled, rows of one fold beside each other; and ridge regression."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from mmap import ACCESS_COPY, mmap
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, eigh, lapack, qr, solve_triangular
from threadpoolctl import ThreadpoolController

from featcache.resources import Threads, cores

if TYPE_CHECKING:
    from featcache.store import LazyRows

Rows = NDArray[Any]
Floats = NDArray[np.float64]
Index = NDArray[np.int64]
Result = TypeVar("Result")

_BLOCK_BYTES = 2 << 20  # enough for efficient products, little enough for a core's share of the caches
_LONG_BLOCK_BYTES = 8 << 20  # where a block's work is so little that the interpreter's part in it counts
_NEAR = 64  # rows whose mean is near enough to that of all that little is cancelled
_TURNED_ROWS = 256  # at a time
_EXACT_ROWS = 128  # in float64 at a time
_BY_ALL_FROM = 400_000  # numbers, from which on a second thread pays
_MOMENT_ROWS = 256  # in a piece: a piece's sums in float32 keep their digits
_MAIN_AXES, _MAIN_ROW_AXES = 96, 48  # how many are found where there are more columns; in the rows' own space
_AXES_ROWS, _AXES_PART = 2048, 512  # from which they are found; read at a time
_FEW_ROWS = 0.45  # a feature, up to which the rows' own space is taken
_SMALL, _FEWER = 256, 0.7  # rows that are taken for few anyway, where they are fewer than so many a feature
_ROUNDED = 1e-6  # of the greatest eigenvalue: what is below is float32's rounding
_RETURNED = 1 << 20  # bytes, from which on it pays to ask the system for them
_SMALL_PRODUCTS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # OpenBLAS' kernels
_NO_MIRROR = 1e-30  # scale of a reflection that changes nothing
_FEW_ALPHAS = 4  # for which a factorisation each is faster than the eigenvectors of all
_FACTORISED = 1e-9  # of the mean products' trace, above which what is added to their diagonal makes them surely positive
_GRAM_ROWS = 12  # a feature: enough to learn the directions of a preconditioner from


@dataclass(frozen=True)
class FoldScale:
    """Rows that train a model: how many, and the place and the spread (d,) of features by which the model sees them."""

    count: int
    mean: Floats
    scale: Floats


class ScaledRows:
    """Features (n, d) as (x - mean) / scale over the rows that any fold uses, the others left out.

    Args:
        X: an array, or anything that is sliced by rows, as ``LazyRows``; finite.
        rows: for each fold, which rows train (n,) bool; 62 folds at most.
        standardise: folds see (x - mean) / standard deviation over their own rows, else x - mean.
        in_memory: keep a float32 copy, sorted by fold; else rows are read anew in every pass, in their own order.
    """

    def __init__(
        self, X: "Rows | LazyRows", rows: Sequence[NDArray[np.bool_]], *, standardise: bool, in_memory: bool = True
    ) -> None:
        # A bit a fold: rows of the same folds lie beside each other, and a block that no model trains on is skipped.
        groups = np.zeros(len(X), np.int64)
        for number, is_used in enumerate(rows):
            groups |= is_used.astype(np.int64) << number
        self.order = np.argsort(groups, kind="stable")[np.count_nonzero(groups == 0) :] if in_memory else np.arange(len(X))
        self.trains = [(groups[self.order] >> number & 1).astype(bool) for number in range(len(rows))]
        self.width = X.shape[1]
        self.blocks = slices(len(self.order), max(64, _BLOCK_BYTES // (4 * max(1, self.width))))
        long_count = math.ceil(4 * self.width * len(self.order) / _LONG_BLOCK_BYTES / cores()) * cores()
        self.long_blocks = slices(len(self.order), max(64, math.ceil(len(self.order) / max(1, long_count))))
        self._groups, self._source = groups[self.order], X
        self._moved = bool((self.order != np.arange(len(self.order))).any())
        self._standardise = standardise
        # Threads: NumPy's products release the interpreter, and the features are shared.
        self._threads = Threads()
        self._single = getattr(X, "dtype", None) == np.float32
        moments = self._moments_by_group()
        self.folds = []
        for number in range(len(rows)):
            count, mean, scale = _spread([moments[group] for group in moments if group >> number & 1])
            self.folds.append(FoldScale(count, mean, scale if standardise else np.ones(self.width)))
        self.count, mean, self.scale = _spread([moments[group] for group in moments if group])
        self.mean = mean.astype(np.float32).astype(np.float64) if self._single else mean  # what can be taken off exactly
        self._cached: Rows | None = None
        if not in_memory:
            self.long_blocks = self.blocks
        else:
            self._cached = cached = np.empty((len(self.order), self.width), np.float32)

            def keep(block: slice) -> None:
                if self._single:
                    np.subtract(self._raw(block), self.mean.astype(np.float32), out=cached[block])
                    np.multiply(cached[block], (1 / self.scale).astype(np.float32), out=cached[block])
                else:
                    cached[block] = self._centred(block)

            self.each(keep)

    def close(self) -> None:
        """Let the threads end."""
        self._threads.close()

    def each(self, act: Callable[[slice], Result]) -> list[Result]:
        """Call a function with every block of rows, as many at a time as there are cores."""
        return self._threads.map(act, self.blocks)

    def shared(self, act: Callable[[Sequence[slice]], Result], blocks: Sequence[slice] | None = None) -> list[Result]:
        """Call a function once a core with its share of the blocks, all of them if left out."""
        return self._threads.by_share(act, self.blocks if blocks is None else blocks)

    def block(self, block: slice, kind: type = np.float32) -> Rows:
        """Return some rows (b, d), centred and scaled."""
        if self._cached is not None and kind is np.float32:
            return self._cached[block]
        return self._centred(block).astype(kind)

    def gram(self, *, sampled: bool = False) -> Floats:
        """Return the mean of x x' (d, d) over the rows in use, in the coordinates of a fold of them all.

        ``sampled`` takes float32 and no more rows than show the main directions.
        """
        stretch = np.ones(self.width) if self._standardise else self.scale
        kind: type = np.float32 if sampled else np.float64
        sampled_blocks = self.sample(_GRAM_ROWS * self.width) if sampled else self.blocks

        def gram_of(blocks: Sequence[slice]) -> tuple[Floats, int]:
            total: Rows = np.zeros((self.width, self.width), kind)
            count = 0
            for block in blocks:
                rows, used = self.block(block, kind), self._groups[block] > 0
                rows = rows if used.all() else rows[used]
                total += rows.T @ rows
                count += len(rows)
            return total.astype(np.float64), count

        parts = self.shared(gram_of, sampled_blocks)
        total, count = sum(part for part, _ in parts), sum(count for _, count in parts)
        return total / count * stretch[:, None] * stretch

    def sample(self, rows: int) -> list[slice]:
        """Return every so many blocks, at least one a core, that have about as many rows as asked for, or all rows."""
        step = min(len(self.order) // max(1, rows), len(self.blocks) // cores())
        return self.blocks[::step] if step > 1 else self.long_blocks

    def cross(self, targets: Floats) -> Floats:
        """Return the mean of x t' (d, t) over the rows in use, ``targets`` (n, t), in the same coordinates."""
        stretch = np.ones(self.width) if self._standardise else self.scale

        def cross_of(blocks: Sequence[slice]) -> Floats:
            total = np.zeros((self.width, targets.shape[1]))
            for block in blocks:
                used = self._groups[block] > 0
                total += self.block(block, np.float64)[used].T @ targets[self.order[block]][used]
            return total

        return np.sum(self.shared(cross_of), axis=0) / self.count * stretch[:, None]  # type: ignore[no-any-return]

    def in_use(self) -> Floats:
        """Return the rows in use (k, d), in the coordinates of a fold of them all."""
        stretch = np.ones(self.width) if self._standardise else self.scale
        rows: Floats = np.concatenate(self.each(lambda block: self._centred(block)[self._groups[block] > 0]))
        rows *= stretch
        rows -= rows.mean(axis=0)  # to the last digit: blocks are centred by a float32 mean
        return rows

    def _centred(self, block: slice) -> Floats:
        return (self._raw(block).astype(np.float64) - self.mean) / self.scale

    def _raw(self, block: slice) -> Rows:
        rows = np.asarray(self._source[self.order[block] if self._moved else block])
        return rows if self._single else rows.astype(np.float64)

    def _moments_by_group(self) -> "dict[int, _Moments]":
        """Return number, mean and squared deviations of the rows that belong to the same folds, in one pass."""

        def moments_of(block: slice) -> "list[tuple[int, _Moments]]":
            rows, groups = self._raw(block), self._groups[block]
            moments = []
            for group in np.unique(groups):
                same = groups == group
                moments.append((int(group), _Moments.of(rows if same.all() else rows[same])))
            return moments

        gathered: dict[int, list[_Moments]] = {}
        for block in self.each(moments_of):
            for group, moments in block:
                gathered.setdefault(group, []).append(moments)
        return {group: _Moments.joined(parts) for group, parts in gathered.items()}


def slices(rows: int, step: int) -> list[slice]:
    """Return blocks of so many rows, each of a step at most."""
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def even_slices(rows: int, most: int, shares: int) -> list[slice]:
    """Return blocks of so many rows at most, of about the same length and as many for each share."""
    blocks = shares * max(1, -(-rows // (shares * most)))
    return slices(rows, max(1, -(-rows // blocks)))


class _Moments(NamedTuple):
    rows: int
    mean: Floats
    squares: Floats

    @classmethod
    def of(cls, rows: Rows) -> "_Moments":
        """Measure rows as they lie from the mean of the first of them: a constant feature is exactly 0 from there."""
        near = rows[:_NEAR].mean(axis=0, dtype=np.float64).astype(rows.dtype)
        away = rows - near
        further = (np.ones(len(rows), rows.dtype) @ away).astype(np.float64) / len(rows)
        squares = np.einsum("ij,ij->j", away, away).astype(np.float64) - len(rows) * further**2
        return cls(len(rows), near + further, np.maximum(squares, 0))

    @classmethod
    def joined(cls, parts: "Sequence[_Moments]") -> "_Moments":
        """Put together what was measured apart (Chan, Golub and LeVeque 1983)."""
        count = sum(part.rows for part in parts)
        mean = np.sum([part.mean * (part.rows / count) for part in parts], axis=0)
        squares = np.sum([part.squares + part.rows * (part.mean - mean) ** 2 for part in parts], axis=0)
        return cls(count, mean, squares)


def _spread(parts: Sequence[_Moments]) -> tuple[int, Floats, Floats]:
    """Return number, mean and standard deviation; features without spread get 1, by StandardScaler's rule."""
    count, mean, squares = _Moments.joined(parts)
    variance, eps = squares / count, np.finfo(np.float64).eps
    flat = variance <= count * eps * variance + (count * mean * eps) ** 2
    return count, mean, np.where(flat, 1.0, np.sqrt(variance))


def products_on(count: int) -> AbstractContextManager[Any]:
    """Let matrix products use so many cores; finding the libraries takes longer than a small fit, and is done once."""
    return libraries().limit(limits=count, user_api="blas")  # type: ignore[no-any-return]


def returned_zeros(shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
    """Return zeros; many of them go back to the system as soon as they are let go.

    The C library keeps what threads free, piece by piece, and asks the system for what does not fit into these.
    """
    size = math.prod(shape) * np.dtype(kind).itemsize
    if size < _RETURNED:
        return np.zeros(shape, kind)
    return np.frombuffer(mmap(-1, size, access=ACCESS_COPY), kind).reshape(shape)


@cache
def libraries() -> ThreadpoolController:
    """Return the loaded libraries that have threads of their own, to limit these."""
    return ThreadpoolController()


@cache
def takes_small_products() -> bool:
    """Tell whether the linear algebra in use has ways of its own for small products: OpenBLAS with AVX-512 has."""
    return any(library.get("architecture") in _SMALL_PRODUCTS for library in libraries().info())


class TurnedRows:
    """One fold's rows (n, r + 1), float32: turned so that columns are about uncorrelated, and a column of ones.

    To the axes of the rows' covariance; of wide rows to the main ones (Halko, Martinsson and Tropp 2011, algorithm 4.4) and
    any that complete them; into the space of the rows where these are fewer. ``held`` (v, r + 1) are rows that judge.

    Args:
        X: features (m, d), finite.
        train: positions of the rows that train (n,).
        val: positions of those that judge (v,).
        standardise: see (x - mean) / standard deviation over the rows that train, else x - mean.
        axes: of other rows of these features, near enough.
        each: calls a function with parts of the rows, side by side where nothing else is.
    """

    def __init__(
        self,
        X: Rows,
        train: NDArray[Any],
        val: NDArray[Any],
        *,
        standardise: bool,
        axes: "Axes | None" = None,
        each: Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]] = map,
    ) -> None:
        self.train, self._source, self._each = train, X, each
        blocks = slices(len(train), _MOMENT_ROWS)
        _, self.mean, scale = _spread(list(each(lambda block: _Moments.of(X[train[block]]), blocks)))
        if X.dtype == np.float32:
            self.mean = self.mean.astype(np.float32).astype(np.float64)  # what can be taken off exactly
        self.scale = scale if standardise else np.ones_like(scale)
        if len(train) <= max(_FEW_ROWS * X.shape[1], min(_SMALL, _FEWER * X.shape[1])):
            rows = self.standardised(slice(None)).astype(np.float32, copy=False)
            self.axes: Axes = _RowAxes(rows)
            self.rows = np.ones((len(rows), self.axes.count + 1), np.float32)
            self.rows[:, :-1] = self.axes.of_rows
        else:
            self.axes = self._whole_axes() if axes is None else axes
            self.rows = self._turned(train)
        self.held = self._turned(val)

    def standardised(self, block: slice) -> Rows:
        """Return rows that train (b, d) as the model sees them: in float32 if they are that, else in float64."""
        return self._centred(self.train[block])

    def exactly(self, block: slice) -> Floats:
        """Return them less their mean in float64, not yet divided by the scale."""
        rows: Floats = self._source[self.train[block]].astype(np.float64)
        rows -= self.mean
        return rows

    def exact_products(self, weights: Floats) -> Floats:
        """Return weights (k, d) by standardised features times the rows that train, (k, n), all in float64."""
        by_features, scores = weights / self.scale, returned_zeros((len(weights), len(self.train)), np.float64)

        def multiply(block: slice) -> None:
            np.matmul(by_features, self.exactly(block).T, out=scores[:, block])

        self.by_blocks(multiply, _EXACT_ROWS)
        return scores

    def exact_sums(self, values: Callable[[slice], Floats], outputs: int) -> Floats:
        """Return values, by block of rows (k, b), times the rows that train, standardised (k, d), all in float64."""
        shape = outputs, self._source.shape[1]

        def sum_up(blocks: Sequence[slice]) -> Floats:
            total = np.zeros(shape)
            for block in blocks:
                total += values(block) @ self.exactly(block)
            return total

        blocks = self._blocks(_EXACT_ROWS)
        shares = self._each(sum_up, [blocks[core :: cores()] for core in range(min(cores(), len(blocks)))])
        total: Floats = sum(shares) / self.scale
        return total

    def by_blocks(self, act: Callable[[slice], Result], most: int) -> list[Result]:
        """Return what comes of blocks of at most so many rows that train, side by side where they are many."""
        return list(self._each(act, self._blocks(most)))

    def _blocks(self, most: int) -> list[slice]:
        """Return blocks of rows, one a core at least where they are many."""
        share = -(-len(self.train) // cores()) if self.train.size * self._source.shape[1] > _BY_ALL_FROM else most
        return slices(len(self.train), min(share, most))

    def back(self, weights: Rows) -> Floats:
        """Return weights (k, r) by the turned columns as those by standardised features (k, d)."""
        return self.axes.back(weights[:, : self.axes.count]).astype(np.float64)

    def models(self, weights: Floats, intercept: Floats) -> Rows:
        """Return models of features as they come, weights (k, d) and intercepts (k,), as ones of turned rows (k, r + 1)."""
        turned = self.axes.turned((weights * self.scale).astype(np.float32))
        last = (intercept + weights @ self.mean).astype(np.float32)
        return np.concatenate([turned, last[:, None]], axis=1)

    def _centred(self, rows: NDArray[Any]) -> Rows:
        kind = self._source.dtype if self._source.dtype == np.float32 else np.dtype(np.float64)
        centred: Rows = self._source[rows].astype(kind, copy=False)
        centred -= self.mean.astype(kind)
        centred *= (1 / self.scale).astype(kind)
        return centred

    def _single(self, rows: NDArray[Any]) -> Rows:
        return self._centred(rows).astype(np.float32, copy=False)

    def _turned(self, rows: NDArray[Any]) -> Rows:
        turned = np.ones((len(rows), self.axes.count + 1), np.float32)

        def turn(block: slice) -> None:
            turned[block, :-1] = self.axes.turned(self._single(rows[block]))

        list(self._each(turn, slices(len(rows), _TURNED_ROWS)))
        return turned

    @property
    def whole_axes(self) -> "Axes | None":
        """Its axes where there are as many as features: those serve other rows too."""
        return self.axes if self.axes.count == self._source.shape[1] else None

    def _whole_axes(self) -> "Axes":
        """Return axes by which rows are about uncorrelated, from some of them."""
        sampled = self.train[:: -(-len(self.train) // _AXES_ROWS)]
        shares = cores() * -(-len(sampled) // (cores() * _AXES_PART)) if len(sampled) >= _MOMENT_ROWS else 1
        return _main_axes(self._single, np.array_split(sampled, shares), self._source.shape[1], _MAIN_AXES, self._each)


class _Axes:
    """Orthogonal axes (d, r) as they are."""

    def __init__(self, axes: Rows) -> None:
        self.axes, self.count = axes, axes.shape[1]

    def turned(self, rows: Rows) -> Rows:
        """Return rows (n, d) by the axes (n, r)."""
        return rows @ self.axes

    def back(self, weights: Rows) -> Rows:
        """Return weights (k, r) by the axes as those by features (k, d)."""
        return weights @ self.axes.T


class _RowAxes:
    """Orthogonal axes as sums of rows (n, d), which are ``of_rows`` (n, r) by them: as many as rows are independent.

    Those of a Cholesky factorisation of the rows' products with pivots (Higham 2009, section 2), turned so that the main
    ones are about uncorrelated: all eigenvectors would take three times as long.
    """

    def __init__(self, rows: Rows) -> None:
        gram = rows @ rows.T
        factor, pivots, rank, _ = lapack.spstrf(gram, tol=float(gram.diagonal().max()) * _ROUNDED, lower=1, overwrite_a=1)
        # Rows that are all the same have one axis too, of nothing: not every SciPy solves for none.
        self.count = max(rank, 1)
        lower, order = np.tril(factor[:, : self.count]), pivots - 1
        self._rows = rows[order[: self.count]]
        self._lower = lower[: self.count] if rank else np.ones((1, 1), np.float32)
        self._turn = _main_axes(lambda rows: rows, [lower], self.count, _MAIN_ROW_AXES)
        self.of_rows = np.empty_like(lower)
        self.of_rows[order] = self._turn.turned(lower)

    def turned(self, rows: Rows) -> Rows:
        """Return rows (m, d) by the axes (m, r)."""
        by_rows = solve_triangular(self._lower, self._rows @ rows.T, lower=True, check_finite=False)
        return self._turn.turned(by_rows.T)

    def back(self, weights: Rows) -> Rows:
        """Return weights (k, r) by the axes as those by features (k, d)."""
        back = self._turn.back(weights)
        of_rows = solve_triangular(self._lower, back.T, lower=True, trans=1, check_finite=False)
        by_features: Rows = of_rows.T @ self._rows
        return by_features


def _main_axes(
    read: Callable[[Any], Rows], parts: Sequence[Any], width: int, count: int, each: Any = map
) -> "_Axes | _Reflections":
    """Return axes by which rows, read in parts (n, d), are about uncorrelated: all of few columns, else the main ones.

    Parts are read again for each look at them, which takes less than the memory to keep them.
    """
    if width == 1:  # SciPy 1.11 asks LAPACK for too little room
        return _Axes(np.ones((1, 1), np.float32))
    if width <= count:
        gram = np.sum([rows.T @ rows for rows in map(read, parts)], axis=0)
        return _Axes(eigh(gram, driver="evd", check_finite=False, overwrite_a=True)[1][:, ::-1])
    main = np.random.default_rng(0).normal(size=(width, count)).astype(np.float32)

    def multiplied(part: Any) -> Rows:
        rows = read(part)
        product: Rows = rows.T @ (rows @ main)
        return product

    for _ in range(2):
        main, spread = qr(sum(each(multiplied, parts)), mode="economic", check_finite=False)  # float32: NumPy's is float64
    vectors, _, _ = np.linalg.svd(spread)
    return _Reflections(main @ vectors)


class _Reflections:
    """Main axes (d, q) and any that complete them to d, as a product of q reflections.

    In the form I - Y T Y' of Schreiber and Van Loan (1989).
    """

    def __init__(self, main: Rows) -> None:
        self.count = len(main)
        (packed, scales), _ = qr(main, mode="raw", check_finite=False)
        self._mirrors: Rows = np.tril(packed, -1)
        np.fill_diagonal(self._mirrors, 1)
        inverse = np.triu((self._mirrors.T @ self._mirrors).astype(np.float64), 1) + np.diag(
            1 / np.maximum(scales, _NO_MIRROR).astype(np.float64)
        )
        self._mixed: Rows = (self._mirrors @ np.linalg.inv(inverse).T).astype(np.float32)

    def turned(self, rows: Rows) -> Rows:
        """Return rows (n, d) by the axes (n, d)."""
        turned: Rows = rows - (rows @ self._mirrors) @ self._mixed.T
        return turned

    def back(self, weights: Rows) -> Rows:
        """Return weights (k, d) by the axes as those by features (k, d)."""
        by_features: Rows = weights - (weights @ self._mixed) @ self._mirrors.T
        return by_features


Axes = _Axes | _RowAxes | _Reflections


@contextmanager
def scaled(
    X: "Rows | LazyRows", rows: Sequence[NDArray[np.bool_]], *, standardise: bool, in_memory: bool = True
) -> Iterator[ScaledRows]:
    """Yield scaled features; inside, matrix products use one core each, since blocks run side by side."""
    with products_on(1):
        features = ScaledRows(X, rows, standardise=standardise, in_memory=in_memory)
        try:
            yield features
        finally:
            features.close()


def solve_ridge(
    X: "Rows | LazyRows",
    targets: Rows,
    alphas: Sequence[float],
    rows: NDArray[np.bool_] | None = None,
    *,
    standardise: bool = True,
) -> list[tuple[Floats, Floats]]:
    """Minimise |targets - X W' - b|^2 + alpha |W|^2, b not penalised, for every alpha.

    Args:
        X: features (n, d), finite; an array, or ``LazyRows`` where they do not fit into memory.
        targets: (n, t).
        alphas: penalties, positive.
        rows: which rows train (n,) bool; all if left out.
        standardise: penalise the weights of (x - mean) / standard deviation.

    Returns:
        For each alpha the coefficients (t, d) and the intercept (t,), in the features' own units.
    """
    used = np.ones(len(X), dtype=bool) if rows is None else rows
    centre = targets[used].mean(axis=0)
    with scaled(X, [used], standardise=standardise, in_memory=False) as features:
        count, (fold,) = features.count, features.folds
        rows_in_use = None if features.count >= features.width else features.in_use()
        if rows_in_use is None:
            gram, cross = features.gram(), features.cross(targets - centre)
        else:  # weights are sums of rows, and there are fewer of those than of features
            gram, cross = rows_in_use @ rows_in_use.T / count, (targets - centre)[used] / count
        solutions = []
        for weights in _shrunk(gram, cross, [alpha / count for alpha in alphas]):
            coefficients = (weights if rows_in_use is None else rows_in_use.T @ weights).T / fold.scale
            solutions.append((coefficients, centre - coefficients @ fold.mean))
    return solutions


def _shrunk(gram: Floats, cross: Floats, shares: Sequence[float]) -> Iterator[Floats]:
    """Yield (gram + s)^-1 cross (d, t) for every s: by a factorisation each, or for many by the eigenvectors of all."""
    # A tenth of an eigendecomposition's time each. Where s is near rounding of the gram there may be no factorisation.
    if len(shares) <= _FEW_ALPHAS and min(shares) > _FACTORISED * np.trace(gram):
        for share in shares:
            raised = gram.copy() if len(shares) > 1 else gram
            raised[np.diag_indices_from(raised)] += share
            yield cho_solve(cho_factor(raised, overwrite_a=True, check_finite=False), cross, check_finite=False)
        return
    # One core: threads wait for one another at each of an eigendecomposition's steps, and take longer.
    values, vectors = eigh(gram, driver="evd", check_finite=False, overwrite_a=True)
    turned = vectors.T @ cross
    for share in shares:
        yield vectors @ (turned / (np.maximum(values, 0.0) + share)[:, None])
