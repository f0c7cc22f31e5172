"""Accuracy against the number of training images: few-shot protocols and learning curves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from featcache import heads
from featcache.evaluation.metrics import scores_on_test
from featcache.evaluation.splits import Split, few_shot, part_of
from featcache.progress import progress
from featcache.store.rows import Features

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REPEATS = 5


@dataclass(frozen=True)
class Point:
    """Test accuracies of one head on several draws of so many training images."""

    images: int
    accuracies: tuple[float, ...]
    shots: int | None = None
    share: float | None = None

    @property
    def mean(self) -> float:
        """The mean accuracy."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """The standard deviation over draws, 0 of a single one."""
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    @property
    def summary(self) -> dict[str, Any]:
        """The point as plain data."""
        return asdict(self) | {"mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class Curve:
    """Points by number of images; the error falls as images to the power of ``slope``, ``None`` where it cannot be told."""

    head: str
    points: tuple[Point, ...]
    slope: float | None

    @property
    def summary(self) -> dict[str, Any]:
        """The curve as plain data."""
        return {"head": self.head, "slope": self.slope, "points": [point.summary for point in self.points]}


def shot_curve(
    features: Features, split: Split, head: str, shots: Sequence[int], repeats: int = REPEATS, seed: int = 0
) -> Curve:
    """Train on so many images a class, drawn from train and validation; parameters by cross-validation among them.

    With one image a class there is nothing to validate on: the most regular of the head's parameters is taken.

    Raises:
        DataError: a class has fewer images.
    """
    points = []
    with progress(len(shots) * repeats, "few-shot", unit="fit") as bar:
        for count in shots:
            accuracies = []
            for repeat in range(repeats):
                drawn = few_shot(split, features.y, count, seed + repeat, features.sha256)
                accuracies.append(_accuracy(features, drawn, head, seed + repeat))
                bar.update(1)
            points.append(Point(len(drawn.train), tuple(accuracies), shots=count))
    return Curve(head, tuple(points), _slope(points))


def learning_curve(
    features: Features,
    split: Split,
    head: str,
    shares: Sequence[float] = SHARES,
    repeats: int = REPEATS,
    seed: int = 0,
) -> Curve:
    """Train on stratified shares of the training images, larger ones holding the smaller; choose on all of validation."""
    points = []
    with progress(len(shares) * repeats, "learning curve", unit="fit") as bar:
        for share in shares:
            accuracies = []
            for repeat in range(repeats if share < 1 else 1):
                drawn = part_of(split, features.y, share, seed + repeat, features.sha256)
                accuracies.append(_accuracy(features, drawn, head, seed + repeat, refit=False))
                bar.update(1)
            points.append(Point(len(drawn.train), tuple(accuracies), share=share))
    return Curve(head, tuple(points), _slope(points))


def _accuracy(features: Features, split: Split, head: str, seed: int, *, refit: bool = True) -> float:
    X, y = heads.as_rows(features.X), features.y
    if any(len(fold.val) for fold in split.folds):
        params = heads.search_head(head, X, y, split.folds, seed).params
    else:
        params = heads.HEADS[head].grid(len(split.train))[0]
    rows = split.train_val if refit else split.train
    estimator = heads.train(head, params, heads.some_of(X, rows), y[rows], seed)
    tested = scores_on_test(lambda index: heads.answers(estimator, X[index], len(features.classes)), y, split)
    return tested.scores.accuracy


def _slope(points: Sequence[Point]) -> float | None:
    """Return the exponent b of error = a * images^b, by least squares on logarithms (Hestness et al. 2017, section 3)."""
    known = [(point.images, 1 - point.mean) for point in points if point.mean < 1]
    if len({images for images, _ in known}) < 2:
        return None
    images, errors = np.log(np.array(known, dtype=np.float64)).T
    return float(np.polyfit(images, errors, 1)[0])
