"""Heads that begin with what a text tower says of the classes: nothing trained, a probe drawn towards it, neighbours beside.

Zero-shot is Radford et al. 2021, section 3.1; weights between it and a probe are Wortsman et al. 2022 (WiSE-FT, section 3);
neighbours beside it are Zhang et al. 2022 (Tip-Adapter, section 3.1).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.pipeline import FeatureUnion, make_pipeline
from sklearn.preprocessing import Normalizer, normalize
from sklearn.utils import gen_batches

from featcache.errors import DataError
from featcache.evaluation import Task
from featcache.evaluation.metrics import evaluate
from featcache.evaluation.splits import Fold, Split
from featcache.fingerprint import as_named, as_stored
from featcache.heads import FittedHead
from featcache.heads.base import X_, Y_, Candidate, Params
from featcache.heads.linear import linear_estimator, linear_weights
from featcache.heads.search import Embeddings, SearchResult, over_views, search_head, tested_head, train

_PULLS = (0.01, 0.1, 1.0, 10.0, 100.0)  # C of the loss beside the distance from zero-shot weights
_MIXES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # share of the probe
_ALPHAS, _BETAS = (0.1, 0.3, 1.0, 3.0, 10.0), (1.0, 2.5, 5.5, 10.0)  # around the paper's 1 and 5.5
_NOTHING_LEARNT: dict[str, Params] = {"zeroshot": {}, "zeroshot-probe": {"pull": 0.0}, "tip": {"alpha": 0.0, "beta": 1.0}}
_LEAST = -30.0  # the logit of a class that a probe never saw, as ``linear_weights`` has it
_TOLERANCE = 1e-4  # of the objective: what half of the squared gradient may be, which bounds what is left
_ROWS_AT_ONCE = 512


@dataclass(frozen=True)
class ClassRows:
    """Each class as a unit row (k, d), and how cosines with samples become logits."""

    rows: NDArray[Any]
    scale: float
    bias: float

    @property
    def stored(self) -> dict[str, Any]:
        """All of it as plain data, each float32 as it is."""
        rows = np.asarray(self.rows, np.float32)
        return {"rows": rows.tobytes().hex(), "classes": len(rows), "scale": self.scale, "bias": self.bias}

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "ClassRows":
        """Return rows from plain data."""
        rows = np.frombuffer(bytes.fromhex(stored["rows"]), np.float32).reshape(int(stored["classes"]), -1)
        return cls(rows, float(stored["scale"]), float(stored["bias"]))

    def logits(self, X: X_) -> NDArray[np.float64]:
        """Return logits (n, k) of embeddings (n, d)."""
        scores: NDArray[np.float64] = self.scale * (normalize(X).astype(np.float64) @ self.rows.T) + self.bias
        return scores

    def head(self, moved: NDArray[np.float64] | float = 0.0) -> Any:
        """Return a head of these rows, moved by so much (k, d)."""
        weights = self.scale * self.rows.astype(np.float64) + moved
        (linear,) = (step for _, step in linear_estimator(weights, np.full(len(weights), self.bias)).steps)
        return make_pipeline(Normalizer().fit(self.rows), linear)


class TipAdapter(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """Zero-shot logits, and beside them a vote of the training samples by exp(-beta (1 - cosine)), ``alpha`` times.

    Args:
        alpha: the weight of the vote.
        beta: how fast it falls with distance.
    """

    def __init__(self, alpha: float = 1.0, beta: float = 5.5) -> None:
        self.alpha = alpha
        self.beta = beta

    def __getstate__(self) -> dict[str, Any]:
        """Return what a file holds."""
        return as_stored(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a file held."""
        super().__setstate__(as_named(state))

    def remember(self, classes: ClassRows, X: X_, y: Y_) -> "TipAdapter":
        """Keep the training samples (n, d) as they are; nothing is trained."""
        self.weights_, self.bias_ = (classes.scale * classes.rows).astype(np.float32), classes.bias
        self.samples_, self.votes_ = normalize(X).astype(np.float32), np.eye(len(classes.rows), dtype=np.float32)[y]
        self.classes_, self.n_features_in_ = np.arange(len(classes.rows)), X.shape[1]
        return self

    def predict_proba(self, X: X_) -> NDArray[np.float64]:
        """Return probabilities (n, k)."""
        unit = normalize(X).astype(np.float32)
        parts = []
        for block in gen_batches(len(unit), _ROWS_AT_ONCE):
            near = np.exp(-self.beta * (1 - unit[block] @ self.samples_.T))
            parts.append(unit[block] @ self.weights_.T + self.bias_ + self.alpha * (near @ self.votes_))
        shares: NDArray[np.float64] = softmax(np.concatenate(parts).astype(np.float64), axis=1)
        return shares

    def predict(self, X: X_) -> Y_:
        """Return classes (n,)."""
        answers: Y_ = self.predict_proba(X).argmax(axis=1)
        return answers


