"""Which images train, which choose, which are tested: given by the source, else seeded and stratified."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.fingerprint import fingerprint

Index = NDArray[np.int64]

HELD_OUT = 0.2
FOLDS = 5
SMALL = 1000


@dataclass(frozen=True)
class Fold:
    """Positions of the images that train a candidate, and of those that judge it."""

    train: Index
    val: Index


@dataclass(frozen=True)
class Split:
    """Positions of the images of each part. ``test`` is read by ``metrics.scores_on_test`` alone.

    ``cross`` are folds of train and val together, where candidates are to be chosen by cross-validation. ``groups`` (n,)
    numbers what each image of the data set belongs to, such as a patient, where that was asked for: images of one group
    are no independent evidence, so that intervals resample groups.
    """

    train: Index
    val: Index
    test: Index
    cross: tuple[Fold, ...] = ()
    groups: Index | None = None

    @property
    def folds(self) -> tuple[Fold, ...]:
        """What candidates are chosen on."""
        return self.cross or (Fold(self.train, self.val),)

    @property
    def train_val(self) -> Index:
        """The positions of train and val together, in order."""
        return np.sort(np.concatenate([self.train, self.val]))

    @property
    def test_groups(self) -> Index | None:
        """The group of each test image (t,), where there are groups."""
        return None if self.groups is None else self.groups[self.test]

    def sizes(self) -> dict[str, int]:
        """Return the number of images of each part."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


def make_split(
    y: NDArray[np.int64],
    given: Sequence[str],
    classes: Sequence[str],
    seed: int = 0,
    *,
    groups: Sequence[str] | None = None,
    folds: int | None = None,
) -> Split:
    """Return the split of a data set.

    Given splits are used as they are; what is missing of val and test is a seeded, stratified fifth of the rest.

    Args:
        y: the images' classes (n,).
        given: the images' splits, "" where there is none.
        classes: the class names that ``y`` indexes.
        seed: of the parts that are drawn.
        groups: what each image belongs to, such as a patient: no group is in two parts.
        folds: choose by cross-validation over so many folds of train and val; ``None`` does so, with five, where fewer than
            a thousand images train and choose and no val is given; 0 never does.

    Raises:
        DataError: there are fewer than two classes, a class is too small to be split, or given splits part a group.
    """
    if groups is not None:
        return _make_grouped(y, np.asarray(given, dtype=object), classes, seed, np.asarray(groups, dtype=object), folds)
    _require_classes(y, classes)
    names = np.asarray(given, dtype=object)
    rng = np.random.default_rng(seed)
    split = _completed(names, lambda pool: _draw(pool, y, classes, rng))
    _require_trained(y, classes, split.train, split.test)
    return _crossed(split, y, _number_of_folds(folds, y, split.train, split.val, names), seed)


def make_free_split(count: int, given: Sequence[str], seed: int = 0, groups: Sequence[str] | None = None) -> Split:
    """Return the split of images whose targets are no classes: as ``make_split``, but drawn without strata.

    Raises:
        DataError: there are too few images, or given splits part a group.
    """
    names, same = np.asarray(given, dtype=object), np.zeros(count, np.int64)
    if groups is not None:
        return _make_grouped(same, names, ("all",), seed, np.asarray(groups, dtype=object), 0)
    rng = np.random.default_rng(seed)
    return _completed(names, lambda pool: _draw(pool, same, ("all",), rng))


def _completed(given: NDArray[Any], draw: Callable[[Index], tuple[Index, Index]]) -> Split:
    """Return the given splits; of test and val, what is missing is drawn from the rest in this order."""
    everything = np.arange(len(given))
    test, val = everything[given == "test"], everything[given == "val"]
    train = everything[(given == "train") | (given == "")]
    if not len(test):
        train, test = draw(train)
    if not len(val):
        train, val = draw(train)
    return Split(train, val, test)


def _number_of_folds(folds: int | None, y: NDArray[np.int64], train: Index, val: Index, names: NDArray[Any]) -> int:
    if folds is not None:
        return folds
    both = np.concatenate([train, val])
    is_small = len(both) < SMALL and not (names == "val").any()
    return FOLDS if is_small and int(np.unique(y[both], return_counts=True)[1].min()) >= FOLDS else 0


