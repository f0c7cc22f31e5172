"""Embeddings on a plane, to be looked at."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import SetupError

Way = Literal["pca", "tsne"]
WAYS: tuple[Way, ...] = ("pca", "tsne")


@dataclass(frozen=True)
class Plane:
    """Places (n, 2) float64, and how they were found, in words."""

    xy: NDArray[np.float64]
    how: str


def projected(X: NDArray[Any], way: Way = "pca", seed: int = 0) -> Plane:
    """Return embeddings X (n, d) on a plane.

    ``pca`` takes the two directions of the greatest variance (Pearson 1901); ``tsne`` keeps neighbours together and says
    nothing of distances (van der Maaten and Hinton 2008; the package openTSNE, Policar et al. 2024).

    There are at least three rows and three columns.

    Raises:
        SetupError: openTSNE is asked for and not installed.
    """
    centred = np.asarray(X, np.float64) - X.mean(axis=0, dtype=np.float64)
    if way == "tsne":
        return _by_neighbours(centred, seed)
    from scipy.sparse.linalg import eigsh

    # the smaller of both products, of which two eigenvectors are wanted: all of them would take seconds
    is_wide = centred.shape[1] > centred.shape[0]
    product = centred @ centred.T if is_wide else centred.T @ centred
    values, vectors = eigsh(product, k=2, v0=np.linspace(1, 2, len(product)))
    values, vectors = values[::-1], vectors[:, ::-1]
    xy = vectors * np.sqrt(np.maximum(values, 0)) if is_wide else centred @ vectors
    # a direction has no sign of its own: the same rows always give the same picture
    xy = xy * np.where(xy[np.abs(xy).argmax(axis=0), np.arange(xy.shape[1])] < 0, -1, 1)
    total = float((centred**2).sum())
    share = 100 * float(np.maximum(values, 0).sum()) / total if total else 0.0
    return Plane(xy, f"the two principal components, which hold {share:.0f} % of the variance")


def _by_neighbours(centred: NDArray[np.float64], seed: int) -> Plane:
    try:
        from openTSNE import TSNE
    except ImportError:
        raise SetupError("a t-SNE map needs openTSNE: `pip install 'featcache[map]'`.") from None
    perplexity = max(2.0, min(30.0, (len(centred) - 1) / 3))
    xy = np.asarray(TSNE(perplexity=perplexity, random_state=seed, metric="cosine", n_jobs=-1).fit(centred), np.float64)
    return Plane(xy, f"t-SNE of perplexity {perplexity:g}: neighbours are alike, distances between groups say nothing")
