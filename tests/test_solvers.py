"""Our own solvers give scikit-learn's answers, on kind and on unkind data."""

import warnings
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from featcache.evaluation.metrics import evaluate
from featcache.evaluation.splits import Fold
from featcache.heads import solvers
from featcache.heads.linear import LOGISTIC, _Race, _Standing, first_near, race_logistic
from featcache.heads.search import HEADS, refit, search_head, train
from featcache.heads.solvers import newton, passes
from featcache.heads.solvers.passes import SideBySide
from featcache.heads.solvers.scaled import TurnedRows, solve_ridge
from featcache.store import LazyRows


def data(classes: int, count: int = 200, width: int = 12, noise: float = 1.5, seed: int = 0) -> tuple[Any, Any]:
    """Return correlated features around one centre a class (n, d), and classes (n,)."""
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    mix = rng.normal(size=(width, width)) / np.sqrt(width)
    X = (rng.normal(0, 1, (classes, width))[y] + rng.normal(0, noise, (count, width))) @ mix
    return X, y


def objective(X: Any, y: Any, C: float, coefficients: Any, intercept: Any) -> float:
    """Return C * (sum of log-losses) + |W|^2 / 2."""
    scores = X @ coefficients.T + intercept
    if scores.shape[1] == 1:
        scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
    scores = scores - scores.max(axis=1, keepdims=True)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(y)), y]
    return float(C * losses.sum() + (coefficients**2).sum() / 2)


def reference(X: Any, y: Any, C: float) -> LogisticRegression:
    """Fit scikit-learn's own, tightly."""
    return LogisticRegression(C=C, tol=1e-10, max_iter=100_000, solver="lbfgs").fit(X, y)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("C", [1e-3, 1.0, 1e3])
def test_coefficients_are_scikit_learns(classes: int, C: float) -> None:
    """At a tight tolerance the minimiser is the same."""
    X, y = data(classes)

    ((found,),) = solvers.solve(X, y, [C], standardise=False, tolerance=1e-12)

    expected = reference(X, y, C)
    assert found.converged
    np.testing.assert_allclose(found.coefficients, expected.coef_, rtol=2e-4, atol=2e-5 * np.abs(expected.coef_).max())
    np.testing.assert_allclose(found.intercept, expected.intercept_, rtol=2e-4, atol=1e-4)


def test_standardisation_is_folded_into_the_weights() -> None:
    """The result takes raw features and answers as a pipeline with a StandardScaler would."""
    X, y = data(4)
    X = X * np.logspace(-3, 3, X.shape[1]) + 5

    ((found,),) = solvers.solve(X, y, [0.1], tolerance=1e-12)

    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, tol=1e-10, max_iter=100_000)).fit(X, y)
    expected = pipeline[-1].coef_ / pipeline[0].scale_
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_every_penalty_and_fold_is_solved_as_if_alone() -> None:
    """Sharing products changes no answer: each fold's solution is that of its own rows."""
    X, y = data(3, count=300)
    folds = [np.arange(300) % 5 != number for number in range(5)]
    Cs = [10.0, 1e-4, 1e-1]

    together = solvers.solve(X, y, Cs, folds, tolerance=1e-10)

    for fold, several in zip(folds, together, strict=True):
        for C, found in zip(Cs, several, strict=True):
            ((alone,),) = solvers.solve(X[fold], y[fold], [C], tolerance=1e-10)
            assert found.C == C
            np.testing.assert_allclose(found.coefficients, alone.coefficients, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["constant", "duplicated", "huge", "tiny", "mixed scales", "separable", "one-sided", "wide", "offset"]
)
@pytest.mark.parametrize("C", [1e-2, 1e4])
def test_degenerate_data(kind: str, C: float) -> None:
    """The objective is scikit-learn's or better, on data that solvers dislike."""
    X, y = data(3, count=150, width=8)
    if kind == "constant":
        X[:, 3] = 7
    elif kind == "duplicated":
        X[:, 4] = X[:, 5]
    elif kind == "huge":
        X *= 1e6
    elif kind == "tiny":
        X *= 1e-6
    elif kind == "mixed scales":
        X *= np.logspace(-6, 6, 8)
    elif kind == "separable":
        X = X + 50 * np.eye(8)[y]
    elif kind == "one-sided":
        y = np.where(np.arange(150) < 147, 0, np.where(np.arange(150) < 148, 1, 2))
    elif kind == "wide":
        X = np.random.default_rng(0).normal(size=(150, 400))
    elif kind == "offset":
        X = X + 1e4
    scaled = StandardScaler().fit_transform(X)

    ((found,),) = solvers.solve(X, y, [C], tolerance=1e-9)

    expected = reference(scaled, y, C)
    best = objective(scaled, y, C, expected.coef_, expected.intercept_)
    assert found.objective <= best * (1 + 1e-6) + 1e-9
    spread = StandardScaler().fit(X).scale_
    reached = objective(scaled, y, C, found.coefficients * spread, found.intercept + found.coefficients @ X.mean(axis=0))
    assert reached <= best * (1 + 1e-5) + 1e-6


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.floats(-4, 4))
def test_random_problems(seed: int, classes: int, exponent: float) -> None:
    """The estimated excess bounds the real one, to within a factor, whatever the data."""
    X, y = data(classes, count=80, width=5, seed=seed)
    C = 10**exponent

    ((found,),) = solvers.solve(X, y, [C], standardise=False)

    expected = reference(X, y, C)
    best = objective(X, y, C, expected.coef_, expected.intercept_)
    assert objective(X, y, C, found.coefficients, found.intercept) <= best * (1 + 1e-4)
    assert found.objective == pytest.approx(objective(X, y, C, found.coefficients, found.intercept), rel=1e-5)


