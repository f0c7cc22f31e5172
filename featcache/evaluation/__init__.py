"""What is to be told of samples, splits that are drawn honestly, and scores that say how far they can be trusted.

A task is one class, several labels or a number of each sample; columns of a manifest that are told beside it become numbers
by the training images alone.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, UsageError
from featcache.evaluation.metrics import Kind
from featcache.evaluation.splits import Split, counted, make_free_split, make_split, restricted
from featcache.fingerprint import fingerprint
from featcache.specs import check_fields

if TYPE_CHECKING:
    from featcache.store import Features

CATEGORY = ":category"  # behind a name: its numbers are names, such as those of hospitals
_MISSING = frozenset({"", "nan", "none", "null", "na", "n/a", "<na>"})
_MOST_CATEGORIES = 1000  # beyond, a column names images rather than kinds of them
_GREATEST = 1e30  # its square is still a float64
_TENTHS = np.linspace(0, 1, 11)[1:-1]


def column_names(asked: Sequence[str]) -> tuple[str, ...]:
    """Return what columns are called that were asked for, without ``:category``.

    Raises:
        UsageError: one is asked for twice, or is what images are listed by.
    """
    names = tuple(name.removesuffix(CATEGORY) for name in asked)
    twice = [name for name, count in Counter(names).items() if count > 1 or not name]
    if twice:
        raise UsageError(f"`columns` {','.join(asked)}: write names of columns, each once, with commas between them.")
    if taken := [name for name in names if name in {"path", "label", "split"}]:
        raise UsageError(f"`columns` {taken[0]}: this column lists the samples: it cannot be trained on.")
    return names


@dataclass(frozen=True)
class Columns:
    """Values of some columns as text, a tuple for each image of a data set; ``asked`` are their names as given."""

    asked: tuple[str, ...]
    values: Sequence[tuple[str, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns are called in the manifest."""
        return column_names(self.asked)

    @cached_property
    def sha256(self) -> str:
        """The hash of all values, in the images' order: another age is another experiment."""
        return fingerprint([list(row) for row in self.values])

    def restricted(self, keep: NDArray[np.int64]) -> "Columns":
        """Return the values of some images (k,)."""
        return replace(self, values=[self.values[index] for index in keep.tolist()])

    def coder(self, train: NDArray[np.int64]) -> "ColumnCoder":
        """Return how these values become numbers, by those of the training images (k,).

        A column is of numbers where each value of the data set is one, or missing; else of categories.

        Raises:
            DataError: a number is infinite, a column says nothing of the training images, or names each of them.
        """
        columns = []
        for place, name in enumerate(self.names):
            values = [row[place] for row in self.values]
            is_number = not self.asked[place].endswith(CATEGORY) and all(map(_reads_as_number, values))
            learn = _number_column if is_number else _category_column
            columns.append(learn(name, [values[index] for index in train.tolist()]))
        return ColumnCoder(tuple(columns))


@dataclass(frozen=True)
class CodedColumn:
    """How the values of one column become numbers, as a head's card has it.

    Attributes:
        name: in the manifest.
        kind: of what.
        mean: of the training images' numbers.
        spread: their standard deviation, 1 where they are all alike.
        categories: of the training images, in order: one number each, 1 where an image is of it; of another all are 0.
        missing: how many training images have none: then one more number says where, a missing number stands at the mean.
    """

    name: str
    kind: Literal["number", "category"]
    mean: float = 0.0
    spread: float = 1.0
    categories: tuple[str, ...] = ()
    missing: int = 0

    def __post_init__(self) -> None:
        """Refuse what could not be computed with."""
        check_fields(self)
        if self.spread <= 0:
            raise UsageError(f"{self.name}: a spread of {self.spread}: a number above 0 is needed.")

    def encode(self, values: Sequence[str], where: str) -> NDArray[np.float64]:
        """Return values (n,) as numbers (n, k).

        Raises:
            DataError: a value of a column of numbers is none; ``where`` names the source in the message.
        """
        is_missing = np.array([_is_missing(value) for value in values], bool)
        if self.kind == "number":
            numbers = np.array([self.mean if _is_missing(value) else self._number(value, where) for value in values])
            coded = ((numbers - self.mean) / self.spread).reshape(-1, 1)
        else:
            place = {name: number for number, name in enumerate(self.categories)}
            chosen = np.array([place.get(value.strip(), -1) for value in values], np.int64)
            coded = (chosen[:, None] == np.arange(len(place))).astype(np.float64)
        return np.column_stack([coded, is_missing]) if self.missing else coded

    def _number(self, value: str, where: str) -> float:
        if not _reads_as_number(value):
            raise DataError(f"{where}: the column {self.name!a} is of numbers, and {value!a:.60} is none.")
        return _finite(self.name, value)

    @property
    def text(self) -> str:
        """The column in a few words."""
        kinds = "a number" if self.kind == "number" else f"{len(self.categories)} categories"
        return f"{self.name} ({kinds}{f', missing of {self.missing} training images' if self.missing else ''})"


