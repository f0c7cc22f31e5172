"""What to label next: the samples that stand for most of what no labelled sample stands for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

MOST_POINTS = 5000  # samples that coverage is measured on: a mean over more says the same, at the cost of a product each
_BLOCK = 2048  # rows of a product: 40 MB of likenesses beside so many points
_REFRESHED = 64  # candidates measured again at once: one by one each would read all points from memory


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
