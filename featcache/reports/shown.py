"""What a page says and shows: the answer in a sentence, a gap's steps, samples, confusions, a map, a data set's card."""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from featcache.display import Table
from featcache.evaluation.metrics import Gap
from featcache.fingerprint import as_named
from featcache.reports import RunRecord
from featcache.reports.tables import between_records, groups_of_seeds, has_no_gain
from featcache.reports.wording import gap_interval, test_text

_ORDER = {"linear": 0, "pooling": 1, "layers": 2, "attentive": 3}
Group = tuple[RunRecord, ...]


@dataclass(frozen=True)
class Bin:
    """Test samples whose confidence lies in one range: how many, their mean confidence and accuracy, in percent."""

    count: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Learned:
    """A head's test score on so many training samples: mean and standard deviation over draws, in percent."""

    samples: int
    mean: float
    std: float


@dataclass(frozen=True)
class Shown:
    """A sample as a page shows it; ``tile`` is its place in the sheet of thumbnails, ``text`` what it is, if a text."""

    path: str
    label: str
    predicted: str = ""
    confidence: float | None = None
    tile: int | None = None
    text: str = ""
    note: str = ""

    @property
    def caption(self) -> str:
        """What is said of it, in words."""
        sure = "" if self.confidence is None else f", {100 * self.confidence:.0f} % sure"
        taken = f", taken for {self.predicted}" if self.predicted not in {"", self.label} else ""
        return f"{self.label}{taken}{sure}: {self.path}{f'; {self.note}' if self.note else ''}"


