"""What is to be doubted of a data set: wrong labels, shortcuts, samples like no other, a test split unlike train.

Small heads tell it, and what removing samples does to a score.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import softmax

from featcache.errors import SetupError
from featcache.evaluation.intervals import FEWEST_OF_A_CLASS, Z95, Interval, wilson
from featcache.evaluation.metrics import Gap, evaluate_on_test, log_loss, paired_gap
from featcache.evaluation.splits import FOLDS, Drawing, Fold, Index, Split, Units, fold_of
from featcache.heads.base import Params
from featcache.heads.search import predict_with, ridge_shares, search_head, train

_HEAD = "logistic"
_BINS = 10  # quantiles of a measure: a linear head on them follows any curve
_FEW = 32  # values of a measure, each of which is a bin of its own: tenths would join rare cameras
_GRID: Sequence[Params] = ({"C": 0.01}, {"C": 1.0}, {"C": 100.0})
_CALMER = (1.0, 0.125)  # of the C that was chosen: less of it is less sure
_LEAST = 1e-6  # of a probability: a class that one head rules out may still be what the others say
_LIGHT = 1e-3  # nats for an exponent of 1: else a head that tells all samples alike could have any
_NEAR = 0.5  # of the way from the commonest class to the probe, from which a measure is called a shortcut
_FEWEST = 2  # samples of both parts in a fold, of which a variance can be told
_FAR = 5.0  # deviations (1.4826 x the median one, as of a normal distribution) from the median distance


@dataclass(frozen=True)
class Shortcut:
    """What one measure of a sample tells of its class: accuracy on test, and the gap to the commonest class.

    ``is_near``: it is better than that, and at least half as much better as the probe is.
    """

    measure: str
    accuracy: float
    over_majority: Gap
    is_near: bool


@dataclass(frozen=True)
class Shift:
    """How well a head on embeddings tells test from training samples: the area under the ROC curve, 0.5 if not at all."""

    auc: float
    auc_ci: Interval


@dataclass(frozen=True)
class Doubts:
    """What heads answer of samples that they have not seen, nor copies of them.

    Attributes:
        places: the samples (k,).
        shares: probabilities (k, classes) of all heads together.
        weights: the exponent of each head's probabilities in their product.
    """

    places: Index
    shares: NDArray[np.float64]
    weights: Mapping[str, float]


def out_of_fold(embeddings: Mapping[str, NDArray[Any]], y: Index, units: Units, params: Params, seed: int) -> Doubts:
    """Return what a logistic and a ridge head on each backbone's embeddings answer of samples that they have not seen.

    Their probabilities are multiplied, each to an exponent of its own, all of them those of least log-loss (a logarithmic
    opinion pool; chosen on unseen answers, as Wolpert 1992 stacks). Errors of heads of two kinds and two backbones are
    less alike than those of one: what all of them doubt is wrong more often (benchmarks/audit.md).

    Samples of classes that have fewer units than there are folds are left out: a fold would not train on them.

    Args:
        embeddings: by backbone, each (n, d).
        y: classes (n,).
        units: what is in one fold together.
        params: of the logistic head, chosen for one of the backbones; its C may be lowered.
        seed: of the folds.
    """
    drawing = Drawing(y, (), units, seed, grouped=False)
    counts = drawing.counts(np.arange(len(y)))
    keep = np.flatnonzero([counts[label] >= FOLDS for label in y.tolist()])
    if len(np.unique(y[keep])) < 2:
        return Doubts(keep[:0], np.empty((0, int(y.max()) + 1)), {})
    folds = list(_folds(keep, drawing))
    held = np.concatenate([fold.val for fold in folds])
    shares = dict[str, NDArray[np.float64]]()
    for name, X in embeddings.items():
        # Other folds than these chose C; here the probabilities are looked at: the better of it and a calmer one.
        tried = [search_head(_HEAD, X, y, folds, seed, [{"C": share * params["C"]}]) for share in _CALMER]
        shares[f"{_HEAD} on {name}"] = min(tried, key=lambda search: log_loss(y[held], search.answers)).answers
        shares[f"ridge on {name}"] = ridge_shares(X, y, folds)
    weights, pooled = _pooled(list(shares.values()), y[held])
    return Doubts(held, pooled, dict(zip(shares, weights.tolist(), strict=True)))


def _pooled(shares: Sequence[NDArray[np.float64]], y: Index) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the exponents (m,), none negative, of least log-loss, and the product of the probabilities (k, classes)."""
    logs = np.log(np.maximum(np.stack(shares), _LEAST))
    own = logs[:, np.arange(len(y)), y]

    def loss(weights: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        product = softmax(np.tensordot(weights, logs, axes=1), axis=1)
        slope = (product * logs).sum(axis=2).mean(axis=1) - own.mean(axis=1)
        return log_loss(y, product) + _LIGHT * float(weights @ weights), slope + 2 * _LIGHT * weights

    # convex in the exponents: it does not matter where it starts
    start = np.full(len(shares), 1 / len(shares))
    weights = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[(0, None)] * len(shares)).x
    return weights, softmax(np.tensordot(weights, logs, axes=1), axis=1)


def _folds(positions: Index, drawing: Drawing) -> Iterator[Fold]:
    fold = fold_of(positions, drawing, FOLDS)
    for number in range(FOLDS):
        if (fold == number).any():
            yield Fold(positions[fold != number], positions[fold == number])


