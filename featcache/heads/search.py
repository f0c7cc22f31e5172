"""Train a head on cached features: choose on validation, refit on train and validation, test once; and learning curves."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsRegressor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import LabelBinarizer, Normalizer

from featcache.display import progress
from featcache.errors import DataError, FeatcacheError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import (
    AnyScores,
    Kind,
    TestResult,
    at_temperature,
    best_temperature,
    evaluate,
    evaluate_on_test,
    kind_of,
    log_loss,
)
from featcache.evaluation.splits import SMALL, Fold, Split, crossed_folds, few_shot, part_of
from featcache.fingerprint import as_stored
from featcache.heads import ENSEMBLE, MEMBERS, FittedHead, Unseen, require_head, solvers
from featcache.heads.base import X_, Y_, Candidate, HeadFamily, Many, Params, mask_of, products_for
from featcache.heads.base import answers as class_answers
from featcache.heads.linear import ALPHAS, COARSE_CS, LOGISTIC, RIDGE, SELECTED, SVM, first_near, near
from featcache.heads.nonlinear import BOOSTING, CENTROID, KNN, LDA, MLP, RBF
from featcache.heads.solvers.scaled import solve_ridge
from featcache.store import LazyRows

_ALPHAS = tuple(np.geomspace(1e-3, 1e3, 13))  # of ridge on embeddings whose mean squared length is 1
_MOST_MEMBERS = 3  # of an ensemble
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of the training samples, that a learning curve has
REPEATS = 5  # draws of each of its points
_SHARP = 8.0  # as logits, values between 0 and 1 are flat: from here a temperature finds the rest

Labels = NDArray[np.bool_]
Numbers = NDArray[np.float64]


def _sweep_labels(grid: Sequence[Params], X: X_, Y: Labels, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    """One C for all labels: one each would be chosen on the few samples that have a rare one."""
    masks = [mask_of(fold.train, len(X)) for fold in folds]
    solved = solvers.solve(X, Y, [params["C"] for params in grid], masks, loss="sigmoid")
    for number, params in enumerate(grid):
        solutions = [of_fold[number] for of_fold in solved]
        answers = [
            expit(X[fold.val] @ solution.coefficients.T + solution.intercept)
            for solution, fold in zip(solutions, folds, strict=True)
        ]
        yield Candidate(params, np.concatenate(answers), all(solution.converged for solution in solutions))


def _fit_labels(params: Params, X: X_, Y: Labels, _: int) -> tuple[Any, bool]:
    """Return a fitted head for each label, as scikit-learn's own."""
    ((solution,),) = solvers.solve(X, Y, [params["C"]], loss="sigmoid")
    joined = OneVsRestClassifier(LogisticRegression(C=params["C"]))
    joined.label_binarizer_ = LabelBinarizer(sparse_output=True).fit(Y.astype(np.int64))
    joined.classes_, joined.n_features_in_ = joined.label_binarizer_.classes_, X.shape[1]
    joined.estimators_ = []
    for weights, intercept in zip(solution.coefficients, solution.intercept, strict=True):
        head = LogisticRegression(C=params["C"])
        head.classes_, head.n_features_in_ = np.array([0, 1]), X.shape[1]
        head.coef_, head.intercept_, head.n_iter_ = weights[None], intercept[None], np.array([solution.iterations])
        joined.estimators_.append(head)
    return joined, solution.converged


def _sweep_number_ridge(grid: Sequence[Params], X: X_, y: Numbers, folds: Sequence[Fold], _: int) -> Iterator[Candidate]:
    alphas = [params["alpha"] for params in grid]
    solved = [solve_ridge(X, y[:, None], alphas, mask_of(fold.train, len(X))) for fold in folds]
    answers = [
        [(X[fold.val] @ coefficients.T + intercept)[:, 0] for coefficients, intercept in of_fold]
        for of_fold, fold in zip(solved, folds, strict=True)
    ]
    for number, params in enumerate(grid):
        yield Candidate(params, np.concatenate([of_fold[number] for of_fold in answers]))


def _fit_number_ridge(params: Params, X: X_, y: Numbers, _: int) -> tuple[Pipeline, bool]:
    ((coefficients, intercept),) = solve_ridge(X, y[:, None], [params["alpha"]])
    model = Ridge(alpha=params["alpha"])
    model.coef_, model.intercept_, model.n_features_in_ = coefficients[0], float(intercept[0]), X.shape[1]
    return make_pipeline(model), True


