"""Images that want a look: likely wrong labels, odd pictures, outliers, what removing them does to a score; and new ones.

Of a new image: which classes may be true at a stated coverage, and how familiar it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import SetupError, UsageError
from featcache.evaluation.duplicates import unit_rows
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


# "I don't know". A set of classes is right for a new image with at least the stated probability, on average over images and
# calibrations, if the new image and those that calibrate are exchangeable. No class, and no kind of image, is promised that
# by itself. The head that is used is fitted again, on more images than when those that calibrate were answered: as a rule it
# is a little better, but that is no part of the promise.
SetScore = Literal["lac", "aps"]
Numbers = NDArray[np.float64]

COVERAGE = 0.9
_WIDTH = 1.0  # of the kernel, in lengths of unit rows
_RIDGE = 0.1
MOST_NEIGHBOURS = 1000  # 2.5 MB at 1280 dims in float16; a fit with so many takes a tenth of a second


def all_scores(probabilities: Numbers, kind: SetScore, draws: Numbers) -> Numbers:
    """Return how badly each class fits each image (n, classes).

    ``lac``: 1 less its probability (Sadinle, Lei and Wasserman 2019, section 2). ``aps``: the probability of all likelier
    classes and a drawn part of its own (Romano, Sesia and Candes 2020, section 2.1).

    Args:
        probabilities: (n, classes).
        kind: which of the two.
        draws: uniform on 0 to 1 (n,), which part of a class's own probability ``aps`` counts.
    """
    if kind == "lac":
        return 1 - probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    before = np.cumsum(ordered, axis=1) - ordered
    scores = np.empty_like(probabilities, dtype=np.float64)
    np.put_along_axis(scores, order, before + draws[:, None] * ordered, axis=1)
    return scores


def draws_of(contents: Sequence[str]) -> Numbers:
    """Return a number from 0 to 1 for each image's SHA-256 (n,): as good as drawn, and the same whenever it is asked for."""
    # the last digits: the first order what is drawn for splits in places where hashes are compared as texts
    return np.array([int(content[-13:] or "8", 16) / 16**13 for content in contents])


def fewest_units(coverage: float) -> int:
    """Return how many images, or groups, a threshold needs: with fewer every set holds all classes."""
    return int(np.ceil(coverage / (1 - coverage) - 1e-9))


@dataclass(frozen=True)
class Calibration:
    """How badly the true classes of images fitted that their head had not seen.

    Attributes:
        lac: scores (n,).
        aps: scores (n,).
        units: what each image belongs to (n,): images of one group, and copies, are no independent evidence.
        members: which of ``groups`` each image is of (n,); of no length where there are no groups.
        groups: their names.
    """

    lac: Numbers
    aps: Numbers
    units: Index
    members: Index
    groups: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, y: Index, probabilities: Numbers, contents: Sequence[str], units: Index, groups: Sequence[str] | None = None
    ) -> "Calibration":
        """Return the calibration by images (n,) whose classes ``y`` are known."""
        rows, draws = np.arange(len(y)), draws_of(contents)
        kinds: tuple[SetScore, SetScore] = ("lac", "aps")
        lac, aps = (all_scores(probabilities, kind, draws)[rows, y] for kind in kinds)
        names, members = np.unique(np.array(groups or [], dtype=np.str_), return_inverse=True)
        return cls(lac, aps, units, members.astype(np.int64), tuple(names.tolist()))

    def threshold(self, kind: SetScore, coverage: float, group: str | None = None) -> float:
        """Return the score up to which classes are in a set.

        Each unit weighs the same, whatever its size: the next image is of a unit that is not among these (Lee, Barber and
        Willett 2023, "Distribution-free inference with hierarchical data", section 3); of units of one image that is split
        conformal prediction's own. With ``group``, images of that group alone count (Mondrian: Vovk, Gammerman and Shafer
        2005, section 4.5).

        Args:
            kind: of the scores.
            coverage: how often sets shall hold the true class.
            group: whose images are asked about, where they are of a group that was there.

        Raises:
            UsageError: there is no such group, or too little to calibrate by.
        """
        scores, units = (self.lac if kind == "lac" else self.aps), self.units
        if group is not None:
            if group not in self.groups:
                raise UsageError(f"`group` {group!a}: the head was calibrated on no such group: leave it out, or fit again.")
            scores = scores[self.members == self.groups.index(group)]
            units = np.arange(len(scores))
        numbers, sizes = np.unique(units, return_inverse=True, return_counts=True)[1:]
        if len(sizes) < fewest_units(coverage):
            what = "images" if group is not None or not self.groups else "groups"
            raise UsageError(
                f"`coverage` {coverage:g}: {fewest_units(coverage)} {what} that no training saw are needed, there are "
                f"{len(sizes)}: ask for less coverage, or fit again with more data."
            )
        weights = 1 / ((len(sizes) + 1) * sizes[numbers].astype(np.float64))
        order = np.argsort(scores, kind="stable")
        reached = np.cumsum(weights[order])
        place = int(np.searchsorted(reached, coverage - 1e-9))  # sums of shares are a rounding off
        return float(scores[order[place]]) if place < len(order) else np.inf


