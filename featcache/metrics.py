"""Scores with their uncertainty, and the one function that reads the test split."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.splits import Index, Split

Probabilities = NDArray[np.float64]
Answers = TypeVar("Answers")
Judged = TypeVar("Judged")
BOOTSTRAPS = 2000
_FEW_BOOTSTRAPS = 200
ECE_BINS = 15
_TINY = np.finfo(np.float64).tiny
_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Scores:
    """How well some predictions fit; ``accuracy_ci`` is Wilson's 95 % interval (Wilson 1927).

    ``ece`` is the expected calibration error, ``ece_scaled`` the same after scaling by ``temperature``; ``top5`` is there
    for more than five classes, ``auroc`` for two. The other intervals are bootstrapped, on the test split only.
    """

    accuracy: float
    accuracy_ci: tuple[float, float]
    balanced_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None
    top5: float | None = None
    auroc: float | None = None
    ece_scaled: float | None = None
    temperature: float | None = None
    balanced_accuracy_ci: tuple[float, float] | None = None
    macro_f1_ci: tuple[float, float] | None = None

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
class LabelScores:
    """How well several labels an image are told: probabilities against which labels there are.

    ``mean_average_precision`` is the mean over labels that occur; F1 and exact matches are at a probability of one half.
    Its interval is bootstrapped over images.
    """

    mean_average_precision: float
    mean_average_precision_ci: tuple[float, float]
    micro_f1: float
    macro_f1: float
    exact_match: float


@dataclass(frozen=True)
class NumberScores:
    """How well numbers are told: R2 and mean absolute error with bootstrapped 95 % intervals."""

    r2: float
    r2_ci: tuple[float, float]
    mae: float
    mae_ci: tuple[float, float]


@dataclass(frozen=True)
class Gap:
    """The difference between two models on the same images, in points of accuracy: 95 % interval, McNemar's p."""

    points: float
    ci: tuple[float, float]
    p_value: float


def on_test(
    predict: Callable[[Index], Answers], truth: NDArray[Any], split: Split, judge: Callable[[NDArray[Any], Answers], Judged]
) -> Judged:
    """Read the test split: the only function that does, called once a finished model.

    Args:
        predict: gives the answers at some positions (k,).
        truth: of all images (n, ...).
        split: whose ``test`` is read.
        judge: scores answers against the truth.
    """
    return judge(truth[split.test], predict(split.test))


def scores_on_test(
    predict: Callable[[Index], Probabilities | NDArray[np.int64]],
    y: NDArray[np.int64],
    split: Split,
    temperature: float | None = None,
) -> Tested:
    """Score a classifier on the test split.

    Args:
        predict: gives for positions (k,) the probabilities (k, classes), or the classes (k,) where there are none.
        y: the classes of all images (n,).
        split: whose ``test`` is read.
        temperature: found on validation.
    """

    def judge(truth: NDArray[Any], answer: Probabilities | NDArray[np.int64]) -> Tested:
        predicted: Any = answer.argmax(axis=1) if answer.ndim == 2 else answer
        balanced, f1 = _bootstrapped(truth, predicted)
        scores = replace(score(truth, answer, temperature), balanced_accuracy_ci=balanced, macro_f1_ci=f1)
        return Tested(scores, predicted == truth, predicted.astype(np.int64))

    return on_test(predict, y, split, judge)


def score(truth: NDArray[np.int64], answer: Probabilities | NDArray[np.int64], temperature: float | None = None) -> Scores:
    """Return the scores of probabilities (n, classes) or of predicted classes (n,) against the truth (n,).

    ``temperature`` is one found on validation, for the calibration error after scaling.
    """
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
        top5=_top(truth, answer, 5) if answer.ndim == 2 and answer.shape[1] > 5 else None,
        auroc=_auroc(truth, answer[:, 1]) if answer.ndim == 2 and answer.shape[1] == 2 else None,
        ece_scaled=_scaled_error(truth, answer, temperature) if known and temperature is not None else None,
        temperature=temperature,
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


def best_temperature(truth: NDArray[np.int64], probabilities: Probabilities) -> float:
    """Return the temperature of least log-loss on validation answers (n, classes) (Guo et al. 2017, section 4.2)."""
    from scipy.optimize import minimize_scalar

    found = minimize_scalar(
        lambda log: _log_loss(truth, at_temperature(probabilities, float(np.exp(log)))), bounds=(-3, 3), method="bounded"
    )
    return float(np.exp(found.x))


def at_temperature(probabilities: NDArray[Any], temperature: float) -> Probabilities:
    """Return probabilities (n, classes) with their logits divided by a temperature."""
    logits = np.log(np.clip(probabilities, _TINY, None)) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    scaled: Probabilities = np.exp(logits)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def cka(X: NDArray[Any], Y: NDArray[Any]) -> float:
    """Return how similar two embeddings (n, d) and (n, e) of the same images are, from 0 to 1.

    Linear centred kernel alignment (Kornblith et al. 2019, section 3).
    """
    X, Y = X - X.mean(axis=0), Y - Y.mean(axis=0)
    both = float(np.linalg.norm(Y.T @ X) ** 2)
    alone = float(np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y))
    return both / alone if alone else 1.0


