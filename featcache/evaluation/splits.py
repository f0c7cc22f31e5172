"""Which images train, which choose, which are tested: given by the source, else seeded, stratified and drawn by content."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, UsageError
from featcache.evaluation.draws import Drawing, copies, draw, drawing_order, fold_of, remarks, require_enough, units_of
from featcache.fingerprint import fingerprint

Index = NDArray[np.int64]
FOLDS = 5
SMALL = 1000


@dataclass(frozen=True)
class Fold:
    """Positions of the images that train a candidate, and of those that judge it."""

    train: Index
    val: Index


@dataclass(frozen=True)
class Split:
    """Positions of the images of each part. ``test`` is read by ``metrics.evaluate_on_test`` alone.

    ``cross`` are folds of train and val together, where candidates are to be chosen by cross-validation. ``groups`` (n,)
    numbers what each image of the data set belongs to, such as a patient, where that was asked for: images of one group
    are no independent evidence, so that intervals resample groups. ``same`` numbers contents: neither are copies.
    ``copies`` and ``remarks`` are what ``counted`` has found out.
    """

    train: Index
    val: Index
    test: Index
    cross: tuple[Fold, ...] = ()
    groups: Index | None = None
    same: Index | None = None
    copies: Mapping[str, int] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def folds(self) -> tuple[Fold, ...]:
        """What candidates are chosen on."""
        return self.cross or (Fold(self.train, self.val),)

    @property
    def train_val(self) -> Index:
        """The positions of train and val together, in order."""
        return np.sort(np.concatenate([self.train, self.val]))

    @property
    def units(self) -> Index:
        """What each image of the data set belongs to (n,): its group, else its copies."""
        if self.groups is not None:
            return self.groups
        if self.same is not None:
            return self.same
        return np.arange(1 + max(int(part.max(initial=-1)) for part in (self.train, self.val, self.test)))

    @property
    def test_groups(self) -> Index | None:
        """The group of each test image (t,), where there are groups or some of the images are copies of each other."""
        if self.groups is not None:
            return self.groups[self.test]
        if self.same is None or len(np.unique(self.same[self.test])) == len(self.test):
            return None
        return self.same[self.test]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all parts, folds and groups: two splits of one are the same."""
        parts = [self.train, self.val, self.test, *(each for fold in self.cross for each in (fold.train, fold.val))]
        numbers = [*parts, *(numbers for numbers in (self.groups, self.same) if numbers is not None)]
        return fingerprint([each.tolist() for each in numbers])

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
    contents: Sequence[str] | None = None,
) -> Split:
    """Return the split of a data set.

    Given splits are used as they are; what is missing of val and test is a seeded, stratified fifth of the rest. What is
    drawn depends on contents, not on the order of the images, and no content is on both sides of what is drawn.

    Args:
        y: the images' classes (n,).
        given: the images' splits, "" where there is none.
        classes: the class names that ``y`` indexes.
        seed: of the parts that are drawn.
        groups: what each image belongs to, such as a patient: no group is in two parts.
        folds: choose by cross-validation over so many folds of train and val; ``None`` does so, with five, where fewer than
            a thousand images train and choose and no val is given; 0 never does.
        contents: the images' SHA-256; ``None`` where they are not known: then every image is taken for another, and what
            is drawn goes by their places.

    Raises:
        DataError: there are fewer than two classes, a class is too small to be split, or given splits part a group.
        UsageError: there cannot be so many folds.
    """
    _require_classes(y, classes)
    drawing = Drawing(y, tuple(classes), units_of(len(y), contents, groups), seed, grouped=groups is not None)
    split = _completed(np.asarray(given, dtype=object), drawing, groups)
    _require_trained(y, classes, split.train, split.test)
    count = _number_of_folds(folds, drawing, split, val_given="val" in given)
    return _crossed(split, drawing, count, required=folds is not None)


def make_free_split(
    count: int,
    given: Sequence[str],
    seed: int = 0,
    groups: Sequence[str] | None = None,
    contents: Sequence[str] | None = None,
    folds: int | None = None,
) -> Split:
    """Return the split of images whose targets are no classes: as ``make_split``, but drawn without strata.

    Candidates are chosen on the val split unless ``folds`` are asked for.

    Raises:
        DataError: there are too few images, or given splits part a group.
        UsageError: there cannot be so many folds.
    """
    units = units_of(count, contents, groups)
    drawing = Drawing(np.zeros(count, np.int64), ("all",), units, seed, grouped=groups is not None)
    split = _completed(np.asarray(given, dtype=object), drawing, groups)
    return _crossed(split, drawing, _number_of_folds(folds or 0, drawing, split, val_given=True), required=bool(folds))


