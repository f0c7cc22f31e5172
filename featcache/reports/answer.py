"""The answer that records give of a data set, in a sentence: what frozen features reach, and whether training more pays."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from featcache.evaluation.metrics import Gap
from featcache.reports.gap import steps_of
from featcache.reports.records import RunRecord
from featcache.reports.tables import gap_to_probe, groups_of_seeds, has_no_gain
from featcache.reports.wording import test_text

Group = tuple[RunRecord, ...]


@dataclass(frozen=True)
class Answer:
    """What stands above everything else on a page: ``figure`` is the score of what validation chooses."""

    dataset: str
    figure: str
    about: str
    sentence: str


def answer_of(records: Sequence[RunRecord]) -> Answer:
    """Return the answer of one data set's records; what is compared is chosen on validation, never on test."""
    groups = [group for group in groups_of_seeds(records) if "accuracy" in group[0].test]
    probes = [group for group in groups if group[0].kind == "fit"]
    tuned = [group for group in groups if group[0].kind == "finetune"]
    taken_apart = next((group[-1] for group in groups if group[0].kind == "gap"), None)
    if not groups:
        return Answer(records[0].dataset, "", "", _of_another_kind(records))
    probe = max(probes, key=_rank, default=None)
    gaining = [group for group in tuned if not all(map(has_no_gain, group))]
    best = max(gaining, key=_rank, default=None)
    parts = [_probe_text(probe)] if probe else []
    if best is not None:
        parts.append(_tuned_text(best, records))
    elif tuned:
        parts.append(f"Fine-tuning ({_names(tuned)}) gained nothing on validation: the frozen features are enough here.")
    elif taken_apart is None:
        parts.append("Nothing was fine-tuned yet.")
    if taken_apart is not None:
        parts.append(steps_sentence(taken_apart))
    shown = _chosen(probe, best, records) or groups[0]
    return Answer(records[0].dataset, f"{_mean(shown):.1f} %", f"{_method(shown)}, test accuracy", " ".join(parts))


def _rank(group: Group) -> tuple[float, bool]:
    # a tie goes to logistic, from which fine-tuning starts
    return (statistics.mean(record.val["accuracy"] for record in group), group[0].method == "logistic")


def _chosen(probe: Group | None, best: Group | None, records: Sequence[RunRecord]) -> Group | None:
    """Return what the figure is of: the tuned network where its gain is certain, else the probe, which costs less."""
    if best is not None and (probe is None or _verdict(_gaps(best, records)) == "pays"):
        return best
    return probe


def _mean(group: Group) -> float:
    return float(statistics.mean(100 * record.test["accuracy"] for record in group))


def _method(group: Group) -> str:
    return f"{group[0].short_method} on {group[0].backbone}"


def _names(groups: Sequence[Group]) -> str:
    return ", ".join(dict.fromkeys(group[0].short_method for group in groups))


def _score(group: Group) -> str:
    accuracies = [100 * record.test["accuracy"] for record in group]
    if len(set(accuracies)) == 1:
        return test_text(group[0])
    return f"{_mean(group):.1f} % ± {statistics.stdev(accuracies):.1f} ({len(group)} seeds)"


def _probe_text(group: Group) -> str:
    first = group[0]
    cost = statistics.mean(sum(record.seconds.values()) for record in group)
    return (
        f"On frozen {first.backbone} features {first.method} is the best on validation and has {_score(group)} of "
        f"{first.split['test']} test images right, in {seconds_text(cost)}."
    )


def seconds_text(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _gaps(group: Group, records: Sequence[RunRecord]) -> list[Gap]:
    return [gap for record in group if not has_no_gain(record) and (gap := gap_to_probe(record, records)) is not None]


def _verdict(gaps: Sequence[Gap]) -> str:
    """Return what intervals say: ``pays`` or ``costs`` where every seed's lies on that side of zero, else ``noise``."""
    intervals = [gap.ci for gap in gaps]
    sides = {(interval[0] > 0) - (interval[1] < 0) if interval else 0 for interval in intervals}
    return "pays" if sides == {1} else "costs" if sides == {-1} else "noise"


def _tuned_text(group: Group, records: Sequence[RunRecord]) -> str:
    gaps, first = _gaps(group, records), group[0]
    cost = statistics.mean(sum(record.seconds.values()) for record in group)
    head = f"{first.short_method} has {_score(group)} in {seconds_text(cost)}"
    if not gaps:
        return f"Fine-tuning: {head}; no probe was tested on the same images to compare it with."
    change = f"{_change(gaps)} to the best probe"
    return {
        "pays": f"Fine-tuning pays: {head}, {change}.",
        "costs": f"Fine-tuning is worse here: {head}, {change}.",
        "noise": f"Fine-tuning is not shown to pay: {head}, {change}, inside the noise of {len(first.right)} test images.",
    }[_verdict(gaps)]


def _change(gaps: Sequence[Gap]) -> str:
    points = [gap.points for gap in gaps]
    if len(gaps) > 1:
        return f"{statistics.mean(points):+.1f} ± {statistics.stdev(points):.1f} points over {len(gaps)} seeds"
    spread = f"95 % interval {gaps[0].ci[0]:+.1f} to {gaps[0].ci[1]:+.1f}, " if gaps[0].ci else "too few groups, "
    return f"{points[0]:+.1f} points ({spread}p = {gaps[0].p_value:.2g})"


def steps_sentence(record: RunRecord) -> str:
    """Return of what the gap of a ``gap`` record consists."""
    gap, steps, count = record.gap, steps_of(record), len(record.right)
    tried = ", ".join(dict.fromkeys(step.changes for step in steps if step.changes))
    if gap is None or not steps or not count:
        return f"Taken apart ({tried or 'nothing was tried'}), no step gained on validation over the linear probe."
    spread = f"95 % interval {gap['ci'][0]:+.1f} to {gap['ci'][1]:+.1f}" if gap["ci"] else "too few groups for an interval"
    total = f"{gap['points']:+.1f} points over the linear probe ({spread}, p = {gap['p_value']:.2g})"
    if gap["points"] <= 0:
        return f"Taken apart ({tried}), the best on validation, {record.params.get('best')}, comes to {total}: no gain."
    added, told, parts = 0, 0.0, []
    for name in dict.fromkeys(step.changes for step in steps if step.is_kept and step.changes):
        added += sum(step.images for step in steps if step.is_kept and step.changes == name)
        upto = round(100 * added / count, 1)  # shares add up to the whole as it is rounded
        parts.append(f"{upto - told:+.1f} from {name}")
        told = upto
    noise = " That is inside the noise of so few test images." if gap["ci"] and gap["ci"][0] <= 0 <= gap["ci"][1] else ""
    return f"Taken apart, {total}: {', '.join(parts)}.{noise}"


def _of_another_kind(records: Sequence[RunRecord]) -> str:
    told = [f"{record.method}: {test_text(record)}" for record in records if record.kind in {"fit-labels", "fit-number"}]
    return f"{told[-1]}." if told else "There is no score yet."
