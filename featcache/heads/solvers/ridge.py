"""Ridge regression for every penalty at once, from one factorisation."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from featcache.heads.solvers.scaled import Floats, Rows, products_on, scaled
from featcache.resources import cores
from featcache.store.rows import LazyRows


def solve(
    X: Rows | LazyRows,
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
        gram, cross = features.gram(), features.cross(targets - centre)
        count, (fold,) = features.count, features.folds
    with products_on(cores()):
        values, vectors = eigh(gram, driver="evd", check_finite=False, overwrite_a=True)
        turned = vectors.T @ cross
        found = []
        for alpha in alphas:
            shrunk = turned / (np.maximum(values, 0.0) + alpha / count)[:, None]
            coefficients = (vectors @ shrunk).T / fold.scale
            found.append((coefficients, centre - coefficients @ fold.mean))
    return found
