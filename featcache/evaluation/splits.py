"""Which images train, which choose, which are tested: given by the source, else seeded, stratified and drawn by content.

A unit is what must not be parted: copies of an image, and images of one group. Drawn again (Efron and Tibshirani 1993,
chapter 8) units say how sure a comparison is, and what more images would bring. Where few images tell two heads apart, draws
of those alone would be too sure: what is compared gets one image that it alone has right, as Bonett and Price (2012) add one
to each kind of disagreement.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, UsageError
from featcache.evaluation.intervals import Interval
from featcache.fingerprint import fingerprint

Index = NDArray[np.int64]
FOLDS = 5
SMALL = 1000
HELD_OUT = 0.2
DRAWS = 4000
_FEWEST_SIZES = 3  # a power law has two parameters
_FEWEST_WRONG = 5  # images at the largest size: the logarithm of fewer is anybody's guess
_BENT = 0.3  # of the points, how far doublings came out otherwise than the curve said (benchmarks/advise.md)
_LAPLACE = 0.5  # wrong images that are added to each error: the logarithm of none would be infinite


@dataclass(frozen=True)
class Units:
    """The smallest sets of images that may be drawn apart from each other.

    Attributes:
        numbers: of each image's unit (n,).
        names: of each unit, the least of its images' contents.
        contents: of each image, its SHA-256, or its place where that is not known.
    """

    numbers: Index
    names: tuple[str, ...]
    contents: tuple[str, ...]

    @property
    def sizes(self) -> Index:
        """How many images each unit holds."""
        return np.bincount(self.numbers, minlength=len(self.names))

    def order(self, seed: int, purpose: str) -> Index:
        """Return the rank of each unit in a drawing order: by a hash of seed, purpose and content.

        Neither the order in which images are listed nor an image more or less moves the others past each other, as it would
        if places were shuffled.
        """
        return _ranks(self.names, seed, purpose)


def units_of(count: int, contents: Sequence[str] | None = None, groups: Sequence[object] | None = None) -> Units:
    """Return the units of so many images: what shares a content or a group is in one, also by way of a third.

    Args:
        count: of images.
        contents: their SHA-256 values; "" or ``None`` where they are not known: then an image is like no other.
        groups: what each belongs to, such as a patient.
    """
    known = ["" for _ in range(count)] if contents is None else contents
    marks = tuple(content or f"place {place:012d}" for place, content in enumerate(known))
    numbers = np.unique(np.array(marks, dtype=object), return_inverse=True)[1].astype(np.int64)
    if groups is not None:
        numbers = _joined(numbers, np.unique(np.array([str(one) for one in groups]), return_inverse=True)[1])
    names = [""] * (int(numbers.max()) + 1 if count else 0)
    for number, mark in zip(numbers.tolist(), marks, strict=True):
        names[number] = min(names[number] or mark, mark)
    return Units(numbers, tuple(names), marks)


def _joined(one: Index, other: Index) -> Index:
    """Return the connected components of images, where equal numbers of either kind connect."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    first, second = int(one.max()) + 1, int(other.max()) + 1
    edges = coo_array((np.ones(len(one)), (one, first + other)), shape=(first + second, first + second))
    labels = connected_components(edges, directed=False)[1][one]
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def drawing_order(units: Units, index: Index, seed: int, purpose: str) -> Index:
    """Return some images (k,) in a drawing order in which the first of every unit come before the second of any.

    What is drawn from its beginning is as many different things as there are; copies come last.
    """
    rank = _ranks([units.contents[place] for place in index.tolist()], seed, purpose)
    ordered = index[np.argsort(rank, kind="stable")]
    seen: dict[int, int] = {}
    turns = []
    for number in units.numbers[ordered].tolist():
        seen[number] = seen.get(number, -1) + 1
        turns.append(seen[number])
    return ordered[np.argsort(turns, kind="stable")]


