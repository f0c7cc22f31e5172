"""When a head does not know: which classes may be true at a stated coverage, and how familiar a sample is.

A set of classes is right for a new sample with at least the stated probability, on average over samples and calibrations, if
the new sample and those that calibrate are exchangeable. No class, and no kind of sample, is promised that by itself. The
head that is used is fitted again, on more samples than when those that calibrate were answered: as a rule it is a little
better, but that is no part of the promise. Familiar is what training samples are like that lie beside the head: what they
tell is worked out by whoever asks.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh

from featcache.errors import DataError, UsageError
from featcache.evaluation.likeness import likeness, unit_rows
from featcache.fingerprint import sha256_of_bytes
from featcache.heads import pack_array, unpack_array
from featcache.specs import check_fields
from featcache.store.disk import make_folder, replace_file

if TYPE_CHECKING:
    from featcache.heads.bundle import Bundle

Index = NDArray[np.int64]
Numbers = NDArray[np.float64]

MOST_ROWS = 1500  # 3.8 MB at 1280 dims in float16; more told little better, and cost whoever copies the head
_RIDGE = 0.1
_AXES = 256  # of the scatter within classes: the rest is told by its mean variance
_NO_SCATTER = 1e-30  # of a variance: classes of copies of one row each have none, and still lie apart
_FOLDS = 5
_ROWS_OF_A_CLASS = 5  # on average: of fewer the scatter within classes says nothing
SetScore = Literal["lac", "aps"]
COVERAGE = 0.9
UNFAMILIAR = 0.05  # of one's own samples so many count as unfamiliar: as everywhere where something is called significant
Verdict = Literal["sure", "unsure", "none", "unfamiliar"]


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


def all_scores(probabilities: Numbers, kind: SetScore, draws: Numbers) -> Numbers:
    """Return how badly each class fits each sample (n, classes).

    ``lac``: 1 less its probability (Sadinle, Lei and Wasserman 2019, section 2). ``aps``: the probability of all likelier
    classes and a drawn part of its own (Romano, Sesia and Candes 2020, section 2.1).

    Args:
        probabilities: (n, classes).
        kind: which of the two.
        draws: uniform on 0 to 1 (n,), which part of a class's own probability ``aps`` counts.
    """
    if kind == "lac":
        return 1 - probabilities
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ordered = np.take_along_axis(probabilities, order, axis=1)
    before = np.cumsum(ordered, axis=1) - ordered
    scores = np.empty_like(probabilities, dtype=np.float64)
    np.put_along_axis(scores, order, before + draws[:, None] * ordered, axis=1)
    return scores


def draws_of(contents: Sequence[str]) -> Numbers:
    """Return a number from 0 to 1 for each SHA-256 (n,): as good as drawn, and the same whenever it is asked for."""
    # the last digits: the first order what is drawn for splits in places where hashes are compared as texts
    return np.array([int(content[-13:] or "8", 16) / 16**13 for content in contents])


def fewest_units(coverage: float) -> int:
    """Return how many samples, or groups, a threshold needs: with fewer every set holds all classes."""
    return int(np.ceil(coverage / (1 - coverage) - 1e-9))


@dataclass(frozen=True)
class Calibration:
    """How badly the true classes of samples fitted that their head had not seen.

    Attributes:
        lac: scores (n,).
        aps: scores (n,).
        units: what each sample belongs to (n,): samples of one group, and copies, are no independent evidence.
        members: which of ``groups`` each sample is of (n,); of no length where there are no groups.
        groups: their names.
    """

    lac: Numbers
    aps: Numbers
    units: Index
    members: Index
    groups: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, y: Index, probabilities: Numbers, contents: Sequence[str], units: Index, groups: Sequence[str] | None = None
    ) -> "Calibration":
        """Return the calibration by samples (n,) whose classes ``y`` are known."""
        rows, draws = np.arange(len(y)), draws_of(contents)
        kinds: tuple[SetScore, SetScore] = ("lac", "aps")
        lac, aps = (all_scores(probabilities, kind, draws)[rows, y] for kind in kinds)
        names, members = np.unique(np.array(groups or [], dtype=np.str_), return_inverse=True)
        return cls(lac, aps, units, members.astype(np.int64), tuple(names.tolist()))

    @property
    def facts(self) -> dict[str, Any]:
        """What a head's card says of it."""
        packed = {name: pack_array(getattr(self, name)) for name in ("lac", "aps", "units", "members")}
        return packed | {"groups": list(self.groups)}

    def threshold(self, kind: SetScore, coverage: float, group: str | None = None) -> float:
        """Return the score up to which classes are in a set.

        Each unit weighs the same, whatever its size: the next sample is of a unit that is not among these (Lee, Barber and
        Willett 2023, "Distribution-free inference with hierarchical data", section 3); of units of one sample that is split
        conformal prediction's own. With ``group``, samples of that group alone count (Mondrian: Vovk, Gammerman and Shafer
        2005, section 4.5).

        Args:
            kind: of the scores.
            coverage: how often sets shall hold the true class.
            group: whose samples are asked about, where they are of a group that was there.

        Raises:
            UsageError: there is no such group, or too little to calibrate by.
        """
        scores, units = (self.lac if kind == "lac" else self.aps), self.units
        if group is not None:
            if group not in self.groups:
                raise UsageError(f"`group` {group!a}: the head was calibrated on no such group: leave it out, or fit again.")
            scores = scores[self.members == self.groups.index(group)]
            units = np.arange(len(scores))
        numbers, sizes = np.unique(units, return_inverse=True, return_counts=True)[1:]
        if len(sizes) < fewest_units(coverage):
            what = "samples" if group is not None or not self.groups else "groups"
            raise UsageError(
                f"`coverage` {coverage:g}: {fewest_units(coverage)} {what} that no training saw are needed, there are "
                f"{len(sizes)}: ask for less coverage, or fit again with more data."
            )
        weights = 1 / ((len(sizes) + 1) * sizes[numbers].astype(np.float64))
        order = np.argsort(scores, kind="stable")
        reached = np.cumsum(weights[order])
        place = int(np.searchsorted(reached, coverage - 1e-9))  # sums of shares are a rounding off
        return float(scores[order[place]]) if place < len(order) else np.inf


