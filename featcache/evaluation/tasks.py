"""What is to be told of an image: one class, several labels, or a number."""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.evaluation.columns import Columns
from featcache.evaluation.metrics import Kind
from featcache.evaluation.splits import Split, counted, items_hash, make_free_split, make_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from featcache.store.rows import Features


@dataclass(frozen=True)
class Task:
    """The images of an experiment with what is to be told of them.

    Attributes:
        features: the images, in the data set's order.
        kind: a class each, several labels each, or a number.
        groups: what each image belongs to, such as a patient, where images of one must stay together.
        group: the column that says so.
        columns: of the manifest, that heads are given beside the features.
    """

    features: "Features"
    kind: Kind = "label"
    groups: "Sequence[str] | None" = None
    group: str | None = None
    columns: Columns | None = None
    parent: "Task | None" = field(default=None, repr=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, or the labels, that answers number; of numbers there are none."""
        return self.features.classes if self.kind == "label" else read_labels(self.kind, self.features.classes)[1]

    @cached_property
    def y(self) -> NDArray[Any]:
        """What is to be told: classes (n,) int64, which labels there are (n, k) bool, or numbers (n,) float64."""
        y, classes = self.features.y, self.features.classes
        return y if self.kind == "label" else read_labels(self.kind, classes)[0][y]

    @property
    def strata(self) -> NDArray[np.int64]:
        """What draws are stratified by (n,): classes; numbers, and sets of labels, are too many kinds for that."""
        return self.features.y if self.kind == "label" else np.zeros(len(self.features.y), np.int64)

    def split(self, seed: int, folds: int | None = None) -> Split:
        """Return which images train, choose and are tested: as they are given, else drawn."""
        features, contents = self.features, self.features.sha256
        if self.kind != "label":
            # of `y`, which is read here: where some images are unreadable, the labels of the others may be too few
            return self.counted(make_free_split(len(self.y), features.splits, seed, self.groups, contents, folds))
        y, classes, groups = features.y, features.classes, self.groups
        return self.counted(make_split(y, features.splits, classes, seed, groups=groups, folds=folds, contents=contents))

    def counted(self, split: Split) -> Split:
        """Return a split of these images with its copies, and what a reader of scores on it should know."""
        features = self.features
        return counted(split, features.y, features.sha256, features.classes if self.kind == "label" else None)

    @property
    def whole(self) -> "Task":
        """The task of all images, where only some of them are looked at here."""
        return self.parent or self

    @cached_property
    def items(self) -> str:
        """The hash of all images and their labels."""
        features = self.whole.features
        return items_hash(features.sha256, np.arange(len(features.y)), features.y)

    def restricted(self, keep: NDArray[np.int64]) -> "Task":
        """Return the task of some of its images (k,); it goes by the same name, so that an experiment's key stays."""
        features = self.features
        if len(keep) == len(features.y):
            return self
        some: dict[str, Any] = {
            name: tuple(getattr(features, name)[index] for index in keep.tolist()) for name in ("paths", "splits", "sha256")
        }
        groups = None if self.groups is None else [self.groups[index] for index in keep.tolist()]
        columns = None if self.columns is None else self.columns.restricted(keep)
        kept = replace(features, X=features.X[keep], y=features.y[keep], **some)
        return replace(self, features=kept, groups=groups, columns=columns, parent=self.whole)


def read_labels(kind: Kind, texts: "Sequence[str]") -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return what each label's text says, of several labels or a number (c, ...), and the names of those labels.

    Raises:
        DataError: a label is no number, or there is only one.
    """
    return _label_sets(texts) if kind == "labels" else (_numbers(texts), ())


def _label_sets(texts: "Sequence[str]") -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return which labels each text names (c, k), and the labels: ``;`` or ``|`` stands between them.

    Raises:
        DataError: there is only one label.
    """
    sets = [{part.strip() for part in re.split(r"[;|]", text) if part.strip()} for text in texts]
    names = tuple(sorted(set().union(*sets)))
    if len(names) < 2:
        raise DataError(f"`target` labels: only one label ({''.join(names)}); write ; between several, as in cat;dog.")
    return np.array([[name in labels for name in names] for labels in sets]), names


def _numbers(texts: "Sequence[str]") -> NDArray[np.float64]:
    """Return the number that each text is (c,).

    Raises:
        DataError: one is none.
    """
    values = []
    for text in texts:
        try:
            values.append(float(text))
        except ValueError:
            raise DataError(f"`target` number: the label {text!r} is no number.") from None
        if not math.isfinite(values[-1]):
            raise DataError(f"`target` number: the label {text!r} is not finite.")
    return np.array(values)