def test_rows_may_come_in_any_order() -> None:
    """Permuting rows changes nothing beyond rounding."""
    X, y = data(3)
    order = np.random.default_rng(1).permutation(len(y))

    ((one,),) = solvers.solve(X, y, [1.0], tolerance=1e-10)
    ((other,),) = solvers.solve(X[order], y[order], [1.0], tolerance=1e-10)

    np.testing.assert_allclose(one.coefficients, other.coefficients, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("classes", [2, 5])
def test_few_rows_of_many_features_converge_at_every_penalty(classes: int) -> None:
    """Classes that a plane divides: where the penalty is weak, only few rows have any curvature left."""
    rng = np.random.default_rng(0)
    y = np.arange(120) % classes
    X = np.maximum(0, rng.normal(size=(120, 600)) + rng.normal(0, 0.5, (classes, 600))[y])
    Cs = [float(C) for C in np.logspace(-6, 5, 12)]
    scaled = StandardScaler().fit_transform(X)

    (along,) = solvers.solve(X, y, Cs)
    ((cold,),) = solvers.solve(X, y, [Cs[-1]])

    assert all(one.converged for one in (*along, cold))
    assert cold.objective == pytest.approx(along[-1].objective, rel=1e-4)
    for C, found in zip(Cs, along, strict=True):
        weights = found.coefficients * StandardScaler().fit(X).scale_
        bias = found.intercept + found.coefficients @ X.mean(axis=0)
        expected = LogisticRegression(C=C, tol=1e-8, max_iter=10_000, solver="newton-cg").fit(scaled, y)
        best = objective(scaled, y, C, expected.coef_, expected.intercept_)
        assert objective(scaled, y, C, weights, bias) <= best * (1 + 1e-5)


def exactly(X: Any, y: Any, found: Any) -> float:
    """Return the objective of standardised rows in float64, no digit of a loss near 0 cancelled."""
    rows = np.asarray(X, np.float64)
    scores = rows @ found.coefficients.T + found.intercept
    scores = np.concatenate([np.zeros_like(scores), scores], axis=1) if scores.shape[1] == 1 else scores
    row, place = np.arange(len(y)), np.searchsorted(found.classes, y)
    others = scores - scores[row, place][:, None]
    others[row, place] = -np.inf
    penalty = ((found.coefficients * StandardScaler().fit(rows).scale_) ** 2).sum() / 2
    return float(found.C * np.logaddexp(0, logsumexp(others, axis=1)).sum() + penalty)


def many_classes(classes: int = 50, shots: int = 12, width: int = 640, rank: int = 40) -> tuple[Any, Any]:
    """Return few rows a class of wide, correlated, rectified features, as backbones give them."""
    rng = np.random.default_rng(0)
    y = np.arange(classes * shots) % classes
    code = rng.normal(size=(classes, rank))[y] + rng.normal(0, 0.8, (len(y), rank))
    X = code @ rng.normal(size=(rank, width)) / np.sqrt(rank) + 0.3 * rng.normal(size=(len(y), width))
    return np.maximum(0, X).astype(np.float32), y


@pytest.mark.parametrize("C", [1.0, 100.0, 1e4])
def test_many_classes_of_few_wide_rows_reach_the_optimum(C: float) -> None:
    """However weak the penalty, alone as in a sweep: within what is told, which is below 1e-4, of a long run's objective."""
    X, y = many_classes()

    ((cold,),) = solvers.solve(X, y, [C])
    ((best,),) = solvers.solve(X, y, [C], tolerance=1e-7)

    lowest = exactly(X, y, best)
    assert best.converged
    assert cold.converged
    assert lowest * (1 - 1e-9) <= exactly(X, y, cold) <= lowest / (1 - cold.excess)
    assert cold.excess <= 1e-4
    assert cold.objective == pytest.approx(exactly(X, y, cold), rel=1e-6)
    model = LogisticRegression(C=C, tol=1e-6, max_iter=3, solver="newton-cg", warm_start=True)
    scaler = StandardScaler().fit(X.astype(np.float64))
    model.classes_, model.coef_ = np.arange(50), best.coefficients * scaler.scale_
    model.intercept_ = best.intercept + best.coefficients @ scaler.mean_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(scaler.transform(X.astype(np.float64)), y)
    weights = model.coef_ / scaler.scale_
    its = replace(best, coefficients=weights, intercept=model.intercept_ - weights @ scaler.mean_)
    assert exactly(X, y, its) >= lowest * (1 - 1e-6)


@pytest.mark.parametrize("kind", ["outlier", "sparse", "heavy tails", "fifty classes", "lacking class"])
@pytest.mark.parametrize("C", [1e-2, 1.0, 1e4, 1e6])
def test_the_distance_that_is_told_is_a_bound(kind: str, C: float) -> None:
    """Directions that a descent has not met count too: rows far out, rare features, folds without one of the classes."""
    rng = np.random.default_rng(0)
    n, d, classes = 150, 9, 50 if kind == "fifty classes" else 5
    y = np.arange(n) % classes
    X = rng.normal(size=(classes, d))[y] + rng.normal(size=(n, d))
    if kind == "outlier":
        X[0] = 1e4
    elif kind == "sparse":
        X = X * (rng.random((n, d)) < 0.03)
    elif kind == "heavy tails":
        X = rng.standard_t(1.2, (n, d)) + rng.normal(size=(classes, d))[y]
    rows = (np.arange(n) % 3 != 0) & (y != 2) if kind == "lacking class" else np.ones(n, bool)
    X = X.astype(np.float32)

    ((found,),) = solvers.solve(X, y, [C], [rows])
    ((best,),) = solvers.solve(X, y, [C], [rows], tolerance=1e-11)

    X, y = X[rows], np.searchsorted(found.classes, y[rows])
    found, best = replace(found, classes=np.unique(y)), replace(best, classes=np.unique(y))
    scaler = StandardScaler().fit(X.astype(np.float64))
    other = LogisticRegression(C=C, tol=1e-12, max_iter=200, solver="newton-cholesky", warm_start=True)
    other.classes_, other.coef_ = found.classes, best.coefficients * scaler.scale_
    other.intercept_ = best.intercept + best.coefficients @ scaler.mean_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.fit(scaler.transform(X.astype(np.float64)), y)
    weights = other.coef_ / scaler.scale_
    its = replace(best, coefficients=weights, intercept=other.intercept_ - weights @ scaler.mean_)
    lowest = min(exactly(X, y, best), exactly(X, y, its))
    assert found.converged
    assert exactly(X, y, found) * (1 - found.excess) <= lowest * (1 + 1e-11)
    assert found.objective == pytest.approx(exactly(X, y, found), rel=2e-7)  # of float32 columns' standard deviations


def test_features_that_float32_cannot_factorise_still_precondition() -> None:
    """Where one row lies so far out that rounding leaves the features' moments no inverse, what is found is positive."""
    far = np.random.default_rng(0).normal(size=200)
    path = solvers._Path.__new__(solvers._Path)
    path.gram, path.double = 1e6 * (np.outer(far, far) - 1e-5 * float(far @ far) * np.eye(200)), False

    moved = path._by_factor(1e4)(far[None])

    assert np.isfinite(moved).all()
    assert float(np.vdot(moved, far)) > 0


def test_an_optimum_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no step is left, the distance that is told is still a bound, and above the goal."""
    X, y = many_classes(10, 12, 300, 20)
    monkeypatch.setattr(newton, "_MOST_STEPS", 0)
    monkeypatch.setattr(solvers, "_MAX_ITERATIONS", 2)
    monkeypatch.setattr(solvers, "_MOST_TURNS", 2)

    ((found,),) = solvers.solve(X, y, [1.0], tolerance=1e-6)
    monkeypatch.undo()
    ((best,),) = solvers.solve(X, y, [1.0], tolerance=1e-10)

    assert not found.converged
    assert found.excess > 1e-6
    assert best.converged
    assert exactly(X, y, found) * (1 - found.excess) <= exactly(X, y, best)


@pytest.mark.parametrize("loss", ["sigmoid", "squared_hinge"])
@pytest.mark.parametrize("C", [1e-2, 1.0, 1e3])
def test_outputs_by_themselves_are_proven_too(loss: Any, C: float) -> None:
    """Labels and linear SVMs: what is told bounds the distance to a run of a far tighter tolerance."""
    X, y = data(7, count=90, width=6)
    Y = y[:, None] == np.arange(7)

    ((found,),) = solvers.solve(X, Y, [C], loss=loss, standardise=False)
    ((best,),) = solvers.solve(X, Y, [C], loss=loss, standardise=False, tolerance=1e-12)

    def value(one: Any) -> float:
        margins = (X @ one.coefficients.T + one.intercept) * np.where(Y, 1, -1)
        losses = np.logaddexp(0, -margins) if loss == "sigmoid" else np.maximum(0, 1 - margins) ** 2
        return float(C * losses.sum() + (one.coefficients**2).sum() / 2)

    assert found.converged
    assert best.converged
    assert value(found) * (1 - found.excess) <= value(best) * (1 + 1e-12)
    assert found.objective == pytest.approx(value(found), rel=1e-10)


@pytest.mark.parametrize("shape", [(60, 400), (900, 20)])
def test_a_svm_is_exact_where_few_rows_are_inside_the_margin(shape: tuple[int, int]) -> None:
    """Rows that can be parted, large C, on folds: weights are the sum of the rows' own forces, the intercept has none."""
    rng = np.random.default_rng(3)
    X = rng.normal(size=shape).astype(np.float32)
    Y = (X @ rng.normal(size=(shape[1], 3)) > 0) ^ (rng.random((shape[0], 3)) < 0.02)
    folds = [np.arange(len(X)) % 2 != fold for fold in range(2)]
    by_fold = solvers.solve(X, Y, [0.1, 1e2, 1e4], folds, loss="squared_hinge", standardise=False)

    for rows, solutions in zip(folds, by_fold, strict=True):
        signs, seen = np.where(Y[rows], 1, -1), X[rows].astype(np.float64)
        for solution in solutions:
            slack = np.maximum(0, 1 - signs * (seen @ solution.coefficients.T + solution.intercept))
            value = solution.C * (slack**2).sum() + (solution.coefficients**2).sum() / 2
            gradient = solution.coefficients - 2 * solution.C * (slack * signs).T @ seen

            assert solution.converged
            assert solution.objective == pytest.approx(value, rel=1e-6)
            assert (gradient**2).sum() / 2 <= 1e-7 * value
            np.testing.assert_allclose((slack * signs).sum(axis=0), 0, atol=1e-7 * slack.sum())


def test_a_svm_with_many_rows_at_the_margin_is_proven_without_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where descents end far from the optimum, steps that are cut short would bring a row or two each inside the margin."""
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(256, 366)).astype(np.float32), rng.integers(0, 3, 256)
    monkeypatch.setattr(solvers, "_by_passes", None)
    ((found,),) = solvers.solve(X, y[:, None] == np.arange(3), [1e3], loss="squared_hinge")

    assert found.converged


@pytest.mark.parametrize("shape", [(60, 300), (30, 20)])
def test_a_svm_that_float64_cannot_factorise_is_told(shape: tuple[int, int]) -> None:
    """Features a million times as large as others, and none of them scaled."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=shape) * np.where(np.arange(shape[1]) < 2, 1e7, 1)
    ((found,),) = solvers.solve(
        X, np.arange(len(X))[:, None] % 3 == np.arange(3), [1e3], loss="squared_hinge", standardise=False
    )

    assert np.isfinite(found.coefficients).all()


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_rows_that_are_all_the_same_have_an_axis(value: float) -> None:
    """SciPy 1.11 solves for no unknowns with an error, and finds no axes of one."""
    rows = TurnedRows(np.full((30, 50), value, np.float32), np.arange(20), np.arange(20, 30), standardise=True)

    assert rows.axes.count == 1
    assert not rows.rows[:, 0].any()
    assert not rows.held[:, 0].any()
    assert not rows.back(np.ones((3, 1), np.float32)).any()


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_rows_that_are_all_the_same_teach_nothing(value: float) -> None:
    """The intercepts alone answer, with the classes' shares."""
    ((found,),) = solvers.solve(np.full((30, 50), value, np.float32), np.arange(30) % 10 // 4, [1.0])

    assert found.converged
    assert not found.coefficients.any()
    shares = np.exp(found.intercept) / np.exp(found.intercept).sum()
    np.testing.assert_allclose(shares, [0.4, 0.4, 0.2], rtol=1e-3)


def test_features_on_disk_give_the_same_answer(tmp_path: Any) -> None:
    """A memory map is read block by block, and no copy is kept."""
    X, y = data(3, count=5000, width=20)
    np.save(tmp_path / "x.npy", X.astype(np.float32))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    folds = [np.arange(5000) % 2 == 0, np.arange(5000) % 3 != 0]

    in_memory = solvers.solve(np.asarray(mapped), y, [0.1, 1.0], folds)
    streamed = solvers.solve(LazyRows(mapped.__getitem__, mapped.shape[1], np.arange(len(mapped))), y, [0.1, 1.0], folds)

    for one, other in zip(in_memory, streamed, strict=True):
        for first, second in zip(one, other, strict=True):
            assert first.objective == pytest.approx(second.objective, rel=1e-4)
            np.testing.assert_allclose(first.coefficients, second.coefficients, atol=2e-2 * np.abs(first.coefficients).max())


def random_race(seed: int) -> tuple[Any, Any, list[Fold]]:
    """Return a small problem (n, d), its classes, some of them wrong, and one to three folds."""
    rng = np.random.default_rng(seed)
    n, d, classes, count = int(rng.integers(30, 60)), int(rng.integers(3, 40)), int(rng.integers(2, 5)), seed % 3 + 1
    y = np.arange(n) % classes
    X = rng.normal(size=(classes, d))[y] * rng.uniform(0.2, 1.5) + rng.normal(size=(n, d))
    y = np.where(rng.random(n) < rng.uniform(0, 0.3), rng.permutation(y), y)
    part, rows = rng.permutation(n) % max(count, 3), np.arange(n)
    return X.astype(np.float32), y, [Fold(rows[part != number], rows[part == number]) for number in range(count)]


def chosen_of_all(grid: list[dict[str, float]], X: Any, y: Any, folds: list[Fold]) -> dict[str, float]:
    """Return what is chosen when every C is solved."""
    truth = np.concatenate([y[fold.val] for fold in folds])
    attempts = LOGISTIC.evaluate_grid(grid, X, y, folds, 0)
    return grid[first_near([evaluate(truth, attempt.answers).log_loss for attempt in attempts])]


def test_the_race_chooses_as_the_whole_search() -> None:
    """Of 200 random problems: leaving what can no longer win, and solving only the winner, changes no choice."""
    grid = [{"C": float(C)} for C in np.logspace(-3, 2, 11)]
    unlike = []
    for seed in range(200):
        X, y, folds = random_race(seed)
        raced = race_logistic(grid, 2, X, y, folds)
        best = chosen_of_all(grid, X, y, folds)
        assert raced is not None
        assert raced.candidate.converged
        if raced.candidate.params != best:
            unlike.append((seed, raced.candidate.params, best))

    assert not unlike


def test_the_most_regular_near_the_lowest_loss_is_chosen() -> None:
    """Two in a hundred of the lowest loss decide nothing, nor does what is below a thousandth of a nat."""
    assert first_near([1.5, 1.0201, 1.0199, 1.0, 1.3]) == 2
    assert first_near([0.5, 0.00099, 0.0001]) == 1
    assert first_near([0.7]) == 0


def test_the_race_and_the_sweep_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where features are streamed or have views nothing races: the same C comes of the coarse ones and those between."""
    for seed in range(8):
        X, y, folds = random_race(seed)
        raced = search_head("logistic", X, y, folds, 0)
        with monkeypatch.context() as patched:
            patched.setitem(cast("Any", HEADS), "logistic", replace(LOGISTIC, race=None))
            swept = search_head("logistic", X, y, folds, 0)
        assert raced.params == swept.params
        assert len(swept.solutions) == len(folds)


def test_a_race_holds_classes_that_a_fold_does_not_train() -> None:
    """Rows of a class that no row of a fold trains are wrong there, and cost no more than scores say."""
    X, y = data(4, count=80, width=6)
    rows = np.arange(80)
    folds = [Fold(rows[y < 3], rows[y == 3]), Fold(rows[::2], rows[1::2]), Fold(rows[y < 2], rows[y >= 2])]
    grid = [{"C": float(C)} for C in np.logspace(-4, 2, 7)]

    raced = race_logistic(grid, 1, X.astype(np.float32), y, folds)

    assert raced is not None
    assert raced.candidate.params == chosen_of_all(grid, X.astype(np.float32), y, folds)
    assert not raced.candidate.answers[:20, 3].any()


def test_a_race_in_which_all_are_in_doubt_has_a_winner() -> None:
    """Where every C may still be the lowest, they are solved to their ends, and the choice is that of the whole search."""
    X, y, folds = random_race(0)
    grid = [{"C": float(C)} for C in np.logspace(-2, 1, 4)]
    with solvers.turned_folds(X, y, [(fold.train, fold.val) for fold in folds]) as loss:
        assert loss is not None
        race = _Race(loss, y, folds, [params["C"] for params in grid], 1)
        race.along(1)
        for number in range(4):
            race.models.setdefault(number, solvers.constant_models(loss))
            race.standings[number] = _Standing(1.0, np.inf)
        raced = race.won(grid, X, y, folds)

    assert raced is not None
    assert raced.candidate.converged
    assert raced.candidate.params == chosen_of_all(grid, X, y, folds)


def test_an_end_further_than_was_doubted_is_doubted_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the others go on until it is decided again: to solve them to their ends would take the most of the search."""
    X, y, folds = random_race(2)
    grid = [{"C": float(C)} for C in np.logspace(-3, 2, 11)]
    ended: list[int] = []
    solved = _Race._solved

    def noted(self: _Race, params: Any, number: int, *rest: Any) -> Any:
        ended.append(number)
        return solved(self, params, number, *rest)

    monkeypatch.setattr(_Race, "_solved", noted)
    with solvers.turned_folds(X, y, [(fold.train, fold.val) for fold in folds]) as loss:
        assert loss is not None
        race = _Race(loss, y, folds, [params["C"] for params in grid], solvers.room_of(X))
        race.along(2)
        race.between()
        first = race.first()
        log_loss, _ = race.standings[first]
        race.standings[first] = _Standing(0.99 * log_loss, 0.002 * log_loss)
        raced = race.won(grid, X, y, folds)

    assert raced is not None
    assert raced.candidate.params == chosen_of_all(grid, X, y, folds)
    assert race.doubted > 1
    assert ended[0] == first
    assert len(ended) == len({*ended}) <= 2


def test_a_problem_that_leaves_changes_no_other() -> None:
    """Where one ends, or there is room for one at a time only, the others go on as they were."""
    X, y = data(4, count=120, width=10)
    folds = [
        (np.flatnonzero(np.arange(120) % 3 != number), np.flatnonzero(np.arange(120) % 3 == number)) for number in range(3)
    ]

    with solvers.turned_folds(X, y, folds) as loss:
        assert loss is not None
        models = solvers.constant_models(loss)
        group = SideBySide(loss, np.repeat(np.arange(3), 3), np.tile([0.1, 1.0, 10.0], 3), np.repeat(models, 3, axis=0))
        alone = SideBySide(loss, np.repeat(np.arange(3), 2), np.tile([1.0, 10.0], 3), np.repeat(models, 2, axis=0))
        for turn in range(12):
            group.step()
            alone.step()
            if turn == 4:
                group.keep(group.C > 0.5)

    np.testing.assert_allclose(group.weights, alone.weights, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(group.descents.values, alone.descents.values, rtol=1e-5)


@pytest.mark.parametrize("rows", [300, 700])
def test_a_great_cost_alone_is_solved_where_it_takes_least(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By passes only of many rows a column: of few, and many classes, these took minutes and did not arrive."""
    X, y = data(20, count=rows, width=40)
    monkeypatch.setattr(solvers, "_TURNED_ALONE", 0)
    by_passes: list[int] = []
    taken = solvers._by_passes
    monkeypatch.setattr(solvers, "_by_passes", lambda *problem: by_passes.append(len(problem[0])) or taken(*problem))

    ((found,),) = solvers.solve(X.astype(np.float32), y, [1e4])

    assert found.converged
    assert by_passes == ([rows] if rows > 12 * 40 else [])


def test_rows_in_many_parts_are_all_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the rows keep scores in a core's cache; what they add up to is the same, whoever takes which."""
    X, y = data(5, count=203, width=30)
    splits = [(np.arange(203), np.zeros(0, np.int64))]

    def descended() -> Any:
        with solvers.turned_folds(X.astype(np.float32), y, splits) as loss:
            assert loss is not None
            return solvers.descend(loss, 0.1, solvers.constant_models(loss), 1e-7).models

    whole = descended()
    for threads in (10_000_000, 0):
        monkeypatch.setattr(passes, "_SHARED", threads)
        monkeypatch.setattr(passes, "_PART", 100)
        monkeypatch.setattr(passes, "_LEAST_PART_ROWS", 16)
        np.testing.assert_allclose(descended(), whole, atol=1e-4)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_refit_starts_from_the_search_and_ends_at_the_same_optimum(classes: int) -> None:
    """Heads of parts of the rows only say where to start: the fit is the one that starts from nothing."""
    X, y = data(classes, count=300, width=30)
    X = X.astype(np.float32)
    folds = [
        Fold(np.flatnonzero(np.arange(300) % 3 != part), np.flatnonzero(np.arange(300) % 3 == part)) for part in range(3)
    ]
    rows = np.flatnonzero(np.arange(300) % 7 != 0)  # not those that the search had
    chosen = search_head("logistic", X, y, folds, 0)

    again = refit("logistic", chosen, X, y, rows, 0)

    assert chosen.solutions
    alone = train("logistic", chosen.params, X[rows], y[rows], 0)
    np.testing.assert_allclose(again[-1].coef_, alone[-1].coef_, rtol=1e-2, atol=2e-3 * np.abs(alone[-1].coef_).max())


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("width", [30, 400])
def test_folds_that_start_from_the_head_of_all_rows_end_at_their_own_optimum(classes: int, width: int) -> None:
    """What calibrates is answered as when each fold is fitted from nothing; a fold may lack a class."""
    X, y = data(classes, count=300, width=width)
    X, rows = X.astype(np.float32), np.arange(300)
    folds = [Fold(rows[rows % 3 != part], rows[rows % 3 == part]) for part in range(3)]
    if classes > 2:
        folds.append(Fold(rows[y != 1], rows[y == 1]))
    head = train("logistic", {"C": 0.03}, X, y, 0)

    candidate = LOGISTIC.cross({"C": 0.03}, X, y, folds, head, None) if LOGISTIC.cross else None

    (alone,) = LOGISTIC.evaluate_grid([{"C": 0.03}], X, y, folds, 0)
    assert candidate is not None
    assert candidate.converged
    np.testing.assert_allclose(candidate.answers, alone.answers, atol=2e-3)


def test_a_class_that_no_row_has_is_left_out() -> None:
    """The fold's own classes come back, as if the others did not exist."""
    X, y = data(4)
    rows = y != 2

    ((found,),) = solvers.solve(X, y, [1.0], [rows], tolerance=1e-10)

    ((alone,),) = solvers.solve(X[rows], np.unique(y[rows], return_inverse=True)[1], [1.0], tolerance=1e-10)
    assert found.classes.tolist() == [0, 1, 3]
    np.testing.assert_allclose(found.coefficients, alone.coefficients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("C", [0.01, 1.0, 100.0])
def test_the_squared_hinge_is_linear_svms(C: float) -> None:
    """Outputs one against the rest agree with LinearSVC's where its penalised intercept does not matter."""
    X, y = data(3)
    X = X - X.mean(axis=0)

    ((found,),) = solvers.solve(X, y[:, None] == np.arange(3), [C], loss="squared_hinge", standardise=False, tolerance=1e-10)

    expected = LinearSVC(C=C, dual=False, tol=1e-10, max_iter=100_000, intercept_scaling=1e3).fit(X, y)
    np.testing.assert_allclose(found.coefficients, expected.coef_, rtol=1e-2, atol=1e-3 * np.abs(expected.coef_).max())


def test_labels_are_solved_one_by_one() -> None:
    """Each label's weights are those of its own logistic regression; one without examples is never given."""
    X, y = data(2)
    labels = np.stack([y == 1, X[:, 0] > 0, np.zeros(len(y), bool)], axis=1)

    ((found,),) = solvers.solve(X, labels, [0.1], loss="sigmoid", standardise=False, tolerance=1e-12)

    for number in range(2):
        expected = reference(X, labels[:, number].astype(int), 0.1)
        np.testing.assert_allclose(found.coefficients[number], expected.coef_[0], rtol=1e-3, atol=1e-5)
    assert (X @ found.coefficients[2] + found.intercept[2] < -20).all()


@pytest.mark.parametrize("rows", [8, 1000])
@pytest.mark.parametrize("standardise", [False, True])
def test_ridge_is_scikit_learns(rows: int, standardise: bool) -> None:  # noqa: FBT001
    """Every penalty from one factorisation, of as many unknowns as there are features or rows, whichever are fewer."""
    X, y = data(3)
    X, y = X[:rows], y[:rows]
    targets = np.stack([y, X[:, 0] ** 2], axis=1).astype(float)

    for alpha, (coefficients, intercept) in zip(
        (1e-3, 1.0, 1e3), solve_ridge(X, targets, (1e-3, 1.0, 1e3), standardise=standardise), strict=True
    ):
        rows = StandardScaler().fit_transform(X) if standardise else X
        expected = Ridge(alpha=alpha).fit(rows, targets)
        np.testing.assert_allclose(X @ coefficients.T + intercept, expected.predict(rows), rtol=1e-6, atol=1e-8)
