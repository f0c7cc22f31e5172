"""Heads: chosen on validation, refitted, tested once; saved with their hash."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.dummy import DummyClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize
from support import TINY, Outcome, draw_folder, draw_image

from featcache.datasets import open_dataset
from featcache.errors import DataError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import at_temperature, best_temperature
from featcache.evaluation.splits import Fold, Split, make_split
from featcache.experiments import fit as jobs
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.heads import base, in_order, members_of, nonlinear, search, solvers
from featcache.heads import linear as linear_heads
from featcache.heads.baselines import baselines
from featcache.heads.search import Embeddings, ensemble, fit, learning_curve, shot_curve
from featcache.heads.solvers.scaled import solve_ridge
from featcache.specs import BackboneSpec
from featcache.store import Features


def blobs(classes: int, count: int = 40, width: int = 6, spread: float = 1.5, seed: int = 0) -> Features:
    """Return embeddings around one centre a class."""
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(classes), count)
    X = (rng.normal(0, 2, (classes, width))[y] + rng.normal(0, spread, (len(y), width))).astype(np.float32)
    names = tuple(f"class{index}" for index in range(classes))
    return Features(X, y, names, tuple(map(str, range(len(y)))), ("",) * len(y), ("",) * len(y))


def split_of(features: Features) -> Split:
    """Return the drawn split of some features."""
    return make_split(features.y, features.splits, features.classes)


@pytest.mark.parametrize("name", list(search.HEADS))
@pytest.mark.parametrize("classes", [2, 4])
def test_every_head_learns(name: str, classes: int) -> None:
    """Each head beats chance by far, within its interval."""
    features = blobs(classes)

    fitted = fit(Task(features), split_of(features), name)

    scores = fitted.tested.scores
    assert scores.accuracy > 1 / classes + 0.2
    assert scores.accuracy_ci[0] < scores.accuracy <= scores.accuracy_ci[1]


@pytest.mark.parametrize("name", list(search.HEADS))
def test_shuffled_test_labels_change_no_choice(name: str) -> None:
    """Nothing about the test split reaches the choice of parameters."""
    features = blobs(3)
    split = split_of(features)
    y = features.y.copy()
    y[split.test] = np.random.default_rng(1).permutation(y[split.test])

    honest = search.search_head(name, features.X, features.y, split.folds, 0)
    shuffled = search.search_head(name, features.X, y, split.folds, 0)

    assert honest.params == shuffled.params
    assert honest.val == shuffled.val


@pytest.mark.parametrize(("rows", "width", "classes"), [(60, 200, 4), (300, 50, 5), (80, 100, 2), (400, 30, 2)])
def test_discriminants_are_those_of_scikit_learn(rows: int, width: int, classes: int) -> None:
    """Every shrinkage gives the probabilities of scikit-learn's least squares, with fewer rows than features or more."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    X = rng.normal(size=(classes, width))[y] + rng.normal(size=(rows, width)) * rng.uniform(0.1, 3, width) + 5
    X[:, 3] = 7
    others = rng.normal(size=(50, width)) * 2 + 5
    shrinkages = (0.9, 0.5, 0.1, 0.01, 1.0)

    heads = nonlinear.discriminants(X.astype(np.float32), y, shrinkages)

    for shrinkage, head in zip(shrinkages, heads, strict=True):
        theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(X.astype(np.float32).astype(float), y)
        np.testing.assert_allclose(head.predict_proba(others), theirs.predict_proba(others), atol=1e-6)
        np.testing.assert_allclose(head.coef_, theirs.coef_, atol=1e-8 * np.abs(theirs.coef_).max())


@pytest.mark.parametrize("rows", [120, 900])
@pytest.mark.parametrize("width", [0.1, 1.0])
def test_the_kernels_map_is_that_of_scikit_learn(rows: int, width: float) -> None:
    """Landmarks and coordinates are Nystroem's own, from distances that all widths share."""
    X = np.random.default_rng(0).normal(size=(rows, 40))
    theirs = Nystroem(gamma=width / 40, n_components=min(768, rows), random_state=3).fit(X)

    index = nonlinear.draw_landmarks(X, 3)
    distances = euclidean_distances(X, X[index], squared=True)
    head = nonlinear.nystroem(width, 3, X[index], index, distances[index])

    np.testing.assert_array_equal(index, theirs.component_indices_)
    np.testing.assert_allclose(head.transform(X), theirs.transform(X), atol=1e-6)


