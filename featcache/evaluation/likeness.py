"""How alike images are: copies whose bytes differ, mirrored ones too, and samples that stand for many others.

Copies are alike to a backbone and in their pixels. Either alone is too little: a backbone takes two photographs of one class
for alike, pixels two blue skies.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Index = NDArray[np.int64]

_BLOCK = 2048  # rows of a product: three of two blocks are 48 MB, however many images there are
_FLAT = 2.0  # levels of 255 that pixels spread by: what is flatter is like every other flat image, and a copy of none
_PASSING = 0.05  # quantile of the sample's copies that limits are set by: the few oddest images say nothing of the others
# By how much farther from 1 than that others may be, in cosine and in correlation; and where no sample says that it is
# enough. Pixels of unlike images are so far apart that what was photographed twice passes too (benchmarks/audit.md).
_ROOM = (0.5, 2.5)
_LEAST = (0.2, 0.9)
_WITHOUT_COPIES, _ABOVE = 0.25, 0.75
_FEW = 1 / 200  # of a block's pairs: more of them, each by itself, take longer and 130 MB
_MOST_PAIRS = 2_000_000  # 100 MB: images that are all alike have as many pairs as squares

MOST_POINTS = 5000  # samples that coverage is measured on: a mean over more says the same, at the cost of a product each
_REFRESHED = 64  # candidates measured again at once: one by one each would read all points from memory


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
    starts = range(0, n, _BLOCK)
    for top in starts:
        for start in range(top, n, _BLOCK):
            yield slice(top, min(top + _BLOCK, n)), slice(start, min(start + _BLOCK, n))


def components(n: int, first: Index, second: Index) -> Index:
    """Return each image's group (n,): two that are a pair are in one, also by way of a third."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(first)), (first, second)), shape=(n, n))
    numbers: Index = connected_components(edges, directed=False)[1].astype(np.int64)
    return numbers


def likeness(first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    """Return a Gaussian of the distances of unit rows (n, d) and (m, d), of width 1 as MaxHerding has it (n, m)."""
    kernel: NDArray[Any] = np.exp(2 * (first @ second.T - 1))
    return kernel


@dataclass(frozen=True)
class Crowd:
    """Samples to choose from.

    Attributes:
        rows: unit embeddings (n, d).
        units: what each belongs to (n,): of a unit one is chosen before any other of it.
        points: which of them coverage is measured on (p,).
        weights: how much each point counts (p,).
    """

    rows: Rows
    units: Index
    points: Index
    weights: Rows

    @classmethod
    def of(cls, rows: Rows, units: Index) -> "Crowd":
        """Return samples in which every unit counts as one, however many samples it has.

        The first are taken as points where there are too many: the order must be none that says what they show.
        """
        points = np.arange(min(len(rows), MOST_POINTS))
        sizes = np.bincount(units[points], minlength=int(units.max(initial=-1)) + 1)
        return cls(rows, units, points, (1 / sizes[units[points]]).astype(np.float32))

    def covered(self, rows: Rows) -> Rows:
        """Return how like the likeliest of some rows (m, d) each point is (p,), 0 where there are none."""
        best = np.zeros(len(self.points), np.float32)
        for start in range(0, len(rows), _BLOCK):
            np.maximum(best, likeness(self.rows[self.points], rows[start : start + _BLOCK]).max(axis=1), out=best)
        return best

    def shares(self, chosen: Rows, labelled: Rows) -> NDArray[np.float64]:
        """Return which share of the samples is nearer to each chosen row (k, d) than to all others and labelled ones."""
        near = self.covered(labelled)
        like = likeness(self.rows[self.points], chosen)
        nearest = like.argmax(axis=1)
        is_nearer = like.max(axis=1) > near
        counts = np.bincount(nearest[is_nearer], self.weights[is_nearer], minlength=len(chosen))
        shares: NDArray[np.float64] = counts / self.weights.sum()
        return shares


def herd(crowd: Crowd, labelled: Rows, count: int, unsure: Rows | None = None) -> Index:
    """Return samples to label (k,), each the one that adds most to what is covered, the first first.

    Covered is a sample as far as the likeliest labelled or chosen one is like it. Without ``unsure`` that is MaxHerding
    (Bae, Noh and Sutherland 2024, "Generalized coverage for more robust low-budget active learning", algorithm 1): the first
    is the most typical of all, the next of what that one is not like. With it each sample counts as much as a head is unsure
    of it: Uncertainty Herding (Bae, Oliveira and Sutherland 2025, section 3).

    Args:
        crowd: what is chosen from.
        labelled: unit embeddings of the labelled samples (m, d).
        count: of samples to choose; fewer come back where there are fewer.
        unsure: how unsure a head is of each sample (n,), from 0 to 1.
    """
    weights = crowd.weights if unsure is None else crowd.weights * unsure[crowd.points]
    covered = crowd.covered(labelled)
    points = crowd.rows[crowd.points]

    def gains(candidates: Index) -> Rows:
        above = likeness(points, crowd.rows[candidates]) - covered[:, None]
        added: Rows = weights @ np.maximum(above, 0)
        return added

    places = np.arange(len(crowd.rows))
    ahead = np.concatenate([gains(places[start : start + _BLOCK]) for start in range(0, len(places), _BLOCK)])
    chosen: list[int] = []
    is_open = np.ones(len(crowd.rows), np.bool_)
    while len(chosen) < min(count, len(crowd.rows)):
        if not is_open.any():  # each unit has given one: the rest of them
            is_open[:] = True
            is_open[chosen] = False
        place = _greatest(gains, ahead, np.flatnonzero(is_open))
        chosen.append(place)
        is_open[crowd.units == crowd.units[place]] = False
        np.maximum(covered, likeness(points, crowd.rows[place][None])[:, 0], out=covered)
    return np.array(chosen, np.int64)


def _greatest(gains: Callable[[Index], Rows], ahead: Rows, candidates: Index) -> int:
    """Return the candidate that adds most; ``ahead`` (n,) are bounds, which are lowered where they are measured again.

    What a sample adds can only fall as others are chosen (Minoux 1978), so that few are measured for each choice.
    """
    order = candidates[np.argsort(-ahead[candidates], kind="stable")]
    for start in range(0, len(order), _REFRESHED):
        some = order[start : start + _REFRESHED]
        ahead[some] = gains(some)
        seen = order[: start + _REFRESHED]
        best = int(seen[np.argmax(ahead[seen])])
        if start + _REFRESHED >= len(order) or ahead[best] >= ahead[order[start + _REFRESHED]]:
            return best
    return int(order[0])
