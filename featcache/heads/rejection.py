"""When a head does not know: which classes may be true at a stated coverage, and how familiar a sample is.

A set of classes is right for a new sample with at least the stated probability, on average over samples and calibrations, if
the new sample and those that calibrate are exchangeable. No class, and no kind of sample, is promised that by itself. The
head that is used is fitted again, on more samples than when those that calibrate were answered: as a rule it is a little
better, but that is no part of the promise.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, UsageError
from featcache.evaluation.likeness import likeness, unit_rows
from featcache.fingerprint import sha256_of_bytes
from featcache.heads import pack_array, unpack_array
from featcache.specs import check_fields
from featcache.store.atomic import make_folder, replace_file

if TYPE_CHECKING:
    from featcache.heads.bundle import Bundle

Index = NDArray[np.int64]
SetScore = Literal["lac", "aps"]
Numbers = NDArray[np.float64]

COVERAGE = 0.9
_RIDGE = 0.1
MOST_NEIGHBOURS = 1000  # 2.5 MB at 1280 dims in float16; a fit with so many takes a tenth of a second


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
class Neighbours:
    """Samples that a head was trained on, and how they vote for what lies near them.

    Attributes:
        mean: of the embeddings (d,).
        rows: unit embeddings (m, d) float16, less the mean.
        votes: each one's vote for each class (m, classes).
        usual: how familiar each of them is without its own vote, nor that of its unit, ascending (m,).
    """

    mean: NDArray[np.float32]
    rows: NDArray[np.float16]
    votes: NDArray[np.float32]
    usual: Numbers

    @classmethod
    def fitted(cls, X: NDArray[np.float32], y: Index, units: Index) -> "Neighbours":
        """Return neighbours that vote as kernel ridge regression of the classes' indicators does.

        Far from all of them, and between the classes, no class gets a large vote. Each one's own familiarity is that of a
        fit without its unit, by the closed form of leaving rows out (Rasmussen and Williams 2006, equation 5.12).

        Args:
            X: embeddings (m, d).
            y: classes (m,).
            units: samples of one are left out together (m,).
        """
        mean = X.mean(axis=0)
        rows = unit_rows(X, mean).astype(np.float16)
        wide = rows.astype(np.float64)
        inverse = np.linalg.inv(likeness(wide, wide) + _RIDGE * np.eye(len(wide)))
        indicators = np.eye(int(y.max()) + 1)[y]
        votes = inverse @ indicators
        usual = np.empty(len(y))
        for unit in np.unique(units):
            inside = np.flatnonzero(units == unit)
            without = indicators[inside] - np.linalg.solve(inverse[np.ix_(inside, inside)], votes[inside])
            usual[inside] = without.max(axis=1)
        return cls(mean.astype(np.float32), rows, votes.astype(np.float32), np.sort(usual))

    def familiarity(self, X: NDArray[np.float32]) -> Numbers:
        """Return the greatest vote for any class that embeddings (n, d) get (n,): near 1 amid a class, 0 far from all."""
        votes = likeness(unit_rows(X, self.mean), self.rows.astype(np.float32)) @ self.votes
        greatest: Numbers = votes.max(axis=1).astype(np.float64)
        return greatest

    def shares(self, X: NDArray[np.float32]) -> Numbers:
        """Return which share of training samples, and the sample itself, is at most as familiar as embeddings (n, d) are.

        Of samples like them all shares are equally frequent: it is a p-value.
        """
        return self.share_of(self.familiarity(X))

    def share_of(self, familiarity: Numbers) -> Numbers:
        """Return which share is at most as familiar as what is so familiar (n,)."""
        shares: Numbers = (1 + np.searchsorted(self.usual, familiarity, side="right")) / (1 + len(self.usual))
        return shares


UNFAMILIAR = 0.05  # of one's own samples so many count as unfamiliar: as everywhere where something is called significant
Verdict = Literal["sure", "unsure", "none", "unfamiliar"]


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
    """A head's threshold for one plan, and the neighbours that tell how familiar a sample is, where there are any."""

    plan: RejectPlan
    threshold: float
    neighbours: Neighbours | None

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
        return cls(plan, threshold, _read_neighbours(bundle.path, facts.get("neighbours")))

    def judge(self, probabilities: NDArray[np.float64], X: NDArray[np.float32] | None, contents: Sequence[str]) -> Judgement:
        """Return what is said of samples.

        Args:
            probabilities: of classes (n, classes), scaled as the head's are.
            X: embeddings (n, d), where the head has some.
            contents: the samples' SHA-256, of which ``aps`` draws.
        """
        sets = all_scores(probabilities, self.plan.sets, draws_of(contents)) <= self.threshold
        return Judgement(sets, None if self.neighbours is None or X is None else self.neighbours.shares(X))


def keep_calibration(calibration: Calibration, neighbours: Neighbours | None, folder: Path) -> dict[str, Any]:
    """Return what a card says of a calibration, after writing the neighbours into a folder under their hash."""
    facts = {
        "lac": pack_array(calibration.lac),
        "aps": pack_array(calibration.aps),
        "units": pack_array(calibration.units),
        "members": pack_array(calibration.members),
        "groups": list(calibration.groups),
    }
    if neighbours is None:
        return facts
    buffer = io.BytesIO()
    np.savez(buffer, **vars(neighbours))
    content = buffer.getvalue()
    sha256 = sha256_of_bytes(content)
    # called by its content: all heads of an entry and a split share one file
    path = folder / f"neighbours-{sha256[:16]}.npz"
    if not path.exists():
        make_folder(folder)
        replace_file(path, content)
    return facts | {"neighbours": {"file": path.name, "sha256": sha256}}


def _read_neighbours(head: Path, facts: dict[str, str] | None) -> Neighbours | None:
    """Return the neighbours that lie beside a head.

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
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    return Neighbours(**{name: arrays[name] for name in ("mean", "rows", "votes", "usual")})
