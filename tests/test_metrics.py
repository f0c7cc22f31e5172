"""Scores and intervals against published or independent values."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, f1_score, recall_score, roc_auc_score

from featcache.errors import DataError
from featcache.evaluation import intervals
from featcache.evaluation.intervals import wilson
from featcache.evaluation.metrics import (
    NumberScores,
    at_temperature,
    best_temperature,
    cka,
    evaluate_on_test,
    label_scores,
    number_scores,
    paired_gap,
    score,
)
from featcache.evaluation.splits import Split


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


def test_recalls_and_f1_equal_scikit_learns() -> None:
    """Counted from classes, both are scikit-learn's to the last bit, with classes that no answer names or no truth has."""
    rng = np.random.default_rng(0)

    for classes in (2, 3, 17, 200):
        truth, predicted = rng.integers(0, classes, 90), rng.integers(0, classes + 2, 90)
        found, present = score(truth, predicted), np.unique(truth)

        assert found.balanced_accuracy == recall_score(truth, predicted, labels=present, average="macro", zero_division=0)
        assert found.macro_f1 == f1_score(truth, predicted, labels=present, average="macro", zero_division=0)


def test_calibration_error_of_a_confident_liar() -> None:
    """Always sure, right half of the time: the error is a half."""
    assert score(np.array([0, 1] * 50), np.tile([1.0, 0.0], (100, 1))).ece == pytest.approx(0.5)


def test_gap_is_paired() -> None:
    """The interval comes from the images where the two differ; p is McNemar's exact one."""
    probe = np.array([True] * 80 + [False] * 20)
    tuned = np.array([True] * 95 + [False] * 5)

    found = paired_gap(tuned, probe)

    assert found.points == pytest.approx(15)
    assert found.ci == pytest.approx((7.3151, 22.0967), abs=1e-4)
    assert not found.is_noise
    assert found.p_value == pytest.approx(binomtest(15, 15).pvalue)


def test_no_gap_between_equals() -> None:
    """Two models that answer alike on few images may still differ: the interval says by how much."""
    same = np.tile([True, False, True], 10)

    found = paired_gap(same, same)

    assert found.points == 0
    assert found.ci == pytest.approx((-8.6619, 8.6619), abs=1e-4)  # 1.96 sqrt(2 / 32 / 32)
    assert found.p_value == 1
    assert found.is_noise


def test_four_better_of_a_hundred_are_no_gap() -> None:
    """Bonett and Price by hand: 4 / 102 +- 1.96 sqrt((6 / 102 - (4 / 102)^2) / 102); McNemar's p is 1 / 8."""
    probe = np.arange(100) < 80

    found = paired_gap(probe | (np.arange(100) >= 96), probe)

    assert found.points == pytest.approx(4)
    assert found.ci == pytest.approx((-0.7233, 8.5664), abs=1e-4)
    assert found.p_value == pytest.approx(0.125)
    assert found.is_noise


def test_the_interval_and_p_agree_about_no_gap() -> None:
    """Of up to 30 better and worse answers each, on 60 and 1,000 images: 0 is inside where p is 0.05 or more."""
    for n in (60, 1000):
        nothing = np.zeros(n, bool)
        for better in range(31):
            for worse in range(better + 1):
                tuned, probe = nothing.copy(), nothing.copy()
                tuned[:better], probe[better : better + worse] = True, True
                found = paired_gap(tuned, probe)
                assert found.is_noise == (found.p_value >= 0.05), (n, better, worse)
                if better + worse:
                    assert found.p_value == pytest.approx(binomtest(better, better + worse).pvalue)


