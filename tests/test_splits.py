"""Splits are honest: disjoint, stratified, seeded, given ones kept."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from featcache.errors import DataError, UsageError
from featcache.evaluation import Identity, Task
from featcache.evaluation.splits import copies, few_shot, make_free_split, make_split, part_of, remarks, restricted
from featcache.store import Features

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
        ([0, 0, 0, 1], [""] * 4, "'b' has 1 sample: at least 3 are needed to draw train and val and test"),
        ([0, 0, 0, 1, 1], [""] * 5, "'b' has 2 samples: at least 3"),
        ([0, 0, 0, 1, 1], ["train"] * 4 + ["test"], "'b' has 1 sample: at least 2 are needed to draw train and val from"),
        ([0, 0, 1, 1], ["test"] * 4, "no sample is left to train on"),
        ([0, 0, 1, 1, 2], ["train"] * 4 + ["test"], "'c' is tested but"),
    ],
)
def test_impossible_splits_are_refused(y: list[int], names: list[str], match: str) -> None:
    """The error names the class."""
    with pytest.raises(DataError, match=match):
        make_split(np.array(y), names, CLASSES)


def test_items_hash_depends_on_images_and_labels() -> None:
    """Records are comparable only on the same images with the same labels."""
    y = np.array([0, 1])

    def identity(contents: list[str], y: NDArray[np.int64]) -> Identity:
        return Task(Features(np.empty((2, 0)), y, ("a", "b"), ["1.png", "2.png"], ["", ""], contents)).identity

    base = identity(["aa", "bb"], y)

    assert base != identity(["aa", "cc"], y)
    assert base != identity(["aa", "bb"], 1 - y)
    assert base == identity(["aa", "bb"], y.copy())
    assert base.items == Task(Features(np.empty((2, 0)), y, ("a", "b"), ["x", "y"], ["", ""], ["aa", "bb"])).items(y)


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


@st.composite
def kindred(draw: st.DrawFn) -> tuple[np.ndarray, list[str], list[str] | None]:
    """Draw classes, contents with copies among them, and perhaps groups."""
    classes = draw(st.integers(2, 3))
    y = np.repeat(np.arange(classes), draw(st.lists(st.integers(8, 40), min_size=classes, max_size=classes)))
    count, rng = len(y), np.random.default_rng(draw(st.integers(0, 1000)))
    contents = [f"{place:03d}" for place in range(count)]
    for place in rng.choice(count, draw(st.integers(0, count // 3)), replace=False):
        others = np.flatnonzero(y == y[place]) if rng.random() < 0.9 else np.arange(count)
        contents[place] = contents[rng.choice(others)]
    grouped = draw(st.booleans())
    return y, contents, [f"g{rng.integers(12)}" for _ in range(count)] if grouped else None


def parted(numbers: list[str], one: np.ndarray, other: np.ndarray) -> set[str]:
    """Return what is on both sides."""
    return {numbers[place] for place in one} & {numbers[place] for place in other}


@given(kindred(), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_copies_and_groups_stay_on_one_side(data: tuple, seed: int) -> None:
    """Of parts, folds, few-shot draws; each image is in one part, and what is drawn has each class that can be drawn."""
    y, contents, groups = data
    try:
        split = make_split(y, [""] * len(y), CLASSES, seed, groups=groups, contents=contents)
    except DataError:  # too few units: said in words
        return
    drawn = [split]
    if min(np.bincount(y[split.train_val])) >= 4:
        drawn.append(few_shot(split, y, 4, seed, contents))
        assert np.bincount(y[drawn[1].train]).tolist() == [4] * len(set(y))

    assert sorted(np.concatenate([split.train_val, split.test]).tolist()) == list(range(len(y)))
    assert set(y[split.train]) == set(y)
    for kind in (contents, groups) if groups else (contents,):
        assert not parted(kind, split.train, split.test)
        assert not parted(kind, split.train, split.val)
        assert not parted(kind, split.val, split.test)
        for fold in (fold for some in drawn for fold in some.cross):
            assert not parted(kind, fold.train, fold.val)
    for some in drawn:
        if some.cross:
            judged = sorted(np.concatenate([fold.val for fold in some.cross]).tolist())
            # of groups, a fold that would train on one class alone is left out
            assert set(judged) <= set(some.train_val.tolist()) if groups else judged == some.train_val.tolist()
    if groups is None:
        assert set(y[split.test]) == set(y[split.val]) == set(y)


@given(kindred(), st.integers(0, 1000), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_the_order_of_images_draws_nothing_else(data: tuple, shuffle: int, seed: int) -> None:
    """Parts, folds, few-shot draws and shares hold the same contents and labels, however images are listed."""
    y, contents, groups = data
    order = np.random.default_rng(shuffle).permutation(len(y))

    def drawn(order: np.ndarray) -> list[list[tuple[str, int]]]:
        marks, labels = [contents[place] for place in order], y[order]
        same = [groups[place] for place in order] if groups else None
        split = make_split(labels, [""] * len(y), CLASSES, seed, groups=same, contents=marks)
        few, part = few_shot(split, labels, 2, seed, marks), part_of(split, labels, 0.3, seed, marks)
        several = [split.train, split.val, split.test, few.train, part.train]
        several += [fold.val for some in (split, few) for fold in some.cross]
        return [sorted((marks[place], int(labels[place])) for place in index) for index in several]

    try:
        expected = drawn(np.arange(len(y)))
    except DataError as error:
        with pytest.raises(DataError, match=str(error)[:20]):
            drawn(order)
        return
    assert drawn(order) == expected


@pytest.mark.parametrize("grouped", [False, True])
def test_one_image_more_moves_few_others(*, grouped: bool) -> None:
    """Of 200 images at most two change their part, and of folds those at the ends of a class's blocks alone."""
    rng = np.random.default_rng(0)
    contents = [f"{value:06d}" for value in rng.permutation(201)]
    y = np.arange(201) % 3
    groups = [str(place // 3) for place in range(201)]

    def placed(count: int) -> dict[str, tuple[str, int]]:
        split = make_split(
            y[:count], [""] * count, CLASSES, groups=groups[:count] if grouped else None, contents=contents[:count]
        )
        part = {place: name for name in ("train", "val", "test") for place in getattr(split, name).tolist()}
        fold = {place: number for number, some in enumerate(split.cross) for place in some.val.tolist()}
        return {contents[place]: (part[place], fold.get(place, -1)) for place in range(count)}

    before, after = placed(200), placed(201)

    moved = [name for name, (part, _) in before.items() if after[name][0] != part]
    assert len(moved) <= (6 if grouped else 2)
    if not grouped:
        assert sum(after[name] != where for name, where in before.items()) <= 12


def test_fifths_are_near_a_fifth_with_copies_and_groups() -> None:
    """Whole units come near the stratified fifth: within one unit of each class's."""
    y = np.repeat([0, 1, 2], [120, 80, 40])
    four = [str(place // 4) for place in range(240)]

    for split in (
        make_split(y, [""] * 240, CLASSES, contents=four),
        make_split(y, [""] * 240, CLASSES, groups=four),
    ):
        assert np.abs(np.bincount(y[split.test]) - [24, 16, 8]).max() <= 2
        assert [len(fold.val) for fold in split.cross] == pytest.approx([192 / 5] * 5, abs=6)


def test_shares_are_nested_and_copies_come_together() -> None:
    """A larger share holds the smaller; of four copies all or none; the whole share is all of train."""
    y = np.repeat([0, 1], 100)
    contents = [str(place // 4) for place in range(200)]
    split = make_split(y, [""] * 200, CLASSES, contents=contents)

    parts = [set(part_of(split, y, share, 1, contents).train.tolist()) for share in (0.01, 0.1, 0.3, 0.7, 1.0)]

    assert all(one <= other for one, other in pairwise(parts))
    assert parts[-1] == set(split.train.tolist())
    assert all(len({contents[place] for place in part}) * 4 == len(part) for part in parts)
    assert len(parts[2]) == pytest.approx(0.3 * len(split.train), abs=4)


def test_shots_are_different_images_while_there_are_some() -> None:
    """Eight images a class, each four times: up to eight shots are eight contents; folds part no copies."""
    y = np.repeat([0, 1], 40)
    contents = [f"{label} {place % 10}" for place, label in enumerate(y.tolist())]
    split = make_split(y, [""] * 80, CLASSES, contents=contents)

    few = few_shot(split, y, 8, 0, contents)

    assert len({contents[place] for place in few.train}) == 16
    assert len(few.cross) == 5
    with pytest.raises(DataError, match="`shots` 40: a class has only 32 samples"):
        few_shot(split, y, 40, 0, contents)


def test_a_class_of_copies_cannot_be_split() -> None:
    """What the user has is counted: images, and how many of them differ."""
    with pytest.raises(DataError, match="'b' has 4 samples, 1 of different content: at least 3 are needed"):
        make_split(np.repeat([0, 1], 4), [""] * 8, CLASSES, contents=[*"abcd", *"eeee"])
    with pytest.raises(DataError, match="there are 2 samples: at least 3"):
        make_free_split(2, ["", ""])


def test_copies_in_given_splits_are_counted() -> None:
    """Test images that train or val hold, val images that train holds, repeated test images, contradicting labels."""
    contents = [*"abcd", *"aef", *"abgge"]
    names = ["train"] * 4 + ["val"] * 3 + ["test"] * 5
    y = np.array([0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 0, 0])
    split = make_split(y, names, CLASSES)
    parts = {"train": split.train, "val": split.val, "test": split.test}

    counted = copies(parts, y, contents)

    assert counted == {"copies": 5, "test_seen": 3, "val_seen": 1, "test_repeated": 1, "labels_differ": 2}
    assert remarks(counted, split.sizes())[0].startswith("3 of 5 test samples are byte for byte")
    assert len(remarks(counted, split.sizes())) == 4
    assert copies(parts, y, [""] * 12) == {}
    assert copies(parts, y, list("abcdefghijkl")) == {}


def test_what_is_drawn_beside_given_parts_is_no_copy_of_them() -> None:
    """A val split that is given holds copies of training images: those are not drawn as test while others are there."""
    y = np.tile([0, 1], 50)
    contents = [str(place) for place in range(90)] + [str(place) for place in range(10)]

    split = make_split(y, ["train"] * 90 + ["val"] * 10, CLASSES, contents=contents)

    assert not parted(contents, split.test, split.val)
    assert not parted(contents, split.test, split.train)
    assert len(split.test) == 18


def test_groups_keep_the_default_folds() -> None:
    """Five below a thousand images, none where val is given or folds are 0; intervals get the groups of test images."""
    y, groups = np.tile([0, 1], 100), [str(index // 8) for index in range(200)]

    split = make_split(y, [""] * 200, CLASSES, groups=groups)

    assert len(split.cross) == 5
    assert split.test_groups is not None
    assert len(set(split.test_groups.tolist())) == len({groups[place] for place in split.test})
    assert make_split(y, [""] * 200, CLASSES, groups=groups, folds=0).cross == ()
    given = ["train"] * 120 + ["val"] * 40 + ["test"] * 40
    assert make_split(y, given, CLASSES, groups=groups).cross == ()


@pytest.mark.parametrize(
    ("folds", "groups", "match"),
    [
        (500, None, "`folds` 500: class 'b' has 24 different samples"),
        (25, None, "class 'b' has 24"),
        (1, None, "`folds` 1: at least 2"),
        (-3, None, "`folds` -3: at least 2"),
        (12, 10, "`folds` 12: there are 8 groups to train"),
        (30, 40, "class 'b' has"),
    ],
)
def test_folds_that_cannot_be(folds: int, groups: int | None, match: str) -> None:
    """More than the smallest class or the groups allow is refused in words, before anything is fitted."""
    y = np.repeat([0, 1], [70, 30])
    of = None if groups is None else [str(place % groups) for place in range(100)]

    with pytest.raises(UsageError, match=match):
        make_split(y, [""] * 100, CLASSES, groups=of, folds=folds)


def test_a_class_of_one_group_trains() -> None:
    """What cannot be on both sides is not tested instead of not trained."""
    y = np.repeat([0, 1, 2], [30, 30, 6])
    groups = [*(str(place % 6) for place in range(60)), *["rare"] * 6]

    split = make_split(y, [""] * 66, CLASSES, groups=groups)

    assert 2 in y[split.train]
    assert set(y[split.test]) == {0, 1}


def test_a_restricted_split_keeps_each_image_in_its_part() -> None:
    """Images that are missing in another entry leave their part; a part of which nothing is left is an error."""
    y = np.tile([0, 1], 50)
    split = make_split(y, [""] * 100, CLASSES, groups=[str(place // 4) for place in range(100)])
    keep = np.setdiff1d(np.arange(100), [3, 50, int(split.test[0])])

    less = restricted(split, keep)

    for name in ("train", "val", "test"):
        assert keep[getattr(less, name)].tolist() == [place for place in getattr(split, name).tolist() if place in keep]
    assert len(less.cross) == len(split.cross)
    assert less.groups is not None
    with pytest.raises(DataError, match="none of the test samples"):
        restricted(split, split.train_val)