def _sweep_number_knn(grid: Sequence[Params], X: X_, y: Numbers, folds: Sequence[Fold], seed: int) -> Iterator[Candidate]:
    for params in grid:
        heads = [_fit_number_knn(params, X[fold.train], y[fold.train], seed)[0] for fold in folds]
        yield Candidate(params, np.concatenate([head.predict(X[fold.val]) for head, fold in zip(heads, folds, strict=True)]))


def _fit_number_knn(params: Params, X: X_, y: Numbers, _: int) -> tuple[Pipeline, bool]:
    neighbours = KNeighborsRegressor(min(params["k"], len(X)), weights="distance", algorithm="brute")
    return make_pipeline(Normalizer(), neighbours).fit(X, y), True


LABEL_HEADS: Mapping[str, HeadFamily] = {
    # every fourth C: scores of ranked labels change more slowly with it than accuracies do
    "logistic": HeadFamily(lambda _: list(COARSE_CS), _sweep_labels, _fit_labels),
}
NUMBER_HEADS: Mapping[str, HeadFamily] = {
    "ridge": HeadFamily(lambda _: list(ALPHAS), _sweep_number_ridge, _fit_number_ridge),
    "knn": HeadFamily(KNN.grid, _sweep_number_knn, _fit_number_knn),
}


# in the order of their cost
HEADS: Mapping[str, HeadFamily] = {
    "centroid": CENTROID,
    "ridge": RIDGE,
    "knn": KNN,
    "logistic": LOGISTIC,
    "svm": SVM,
    "selected": SELECTED,
    "lda": LDA,
    "rbf": RBF,
    "mlp": MLP,
    "boosting": BOOSTING,
}
FAMILIES: Mapping[Kind, Mapping[str, HeadFamily]] = {"label": HEADS, "labels": LABEL_HEADS, "number": NUMBER_HEADS}


@dataclass(frozen=True)
class SearchResult:
    """The parameters that did best on validation, with their answers there (n, classes) or (n,), and what is true (n, ...).

    ``unconverged`` counts the candidates, of all that were ``tried``, whose optimum was not reached: they were left out.
    ``solutions`` are the heads that gave the answers, one a fold, each fitted on that fold's train; only logistic has them.
    """

    params: Params
    val: AnyScores
    answers: Any
    y_true: NDArray[Any]
    tried: int
    unconverged: int
    solutions: tuple[Pipeline, ...] = ()
    axes: Any = None  # that the solver found for these features


def search_head(
    name: str, X: Many, y: Y_, folds: Sequence[Fold], seed: int, grid: Sequence[Params] | None = None, views: int = 1
) -> SearchResult:
    """Fit a head on every fold's train with every candidate and return the one that does best on all their val together.

    Best is the highest accuracy (mean average precision, R2), then the lowest log-loss, then the more regular one; of
    logistic heads the most regular whose log-loss is near the lowest (``linear.first_near``). A candidate whose optimum was
    not reached on some fold is left out and counted: its answers are not its parameters'.

    Args:
        name: a head that tells this kind of thing.
        X: features (n, d).
        y: classes (n,) int64, which labels there are (n, k) bool, or numbers (n,) float64.
        folds: which rows train and which choose.
        seed: of the head's own randomness.
        grid: parameters to try instead of the family's own.
        views: how many rows in succession are views of one sample: each trains, their answers are averaged.

    Raises:
        DataError: no candidate reached its optimum, or there are too few samples for this head.
        UsageError: more neighbours are asked for than there are samples.
    """
    family = FAMILIES[kind_of(y)][name]
    everything = list(grid) if grid is not None else family.grid(min(len(fold.train) for fold in folds))
    if family.by_loss:
        everything.sort(key=lambda params: params["C"])
    step = 1 if grid is not None else family.coarse
    _require_rows(name, y, folds, grid or ())
    y_true = np.concatenate([y[fold.val] for fold in folds])[::views]
    can_race = views == 1 and isinstance(X, np.ndarray)
    if can_race and family.race is not None and (raced := family.race(everything, step, X, y, folds)):
        candidate = raced.candidate
        val = evaluate(y_true, candidate.answers)
        counts = raced.tried, raced.unconverged
        return SearchResult(candidate.params, val, candidate.answers, y_true, *counts, candidate.solutions, raced.axes)
    tried = _Tried(family, everything)
    with progress(len(everything[::step]), f"choose {name}", unit="fit") as bar:

        def try_all(candidates: Sequence[Params]) -> None:
            for attempt in family.evaluate_grid(candidates, X, y, folds, seed):
                bar.update(1)
                pooled = replace(attempt, answers=over_views(attempt.answers, views))
                tried.add(pooled, evaluate(y_true, pooled.answers) if attempt.converged else None)

        try_all(everything[::step])
        if not tried.outcomes and step > 1:
            try_all([params for number, params in enumerate(everything) if number % step])
        if not tried.outcomes:
            raise _none_reached(name, tried.count)
        if step > 1 and tried.count == len(everything[::step]):
            try_all(tried.between())
    attempt, val = tried.outcomes[tried.best()]
    return SearchResult(attempt.params, val, attempt.answers, y_true, tried.count, tried.unconverged, attempt.solutions)


