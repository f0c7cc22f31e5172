"""Scores with their uncertainty, and the one function that reads the test split."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.splits import Index, Split

Probabilities = NDArray[np.float64]
BOOTSTRAPS = 2000
ECE_BINS = 15
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Scores:
    """How well some predictions fit; ``accuracy_ci`` is Wilson's 95 % interval (Wilson 1927)."""

    accuracy: float
    accuracy_ci: tuple[float, float]
    balanced_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None

    @property
    def rank(self) -> tuple[float, float]:
        """What the smaller of is better: by accuracy, then by log-loss."""
        return (-self.accuracy, self.log_loss if self.log_loss is not None else 0.0)


@dataclass(frozen=True)
class Tested:
    """A model on the test split: scores and, image by image, whether it was right (n,) bool."""

    scores: Scores
    right: NDArray[np.bool_]
    predicted: NDArray[np.int64]


@dataclass(frozen=True)
class Gap:
    """The difference between two models on the same images, in points of accuracy: 95 % interval, McNemar's p."""

    points: float
    ci: tuple[float, float]
    p_value: float


def test_scores(predict: Callable[[Index], Probabilities | NDArray[np.int64]], y: NDArray[np.int64], split: Split) -> Tested:
    """Read the test split: the only function that does, called once a finished model.

    Args:
        predict: gives for positions (k,) the probabilities (k, classes), or the classes (k,) where there are none.
        y: the classes of all images (n,).
        split: whose ``test`` is read.
    """
    answer = predict(split.test)
    truth = y[split.test]
    predicted = answer.argmax(axis=1) if answer.ndim == 2 else answer
    return Tested(score(truth, answer), predicted == truth, predicted.astype(np.int64))


test_scores.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever pytest thinks of its name


def score(truth: NDArray[np.int64], answer: Probabilities | NDArray[np.int64]) -> Scores:
    """Return the scores of probabilities (n, classes) or of predicted classes (n,) against the truth (n,)."""
    from sklearn.metrics import f1_score, recall_score

    known = answer.ndim == 2
    predicted = answer.argmax(axis=1) if known else answer
    right = predicted == truth
    present = np.unique(truth)
    return Scores(
        accuracy=float(right.mean()),
        accuracy_ci=wilson(int(right.sum()), len(right)),
        balanced_accuracy=float(recall_score(truth, predicted, labels=present, average="macro", zero_division=0)),
        macro_f1=float(f1_score(truth, predicted, labels=present, average="macro", zero_division=0)),
        log_loss=_log_loss(truth, answer) if known else None,
        ece=_calibration_error(right, answer.max(axis=1)) if known else None,
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a proportion (Wilson 1927)."""
    if trials == 0:
        return (0.0, 1.0)
    share = successes / trials
    spread = _Z95 * math.sqrt(share * (1 - share) / trials + _Z95**2 / (4 * trials**2))
    centre, scale = share + _Z95**2 / (2 * trials), 1 + _Z95**2 / trials
    return (max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale))


def gap(tuned: NDArray[np.bool_], probe: NDArray[np.bool_], seed: int = 0) -> Gap:
    """Return how much better ``tuned`` (n,) is than ``probe`` (n,), right or wrong on the same n images.

    The interval is a paired percentile bootstrap over images (Efron and Tibshirani 1993, chapter 13); p is McNemar's
    exact test on the images where only one is right (McNemar 1947).
    """
    from scipy.stats import binomtest

    difference = tuned.astype(np.int8) - probe.astype(np.int8)
    better, worse, equal = int((difference > 0).sum()), int((difference < 0).sum()), int((difference == 0).sum())
    total = len(difference)
    draws = np.random.default_rng(seed).multinomial(total, np.array([better, worse, equal]) / total, size=BOOTSTRAPS)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / total * 100, [2.5, 97.5])
    p_value = float(binomtest(better, better + worse).pvalue) if better + worse else 1.0
    return Gap(100 * float(difference.mean()), (float(low), float(high)), p_value)


def _log_loss(truth: NDArray[np.int64], probabilities: NDArray[Any]) -> float:
    picked = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(picked, np.finfo(np.float64).tiny, None)).mean())


def _calibration_error(right: NDArray[np.bool_], confidence: NDArray[Any]) -> float:
    """Return the expected calibration error over 15 equal bins (Guo et al. 2017, section 2)."""
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    total = 0.0
    for number in np.unique(bins):
        inside = bins == number
        total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)
