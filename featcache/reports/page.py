"""One page to send: records, and what lies behind them, as one HTML file that asks nothing of anyone.

It says the answer in a sentence, and shows a gap's steps, samples, confusions, a map, a data set's card.
"""

import base64
import hashlib
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from markupsafe import Markup

from featcache.datasets.decoding import TILE, Sheet
from featcache.display import Table, printable, seconds_text
from featcache.evaluation.metrics import Gap
from featcache.fingerprint import as_named
from featcache.reports import RunRecord
from featcache.reports.svg import COLOURS, Bar, Chart, Dot, Mark, Series, cost_chart, line_chart, map_chart, waterfall
from featcache.reports.tables import NAMES, between_records, groups_of_seeds, has_no_gain, short_table
from featcache.reports.wording import adding_up, gap_interval, test_text

_ORDER = {"linear": 0, "pooling": 1, "layers": 2, "attentive": 3}
Group = tuple[RunRecord, ...]
Command = Callable[[RunRecord], str]
_COLOUR_OF = {"": 9, "pooling": 0, "other layers": 1, "attention": 2, "weights": 3}
_MOST_LINES, _MOST_TRAINED = 6, 3  # of one chart: more cannot be told apart


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
        shown, sentence = probe, _probe_alone(probe, groups)
    else:
        verdict, sentence = _verdict(best, probe)
        sentence += _untried(probe, groups)
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
    how = f"frozen {group[0].backbone} features" if group[0].kind == "fit" else f"fine-tuned {group[0].backbone}"
    name = f"{group[0].short_method} ({how})"
    return f"{name}: {_score_text(group)} of {len(group[0].right)} test samples right, after {seconds_text(_cost(group))}."


def _cost(group: Group) -> float:
    return float(statistics.mean(sum(record.seconds.values()) for record in group))


def _probe_alone(probe: Group, groups: Sequence[Group]) -> str:
    """Return what is to be said where no fine-tuning gained."""
    name = f"{probe[0].method} on frozen {probe[0].backbone} features"
    tuned = [group for group in groups if group[0].kind == "finetune"]
    if of_backbone := [group for group in tuned if group[0].backbone == probe[0].backbone]:
        return f"Stay with {name}: fine-tuning ({_methods(of_backbone)}) gained nothing on validation."
    if tuned:  # of other backbones, which tells nothing of this one
        backbones = ", ".join(dict.fromkeys(group[0].backbone for group in tuned))
        gained = f"fine-tuning {backbones} ({_methods(tuned)}) gained nothing there"
        return f"{name} is the best head on validation; {gained}.{_untried(probe, groups)}"
    if any(group[0].kind == "gap" for group in groups):
        return f"{name} is the best head on validation."
    return f"{name} is the best head on validation; nothing was fine-tuned yet."


def _methods(tuned: Sequence[Group]) -> str:
    return ", ".join(dict.fromkeys(group[0].short_method for group in tuned))


def _untried(probe: Group, groups: Sequence[Group]) -> str:
    """Return that nothing of the probe's own backbone was trained, where that is so."""
    backbone = probe[0].backbone
    is_tried = any(group[0].backbone == backbone and group[0].kind in {"finetune", "gap"} for group in groups)
    return "" if is_tried else f" Nothing on {backbone} was fine-tuned yet."