def test_a_search_by_the_kernel_is_that_of_its_heads() -> None:
    """What a fold's shared distances answer on validation is what a head answers that was fitted on its train alone."""
    features = blobs(3)
    fold = split_of(features).folds[0]
    grid = [{"width": width, "C": C} for width in (0.1, 1.0) for C in (1e-2, 1.0)]

    candidates = list(nonlinear.RBF.evaluate_grid(grid, features.X, features.y, [fold], 0))

    for params, candidate in zip(grid, candidates, strict=True):
        head = search.train("rbf", params, features.X[fold.train], features.y[fold.train], 0)
        assert candidate.params == params
        np.testing.assert_allclose(candidate.answers, base.answers(head, features.X[fold.val], 3), atol=2e-3)


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_weights_are_the_logistic_head(classes: int) -> None:
    """One linear map and a softmax give the pipeline's probabilities."""
    features = blobs(classes)
    head = search.train("logistic", {"C": 0.1}, features.X, features.y, 0)

    weights, bias = linear_heads.linear_weights(head, classes)

    expected = head.predict_proba(features.X)
    np.testing.assert_allclose(softmax(features.X @ weights.T + bias, axis=1), expected, atol=1e-5)


def test_a_class_the_head_never_saw_is_never_answered() -> None:
    """Columns stay those of the data set's classes when one of them has no training image."""
    features = blobs(3)
    seen = features.y != 1
    head = search.train("logistic", {"C": 0.1}, features.X[seen], features.y[seen], 0)

    probabilities = base.answers(head, features.X, 3)
    weights, bias = linear_heads.linear_weights(head, 3)

    assert probabilities.shape == (120, 3)
    assert (probabilities[:, 1] == 0).all()
    assert ((features.X @ weights.T + bias).argmax(1) != 1).all()


def test_a_constant_feature_harms_nothing() -> None:
    """A dead embedding dimension has no spread to divide by."""
    features = blobs(3)
    features.X[:, 2] = 7

    assert fit(Task(features), split_of(features), "logistic").tested.scores.accuracy > 0.7


def test_a_search_in_which_nothing_ends_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks that use up their epochs are candidates of nothing; the error names the head and what to do."""
    features = blobs(3)
    monkeypatch.setattr(nonlinear, "_MOST_EPOCHS", 2)

    with pytest.raises(DataError, match=r"`heads` mlp: none of 2 candidates reached its optimum.*`grid`"):
        fit(Task(features), split_of(features), "mlp")
    with pytest.raises(DataError, match=r"`heads` mlp: the fit with alpha=1 on 120 rows did not reach its optimum"):
        search.train("mlp", {"alpha": 1.0}, features.X, features.y, 0)


def _never_beyond(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the solver's answers for a C above a limit be far from their optimum, right on validation, and say so."""
    solve, finish = solvers.solve, solvers.finish

    def told(one: Any) -> Any:
        return one if limit >= one.C else replace(one, converged=False)

    monkeypatch.setattr(solvers, "solve", lambda *args, **kwargs: [list(map(told, each)) for each in solve(*args, **kwargs)])
    monkeypatch.setattr(solvers, "finish", lambda *args: list(map(told, finish(*args))))


@pytest.mark.parametrize("name", ["logistic", "svm", "selected", "rbf"])
def test_a_candidate_short_of_its_optimum_is_left_out_and_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen has converged, whatever the others answer; a note says how many were left out; none is an error."""
    features = blobs(3)
    split = split_of(features)
    limit = sorted({params["C"] for params in search.HEADS[name].grid(90)})[2]
    _never_beyond(limit, monkeypatch)

    fitted = fit(Task(features), split, name)
    near = search.search_head(name, features.X, features.y, split.folds, 0)

    assert fitted.params["C"] <= limit
    assert any("did not reach their optimum and are left out" in note for note in fitted.notes)
    _never_beyond(-1, monkeypatch)
    with pytest.raises(DataError, match=f"`heads` {name}: none of"):
        search.search_head(name, features.X, features.y, split.folds, 0)
    with pytest.raises(DataError, match=f"`heads` {name}: the fit with .*C=.* did not reach its optimum"):
        search.train(name, search.HEADS[name].grid(90)[0], features.X, features.y, 0)
    if name == "logistic":
        with pytest.raises(DataError, match="logistic"):
            learning_curve(Embeddings.of(Task(features), 1), split, name, [1.0])
        with pytest.raises(DataError, match="logistic: none of 1 candidates"):
            Embeddings.of(Task(features), 1).crossed(name, split.folds, 0, near, near.solutions[0])


@pytest.mark.parametrize("shape", [(60, 8), (12, 40)])
def test_ridge_with_a_penalty_or_two_needs_no_eigenvectors(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a factorisation each, a tenth of the time, they are what many penalties at once come to."""
    rng = np.random.default_rng(0)
    X, targets = rng.normal(size=shape).astype(np.float32), rng.normal(size=(shape[0], 2))
    alphas = [1e-3, 1.0, 1e3]

    by_eigenvectors = solve_ridge(X, targets, [*alphas, 2.0, 3.0])[:3]
    module = import_module("featcache.heads.solvers.scaled")  # its package has a function of this name
    monkeypatch.setattr(module, "eigh", lambda *_, **__: pytest.fail("eigenvectors for so few penalties"))
    for count in (1, 3):
        for told, other in zip(solve_ridge(X, targets, alphas[:count]), by_eigenvectors, strict=False):
            np.testing.assert_allclose(told[0], other[0], rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(told[1], other[1], rtol=1e-7, atol=1e-9)


def test_trees_on_thousands_of_rows_use_one_core() -> None:
    """Threads that meet at every node of a tree take many times as long as one wherever another process computes."""
    threads: list[int] = []

    def build(*_: Any) -> Any:
        threads.extend(each["num_threads"] for each in base.libraries().info() if each["user_api"] == "openmp")
        return make_pipeline(DummyClassifier())

    rows = np.arange(8000)
    evaluate_grid, train = base.by_estimator(build)
    X, y = np.zeros((len(rows), 1), np.float32), rows % 2
    list(evaluate_grid([{}], X, y, [Fold(rows[:6000], rows[6000:])], 0))
    train({}, X, y, 0)

    assert threads
    assert {*threads} == {1}


def test_trees_tell_many_classes_apart() -> None:
    """Of few rows a class the leaves' values stay in bounds: without their penalty a quarter of these would be right."""
    rng, y = np.random.default_rng(0), np.arange(1800) % 60
    X = (2 * rng.normal(size=(60, 16))[y] + rng.normal(size=(1800, 16))).astype(np.float32)

    head = search.train("boosting", {}, X[:1200], y[:1200], 0)

    assert (head.predict(X[1200:]) == y[1200:]).mean() > 0.9


def _noisy(seed: int) -> tuple[Any, Any, list[Fold]]:
    """Return a random problem (n, d), its classes, some of them wrong, and one to three folds."""
    rng = np.random.default_rng(seed)
    n, d, classes, count = int(rng.integers(60, 400)), int(rng.integers(5, 120)), int(rng.integers(2, 9)), seed % 3 + 1
    y = np.arange(n) % classes
    X = rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[y] * rng.uniform(0.1, 0.8)
    y = np.where(rng.random(n) < rng.uniform(0, 0.3), rng.permutation(y), y)
    part, rows = rng.permutation(n) % max(count, 4), np.arange(n)
    return X.astype(np.float32), y, [Fold(rows[part != number], rows[part == number]) for number in range(count)]


def test_costs_of_a_svm_are_chosen_as_when_all_are_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of random problems the race chooses what all costs at their end choose, but for a row that either may have right."""
    monkeypatch.setattr(linear_heads, "_LEAST_RACED", 0)
    unlike = []
    for seed in range(30):
        X, y, folds = _noisy(seed)
        y_true = np.concatenate([y[fold.val] for fold in folds])
        grid = linear_heads.SVM.grid(len(y))
        scores = {
            each.params["C"]: np.sum(each.answers == y_true) for each in linear_heads.SVM.evaluate_grid(grid, X, y, folds, 0)
        }
        raced = linear_heads.race_svm(grid, 1, X, y, folds)
        assert raced is not None
        assert raced.candidate.converged
        best, cost = max(scores, key=lambda each: (scores[each], -each)), raced.candidate.params["C"]
        assert scores[cost] >= scores[best] - 1, (seed, cost, scores)
        if cost != best:
            unlike.append((seed, cost, scores))

    assert len(unlike) <= 2, unlike


@pytest.mark.parametrize("least", [0, np.inf])
def test_of_equal_costs_the_first_that_is_given_wins(least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all costs have as many rows right, the order of the grid decides, raced or not."""
    monkeypatch.setattr(linear_heads, "_LEAST_RACED", least)
    features = blobs(2, spread=0.1)
    folds = split_of(features).folds

    for costs in ([50.0, 1.0, 1000.0], [1.0, 50.0, 1000.0]):
        grid = [{"C": cost} for cost in costs]
        assert search.search_head("svm", features.X, features.y, folds, 0, grid).params == grid[0]


def test_costs_of_a_svm_that_have_lost_are_not_solved_to_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of classes that overlap the least costs win: the greatest, which would take most of the time, are not looked at."""
    rng = np.random.default_rng(0)
    y = np.arange(1200) % 2
    X = (rng.normal(size=(1200, 200)) + 0.07 * (2 * y[:, None] - 1)).astype(np.float32)
    solved: list[float] = []
    finish = solvers.finish
    monkeypatch.setattr(linear_heads, "_LEAST_RACED", 0)
    monkeypatch.setattr(solvers, "finish", lambda loss, C, *args: solved.append(C) or finish(loss, C, *args))

    chosen = search.search_head("svm", X, y, [Fold(np.arange(800), np.arange(800, 1200))], 0)

    assert chosen.params["C"] in solved
    assert max(solved) < 50.0
    assert chosen.tried == len(linear_heads.SVM.grid(800))


def test_labels_short_of_their_optimum_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C of several labels is chosen among those whose optimum was reached; a fit that was not is an error."""
    features = blobs(3)
    Y = np.equal(features.y[:, None], np.arange(3))
    rows = np.arange(len(Y))
    _never_beyond(1e-3, monkeypatch)

    family, folds = search.FAMILIES["labels"]["logistic"], [Fold(rows[::2], rows[1::2])]
    tried = [each for each in family.evaluate_grid(family.grid(90), features.X, Y, folds, 0) if each.converged]

    assert 0 < len(tried) < len(family.grid(90))
    assert max(each.params["C"] for each in tried) <= 1e-3
    assert search.search_head("logistic", features.X, Y, folds, 0).unconverged == len(family.grid(90)) - len(tried)
    with pytest.raises(DataError, match="C=1 on 120 rows did not reach its optimum"):
        search.train("logistic", {"C": 1.0}, features.X, Y, 0)
    _never_beyond(-1, monkeypatch)
    with pytest.raises(DataError, match="none of"):
        search.search_head("logistic", features.X, Y, folds, 0)


def test_trees_do_not_converge_and_nothing_is_said() -> None:
    """They are as many as asked: nothing stopped early."""
    features = blobs(3)

    assert not fit(Task(features), split_of(features), "boosting").notes


@pytest.mark.parametrize("name", list(search.HEADS))
@pytest.mark.parametrize("classes", [2, 4])
def test_the_likeliest_class_is_the_answer(name: str, classes: int) -> None:
    """What is scored is what the estimator predicts, of classes that scatter differently and are not equally many too."""
    features = blobs(classes, spread=4)
    features.X[features.y == 0] *= np.linspace(0.2, 3, 6, dtype=np.float32)
    some = np.arange(10, len(features.y))

    estimator = search.train(name, search.HEADS[name].grid(90)[0], features.X[some], features.y[some], 0)

    answers = base.answers(estimator, features.X, classes)
    expected = estimator.predict(features.X)
    np.testing.assert_array_equal(answers.argmax(axis=1) if answers.ndim == 2 else answers, expected)


@pytest.mark.parametrize("classes", [2, 4])
def test_the_nearest_mean_answers(classes: int) -> None:
    """As scikit-learn's own rule, on the unit sphere; one image a class is enough."""
    features = blobs(classes, spread=4)
    for some in (slice(None), slice(None, None, 40)):
        estimator = search.train("centroid", {}, features.X[some], features.y[some], 0)
        unit = normalize(features.X)
        means = np.stack([unit[some][features.y[some] == one].mean(axis=0) for one in range(classes)])
        np.testing.assert_array_equal(estimator.predict(features.X), cdist(unit, means).argmin(axis=1))
        assert np.isfinite(estimator.predict_proba(features.X)).all()


@pytest.mark.parametrize("name", ["centroid", "logistic", "ridge", "svm", "selected", "knn", "rbf"])
@pytest.mark.parametrize("classes", [2, 4])
def test_what_is_swept_together_is_what_is_trained_alone(name: str, classes: int) -> None:
    """Validation answers of a sweep are those of the estimator that the same parameters give, trained on the same rows."""
    features = blobs(classes, count=60)
    fold = split_of(features).folds[0]
    grid = search.HEADS[name].grid(len(fold.train))[::4]

    for attempt in search.HEADS[name].evaluate_grid(grid, features.X, features.y, [fold], 0):
        estimator = search.train(name, attempt.params, features.X[fold.train], features.y[fold.train], 0)
        answers = base.answers(estimator, features.X[fold.val], classes)
        np.testing.assert_allclose(attempt.answers, answers, atol=2e-2)


@pytest.mark.parametrize("k", [1, 5, 1000])
def test_neighbours_hold_no_class_impossible(k: int) -> None:
    """One vote more is shared by the classes that train; search, estimator and both formats of answers agree.

    One neighbour of a class gives it 1/2 and a share of the other half; a class without training images gets nothing.
    """
    features = blobs(4, count=60, spread=4)
    fold = split_of(features).folds[0]
    fold = replace(fold, train=fold.train[features.y[fold.train] != 2])
    count = min(k, len(fold.train))

    (attempt,) = search.HEADS["knn"].evaluate_grid([{"k": k}], features.X, features.y, [fold], 0)
    estimator = search.train("knn", {"k": k}, features.X[fold.train], features.y[fold.train], 0)

    np.testing.assert_allclose(attempt.answers, base.answers(estimator, features.X[fold.val], 4), atol=1e-4)
    np.testing.assert_allclose(attempt.answers.sum(axis=1), 1)
    assert (attempt.answers[:, 2] == 0).all()
    assert attempt.answers[:, [0, 1, 3]].min() >= 1 / (count + 1) / 3 - 1e-12
    np.testing.assert_array_equal(estimator.predict(features.X[fold.val]), attempt.answers.argmax(axis=1))
    if k == 1:
        assert attempt.answers.max() == pytest.approx(1 / 2 + 1 / 6)


def test_one_miss_does_not_make_neighbours_doubt_everything() -> None:
    """A nearest neighbour that is right but once keeps its answers: the temperature stays off its bound of 20."""
    features = blobs(3, count=500, spread=0.5)
    features.y[::25] = (features.y[::25] + 1) % 3

    fitted = fit(Task(features), split_of(features), "knn", grid=[{"k": 5}])

    scores = fitted.tested.scores
    assert fitted.temperature is not None
    assert fitted.temperature < 3
    assert scores.log_loss is not None
    assert scores.log_loss < 1
    assert scores.ece_scaled is not None
    assert scores.ece is not None
    assert scores.ece_scaled < scores.ece


def test_an_ensemble_averages_its_members() -> None:
    """Its probabilities are the mean of those of the heads that it names, and it is a plain scikit-learn estimator."""
    features = blobs(3)
    split = split_of(features)
    members = [fit(Task(features), split, name) for name in ("knn", "logistic", "lda")]

    joined = ensemble(Task(features), split, members)

    named = [member for member in members if member.name in joined.params["members"]]
    expected = np.mean([member.estimator.predict_proba(features.X) for member in named], axis=0)
    np.testing.assert_allclose(joined.estimator.predict_proba(features.X), expected, atol=1e-6)
    assert joined.tested.scores.accuracy > 0.7
    with pytest.raises(UsageError, match="ensemble"):
        ensemble(Task(features), split, [fit(Task(features), split, "ridge")])


def test_heads_run_the_cheapest_first() -> None:
    """``all`` stands for every head; an ensemble that is alone brings members."""
    assert in_order(["mlp", "ridge"]) == ["ridge", "mlp"]
    assert in_order(["all"]) == [*search.HEADS, "ensemble"]
    assert members_of(["ensemble"]) == ["knn", "logistic", "lda", "rbf", "ensemble"]


def test_calibration_is_judged_after_scaling_too() -> None:
    """The temperature comes from validation and leaves the answers' order alone."""
    features = blobs(3, spread=3)

    scores = fit(Task(features), split_of(features), "logistic").tested.scores

    assert scores.temperature is not None
    assert scores.ece_scaled is not None
    probabilities = np.random.default_rng(0).dirichlet([1, 1, 1], 50)
    scaled = at_temperature(probabilities, 2.5)
    np.testing.assert_array_equal(scaled.argmax(1), probabilities.argmax(1))
    np.testing.assert_allclose(at_temperature(probabilities, 1.0), probabilities)
    sharp = at_temperature(probabilities, 0.25)
    drawn = np.array([np.random.default_rng(index).choice(3, p=row) for index, row in enumerate(probabilities)])
    assert best_temperature(drawn, sharp) > 2


def test_controls_see_what_needs_no_backbone() -> None:
    """Classes that differ in colour alone are told apart by the controls; the majority class is what it is."""
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [60, 40])
    thumbnails = np.clip(rng.normal(60 + 120 * y[:, None, None, None], 30, (100, 32, 32, 3)), 0, 255).astype(np.uint8)
    split = make_split(y, [""] * 100, ["dark", "light"])

    majority, colours, pixels = baselines(thumbnails, y, split)

    assert majority.tested.scores.accuracy == pytest.approx((y[split.test] == 0).mean())
    assert colours.tested.scores.accuracy == 1
    assert pixels.tested.scores.accuracy == 1


