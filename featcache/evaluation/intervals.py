"""95 % intervals of scores, of images that are independent and of images that come in groups, such as patients.

Images of one group are no independent evidence. Where groups are given, an interval's width comes from the spread between
groups, and its quantile from Student's t with as many degrees of freedom as the groups' sizes leave. ``None`` stands for
an interval that the data are too few for.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Groups = NDArray[np.int64] | None
Z95 = 1.959963984540054
FEWEST_GROUPS = 6
FEWEST_GROUPS_OF_A_CLASS = 4
FEWEST_OF_A_CLASS = 5
FEWEST_NUMBERS = 30
FEWEST_OF_A_LABEL = 10


@dataclass(frozen=True)
class _Grouped:
    """Which group each image is in, from 0 (n,), the groups' sizes, and Student's quantile."""

    numbers: NDArray[np.int64]
    sizes: NDArray[np.int64]
    quantile: float

    def variance(self, influence: NDArray[np.float64]) -> float:
        """Return the variance of a sum (n,) between groups, a group's own pull on the mean undone (as the jackknife)."""
        pulled = np.bincount(self.numbers, weights=influence) / (1 - self.sizes / self.sizes.sum())
        count = len(self.sizes)
        return float((pulled**2).sum()) * (count - 1) / count


def wilson(successes: float, trials: float, quantile: float = Z95) -> Interval:
    """Return the 95 % interval of a proportion (Wilson 1927), of effective numbers too; (0, 1) of no trial."""
    if trials <= 0:
        return (0.0, 1.0)
    low, high = _wilsons(np.array([successes], np.float64), np.array([trials], np.float64), quantile)
    return (float(low[0]), float(high[0]))


def of_accuracy(right: NDArray[np.bool_], groups: Groups = None) -> Interval | None:
    """Return the interval of an accuracy: Wilson's, with groups of an effective number of images (Kish 1965, section 8.2).

    Args:
        right: whether each image was answered rightly (n,).
        groups: the number of each image's group (n,).
    """
    design = _design(right - right.mean(), groups)
    if design is None:
        return None
    effect, quantile = design
    return wilson(right.sum() / effect, len(right) / effect, quantile)


def of_recalls(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: NDArray[np.int64], groups: Groups = None
) -> Interval | None:
    """Return the interval of balanced accuracy: the classes' Wilson intervals put together (MOVER: Zou and Donner 2008).

    A class of which all images are right has no room above, and many such make that end too low. So the interval also
    reaches as far as Agresti and Coull's of the mean, of as many images as have its variance where recalls are alike.

    Args:
        truth: classes (n,), all among ``classes``.
        predicted: classes (n,).
        classes: those that the score is of (k,), sorted; with too few images of one of them there is no interval.
        groups: the number of each image's group (n,).
    """
    have, hit, _ = _counts(truth, predicted, classes)
    if have.min() < FEWEST_OF_A_CLASS:
        return None
    place = np.searchsorted(classes, truth)
    design = _design(((truth == predicted) - (hit / have)[place]) / have[place], groups, place)
    if design is None or have.min() / design[0] < FEWEST_OF_A_CLASS:
        return None
    effect, quantile = design
    recall = hit / have
    low, high = _wilsons(hit / effect, have / effect, quantile)
    return _hull(_mover(recall, low, high, 1.0), _of_mean(recall, have / effect, quantile))


def of_f1s(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: NDArray[np.int64], groups: Groups = None
) -> Interval | None:
    """Return the interval of macro F1.

    F1 is 2 J / (1 + J), where J, Jaccard's index, is the share of right ones among the images that are of a class or were
    taken for it: a proportion, with Wilson's interval. The classes' intervals are put together by MOVER (Zou and Donner
    2008). They vary together, since an error counts in two classes, but in no more: the product of two classes' distances
    is at most the mean of their squares, so that twice the sum of squares is enough. It also reaches as far as that
    of the mean, as for balanced accuracy.

    Args:
        truth: classes (n,), all among ``classes``.
        predicted: classes (n,).
        classes: those that the score is of (k,), sorted; with too few images of one of them there is no interval.
        groups: the number of each image's group (n,).
    """
    have, hit, said = _counts(truth, predicted, classes)
    if have.min() < FEWEST_OF_A_CLASS:
        return None
    f1 = 2 * hit / (have + said)
    own, taken = (np.searchsorted(classes, some).clip(max=len(classes) - 1) for some in (truth, predicted))
    share, known = 1 / (have + said), np.isin(predicted, classes)
    influence = 2 * share[own] * (truth == predicted) - (f1 * share)[own] - known * (f1 * share)[taken]
    design = _design(influence, groups, own)
    if design is None or have.min() / design[0] < FEWEST_OF_A_CLASS:
        return None
    effect, quantile = design
    low, high = _wilsons(hit / effect, (have + said - hit) / effect, quantile)
    return _hull(_mover(f1, 2 * low / (1 + low), 2 * high / (1 + high), 2.0), _of_mean(f1, have / effect, quantile))


