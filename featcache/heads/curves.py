"""A head's score against the number of training images: few-shot protocols and learning curves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from featcache.evaluation.splits import Split, few_shot, part_of
from featcache.heads.fit import Embeddings
from featcache.progress import progress

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REPEATS = 5


@dataclass(frozen=True)
class Point:
    """Test scores of one head on several draws of so many training images: accuracies, mean average precisions or R2."""

    images: int
    accuracies: tuple[float, ...]
    shots: int | None = None
    share: float | None = None

    @property
    def mean(self) -> float:
        """The mean score."""
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
    embeddings: Embeddings, split: Split, head: str, shots: Sequence[int], seed: int = 0, repeats: int = REPEATS
) -> Curve:
    """Train on so many images a class, drawn from train and validation; parameters by cross-validation among them.

    With one image a class there is nothing to validate on: the most regular of the head's parameters is taken.

    Raises:
        DataError: a class has fewer images.
    """
    features, points = embeddings.task.features, []
    with progress(len(shots) * repeats, "few-shot", unit="fit") as bar:
        for count in shots:
            accuracies = []
            for repeat in range(repeats):
                drawn = few_shot(split, features.y, count, seed + repeat, features.sha256)
                accuracies.append(_score(embeddings, drawn, head, seed + repeat))
                bar.update(1)
            points.append(Point(len(drawn.train), tuple(accuracies), shots=count))
    return Curve(head, tuple(points), _slope(points))


def learning_curve(
    embeddings: Embeddings, split: Split, head: str, shares: Sequence[float] = SHARES, seed: int = 0, repeats: int = REPEATS
) -> Curve:
    """Train on stratified shares of the training images, larger ones holding the smaller; choose on all of validation."""
    task, points = embeddings.task, []
    with progress(len(shares) * repeats, "learning curve", unit="fit") as bar:
        for share in shares:
            accuracies = []
            for repeat in range(repeats if share < 1 else 1):  # all of them can be drawn in one way only
                drawn = part_of(split, task.strata, share, seed + repeat, task.features.sha256)
                accuracies.append(_score(embeddings, drawn, head, seed + repeat, refit=False))
                bar.update(1)
            points.append(Point(len(drawn.train), tuple(accuracies), share=share))
    return Curve(head, tuple(points), _slope(points))


def _score(embeddings: Embeddings, split: Split, head: str, seed: int, *, refit: bool = True) -> float:
    from featcache.heads.search import FAMILIES, search_head

    if any(len(fold.val) for fold in split.folds):
        folds = embeddings.folds(split)
        params = search_head(head, embeddings.X, embeddings.y, folds, seed, views=embeddings.views).params
    else:
        params = FAMILIES[embeddings.task.kind][head].grid(len(split.train))[0]
    estimator = embeddings.train(head, params, split.train_val if refit else split.train, seed)
    score: float = embeddings.test(estimator, split).scores.primary[0]
    return score


def _slope(points: Sequence[Point]) -> float | None:
    """Return the exponent b of error = a * images^b, by least squares on logarithms (Hestness et al. 2017, section 3)."""
    errors = [(point.images, 1 - point.mean) for point in points if point.mean < 1]
    if len({images for images, _ in errors}) < 2:
        return None
    images, error = np.log(np.array(errors, dtype=np.float64)).T
    return float(np.polyfit(images, error, 1)[0])