def _verdict(best: Group, probe: Group) -> tuple[str, str]:
    """Return what the intervals say, and the sentence: it pays, or costs, where every seed's lies on that side of zero."""
    gaps = [gap for record in best if (gap := _between(record, probe)) is not None]
    name, price = best[0].short_method, f"{seconds_text(_cost(best))} instead of {seconds_text(_cost(probe))}"
    if not gaps:
        return "noise", f"{name} and {probe[0].method} were not tested on the same samples: they cannot be compared."
    sides = {(gap.ci[0] > 0) - (gap.ci[1] < 0) if gap.ci else 0 for gap in gaps}
    is_same = best[0].backbone == probe[0].backbone
    tuned = "Fine-tuning" if is_same else f"Fine-tuning {best[0].backbone}"
    rival = probe[0].method if is_same else f"{probe[0].method} on frozen {probe[0].backbone} features"
    change = f"{_change(gaps)} to {rival}, for {price}"
    if sides == {1}:
        return "pays", f"{tuned} pays: {name} brings {change}."
    if sides == {-1}:
        return "costs", f"{tuned} is worse here: {name} comes to {change}."
    return "noise", f"{tuned} is not shown to pay: {name} comes to {change}, inside the noise of so few test samples."


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
    names = dict.fromkeys(step.changes for step in steps if step.is_kept and step.changes)
    samples = {name: sum(step.samples for step in steps if step.is_kept and step.changes == name) for name in names}
    parts = [f"{points} from {name}" for name, points in adding_up(samples, count).items()]
    noise = " That is inside the noise of so few test samples." if gap["ci"] and gap["ci"][0] <= 0 <= gap["ci"][1] else ""
    return f"Taken apart, {total}: {', '.join(parts)}.{noise}"


def _of_another_kind(records: Sequence[RunRecord]) -> str:
    told = [f"{record.method}: {test_text(record)}" for record in records if record.kind in {"fit-labels", "fit-number"}]
    return f"{told[-1]}." if told else "There is no score yet."


@dataclass(frozen=True)
class Section:
    """A data set's part of the page."""

    key: str
    answer: Answer
    evidence: DatasetEvidence
    drawings: tuple[tuple[str, Markup, str], ...]
    map: Markup | None
    colours: tuple[tuple[int, str], ...] = field(default=())