def ridge_shares(X: X_, y: Y_, folds: Sequence[Fold]) -> NDArray[np.float64]:
    """Return probabilities (k, classes) of ridge heads that have not seen the samples, in the order of the folds' ``val``.

    Regression on the classes' indicators, its values scaled as logits are: penalty and temperature by the log-loss over all
    folds. Features keep their own scales. On few samples this tells backbones apart, and doubts labels, better than a
    logistic head does, at a tenth of its time (benchmarks/advise.md, benchmarks/audit.md).

    Args:
        X: embeddings (n, d).
        y: classes (n,).
        folds: over some or all of the samples.
    """
    rows = np.asarray(X, np.float32) - np.mean(X, axis=0, dtype=np.float64).astype(np.float32)
    length = float(np.sqrt(np.mean(np.square(rows, dtype=np.float64).sum(axis=1))))
    rows /= np.float32(max(length, float(np.finfo(np.float32).tiny)))
    targets = np.eye(int(y.max()) + 1, dtype=np.float64)[y]
    by_fold = []
    for fold in folds:
        solutions = solve_ridge(rows, targets, _ALPHAS, mask_of(fold.train, len(y)), standardise=False)
        by_fold.append([rows[fold.val] @ weights.T + intercept for weights, intercept in solutions])
    held = y[np.concatenate([fold.val for fold in folds])]
    tried = [_softened(np.concatenate(values), held) for values in zip(*by_fold, strict=True)]
    return min(tried, key=lambda shares: log_loss(held, shares))


def _softened(values: NDArray[Any], y: Y_) -> NDArray[np.float64]:
    exponents = _SHARP * (values - values.max(axis=1, keepdims=True))
    shares = np.exp(np.maximum(exponents, -_SHARP * 4))
    shares /= shares.sum(axis=1, keepdims=True)
    temperature = best_temperature(y, shares)
    return shares if temperature is None else at_temperature(shares, temperature)


class _Tried:
    """Candidates and how they did; in ``outcomes`` those that converged, the most regular first."""

    def __init__(self, family: HeadFamily, everything: Sequence[Params]) -> None:
        self.family, self.everything = family, everything
        self.outcomes: list[tuple[Candidate, Any]] = []
        self.count = 0

    @property
    def unconverged(self) -> int:
        return self.count - len(self.outcomes)

    def add(self, candidate: Candidate, val: AnyScores | None) -> None:
        """Take a candidate with its scores, ``None`` of one that did not converge."""
        self.count += 1
        if val is None:
            return
        self.outcomes.append((candidate, val))
        self.outcomes.sort(key=lambda outcome: self.everything.index(outcome[0].params))
        # Of those that cannot be chosen any more the weights would only take memory: classes x d doubles a fold and C.
        if self.family.by_loss:
            limit = near(scores.log_loss for _, scores in self.outcomes)
            may_be_best = {place for place, (_, scores) in enumerate(self.outcomes) if scores.log_loss <= limit}
        else:
            may_be_best = {self.best()}
        for place, (other, scores) in enumerate(self.outcomes):
            if other.solutions and place not in may_be_best:
                self.outcomes[place] = replace(other, solutions=()), scores

    def best(self) -> int:
        """Return the place of the best."""
        if self.family.by_loss:
            return first_near([scores.log_loss for _, scores in self.outcomes])
        return min(range(len(self.outcomes)), key=lambda place: (self.outcomes[place][1].rank, place))

    def between(self) -> list[Params]:
        """Return what was left out between the best and its neighbours, and where the loss chooses around the lowest."""
        centres = {self.best()}
        if self.family.by_loss:  # what is near the lowest depends on how low that is
            centres.add(min(range(len(self.outcomes)), key=lambda place: self.outcomes[place][1].log_loss))
        around = [self.family.refine(self.everything, self.outcomes[place][0].params) for place in centres]
        coarse = self.everything[:: self.family.coarse]
        return [params for params in self.everything if any(params in part for part in around) and params not in coarse]