def _completed(given: NDArray[np.object_], drawing: Drawing, groups: Sequence[str] | None) -> Split:
    """Return the given splits; of test and val, what is missing is drawn from the rest in this order."""
    everything = np.arange(len(given))
    test, val = everything[given == "test"], everything[given == "val"]
    train = everything[(given == "train") | (given == "")]
    missing = [part for part, images in (("test", test), ("val", val)) if not len(images)]
    require_enough(train, drawing, missing)
    if "test" in missing:
        train, test = draw(train, drawing, "test", leave=len(missing))
    if "val" in missing:
        train, val = draw(train, drawing, "val", leave=1)
    if groups is None:
        return Split(train, val, test, same=drawing.units.numbers)
    names = np.array([str(group) for group in groups])
    for one, other, what in ((train, test, "train and test"), (train, val, "train and val"), (val, test, "val and test")):
        if torn := sorted(set(names[one].tolist()) & set(names[other].tolist())):
            raise DataError(f"group {torn[0]!r} is in {what} ({len(torn)} such groups): give each group one split.")
    return Split(train, val, test, groups=drawing.units.numbers)


def _number_of_folds(folds: int | None, drawing: Drawing, split: Split, *, val_given: bool) -> int:
    """Return how many folds there are to be, 0 for none.

    Raises:
        UsageError: there cannot be so many as were asked for.
    """
    both = split.train_val
    counts = Counter(drawing.y[both].tolist()) if drawing.grouped else drawing.counts(both)
    label, smallest = min(counts.items(), key=lambda item: (item[1], item[0]))
    groups = len(set(drawing.units.numbers[both].tolist())) if drawing.grouped else len(both)
    if folds is None:
        fits = len(both) < SMALL and not val_given and min(smallest, groups) >= FOLDS
        return FOLDS if fits else 0
    if folds == 0:
        return 0
    if folds == 1 or folds < 0:
        raise UsageError(f"`folds` {folds}: at least 2 are needed, or 0 to choose on the val split.")
    if folds > smallest:
        whose = f"class {drawing.classes[label]!r} has" if len(drawing.classes) > 1 else "there are"
        raise UsageError(
            f"`folds` {folds}: {whose} {smallest} different images to train and choose on: "
            f"{'at most so many folds, or ' if smallest > 1 else ''}`folds=0`."
        )
    if folds > groups:
        raise UsageError(
            f"`folds` {folds}: there are {groups} groups to train and choose on: at most so many, or `folds=0`."
        )
    return folds


def _crossed(split: Split, drawing: Drawing, folds: int, *, required: bool = False) -> Split:
    """Return the split with so many folds of train and val, no unit on both sides of one.

    Of groups, whatever leaves a fold nothing to judge or fewer than two classes to train on is left out, or refused where
    the folds are required.
    """
    if folds < 2:
        return split
    both = split.train_val
    number = fold_of(both, drawing, folds)
    cross = tuple(Fold(both[number != fold], both[number == fold]) for fold in range(folds))
    classes = min(2, len(np.unique(drawing.y)))  # where nothing is stratified there is one stratum
    usable = tuple(fold for fold in cross if len(fold.val) and len(np.unique(drawing.y[fold.train])) >= classes)
    if len(usable) < folds and required:
        raise UsageError(
            f"`folds` {folds}: a fold would have one class to train on, or nothing to judge, since images stay together: "
            "ask for fewer."
        )
    return replace(split, cross=usable if len(usable) > 1 else ())


def crossed_folds(split: Split, y: NDArray[np.int64], contents: Sequence[str], seed: int) -> tuple[Fold, ...]:
    """Return folds of train and val together, whatever candidates were chosen on; none where there are too few images.

    Args:
        split: with its groups.
        y: classes of all images (n,).
        contents: their SHA-256.
        seed: of the folds.
    """
    units = units_of(len(y), contents, None if split.groups is None else split.groups.tolist())
    drawing = Drawing(y, (), units, seed, grouped=split.groups is not None)
    counts = drawing.counts(split.train_val)
    return _crossed(split, drawing, FOLDS).cross if min(counts.values()) >= FOLDS else ()