def render(
    records: Sequence[RunRecord],
    evidence: Mapping[str, DatasetEvidence],
    sheet: Sheet | None,
    commands: Command,
) -> str:
    """Return the page.

    Jinja escapes what the template prints, and what cannot be seen is spelt out before. A policy in the page's head lets
    nothing be loaded, and nothing run but the one script, known by its hash.

    Args:
        records: of one or several data sets; of a cell the latest counts.
        evidence: by data set.
        sheet: the thumbnails that ``Shown.tile`` means, ``None`` for a page without samples.
        commands: tells how a record is made again.
    """
    assets = resources.files("featcache") / "assets"
    template, style, script = ((assets / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    style += _tile_rules(sheet)
    datasets = list(dict.fromkeys(record.dataset for record in records))
    return _filled_page(
        template,
        style=Markup(style),  # noqa: S704 - of the package, and numbers
        script=Markup(script),  # noqa: S704 - of the package
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
        sections=[_section(f"d{number}", name, records, evidence) for number, name in enumerate(datasets)],
        table=short_table([record for record in records if "accuracy" in record.test]),
        texts=NAMES,
        tiles=sheet is not None,
        environments=_environments(records),
        runs=_runs(records, commands),
        title=f"featcache: {', '.join(datasets)}",
        made=max((record.time for record in records), default=""),
    )


def _filled_page(template: str, **values: object) -> str:
    """Return a template with its values: every text is spelt out where it cannot be seen, and escaped."""
    from jinja2 import Environment, StrictUndefined  # 0.15 s that nothing else pays

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["tiles"] = values["tiles"]  # macros see no other values
    return environment.from_string(template).render(**values)


def _finalized(value: Any) -> Any:
    """Return what a template prints; jinja escapes it after this."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def _policy_hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _tile_rules(sheet: Sheet | None) -> str:
    """Return the sheet and each tile's place as rules of the style: its policy allows no style at an element."""
    if sheet is None:
        return ""
    rules = [f".t,#hover .picture{{{sheet.style}}}\n"]
    for tile in range(sheet.count):
        x, y = sheet.place(tile)
        rules.append(f".t{tile}{{background-position:-{x}px -{y}px}}\n")
    return f"{''.join(rules)}.t,#hover .picture{{width:{TILE}px;height:{TILE}px}}\n"


def _section(key: str, name: str, every: Sequence[RunRecord], behind: Mapping[str, DatasetEvidence]) -> Section:
    records = [record for record in every if record.dataset == name]
    evidence = behind.get(name, DatasetEvidence())
    groups = [group for group in groups_of_seeds(records) if "accuracy" in group[0].test]
    plain = [group for group in groups if group[0].kind in {"fit", "finetune"}]
    drawings = [
        ("Accuracy against cost", costs(plain, f"{key}-cost"), _COST),
        *(
            ("Where the gap comes from", gap_chart(group[-1], f"{key}-gap{number}"), _GAP)
            for number, group in enumerate(groups)
            if group[0].kind == "gap"
        ),
        ("Accuracy by depth", depths_chart(plain, f"{key}-depth"), _DEPTH),
        ("Accuracy by epoch", epochs_chart(tuned_records(plain), f"{key}-epochs"), _EPOCHS),
        *(
            (f"Accuracy by training samples: {name}", learning_chart(points, name, f"{key}-learn{number}"), "")
            for number, (name, points) in enumerate(evidence.learned)
        ),
    ]
    if evidence.bins:
        drawings.append(("Reliability", reliability_chart(evidence.bins, evidence.head, f"{key}-bins"), _BINS))
    return Section(
        key,
        answer_of(records),
        evidence,
        tuple((name, drawing, note) for name, drawing, note in drawings if drawing is not None),
        _map(key, evidence.scatter),
        _colours(evidence.scatter),
    )


_COST = "Bars are 95 % intervals, of several seeds their mean; the dotted line is the best that so many seconds buy."
_GAP = "Each step from what was kept before it; crosses were not better on validation and are not kept."
_DEPTH = "From the last stage to the whole backbone, each with its 95 % interval."
_EPOCHS = "Validation chooses the epoch; where none is better than the start, the start is kept."
_BINS = "Larger dots are of more test samples. Where a head is as often right as it says they lie on the dotted line."


def _map(key: str, scatter: Scatter | None) -> Markup | None:
    if scatter is None:
        return None
    number = {name: min(place, COLOURS - 1) for place, name in enumerate(scatter.classes)}  # what is beyond shares the last
    dots = [
        Dot(x, y, number[shown.label], shown.caption, shown.tile, is_wrong=shown.predicted not in {"", shown.label})
        for (x, y), shown in zip(scatter.places, scatter.shown, strict=True)
    ]
    about = f"{len(dots)} of {scatter.total} samples by their embeddings, on {scatter.how}; ringed ones are test mistakes."
    return map_chart(Chart(f"{key}-map", "Map of the embeddings", about, "", ""), dots)


def _colours(scatter: Scatter | None) -> tuple[tuple[int, str], ...]:
    if scatter is None:
        return ()
    names = list(scatter.classes)
    if len(names) > COLOURS:
        names = [*names[: COLOURS - 1], f"{len(names) - COLOURS + 1} more classes"]
    return tuple(enumerate(names))


def _environments(records: Sequence[RunRecord]) -> list[list[tuple[str, str]]]:
    """Return where records were made, each place once."""
    places: dict[str, list[tuple[str, str]]] = {}
    for record in records:
        told = record.environment
        versions = told.get("versions")
        facts = [(name, str(told[name])) for name in ("platform", "python", "processors", "device", "git") if told.get(name)]
        facts += [(str(name), str(version)) for name, version in versions.items()] if isinstance(versions, dict) else []
        places.setdefault(repr(facts), facts)
    return [facts for facts in places.values() if facts]


def _runs(records: Sequence[RunRecord], commands: Command) -> list[tuple[str, str]]:
    """Return the commands that make the records again, with what each makes."""
    runs: dict[str, list[str]] = {}
    for record in records:
        runs.setdefault(commands(record), []).append(f"{record.dataset}, {record.method}, seed {record.seed}")
    return [(command, "; ".join(dict.fromkeys(made))) for command, made in runs.items()]


def gap_chart(record: RunRecord, key: str) -> Markup | None:
    """Return the waterfall of a gap."""
    steps = steps_of(record)
    if len(steps) < 2:
        return None
    level, bars = 0.0, list[Bar]()
    for step in steps:
        text = f"{step.accuracy:.1f}" if not bars else f"{step.accuracy - level:+.1f}"
        colour = _COLOUR_OF.get(step.changes, 9)
        bars.append(Bar(step.name, level, step.accuracy, text, colour, is_kept=step.is_kept))
        level = step.accuracy if step.is_kept else level
    about = "; ".join(f"{bar.name} {bar.text}{'' if bar.is_kept else ' (not kept)'}" for bar in bars)
    names = tuple(step.name for step in steps)
    return waterfall(Chart(key, "Where the gap comes from", about, "", "test accuracy, %", names), bars)


def costs(groups: Sequence[Sequence[RunRecord]], key: str) -> Markup | None:
    """Return accuracy against cost, a point for each row of the table."""
    points = [_cost_point(group) for group in groups]
    if not points:
        return None
    about = "; ".join(point.title for point in points)
    chart = Chart(key, "Accuracy against cost", about, "seconds, extraction included (log scale)", "test accuracy, %")
    return cost_chart(chart, points)


def _cost_point(group: Sequence[RunRecord]) -> Mark:
    seconds = statistics.mean(sum(record.seconds.values()) for record in group)
    accuracy = statistics.mean(100 * record.test["accuracy"] for record in group)
    low, high = _mean_interval(group)
    first = group[0]
    title = f"{first.short_method} on {first.backbone}: {accuracy:.1f} % in {seconds:.0f} s"
    return Mark(max(seconds, 1e-2), accuracy, low, high, first.short_method, title, 3 if first.kind == "finetune" else 0)


def _mean_interval(group: Sequence[RunRecord]) -> tuple[float | None, float | None]:
    """Return the mean of seeds' intervals: what one run is uncertain by, which seeds make no smaller."""
    intervals = [record.test["accuracy_ci"] for record in group if record.test.get("accuracy_ci")]
    if not intervals:
        return None, None
    low, high = (100 * statistics.mean(interval[side] for interval in intervals) for side in (0, 1))
    return low, high


def depths_chart(groups: Sequence[Sequence[RunRecord]], key: str) -> Markup | None:
    """Return test accuracy by how many stages were trained, beside the probe's."""
    by_backbone: dict[str, list[Sequence[RunRecord]]] = {}
    for group in groups:
        if group[0].kind == "finetune" and not math.isnan(depth_of(group[0].short_method)):
            by_backbone.setdefault(group[0].backbone, []).append(group)
    lines = {backbone: swept for backbone, swept in by_backbone.items() if len({each[0].short_method for each in swept}) > 1}
    names = sorted({each[0].short_method for swept in lines.values() for each in swept}, key=depth_of)
    if not names:
        return None
    place = {name: 1.0 + number for number, name in enumerate(names)}
    series = [
        Series(backbone, _depth_points(swept, place, colour), colour)
        for colour, (backbone, swept) in enumerate(list(lines.items())[:_MOST_LINES])
    ]
    about = "; ".join(point.title for each in series for point in each.points)
    chart = Chart(key, "Accuracy by depth", about, "what was trained", "test accuracy, %", ("probe", *names))
    return line_chart(chart, series, percent=True)


def _depth_points(swept: Sequence[Sequence[RunRecord]], place: dict[str, float], colour: int) -> tuple[Mark, ...]:
    points = []
    for group in sorted(swept, key=lambda each: depth_of(each[0].short_method)):
        accuracy = statistics.mean(100 * record.test["accuracy"] for record in group)
        name = group[0].short_method
        points.append(Mark(place[name], accuracy, *_mean_interval(group), title=f"{name} {accuracy:.1f} %", colour=colour))
    probe = swept[0][0].probe
    if probe is not None and isinstance(probe.get("test"), dict) and isinstance(probe["test"].get("accuracy"), float):
        accuracy = 100 * probe["test"]["accuracy"]
        points.insert(0, Mark(0.0, accuracy, title=f"probe ({probe.get('head')}) {accuracy:.1f} %", colour=colour))
    return tuple(points)


def epochs_chart(records: Sequence[RunRecord], key: str) -> Markup | None:
    """Return accuracy over the epochs of fine-tuning: training dashed, validation with the epoch that was kept ringed."""
    series: list[Series] = []
    for colour, record in enumerate(records[:_MOST_TRAINED]):
        validation, training = _epochs(record, 3), _epochs(record, 1)
        if len(validation) < 2:
            continue
        best = record.params.get("best_epoch")
        name = record.short_method if record.seed == 0 else f"{record.short_method}, seed {record.seed}"
        series += [
            Series(name, _at_epochs(validation, colour, name), colour, ringed=best if isinstance(best, int) else None),
            Series("", _at_epochs(training, colour, f"{name}, training"), colour, is_dashed=True),
        ]
    if not series:
        return None
    about = "; ".join(f"{each.name}: {each.points[-1].y:.1f} % at the end" for each in series if each.name)
    chart = Chart(key, "Accuracy by epoch", about, "epoch (dashed: training; ringed: kept)", "validation accuracy, %")
    return line_chart(chart, series, percent=True)


def _epochs(record: RunRecord, column: int) -> list[tuple[int, float]]:
    """Return a column of a fine-tuning's curve in percent; what is no number is left out, as training's before it began."""
    curve: Any = record.params.get("curve")
    rows = curve if isinstance(curve, list) else []
    cells = [(epoch, row[column]) for epoch, row in enumerate(rows) if isinstance(row, list) and len(row) > column]
    return [(epoch, 100.0 * cell) for epoch, cell in cells if isinstance(cell, int | float) and math.isfinite(cell)]


def _at_epochs(values: Sequence[tuple[int, float]], colour: int, name: str) -> tuple[Mark, ...]:
    return tuple(Mark(float(epoch), y, title=f"{name}, epoch {epoch}: {y:.1f} %", colour=colour) for epoch, y in values)


def reliability_chart(bins: Sequence[Bin], name: str, key: str) -> Markup:
    """Return accuracy by confidence; on the diagonal a head is as often right as it says."""
    total = sum(each.count for each in bins)
    points = tuple(
        Mark(
            each.confidence,
            each.accuracy,
            title=f"{each.count} samples: {each.confidence:.0f} % sure, {each.accuracy:.0f} % right",
            radius=2 + 7 * math.sqrt(each.count / total),
        )
        for each in bins
    )
    about = f"{name}: {'; '.join(point.title for point in points)}"
    chart = Chart(key, "Reliability", about, "how sure, %", "right, %")
    return line_chart(chart, [Series("", points)], percent=True, diagonal=True)


def learning_chart(points: Sequence[Learned], name: str, key: str) -> Markup:
    """Return test accuracy by the number of training samples, on a log scale."""
    drawn = tuple(
        Mark(
            float(each.samples),
            each.mean,
            each.mean - each.std,
            each.mean + each.std,
            title=f"{each.samples} samples: {each.mean:.1f} % ± {each.std:.1f}",
        )
        for each in points
    )
    about = f"{name}: {'; '.join(point.title for point in drawn)}"
    chart = Chart(
        key,
        "Accuracy by training samples",
        about,
        "training samples (log scale; bars: ± 1 std of draws)",
        "test accuracy, %",
    )
    return line_chart(chart, [Series("", drawn)], percent=True, is_log=True)


def tuned_records(groups: Sequence[Sequence[RunRecord]]) -> list[RunRecord]:
    """Return the fine-tunings whose epochs are worth a look: the first seed of each, those that gained first."""
    firsts = [group[0] for group in groups if group[0].kind == "finetune"]
    return sorted(firsts, key=lambda record: (has_no_gain(record), -record.val["accuracy"]))
