"""Scores with their uncertainty, and the one function that reads the test split."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.evaluation import intervals
from featcache.evaluation.intervals import Groups, Interval
from featcache.evaluation.splits import Split

Kind = Literal["label", "labels", "number"]
Probabilities = NDArray[np.float64]
ECE_BINS = 15
SIGNIFICANT = 0.05
_LEAST = np.finfo(np.float64).eps  # a probability of none costs -log of this, as in scikit-learn's log-loss
LEAST_SCALED = 1e-30  # what is smaller counts as none when it is scaled: float32, as exported models compute, still holds it


@dataclass(frozen=True)
class Scores:
    """How well some predictions fit.

    Balanced accuracy and macro F1 are means over the classes that the images have (scikit-learn's with ``labels`` those).
    ``ece`` is the expected calibration error, ``ece_scaled`` the same after scaling by ``temperature``; ``top5`` is there
    for more than five classes, ``auroc`` for two. The 95 % intervals are there for the test split only, where the data are
    enough to tell (``intervals``).
    """

    accuracy: float
    accuracy_ci: Interval | None
    balanced_accuracy: float
    macro_f1: float
    log_loss: float | None
    ece: float | None
    top5: float | None = None
    auroc: float | None = None
    ece_scaled: float | None = None
    temperature: float | None = None
    balanced_accuracy_ci: Interval | None = None
    macro_f1_ci: Interval | None = None

    @property
    def rank(self) -> tuple[float, float]:
        """What the smaller of is better: by accuracy, then by log-loss; one without probabilities has none to show."""
        return (-self.accuracy, self.log_loss if self.log_loss is not None else math.inf)

    @property
    def primary(self) -> tuple[float, Interval | None]:
        """The score that chooses, and its interval."""
        return self.accuracy, self.accuracy_ci


@dataclass(frozen=True)
class TestResult:
    """A model on the test split: scores and, image by image, whether it was right (n,) bool.

    ``confidence`` (n,) is the probability of each predicted class, ``None`` for a model that gives none. Several labels,
    or a number, are not right or wrong: then both arrays are empty.
    """

    scores: Any
    right: NDArray[np.bool_]
    predicted: NDArray[np.int64]
    confidence: NDArray[Any] | None = None


@dataclass(frozen=True)
class LabelScores:
    """How well several labels an image are told: probabilities against which labels there are.

    ``mean_average_precision`` is the mean over labels that occur; F1 and exact matches are at a probability of one half.
    The interval is there for the test split only.
    """

    mean_average_precision: float
    mean_average_precision_ci: Interval | None
    micro_f1: float
    macro_f1: float
    exact_match: float

    @property
    def rank(self) -> tuple[float, ...]:
        """What the smaller of is better."""
        return (-self.mean_average_precision,)

    @property
    def primary(self) -> tuple[float, Interval | None]:
        """The score that chooses, and its interval."""
        return self.mean_average_precision, self.mean_average_precision_ci


@dataclass(frozen=True)
class NumberScores:
    """How well numbers are told: R2 and mean absolute error; 95 % intervals on the test split only."""

    r2: float
    r2_ci: Interval | None
    mae: float
    mae_ci: Interval | None

    @property
    def rank(self) -> tuple[float, ...]:
        """What the smaller of is better."""
        return (-self.r2,)

    @property
    def primary(self) -> tuple[float, Interval | None]:
        """The score that chooses, and its interval."""
        return self.r2, self.r2_ci


AnyScores = Scores | LabelScores | NumberScores


@dataclass(frozen=True)
class Gap:
    """The difference between two models on the same images, in points of accuracy: 95 % interval, exact p.

    The interval includes 0 wherever p is 0.05 or more. ``None``: there are too few groups to tell.
    """

    points: float
    ci: Interval | None
    p_value: float

    @property
    def is_noise(self) -> bool:
        """Whether the two may be equally good: the interval includes 0, or there is none."""
        return self.ci is None or self.ci[0] <= 0 <= self.ci[1]


def kind_of(y: NDArray[Any]) -> Kind:
    """Return what is to be told by how it is held: classes are integers, labels a table of truth values, numbers floats."""
    return "labels" if y.ndim == 2 else "number" if y.dtype.kind == "f" else "label"


def evaluate(y_true: NDArray[Any], predictions: NDArray[Any], temperature: float | None = None) -> AnyScores:
    """Return the scores, without intervals, of predictions for images of any kind of task."""
    kind = kind_of(y_true)
    if kind == "label":
        return score(y_true, predictions, temperature)
    return label_scores(y_true, predictions) if kind == "labels" else number_scores(y_true, predictions)


def evaluate_on_test(answers: NDArray[Any], y: NDArray[Any], split: Split, temperature: float | None = None) -> TestResult:
    """Score a finished model of any kind of task on the test split, with intervals that respect the split's groups.

    What is true of test samples is read here alone, once a finished model.

    Args:
        answers: of the test samples (t,): the probabilities (t, classes), or the classes (t,) where there are none; those of
            labels (t, labels); numbers (t,).
        y: the classes of all samples (n,), which labels there are (n, labels), or numbers (n,). Of classes that ``test`` has
            too few samples of, balanced accuracy and macro F1 get no interval.
        split: whose ``test`` is read.
        temperature: found on validation.

    Raises:
        DataError: an answer is NaN or infinite.
    """
    truth, groups, kind = y[split.test], split.test_groups, kind_of(y)
    scores: AnyScores
    if kind == "label":
        predicted: Any = (answers.argmax(axis=1) if answers.ndim == 2 else answers).astype(np.int64)
        right, classes = predicted == truth, np.unique(y)
        scores = replace(
            score(truth, answers, temperature),
            accuracy_ci=intervals.of_accuracy(right, groups),
            balanced_accuracy_ci=intervals.of_recalls(truth, predicted, classes, groups),
            macro_f1_ci=intervals.of_f1s(truth, predicted, classes, groups),
        )
        return TestResult(scores, right, predicted, answers.max(axis=1) if answers.ndim == 2 else None)
    if kind == "labels":
        interval = intervals.of_precisions(truth, answers, groups)
        scores = replace(label_scores(truth, answers), mean_average_precision_ci=interval)
    else:
        r2, mae = intervals.of_errors(truth, truth - answers, groups) or (None, None)
        scores = replace(number_scores(truth, answers), r2_ci=r2, mae_ci=mae)
    return TestResult(scores, np.empty(0, np.bool_), np.empty(0, np.int64))


def scores_from(kind: Kind, facts: Mapping[str, Any]) -> AnyScores:
    """Return the scores that a record holds, intervals as pairs again."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    kinds: dict[Kind, type[AnyScores]] = {"label": Scores, "labels": LabelScores, "number": NumberScores}
    return kinds[kind](**fields)


def score(truth: NDArray[np.int64], answer: Probabilities | NDArray[np.int64], temperature: float | None = None) -> Scores:
    """Return the scores, without intervals, of probabilities (n, classes) or of predicted classes (n,).

    Args:
        truth: classes (n,).
        answer: as above.
        temperature: one found on validation, for the calibration error after scaling.

    Raises:
        DataError: an answer is NaN or infinite.
    """
    _require_finite(answer)
    known = answer.ndim == 2
    predicted: Any = answer.argmax(axis=1) if known else answer
    right = predicted == truth
    # Counted here: a search scores every candidate, and scikit-learn checks arrays for longer than most heads are fitted.
    size = 1 + max(int(truth.max()), int(predicted.max()))
    hits, support, answered = (np.bincount(classes, minlength=size) for classes in (truth[right], truth, predicted))
    present = np.flatnonzero(support)
    hits, support, answered = hits[present], support[present], answered[present]
    return Scores(
        accuracy=float(right.mean()),
        accuracy_ci=None,
        balanced_accuracy=float((hits / support).mean()),
        macro_f1=float((2 * hits / (support + answered)).mean()),
        log_loss=log_loss(truth, answer) if known else None,
        ece=_calibration_error(right, answer.max(axis=1)) if known else None,
        top5=_top(truth, answer, 5) if answer.ndim == 2 and answer.shape[1] > 5 else None,
        auroc=_auroc(truth, answer[:, 1]) if answer.ndim == 2 and answer.shape[1] == 2 else None,
        ece_scaled=_scaled_error(truth, answer, temperature) if known and temperature is not None else None,
        temperature=temperature,
    )


def _require_finite(answer: NDArray[Any]) -> None:
    if not np.isfinite(answer).all():
        wrong = int((~np.isfinite(answer)).reshape(len(answer), -1).any(axis=1).sum())
        raise DataError(
            f"the answers for {wrong} of {len(answer)} samples are NaN or infinite: look for extreme values in the "
            "features, or use another head."
        )


def encode_correct(right: NDArray[np.bool_]) -> str:
    """Return truth values as a text of 0 and 1."""
    return "".join("1" if one else "0" for one in right)


def decode_correct(text: str) -> NDArray[np.bool_]:
    """Return the truth values of a text of 0 and 1."""
    return np.array([char == "1" for char in text], dtype=np.bool_)


def paired_gap(tuned: NDArray[np.bool_], probe: NDArray[np.bool_], *, groups: Groups = None) -> Gap:
    """Return how much better ``tuned`` (n,) is than ``probe`` (n,), right or wrong on the same n images.

    The interval is Bonett and Price's (2012), p McNemar's exact one (1947); with groups both respect them
    (``intervals.of_difference``, ``intervals.sign_flip``). p decides where they disagree about 0: the interval is then
    widened to it.

    Args:
        tuned: whether it was right (n,).
        probe: whether it was right (n,).
        groups: the number of each image's group (n,).
    """
    difference = tuned.astype(np.int64) - probe.astype(np.int64)
    interval, p_value = intervals.of_difference(difference, groups), intervals.sign_flip(difference, groups)
    if interval is not None:
        low, high = interval
        if p_value >= SIGNIFICANT:
            low, high = min(low, 0.0), max(high, 0.0)
        interval = (100 * low, 100 * high)
    return Gap(100 * float(difference.mean()), interval, p_value)


def best_temperature(truth: NDArray[np.int64], probabilities: Probabilities) -> float | None:
    """Return the temperature of least log-loss on validation answers (n, classes) (Guo et al. 2017, section 4.2).

    Images whose class has no probability at all say nothing about it; ``None`` where no others are left. One image more, of
    median confidence, is counted as of its second class: where all answers are right, nothing else would keep the
    temperature from zero, and probabilities from one (as Laplace's prior does for Platt 1999, section 2.2).
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    logits = _logits(probabilities)
    picked = logits[np.arange(len(truth)), truth]
    some = np.isfinite(picked)
    if not some.any():
        return None
    logits, picked = logits[some], picked[some]
    second, first = np.partition(logits, -2, axis=1)[:, -2:].T
    open_ones = np.flatnonzero(np.isfinite(second))
    if len(open_ones):
        middle = open_ones[np.argsort((first - second)[open_ones], kind="stable")[len(open_ones) // 2]]
        logits, picked = np.concatenate([logits, logits[[middle]]]), np.append(picked, second[middle])
    found = minimize_scalar(
        lambda log: float((logsumexp(logits * np.exp(-log), axis=1) - picked * np.exp(-log)).mean()),
        bounds=(-3, 3),
        method="bounded",
    )
    return float(np.exp(found.x))


def at_temperature(probabilities: NDArray[Any], temperature: float) -> Probabilities:
    """Return probabilities (n, classes) with their logits divided by a temperature; one of none stays none."""
    logits = _logits(probabilities) / temperature
    logits -= logits.max(axis=1, keepdims=True)
    scaled: Probabilities = np.exp(logits)
    scaled /= scaled.sum(axis=1, keepdims=True)
    return scaled


def _logits(probabilities: NDArray[Any]) -> NDArray[np.float64]:
    """Return logarithms of probabilities (n, classes), minus infinity of those too small to be scaled."""
    there = probabilities > LEAST_SCALED
    return np.where(there, np.log(np.where(there, probabilities, 1.0)), -np.inf)


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


def label_scores(truth: NDArray[np.bool_], probabilities: NDArray[Any]) -> LabelScores:
    """Return the scores, without an interval, of probabilities (n, k) against labels (n, k).

    Raises:
        DataError: an answer is NaN or infinite.
    """
    from sklearn.metrics import f1_score

    _require_finite(probabilities)
    answered = probabilities >= 0.5
    there = np.flatnonzero(truth.any(axis=0))
    precisions = [intervals.average_precision(truth[:, one], probabilities[:, one]) for one in there]
    return LabelScores(
        float(np.mean(precisions)) if precisions else 0.0,
        None,
        float(f1_score(truth, answered, average="micro", zero_division=0)),
        float(f1_score(truth, answered, average="macro", zero_division=0)),
        float((answered == truth).all(axis=1).mean()),
    )


def number_scores(truth: NDArray[np.float64], answers: NDArray[Any]) -> NumberScores:
    """Return the scores, without intervals, of numbers (n,) against the true ones (n,).

    R2 where all true numbers are the same is 1 if all answers are right, else 0, as in scikit-learn.

    Raises:
        DataError: an answer is NaN or infinite.
    """
    _require_finite(answers)
    wrong, spread = float(((truth - answers) ** 2).mean()), float(truth.var())
    r2 = 1 - wrong / spread if truth.min() < truth.max() else float(wrong == 0)
    return NumberScores(r2, None, float(np.abs(truth - answers).mean()), None)


def _scaled_error(truth: NDArray[np.int64], probabilities: NDArray[Any], temperature: float) -> float:
    scaled = at_temperature(probabilities, temperature)
    return _calibration_error(scaled.argmax(axis=1) == truth, scaled.max(axis=1))


def _top(truth: NDArray[np.int64], probabilities: NDArray[Any], count: int) -> float:
    """Return how often the true class is among so many likeliest, equal ones in random order: no class's number decides."""
    own = probabilities[np.arange(len(truth)), truth][:, None]
    above, equal = (probabilities > own).sum(axis=1), (probabilities == own).sum(axis=1)
    return float(np.clip((count - above) / equal, 0, 1).mean())


def _auroc(truth: NDArray[np.int64], score_of_second: NDArray[Any]) -> float | None:
    """Return the area under the ROC curve: the share of pairs of either class in which the second's row scores higher.

    Equal scores count half (Hanley and McNeil 1982). Counted, since scikit-learn's checks take as long as a small search.
    """
    classes = np.unique(truth)
    if len(classes) != 2:
        return None
    of_second, of_first = score_of_second[truth == classes[1]], np.sort(score_of_second[truth == classes[0]])
    twice = sum(int(np.searchsorted(of_first, of_second, side).sum()) for side in ("left", "right"))
    return twice / (2 * len(of_second) * len(of_first))


def log_loss(truth: NDArray[np.int64], probabilities: NDArray[Any]) -> float:
    """Return the mean log-loss of probabilities (n, classes) for classes (n,)."""
    picked = probabilities[np.arange(len(truth)), truth]
    return float(-np.log(np.clip(picked, _LEAST, None)).mean())


def _calibration_error(right: NDArray[np.bool_], confidence: NDArray[Any]) -> float:
    """Return the expected calibration error over 15 equal bins, each with its upper end (Guo et al. 2017, section 2)."""
    bins = np.ceil(confidence * ECE_BINS).astype(np.int64)
    total = 0.0
    for number in np.unique(bins):
        inside = bins == number
        total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return float(total)