def test_a_gap_within_few_patients_is_no_gap() -> None:
    """All that speaks for it is one patient's images: the sign-flip test of one group says 1, of images 2^-19."""
    groups, probe = np.repeat(np.arange(10), 20), np.zeros(200, bool)

    alone, grouped = paired_gap(groups == 3, probe), paired_gap(groups == 3, probe, groups=groups)

    assert alone.p_value == pytest.approx(2.0**-19)
    assert not alone.is_noise
    assert grouped.p_value == 1
    assert grouped.is_noise
    some = paired_gap(groups < 6, probe, groups=groups)
    assert some.p_value == pytest.approx(2.0**-5)
    few = paired_gap(groups < 6, probe, groups=groups // 3)
    assert few.ci is None
    assert few.is_noise


def test_a_group_an_image_is_no_group() -> None:
    """The exact test over groups of one image is McNemar's."""
    rng = np.random.default_rng(0)
    tuned, probe = rng.random((2, 80)) < 0.7

    assert paired_gap(tuned, probe, groups=rng.permutation(80)).p_value == pytest.approx(paired_gap(tuned, probe).p_value)


def test_recalls_are_put_together() -> None:
    """By hand: Agresti and Coull's of 14 of 20 where classes are equal; above, MOVER's where one of few is uncertain.

    The latter of 100 of 100 (Wilson: 0.9630 to 1) and 5 of 10 (0.2366 to 0.7634): 0.75 + 0.2634 / 2.
    """
    truth = np.repeat([0, 1], 10)
    predicted = truth.copy()
    predicted[[0, 10, 11, 12, 13, 14]] ^= 1

    assert intervals.of_recalls(truth, predicted, np.arange(2)) == pytest.approx((0.4787, 0.8568), abs=1e-4)
    assert intervals.of_recalls(truth, predicted, np.arange(3)) is None  # a class without an image
    assert intervals.of_recalls(truth[6:], predicted[6:], np.arange(2)) is None  # a class with 4
    uneven = np.repeat([0, 1], [100, 10])
    found = intervals.of_recalls(uneven, np.repeat([0, 1, 0], [100, 5, 5]), np.arange(2))
    assert found == pytest.approx((0.5883, 0.8817), abs=1e-4)


def test_f1_is_jaccards_index() -> None:
    """By hand: both classes 9 right of 11 (Wilson: 0.5230 to 0.9486), and an error counts in both; above, 18 of 20's."""
    truth = np.repeat([0, 1], 10)
    predicted = truth.copy()
    predicted[[0, 10]] ^= 1

    found = intervals.of_f1s(truth, predicted, np.arange(2))
    assert found == pytest.approx((min(2 * 0.52302 / 1.52302, 0.68676), 0.98434), abs=1e-4)


def _patients(sizes: Sequence[int], mean: float, draws: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield right answers and groups of patients whose skill varies (a Beta distribution, intraclass correlation 0.2)."""
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(len(sizes)), sizes)
    for _ in range(draws):
        yield rng.random(len(groups)) < rng.beta(4 * mean, 4 * (1 - mean), len(sizes))[groups], groups


@pytest.mark.parametrize("sizes", [[20] * 30, [50] * 10, [5] * 100, [3, 5, 8, 10, 12, 15, 20, 30, 40, 50, 60]])
def test_accuracy_of_patients_is_covered(sizes: list[int]) -> None:
    """Of 400 draws at least 92 % of the intervals hold the truth: of independent images' as few as 45 % do."""
    held = [intervals.of_accuracy(right, groups) for right, groups in _patients(sizes, 0.8, 400)]

    assert np.mean([ci is not None and ci[0] <= 0.8 <= ci[1] for ci in held]) >= 0.92


def test_few_patients_have_no_interval() -> None:
    """Five groups, or one that holds nearly all images, tell too little."""
    right = np.arange(100) % 3 > 0

    assert intervals.of_accuracy(right, np.arange(100) // 20) is None
    assert intervals.of_accuracy(right, np.maximum(np.arange(100) - 80, 0)) is None
    assert intervals.of_accuracy(right, np.arange(100) // 5) is not None


@pytest.mark.parametrize("ties", [False, True])
def test_average_precision_is_scikit_learns(ties: bool) -> None:  # noqa: FBT001
    """One threshold for each distinct probability, whatever the order of the images."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        truth = rng.random(40) < 0.3
        truth[0] = True
        probabilities = rng.integers(0, 5, 40) / 4 if ties else rng.random(40)
        found = label_scores(truth[:, None], probabilities[:, None]).mean_average_precision
        assert found == pytest.approx(average_precision_score(truth, probabilities))


@pytest.mark.parametrize("digits", [1, 3, 17])
def test_the_area_under_the_curve_is_scikit_learns(digits: int) -> None:
    """Of two classes, scores that are equal across them among others, the area is ``roc_auc_score``'s."""
    rng = np.random.default_rng(digits)
    truth = rng.integers(0, 2, 101)
    of_second = np.round(rng.random(101) * 0.7 + truth * 0.3, digits)

    scores = score(truth, np.stack([1 - of_second, of_second], axis=1))

    assert scores.auroc == pytest.approx(roc_auc_score(truth, of_second), abs=1e-12)


@pytest.mark.parametrize("truth", [[1, 1, 0, 0], [0, 0, 1, 1]])
def test_constant_answers_have_the_prevalence_as_precision(truth: list[int]) -> None:
    """Sorted by class or not."""
    assert label_scores(np.array(truth, bool)[:, None], np.full((4, 1), 0.2)).mean_average_precision == 0.5


def test_top_five_depends_on_no_class_number() -> None:
    """Constant answers over ten classes hold the true one in half of the cases, whichever it is."""
    for number in (0, 4, 9):
        assert score(np.full(3, number), np.full((3, 10), 0.1)).top5 == 0.5
    partly = np.array([[0.3, 0.2, 0.2, 0.1, 0.1, 0.1, 0.0]])
    assert [score(np.array([number]), partly).top5 for number in range(7)] == pytest.approx(
        [1, 1, 1, 2 / 3, 2 / 3, 2 / 3, 0]
    )


def test_a_bin_holds_its_upper_end() -> None:
    """A confidence of 0.4 is the sixth of fifteen bins' end and stands with 0.35 below it, not with 0.45."""
    confident = np.array([0.4, 0.35, 0.45])

    found = score(np.array([0, 1, 0]), np.stack([confident, *[(1 - confident) / 3] * 3], axis=1)).ece

    assert found == pytest.approx((abs(1 - 0.75) + abs(1 - 0.45)) / 3)


def test_a_head_without_probabilities_wins_no_tie() -> None:
    """Where accuracies are the same the lower log-loss is better, and any is better than none."""
    truth, soft = np.array([0, 1, 1]), np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])

    assert score(truth, soft).rank < score(truth, soft.argmax(axis=1)).rank


def test_no_numbers_are_refused() -> None:
    """Probabilities of NaN are no answer, whatever class they would be counted as."""
    with pytest.raises(DataError, match="for 1 of 2 samples are NaN"):
        score(np.array([0, 1]), np.array([[0.5, 0.5], [np.nan, np.nan]]))
    with pytest.raises(DataError, match="for 2 of 3 samples are NaN"):
        number_scores(np.arange(3.0), np.array([np.nan, 1, np.inf]))
    with pytest.raises(DataError, match="for 1 of 1 samples are NaN"):
        label_scores(np.array([[True, False]]), np.array([[0.5, np.nan]]))


def test_no_probability_at_all_does_not_decide_the_temperature() -> None:
    """One miss with a probability of 0 among answers that are sound: the temperature is that of the others."""
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.3] * 3, 2000)
    truth = np.array([rng.choice(3, p=row) for row in probabilities])
    missed = np.append(probabilities, [[1.0, 0.0, 0.0]], axis=0)

    found = best_temperature(np.append(truth, 1), missed)

    assert found == best_temperature(truth, probabilities)
    assert 0.9 < (found or 0) < 1.1
    assert (at_temperature(missed, 20.0)[-1] == [1, 0, 0]).all()
    assert score(np.array([1]), missed[-1:]).log_loss == pytest.approx(-np.log(np.finfo(np.float64).eps))


