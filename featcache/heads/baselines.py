"""Controls that need no backbone: what they reach, a backbone's features must beat to be worth anything.

On one published remote-sensing set a nearest neighbour on image statistics beats a large frozen transformer's: without
controls nobody would see it.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache import heads
from featcache.evaluation.metrics import Scores, TestResult, score, scores_on_test
from featcache.evaluation.splits import Fold, Index, Split

SIDE = 32  # pixels of the thumbnails that controls look at
_RAW_SIDE = 16


@dataclass(frozen=True)
class Baseline:
    """A trivial method on the test split."""

    name: str
    val: Scores
    tested: TestResult
    seconds: float = 0.0

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``baselines`` of ``featcache fit``."""
        return {"control": self.name, "val": asdict(self.val), "test": asdict(self.tested.scores)}


def baselines(thumbnails: NDArray[np.uint8], y: NDArray[np.int64], split: Split, seed: int = 0) -> list[Baseline]:
    """Return the majority class, nearest neighbours on image statistics, and a logistic head on 16 x 16 pixels.

    Args:
        thumbnails: uint8 (n, 32, 32, 3).
        y: classes (n,).
        split: which images train, choose and test.
        seed: of the heads' own randomness.
    """
    classes = int(y.max()) + 1
    found = [_majority(y, split, classes)]
    colours, pixels = statistics(thumbnails), raw_pixels(thumbnails)
    for name, head, (rows, labels, folds), X in (
        ("image statistics + kNN", "knn", _by_fold(colours, y, split), standardised(colours, split.train_val)),
        ("16 x 16 pixels + logistic", "logistic", (pixels, y, split.folds), pixels),  # the solver scales by itself
    ):
        started = time.monotonic()
        chosen = heads.search_head(head, rows, labels, folds, seed)
        estimator = heads.train(head, chosen.params, X[split.train_val], y[split.train_val], seed)
        seconds = time.monotonic() - started
        tested = scores_on_test(lambda index: heads.answers(estimator, X[index], classes), y, split)  # noqa: B023
        found.append(Baseline(name, chosen.val, tested, seconds))
    return found


def best_on_validation(found: Sequence[Baseline]) -> Baseline:
    """Return the control that the best head is compared with: chosen as heads are, without the test split."""
    return max(found, key=lambda baseline: baseline.val.accuracy)


def _majority(y: NDArray[np.int64], split: Split, classes: int) -> Baseline:
    commonest = [np.bincount(y[fold.train], minlength=classes).argmax() for fold in split.folds]
    truth = np.concatenate([y[fold.val] for fold in split.folds])
    answers = np.concatenate([np.full(len(fold.val), one) for fold, one in zip(split.folds, commonest, strict=True)])
    final = np.bincount(y[split.train_val], minlength=classes).argmax()
    return Baseline(
        "majority class", score(truth, answers), scores_on_test(lambda index: np.full(len(index), final), y, split)
    )


def _by_fold(
    X: NDArray[np.float32], y: NDArray[np.int64], split: Split
) -> tuple[NDArray[Any], NDArray[Any], tuple[Fold, ...]]:
    """Return the rows once a fold, each time scaled by that fold's training images alone, with labels and folds."""
    rows = np.concatenate([standardised(X, fold.train) for fold in split.folds])
    shifts = [number * len(X) for number in range(len(split.folds))]
    folds = tuple(Fold(fold.train + shift, fold.val + shift) for fold, shift in zip(split.folds, shifts, strict=True))
    return rows, np.tile(y, len(folds)), folds


def standardised(X: NDArray[np.float32], train: Index) -> NDArray[np.float32]:
    """Return rows (n, d) by the mean and spread of the training rows (k,)."""
    seen = X[train].astype(np.float64)
    scaled: NDArray[np.float32] = ((X - seen.mean(axis=0)) / np.maximum(seen.std(axis=0), 1e-6)).astype(np.float32)
    return scaled


def statistics(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return each image's mean, spread and quantiles by channel, and how strong its edges are (n, 23)."""
    pixels = thumbnails.astype(np.float32) / 255
    flat = pixels.reshape(len(pixels), -1, 3)
    quantiles = np.quantile(flat, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    grey = pixels.mean(axis=3)
    edges = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    columns = [flat.mean(axis=1), flat.std(axis=1), *quantiles, np.stack(edges, axis=1)]
    return np.concatenate(columns, axis=1).astype(np.float32)


def raw_pixels(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images averaged to 16 x 16 pixels, as one row each (n, 768)."""
    step = SIDE // _RAW_SIDE
    small = thumbnails.reshape(len(thumbnails), _RAW_SIDE, step, _RAW_SIDE, step, 3).mean(axis=(2, 4)).astype(np.float32)
    rows: NDArray[np.float32] = small.reshape(len(small), -1) / np.float32(255)
    return rows
