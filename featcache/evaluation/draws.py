"""How parts and folds are drawn: whole units, classes as even as those allow, by content."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.evaluation.units import Index, Units

HELD_OUT = 0.2


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
        raise DataError(f"no image is left to train on, and to draw {' and '.join(missing)} from.")
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
                f"{what} {images} image{'s' if images > 1 else ''}{copies}: at least {len(parts)} are needed to draw "
                f"{' and '.join(parts)} from. Add images, remove the class, or give a split."
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


def fold_of_image(both: Index, drawing: Drawing, folds: int) -> Index:
    """Return each image's fold: of each class as many in each, in blocks of the drawing order.

    Blocks, since an image more then moves a few images at their ends; dealt out in turn, it would move all that follow.
    """
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


def fold_of_group(both: Index, drawing: Drawing, folds: int) -> Index:
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
