"""Heads: chosen on validation, refitted, tested once; saved with their hash."""

import hashlib
import json
from pathlib import Path

import joblib
import numpy as np
import pytest
from scipy.special import softmax

from featcache import heads
from featcache.errors import DataError, UsageError
from featcache.splits import Split, make_split
from featcache.stages.fit import fit, save_bundle
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


@pytest.mark.parametrize("name", list(heads.HEADS))
@pytest.mark.parametrize("classes", [2, 4])
def test_every_head_learns(name: str, classes: int) -> None:
    """Each head beats chance by far, within its interval."""
    features = blobs(classes)

    fitted = fit(features, split_of(features), name)

    scores = fitted.tested.scores
    assert scores.accuracy > 1 / classes + 0.2
    assert scores.accuracy_ci[0] < scores.accuracy <= scores.accuracy_ci[1]


@pytest.mark.parametrize("name", list(heads.HEADS))
def test_shuffled_test_labels_change_no_choice(name: str) -> None:
    """Nothing about the test split reaches the choice of parameters."""
    features = blobs(3)
    split = split_of(features)
    y = features.y.copy()
    y[split.test] = np.random.default_rng(1).permutation(y[split.test])

    honest = heads.choose(name, features.X, features.y, split, 0)
    shuffled = heads.choose(name, features.X, y, split, 0)

    assert honest.params == shuffled.params
    assert honest.val == shuffled.val


@pytest.mark.parametrize("classes", [2, 5])
def test_linear_weights_are_the_logistic_head(classes: int) -> None:
    """One linear map and a softmax give the pipeline's probabilities."""
    features = blobs(classes)
    head, converged = heads.train("logistic", {"C": 0.1}, features.X, features.y, 0)

    weights, bias = heads.linear_weights(head, classes)

    assert converged
    expected = head.predict_proba(features.X)
    np.testing.assert_allclose(softmax(features.X @ weights.T + bias, axis=1), expected, atol=1e-5)


def test_a_class_the_head_never_saw_is_never_answered() -> None:
    """Columns stay those of the data set's classes when one of them has no training image."""
    features = blobs(3)
    seen = features.y != 1
    head, _ = heads.train("logistic", {"C": 0.1}, features.X[seen], features.y[seen], 0)

    probabilities = heads.answers(head, features.X, 3)
    weights, bias = heads.linear_weights(head, 3)

    assert probabilities.shape == (120, 3)
    assert (probabilities[:, 1] == 0).all()
    assert ((features.X @ weights.T + bias).argmax(1) != 1).all()


def test_a_constant_feature_harms_nothing() -> None:
    """A dead embedding dimension has no spread to divide by."""
    features = blobs(3)
    features.X[:, 2] = 7

    assert fit(features, split_of(features), "logistic").tested.scores.accuracy > 0.7


def test_not_converged_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimiser that stops early leaves a note."""
    features = blobs(3)
    real = heads.LogisticRegression
    monkeypatch.setattr(heads, "LogisticRegression", lambda **args: real(**(args | {"max_iter": 2})))

    notes = fit(features, split_of(features), "logistic").notes

    assert any("did not converge" in note for note in notes)


def test_bundles_carry_their_hash_and_predict_the_same(tmp_path: Path) -> None:
    """The file is joblib; the card beside it has hash, version, classes and feature key."""
    features = blobs(3)
    fitted = fit(features, split_of(features), "ridge")

    path = save_bundle(fitted, tmp_path / "head.joblib", classes=features.classes, feature_key="k")

    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert card["classes"] == ["class0", "class1", "class2"]
    assert card["feature_key"] == "k"
    np.testing.assert_array_equal(joblib.load(path).predict(features.X), fitted.estimator.predict(features.X))


def test_what_cannot_be_fitted() -> None:
    """Unknown heads and activation maps are refused."""
    features = blobs(2)
    with pytest.raises(UsageError, match="--head svm: choose from logistic"):
        fit(features, split_of(features), "svm")
    maps = Features(
        np.zeros((80, 2, 2), np.float32), features.y, features.classes, features.paths, features.splits, features.sha256
    )
    with pytest.raises(DataError, match="pooled"):
        fit(maps, split_of(features), "ridge")