def shortcuts(
    measures: Mapping[str, NDArray[Any]], y: Index, split: Split, probe: NDArray[np.bool_], seed: int
) -> list[Shortcut]:
    """Return what measures of samples tell of their class, each alone, the most telling first.

    Args:
        measures: by their names, columns (n, m).
        y: classes (n,).
        split: which samples train, choose and test.
        probe: whether the probe has each test sample right (t,).
        seed: of the heads' own randomness.
    """
    commonest = y[split.test] == np.bincount(y[split.train_val]).argmax()
    results = []
    for name, columns in measures.items():
        X = binned(columns, split.train_val)
        if not X.shape[1]:  # all samples are alike in it
            continue
        search = search_head(_HEAD, X, y, split.folds, seed, _GRID)
        estimator = train(_HEAD, search.params, X[split.train_val], y[split.train_val], seed)
        classes = int(y.max()) + 1
        right = evaluate_on_test(predict_with(estimator, X[split.test], "label", classes), y, split).right
        gap = paired_gap(right, commonest, groups=split.test_groups)
        reach = _NEAR * 100 * (float(probe.mean()) - float(commonest.mean()))
        results.append(Shortcut(name, float(right.mean()), gap, not gap.is_noise and gap.points > 0 and gap.points >= reach))
    return sorted(results, key=lambda result: -result.accuracy)


def binned(columns: NDArray[Any], train: Index) -> NDArray[np.float32]:
    """Return which tenth of the training samples' values each value (n, m) is in, or which value where there are few.

    One column a tenth or value (n, k).
    """
    parts = []
    for values in columns.T:
        edges = np.unique(values[train])[1:]
        if len(edges) > _FEW:
            edges = np.unique(np.quantile(values[train], np.linspace(0, 1, _BINS + 1)[1:-1]))
        place = np.digitize(values, edges)
        seen = np.unique(place[train])
        if len(seen) > 1:
            parts.append(place[:, None] == seen)
    return np.concatenate(parts, axis=1).astype(np.float32) if parts else np.empty((len(columns), 0), np.float32)


def shift(X: NDArray[Any], units: Units, split: Split, params: Params, seed: int) -> Shift | None:
    """Return how well test samples can be told from the others, by heads that have not seen them; ``None`` of too few.

    Args:
        X: embeddings (n, d).
        units: what is in one fold together.
        split: whose test samples are told from the others.
        params: of the head, chosen for another question: none is chosen on the samples that it is judged by.
        seed: of the folds.
    """
    is_test = np.zeros(len(X), np.int64)
    is_test[split.test] = 1
    folds = list(_folds(np.arange(len(X)), Drawing(is_test, (), units, seed, grouped=False)))
    if any(np.bincount(is_test[part], minlength=2).min() < _FEWEST for fold in folds for part in (fold.train, fold.val)):
        return None
    answers = search_head(_HEAD, X, is_test, folds, seed, [params]).answers[:, 1]
    ends = np.cumsum([len(fold.val) for fold in folds])[:-1]
    parts = zip(folds, np.split(answers, ends), strict=True)
    return Shift(*mean_auc([auc(is_test[fold.val] == 1, told) for fold, told in parts]))


def label_issues(y: Index, probabilities: NDArray[np.float64]) -> tuple[Index, NDArray[np.float64]]:
    """Return which labels are likely wrong, the likeliest first (k,), and how little each is believed (n,), from 0 to 1.

    Confident learning (Northcutt, Jiang and Chuang 2021, section 3), by cleanlab, estimates how many labels are wrong: so
    many are told, those of least probability. Of its rules this one is right most often (benchmarks/audit.md).

    Args:
        y: classes (n,).
        probabilities: (n, classes), each row answered by a head that was not trained on its sample.

    Raises:
        SetupError: cleanlab is not installed.
    """
    try:
        from cleanlab.filter import find_label_issues
    except ImportError:
        raise SetupError("Likely label errors are told by cleanlab: `pip install 'featcache[audit]'`.") from None
    present, renumbered = np.unique(y, return_inverse=True)  # cleanlab wants classes from 0 on without a gap
    shares = probabilities[:, present]
    shares /= np.maximum(shares.sum(axis=1, keepdims=True), np.finfo(np.float64).tiny)
    how = {"return_indices_ranked_by": "self_confidence", "filter_by": "low_self_confidence"}
    issues = find_label_issues(renumbered, shares, n_jobs=1, **how)  # processes would cost more than they save
    doubt: NDArray[np.float64] = 1 - shares[np.arange(len(y)), renumbered]
    return np.asarray(issues, np.int64), doubt


def outliers(nearest: NDArray[np.float32]) -> Index:
    """Return the samples whose nearest other is unusually far, by its cosine (n,), the farthest first."""
    distance = 1 - nearest.astype(np.float64)
    middle = float(np.median(distance))
    spread = 1.4826 * float(np.median(np.abs(distance - middle)))
    order = np.argsort(-distance, kind="stable")
    return order[distance[order] > middle + _FAR * spread] if spread > 0 else order[:0]


@dataclass(frozen=True)
class Removal:
    """A score on all samples and without some of them: ``change`` and its interval are of the second less the first.

    ``None``: nothing was removed, or too little is left to tell.
    """

    removed: int
    accuracy: float
    accuracy_without: float | None
    change: float | None
    change_ci: Interval | None


def without(right: NDArray[np.bool_], removed: NDArray[np.bool_]) -> Removal:
    """Return what the accuracy of answers (n,) is without the samples ``removed`` (n,).

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


def _apart(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Interval:
    """Return Newcombe's interval of the difference of two proportions."""
    first, second = float(one.mean()), float(other.mean())
    (low, high), (low_2, high_2) = (wilson(int(part.sum()), len(part)) for part in (one, other))
    difference = first - second
    below = float(np.hypot(first - low, high_2 - second))
    return difference - below, difference + float(np.hypot(high - first, second - low_2))


def auc(is_second: NDArray[np.bool_], score: NDArray[Any]) -> tuple[float, float]:
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