def confusion(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Return how many images of each class (rows) were taken for each class (columns)."""
    return np.bincount(truth * classes + predicted, minlength=classes**2).reshape(classes, classes)


def per_class(matrix: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return support, precision, recall and F1 of each class from a confusion matrix."""
    right, support, answered = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    rows = zip(names, right.tolist(), support.tolist(), answered.tolist(), strict=True)
    return [
        {
            "class": name,
            "support": have,
            "precision": hit / said if said else 0.0,
            "recall": hit / have if have else 0.0,
            "f1": 2 * hit / (have + said) if have + said else 0.0,
        }
        for name, hit, have, said in rows
    ]


def _bootstrapped(
    truth: NDArray[np.int64], predicted: NDArray[np.int64], seed: int = 0
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return 95 % percentile intervals of balanced accuracy and macro F1 over the classes that there are.

    Resampling images is drawing the cells of their confusion matrix (Efron and Tibshirani 1993, chapter 13).
    """
    classes = np.unique(truth)
    pairs, counts = np.unique(np.stack([truth, predicted]), axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(truth), counts / len(truth), size=BOOTSTRAPS // 2)
    have = draws @ (pairs[0][:, None] == classes)
    said = draws @ (pairs[1][:, None] == classes)
    hit = draws @ ((pairs[0] == pairs[1])[:, None] & (pairs[0][:, None] == classes))
    there = have > 0
    recall = np.where(there, hit / np.maximum(have, 1), 0).sum(axis=1) / there.sum(axis=1)
    f1 = np.where(there, 2 * hit / np.maximum(have + said, 1), 0).sum(axis=1) / there.sum(axis=1)
    low, high = np.percentile(np.stack([recall, f1]), [2.5, 97.5], axis=1)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def label_scores(truth: NDArray[np.bool_], probabilities: NDArray[Any]) -> LabelScores:
    """Return the scores of probabilities (n, k) against labels (n, k)."""
    from sklearn.metrics import f1_score

    answered = probabilities >= 0.5
    rng = np.random.default_rng(0)
    draws = [rng.integers(0, len(truth), len(truth)) for _ in range(_FEW_BOOTSTRAPS)]
    low, high = np.percentile([_mean_precision(truth[draw], probabilities[draw]) for draw in draws], [2.5, 97.5])
    return LabelScores(
        _mean_precision(truth, probabilities),
        (float(low), float(high)),
        float(f1_score(truth, answered, average="micro", zero_division=0)),
        float(f1_score(truth, answered, average="macro", zero_division=0)),
        float((answered == truth).all(axis=1).mean()),
    )


def number_scores(truth: NDArray[np.float64], answers: NDArray[Any]) -> NumberScores:
    """Return the scores of numbers (n,) against the true ones (n,)."""
    wrong = truth - answers
    drawn = np.random.default_rng(0).integers(0, len(truth), (BOOTSTRAPS // 2, len(truth)))
    spread = np.maximum(truth[drawn].var(axis=1), _TINY)
    r2 = 1 - (wrong[drawn] ** 2).mean(axis=1) / spread
    low, high = np.percentile(np.stack([r2, np.abs(wrong)[drawn].mean(axis=1)]), [2.5, 97.5], axis=1)
    whole = 1 - float((wrong**2).mean()) / max(float(truth.var()), _TINY)
    return NumberScores(whole, (float(low[0]), float(high[0])), float(np.abs(wrong).mean()), (float(low[1]), float(high[1])))


def _mean_precision(truth: NDArray[np.bool_], probabilities: NDArray[Any]) -> float:
    """Return the mean over labels of average precision: precision at each true image, by falling probability."""
    order = np.argsort(-probabilities, axis=0, kind="stable")
    hits = np.take_along_axis(truth, order, axis=0)
    precision = hits.cumsum(axis=0) / np.arange(1, len(truth) + 1)[:, None]
    count = hits.sum(axis=0)
    there = count > 0
    return float(((precision * hits).sum(axis=0)[there] / count[there]).mean()) if there.any() else 0.0


def _scaled_error(truth: NDArray[np.int64], probabilities: NDArray[Any], temperature: float) -> float:
    scaled = at_temperature(probabilities, temperature)
    return _calibration_error(scaled.argmax(axis=1) == truth, scaled.max(axis=1))


def _top(truth: NDArray[np.int64], probabilities: NDArray[Any], count: int) -> float:
    best = np.argpartition(-probabilities, count - 1, axis=1)[:, :count]
    return float((best == truth[:, None]).any(axis=1).mean())


def _auroc(truth: NDArray[np.int64], score_of_second: NDArray[Any]) -> float | None:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truth, score_of_second)) if len(np.unique(truth)) == 2 else None


def _log_loss(truth: NDArray[np.int64], probabilities: NDArray[Any]) -> float:
    picked = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(picked, _TINY, None)).mean())


def _calibration_error(right: NDArray[np.bool_], confidence: NDArray[Any]) -> float:
    """Return the expected calibration error over 15 equal bins (Guo et al. 2017, section 2)."""
    bins = np.minimum((confidence * ECE_BINS).astype(np.int64), ECE_BINS - 1)
    total = 0.0
    for number in np.unique(bins):
        inside = bins == number
        total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)