def few_shot(split: Split, y: NDArray[np.int64], shots: int, seed: int, contents: Sequence[str] | None = None) -> Split:
    """Return a split that trains on so many images a class, drawn from train and val; it chooses by cross-validation.

    Of each class different contents, and images of different groups, come first; folds part neither.

    Raises:
        DataError: a class has fewer images.
    """
    both = split.train_val
    counts = np.bincount(y[both])
    if (short := counts[counts > 0].min()) < shots:
        raise DataError(f"`shots` {shots}: a class has only {short} images to train on.")
    units = units_of(len(y), contents, None if split.groups is None else split.groups.tolist())
    drawn = [drawing_order(units, both[y[both] == label], seed, f"{shots} shots")[:shots] for label in np.unique(y[both])]
    grouped = split.groups is not None
    few = Split(np.sort(np.concatenate(drawn)), np.empty(0, np.int64), split.test, groups=split.groups, same=split.same)
    drawing = Drawing(y, (), units, seed, grouped=grouped)
    most = len(set(units.numbers[few.train].tolist())) if grouped else min(drawing.counts(few.train).values())
    return _crossed(few, drawing, min(FOLDS, shots, most))


def part_of(split: Split, y: NDArray[np.int64], share: float, seed: int, contents: Sequence[str] | None = None) -> Split:
    """Return a split that trains on a share of its training images, stratified, at least one a class, larger ones nested.

    Copies, and a group's images of one class, come together.
    """
    units = units_of(len(y), contents, None if split.groups is None else split.groups.tolist())
    rank = units.order(seed, "share")
    kept = []
    for label in np.unique(y[split.train]):
        inside = split.train[y[split.train] == label]
        numbers, sizes = np.unique(units.numbers[inside], return_counts=True)
        order = np.argsort(rank[numbers], kind="stable")
        ends = np.cumsum(sizes[order])
        many = max(1, int((ends - sizes[order] / 2 < share * len(inside)).sum()))
        kept.append(inside[np.isin(units.numbers[inside], numbers[order[:many]])])
    return replace(split, train=np.sort(np.concatenate(kept)), cross=(), copies={}, remarks=())


def restricted(split: Split, keep: Index) -> Split:
    """Return a split of some of its images (k,) ascending, positions counted among those.

    Raises:
        DataError: nothing is left of a part.
    """
    place = {old: new for new, old in enumerate(keep.tolist())}

    def among(index: Index) -> Index:
        return np.array([place[old] for old in index.tolist() if old in place], dtype=np.int64)

    parts = {name: among(getattr(split, name)) for name in ("train", "val", "test")}
    for name, index in parts.items():
        if not len(index) and len(getattr(split, name)):
            raise DataError(f"none of the {name} images could be computed: see `featcache store info` for their reasons.")
    cross = tuple(Fold(among(fold.train), among(fold.val)) for fold in split.cross)
    groups, same = (None if numbers is None else numbers[keep] for numbers in (split.groups, split.same))
    cross = tuple(fold for fold in cross if len(fold.train) and len(fold.val))
    return Split(parts["train"], parts["val"], parts["test"], cross, groups, same)


def counted(split: Split, y: NDArray[np.int64], contents: Sequence[str], classes: Sequence[str] | None) -> Split:
    """Return a split with how many images it, or labels, take for different though they are equal (see ``draws.copies``).

    Beside them stands in words what a reader of scores on it should know. ``classes`` are ``None`` where labels are no
    classes: most numbers are in one part alone.
    """
    found = copies({"train": split.train, "val": split.val, "test": split.test}, y, contents)
    told = remarks(found, split.sizes())
    return replace(split, copies=found, remarks=told if classes is None else (*told, *_untested(split, y, classes)))


def _untested(split: Split, y: NDArray[np.int64], classes: Sequence[str]) -> tuple[str, ...]:
    """Say which classes train but are not tested, since all their images are in one group or given splits leave them out."""
    absent = sorted(classes[label] for label in set(y[split.train_val].tolist()) - set(y[split.test].tolist()))
    return (
        (f"class {absent[0]!r} is not tested ({len(absent)} such class{'es' if len(absent) > 1 else ''})",) if absent else ()
    )


def _require_trained(y: NDArray[np.int64], classes: Sequence[str], train: Index, test: Index) -> None:
    absent = sorted({classes[label] for label in set(y[test].tolist()) - set(y[train].tolist())})
    if absent:
        raise DataError(f"class {absent[0]!r} is tested but has no training image ({len(absent)} such classes).")


def _require_classes(y: NDArray[np.int64], classes: Sequence[str]) -> None:
    present = np.unique(y)
    if len(present) < 2:
        only = classes[int(present[0])] if len(present) else "none"
        raise DataError(f"at least two classes with images are needed, found {len(present)} ({only}).")