@dataclass(frozen=True)
class ColumnCoder:
    """How columns become numbers beside an embedding, each multiplied by ``weight``."""

    columns: tuple[CodedColumn, ...]
    weight: float = 1.0

    @classmethod
    def of_card(cls, facts: Mapping[str, Any]) -> "ColumnCoder":
        """Return what a head's card says.

        Raises:
            DataError: it says nothing that could be used.
        """
        try:
            return cls(tuple(CodedColumn(**each) for each in facts["columns"]), float(facts["weight"]))
        except (KeyError, TypeError, ValueError, UsageError) as error:
            raise DataError(f"the head's card does not say how its columns become numbers ({error}): fit again.") from error

    @property
    def card(self) -> dict[str, Any]:
        """It as plain values."""
        return {"columns": [asdict(column) for column in self.columns], "weight": self.weight}

    @property
    def names(self) -> tuple[str, ...]:
        """What the columns are called."""
        return tuple(column.name for column in self.columns)

    def encode(self, values: Sequence[Sequence[str]], where: str = "the data set") -> NDArray[np.float32]:
        """Return rows of values, one of each column, as numbers (n, k).

        Raises:
            DataError: as of ``CodedColumn.encode``.
        """
        parts = [column.encode([row[place] for row in values], where) for place, column in enumerate(self.columns)]
        coded: NDArray[np.float32] = (self.weight * np.concatenate(parts, axis=1)).astype(np.float32)
        return coded

    def weighted(self, X: NDArray[Any], columns: Columns, train: NDArray[np.int64]) -> "ColumnCoder":
        """Return it with the weight by which all columns together vary as much as the embeddings of the training images.

        Heads that measure distances would else not notice an age among a thousand features, or notice nothing but the age.
        Blocks of equal variance are usual where tables are joined (Westerhuis, Kourti and MacGregor 1998).

        Args:
            X: embeddings (m, d) of some of the training images.
            columns: of all images.
            train: the training images (k,).
        """
        numbers = replace(self, weight=1.0).encode(columns.restricted(train).values).astype(np.float64)
        of_columns, of_rows = numbers.var(axis=0).sum(), X.astype(np.float64).var(axis=0).sum()
        return replace(self, weight=math.sqrt(of_rows / of_columns) if of_columns > 0 and of_rows > 0 else 1.0)