def _crossed(split: Split, y: NDArray[np.int64], folds: int, seed: int, groups: NDArray[Any] | None = None) -> Split:
    if folds < 2:
        return split
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    both = split.train_val
    if groups is not None:
        parts = StratifiedGroupKFold(folds, shuffle=True, random_state=seed).split(both, y[both], groups[both])
    else:
        parts = StratifiedKFold(folds, shuffle=True, random_state=seed).split(both, y[both])
    return replace(split, cross=tuple(Fold(both[train], both[val]) for train, val in parts))


def _make_grouped(
    y: NDArray[np.int64], given: NDArray[Any], classes: Sequence[str], seed: int, groups: NDArray[Any], folds: int | None
) -> Split:
    if len(classes) > 1:
        _require_classes(y, classes)
    split = _completed(given, lambda pool: _draw_groups(pool, y, groups, seed))
    train, val, test = split.train, split.val, split.test
    for one, other, what in ((train, test, "train and test"), (train, val, "train and val"), (val, test, "val and test")):
        if torn := sorted(set(map(str, groups[one])) & set(map(str, groups[other]))):
            raise DataError(f"group {torn[0]!r} is in {what} ({len(torn)} such groups): give each group one split.")
    _require_trained(y, classes, train, test)
    numbers = np.unique(groups.astype(str), return_inverse=True)[1].astype(np.int64)
    return _crossed(replace(split, groups=numbers), y, folds or 0, seed, groups)


def _draw_groups(pool: Index, y: NDArray[np.int64], groups: NDArray[Any], seed: int) -> tuple[Index, Index]:
    """Split a pool into the rest and about a fifth, whole groups in both, classes as even as groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(round(1 / HELD_OUT), len(set(map(str, groups[pool]))))
    if count < 2:
        raise DataError("all images to train and choose on belong to one group: at least two are needed, or given splits.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        kept, drawn = next(StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(pool, y[pool], groups[pool]))
    return pool[kept], pool[drawn]


def few_shot(split: Split, y: NDArray[np.int64], shots: int, seed: int) -> Split:
    """Return a split that trains on so many images a class, drawn from train and val; it chooses by cross-validation.

    Raises:
        DataError: a class has fewer images.
    """
    rng = np.random.default_rng([seed, shots])
    both = split.train_val
    counts = np.bincount(y[both])
    if (short := counts[counts > 0].min()) < shots:
        raise DataError(f"--shots {shots}: a class has only {short} images to train on.")
    drawn = np.sort(np.concatenate([rng.permutation(both[y[both] == label])[:shots] for label in np.unique(y[both])]))
    return _crossed(Split(drawn, np.empty(0, np.int64), split.test), y, min(FOLDS, shots), seed)


def part_of(split: Split, y: NDArray[np.int64], share: float, seed: int) -> Split:
    """Return a split that trains on a share of its training images, stratified, at least one a class, larger ones nested."""
    rng = np.random.default_rng(seed)
    kept = []
    for label in np.unique(y[split.train]):
        members = rng.permutation(split.train[y[split.train] == label])
        kept.append(members[: max(1, round(share * len(members)))])
    return replace(split, train=np.sort(np.concatenate(kept)), cross=())


def items_hash(sha256: Sequence[str], index: Index, y: NDArray[np.int64]) -> str:
    """Return a hash of some images and their labels: tables compare only records with the same test items."""
    return fingerprint([[sha256[position], int(y[position])] for position in index.tolist()])


def _require_trained(y: NDArray[np.int64], classes: Sequence[str], train: Index, test: Index) -> None:
    absent = sorted({classes[label] for label in set(y[test].tolist()) - set(y[train].tolist())})
    if absent:
        raise DataError(f"class {absent[0]!r} is tested but has no training image ({len(absent)} such classes).")


def _require_classes(y: NDArray[np.int64], classes: Sequence[str]) -> None:
    present = np.unique(y)
    if len(present) < 2:
        only = classes[int(present[0])] if len(present) else "none"
        raise DataError(f"at least two classes with images are needed, found {len(present)} ({only}).")


def _draw(pool: Index, y: NDArray[np.int64], classes: Sequence[str], rng: np.random.Generator) -> tuple[Index, Index]:
    """Split a pool into the rest and a stratified part, at least one image a class in both."""
    kept, drawn = [], []
    for label in np.unique(y[pool]):
        members = pool[y[pool] == label]
        if len(members) < 2:
            raise DataError(
                f"class {classes[int(label)]!r} has {len(members)} image to train and choose on: add images, remove the "
                "class, or give a split."
            )
        order = rng.permutation(members)
        count = min(max(1, round(HELD_OUT * len(members))), len(members) - 1)
        drawn.append(order[:count])
        kept.append(order[count:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(drawn))