def _none_reached(name: str, count: int) -> DataError:
    return DataError(
        f"`heads` {name}: none of {count} candidates reached its optimum on every fold. Look for extreme values in the "
        "features, try stronger penalties with `grid`, or take another head."
    )


def _require_rows(name: str, y: Y_, folds: Sequence[Fold], grid: Sequence[Params]) -> None:
    least = min(len(fold.train) for fold in folds)
    if too_many := [params["k"] for params in grid if params.get("k", 0) > least]:
        raise UsageError(f"`grid` k={too_many[0]}: {least} samples train, so that there are no more neighbours than that.")
    if name == "lda" and any(len(fold.train) <= len(np.unique(y[fold.train])) for fold in folds):
        raise DataError(
            f"`heads` lda: {least} samples of {len(np.unique(y))} classes train: more samples than classes are needed."
        )


def over_views(answers: NDArray[Any], views: int) -> NDArray[Any]:
    """Average the probabilities (n * views, classes), or numbers, of a sample's views; classes alone are put to the vote."""
    if views == 1:
        return answers
    if answers.dtype.kind == "f":
        averages: NDArray[Any] = answers.reshape(-1, views, *answers.shape[1:]).mean(axis=1)
        return averages
    votes = np.stack([np.bincount(row, minlength=int(answers.max()) + 1) for row in answers.reshape(-1, views)])
    chosen: NDArray[Any] = votes.argmax(axis=1)
    return chosen


def predict_with(estimator: Any, X: Any, kind: Kind, classes: int) -> NDArray[Any]:
    """Return a head's answers: probabilities (n, classes) or classes (n,), probabilities of labels (n, k), numbers (n,)."""
    if kind == "label":
        return class_answers(estimator, X, classes)
    return np.asarray(estimator.predict_proba(X) if kind == "labels" else estimator.predict(X), dtype=np.float64)


def train(name: str, params: Params, X: Many, y: Y_, seed: int) -> Pipeline:
    """Fit a head with some parameters.

    Raises:
        DataError: its optimum was not reached: what was fitted is no head of these parameters, and nothing may use it.
    """
    return _reached(name, params, len(y), FAMILIES[kind_of(y)][name].fit(params, X, y, seed))


def refit(name: str, near: SearchResult, X: X_, y: Y_, rows: NDArray[np.int64], seed: int) -> Pipeline:
    """Fit a head with a search's parameters on some rows of its features, from where its heads are if the family can.

    Raises:
        DataError: as of ``train``.
    """
    family = FAMILIES[kind_of(y)][name]
    if family.refit is None or not near.solutions:
        return train(name, near.params, X[rows], y[rows], seed)
    return _reached(name, near.params, len(rows), family.refit(near.params, X, y, rows, near))


def _reached(name: str, params: Params, rows: int, fitted: tuple[Any, bool]) -> Pipeline:
    """Return a fitted head if its optimum was reached."""
    estimator, converged = fitted
    if not converged:
        with_ = ", ".join(f"{key}={value:g}" for key, value in params.items())
        raise DataError(
            f"`heads` {name}: the fit with {with_} on {rows} rows did not reach its optimum. Look for extreme values in "
            "the features, give a stronger penalty with `grid`, or take another head."
        )
    return estimator


