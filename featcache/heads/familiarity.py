"""How familiar a sample is beside training samples, and which share of those is no more familiar than it is.

Training samples lie beside a head; what they tell is worked out by whoever asks.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from featcache.errors import DataError
from featcache.evaluation.likeness import likeness, unit_rows
from featcache.fingerprint import sha256_of_bytes
from featcache.store.atomic import make_folder, replace_file

Index = NDArray[np.int64]
Numbers = NDArray[np.float64]

MOST_ROWS = 1500  # 3.8 MB at 1280 dims in float16; more told little better, and cost whoever copies the head
_RIDGE = 0.1
_AXES = 256  # of the scatter within classes: the rest is told by its mean variance
_NO_SCATTER = 1e-30  # of a variance: classes of copies of one row each have none, and still lie apart
_FOLDS = 5
_ROWS_OF_A_CLASS = 5  # on average: of fewer the scatter within classes says nothing


def _of_one_layer() -> Index:
    return np.empty(0, np.int64)


def layer_rows(X: NDArray[np.float32], mean: NDArray[np.float32], widths: Index) -> NDArray[np.float32]:
    """Return embeddings (n, d) less a mean (d,), of length 1.

    Of several layers, so ``widths`` (l,) long, each has the same length: else the one with the largest activations would
    decide alone.
    """
    if not len(widths):
        return unit_rows(X, mean)
    ends = np.cumsum(widths)[:-1]
    layers = zip(np.split(np.asarray(X, np.float32), ends, axis=1), np.split(mean, ends), strict=True)
    rows: NDArray[np.float32] = np.concatenate([unit_rows(layer, of_layer) for layer, of_layer in layers], axis=1)
    return rows / np.float32(np.sqrt(len(widths)))


def centre_nearness(centres: Any, rows: Any, smallest: Callable[[Any], Any]) -> Any:
    """Return ``ClassCentres.nearness`` of rows (n, d) -> (n,), of NumPy's arrays as of PyTorch's.

    Args:
        centres: its arrays, as attributes.
        rows: embeddings of length 1, less the mean.
        smallest: distances (n, classes) -> the least of each sample (n,), which the two spell differently.
    """
    rows = rows - centres.middle
    products = rows @ centres.weights.T
    within = products @ centres.turns
    length = (rows**2).sum(axis=1) - ((rows @ centres.axes) ** 2).sum(axis=1)
    whole = length[:, None] - 2 * products + centres.squares
    spanned = (within**2).sum(axis=1)[:, None] - 2 * within @ centres.places.T + (centres.places**2).sum(axis=1)
    near: Any = 2
    for distances in (whole.clip(min=1e-9), spanned.clip(min=1e-9)):
        near = near - smallest(distances) / distances.mean(axis=1)
    return near


class _Ranked:
    """Something that tells how familiar samples are, with what it ``usually`` tells of its own, ascending (m,)."""

    usual: Numbers

    def familiarity(self, X: NDArray[np.float32]) -> Numbers:
        """Return how familiar embeddings (n, d) are (n,): the more, the greater."""
        raise NotImplementedError

    def shares(self, X: NDArray[np.float32]) -> Numbers:
        """Return which share of training samples, and the sample itself, is at most as familiar as embeddings (n, d) are.

        Of samples like them all shares are equally frequent: it is a p-value.
        """
        return self.share_of(self.familiarity(X))

    def share_of(self, familiarity: Numbers) -> Numbers:
        """Return which share is at most as familiar as what is so familiar (n,)."""
        shares: Numbers = (1 + np.searchsorted(self.usual, familiarity, side="right")) / (1 + len(self.usual))
        return shares


@dataclass(frozen=True)
class Neighbours(_Ranked):
    """Samples that a head was trained on, and how they vote for what lies near them.

    Attributes:
        mean: of the embeddings (d,).
        rows: unit embeddings (m, d) float16, less the mean.
        votes: each one's vote for each class (m, classes).
        usual: how familiar each of them is without its own vote, nor that of its unit, ascending (m,).
        widths: of the layers (l,), none of one layer.
    """

    mean: NDArray[np.float32]
    rows: NDArray[np.float16]
    votes: NDArray[np.float32]
    usual: Numbers
    widths: Index = field(default_factory=_of_one_layer)

    @classmethod
    def fitted(cls, training: "TrainingRows") -> "Neighbours":
        """Return neighbours that vote as kernel ridge regression of the classes' indicators does.

        Far from all of them, and between the classes, no class gets a large vote. Each one's own familiarity is that of a
        fit without its unit, by the closed form of leaving rows out (Rasmussen and Williams 2006, equation 5.12).
        """
        wide = training.rows.astype(np.float64)
        inverse = np.linalg.inv(likeness(wide, wide) + _RIDGE * np.eye(len(wide)))
        indicators = np.eye(int(training.y.max()) + 1)[training.y]
        votes = inverse @ indicators
        usual = np.empty(len(wide))
        for unit in np.unique(training.units):
            inside = np.flatnonzero(training.units == unit)
            without = indicators[inside] - np.linalg.solve(inverse[np.ix_(inside, inside)], votes[inside])
            usual[inside] = without.max(axis=1)
        return cls(training.mean, training.rows, votes.astype(np.float32), np.sort(usual), training.widths)

    def familiarity(self, X: NDArray[np.float32]) -> Numbers:
        """Return the greatest vote for any class that embeddings (n, d) get (n,): near 1 amid a class, 0 far from all."""
        votes = likeness(layer_rows(X, self.mean, self.widths), self.rows.astype(np.float32)) @ self.votes
        greatest: Numbers = votes.max(axis=1).astype(np.float64)
        return greatest


@dataclass(frozen=True)
class ClassCentres(_Ranked):
    """Where classes lie, and how samples scatter about their centres.

    A sample of a class is much nearer to its centre than to the others'; an unknown one is about as far from all. Distances
    are Mahalanobis' (Lee, Lee, Lee and Shin 2018, section 2.1; the comparison with what lies behind is that of Ren et al.
    2021, "A simple fix to Mahalanobis distance"), in the space of unit embeddings and in the one that the centres span.

    Attributes:
        mean: of the embeddings (d,).
        middle: of their unit embeddings (d,), from which centres are counted, so that they span one dimension less.
        axes: of the scatter within classes, each as long as the share of its variance that is beyond the rest's (d, q).
        weights: centres in the metric of that scatter (classes, d).
        squares: of the centres' lengths in it (classes,).
        turns: products with the weights -> coordinates in the space that the centres span (classes, k).
        places: the centres there (classes, k).
        usual: how familiar training samples are to centres that they had no part in, ascending (m,).
        widths: of the layers (l,), none of one layer.
    """

    mean: NDArray[np.float32]
    middle: NDArray[np.float32]
    axes: NDArray[np.float32]
    weights: NDArray[np.float32]
    squares: NDArray[np.float32]
    turns: NDArray[np.float32]
    places: NDArray[np.float32]
    usual: Numbers
    widths: Index = field(default_factory=_of_one_layer)

    @classmethod
    def fitted(cls, training: "TrainingRows") -> "ClassCentres":
        """Return the centres of training rows; what is usual is told out of fold, units together."""
        rows = training.rows.astype(np.float32)
        numbers = np.unique(training.units, return_inverse=True)[1]
        fold = np.random.default_rng(0).permutation(int(numbers.max()) + 1)[numbers] % _FOLDS
        usual = [
            cls._of(training.mean, rows[fold != number], training.y[fold != number]).nearness(rows[fold == number])
            for number in np.unique(fold)
        ]
        centres = cls._of(training.mean, rows, training.y)
        return replace(centres, usual=np.sort(np.concatenate(usual)), widths=training.widths)

    @classmethod
    def _of(cls, mean: NDArray[np.float32], rows: NDArray[np.float32], y: Index) -> "ClassCentres":
        classes = np.unique(y)
        middle = rows.mean(axis=0)
        centres = np.stack([rows[y == label].mean(axis=0) for label in classes]) - middle
        residuals = rows - middle - centres[np.searchsorted(classes, y)]
        n, d = residuals.shape
        # both have the same spectrum: of a few hundred rows of several layers the smaller one takes a tenth of the time
        scatter = (residuals.T @ residuals if d <= n else residuals @ residuals.T) / n
        shrinkage = _towards_sphere(residuals, scatter)
        variance = max(float(np.trace(scatter)) / d, _NO_SCATTER)
        last = len(scatter) - 1
        q = min(_AXES, last)
        main, vectors = eigh(scatter, subset_by_index=(last + 1 - q, last))  # a third of the time that all of them take
        if d > n:  # what has no variance is no axis: below it is counted with the rest
            vectors = residuals.T @ (vectors / np.sqrt(n * np.maximum(main, max(1e-6 * main[-1], _NO_SCATTER))))
        outside = max(variance * d - float(main.sum()), 0) / (d - q)
        rest = (1 - shrinkage) * outside + shrinkage * variance
        # distances are compared with each other alone: in units of the rest's variance its own axes need no vectors
        beyond = 1 - rest / np.maximum((1 - shrinkage) * main + shrinkage * variance, rest)
        axes = vectors * np.sqrt(beyond).astype(np.float32)
        weights = centres - (centres @ axes) @ axes.T
        products = (centres @ weights.T).astype(np.float64)
        lengths, turns = eigh((products + products.T) / 2)
        spanned = lengths > 1e-6 * lengths[-1]
        turns = turns[:, spanned] / np.sqrt(lengths[spanned])
        single = np.float32
        return cls(
            mean=mean,
            middle=middle.astype(single),
            axes=axes.astype(single),
            weights=weights.astype(single),
            squares=np.diag(products).astype(single),
            turns=turns.astype(single),
            places=(products @ turns).astype(single),
            usual=np.empty(0),
        )

    def familiarity(self, X: NDArray[np.float32]) -> Numbers:
        """Return how much nearer the nearest centre is than centres are on average, of embeddings (n, d) (n,): 2 at most."""
        return self.nearness(layer_rows(X, self.mean, self.widths))

    def nearness(self, rows: NDArray[np.float32]) -> Numbers:
        """Return the familiarity of rows of length 1 (n, d), less the mean (n,)."""
        near: Numbers = centre_nearness(self, rows, lambda distances: distances.min(axis=1)).astype(np.float64)
        return near


def _towards_sphere(residuals: NDArray[np.float32], scatter: NDArray[np.float32]) -> float:
    """Return how far to draw a scatter of residuals (n, d) towards a sphere (Ledoit and Wolf 2004, section 3.3).

    Of the scatter, (d, d) or (n, n), sums of squares alone are asked: scikit-learn's forms it again, at forty times the
    price.
    """
    n, d = residuals.shape
    squares = float((scatter.astype(np.float64) ** 2).sum())
    off = squares - float(np.trace(scatter)) ** 2 / d
    noise = (float(((residuals.astype(np.float64) ** 2).sum(axis=1) ** 2).sum()) / n - squares) / n
    return min(noise / off, 1.0) if off > 0 else 1.0


@dataclass(frozen=True)
class TrainingRows:
    """Samples that a head was trained on.

    Attributes:
        mean: of the embeddings (d,).
        rows: unit embeddings (m, d) float16, less the mean.
        y: classes (m,).
        units: samples of one are left out together (m,).
        widths: of the layers (l,), none of one layer.
    """

    mean: NDArray[np.float32]
    rows: NDArray[np.float16]
    y: Index
    units: Index
    widths: Index = field(default_factory=_of_one_layer)

    @classmethod
    def of(cls, X: NDArray[np.float32], y: Index, units: Index, widths: Sequence[int] = ()) -> "TrainingRows":
        """Return what is kept of embeddings (m, d), of several layers with their widths."""
        mean, of_layers = X.mean(axis=0).astype(np.float32), np.array(widths, np.int64)
        return cls(mean, layer_rows(X, mean, of_layers).astype(np.float16), y, units, of_layers)

    @property
    def familiar(self) -> "Neighbours | ClassCentres":
        """What tells how familiar samples are: centres, of two classes or of few rows a class their votes."""
        classes = len(np.unique(self.y))
        # out of fold too each class must be there: with a row in one unit alone it would be unknown to itself
        enough = len(np.unique(self.units)) >= _ROWS_OF_A_CLASS * classes
        return ClassCentres.fitted(self) if classes > 2 and enough else Neighbours.fitted(self)

    def keep(self, folder: Path) -> dict[str, str]:
        """Return the name and hash of the file that it is written to."""
        buffer = io.BytesIO()
        np.savez(buffer, **{name: array for name, array in vars(self).items() if len(array)})  # as before layers, of one
        content = buffer.getvalue()
        sha256 = sha256_of_bytes(content)
        # called by its content: all heads of an entry and a split share one file
        path = folder / f"neighbours-{sha256[:16]}.npz"
        if not path.exists():
            make_folder(folder)
            replace_file(path, content)
        return {"file": path.name, "sha256": sha256}


def read_familiar(head: Path, facts: dict[str, str] | None) -> Neighbours | ClassCentres | None:
    """Return what the samples beside a head tell; ``None`` where a card names none.

    Raises:
        DataError: they are absent, or not what was written there.
    """
    if facts is None:
        return None
    path = head.parent / Path(str(facts["file"])).name  # a name, whatever a card says
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}): it belongs to {head.name} and goes where that goes; or fit again."
        ) from error
    if sha256_of_bytes(content) != facts["sha256"]:
        raise DataError(f"{path}: is not what was written there: remove it, and fit again.")
    arrays: dict[str, Any] = dict(np.load(io.BytesIO(content), allow_pickle=False))
    # heads of before kept votes, worked out when they were fitted: those say what they said then
    return Neighbours(**arrays) if "votes" in arrays else TrainingRows(**arrays).familiar
