"""What is to be told of an image: one class, several labels, or a number."""

import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError
from featcache.evaluation.metrics import (
    AnyScores,
    LabelScores,
    NumberScores,
    Scores,
    TestResult,
    label_scores,
    labels_on_test,
    number_scores,
    numbers_on_test,
    score,
    scores_on_test,
)
from featcache.evaluation.splits import Index, Split, counted, items_hash, make_free_split, make_split

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from featcache.datasets.base import Dataset
    from featcache.store.rows import Features

Kind = Literal["label", "labels", "number"]


def kind_of(y: NDArray[Any]) -> Kind:
    """Return what is to be told by how it is held: classes are integers, labels a table of truth values, numbers floats."""
    return "labels" if y.ndim == 2 else "number" if y.dtype.kind == "f" else "label"


def evaluate(y_true: NDArray[Any], predictions: NDArray[Any], temperature: float | None = None) -> AnyScores:
    """Return the scores, without intervals, of predictions for images of any kind of task."""
    kind = kind_of(y_true)
    if kind == "label":
        return score(y_true, predictions, temperature)
    return label_scores(y_true, predictions) if kind == "labels" else number_scores(y_true, predictions)


def evaluate_on_test(
    predict: "Callable[[Index], NDArray[Any]]", y: NDArray[Any], split: Split, temperature: float | None = None
) -> TestResult:
    """Score a finished model of any kind of task on the test split, with intervals that respect the split's groups."""
    kind = kind_of(y)
    if kind == "label":
        return scores_on_test(predict, y, split, temperature)
    scores = labels_on_test(predict, y, split) if kind == "labels" else numbers_on_test(predict, y, split)
    return TestResult(scores, np.empty(0, np.bool_), np.empty(0, np.int64))


def scores_from(kind: Kind, facts: "Mapping[str, Any]") -> AnyScores:
    """Return the scores that a record holds, intervals as pairs again."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
    kinds: dict[Kind, type[AnyScores]] = {"label": Scores, "labels": LabelScores, "number": NumberScores}
    return kinds[kind](**fields)


def require_kind(dataset: "Dataset", kind: Kind) -> None:
    """Refuse a data set whose labels are not what is to be told, before anything is computed for it.

    Raises:
        DataError: labels are lists where one an image is needed, a label is no number, or there is only one label.
    """
    if dataset.label_lists and kind != "labels":
        raise DataError(
            f"{dataset.location}: its labels are lists; only fit with `target='labels'` trains on several an image."
        )
    if kind != "label":
        _ = _label_sets(dataset.table.labels) if kind == "labels" else _numbers(dataset.table.labels)


@dataclass(frozen=True)
class Task:
    """The images of an experiment with what is to be told of them.

    Attributes:
        features: the images, in the data set's order.
        kind: a class each, several labels each, or a number.
        groups: what each image belongs to, such as a patient, where images of one must stay together.
        group: the column that says so.
    """

    features: "Features"
    kind: Kind = "label"
    groups: "Sequence[str] | None" = None
    group: str | None = None
    parent: "Task | None" = field(default=None, repr=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, or the labels, that answers number; of numbers there are none."""
        if self.kind == "label":
            return self.features.classes
        return _label_sets(self.features.classes)[1] if self.kind == "labels" else ()

    @cached_property
    def y(self) -> NDArray[Any]:
        """What is to be told: classes (n,) int64, which labels there are (n, k) bool, or numbers (n,) float64."""
        if self.kind == "label":
            return self.features.y
        values = _label_sets(self.features.classes)[0] if self.kind == "labels" else _numbers(self.features.classes)
        return values[self.features.y]

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
        kept = replace(features, X=features.X[keep], y=features.y[keep], **some)
        return replace(self, features=kept, groups=groups, parent=self.whole)


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