def copies(parts: Mapping[str, Index], y: Index, contents: Sequence[str]) -> dict[str, int]:
    """Count images of equal content that splits or labels treat as if they were different; what is 0 is left out.

    Args:
        parts: positions (k,) of train, val and test.
        y: classes of all images (n,).
        contents: SHA-256 of all images.

    Returns:
        ``copies``: images beyond the first of each content; ``test_seen``: test images that train or val hold too;
        ``val_seen``: val images that train holds too; ``test_repeated``: test images beyond the first of each content;
        ``labels_differ``: images whose content has another label too.
    """
    held = {name: [contents[place] for place in index.tolist()] for name, index in parts.items()}
    held = {name: [content for content in several if content] for name, several in held.items()}
    everything = [content for several in held.values() for content in several]
    train, val = set(held["train"]), set(held["val"])
    labels: dict[str, set[int]] = {}
    for content, label in zip(contents, y.tolist(), strict=True):
        labels.setdefault(content, set()).add(label)
    found = {
        "copies": len(everything) - len(set(everything)),
        "test_seen": sum(content in train or content in val for content in held["test"]),
        "val_seen": sum(content in train for content in held["val"]),
        "test_repeated": len(held["test"]) - len(set(held["test"])),
        "labels_differ": sum(bool(content) and len(labels[content]) > 1 for content in contents),
    }
    return {name: count for name, count in found.items() if count}


