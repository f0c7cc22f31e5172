"""The store: entries of immutable parts on disk (the only place that knows HDF5).

Here, without it, are an entry's rows: in memory, from its parts, or too many for memory.
"""

import mmap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import Displayed, Table, facts_table

Array = NDArray[Any]
Index = NDArray[np.int64]


@dataclass(frozen=True, repr=False)
class Features(Displayed):
    """The rows of a source's samples, in its order: X (n, ...), y (n,) int64 indexing ``classes``.

    X is an array, but for ``LazyRows`` where ``streamed`` gave them.
    """

    X: Any
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: Sequence[str]
    splits: Sequence[str]
    sha256: Sequence[str]

    def table(self) -> Table:
        """Return shapes and counts; a million paths are not shown."""
        splits = ", ".join(f"{count} {name or 'without a split'}" for name, count in sorted(Counter(self.splits).items()))
        X = f"{self.X.shape} {getattr(self.X, 'dtype', '')}"
        return facts_table("Features", X=X, y=f"{self.y.shape} in {len(self.classes)} classes", splits=splits)


@dataclass(frozen=True)
class RowReader:
    """Reads rows of an entry from its memory-mapped parts, as Features.X in the same order but not in memory."""

    maps: tuple[Array, ...]
    part: NDArray[np.int64]
    row: NDArray[np.int64]
    shape: tuple[int, ...] = field(default=())

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row)

    def forget(self) -> None:
        """Let go of the pages that were read: they stay with the system, and no longer count as this process's memory."""
        for array in self.maps:
            held = getattr(array, "_mmap", None)
            if held is not None and hasattr(held, "madvise"):
                # The system may keep the pages in its cache; only this process's share of them is given back.
                held.madvise(mmap.MADV_DONTNEED)

    def take(self, index: NDArray[np.int64]) -> Array:
        """Return rows (k, ...) by their positions (k,)."""
        # Most entries have one part or a table: no sorting by part then.
        if len(self.maps) == 1:
            return np.asarray(self.maps[0][self.row[index]])
        out = np.empty((len(index), *self.maps[0].shape[1:]), self.maps[0].dtype)
        parts = self.part[index]
        for number in np.unique(parts):
            chosen = parts == number
            out[chosen] = self.maps[number][self.row[index[chosen]]]
        return out


class LazyRows:
    """Rows (n, d) float32 that are too many for memory: they are read as they are asked for.

    Args:
        take: gives rows (k, d) of any float type by their positions (k,).
        width: d.
        rows: the positions that count as 0..n-1.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, take: Callable[[Index], Array], width: int, rows: Index) -> None:
        self._take, self._rows = take, rows
        self.shape = (len(rows), width)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: slice | Index) -> NDArray[np.float32]:
        """Return some rows (k, d), in memory."""
        # Heads compute in float32 whatever is stored, as from rows in memory: both give the same answers.
        return self._take(self._rows[index]).astype(np.float32, copy=False)

    def only(self, index: Index) -> "LazyRows":
        """Return some rows, not read yet."""
        return LazyRows(self._take, self.shape[1], self._rows[index])


def beside(X: Any, columns: NDArray[np.float32]) -> Any:
    """Return rows (n, d), of several views (n, views, d), each with a sample's columns (n, k) behind it."""
    width = X.shape[-1] + columns.shape[1]
    if isinstance(X, LazyRows):
        return LazyRows(lambda index: np.concatenate([X[index], columns[index]], axis=1), width, np.arange(len(X)))
    of_views = columns if X.ndim == 2 else np.broadcast_to(columns[:, None], (*X.shape[:2], columns.shape[1]))
    return np.concatenate([X, of_views], axis=-1)