def alone(column: CodedColumn, values: Sequence[str], train: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return a column (n, k) as a linear head follows any curve of it: a number with the tenths of the training images'."""
    coded = column.encode(values, "the data set")
    if column.kind == "number":
        numbers = coded[:, 0]
        place = np.digitize(numbers, np.unique(np.quantile(numbers[train], _TENTHS)))
        coded = np.column_stack([coded, place[:, None] == np.unique(place[train])])
    return coded.astype(np.float32)


def _number_column(name: str, train: Sequence[str]) -> CodedColumn:
    numbers = np.array([_finite(name, value) for value in train if not _is_missing(value)])
    if not len(numbers):
        raise DataError(f"`columns` {name}: it says nothing of any training sample.")
    missing = len(train) - len(numbers)
    return CodedColumn(name, "number", float(numbers.mean()), float(numbers.std()) or 1.0, missing=missing)


def _category_column(name: str, train: Sequence[str]) -> CodedColumn:
    names = sorted({value.strip() for value in train if not _is_missing(value)})
    if not names:
        raise DataError(f"`columns` {name}: it says nothing of any training sample.")
    if len(names) > _MOST_CATEGORIES or (len(names) == len(train) and len(names) > 2):
        raise DataError(
            f"`columns` {name}: {len(names)} different values of {len(train)} training samples: it names samples rather "
            "than kinds of them. Leave it out; where it should be of numbers, look for values that are none."
        )
    return CodedColumn(name, "category", categories=tuple(names), missing=sum(map(_is_missing, train)))


def _is_missing(value: str) -> bool:
    return value.strip().lower() in _MISSING


def _reads_as_number(value: str) -> bool:
    """Tell whether a value is a number, or missing: what is infinite is one, and refused later by its column's name."""
    try:
        float(value)
    except ValueError:
        return _is_missing(value)
    return True


def _finite(name: str, value: str) -> float:
    number = float(value)
    if not abs(number) < _GREATEST:
        raise DataError(f"`columns` {name}: {value!a:.60} is too great a number. Fill in what it should be, or nothing.")
    return number


@dataclass(frozen=True)
class Identity:
    """What experiments name all samples of a data set by.

    Attributes:
        items: the hash of their contents and labels.
        splits: as they are given, "" where there is none.
        columns: the hash of their values in the columns that heads are given, ``None`` without these.
    """

    items: str
    splits: tuple[str, ...]
    columns: str | None


_NOT_TAKEN = Identity("", (), None)


@dataclass(frozen=True)
class Task:
    """The images of an experiment with what is to be told of them.

    Attributes:
        features: the images, in the data set's order.
        kind: a class each, several labels each, or a number.
        groups: what each image belongs to, such as a patient, where images of one must stay together.
        group: the column that says so.
        columns: of the manifest, that heads are given beside the features.
        identity: of all images, where only some of them are looked at here.
    """

    features: "Features"
    kind: Kind = "label"
    groups: Sequence[str] | None = None
    group: str | None = None
    columns: Columns | None = None
    identity: Identity = field(default=_NOT_TAKEN, repr=False)

    def __post_init__(self) -> None:
        """Take the identity, before anything is left out."""
        if self.identity is _NOT_TAKEN:
            items, columns = self.items(np.arange(len(self.features.y))), self.columns
            identity = Identity(items, tuple(self.features.splits), None if columns is None else columns.sha256)
            object.__setattr__(self, "identity", identity)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The classes, or the labels, that answers number; of numbers there are none."""
        return self.features.classes if self.kind == "label" else read_labels(self.kind, self.features.classes)[1]

    @cached_property
    def y(self) -> NDArray[Any]:
        """What is to be told: classes (n,) int64, which labels there are (n, k) bool, or numbers (n,) float64."""
        y, classes = self.features.y, self.features.classes
        return y if self.kind == "label" else read_labels(self.kind, classes)[0][y]

    def items(self, index: NDArray[np.int64]) -> str:
        """Return a hash of some samples (k,) and their labels: tables compare only records with the same test items."""
        contents, y = self.features.sha256, self.features.y
        return fingerprint([[contents[position], int(y[position])] for position in index.tolist()])

    @property
    def strata(self) -> NDArray[np.int64]:
        """What draws are stratified by (n,): classes; numbers, and sets of labels, are too many kinds for that."""
        return self.features.y if self.kind == "label" else np.zeros(len(self.features.y), np.int64)

    def split(self, seed: int, folds: int | None = None) -> Split:
        """Return which images train, choose and are tested: as they are given, else drawn."""
        # Of `y`, which is read here: where some images are unreadable, the labels of the others may be too few.
        features, y, contents = self.features, self.y, self.features.sha256
        if self.kind != "label":
            split = make_free_split(len(y), features.splits, seed, self.groups, contents, folds)
            return counted(split, features.y, contents, None)
        split = make_split(y, features.splits, features.classes, seed, groups=self.groups, folds=folds, contents=contents)
        return counted(split, y, contents, features.classes)

    def part_of(self, split: Split, keep: NDArray[np.int64]) -> Split:
        """Return a split of all images as one of some (k,), which are these, with its copies counted among those."""
        features, part = self.features, restricted(split, keep)
        return counted(part, features.y, features.sha256, features.classes if self.kind == "label" else None)

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
        return replace(self, features=kept, groups=groups, columns=columns)


def read_labels(kind: Kind, texts: Sequence[str]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Return what each label's text says, of several labels or a number (c, ...), and the names of those labels.

    Raises:
        DataError: a label is no number, or there is only one.
    """
    return _label_sets(texts) if kind == "labels" else (_numbers(texts), ())


def _label_sets(texts: Sequence[str]) -> tuple[NDArray[np.bool_], tuple[str, ...]]:
    """Return which labels each text names (c, k), and the labels: ``;`` or ``|`` stands between them.

    Raises:
        DataError: there is only one label.
    """
    sets = [{part.strip() for part in re.split(r"[;|]", text) if part.strip()} for text in texts]
    names = tuple(sorted(set().union(*sets)))
    if len(names) < 2:
        raise DataError(f"`target` labels: only one label ({''.join(names)}); write ; between several, as in cat;dog.")
    return np.array([[name in labels for name in names] for labels in sets]), names


def _numbers(texts: Sequence[str]) -> NDArray[np.float64]:
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