@dataclass(frozen=True)
class Embeddings:
    """The rows (n * views, d) that a task's samples have, a sample's views one after the other."""

    task: Task
    X: Many
    views: int = 1

    @classmethod
    def of(cls, task: Task, views: int) -> "Embeddings":
        """Return a task's rows.

        Raises:
            DataError: its features are no embeddings.
        """
        X: Any = task.features.X
        if len(X.shape) != (2 if views == 1 else 3) or (views > 1 and X.shape[1] != views):
            raise DataError(f"heads train on embeddings (n, d), these features are {X.shape}: extract at the cut pooled.")
        if not isinstance(X, LazyRows):  # in one piece: BLAS would copy anything else in every product
            X = np.ascontiguousarray(X.reshape(-1, X.shape[-1]), dtype=np.float32)
        return cls(task, X, views)

    @property
    def y(self) -> NDArray[Any]:
        """What is to be told of each row."""
        return np.repeat(self.task.y, self.views, axis=0)

    def rows(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the rows of some samples."""
        return (samples[:, None] * self.views + np.arange(self.views)).reshape(-1)

    def search(self, name: str, split: Split, seed: int, grid: Sequence[Params] | None = None) -> SearchResult:
        """Return what ``search_head`` finds on a split's folds."""
        folds = [Fold(self.rows(fold.train), self.rows(fold.val)) for fold in split.folds]
        return search_head(name, self.X, self.y, folds, seed, grid, self.views)

    def crossed(self, name: str, folds: Sequence[Fold], seed: int, near: SearchResult, head: Pipeline) -> NDArray[Any]:
        """Return what heads with a search's parameters answer of the folds' val, trained on their train.

        ``head`` was trained on all of them: where the family can, each starts from it.

        Raises:
            DataError: the optimum was not reached on some fold, or there are too few samples for this head.
        """
        rows = [Fold(self.rows(fold.train), self.rows(fold.val)) for fold in folds]
        family = FAMILIES[self.task.kind][name]
        if family.cross is not None and self.views == 1 and isinstance(self.X, np.ndarray):
            candidate = family.cross(near.params, self.X, self.y, rows, head, near.axes)
            if not candidate.converged:  # neither from the head nor from nothing
                raise _none_reached(name, 1)
            return candidate.answers
        answers: NDArray[Any] = search_head(name, self.X, self.y, rows, seed, [near.params], self.views).answers
        return answers

    def most_regular(self, name: str, count: int) -> Params:
        """Return the parameters that are taken of so many samples where there is nothing to validate on."""
        return FAMILIES[self.task.kind][name].grid(count)[0]

    def train(
        self, name: str, params: Params, samples: NDArray[np.int64], seed: int, near: SearchResult | None = None
    ) -> Pipeline:
        """Return a head that was fitted on some samples; ``near`` as in ``refit``."""
        rows = self.rows(samples)
        if near is not None and params == near.params and isinstance(self.X, np.ndarray):
            return refit(name, near, self.X, self.y, rows, seed)
        X = self.X.only(rows) if isinstance(self.X, LazyRows) else self.X[rows]  # streamed ones are not in memory
        return train(name, params, X, self.y[rows], seed)

    def answers(self, estimator: Any, samples: NDArray[np.int64]) -> NDArray[Any]:
        """Return what a head answers of some samples, as of ``predict_with``."""
        told = predict_with(estimator, self.X[self.rows(samples)], self.task.kind, len(self.task.names))
        return over_views(told, self.views)

    def test(self, estimator: Any, split: Split) -> TestResult:
        """Return how a finished head does on the test split."""
        return evaluate_on_test(self.answers(estimator, split.test), self.task.y, split)


def fit(
    task: Task, split: Split, name: str, *, seed: int = 0, grid: Sequence[dict[str, Any]] | None = None, views: int = 1
) -> FittedHead:
    """Train one head.

    Args:
        task: embeddings X (n, d) float, of several views (n, views, d), and what is to be told.
        split: which samples train, choose and test.
        name: a head that tells this kind of thing.
        seed: of the head's own randomness.
        grid: parameters to choose from instead of the head's own.
        views: how many views there are: each trains, and answers are averaged over them.

    Raises:
        UsageError: there is no such head.
        DataError: the features are no embeddings; or no candidate, or not the final fit, reached its optimum.
    """
    require_head(name)
    embeddings = Embeddings.of(task, views)
    started = time.monotonic()
    with products_for(len(embeddings.X)):
        search = embeddings.search(name, split, seed, grid)
        estimator = embeddings.train(name, search.params, split.train_val, seed, search)
        unseen = _out_of_fold(name, (search, estimator), embeddings, split, seed)
        fitted = tested_head(name, estimator, search, embeddings, split, time.monotonic() - started)
    return replace(fitted, unseen=unseen or fitted.unseen)


def ensemble(task: Task, split: Split, fitted: Sequence[FittedHead], views: int = 1) -> FittedHead:
    """Average the probabilities of the best few heads; how many is chosen on validation.

    Raises:
        UsageError: none of the heads gives probabilities.
    """
    from sklearn.ensemble import VotingClassifier
    from sklearn.preprocessing import LabelEncoder

    started = time.monotonic()
    answered = [(head, answers) for head in fitted if (answers := head.answers) is not None and answers.ndim == 2]
    answered.sort(key=lambda pair: pair[0].val.rank)
    if not answered:
        raise UsageError(f"`heads` ensemble averages probabilities: give some of {', '.join(MEMBERS)} too.")
    y_true = np.concatenate([task.y[fold.val] for fold in split.folds])
    most = min(_MOST_MEMBERS, len(answered))
    averages = [np.mean([answers for _, answers in answered[:count]], axis=0) for count in range(1, most + 1)]
    best = min(range(most), key=lambda number: evaluate(y_true, averages[number]).rank)
    members = [head for head, _ in answered[: best + 1]]
    # fitted by hand: its own fit would train the members again
    estimator = VotingClassifier([(head.name, head.estimator) for head in members], voting="soft")
    estimator.estimators_ = [head.estimator for head in members]
    estimator.le_ = LabelEncoder().fit(task.y[split.train_val])
    estimator.classes_ = estimator.le_.classes_
    seconds = time.monotonic() - started + sum(head.seconds for head in members)
    params = {"members": [head.name for head in members]}
    search = SearchResult(params, evaluate(y_true, averages[best]), averages[best], y_true, most, 0)
    return tested_head(ENSEMBLE, estimator, search, Embeddings.of(task, views), split, seconds)


def tested_head(
    name: str, estimator: Any, search: SearchResult, embeddings: Embeddings, split: Split, seconds: float
) -> FittedHead:
    """Return a head that was refitted after its search, with its scores; the test split is read here."""
    task, answers, told = embeddings.task, search.answers, embeddings.answers(estimator, split.test)
    is_shares = task.kind == "label" and answers.ndim == 2
    temperature = best_temperature(search.y_true, answers) if is_shares else None
    left_out = f"{name}: {search.unconverged} of {search.tried} candidates did not reach their optimum and are left out"
    return FittedHead(
        name,
        dict(search.params),
        evaluate(search.y_true, answers, temperature),
        evaluate_on_test(told, task.y, split, temperature),
        seconds,
        lambda: estimator,
        lambda: answers,
        (left_out,) if search.unconverged else (),
        temperature,
        search.solutions,
        Unseen(np.concatenate([fold.val for fold in split.folds]), answers) if temperature is not None else None,
    )


def _out_of_fold(
    name: str, chosen: tuple[SearchResult, Any], embeddings: Embeddings, split: Split, seed: int
) -> Unseen | None:
    """Return out-of-fold answers of all that trains, where a drawn val split alone would say too little.

    The head that answers is refitted on train and val: heads of four fifths of both are nearer to it than one of train, and
    a threshold by five times the samples strays less. A given val split is the user's word on what is to come.
    """
    (search, estimator), task = chosen, embeddings.task
    is_given = bool(split.cross) or "val" in task.features.splits
    if is_given or len(split.val) >= SMALL or search.answers.ndim != 2 or task.kind != "label":
        return None
    folds = crossed_folds(split, task.y, task.features.sha256, seed)
    if not folds:
        return None
    try:
        answers = embeddings.crossed(name, folds, seed, search, estimator)
    except FeatcacheError:  # a fold without its optimum, or with too few samples for this head: the val split has to do
        return None
    return Unseen(np.concatenate([fold.val for fold in folds]), answers)


@dataclass(frozen=True)
class Point:
    """Test scores of one head on several draws of so many training samples: accuracies, mean average precisions or R2."""

    samples: int
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
        return as_stored(asdict(self)) | {"mean": self.mean, "std": self.std}


@dataclass(frozen=True)
class Curve:
    """Points by samples; the error falls as samples to the power of ``slope``, ``None`` where it cannot be told."""

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
    """Train on so many samples a class, drawn from train and validation; parameters by cross-validation among them.

    With one sample a class there is nothing to validate on: the most regular of the head's parameters is taken.

    Raises:
        DataError: a class has fewer samples.
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
    embeddings: Embeddings,
    split: Split,
    head: str,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    repeats: int = REPEATS,
) -> Curve:
    """Train on stratified shares of the training samples, larger ones holding the smaller; choose on all of validation."""
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
    if any(len(fold.val) for fold in split.folds):
        params = embeddings.search(head, split, seed).params
    else:
        params = embeddings.most_regular(head, len(split.train))
    estimator = embeddings.train(head, params, split.train_val if refit else split.train, seed)
    score: float = embeddings.test(estimator, split).scores.primary[0]
    return score


def _slope(points: Sequence[Point]) -> float | None:
    """Return the exponent b of error = a * samples^b, by least squares on logarithms (Hestness et al. 2017, section 3)."""
    errors = [(point.samples, 1 - point.mean) for point in points if point.mean < 1]
    if len({count for count, _ in errors}) < 2:
        return None
    counts, error = np.log(np.array(errors, dtype=np.float64)).T
    return float(np.polyfit(counts, error, 1)[0])
