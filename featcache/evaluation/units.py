"""What must not be parted when images are drawn: copies, and images of one group. Draws go by content, not by place."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Index = NDArray[np.int64]


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


def image_order(units: Units, index: Index, seed: int, purpose: str) -> Index:
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
        "test_seen": f"of {test} test images are byte for byte training or validation images too: their answers were seen",
        "val_seen": f"of {val} validation images are byte for byte training images too: what is chosen on them was seen",
        "test_repeated": f"of {test} test images are copies of other test images: intervals take them for one",
        "labels_differ": "images are byte for byte an image with another label: one of the two labels is wrong",
    }
    return tuple(f"{counted[name]} {text}" for name, text in words.items() if name in counted)


def _ranks(names: Sequence[str], seed: int, purpose: str) -> Index:
    keys = [hashlib.sha256(f"{seed} {purpose} {name}".encode()).digest() for name in names]
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks
