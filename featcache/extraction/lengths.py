"""Texts computed by length: a batch of any lengths goes through in pieces of one length each, and comes back in order."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.extraction.loader import Rows

Ids = NDArray[Any]  # int32 (n, length)
# Tokens of a piece. A core multiplies as fast from some hundreds of rows on, and what fills up the last piece of each
# length is lost; a GPU needs many more to be busy.
CPU_TOKENS, GPU_TOKENS = 512, 16_384
_FINE, _COARSE = 8, 16  # lengths are rounded up to multiples of these: below 64 tokens, and above


def by_length(run: Callable[[Ids], Rows], tokens: int) -> Callable[[Ids], Rows]:
    """Return what computes token ids, int32 (n, length), -1 behind each text, by ``run``, in pieces of about one length.

    How long a piece is and how many texts it has depends on a text's own length alone, so that its row does not depend on
    its company, not by a bit. Rows that have one value a token come back as long as the ids are, zero behind the text.
    """

    def computed(ids: Ids) -> Rows:
        rows: list[NDArray[np.float32]] = []
        for length, places in _of_one_length(ids, tokens):
            filled = np.concatenate([places, np.repeat(places[-1:], _texts(length, tokens) - len(places))])
            parts = run(np.ascontiguousarray(ids[filled, :length]))
            rows = rows or [_room(part, length, ids.shape) for part in parts]
            for row, part in zip(rows, parts, strict=True):
                if part.ndim == 3:
                    row[places, :length] = part[: len(places)]
                else:
                    row[places] = part[: len(places)]
        return tuple(rows)

    return computed


def typical(ids: Ids, tokens: int) -> Ids:
    """Return the largest piece of some ids: what a runtime is made ready with."""
    length, places = max(_of_one_length(ids, tokens), key=lambda piece: piece[0] * len(piece[1]))
    return np.ascontiguousarray(ids[np.resize(places, _texts(length, tokens)), :length])


def _texts(length: int, tokens: int) -> int:
    return max(1, tokens // length)


def _room(part: NDArray[np.float32], length: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return room for the rows of all texts, given those of a piece."""
    count, most = shape
    is_of_tokens = part.ndim == 3 and part.shape[1] == length
    return np.zeros((count, most, part.shape[2]) if is_of_tokens else (count, *part.shape[1:]), part.dtype)


def _of_one_length(ids: Ids, tokens: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the length of each piece and the places of its texts, short texts first."""
    lengths = np.maximum((ids >= 0).sum(axis=1), 1)
    steps = np.where(lengths <= 64, _FINE, _COARSE)
    rounded = np.minimum(-(-lengths // steps) * steps, ids.shape[1])
    for length in np.unique(rounded).tolist():
        places, count = np.flatnonzero(rounded == length), _texts(length, tokens)
        yield from ((length, places[start : start + count]) for start in range(0, len(places), count))
