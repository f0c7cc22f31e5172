"""Train a head on cached features: choose on validation, refit on train and validation, test once; and learning curves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import progress
from featcache.errors import FeatcacheError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import AnyScores, TestResult, best_temperature, evaluate
from featcache.evaluation.splits import SMALL, Split, crossed_folds, few_shot, part_of
from featcache.fingerprint import as_stored
from featcache.heads import ENSEMBLE, MEMBERS, require_head
from featcache.resources import libraries_load

if TYPE_CHECKING:
    from featcache.heads.search import Embeddings, SearchResult


_MOST_MEMBERS = 3


@dataclass(frozen=True)
class Unseen:
    """What heads answered (k, classes) of samples that they were not trained on, at these positions (k,)."""

    samples: NDArray[np.int64]
    answers: NDArray[Any]


@dataclass(frozen=True)
class FittedHead:
    """A head, what was chosen for it, its validation scores before the refit and its test scores after.

    ``temperature`` scales its logits best on validation. The estimator, and its answers there, (n, classes) or (n,), are
    asked for with functions: of a head that lies in a file already they are read when they are needed. ``unseen`` is what
    says when the head should not answer, of one that was fitted just now.
    """

    name: str
    params: dict[str, Any]
    val: AnyScores
    tested: TestResult
    seconds: float
    load_estimator: Callable[[], Any] = field(repr=False)
    load_answers: Callable[[], NDArray[Any] | None] = field(repr=False)
    notes: tuple[str, ...] = ()
    temperature: float | None = None
    solutions: tuple[Any, ...] = field(default=(), repr=False)
    unseen: "Unseen | None" = field(default=None, repr=False)

    @property
    def estimator(self) -> Any:
        """The fitted head, as scikit-learn's."""
        return self.load_estimator()

    @property
    def answers(self) -> NDArray[Any] | None:
        """What was answered on validation, ``None`` where a file does not hold that."""
        return self.load_answers()


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
    with libraries_load():
        from featcache.heads.search import Embeddings

    require_head(name)
    embeddings = Embeddings.of(task, views)
    started = time.monotonic()
    search, estimator = embeddings.fit(name, split, seed, grid)
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

    from featcache.heads.search import Embeddings, SearchResult

    started = time.monotonic()
    answered = [(head, answers) for head in fitted if (answers := head.answers) is not None and answers.ndim == 2]
    answered.sort(key=lambda pair: pair[0].val.rank)
    if not answered:
        raise UsageError(f"`heads` ensemble averages probabilities: give some of {', '.join(MEMBERS)} too.")
    y_true = _val_truth(task, split)
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
    search = SearchResult(params, evaluate(y_true, averages[best]), averages[best], most, 0)
    return tested_head(ENSEMBLE, estimator, search, Embeddings.of(task, views), split, seconds)


def tested_head(
    name: str, estimator: Any, search: "SearchResult", embeddings: "Embeddings", split: Split, seconds: float
) -> FittedHead:
    """Return a head that was refitted after its search, with its scores; the test split is read here."""
    task, answers = embeddings.task, search.answers
    y_true, temperature = _val_truth(task, split), None
    if task.kind == "label" and answers.ndim == 2:
        temperature = best_temperature(y_true, answers)
    left_out = f"{name}: {search.unconverged} of {search.tried} candidates did not reach their optimum and are left out"
    return FittedHead(
        name,
        dict(search.params),
        evaluate(y_true, answers, temperature),
        embeddings.test(estimator, split, temperature),
        seconds,
        lambda: estimator,
        lambda: answers,
        (left_out,) if search.unconverged else (),
        temperature,
        search.solutions,
        Unseen(np.concatenate([fold.val for fold in split.folds]), answers) if temperature is not None else None,
    )


def _out_of_fold(
    name: str, chosen: "tuple[SearchResult, Any]", embeddings: "Embeddings", split: Split, seed: int
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


def _val_truth(task: Task, split: Split) -> NDArray[Any]:
    return np.concatenate([task.y[fold.val] for fold in split.folds])


SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REPEATS = 5


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
    embeddings: "Embeddings", split: Split, head: str, shots: Sequence[int], seed: int = 0, repeats: int = REPEATS
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
    embeddings: "Embeddings",
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


def _score(embeddings: "Embeddings", split: Split, head: str, seed: int, *, refit: bool = True) -> float:
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
