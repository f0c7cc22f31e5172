"""Which images train, which choose, which are tested: given by the source, else seeded and stratified."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.fingerprint import fingerprint

Index = NDArray[np.int64]

HELD_OUT = 0.2


@dataclass(frozen=True)
class Split:
    """Positions of the images of each part. ``test`` is read by ``metrics.test_scores`` alone."""

    train: Index
    val: Index
    test: Index

    @property
    def train_val(self) -> Index:
        """The positions of train and val together, in order."""
        return np.sort(np.concatenate([self.train, self.val]))

    def sizes(self) -> dict[str, int]:
        """Return the number of images of each part."""
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


def make_split(y: NDArray[np.int64], given: Sequence[str], classes: Sequence[str], seed: int = 0) -> Split:
    """Return the split of a data set.

    Given splits are used as they are; what is missing of val and test is a seeded, stratified fifth of the rest.

    Args:
        y: the images' classes (n,).
        given: the images' splits, "" where there is none.
        classes: the class names that ``y`` indexes.
        seed: of the parts that are drawn.

    Raises:
        DataError: there are fewer than two classes, or a class is too small to be split.
    """
    _require_classes(y, classes)
    names = np.asarray(given, dtype=object)
    everything = np.arange(len(y))
    test = everything[names == "test"]
    val = everything[names == "val"]
    train = everything[(names == "train") | (names == "")]
    rng = np.random.default_rng(seed)
    if not len(test):
        train, test = _draw(train, y, classes, rng)
    if not len(val):
        train, val = _draw(train, y, classes, rng)
    absent = sorted({classes[label] for label in set(y[test].tolist()) - set(y[train].tolist())})
    if absent:
        raise DataError(f"class {absent[0]!r} is tested but has no training image ({len(absent)} such classes).")
    return Split(train, val, test)


def items_hash(sha256: Sequence[str], index: Index, y: NDArray[np.int64]) -> str:
    """Return a hash of some images and their labels: tables compare only records with the same test items."""
    return fingerprint([[sha256[position], int(y[position])] for position in index.tolist()])


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