def test_more_images_help() -> None:
    """Both curves rise, the error falls by a power, and draws are repeated."""
    features = blobs(3, count=100, width=20, spread=3)
    split = split_of(features)

    shots = shot_curve(Embeddings.of(Task(features), 1), split, "logistic", [1, 4, 16], repeats=3)
    shares = learning_curve(Embeddings.of(Task(features), 1), split, "logistic", [0.05, 0.3, 1.0], repeats=3)

    for curve in (shots, shares):
        assert curve.points[-1].mean > curve.points[0].mean
        assert curve.slope is not None
        assert curve.slope < 0
    assert [point.samples for point in shots.points] == [3, 12, 48]
    assert [len(point.accuracies) for point in shares.points] == [3, 3, 1]


def test_what_cannot_be_fitted() -> None:
    """Unknown heads and activation maps are refused."""
    features = blobs(2)
    with pytest.raises(UsageError, match="`heads` forest: choose from centroid"):
        fit(Task(features), split_of(features), "forest")
    maps = Features(
        np.zeros((80, 2, 2), np.float32), features.y, features.classes, features.paths, features.splits, features.sha256
    )
    with pytest.raises(DataError, match="pooled"):
        fit(Task(maps), split_of(features), "ridge")


def test_views_train_and_are_averaged() -> None:
    """Rows of all views train; an image's answer is the mean over its views, of classes alone the vote."""
    features = blobs(3, count=60, width=20, spread=4)
    rng = np.random.default_rng(5)
    several = features.X[:, None] + rng.normal(0, 2, (len(features.y), 4, 20)).astype(np.float32)
    split = split_of(features)

    for name in ("logistic", "ridge"):
        fitted = fit(Task(replace(features, X=several)), split, name, views=4)
        answers = [base.answers(fitted.estimator, several[split.test, view], 3) for view in range(4)]
        pooled = search.over_views(np.stack(answers, axis=1).reshape(-1, *answers[0].shape[1:]), 4)
        np.testing.assert_array_equal(pooled.argmax(1) if pooled.ndim == 2 else pooled, fitted.tested.predicted)
    np.testing.assert_allclose(search.over_views(np.eye(3)[[0, 0, 1, 2]], 2), [[1, 0, 0], [0, 0.5, 0.5]])
    votes = search.over_views(np.array([0, 1, 1, 2, 2, 0]), 3)
    assert votes.tolist() == [1, 2]


