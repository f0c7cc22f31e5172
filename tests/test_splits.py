"""Splits are honest: disjoint, stratified, seeded, given ones kept."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.errors import DataError
from featcache.splits import items_hash, make_split

CLASSES = ("a", "b", "c")


@given(st.lists(st.integers(3, 40), min_size=2, max_size=3), st.integers(0, 5))
@settings(max_examples=50, deadline=None)
def test_drawn_splits_are_disjoint_complete_and_stratified(counts: list[int], seed: int) -> None:
    """Every image is in one part, every class in every part, near a fifth of what is there."""
    y = np.repeat(np.arange(len(counts)), counts)

    split = make_split(y, [""] * len(y), CLASSES, seed)

    together = np.concatenate([split.train, split.val, split.test])
    assert sorted(together.tolist()) == list(range(len(y)))
    for part in (split.train, split.val, split.test):
        assert set(y[part]) == set(y)
    for label, count in enumerate(counts):
        assert abs(int((y[split.test] == label).sum()) - count / 5) <= 1


def test_given_splits_are_kept_and_val_is_drawn_from_train() -> None:
    """An official test split is used as it is."""
    y = np.tile([0, 1], 20)
    names = ["train"] * 30 + ["test"] * 10

    split = make_split(y, names, CLASSES)

    assert split.test.tolist() == list(range(30, 40))
    assert sorted(split.train_val.tolist()) == list(range(30))


def test_seeds_draw_differently_and_repeatably() -> None:
    """The same seed gives the same split, another one another."""
    y = np.tile([0, 1], 50)
    first, again, other = (make_split(y, [""] * 100, CLASSES, seed).test.tolist() for seed in (0, 0, 1))

    assert first == again != other


@pytest.mark.parametrize(
    ("y", "names", "match"),
    [
        ([0, 0, 0], ["", "", ""], "two classes"),
        ([0, 0, 0, 1], [""] * 4, "'b' has 1 image"),
        ([0, 0, 1, 1, 2], ["train"] * 4 + ["test"], "'c' is tested but"),
    ],
)
def test_impossible_splits_are_refused(y: list[int], names: list[str], match: str) -> None:
    """The error names the class."""
    with pytest.raises(DataError, match=match):
        make_split(np.array(y), names, CLASSES)


def test_items_hash_depends_on_images_and_labels() -> None:
    """Records are comparable only on the same images with the same labels."""
    y, index = np.array([0, 1]), np.array([0, 1])

    base = items_hash(["aa", "bb"], index, y)

    assert base != items_hash(["aa", "cc"], index, y)
    assert base != items_hash(["aa", "bb"], index, 1 - y)
    assert base == items_hash(["aa", "bb"], index, y.copy())


def test_groups_are_never_parted() -> None:
    """Each group is in one part, and in one side of each fold; given splits that part one are refused."""
    y = np.tile([0, 1], 100)
    groups = [str(index // 8) for index in range(200)]

    split = make_split(y, [""] * 200, ["a", "b"], groups=groups, folds=4)

    parts = [{groups[index] for index in part} for part in (split.train, split.val, split.test)]
    assert not parts[0] & parts[1]
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert len(split.folds) == 4
    for fold in split.folds:
        assert not {groups[index] for index in fold.train} & {groups[index] for index in fold.val}
    given = ["train"] * 100 + ["test"] * 100
    with pytest.raises(DataError, match="group '12' is in train and test"):
        make_split(y, given, ["a", "b"], groups=groups)


def test_small_sets_are_crossed() -> None:
    """Below a thousand images candidates are judged on five folds of train and val; a given val split is used as it is."""
    y = np.tile([0, 1], 100)

    drawn = make_split(y, [""] * 200, ["a", "b"])
    given = make_split(y, ["train"] * 100 + ["val"] * 50 + ["test"] * 50, ["a", "b"])

    assert len(drawn.folds) == 5
    assert sorted(np.concatenate([fold.val for fold in drawn.folds])) == drawn.train_val.tolist()
    assert not set(drawn.train_val) & set(drawn.test)
    assert [len(fold.val) for fold in given.folds] == [50]
    assert make_split(y, [""] * 200, ["a", "b"], folds=0).cross == ()