def of_difference(difference: NDArray[np.integer[Any]], groups: Groups = None) -> Interval | None:
    """Return the interval of a mean difference of paired answers, each -1, 0 or 1 (n,).

    Bonett and Price (2012): Wald's interval after adding one image to each kind of disagreement. With groups, what is
    added are two groups that disagree as much as those that do, and by the root of a group's size at least: where few
    disagree, less does not hold (benchmarks/coverage.py).
    """
    n = len(difference)
    if groups is None:
        mean, square = float(difference.sum()) / (n + 2), (float(np.abs(difference).sum()) + 2) / (n + 2)
        spread = Z95 * math.sqrt((square - mean**2) / (n + 2))
        return (max(-1.0, mean - spread), min(1.0, mean + spread))
    grouped = _grouped(groups)
    if grouped is None:
        return None
    mean = float(difference.mean())
    sums = np.bincount(grouped.numbers, weights=difference)
    added = max(float((sums[sums != 0] ** 2).mean()) if sums.any() else 0.0, n / len(sums))
    spread = grouped.quantile * math.sqrt(grouped.variance(np.asarray(difference - mean, np.float64)) + 2 * added) / n
    return (max(-1.0, mean - spread), min(1.0, mean + spread))


def sign_flip(difference: NDArray[np.integer[Any]], groups: Groups = None) -> float:
    """Return the exact two-sided p of no difference (n,), each -1, 0 or 1: any group's sum may as well be its negative.

    Where every image is its own group this is McNemar's exact test (McNemar 1947). The distribution of the sum is made
    group by group, nothing is drawn.
    """
    sums = difference.astype(np.int64)
    if groups is not None:
        sums = np.rint(np.bincount(np.unique(groups, return_inverse=True)[1], weights=difference)).astype(np.int64)
    chance = np.ones(1)  # of the values -most, -most + 2, ..., most
    for size, count in zip(*np.unique(np.abs(sums[sums != 0]), return_counts=True), strict=True):
        added = np.zeros(size * count + 1)
        added[::size] = _coin_tosses(int(count))
        chance = _convolved(chance, added)
    values = 2 * np.arange(len(chance)) - (len(chance) - 1)
    return min(1.0, max(0.0, float(chance[np.abs(values) >= abs(int(sums.sum()))].sum())))


def _coin_tosses(count: int) -> NDArray[np.float64]:
    """Return the chance of each number of heads, 0 to ``count``, exactly; ``scipy.stats`` takes half a second to load."""
    ways, shares = 1, []
    for heads in range(count + 1):
        shares.append(ways / (1 << count))
        ways = ways * (count - heads) // (heads + 1)
    return np.array(shares)


