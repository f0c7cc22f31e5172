"""What a label may be: one rule for every kind of source."""

import math
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from featcache.errors import DataError

_MOST_CHARACTERS = 10_000
_BETWEEN = ";"  # what `--target labels` divides a text at
_OFTEN_MISSING = frozenset({"nan", "none", "null", "na", "n/a", "<na>", "-1"})


class Labels:
    """Turns the values of one source into labels.

    Text, whole numbers and true or false are labels; so are other finite numbers, for ``--target number``, where whole
    ones lose their ".0". A list of those is one text with ``;`` between, for ``--target labels``: ``lists`` says whether
    there was any. None, NaN, "" and, where classes have names, numbers below zero are missing.

    Args:
        where: the source, for errors.
        names: the classes that whole numbers stand for, if they stand for any.
    """

    def __init__(self, where: str, names: Sequence[str] = ()) -> None:
        self.lists = False
        self._where, self._names = where, tuple(_storable(name, f"{where}, class names") for name in names)
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise DataError(f"{where}: two classes are called {twice!r}. Give each class a name of its own.")

    def read(self, value: Any, row: object) -> str | None:
        """Return a value's label, ``None`` where it is missing.

        Raises:
            DataError: it is no label; the message names the row.
        """
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.names is None:
            value = value[()]
        if isinstance(value, list | tuple | set | np.ndarray) and getattr(value, "ndim", 1) == 1:
            return self._joined(list(value), row)
        return self._text(value, row)

    def _joined(self, values: list[Any], row: object) -> str:
        self.lists = True
        texts = [self._text(value, row) for value in values]
        if None in texts or any(_BETWEEN in text or "|" in text for text in texts if text):
            raise DataError(f"{self._where}, {row}: a list of labels holds a missing one, or one with ; or | in it.")
        return _BETWEEN.join(text for text in texts if text)

    def _text(self, value: Any, row: object) -> str | None:
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 and not isinstance(value, np.void):
            value = value.item()  # NumPy's and PyTorch's scalars
        if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
            return None
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if isinstance(value, str):
            return _storable(value, f"{self._where}, {row}") if value.strip() else None
        if isinstance(value, bool):
            return str(value)
        if not isinstance(value, int | float | Decimal) or not math.isfinite(value):
            raise DataError(f"{self._where}, {row}: {_shown(value)} is no label: text or a whole number is.")
        number = int(value) if value == int(value) else value
        return self._named(number, row) if self._names else str(number)

    def _named(self, number: float | Decimal, row: object) -> str | None:
        if number < 0:
            return None
        if not isinstance(number, int) or number >= len(self._names):
            raise DataError(f"{self._where}, {row}: {number} is the number of none of the {len(self._names)} classes.")
        return self._names[number] if self._names[number].strip() else None


def labelled(
    labels: Sequence[str | None], splits: Sequence[str], where: str, name: Callable[[int], str]
) -> tuple[list[int], list[str]]:
    """Return which rows can be used, and a note where that is not all of them.

    A split without any label, as sets with a secret test part have it, is left out. Else no label may be missing. ``name``
    tells what a row is called.

    Raises:
        DataError: a label is missing; the message names the row.
    """
    missing = [number for number, label in enumerate(labels) if label is None]
    if not missing:
        return list(range(len(labels))), []
    having = {split for label, split in zip(labels, splits, strict=True) if label is not None}
    unlabelled = {split for split in splits if split} - having
    left = [number for number in missing if splits[number] not in unlabelled]
    if left or not having:
        first = (left or missing)[0]
        raise DataError(
            f"{where}, {name(first)}: no label ({len(left or missing)} such of {len(labels)}). Fill in what is missing, or "
            "take these images out."
        )
    notes = [
        f"{where}: left out: {splits.count(split)} images of the split {split}, none of which has a label"
        for split in sorted(unlabelled)
    ]
    return [number for number, label in enumerate(labels) if label is not None], notes


def odd_names(names: Iterable[str]) -> list[str]:
    """Return notes on class names that look alike, or like marks for a missing label."""
    alike: dict[str, list[str]] = defaultdict(list)
    doubtful = []
    for name in names:
        alike[_looks(name)].append(name)
        if name.strip().lower() in _OFTEN_MISSING:
            doubtful.append(name)
    pairs = [sorted(group) for group in alike.values() if len(group) > 1]
    notes = []
    if pairs:
        shown = "; ".join(" and ".join(map(ascii, group)) for group in pairs[:3])
        notes.append(f"{len(pairs)} times several classes have names that look alike: {shown}")
    if doubtful:
        shown = ", ".join(map(ascii, doubtful))
        notes.append(f"{shown}: a class like any other here, though often a mark for a missing label")
    return notes


def _looks(name: str) -> str:
    """Return what two names share that look alike: to the eye, or as a number."""
    kept = "".join(char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")
    folded = " ".join(kept.split()).casefold()
    if len(folded) < 2:  # a and A are two letters
        return f"text {' '.join(kept.split())}" if not folded.isdecimal() else f"number {float(folded)!r}"
    try:
        return f"number {float(folded)!r}"
    except ValueError:
        return f"text {folded}"


def _storable(text: str, where: str) -> str:
    if len(text) > _MOST_CHARACTERS:
        raise DataError(f"{where}: a label of {len(text)} characters; {_MOST_CHARACTERS} are the most.")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise DataError(f"{where}: the label {_shown(text)} is no text that UTF-8 can write.") from None
    if "\0" in text:
        raise DataError(f"{where}: the label {_shown(text)} has a NUL in it.")
    return text


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
