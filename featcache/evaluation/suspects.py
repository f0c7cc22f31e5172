"""Samples that want a look: likely wrong labels, odd ones, outliers, and what removing them does to a score."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import SetupError
from featcache.evaluation.intervals import FEWEST_OF_A_CLASS, Z95, Interval, wilson

Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

_BLANK, _DARK, _BRIGHT = 3.0, 16.0, 239.0  # levels of 255: the spread of a blank image; means of dark and bright ones
_AT_ONCE = 4096  # images: 100 MB
_TINY = 0.25  # of the median image's shorter side
_LONG = 3.0  # times as long as it is high, or the reverse, where the median image is not
_FAR = 5.0  # deviations (1.4826 x the median one, as of a normal distribution) from the median distance


def label_issues(y: Index, probabilities: NDArray[np.float64]) -> tuple[Index, NDArray[np.float64]]:
    """Return which labels are likely wrong, the likeliest first (k,), and how little each is believed (n,), from 0 to 1.

    Confident learning (Northcutt, Jiang and Chuang 2021, section 3), by cleanlab, estimates how many labels are wrong: so
    many are told, those of least probability. Of its rules this one is right most often (benchmarks/audit.md).

    Args:
        y: classes (n,).
        probabilities: (n, classes), each row answered by a head that was not trained on its image.

    Raises:
        SetupError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise SetupError("likely label errors are told by cleanlab: `pip install 'featcache[audit]'`.") from None
    present, renumbered = np.unique(y, return_inverse=True)  # cleanlab wants classes from 0 on without a gap
    shares = probabilities[:, present]
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    how = {"return_indices_ranked_by": "self_confidence", "filter_by": "low_self_confidence"}
    issues = find_label_issues(renumbered, shares, n_jobs=1, **how)  # processes would cost more than they save
    doubt: NDArray[np.float64] = 1 - shares[np.arange(len(y)), renumbered]
    return np.asarray(issues, np.int64), doubt


def oddities(thumbnails: NDArray[np.uint8], sizes: Index) -> Mapping[str, Mask]:
    """Return which images are of which oddity (n,): blank, dark, bright, tiny, long.

    Args:
        thumbnails: uint8 (n, 32, 32, 3).
        sizes: width and height (n, 2), 0 where they are not known.
    """
    level, spread = levels(thumbnails).T
    is_blank = spread < _BLANK
    wide, high = np.maximum(sizes.T.astype(np.float64), 1e-9)
    shorter, stretch = np.minimum(wide, high), np.abs(np.log(wide / high))
    is_sized = (sizes > 0).all(axis=1)
    usual_side, usual_stretch = (
        float(np.median(values[is_sized])) if is_sized.any() else 0.0 for values in (shorter, stretch)
    )
    return {
        "blank": is_blank,
        "dark": ~is_blank & (level < _DARK),
        "bright": ~is_blank & (level > _BRIGHT),
        "tiny": is_sized & (shorter < _TINY * usual_side),
        "long": is_sized & (stretch > np.log(_LONG)) & (usual_stretch < np.log(_LONG)),
    }


def levels(thumbnails: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean and the spread of each image's levels (n, 2)."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    # some at a time: numbers of floating point take eight times the memory of pixels
    blocks = [flat[start : start + _AT_ONCE] for start in range(0, len(flat), _AT_ONCE)]
    parts = [np.stack([block.mean(axis=1), block.std(axis=1)], axis=1) for block in blocks]
    return np.concatenate(parts) if parts else np.empty((0, 2))


def outliers(nearest: NDArray[np.float32]) -> Index:
    """Return the images whose nearest other is unusually far, by its cosine (n,), the farthest first."""
    distance = 1 - nearest.astype(np.float64)
    middle = float(np.median(distance))
    spread = 1.4826 * float(np.median(np.abs(distance - middle)))
    order = np.argsort(-distance, kind="stable")
    return order[distance[order] > middle + _FAR * spread] if spread > 0 else order[:0]


@dataclass(frozen=True)
class Removal:
    """What a score is on all images, and without some of them: ``change`` and its interval are of the second less the first.

    ``None``: nothing was removed, or too little is left to tell.
    """

    removed: int
    accuracy: float
    accuracy_without: float | None
    change: float | None
    change_ci: Interval | None


def without(right: Mask, removed: Mask) -> Removal:
    """Return what the accuracy of answers (n,) is without the images ``removed`` (n,).

    The score on all is a mean of the two parts' scores. So the change is the removed share times the difference of two
    independent proportions, whose interval is Newcombe's (1998, method 10).
    """
    out, rest = right[removed], right[~removed]
    accuracy = float(right.mean())
    if not len(out) or len(rest) < FEWEST_OF_A_CLASS:
        return Removal(len(out), accuracy, None, None, None)
    share, (low, high) = len(out) / len(right), _apart(rest, out)
    change = float(rest.mean()) - accuracy
    return Removal(len(out), accuracy, float(rest.mean()), change, (share * low, share * high))


def _apart(one: Mask, other: Mask) -> Interval:
    """Return Newcombe's interval of the difference of two proportions."""
    first, second = float(one.mean()), float(other.mean())
    (low, high), (low_2, high_2) = (wilson(int(part.sum()), len(part)) for part in (one, other))
    difference = first - second
    below = float(np.hypot(first - low, high_2 - second))
    return difference - below, difference + float(np.hypot(high - first, second - low_2))


def auc(is_second: Mask, score: NDArray[Any]) -> tuple[float, float]:
    """Return the area under the ROC curve of scores (n,), and its variance (DeLong, DeLong and Clarke-Pearson 1988)."""
    from scipy.stats import rankdata

    above, below = score[is_second], score[~is_second]
    ranks = rankdata(np.concatenate([above, below]))
    of_above = (ranks[: len(above)] - rankdata(above)) / len(below)
    of_below = 1 - (ranks[len(above) :] - rankdata(below)) / len(above)
    variance = float(of_above.var(ddof=1)) / len(above) + float(of_below.var(ddof=1)) / len(below)
    return float(of_above.mean()), variance


def mean_auc(values: list[tuple[float, float]]) -> tuple[float, Interval]:
    """Return the mean of folds' areas, each with its variance, and its interval."""
    mean = float(np.mean([value for value, _ in values]))
    spread = Z95 * float(np.sqrt(sum(variance for _, variance in values))) / len(values)
    return mean, (max(0.0, mean - spread), min(1.0, mean + spread))