@pytest.mark.parametrize("n", [20, 500])
def test_answers_that_are_all_right_do_not_become_certain(n: int) -> None:
    """At the temperature found a probability stays about as far from one as n right answers prove: 1 of n."""
    truth = np.arange(n) % 3
    probabilities = np.where(np.eye(3, dtype=bool)[truth], 0.8, 0.1)

    temperature = best_temperature(truth, probabilities)

    assert temperature is not None
    assert 1 / (3 * n) < 1 - at_temperature(probabilities, temperature).max() < 3 / n


def test_validation_has_no_intervals() -> None:
    """They are the test split's: what is chosen on has been looked at many times."""
    truth = np.arange(60) % 3
    assert score(truth, truth).accuracy_ci is None
    assert label_scores(np.eye(3, dtype=bool)[truth], np.eye(3)[truth]).mean_average_precision_ci is None
    assert number_scores(truth + 0.0, truth + 0.5).r2_ci is None


def test_a_constant_truth_has_no_r2() -> None:
    """As in scikit-learn: 1 if all is right, else 0; and no interval."""
    split = Split(np.array([0]), np.array([1]), np.arange(2, 50))

    wrong = evaluate_on_test(split.test * 0.1, np.full(50, 7.0), split).scores

    assert isinstance(wrong, NumberScores)
    assert (wrong.r2, wrong.r2_ci) == (0, None)
    assert number_scores(np.full(3, 7.0), np.full(3, 7.0)).r2 == 1
    assert number_scores(np.array([0.1]), np.array([0.3])).r2 == 0


def test_errors_of_few_images_are_covered() -> None:
    """R2 and the mean error of 30 images: of 500 draws at least 93 % of the intervals hold the truth."""
    rng, held = np.random.default_rng(0), []
    for _ in range(500):
        truth, wrong = rng.normal(size=30), 0.7 * rng.normal(size=30)
        r2, mae = intervals.of_errors(truth, wrong) or pytest.fail("no interval")
        held.append((r2[0] <= 0.51 <= r2[1], mae[0] <= 0.7 * np.sqrt(2 / np.pi) <= mae[1]))

    assert np.mean(held, axis=0) == pytest.approx((1, 1), abs=0.07)


def test_test_scores_respect_groups() -> None:
    """The same answers have wider intervals once images are said to belong together."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(40), 10)
    y = patients % 2
    answers = np.where((rng.random(40) < 0.8)[patients], y, 1 - y)
    alone = Split(np.array([], np.int64), np.array([], np.int64), np.arange(400))

    one, other = (
        evaluate_on_test(answers[split.test], y, split).scores for split in (alone, replace(alone, groups=patients))
    )

    for name in ("accuracy_ci", "balanced_accuracy_ci", "macro_f1_ci"):
        narrow, wide = getattr(one, name), getattr(other, name)
        assert wide[1] - wide[0] > 2.5 * (narrow[1] - narrow[0])


def test_answers_are_held_against_the_test_split_alone() -> None:
    """What is true of other samples decides nothing: only the test positions are looked up."""
    split = Split(np.array([0]), np.array([1]), np.array([2, 3]))

    tested = evaluate_on_test(np.array([1, 1]), np.array([9, 9, 1, 0]), split)

    assert tested.right.tolist() == [True, False]


def test_similarity_of_embeddings() -> None:
    """CKA is 1 for rotated and scaled embeddings, small for unrelated ones."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))

    assert cka(X, 3 * X @ rotation) == pytest.approx(1)
    assert cka(X, rng.normal(size=(200, 8))) < 0.2
