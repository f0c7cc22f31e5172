"""Images that show the same though their bytes differ: alike to a backbone and alike in their pixels, mirrored ones too.

Either alone is too little: a backbone takes two photographs of one class for alike, pixels two blue skies.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Index = NDArray[np.int64]

_TILE = 2048  # rows of a block: three products of two blocks are 48 MB, however many images there are
_FLAT = 2.0  # levels of 255 that pixels spread by: what is flatter is like every other flat image, and a copy of none
_PASSING = 0.05  # quantile of the sample's copies that limits are set by: the few oddest images say nothing of the others
# By how much farther from 1 than that others may be, in cosine and in correlation; and where no sample says that it is
# enough. Pixels of unlike images are so far apart that what was photographed twice passes too (benchmarks/audit.md).
_ROOM = (0.5, 2.5)
_LEAST = (0.2, 0.9)
_WITHOUT_COPIES, _ABOVE = 0.25, 0.75
_FEW = 1 / 200  # of a block's pairs: more of them, each by itself, take longer and 130 MB
_MOST_PAIRS = 2_000_000  # 100 MB: images that are all alike have as many pairs as squares


@dataclass(frozen=True)
class Likeness:
    """From which cosine of embeddings and which correlation of pixels on two images are copies."""

    cosine: float
    correlation: float

    @classmethod
    def fitted(cls, cosine: NDArray[Any], correlation: NDArray[Any]) -> "Likeness":
        """Return what nearly all copies reach whose likenesses to their originals are these (k,).

        The scale is the distance from 1, since that is what an image's content stretches.
        """
        ends = (float(np.quantile(values, _PASSING)) for values in (cosine, correlation))
        return cls(*(max(least, 1 - (1 + room) * (1 - end)) for least, room, end in zip(_LEAST, _ROOM, ends, strict=True)))

    def above(self, others: NDArray[Any]) -> "Likeness":
        """Return limits that images which are no copies do not reach, given how alike some are to their nearest (k,).

        Digits of 8 pixels are as alike as copies of one that was resized. A quarter of the images are taken to have no copy.
        """
        usual = float(np.quantile(others, _WITHOUT_COPIES))
        return replace(self, correlation=max(self.correlation, usual + _ABOVE * (1 - usual)))


@dataclass(frozen=True)
class Pairs:
    """Copies: positions ``first`` < ``second`` (k,), whether one is the other's mirror image, and how alike they are."""

    first: Index
    second: Index
    mirrored: NDArray[np.bool_]
    cosine: Rows
    correlation: Rows

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Neighbourhood:
    """What one pass over all pairs of images finds: copies, and each image's cosine to the nearest other (n,)."""

    pairs: Pairs
    nearest: Rows
    is_cut: bool = False


def unit_rows(X: NDArray[Any], mean: NDArray[Any]) -> Rows:
    """Return embeddings (n, d) less a mean (d,), of length 1: without it all images of one backbone look alike."""
    centred = np.asarray(X, np.float32) - np.asarray(mean, np.float32)
    rows: Rows = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), np.float32(1e-12))
    return rows


def tone_rows(thumbnails: NDArray[np.uint8]) -> Rows:
    """Return thumbnails (n, 32, 32, 3) as rows (n, 768) whose products are correlations; flat images are rows of 0."""
    n, side = len(thumbnails), thumbnails.shape[1] // 2
    halved = np.zeros((n, side, side, 3), np.float32)
    for down in (0, 1):
        for across in (0, 1):
            halved += thumbnails[:, down::2, across::2]
    halved -= halved.mean(axis=(1, 2), keepdims=True)  # of each channel: a common hue would make all images alike
    flat = halved.reshape(n, -1) / 4
    spread = flat.std(axis=1, keepdims=True)
    length = spread * np.float32(np.sqrt(flat.shape[1]))
    rows: Rows = np.where(spread > _FLAT, flat / np.maximum(length, np.float32(1e-12)), np.float32(0))
    return rows


def nearest_others(rows: Rows, pixels: Rows, places: Index) -> Rows:
    """Return the greatest correlation of some images' rows (k, d) with those of all images (n, d) but their own (k,)."""
    correlation = rows @ pixels.T
    correlation[np.arange(len(places)), places] = -1
    nearest: Rows = correlation.max(axis=1)
    return nearest


def mirrored(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return images (n, h, w, 3) with left and right exchanged."""
    return thumbnails[:, :, ::-1]


def neighbourhood(embeddings: Rows, thumbnails: NDArray[np.uint8], limits: Mapping[bool, Likeness]) -> Neighbourhood:
    """Compare all images with each other, block by block.

    Args:
        embeddings: unit rows (n, d).
        thumbnails: uint8 (n, 32, 32, 3).
        limits: when two are copies, and when one is the other's mirror image (by ``True``).
    """
    pixels, flipped = tone_rows(thumbnails), tone_rows(mirrored(thumbnails))
    nearest, least = np.full(len(embeddings), -1, np.float32), min(limit.cosine for limit in limits.values())
    blocks, count = list[tuple[NDArray[Any], ...]](), 0
    for rows, columns in _tiles(len(embeddings)):
        cosine = embeddings[rows] @ embeddings[columns].T
        if rows == columns:
            cosine[np.tril_indices(len(cosine))] = -1  # each pair once, no image with itself
        nearest[rows] = np.maximum(nearest[rows], cosine.max(axis=1))
        nearest[columns] = np.maximum(nearest[columns], cosine.max(axis=0))
        first, second = np.nonzero(cosine >= least)
        likeness, is_copy = cosine[first, second], np.zeros(len(first), np.bool_)
        for is_mirrored, own in ((False, pixels), (True, flipped)):
            correlation = _correlations(own[rows], pixels[columns], first, second)
            limit = limits[is_mirrored]
            alike = (likeness >= limit.cosine) & (correlation >= limit.correlation) & ~is_copy
            is_copy |= alike
            places = first[alike] + rows.start, second[alike] + columns.start
            blocks.append((*places, np.full(len(places[0]), is_mirrored), likeness[alike], correlation[alike]))
        count += int(is_copy.sum())
        if count > _MOST_PAIRS:
            break
    columns_of = [np.concatenate(parts) for parts in zip(*blocks, strict=True)]
    return Neighbourhood(Pairs(*columns_of), nearest, is_cut=count > _MOST_PAIRS)


def _correlations(one: Rows, other: Rows, first: Index, second: Index) -> Rows:
    """Return the products of some pairs of rows (k,): pair by pair where they are few, else from the table of all."""
    if len(first) > _FEW * len(one) * len(other):
        table: Rows = one @ other.T
        return table[first, second]
    products: Rows = np.einsum("ij,ij->i", one[first], other[second])
    return products


def _tiles(n: int) -> Iterator[tuple[slice, slice]]:
    """Yield the blocks of the upper half of a table n x n."""
    starts = range(0, n, _TILE)
    for top in starts:
        for start in range(top, n, _TILE):
            yield slice(top, min(top + _TILE, n)), slice(start, min(start + _TILE, n))


def components(n: int, first: Index, second: Index) -> Index:
    """Return each image's group (n,): two that are a pair are in one, also by way of a third."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    numbers: Index = connected_components(edges, directed=False)[1].astype(np.int64)
    return numbers