@dataclass(frozen=True)
class RejectPlan:
    """When a head shall say that it does not know.

    Attributes:
        coverage: how often sets of classes shall hold the true one.
        sets: ``lac``, the smallest sets on average, or ``aps``, whose sizes follow how hard a sample is.
        group: which of the groups that the head was calibrated on the samples are of; by default of a new one.
    """

    coverage: float = COVERAGE
    sets: SetScore = "lac"
    group: str | None = None

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind, and what no set can cover."""
        check_fields(self)
        if not 0 < self.coverage < 1:
            raise UsageError(f"`coverage` {self.coverage:g}: a share between 0 and 1 is needed, such as 0.9.")


@dataclass(frozen=True)
class Judgement:
    """What is said of some samples: which classes are in whose set (n, classes), and how familiar each is (n,), if known."""

    sets: NDArray[np.bool_]
    familiar: NDArray[np.float64] | None

    def verdict(self, number: int) -> Verdict:
        """Return whether a sample has one answer: unfamiliar ones have none, whatever the head says of them."""
        if self.familiar is not None and self.familiar[number] <= UNFAMILIAR:
            return "unfamiliar"
        count = int(self.sets[number].sum())
        return "none" if count == 0 else "sure" if count == 1 else "unsure"


@dataclass(frozen=True)
class Rejection:
    """A head's threshold for one plan, and what tells how familiar a sample is, where anything does."""

    plan: RejectPlan
    threshold: float
    familiar: Neighbours | ClassCentres | None

    @classmethod
    def of(cls, bundle: "Bundle", plan: RejectPlan) -> "Rejection":
        """Return what a head's file holds for this.

        Raises:
            UsageError: the head has no probabilities of classes, or too little to calibrate by.
            DataError: the file is of before, or what lies beside it is absent or damaged.
        """
        facts = bundle.card.get("calibration")
        if facts is None:
            raise DataError(
                f"{bundle.path}: this head was not calibrated: fit again with `featcache fit` (fine-tuning calibrates none)."
            )
        if not facts:
            raise UsageError(
                f"{bundle.path}: heads that give no class a probability, and attentive ones, are not calibrated to say "
                "that they do not know: fit another, such as logistic."
            )
        try:
            calibration = Calibration(
                unpack_array(facts["lac"], np.float64),
                unpack_array(facts["aps"], np.float64),
                unpack_array(facts["units"], np.int64),
                unpack_array(facts["members"], np.int64),
                tuple(facts["groups"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{bundle.path}: its calibration cannot be read ({error!r:.100}): fit again.") from error
        threshold = calibration.threshold(plan.sets, plan.coverage, plan.group)
        return cls(plan, threshold, read_familiar(bundle.path, facts.get("neighbours")))

    def judge(self, probabilities: NDArray[np.float64], X: NDArray[np.float32] | None, contents: Sequence[str]) -> Judgement:
        """Return what is said of samples.

        Args:
            probabilities: of classes (n, classes), scaled as the head's are.
            X: embeddings (n, d), where the head has some.
            contents: the samples' SHA-256, of which ``aps`` draws.
        """
        sets = all_scores(probabilities, self.plan.sets, draws_of(contents)) <= self.threshold
        return Judgement(sets, None if self.familiar is None or X is None else self.familiar.shares(X))
