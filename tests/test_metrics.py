"""Scores and intervals against published or independent values."""

import numpy as np
import pytest
from scipy.stats import binomtest

from featcache.metrics import gap, score, scores_on_test, wilson
from featcache.splits import Split


@pytest.mark.parametrize(("right", "of"), [(0, 10), (10, 10), (81, 263), (1, 2), (999, 1000)])
def test_wilson_equals_scipys(right: int, of: int) -> None:
    """The interval is Wilson's."""
    expected = binomtest(right, of).proportion_ci(0.95, "wilson")

    np.testing.assert_allclose(wilson(right, of), (expected.low, expected.high), atol=1e-9)


def test_scores_of_probabilities_and_of_labels() -> None:
    """Accuracy and F1 need labels only; log-loss and calibration need probabilities."""
    truth = np.array([0, 0, 1, 2])
    probabilities = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])

    soft, hard = score(truth, probabilities), score(truth, probabilities.argmax(1))

    assert soft.accuracy == hard.accuracy == 0.75
    assert soft.balanced_accuracy == pytest.approx((0.5 + 1 + 1) / 3)
    assert soft.log_loss == pytest.approx(-np.log([0.8, 0.2, 0.8, 0.8]).mean())
    assert hard.log_loss is None
    assert hard.ece is None


def test_calibration_error_of_a_confident_liar() -> None:
    """Always sure, right half of the time: the error is a half."""
    assert score(np.array([0, 1] * 50), np.tile([1.0, 0.0], (100, 1))).ece == pytest.approx(0.5)


def test_gap_is_paired() -> None:
    """The interval comes from the images where the two differ; p is McNemar's exact one."""
    probe = np.array([True] * 80 + [False] * 20)
    tuned = np.array([True] * 95 + [False] * 5)

    found = gap(tuned, probe)

    assert found.points == pytest.approx(15)
    assert 8 <= found.ci[0] < 15 < found.ci[1] <= 23
    assert found.p_value == pytest.approx(binomtest(15, 15).pvalue)


def test_no_gap_between_equals() -> None:
    """A model does not differ from itself."""
    same = np.array([True, False, True])

    assert gap(same, same).points == 0
    assert gap(same, same).ci == (0, 0)
    assert gap(same, same).p_value == 1


def test_only_the_test_split_is_asked_for() -> None:
    """The test scores ask the model for the test positions, once."""
    asked = []
    split = Split(np.array([0]), np.array([1]), np.array([2, 3]))

    def predict(index: np.ndarray) -> np.ndarray:
        asked.append(index.tolist())
        return np.array([1, 1])

    tested = scores_on_test(predict, np.array([9, 9, 1, 0]), split)

    assert asked == [[2, 3]]
    assert tested.right.tolist() == [True, False]
