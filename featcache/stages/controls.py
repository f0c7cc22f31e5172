"""Controls that need no backbone: what they reach, a backbone's features must beat to be worth anything.

On one published remote-sensing set a nearest neighbour on image statistics beats a large frozen transformer's: without
controls nobody would see it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import heads
from featcache.metrics import Tested, scores_on_test
from featcache.splits import Split

SIDE = 32  # pixels of the thumbnails that controls look at
_RAW_SIDE = 16


@dataclass(frozen=True)
class Control:
    """A trivial method on the test split."""

    name: str
    tested: Tested

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``controls`` of ``featcache fit``."""
        return {"control": self.name, "test": asdict(self.tested.scores)}


def controls(thumbnails: NDArray[np.uint8], y: NDArray[np.int64], split: Split, seed: int = 0) -> list[Control]:
    """Return the majority class, nearest neighbours on image statistics, and a logistic head on 16 x 16 pixels.

    Args:
        thumbnails: uint8 (n, 32, 32, 3).
        y: classes (n,).
        split: which images train, choose and test.
        seed: of the heads' own randomness.
    """
    classes = int(y.max()) + 1
    commonest = np.bincount(y[split.train_val], minlength=classes).argmax()
    found = [Control("majority class", scores_on_test(lambda index: np.full(len(index), commonest), y, split))]
    for name, head, X in (
        ("image statistics + kNN", "knn", statistics(thumbnails)),
        ("16 x 16 pixels + logistic", "logistic", raw_pixels(thumbnails)),
    ):
        chosen = heads.choose(head, X, y, split.folds, seed)
        estimator, _ = heads.train(head, chosen.params, X[split.train_val], y[split.train_val], seed)
        tested = scores_on_test(lambda index: heads.answers(estimator, X[index], classes), y, split)  # noqa: B023
        found.append(Control(name, tested))
    return found


def statistics(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return each image's mean, spread and quantiles by channel, and how strong its edges are, standardised (n, 23)."""
    pixels = thumbnails.astype(np.float32) / 255
    flat = pixels.reshape(len(pixels), -1, 3)
    quantiles = np.quantile(flat, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    grey = pixels.mean(axis=3)
    edges = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    columns = [flat.mean(axis=1), flat.std(axis=1), *quantiles, np.stack(edges, axis=1)]
    X = np.concatenate(columns, axis=1)
    standard: NDArray[np.float32] = ((X - X.mean(axis=0)) / np.maximum(X.std(axis=0), 1e-6)).astype(np.float32)
    return standard


def raw_pixels(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images averaged to 16 x 16 pixels, as one row each (n, 768)."""
    step = SIDE // _RAW_SIDE
    small = thumbnails.reshape(len(thumbnails), _RAW_SIDE, step, _RAW_SIDE, step, 3).mean(axis=(2, 4)).astype(np.float32)
    rows: NDArray[np.float32] = small.reshape(len(small), -1) / np.float32(255)
    return rows