@dataclass(frozen=True)
class Cell:
    """Test samples of one class that a head takes for one class: how many, and some of them."""

    label: str
    predicted: str
    count: int
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class Confusion:
    """A head on the test samples: ``cells`` by true class (rows) and predicted class (columns); ``None``: no sample."""

    cells: tuple[tuple[Cell | None, ...], ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Scatter:
    """Samples on a plane (n, 2), and how they got there; ``total`` are all that there are."""

    places: tuple[tuple[float, float], ...]
    shown: tuple[Shown, ...]
    classes: tuple[str, ...]
    how: str
    total: int


@dataclass(frozen=True)
class Suspicion:
    """Suspects of one kind of an audit: how many, and some of them."""

    kind: str
    count: int
    shown: tuple[Shown, ...]


@dataclass(frozen=True)
class DatasetEvidence:
    """What lies behind a data set's records; what could not be read is empty, and ``remarks`` say why."""

    head: str = ""
    confusion: Confusion | None = None
    per_class: Table | None = None
    mistakes: tuple[Shown, ...] = ()
    mistakes_total: int = 0
    bins: tuple[Bin, ...] = ()
    learned: tuple[tuple[str, tuple[Learned, ...]], ...] = ()
    suspicions: tuple[Suspicion, ...] = ()
    scatter: Scatter | None = None
    counts: Table | None = None
    facts: tuple[tuple[str, str], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()
    left_out_total: int = 0
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """A step of a gap, as its record has it; accuracy in percent."""

    name: str
    changes: str
    accuracy: float
    is_kept: bool
    samples: int


def steps_of(record: RunRecord) -> list[Step]:
    """Return the steps of a gap in the order in which they were taken; none where the record's are not as they are written.

    A record's JSON has its keys sorted, so that the order is made again: heads first, then weights by their depth.
    """
    told = record.params.get("steps")
    if record.kind != "gap" or not isinstance(told, dict):
        return []
    try:
        steps = [
            Step(str(name), str(step["changes"]), 100 * float(step["test"]), bool(step["kept"]), int(step["samples"]))
            for name, step in ((name, as_named(step)) for name, step in told.items())
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []
    return sorted(steps, key=lambda step: (_ORDER.get(step.name, 4), depth_of(step.name)))


def depth_of(name: str) -> float:
    """Return how deep an unfreezing by stages goes, NaN of any other."""
    if name.partition(":")[0] == "all":
        return math.inf
    match = re.fullmatch(r"last:(\d{1,4})", name)
    return float(match[1]) if match else math.nan


@dataclass(frozen=True)
class Answer:
    """What stands above everything else on a page: the sentence, what it rests on, and the score of what it speaks for."""

    dataset: str
    figure: str
    about: str
    sentence: str
    more: str = ""


def answer_of(records: Sequence[RunRecord]) -> Answer:
    """Return the answer of one data set's records; what is compared is chosen on validation, never on test."""
    groups = [group for group in groups_of_seeds(records) if "accuracy" in group[0].test]
    name = records[0].dataset
    if not groups:
        return Answer(name, "", "", _of_another_kind(records))
    probe = best_probes(groups)
    tuned = [group for group in groups if group[0].kind == "finetune"]
    taken_apart = [steps_sentence(group[-1]) for group in groups if group[0].kind == "gap"]
    gaining = [group for group in tuned if not all(map(has_no_gain, group))]
    best = max(gaining, key=_group_rank, default=None)
    if probe is None:
        shown, sentence = groups[0], "No probe was fitted: there is nothing yet to compare fine-tuning with."
    elif best is None:
        shown, sentence = probe, _probe_alone(probe, tuned, taken_apart)
    else:
        verdict, sentence = _verdict(best, probe)
        shown = best if verdict == "pays" else probe
    basis = [_basis(group) for group in (probe, best) if group is not None]
    about = f"{shown[0].short_method} on {shown[0].backbone}, test accuracy"
    return Answer(name, f"{_mean(shown):.1f} %", about, sentence, " ".join([*basis, *taken_apart]))


def best_probes(groups: Sequence[Group]) -> Group | None:
    """Return the head, under its seeds, that is best on validation."""
    return max((group for group in groups if group[0].kind == "fit"), key=_group_rank, default=None)


def _group_rank(group: Group) -> tuple[float, bool]:
    # a tie goes to logistic, from which fine-tuning starts
    return (statistics.mean(record.val["accuracy"] for record in group), group[0].method == "logistic")


def _mean(group: Group) -> float:
    return float(statistics.mean(100 * record.test["accuracy"] for record in group))


def _score_text(group: Group) -> str:
    accuracies = [100 * record.test["accuracy"] for record in group]
    if len(set(accuracies)) == 1:
        return test_text(group[0])
    return f"{_mean(group):.1f} % ± {statistics.stdev(accuracies):.1f} ({len(group)} seeds)"


def _basis(group: Group) -> str:
    """Return a method's score with what it is uncertain by, and its cost."""
    name = f"{group[0].short_method} ({'frozen features' if group[0].kind == 'fit' else 'fine-tuned'})"
    return f"{name}: {_score_text(group)} of {len(group[0].right)} test samples right, after {seconds_text(_cost(group))}."


def _cost(group: Group) -> float:
    return float(statistics.mean(sum(record.seconds.values()) for record in group))


def _probe_alone(probe: Group, tuned: Sequence[Group], taken_apart: Sequence[str]) -> str:
    name = f"{probe[0].method} on frozen {probe[0].backbone} features"
    if tuned:
        names = ", ".join(dict.fromkeys(group[0].short_method for group in tuned))
        return f"Stay with {name}: fine-tuning ({names}) gained nothing on validation."
    if taken_apart:
        return f"{name} is the best head on validation."
    return f"{name} is the best head on validation; nothing was fine-tuned yet."


def seconds_text(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _verdict(best: Group, probe: Group) -> tuple[str, str]:
    """Return what the intervals say, and the sentence: it pays, or costs, where every seed's lies on that side of zero."""
    gaps = [gap for record in best if (gap := _between(record, probe)) is not None]
    name, price = best[0].short_method, f"{seconds_text(_cost(best))} instead of {seconds_text(_cost(probe))}"
    if not gaps:
        return "noise", f"{name} and {probe[0].method} were not tested on the same samples: they cannot be compared."
    sides = {(gap.ci[0] > 0) - (gap.ci[1] < 0) if gap.ci else 0 for gap in gaps}
    change = f"{_change(gaps)} to {probe[0].method}, for {price}"
    if sides == {1}:
        return "pays", f"Fine-tuning pays: {name} brings {change}."
    if sides == {-1}:
        return "costs", f"Fine-tuning is worse here: {name} comes to {change}."
    return "noise", f"Fine-tuning is not shown to pay: {name} comes to {change}, inside the noise of so few test samples."


def _between(record: RunRecord, probe: Group) -> Gap | None:
    """Return how much better a record is than the probe of its seed, ``None`` where they were tested on other samples."""
    rivals = [rival for rival in probe if (rival.seed, rival.test_items) == (record.seed, record.test_items)]
    return between_records(record, rivals[0]) if rivals else None


def _change(gaps: Sequence[Gap]) -> str:
    points = [gap.points for gap in gaps]
    if len(gaps) > 1:
        return f"{statistics.mean(points):+.1f} ± {statistics.stdev(points):.1f} points ({len(gaps)} seeds)"
    spread = f"95 % interval {gaps[0].ci[0]:+.1f} to {gaps[0].ci[1]:+.1f}, " if gaps[0].ci else "too few groups, "
    return f"{points[0]:+.1f} points ({spread}p = {gaps[0].p_value:.2g})"


def steps_sentence(record: RunRecord) -> str:
    """Return of what the gap of a ``gap`` record consists."""
    gap, steps, count = record.gap, steps_of(record), len(record.right)
    tried = ", ".join(dict.fromkeys(step.changes for step in steps if step.changes))
    if gap is None or not steps or not count:
        return f"Taken apart ({tried or 'nothing was tried'}), no step gained on validation over the linear probe."
    total = f"{gap['points']:+.1f} points over the linear probe ({gap_interval(gap['ci'])}, p = {gap['p_value']:.2g})"
    if gap["points"] <= 0:
        return f"Taken apart ({tried}), the best on validation, {record.params.get('best')}, comes to {total}: no gain."
    added, told, parts = 0, 0.0, []
    for name in dict.fromkeys(step.changes for step in steps if step.is_kept and step.changes):
        added += sum(step.samples for step in steps if step.is_kept and step.changes == name)
        upto = round(100 * added / count, 1)  # shares add up to the whole as it is rounded
        parts.append(f"{upto - told:+.1f} from {name}")
        told = upto
    noise = " That is inside the noise of so few test samples." if gap["ci"] and gap["ci"][0] <= 0 <= gap["ci"][1] else ""
    return f"Taken apart, {total}: {', '.join(parts)}.{noise}"


def _of_another_kind(records: Sequence[RunRecord]) -> str:
    told = [f"{record.method}: {test_text(record)}" for record in records if record.kind in {"fit-labels", "fit-number"}]
    return f"{told[-1]}." if told else "There is no score yet."