def remarks(counted: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return in words what ``copies`` counted that makes a score mean less than it says."""
    test, val = sizes["test"], sizes["val"]
    words = {
        "test_seen": f"of {test} test samples are byte for byte training or validation samples too: their answers were seen",
        "val_seen": f"of {val} validation samples are byte for byte training samples too: what is chosen on them was seen",
        "test_repeated": f"of {test} test samples are copies of other test samples: intervals take them for one",
        "labels_differ": "samples are byte for byte a sample with another label: one of the two labels is wrong",
    }
    return tuple(f"{counted[name]} {text}" for name, text in words.items() if name in counted)


def _ranks(names: Sequence[str], seed: int, purpose: str) -> Index:
    keys = [hashlib.sha256(f"{seed} {purpose} {name}".encode()).digest() for name in names]
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks


@dataclass(frozen=True)
class Drawing:
    """What parts are drawn from, and how."""

    y: NDArray[np.int64]
    classes: tuple[str, ...]
    units: Units
    seed: int
    grouped: bool

    def counts(self, pool: Index) -> Counter[int]:
        """Return how many units of each class a pool holds, a unit of two classes counted for both."""
        pairs = np.unique(np.stack([self.units.numbers[pool], self.y[pool]]), axis=1)
        return Counter(pairs[1].tolist())


def require_enough(pool: Index, drawing: Drawing, missing: Sequence[str]) -> None:
    """Refuse what cannot be drawn from, counting what the user has."""
    if not missing:
        return
    if not len(pool):
        raise DataError(f"no sample is left to train on, and to draw {' and '.join(missing)} from.")
    counts, parts = drawing.counts(pool), ["train", *reversed(missing)]
    if drawing.grouped:
        groups = len(set(drawing.units.numbers[pool].tolist()))
        if groups < len(parts):
            raise DataError(
                f"{' and '.join(parts)} are to be drawn from {groups} group{'s' if groups > 1 else ''}, none of which may "
                "be in two parts: more groups are needed, or given splits."
            )
        return
    for label, count in sorted(counts.items()):
        if count < len(parts):
            images = int((drawing.y[pool] == label).sum())
            copies = f", {count} of different content" if count < images else ""
            what = f"class {drawing.classes[label]!r} has" if len(drawing.classes) > 1 else "there are"
            raise DataError(
                f"{what} {images} sample{'s' if images > 1 else ''}{copies}: at least {len(parts)} are needed to draw "
                f"{' and '.join(parts)} from. Add samples, remove the class, or give a split."
            )


def draw(pool: Index, drawing: Drawing, part: str, leave: int) -> tuple[Index, Index]:
    """Split a pool into the rest and a stratified fifth, whole units in both, every class in both where units allow it.

    Units come up in their drawing order; one is taken where that brings the numbers of its classes' images nearer to a
    fifth, and leaves units of its classes behind. A class of which nothing came is given its smallest unit.

    Args:
        pool: what is split.
        drawing: classes and units.
        part: what is drawn.
        leave: units of each class that stay, since further parts come from them; of groups, one is enough.
    """
    leave = 1 if drawing.grouped else leave
    members = _by_unit(pool, drawing)
    have = Counter(drawing.y[pool].tolist())
    wanted = {label: min(max(1, round(HELD_OUT * count)), count - 1) for label, count in have.items()}
    left, taken = drawing.counts(pool), Counter[int]()
    # a unit that is also in another part, by given splits, is on both sides in any case: it is not spread further
    sizes = drawing.units.sizes
    whole = {unit for unit, classes in members.items() if sum(classes.values()) == sizes[unit]}
    rank = drawing.units.order(drawing.seed, part)
    drawn: set[int] = set()

    def can_go(unit: int) -> bool:
        return unit not in drawn and all(left[label] > leave for label in members[unit])

    def take(unit: int) -> None:
        drawn.add(unit)
        left.subtract(list(members[unit]))
        taken.update(members[unit])

    for unit in sorted(whole, key=lambda unit: rank[unit]):
        change = sum(
            abs(wanted[label] - taken[label] - count) - abs(wanted[label] - taken[label])
            for label, count in members[unit].items()
        )
        if change < 0 and can_go(unit):
            take(unit)
    for label in sorted(label for label in have if not taken[label]):
        able = [unit for unit in members if label in members[unit] and can_go(unit)]
        if able:
            take(min(able, key=lambda unit: (unit not in whole, sum(members[unit].values()), rank[unit])))
    if not drawn:
        raise DataError(
            f"no {part} split can be drawn: each group left has a class to itself. Give splits, or other groups."
        )
    chosen = np.isin(drawing.units.numbers[pool], sorted(drawn))
    return pool[~chosen], pool[chosen]


def fold_of(both: Index, drawing: Drawing, folds: int) -> Index:
    """Return each image's fold: of each class as many in each, in blocks of the drawing order; groups stay whole.

    Blocks, since an image more then moves a few images at their ends; dealt out in turn, it would move all that follow.
    """
    if drawing.grouped:
        return _fold_of_group(both, drawing, folds)
    rank, numbers = drawing.units.order(drawing.seed, "folds"), drawing.units.numbers[both]
    fold = np.empty(len(both), dtype=np.int64)
    placed: dict[int, int] = {}
    for label in np.unique(drawing.y[both]).tolist():
        inside = np.flatnonzero(drawing.y[both] == label)
        units, sizes = np.unique(numbers[inside], return_counts=True)
        order = np.argsort(rank[units], kind="stable")
        ends = np.cumsum(sizes[order])
        blocks = ((ends - sizes[order] / 2) * folds / len(inside)).astype(np.int64)
        for unit, block in zip(units[order].tolist(), blocks.tolist(), strict=True):
            placed.setdefault(unit, (block + label) % folds)  # one content under two labels follows the first
        fold[inside] = [placed[unit] for unit in numbers[inside].tolist()]
    return fold


def _fold_of_group(both: Index, drawing: Drawing, folds: int) -> Index:
    """Return each image's fold, whole groups in each, classes as even as groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    rank = drawing.units.order(drawing.seed, "folds")[drawing.units.numbers[both]]
    fold = np.empty(len(both), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of classes with fewer images than folds
        for number, (_, val) in enumerate(StratifiedGroupKFold(folds).split(both, drawing.y[both], rank)):
            fold[val] = number
    return fold


def _by_unit(pool: Index, drawing: Drawing) -> dict[int, Counter[int]]:
    """Return how many images of each class each unit has in a pool."""
    members: dict[int, Counter[int]] = {}
    for unit, label in zip(drawing.units.numbers[pool].tolist(), drawing.y[pool].tolist(), strict=True):
        members.setdefault(unit, Counter())[label] += 1
    return members


def drawn_weights(units: NDArray[np.int64], seed: int, draws: int = DRAWS) -> NDArray[np.float32]:
    """Return how often each image comes (draws, n) when as many units as there are are drawn with replacement.

    Args:
        units: the number of each image's unit (n,).
        seed: of the draws.
        draws: how many.
    """
    numbers = np.unique(units, return_inverse=True)[1]
    count = int(numbers.max()) + 1
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return times[:, numbers].astype(np.float32)


def drawn_accuracies(right: NDArray[np.bool_], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the accuracy of each of k answers in each draw (draws, k).

    Args:
        right: which images each has right (k, n).
        weights: how often each image comes (draws, n).
    """
    # of each added image: how often it comes in a draw
    added = np.random.default_rng(len(right)).poisson(1.0, size=(len(weights), len(right)))
    total = weights.sum(axis=1, dtype=np.float64) + added.sum(axis=1)
    correct = weights.astype(np.float64) @ right.T.astype(np.float64) + added
    accuracies: NDArray[np.float64] = correct / total[:, None]
    return accuracies


def chances(accuracies: NDArray[np.float64], margin: float) -> NDArray[np.float64]:
    """Return in which share of draws each of k (draws, k) is at most ``margin`` below the best of all."""
    share: NDArray[np.float64] = (accuracies >= accuracies.max(axis=1, keepdims=True) - margin).mean(axis=0)
    return share


@dataclass(frozen=True)
class MoreSamples:
    """What more training images would bring, by the learning curve so far.

    Attributes:
        samples: how many more.
        now: how many there are.
        points: of accuracy that they add, by the curve.
        interval: in which 95 % of draws lie.
        slope: the error falls as images to this power.
    """

    samples: int
    now: int
    points: float
    interval: Interval
    slope: float


def more_samples(
    sizes: NDArray[np.int64], right: NDArray[np.bool_], weights: NDArray[np.float32], now: int, more: int
) -> MoreSamples | None:
    """Return what more images would bring; ``None`` where too few sizes were tried, or too few images are wrong.

    error = a x images^b is fitted to logarithms by least squares (Hestness et al. 2017, section 3), in every draw of images
    and of training sets anew; the interval also holds how far real curves leave that law.

    Args:
        sizes: of the training sets (s,).
        right: which images were answered rightly, by size and draw of a training set (s, r, n).
        weights: how often each image comes (draws, n).
        now: training images that there are.
        more: how many more.
    """
    wrong = 1.0 - right.astype(np.float64)
    if len(sizes) < _FEWEST_SIZES or wrong[-1].mean(axis=0).sum() < _FEWEST_WRONG:
        return None
    total = weights.sum(axis=1, dtype=np.float64)
    by_draw = np.einsum("dn,srn->dsr", weights.astype(np.float64), wrong, optimize=True)
    repeats = right.shape[1]
    rng = np.random.default_rng(repeats)
    picked = rng.integers(repeats, size=(len(weights), len(sizes), repeats))
    counted = np.take_along_axis(by_draw, picked, axis=2).mean(axis=2)
    errors = (counted + _LAPLACE) / (total[:, None] + 2 * _LAPLACE)
    measured = (wrong.mean(axis=1).sum(axis=1) + _LAPLACE) / (right.shape[2] + 2 * _LAPLACE)
    _, gains = _power_law(sizes, errors, now, more)
    (slope,), (points,) = _power_law(sizes, measured[None], now, more)
    # the curve itself may bend: draws of images alone held what came in 46 % of cases instead of 95
    bent = gains + _BENT * points * np.random.default_rng(len(gains)).standard_normal(len(gains))
    low, high = np.quantile(bent, (0.025, 0.975))
    return MoreSamples(more, now, float(points), (float(low), float(high)), float(slope))


def _power_law(
    sizes: NDArray[np.int64], errors: NDArray[np.float64], now: int, more: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return slopes (draws,) and the points that more images add (draws,), of errors (draws, s)."""
    logs, told = np.log(sizes.astype(np.float64)), np.log(errors)
    away = logs - logs.mean()
    slopes = (told * away).sum(axis=1) / (away**2).sum()
    at_mean = told.mean(axis=1)
    before, after = (np.exp(at_mean + slopes * (np.log(count) - logs.mean())) for count in (now, now + more))
    return slopes, 100 * (before - after)


def round_count(count: int) -> int:
    """Return the nearest of 1, 2, 5 times a power of ten, as people say numbers."""
    power = 10 ** int(np.floor(np.log10(max(1, count))))
    return int(min((power * step for step in (1, 2, 5, 10)), key=lambda value: abs(np.log(value / max(1, count)))))


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
            f"`folds` {folds}: {whose} {smallest} different samples to train and choose on: "
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
            f"`folds` {folds}: a fold would have one class to train on, or nothing to judge, since samples stay together: "
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
        raise DataError(f"`shots` {shots}: a class has only {short} samples to train on.")
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
            raise DataError(f"none of the {name} samples could be computed: see `featcache store info` for their reasons.")
    cross = tuple(Fold(among(fold.train), among(fold.val)) for fold in split.cross)
    groups, same = (None if numbers is None else numbers[keep] for numbers in (split.groups, split.same))
    cross = tuple(fold for fold in cross if len(fold.train) and len(fold.val))
    return Split(parts["train"], parts["val"], parts["test"], cross, groups, same)


def counted(split: Split, y: NDArray[np.int64], contents: Sequence[str], classes: Sequence[str] | None) -> Split:
    """Return a split with how many images it, or labels, take for different though they are equal (see ``copies``).

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
        raise DataError(f"class {absent[0]!r} is tested but has no training sample ({len(absent)} such classes).")


def _require_classes(y: NDArray[np.int64], classes: Sequence[str]) -> None:
    present = np.unique(y)
    if len(present) < 2:
        only = classes[int(present[0])] if len(present) else "none"
        raise DataError(f"at least two classes with samples are needed, found {len(present)} ({only}).")