def _convolved(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    if min(len(first), len(second)) < 100:
        return np.convolve(first, second)
    from scipy.signal import fftconvolve

    product: NDArray[np.float64] = fftconvolve(first, second)
    return product


def _counts(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return how many images are of each class (k,), how many of them were taken for it, and how many at all."""
    most = int(max(classes.max(), predicted.max(initial=0), truth.max(initial=0))) + 1
    have, hit, said = (np.bincount(some, minlength=most)[classes] for some in (truth, truth[truth == predicted], predicted))
    return have, hit, said


def _wilsons(
    successes: NDArray[np.float64], trials: NDArray[np.float64], quantile: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    share = successes / trials
    spread = quantile * np.sqrt(share * (1 - share) / trials + quantile**2 / (4 * trials**2))
    centre, scale = share + quantile**2 / (2 * trials), 1 + quantile**2 / trials
    return np.maximum(0.0, (centre - spread) / scale), np.minimum(1.0, (centre + spread) / scale)


def _mover(values: NDArray[np.float64], low: NDArray[np.float64], high: NDArray[np.float64], together: float) -> Interval:
    """Return the interval of a mean of values (k,) from their intervals; ``together`` multiplies squared distances."""
    mean, factor = float(values.mean()), math.sqrt(together) / len(values)
    below, above = factor * float(np.linalg.norm(values - low)), factor * float(np.linalg.norm(high - values))
    return (max(0.0, mean - below), min(1.0, mean + above))


def _of_mean(values: NDArray[np.float64], have: NDArray[np.float64], quantile: float) -> Interval:
    """Return Agresti and Coull's interval (1998) of a mean over classes (k,), of as many images as its variance is that of.

    It holds Wilson's, and holds near 1 too, where Wilson's covers 92 %.
    """
    trials = len(have) ** 2 / float((1 / have).sum())
    more = trials + quantile**2
    middle = (float(values.mean()) * trials + quantile**2 / 2) / more
    spread = quantile * math.sqrt(middle * (1 - middle) / more)
    return (max(0.0, middle - spread), min(1.0, middle + spread))


def _hull(one: Interval, other: Interval) -> Interval:
    return (min(one[0], other[0]), max(one[1], other[1]))


def _grouped(groups: NDArray[np.int64]) -> _Grouped | None:
    """Return groups as numbers from 0, ``None`` where there are too few: a large one makes the others count less."""
    numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)[1:]
    effective = _as_equal(sizes) if len(sizes) else 0.0
    if effective < FEWEST_GROUPS:
        return None
    return _Grouped(numbers, sizes, _student(effective - 1))


def _student(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _as_equal(sizes: NDArray[np.int64]) -> float:
    """Return of how many groups of one size the mean is as uncertain as of these sizes."""
    return float(sizes.sum()) ** 2 / float((sizes.astype(np.float64) ** 2).sum())


def _fewest_groups(numbers: NDArray[np.int64], classes: NDArray[np.int64]) -> float:
    """Return the number of groups, as of one size, of the class that has the fewest."""
    pairs, sizes = np.unique(np.stack([classes, numbers]), axis=1, return_counts=True)
    images = np.bincount(pairs[0], weights=sizes)
    return float((images**2 / np.bincount(pairs[0], weights=sizes.astype(np.float64) ** 2)).min())


def _design(
    influence: NDArray[np.float64], groups: Groups, classes: NDArray[np.int64] | None = None
) -> tuple[float, float] | None:
    """Return how many images of a group tell as much as one independent image, at least 1, and the quantile.

    Args:
        influence: how much each image moves the score (n,).
        groups: the number of each image's group (n,).
        classes: the number of each image's class, from 0 (n,), where each class must have enough groups.
    """
    if not len(influence):
        return None
    if groups is None:
        return 1.0, Z95
    grouped = _grouped(groups)
    if grouped is None or (classes is not None and _fewest_groups(grouped.numbers, classes) < FEWEST_GROUPS_OF_A_CLASS):
        return None
    # Errors too few to show how they gather in groups are joined by some of one group, so many that the simulations in
    # benchmarks/coverage.py hold: the root of a group's size is too little, half of it makes intervals needlessly wide.
    gathered, unit = (len(groups) / len(grouped.sizes)) ** (2 / 3), float((influence**2).max()) or 1.0
    clustered, alone = grouped.variance(influence), float((influence**2).sum())
    return max(1.0, (clustered + gathered**2 * unit) / (alone + gathered * unit)), grouped.quantile


def of_errors(
    truth: NDArray[np.float64], wrong: NDArray[np.float64], groups: Groups = None
) -> tuple[Interval, Interval] | None:
    """Return the intervals of R2 and of the mean absolute error of numbers (n,) that are wrong by so much (n,).

    On logarithms of 1 - R2 and of the error, the variance by the jackknife, which leaves out an image or a group (Efron and
    Tibshirani 1993, chapter 11), with Student's quantile. There are none where nothing varies, or of too few images.
    """
    grouped = _grouped(np.arange(len(truth)) if groups is None else groups)
    if grouped is None or len(truth) < FEWEST_NUMBERS or truth.min() == truth.max() or not wrong.any():
        return None
    centred = truth - truth.mean()  # against cancellation in the sums of squares
    each = (wrong**2, np.abs(wrong), centred, centred**2, np.ones(len(wrong)))
    squares, absolute, values, seconds, count = (np.bincount(grouped.numbers, weights=some) for some in each)
    rest = [some.sum() - some for some in (squares, absolute, values, seconds, count)]
    spread = rest[3] - rest[2] ** 2 / rest[4]
    if min(rest[0].min(), rest[1].min(), spread.min()) <= 0:
        return None
    unexplained = _jackknifed(np.log(rest[0]) - np.log(spread), math.log(squares.sum() / seconds.sum()), grouped.quantile)
    error = _jackknifed(np.log(rest[1] / rest[4]), math.log(absolute.mean() / count.mean()), grouped.quantile)
    return (1 - math.exp(unexplained[1]), 1 - math.exp(unexplained[0])), (math.exp(error[0]), math.exp(error[1]))


def _jackknifed(left_out: NDArray[np.float64], value: float, quantile: float) -> Interval:
    """Return value +- quantile x jackknife's error, wider where what each one pulls is skewed."""
    pull, count = left_out.mean() - left_out, len(left_out)
    error = math.sqrt((count - 1) / count * float((pull**2).sum()))
    # Where a few pull far more than the others the error comes out too small. Twice what Johnson (1978) would move the
    # interval by is added to both sides: moved by once it, it would hold no better (benchmarks/coverage.py).
    skewness = abs(float((pull**3).sum())) / max(float((pull**2).sum()) ** 1.5, np.finfo(np.float64).tiny)
    spread = error * (quantile + skewness * (1 + 2 * quantile**2) / 3)
    return (value - spread, value + spread)


def of_precisions(truth: NDArray[np.bool_], probabilities: NDArray[Any], groups: Groups = None) -> Interval | None:
    """Return the interval of mean average precision over labels (n, k), on logits (Boyd, Eng and Page 2013, section 3).

    Variance and bias are the jackknife's (Efron and Tibshirani 1993, chapters 10 and 11): of few images with a label the
    first places are right by chance, so that average precision comes out too high. The quantile is Student's, of the
    rarest label's images or of the groups. The interval holds the score itself too. There is none where a label has, or
    lacks, too few images.

    Args:
        truth: which labels each image has (n, k).
        probabilities: those that were answered (n, k).
        groups: the number of each image's group (n,).
    """
    count, n = truth.sum(axis=0), len(truth)
    lacking = np.where(count == n, n, n - count)  # of a label that all images have there is nothing to tell apart
    if not truth.size or min(count.min(), lacking.min()) < FEWEST_OF_A_LABEL:
        return None
    labels = [_precisions_without(truth[:, one], probabilities[:, one]) for one in range(truth.shape[1])]
    mean, without = float(np.mean([value for value, _ in labels])), np.mean([one for _, one in labels], axis=0)
    pull = without.mean() - without
    if groups is None:
        variance, quantile = float((pull**2).sum()) * (n - 1) / n, _student(int(count.min()) - 1)
    else:
        grouped = _grouped(groups)
        if grouped is None:
            return None
        variance, quantile = grouped.variance(pull), grouped.quantile
    unbiased = min(max(mean - (n - 1) * (float(without.mean()) - mean), 1 / n), 1 - 1 / n)
    middle, spread = math.log(unbiased / (1 - unbiased)), quantile * math.sqrt(variance) / (unbiased * (1 - unbiased))
    low, high = (1 / (1 + math.exp(min(-end, 700.0))) for end in (middle - spread, middle + spread))
    return (min(low, mean), max(high, mean))


def average_precision(truth: NDArray[np.bool_], probabilities: NDArray[Any]) -> float:
    """Return the mean precision at the images (n,) that have a label, one threshold for each distinct probability."""
    hits, _, ends, _ = _by_threshold(truth, probabilities)
    positives = hits.cumsum()[ends]
    return float((np.diff(positives, prepend=0) * positives / (ends + 1)).sum()) / int(positives[-1])


def _by_threshold(
    truth: NDArray[np.bool_], probabilities: NDArray[Any]
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return hits (n,) by falling probability, that order, the last place of each threshold, and each place's threshold."""
    order = np.argsort(-probabilities, kind="stable")
    falling = probabilities[order]
    ends = np.append(np.flatnonzero(falling[1:] != falling[:-1]), len(order) - 1)
    return truth[order], order, ends, np.repeat(np.arange(len(ends)), np.diff(ends, prepend=-1))


def _precisions_without(truth: NDArray[np.bool_], probabilities: NDArray[Any]) -> tuple[float, NDArray[np.float64]]:
    """Return average precision, and what it is without each of the images (n,), of which two at least have the label.

    Without an image, precision at thresholds above stays; at its own and those below one image, and one hit if it was one,
    is gone. Sums over thresholds give all n at once.
    """
    hits, order, ends, threshold = _by_threshold(truth, probabilities)
    reached, looked = hits.cumsum()[ends], ends + 1
    at = np.diff(reached, prepend=0)
    above = np.concatenate([[0.0], np.cumsum(at * reached / looked)])
    fewer = np.maximum(looked - 1, 1)
    below_miss = np.append(np.cumsum((at * reached / fewer)[::-1])[::-1], 0.0)
    below_hit = np.append(np.cumsum((at * (reached - 1) / fewer)[::-1])[::-1], 0.0)
    own_hit = (at - 1) * (reached - 1) / fewer
    positives, step = int(reached[-1]), np.arange(len(ends))
    missed = (above[step] + below_miss[step]) / positives
    hit = (above[step] + own_hit + below_hit[step + 1]) / (positives - 1)
    without = np.empty(len(order))
    without[order] = np.where(hits, hit[threshold], missed[threshold])
    return float(above[-1]) / positives, without
