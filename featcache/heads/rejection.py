"""When a head does not know: which classes may be true at a stated coverage, and how familiar a sample is.

A set of classes is right for a new sample with at least the stated probability, on average over samples and calibrations, if
the new sample and those that calibrate are exchangeable. No class, and no kind of sample, is promised that by itself. The
head that is used is fitted again, on more samples than when those that calibrate were answered: as a rule it is a little
better, but that is no part of the promise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, UsageError
from featcache.heads import pack_array, unpack_array
from featcache.heads.familiarity import ClassCentres, Index, Neighbours, Numbers, TrainingRows, read_familiar
from featcache.specs import check_fields

if TYPE_CHECKING:
    from featcache.heads.bundle import Bundle

SetScore = Literal["lac", "aps"]

COVERAGE = 0.9


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


def keep_calibration(calibration: Calibration, training: TrainingRows | None, folder: Path) -> dict[str, Any]:
    """Return what a card says of a calibration, after writing training samples into a folder under their hash."""
    facts = {
        "lac": pack_array(calibration.lac),
        "aps": pack_array(calibration.aps),
        "units": pack_array(calibration.units),
        "members": pack_array(calibration.members),
        "groups": list(calibration.groups),
    }
    return facts if training is None else facts | {"neighbours": training.keep(folder)}
