"""What a family of heads is, and what all of them share."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import Pipeline

from featcache.heads.solvers.scaled import libraries, products_on
from featcache.resources import cores
from featcache.store import LazyRows

if TYPE_CHECKING:
    from featcache.evaluation.splits import Fold

Params = dict[str, Any]
X_ = NDArray[Any]
Many = X_ | LazyRows
Y_ = NDArray[np.int64]
Task = TypeVar("Task")
Result = TypeVar("Result")


def side_by_side(act: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
    """Call a function with each of some tasks, on as many threads as there are cores; one alone has all cores."""
    # One BLAS thread each: on matrices of a fold's size several wait for one another longer than they compute.
    with products_on(cores() if len(tasks) == 1 else 1), ThreadPoolExecutor(cores()) as workers:
        return list(workers.map(act, tasks))


def products_for(rows: int) -> AbstractContextManager[Any]:
    """Let matrix products of heads on so many rows use all cores, or one where rows are few."""
    # Threads wait for one another at a factorisation's small steps: beside another process ten times as long as it takes.
    return products_on(cores() if rows >= _MANY_ROWS else 1)


def mask_of(rows: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Return which of so many rows are among some (k,)."""
    mask = np.zeros(count, dtype=bool)
    mask[rows] = True
    return mask


@dataclass(frozen=True)
class Candidate:
    """A candidate on the validation rows of all folds, one fold after the other: answers as of ``answers``.

    ``converged``: each fold's fit is at its stated distance from the optimum. Else the answers are nobody's.
    ``solutions`` are the heads that gave them, one a fold, where the family has them as such.
    """

    params: Params
    answers: NDArray[Any]
    converged: bool = True
    solutions: tuple[Pipeline, ...] = ()


@dataclass(frozen=True)
class Raced:
    """The candidate that won, and of how many; how many were left out since their optimum was not reached.

    ``axes`` are those that rows were turned to, where they serve other rows of these features too.
    """

    candidate: Candidate
    tried: int
    unconverged: int
    axes: Any = None


_MANY_ROWS = 5000  # of fewer, threads wait for one another longer than a factorisation takes
# The same of trees. Beside another process, threads that meet at each of a tree's nodes took fifty times as long as one on
# 8,000 rows; alone, two took two thirds of it.
_MANY_TREE_ROWS = 20_000
Sweep = Callable[[Sequence[Params], Any, Any, "Sequence[Fold]", int], Iterator[Candidate]]
Fit = Callable[[Params, Any, Any, int], tuple[Any, bool]]
Race = Callable[[Sequence[Params], int, Any, Any, "Sequence[Fold]"], Raced | None]


@dataclass(frozen=True)
class HeadFamily:
    """A kind of head.

    Attributes:
        grid: the parameters that are tried for n training rows, the most regular first.
        sweep: tries parameters on folds, given features (n, d), classes (n,) and a seed.
        fit: trains one, given features, classes and a seed; returns it with whether its optimiser converged.
        refine: which parameters of the grid are tried beside the best of those tried first.
        coarse: every how many of the grid's parameters are tried first.
        streams: sweep and fit take ``LazyRows`` features too.
        race: finds the best without ending each candidate, given the grid, every how many come first, features in memory of
            one view, classes and folds; ``None`` where it cannot tell.
        refit: trains one from heads with its parameters, near to it, given features in memory, classes, the positions of the
            rows that train it, and the ``SearchResult`` with those heads.
        cross: tries parameters on folds as ``evaluate_grid`` does, from a head with them that was trained on all rows of
            these, given features in memory, classes, folds, the head and ``Raced.axes``.
        by_loss: the log-loss chooses, not the accuracy; parameters are C.
    """

    grid: Callable[[int], list[Params]]
    evaluate_grid: Sweep
    fit: Fit
    coarse: int = 1
    streams: bool = False
    race: Race | None = None
    refit: Callable[[Params, Any, Any, NDArray[np.int64], Any], tuple[Any, bool]] | None = None
    cross: Callable[[Params, Any, Any, "Sequence[Fold]", Pipeline, Any], Candidate] | None = None
    by_loss: bool = False

    def refine(self, grid: Sequence[Params], best: Params) -> list[Params]:
        """Return the grid's parameters between the best of the coarse ones and its neighbours."""
        at = grid.index(best)
        near = grid[max(0, at - self.coarse + 1) : at + self.coarse]
        return [params for params in near if params != best]


def answers(head: Any, X: X_, classes: int) -> NDArray[Any]:
    """Return probabilities (n, classes) of a head, or its predicted classes (n,) where it knows no probabilities."""
    if not hasattr(head, "predict_proba"):
        return np.asarray(head.predict(X), dtype=np.int64)
    probabilities = np.zeros((len(X), classes))
    probabilities[:, head.classes_] = head.predict_proba(X)
    return probabilities


def by_estimator(build: Callable[[Params, int, X_, Y_], Pipeline]) -> tuple[Sweep, Fit]:
    """Return how scikit-learn's own estimators are tried and trained: side by side, one BLAS thread each.

    Faster on these shapes than one after the other with all threads.
    """

    def fit(params: Params, X: X_, y: Y_, seed: int) -> tuple[Pipeline, bool]:
        with _limited(len(y)), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told by the second value
            head = build(params, seed, X, y).fit(X, y)
        return head, _converged(head)

    def evaluate_grid(grid: Sequence[Params], X: X_, y: Y_, folds: "Sequence[Fold]", seed: int) -> Iterator[Candidate]:
        classes, alone = int(y.max()) + 1, len(grid) * len(folds) == 1
        share = partial(_limited, len(y) if alone else 0)

        def attempt(params: Params, fold: "Fold") -> tuple[X_, bool]:
            rows, y_true = X[fold.train], y[fold.train]
            with share():  # here again: OpenMP counts threads for each thread that asks
                head = build(params, seed, rows, y_true).fit(rows, y_true)
                return answers(head, X[fold.val], classes), _converged(head)

        with share(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            # Threads, not processes: scikit-learn's fits release the interpreter, and features are not copied.
            jobs = [delayed(attempt)(params, fold) for params in grid for fold in folds]
            attempts = Parallel(n_jobs=min(len(jobs), cores()), prefer="threads", return_as="generator")(jobs)
            for params in grid:
                of_folds = list(islice(attempts, len(folds)))
                yield Candidate(params, np.concatenate([told for told, _ in of_folds]), all(ended for _, ended in of_folds))

    return evaluate_grid, fit


def _limited(rows: int) -> AbstractContextManager[Any]:
    """Let matrix products use one core, and trees all of them where so many rows make it worth their while.

    Side by side, threads of threads fight for the cores. A network that is trained alone has one too: its search had one,
    and sums in another order would train another network.
    """
    limits = {"blas": 1, "openmp": cores() if rows >= _MANY_TREE_ROWS else 1}
    return libraries().limit(limits=limits)  # type: ignore[no-any-return]


def _converged(head: Pipeline) -> bool:
    """Tell whether a network's optimiser ended by itself; other models here do not iterate towards an optimum."""
    model = head[-1]
    # A network that has used up its epochs was still on its way.
    return not isinstance(model, MLPClassifier) or model.n_iter_ < model.max_iter
