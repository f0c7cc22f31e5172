"""What drawing images again says: how sure a comparison is, and what more images would bring.

Whole units are drawn, copies and groups together (Efron and Tibshirani 1993, chapter 8). Where few images tell two heads
apart, draws of those alone would be too sure: what is compared gets one image that it alone has right, as Bonett and Price
(2012) add one to each kind of disagreement.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.evaluation.intervals import Interval

DRAWS = 4000
_FEWEST_SIZES = 3  # a power law has two parameters
_FEWEST_WRONG = 5  # images at the largest size: the logarithm of fewer is anybody's guess
_BENT = 0.3  # of the points, how far doublings came out otherwise than the curve said (benchmarks/advise.md)
_LAPLACE = 0.5  # wrong images that are added to each error: the logarithm of none would be infinite


def drawn_weights(units: NDArray[np.int64], seed: int, draws: int = DRAWS) -> NDArray[np.float32]:
    """Return how often each image comes (draws, n) when as many units as there are are drawn with replacement.

    Args:
        units: the number of each image's unit (n,).
        seed: of the draws.
        draws: how many.
    """
    numbers = np.unique(units, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return times[:, numbers].astype(np.float32)


def drawn_accuracies(right: NDArray[np.bool_], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the accuracy of each of k answers in each draw (draws, k).

    Args:
        right: which images each has right (k, n).
        weights: how often each image comes (draws, n).
    """
    # of each added image: how often it comes in a draw
    added = np.random.default_rng(len(right)).poisson(1.0, size=(len(weights), len(right)))
    total = weights.sum(axis=1, dtype=np.float64) + added.sum(axis=1)
    correct = weights.astype(np.float64) @ right.T.astype(np.float64) + added
    accuracies: NDArray[np.float64] = correct / total[:, None]
    return accuracies


def chances(accuracies: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """Return in which share of draws each of k (draws, k) is at most ``margin`` below the best of all."""
    share: NDArray[np.float64] = (accuracies >= accuracies.max(axis=1, keepdims=True) - margin).mean(axis=0)
    return share


@dataclass(frozen=True)
class MoreSamples:
    """What more training images would bring, by the learning curve so far.

    Attributes:
        samples: how many more.
        now: how many there are.
        points: of accuracy that they add, by the curve.
        interval: in which 95 % of draws lie.
        slope: the error falls as images to this power.
    """

    samples: int
    now: int
    points: float
    interval: Interval
    slope: float


def more_samples(
    sizes: NDArray[np.int64], right: NDArray[np.bool_], weights: NDArray[np.float32], now: int, more: int
) -> MoreSamples | None:
    """Return what more images would bring; ``None`` where too few sizes were tried, or too few images are wrong.

    error = a x images^b is fitted to logarithms by least squares (Hestness et al. 2017, section 3), in every draw of images
    and of training sets anew; the interval also holds how far real curves leave that law.

    Args:
        sizes: of the training sets (s,).
        right: which images were answered rightly, by size and draw of a training set (s, r, n).
        weights: how often each image comes (draws, n).
        now: training images that there are.
        more: how many more.
    """
    wrong = 1.0 - right.astype(np.float64)
    if len(sizes) < _FEWEST_SIZES or wrong[-1].mean(axis=0).sum() < _FEWEST_WRONG:
        return None
    total = weights.sum(axis=1, dtype=np.float64)
    by_draw = np.einsum("dn,srn->dsr", weights.astype(np.float64), wrong, optimize=True)
    repeats = right.shape[1]
    rng = np.random.default_rng(repeats)
    picked = rng.integers(repeats, size=(len(weights), len(sizes), repeats))
    counted = np.take_along_axis(by_draw, picked, axis=2).mean(axis=2)
    errors = (counted + _LAPLACE) / (total[:, None] + 2 * _LAPLACE)
    measured = (wrong.mean(axis=1).sum(axis=1) + _LAPLACE) / (right.shape[2] + 2 * _LAPLACE)
    _, gains = _power_law(sizes, errors, now, more)
    (slope,), (points,) = _power_law(sizes, measured[None], now, more)
    # the curve itself may bend: draws of images alone held what came in 46 % of cases instead of 95
    bent = gains + _BENT * points * np.random.default_rng(len(gains)).standard_normal(len(gains))
    low, high = np.quantile(bent, (0.025, 0.975))
    return MoreSamples(more, now, float(points), (float(low), float(high)), float(slope))


def _power_law(
    sizes: NDArray[np.int64], errors: NDArray[np.float64], now: int, more: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return slopes (draws,) and the points that more images add (draws,), of errors (draws, s)."""
    logs, told = np.log(sizes.astype(np.float64)), np.log(errors)
    away = logs - logs.mean()
    slopes = (told * away).sum(axis=1) / (away**2).sum()
    at_mean = told.mean(axis=1)
    before, after = (np.exp(at_mean + slopes * (np.log(count) - logs.mean())) for count in (now, now + more))
    return slopes, 100 * (before - after)


def round_count(count: int) -> int:
    """Return the nearest of 1, 2, 5 times a power of ten, as people say numbers."""
    power = 10 ** int(np.floor(np.log10(max(1, count))))
    return int(min((power * step for step in (1, 2, 5, 10)), key=lambda value: abs(np.log(value / max(1, count)))))
