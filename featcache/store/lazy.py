"""Rows that are too many for memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]
Index = NDArray[np.int64]


class LazyRows:
    """Rows (n, d) float32 that are too many for memory: they are read as they are asked for.

    Args:
        take: gives rows (k, d) of any float type by their positions (k,).
        width: d.
        rows: the positions that count as 0..n-1.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, take: Callable[[Index], Rows], width: int, rows: Index) -> None:
        self._take, self._rows = take, rows
        self.shape = (len(rows), width)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows)

    def __getitem__(self, index: slice | Index) -> NDArray[np.float32]:
        """Return some rows (k, d), in memory."""
        return self._take(self._rows[index]).astype(np.float32, copy=False)

    def only(self, index: Index) -> "LazyRows":
        """Return some rows, not read yet."""
        return LazyRows(self._take, self.shape[1], self._rows[index])