@dataclass(frozen=True)
class Neighbours:
    """Images that a head was trained on, and how they vote for what lies near them.

    Attributes:
        mean: of the embeddings (d,).
        rows: unit embeddings (m, d) float16, less the mean.
        votes: each one's vote for each class (m, classes).
        usual: how familiar each of them is without its own vote, nor that of its unit, ascending (m,).
    """

    mean: NDArray[np.float32]
    rows: NDArray[np.float16]
    votes: NDArray[np.float32]
    usual: Numbers

    @classmethod
    def fitted(cls, X: NDArray[np.float32], y: Index, units: Index) -> "Neighbours":
        """Return neighbours that vote as kernel ridge regression of the classes' indicators does.

        Far from all of them, and between the classes, no class gets a large vote. Each one's own familiarity is that of a
        fit without its unit, by the closed form of leaving rows out (Rasmussen and Williams 2006, equation 5.12).

        Args:
            X: embeddings (m, d).
            y: classes (m,).
            units: images of one are left out together (m,).
        """
        mean = X.mean(axis=0)
        rows = unit_rows(X, mean).astype(np.float16)
        wide = rows.astype(np.float64)
        inverse = np.linalg.inv(_gaussian(wide, wide) + _RIDGE * np.eye(len(wide)))
        indicators = np.eye(int(y.max()) + 1)[y]
        votes = inverse @ indicators
        usual = np.empty(len(y))
        for unit in np.unique(units):
            inside = np.flatnonzero(units == unit)
            without = indicators[inside] - np.linalg.solve(inverse[np.ix_(inside, inside)], votes[inside])
            usual[inside] = without.max(axis=1)
        return cls(mean.astype(np.float32), rows, votes.astype(np.float32), np.sort(usual))

    def familiarity(self, X: NDArray[np.float32]) -> Numbers:
        """Return the greatest vote for any class that embeddings (n, d) get (n,): near 1 amid a class, 0 far from all."""
        votes = _gaussian(unit_rows(X, self.mean), self.rows.astype(np.float32)) @ self.votes
        greatest: Numbers = votes.max(axis=1).astype(np.float64)
        return greatest

    def shares(self, X: NDArray[np.float32]) -> Numbers:
        """Return which share of the training images, and the image itself, is at most as familiar as embeddings (n, d) are.

        Of images like them all shares are equally frequent: it is a p-value.
        """
        at_most = np.searchsorted(self.usual, self.familiarity(X), side="right")
        shares: Numbers = (1 + at_most) / (1 + len(self.usual))
        return shares

    def limit(self, share: float) -> float:
        """Return the familiarity below which an image's share is at most ``share``."""
        place = int(np.floor(share * (1 + len(self.usual)) + 1e-9)) - 1  # so many may be at most as familiar
        return float(self.usual[place]) if 0 <= place < len(self.usual) else -np.inf


def _gaussian(one: NDArray[np.floating], two: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return a Gaussian of the distances of unit rows (n, d) and (m, d), by their cosines (n, m)."""
    kernel: NDArray[np.floating] = np.exp((one @ two.T - 1) / _WIDTH**2 * 2)
    return kernel