@dataclass(frozen=True)
class ClassEmbeddings(Embeddings):
    """Embeddings with the rows of their classes: what begins with these is searched and trained as other heads are."""

    classes: ClassRows = field(kw_only=True)

    @classmethod
    def beside(cls, classes: ClassRows, task: Task, views: int) -> "ClassEmbeddings":
        """Return a task's rows beside those of its classes.

        Raises:
            DataError: as of ``Embeddings.of``.
        """
        rows = Embeddings.of(task, views)
        return cls(rows.task, rows.X, rows.views, classes=classes)

    def search(self, name: str, split: Split, seed: int, grid: Sequence[Params] | None = None) -> SearchResult:
        """Choose a head's parameters on validation."""
        del seed, grid  # nothing is drawn; what may be chosen is the papers'
        folds = [Fold(self.rows(fold.train), self.rows(fold.val)) for fold in split.folds]
        X: Any = self.X  # in memory: these heads are refused where it would not fit
        return search_zeroshot(name, self.classes, X, self.y, folds, self.views)

    def train(
        self, name: str, params: Params, samples: NDArray[np.int64], seed: int, near: SearchResult | None = None
    ) -> Any:
        """Return a head that was fitted on some samples."""
        del near
        rows = self.rows(samples)
        return _refitted(name, params, self.classes, self.X[rows], self.y[rows], seed)

    def most_regular(self, name: str, count: int) -> Params:
        """Return the parameters with which a head is zero-shot itself."""
        del count
        return dict(_NOTHING_LEARNT[name])


def fit_zeroshot(name: str, task: Task, split: Split, classes: ClassRows, seed: int, views: int = 1) -> FittedHead:
    """Choose a head's parameters on validation, refit it on train and validation, test it once.

    Args:
        name: ``zeroshot``, ``zeroshot-probe`` or ``tip``.
        task: embeddings of the backbone, and the classes.
        split: which samples train, choose and test.
        classes: rows of the text tower, in the order of the task's classes.
        seed: of the probe.
        views: how many rows a sample has.

    Raises:
        DataError: no candidate reached its optimum.
    """
    embeddings, started = ClassEmbeddings.beside(classes, task, views), time.monotonic()
    search = embeddings.search(name, split, seed)
    estimator = embeddings.train(name, search.params, split.train_val, seed)
    return tested_head(name, estimator, search, embeddings, split, time.monotonic() - started)


def search_zeroshot(name: str, classes: ClassRows, X: X_, y: Y_, folds: Sequence[Fold], views: int = 1) -> SearchResult:
    """Return what does best on validation: by accuracy, then log-loss; of equals what stays nearer to zero-shot.

    Zero-shot itself, and for ``zeroshot-probe`` the logistic probe, are candidates: none is worse than these there.

    Raises:
        DataError: as of ``search_head``.
    """
    y_true = np.concatenate([y[fold.val] for fold in folds])[::views]
    candidates = list(_CANDIDATES[name](classes, X, y, folds))
    reached = [each for each in candidates if each.converged]
    pooled = [over_views(each.answers, views) for each in reached]
    ranks = [evaluate(y_true, answers).rank for answers in pooled]
    best = min(range(len(ranks)), key=ranks.__getitem__)
    left_out = len(candidates) - len(reached)
    val = evaluate(y_true, pooled[best])
    return SearchResult(reached[best].params, val, pooled[best], y_true, len(candidates), left_out)


def _zeroshot(classes: ClassRows, X: X_, _: Y_, folds: Sequence[Fold]) -> Iterator[Candidate]:
    yield Candidate({}, np.concatenate([softmax(classes.logits(X[fold.val]), axis=1) for fold in folds]))