def test_features_that_do_not_matter_are_left_out() -> None:
    """Of many columns of noise the selecting head keeps few, and the few that carry the classes."""
    features = blobs(3, count=60, width=6)
    noise = np.random.default_rng(0).normal(0, 1, (len(features.y), 94)).astype(np.float32)

    fitted = fit(Task(replace(features, X=np.concatenate([features.X, noise], axis=1))), split_of(features), "selected")

    used = np.flatnonzero(np.abs(fitted.estimator[-1].coef_).sum(axis=0))
    assert len(used) == round(fitted.params["share"] * 100)
    assert {0, 1, 2, 3, 4, 5} & set(used.tolist())
    assert fitted.tested.scores.accuracy > 0.8


def test_features_too_large_for_memory_are_read_from_disk(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The heads that can give the same answers; of ``all`` the others are left out, asked for by name they are refused."""
    bench = FeatureCache(open_dataset(folder), tiny, settings)
    here = run_fit(bench, FitPlan(("ridge", "logistic"), baselines=False)).heads
    monkeypatch.setattr(jobs, "free_memory", lambda: 1000.0)

    there = run_fit(bench, FitPlan(("all",)))

    assert [job.fitted.name for job in there.heads] == ["ridge", "logistic"]
    assert there.baselines == []
    assert "without centroid, knn" in caplog.text
    for one, other in zip(here, there.heads, strict=True):
        assert one.record.params == other.record.params
        assert one.record.test["accuracy"] == other.record.test["accuracy"]
        assert one.record.val["accuracy"] == other.record.val["accuracy"]
        first, second = (job.fitted.estimator[-1].coef_ for job in (one, other))
        np.testing.assert_allclose(first, second, atol=2e-2 * np.abs(first).max())
    with pytest.raises(UsageError, match="only `heads` ridge and logistic"):
        run_fit(bench, FitPlan(("knn",)))


def test_a_head_that_cannot_be_trained_costs_no_other(run: Callable[..., Outcome], tmp_path: Path) -> None:
    """Of all heads, the one that needs more images is left out and said; asked for by name it is an error."""
    folder = draw_folder(tmp_path / "few", per_class=4)

    every = run("fit", folder, *TINY, "--head", "all", "--no-baselines", "--folds", "0")
    alone = run("fit", folder, *TINY, "--head", "lda", "--folds", "0")

    assert every.code == 0
    assert ("lda is left out" in every.err) == (alone.code == 3)
    assert "knn" in every.out


def test_more_neighbours_than_images_are_refused(run: Callable[..., Outcome], folder: Path) -> None:
    """A number of neighbours that nothing has is not reported as chosen."""
    outcome = run("fit", folder, *TINY, "--head", "knn", "--grid", "k=9999")

    assert outcome.code == 2
    assert "k=9999" in outcome.err


def test_shots_that_cannot_be_drawn_are_said_before_anything_is_trained(run: Callable[..., Outcome], folder: Path) -> None:
    """No head is fitted, and no result lost, where a class has fewer images than are to be drawn of it."""
    outcome = run("fit", folder, *TINY, "--shots", "1,500")

    assert outcome.code == 3
    assert "--shots 500" in outcome.err
    assert not list((tmp := folder.parent / "cache").rglob("*.joblib")), tmp


def test_mistakes_are_the_most_confident_wrong_answers(tmp_path: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Each is a test image with another class than its own, the most confident first, where a head gives probabilities."""
    for number in range(40):  # two classes of the same grey: whatever is learned of them is wrong
        draw_image(tmp_path / "grey" / "ab"[number % 2] / f"{number}.png", (110, 110, 110), number)
    heads = run_fit(
        FeatureCache(open_dataset(tmp_path / "grey"), tiny, settings), FitPlan(("ridge", "knn"), baselines=False)
    ).heads
    ridge, knn = (next(head for head in heads if head.record.method == name) for name in ("ridge", "knn"))

    several = knn.mistakes(1000)

    assert len(several) == knn.record.right.count("0") > 0
    assert all(mistake.path.startswith(f"{mistake.label}/") and mistake.label != mistake.predicted for mistake in several)
    confidences = [mistake.confidence for mistake in several]
    assert confidences == sorted(confidences, reverse=True)
    assert knn.mistakes(1) == several[:1]
    assert {mistake.confidence for mistake in ridge.mistakes(5)} == {None}


def test_the_best_head_is_chosen_on_validation(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """However the others do on the test split."""
    result = run_fit(FeatureCache(open_dataset(folder), tiny, settings), FitPlan(("knn", "ridge"), baselines=False))
    worse, better = result.heads
    lucky = replace(worse.fitted, val=replace(better.fitted.val, accuracy=-1.0))

    assert replace(result, heads=[replace(worse, fitted=lucky), better]).best == replace(result, heads=[better]).best