def _towards_probe(classes: ClassRows, X: X_, y: Y_, folds: Sequence[Fold]) -> Iterator[Candidate]:
    logits = np.concatenate([classes.logits(X[fold.val]) for fold in folds])
    yield Candidate({"pull": 0.0}, softmax(logits, axis=1))
    for pull in _PULLS:
        moves = [_pulled(classes, X[fold.train], y[fold.train], pull) for fold in folds]
        answers = [
            softmax(classes.logits(X[fold.val]) + normalize(X[fold.val]) @ moved.T, axis=1)
            for fold, (moved, _) in zip(folds, moves, strict=True)
        ]
        yield Candidate({"pull": pull}, np.concatenate(answers), all(reached for _, reached in moves))
    probe = search_head("logistic", X, y, folds, 0)
    shares = np.zeros_like(logits)
    shares[:, : probe.answers.shape[1]] = probe.answers
    of_probe = np.log(shares, out=np.full_like(shares, _LEAST), where=shares > 0)
    for mix in _MIXES:
        yield Candidate({"mix": mix, **probe.params}, softmax((1 - mix) * logits + mix * of_probe, axis=1))
    yield Candidate({"mix": 1.0, **probe.params}, shares)


def _tip(classes: ClassRows, X: X_, y: Y_, folds: Sequence[Fold]) -> Iterator[Candidate]:
    yield Candidate({"alpha": 0.0, "beta": 1.0}, next(_zeroshot(classes, X, y, folds)).answers)
    for beta in _BETAS:
        for alpha in _ALPHAS:
            heads = [TipAdapter(alpha, beta).remember(classes, X[fold.train], y[fold.train]) for fold in folds]
            answers = [head.predict_proba(X[fold.val]) for head, fold in zip(heads, folds, strict=True)]
            yield Candidate({"alpha": alpha, "beta": beta}, np.concatenate(answers))


_CANDIDATES: dict[str, Callable[[ClassRows, X_, Y_, Sequence[Fold]], Iterator[Candidate]]] = {
    "zeroshot": _zeroshot,
    "zeroshot-probe": _towards_probe,
    "tip": _tip,
}


def _refitted(name: str, params: Params, classes: ClassRows, X: X_, y: Y_, seed: int) -> Any:
    if name == "tip":
        return TipAdapter(**params).remember(classes, X, y)
    if name == "zeroshot" or params.get("pull") == 0:
        return classes.head()
    if "pull" in params:
        moved, is_reached = _pulled(classes, X, y, params["pull"])
        if not is_reached:
            raise DataError(
                f"`heads` {name}: the fit with pull={params['pull']:g} did not reach its optimum: take another head."
            )
        return classes.head(moved)
    probe = train("logistic", {"C": params["C"]}, X, y, seed)
    if params["mix"] == 1:
        return probe
    weights, bias = linear_weights(probe, len(classes.rows))
    mix, texts = params["mix"], classes.scale * classes.rows.astype(np.float64)
    joined = np.concatenate([(1 - mix) * texts, mix * weights], axis=1)
    (linear,) = (step for _, step in linear_estimator(joined, mix * bias + (1 - mix) * classes.bias).steps)
    # the probe takes embeddings as they are, texts were trained with unit ones
    return make_pipeline(FeatureUnion([("unit", Normalizer()), ("plain", "passthrough")]).fit(X[:1]), linear)


def _pulled(classes: ClassRows, X: X_, y: Y_, pull: float) -> tuple[NDArray[np.float64], bool]:
    """Minimise pull x (sum of log-losses) + |W - W of zero-shot|^2 / 2; return the difference (k, d), and if proven."""
    unit, start = normalize(X).astype(np.float64), classes.logits(X)
    truth = np.eye(len(classes.rows))[y]

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        moved = flat.reshape(truth.shape[1], -1)
        scores = start + unit @ moved.T
        total = logsumexp(scores, axis=1)
        loss = pull * float((total - (scores * truth).sum(axis=1)).sum()) + float(flat @ flat) / 2
        slope = pull * (np.exp(scores - total[:, None]) - truth).T @ unit + moved
        return loss, slope.reshape(-1)

    result: Any = minimize(
        objective, np.zeros(truth.shape[1] * unit.shape[1]), jac=True, method="L-BFGS-B", options={"maxiter": 1000}
    )
    # the penalty's curvature is 1, so that this is a bound
    return result.x.reshape(truth.shape[1], -1), float(result.jac @ result.jac) / 2 <= _TOLERANCE * float(result.fun) + 1e-9
