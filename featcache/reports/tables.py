"""Run records side by side: tables for people and programs, pictures of fine-tuning, and one record beside another.

A run that was done again is held against its record, and own rows against published ones.
"""

import csv
import io
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from tabulate import tabulate

from featcache.display import Displayed, Table, booktabs, csv_cell, markdown_cell, printable
from featcache.errors import DataError, SetupError, UsageError
from featcache.evaluation.intervals import of_accuracy
from featcache.evaluation.metrics import Gap, decode_correct, paired_gap
from featcache.reports import RunRecord, as_read
from featcache.store.disk import make_folder, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "dataset",
    "backbone",
    "head or unfreeze",
    "test accuracy %",
    "95 % interval or std",
    "gap to best probe, points",
    "gap interval or std",
    "gap p",
    "extract s",
    "fit or train s",
    "samples/s",
)
NAMES = 3  # columns of names, which a stranger may have given; in the others are numbers


_GAP_NOTE = "gap: points of test accuracy to the head that is best on validation, on the same samples"
# Where no epoch gained, the probe is the answer: a gap of +0.0 would read as a measured tie.
NO_GAIN = "no gain on validation"
_OTHER_VALIDATION = (
    "validation: of fine-tunings on the val part; of heads, where few samples train, on folds of train and val: between the "
    "two compare test"
)
Verdict = Literal["same", "within tolerance", "differs", "not run"]
# What names the experiment and its samples: another value is another experiment, whatever computed it.
_NAMES = ("kind", "backbone", "method", "cut", "seed", "cell", "feature_key", "split", "test_items", "artefact")
# Records of before lack some of these, or name a default otherwise; what their request asks for is in the cell too.
_SINCE_PROTOCOL = ("protocol", "source", "request", "test_groups", "copies")
_OUTCOME = ("val", "test", "right", "params", "probe", "gap", "notes")
_TIMED = frozenset({"seconds", "curve"})  # inside of an outcome: told, not compared; a curve's losses are compared apart
_DIGITS = 1e-4  # relative: an optimum is found to a stated distance, and threads may add up a sum in another order
_HEAD_SHARE = 0.01  # of test samples that a head may answer otherwise where something rounds otherwise
_FEWEST = 2  # samples: fewer prove nothing
_PRIMARY = ("accuracy", "mean_average_precision", "r2")
_TOLD = 3  # differences in a line of a table
_MOST_TEXT = 60


@dataclass(frozen=True)
class _Group:
    """The records of one table row: the same experiment under several seeds; ``method`` tells it from other rows."""

    records: tuple[RunRecord, ...]
    method: str

    @property
    def first(self) -> RunRecord:
        return self.records[0]


def rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return the table's cells as text, in the order of the records' first appearance; of a cell the latest counts.

    Gaps are to the head that did best on validation for the same data set, backbone, groups and seed, among the table's
    and those that fine-tuning was compared with itself; records with other test items are not compared.
    """
    latest, groups = latest_of(records), groups_of_seeds(records)
    return [_row(_Group(group, name), latest) for group, name in zip(groups, _row_methods(groups), strict=True)]


def latest_of(records: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    """Return of each data set's cells the last run, as a rerun is meant to replace."""
    # a cell is of contents: a copy under another name has the same, and rows of its own
    return tuple({(record.dataset, record.cell): record for record in records}.values())


def groups_of_seeds(records: Sequence[RunRecord]) -> list[tuple[RunRecord, ...]]:
    """Return the records of each row of a table: one experiment under its seeds, of each cell the last run."""
    by_row: dict[tuple[str, ...], list[RunRecord]] = {}
    for record in latest_of(records):
        name = (record.dataset, record.backbone, record.kind, record.method, _without_seed(record))
        by_row.setdefault(name, []).append(record)
    return [tuple(group) for group in by_row.values()]


def markdown(records: Sequence[RunRecord]) -> str:
    """Return the table in Markdown."""
    escaped = [[markdown_cell(cell) for cell in row] for row in rows(records)]
    return tabulate(escaped, headers=COLUMNS, tablefmt="pipe", disable_numparse=True)


def latex(records: Sequence[RunRecord]) -> str:
    """Return the table in LaTeX, by the rules of booktabs."""
    return booktabs(COLUMNS, rows(records), NAMES)


def short_table(records: Sequence[RunRecord]) -> Table:
    """Return the table for a terminal or a notebook, in fewer columns: a paper's p-values are in the file."""
    headers = (
        "dataset",
        "backbone",
        "method",
        "test %",
        "95 % or ± std",
        "gap",
        "gap 95 % or ± std",
        "extract s",
        "train s",
        "samples/s",
    )
    latest = latest_of(records)
    cells, groups = [], groups_of_seeds(records)
    for group in map(_Group, groups, _row_methods(groups)):
        row = _row(group, latest)
        cells.append((*row[:5], f"{row[5]}{_to_own_probes(group, latest)}", row[6], *row[8:]))
    return Table(headers, cells, note=_GAP_NOTE)


def to_csv(records: Sequence[RunRecord]) -> str:
    """Return the table as CSV; a cell that a spreadsheet would run as a formula is quoted with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows(records):
        # Only names can begin with =, + or -: numbers such as a gap of -0.5 must stay numbers.
        writer.writerow([csv_cell(printable(cell)) if index < NAMES else cell for index, cell in enumerate(row)])
    return out.getvalue()


def _without_seed(record: RunRecord) -> str:
    """Return what else tells rows apart; given test splits are one set of items under every seed, drawn ones are not."""
    # Everything that was asked for, the seed apart: rows of other settings are never averaged.
    return repr(sorted(record.request.items(), key=lambda pair: pair[0]))


def _row_methods(groups: Sequence[tuple[RunRecord, ...]]) -> list[str]:
    """Return what rows call their methods: those that would look alike with what was asked for otherwise, such as a grid."""
    asked: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for first, *_ in groups:
        asked.setdefault((first.dataset, first.backbone, first.method), []).append(_in_words(first.request))
    common = {name: set.intersection(*(set(each.items()) for each in alike)) for name, alike in asked.items()}
    methods = []
    for first, *_ in groups:
        of_all = common[first.dataset, first.backbone, first.method]
        told = [text for place, text in _in_words(first.request).items() if text and (place, text) not in of_all]
        methods.append(f"{first.method} ({', '.join(told)})" if told else first.method)
    return methods


def _in_words(request: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return in words what was asked for, by its place in a request; what was turned off is a "no", nothing is nothing."""
    flat: dict[str, str] = {}
    for name, value in request.items():
        if isinstance(value, dict):
            flat |= _in_words(value, f"{prefix}{name}.")
        else:
            words = name.replace("_", " ")
            flat[f"{prefix}{name}"] = (
                (words if value else f"no {words}") if isinstance(value, bool) else _asked(words, value)
            )
    return flat


def _asked(words: str, value: Any) -> str:
    if value is None or value in ([], ()):
        return ""
    if isinstance(value, list | tuple):
        pairs = all(isinstance(each, list | tuple) and len(each) == 2 for each in value)
        listed = [_asked("", each).strip() for each in value]
        value = " ".join(f"{name}={_asked('', of).strip()}" for name, of in value) if pairs else ",".join(listed)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return f"{words} {_in_short(text.removeprefix('sha256:')[:8] if text.startswith('sha256:') else text)}"


def _row(group: _Group, records: Sequence[RunRecord]) -> list[str]:
    first = group.first
    accuracies = [100 * record.test["accuracy"] for record in group.records]
    if len(set(accuracies)) == 1:  # of seeds that all answer the same, a deviation of 0 would tell nothing
        interval = first.test["accuracy_ci"]
        alike = f" ({len(accuracies)} seeds alike)" if len(accuracies) > 1 else ""
        spread = f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}{alike}" if interval else f"-{alike}"
    else:
        spread = f"± {statistics.stdev(accuracies):.2f} ({len(accuracies)} seeds)"
    points, gap_spread, p_value = _gap_cells(group, records)
    speeds = [record.samples_per_second for record in group.records if record.samples_per_second]
    return [
        first.dataset,
        first.backbone,
        group.method,
        f"{statistics.mean(accuracies):.1f}",
        spread,
        points,
        gap_spread,
        p_value,
        f"{max(record.seconds['extract'] for record in group.records):.1f}",
        f"{statistics.mean(_trained(record) for record in group.records):.1f}",
        f"{max(speeds):.0f}" if speeds else "-",
    ]


def _trained(record: RunRecord) -> float:
    """Return the seconds of fitting or training; of what goes on from another, without those."""
    return record.seconds["fit"] if "fit" in record.seconds else record.seconds["train"]


def _gap_cells(group: _Group, records: Sequence[RunRecord]) -> tuple[str, str, str]:
    idle = [record for record in group.records if has_no_gain(record)]
    if len(idle) == len(group.records):
        return (NO_GAIN, "-", "-")
    compared = [between for record in group.records if (between := _gap(record, records)) is not None]
    if not compared:
        return ("-", "-", "-")
    if len(group.records) == 1:
        only = compared[0]
        return (f"{only.points:+.1f}", signed_interval(only.ci, "-"), f"{only.p_value:.2g}")
    points = [between.points for between in compared]
    count = f" ({len(points)} seed{'s' if len(points) > 1 else ''})" if len(points) < len(group.records) else ""
    none = f" (no gain in {len(idle)} of {len(group.records)})" if idle else ""
    spread = f"± {statistics.stdev(points):.2f}" if len(points) > 1 else "-"
    return (f"{statistics.mean(points):+.1f}{none}", f"{spread}{count}", "-")


def has_no_gain(record: RunRecord) -> bool:
    """Tell whether no epoch of a fine-tuning was better on validation than where it started, so that this is its answer."""
    return record.kind == "finetune" and record.params.get("best_epoch") == 0


def _gap(record: RunRecord, records: Sequence[RunRecord]) -> Gap | None:
    """Return a record's gap to the best probe; where no epoch gained, the probe is kept, and the gap is none."""
    if has_no_gain(record) and (record.probe or {}).get("start", "logistic") == "logistic":
        return Gap(0.0, None, 1.0)
    rival = _rival(record, records)
    if rival is None and _has_own_gap(record):
        assert record.gap is not None
        return Gap(record.gap["points"], record.gap["ci"], record.gap["p_value"])
    if rival is None or rival.cell == record.cell:
        return None
    return between_records(record, rival)


def _rival(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the table's head that a record is compared with; ``None`` where none is as good as the record's own probe."""
    rival = _best_probe(record, records)
    if rival is None or not _has_own_gap(record):
        return rival
    # of equals the table's: with its answers at hand the gaps of all rows are to one head
    is_weaker = rival.val["accuracy"] < (record.probe or {}).get("val", {}).get("accuracy", -1.0)
    return None if is_weaker or not 0 < len(record.right) == len(rival.right) else rival


def _has_own_gap(record: RunRecord) -> bool:
    """Tell whether a record has a gap to the best of heads that it names; records of before do not name them."""
    return record.gap is not None and "of" in (record.probe or {})


def _to_own_probes(group: _Group, records: Sequence[RunRecord]) -> str:
    """Return the own probes that gaps are to where no row here is as good; nothing where all are to the table's best."""
    compared = [record for record in group.records if _has_own_gap(record) and _rival(record, records) is None]
    names = " or ".join(dict.fromkeys(str((record.probe or {}).get("head")) for record in compared))
    if len(compared) in {0, len(group.records)}:
        return names and f" to {names}"
    return f" ({len(compared)} seed{'s' if len(compared) > 1 else ''} to {names})"


def between_records(record: RunRecord, rival: RunRecord) -> Gap | None:
    """Return how much better one is than another, sample by sample; ``None`` where they were tested on other samples."""
    right, groups = decode_correct(record.right), record.test_groups
    if len(right) != len(rival.right) or not len(right):
        return None
    known_groups = np.array(groups) if groups is not None and len(groups) == len(right) else None
    return paired_gap(right, decode_correct(rival.right), groups=known_groups)


def signed_interval(interval: Sequence[float] | None, otherwise: str) -> str:
    """Return the interval of a gap in points, each end with its sign; ``otherwise`` where there is none."""
    return f"{interval[0]:+.1f} to {interval[1]:+.1f}" if interval else otherwise


def _best_probe(record: RunRecord, records: Sequence[RunRecord]) -> RunRecord | None:
    """Return the head that did best on validation among those tested on the same samples under the same seed."""
    rivals = [
        rival
        for rival in records
        if rival.kind == "fit"
        and (rival.dataset, rival.seed, rival.test_items) == (record.dataset, record.seed, record.test_items)
        and all(rival.request.get(name) == record.request.get(name) for name in ("backbone", "group"))
    ]
    # By validation, never by test; a tie goes to logistic, from which fine-tuning starts.
    return max(rivals, key=lambda rival: (rival.val["accuracy"], rival.method == "logistic"), default=None)


_FORMATS = ("png", "svg", "pdf")
_LEGEND_COLUMNS = 6


def require_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is computed for it.

    Raises:
        UsageError: its format is none that is known.
        SetupError: matplotlib is not installed.
    """
    if path.suffix.removeprefix(".") not in _FORMATS:
        raise UsageError(f"{path}: pictures end in {', '.join(f'.{name}' for name in _FORMATS)}.")
    new_figure(1)


def draw_records(records: Sequence[RunRecord], path: Path) -> Path:
    """Draw fine-tuning records: loss and accuracy over the epochs, and test accuracy against seconds beside the probe.

    Args:
        records: of fine-tuning runs on the same samples.
        path: of the picture; its suffix says which format.

    Raises:
        UsageError: the format is none that is known.
        SetupError: matplotlib is not installed.
        StorageError: the disk failed.
    """
    require_picture(path)
    figure = new_figure(3)
    losses, accuracies, prices = figure.subplots(1, 3)
    for number, record in enumerate(records):
        colour = f"C{number}"
        _draw_curve(losses, record, colour, train=0, val=2)
        _draw_curve(accuracies, record, colour, train=1, val=3, scale=100)
        _point(prices, sum(record.seconds.values()), record.test, record.short_method, colour)
    first = records[0]
    if first.probe is not None:
        _point(prices, sum(first.probe["seconds"].values()), first.probe["test"], f"probe ({first.probe['head']})", "black")
    smoothing = first.params.get("curve_smoothing", first.request.get("plan", {}).get("label_smoothing", 0.0))
    _label_axes(losses, accuracies, prices, smoothing)
    # below all panels, whose colours are the same: nothing is drawn over data
    figure.legend(*prices.get_legend_handles_labels(), loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize="small")
    figure.suptitle(f"{first.dataset}, {first.backbone}")
    return save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> Path:
    """Write a figure in the format that the path's suffix names, whole or not at all.

    Raises:
        StorageError: the disk failed.
    """
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=120)
    make_folder(path.parent)
    replace_file(path, content.getvalue())
    return path


def _label_axes(losses: Any, accuracies: Any, prices: Any, smoothing: float) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    smoothed = f", labels smoothed by {smoothing:g}" if smoothing else ""
    losses.set(xlabel="epoch (ringed: kept)", ylabel=f"loss (dotted: training{smoothed})")
    accuracies.set(xlabel="epoch (ringed: kept)", ylabel="accuracy, % (dotted: training)")
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
    prices.set(xlabel="seconds, extraction included", ylabel="test accuracy, % (95 % interval)", xscale="log")
    prices.margins(0.15)
    prices.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # more labels run into each other
    prices.xaxis.set_major_formatter("{x:g}")  # 50, not 5 x 10^1
    prices.xaxis.set_minor_formatter(NullFormatter())
    for axes in (losses, accuracies, prices):
        axes.grid(alpha=0.3)


def _draw_curve(axes: Any, record: RunRecord, colour: str, *, train: int, val: int, scale: float = 1) -> None:
    """Draw two columns of a record's curve: training dotted, validation with the best epoch ringed."""
    curve, best = record.params["curve"], record.params["best_epoch"]
    for column, style, name in ((val, "-", record.short_method), (train, ":", None)):
        # Epoch 0 is the start, on which nothing was trained: its training columns are null.
        values = [float("nan") if epoch[column] is None else epoch[column] * scale for epoch in curve]
        axes.plot(range(len(curve)), values, style, color=colour, label=name, marker="o", markersize=3)
        if column == val and best < len(values):
            axes.plot(best, values[best], "o", color=colour, markersize=9, fillstyle="none")


def _point(axes: Any, seconds: float, test: dict[str, Any], name: str, colour: str) -> None:
    accuracy, interval = 100 * test["accuracy"], test["accuracy_ci"]
    spread = [[accuracy - 100 * interval[0]], [100 * interval[1] - accuracy]] if interval else None
    axes.errorbar(max(seconds, 1e-3), accuracy, yerr=spread, fmt="o", color=colour, label=name, capsize=3)


def new_figure(panels: float) -> "Figure":
    """Return an empty figure for so many panels side by side.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("pictures need matplotlib: `pip install 'featcache[plot]'`.") from None
    # Without pyplot: no window system is asked for, and no global state is left behind.
    return Figure(figsize=(5 * panels, 4), layout="constrained")


@dataclass(frozen=True)
class Replayed:
    """A record and what running it again gave.

    Attributes:
        record: as it was read.
        again: of the second run; ``None`` where it could not be run.
        verdict: ``same``: every number agrees; ``within tolerance``: libraries or machine are others, and scores are as near
            as these explain; ``differs``; ``not run``.
        differences: which fields are not equal, with both values, or why it was not run.
        elsewhere: what of the environment is not the same, or was not recorded.
    """

    record: RunRecord
    again: RunRecord | None
    verdict: Verdict
    differences: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether the second run confirms the record."""
        return self.verdict in {"same", "within tolerance"}

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``replayed`` of ``featcache bench``."""
        return {
            "cell": self.record.cell,
            "dataset": self.record.dataset,
            "backbone": self.record.backbone,
            "method": self.record.method,
            "seed": self.record.seed,
            "verdict": self.verdict,
            "differences": list(self.differences),
            "elsewhere": list(self.elsewhere),
            "recorded": self.record.test,
            "replayed": None if self.again is None else self.again.test,
            "seconds": {"recorded": self.record.seconds, "replayed": None if self.again is None else self.again.seconds},
        }


@dataclass(frozen=True, repr=False)
class ReplayResult(Displayed):
    """Records that were run again, in their order."""

    replayed: tuple[Replayed, ...]

    @property
    def agrees(self) -> bool:
        """Whether every record was run again and confirmed."""
        return all(each.agrees for each in self.replayed)

    @property
    def counts(self) -> dict[Verdict, int]:
        """How many records came to each verdict that occurs."""
        verdicts = [each.verdict for each in self.replayed]
        return {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)}

    def table(self) -> Table:
        """Return a row a record: both test scores, both costs, and whether it is confirmed."""
        headers = ("dataset", "backbone", "method", "seed", "recorded %", "again %", "recorded s", "again s", "verdict")
        rows = [
            (
                *(str(getattr(each.record, name)) for name in ("dataset", "backbone", "method", "seed")),
                *(_percent(record) for record in (each.record, each.again)),
                *(_spent(record) for record in (each.record, each.again)),
                each.verdict,
            )
            for each in self.replayed
        ]
        return Table(headers, rows, note=", ".join(f"{count} {verdict}" for verdict, count in self.counts.items()))

    @property
    def lines(self) -> list[str]:
        """What is to be said of single records: why one was not run, which fields differ."""
        lines = []
        for each in self.replayed:
            record = each.record
            name = f"{record.dataset}, {record.backbone}, {record.method}, seed {record.seed}"
            more = len(each.differences) - _TOLD
            told = "; ".join(each.differences[:_TOLD]) + (f"; and {more} more" if more > 0 else "")
            older = each.again is not None and each.again.protocol != record.protocol
            why = [f"recorded under protocol {record.protocol or 'of before they were numbered'}"] if older else []
            where = f" ({', '.join([*why, *each.elsewhere[:_TOLD]])})" if each.verdict == "differs" else ""
            lines += [f"{name}: {told}{where}"] if told else []
        return lines

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of a replay."""
        return {"replayed": [each.summary for each in self.replayed], "counts": self.counts, "agrees": self.agrees}


def compare_again(record: RunRecord, again: RunRecord) -> Replayed:
    """Hold what a second run gave against the record.

    What names the experiment, its samples and counts must be equal in any case. Where code, libraries, runtime and processor
    are those of the record, so must every answer and choice, and other numbers to 1e-4 of their size. Where one of these
    is another, or was not recorded, the accuracies of validation and test must be within one standard error and two samples
    of the recorded ones, and a head (which is an optimum, no training) may answer 1 % of the test samples, at least two,
    otherwise. Seconds, memory and dates are not compared.
    """
    again = as_read(again)
    elsewhere = tuple(_elsewhere(record.environment, again.environment))
    wrong = [*_contradictions(record), *_names_that_differ(record, again)]
    outcome = list(_outcomes_that_differ(record, again))
    differences = (*wrong, *outcome)
    if not differences:
        return Replayed(record, again, "same", (), elsewhere)
    if wrong or not elsewhere or not _is_near(record, again):
        return Replayed(record, again, "differs", differences, elsewhere)
    return Replayed(record, again, "within tolerance", differences, elsewhere)


def _contradictions(record: RunRecord) -> Iterator[str]:
    """Yield what a record says against itself: its scores follow from its answers."""
    right = decode_correct(record.right)
    if bool(record.protocol) != bool(record.source):  # they came together
        yield f"protocol: {record.protocol}, and source {_in_short(record.source)}"
    if record.right.strip("01"):
        yield f"right: {_in_short(record.right)} is not of 0 and 1"
    elif len(right) and len(right) != record.split.get("test"):
        yield f"right: {len(right)} answers to {record.split.get('test')} test samples"
    elif len(right) and not _equal(record.test.get("accuracy"), float(right.mean())):
        yield f"test.accuracy: {_in_short(record.test.get('accuracy'))}, but {right.mean():.6g} of the answers are right"
    elif len(right) and record.protocol:  # intervals of before were other ones
        groups = None if record.test_groups is None else np.array(record.test_groups)
        interval = None if groups is not None and len(groups) != len(right) else of_accuracy(right, groups)
        told = record.test.get("accuracy_ci")
        if not _equal(told, None if interval is None else list(interval)):
            yield f"test.accuracy_ci: {_in_short(told)}, but of these answers it is {_in_short(interval)}"


def _names_that_differ(record: RunRecord, again: RunRecord) -> Iterator[str]:
    """Yield which of the fields that name an experiment are not equal."""
    names = (*_NAMES, *_SINCE_PROTOCOL) if record.protocol else _NAMES
    # two data sets of one name have a suffix each, by where they lie
    if again.dataset not in {record.dataset, record.dataset.rpartition("-")[0]}:
        yield f"dataset: {_in_short(record.dataset)} recorded, {_in_short(again.dataset)} again"
    for name in names:
        ours, theirs = _as_list(getattr(record, name)), _as_list(getattr(again, name))
        if name == "artefact":  # below the data set's folder, whatever that is called
            ours, theirs = ours.partition("/")[2], theirs.partition("/")[2]
        yield from _differing(name, ours, theirs)


def _outcomes_that_differ(record: RunRecord, again: RunRecord) -> Iterator[str]:
    """Yield which results are not equal."""
    for name in _OUTCOME:
        yield from _differing(name, _as_list(getattr(record, name)), _as_list(getattr(again, name)))
    curves = ([epoch[:-1] for epoch in each.params.get("curve", ())] for each in (record, again))  # the last are seconds
    yield from _differing("params.curve", *curves)


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _differing(name: str, recorded: Any, again: Any) -> Iterator[str]:
    """Yield the paths below a field at which two values of JSON are not equal, with both."""
    if isinstance(recorded, dict) and isinstance(again, dict):
        for key in sorted({*map(str, recorded), *map(str, again)} - _TIMED):
            ours, theirs = ({str(name): value for name, value in each.items()} for each in (recorded, again))
            yield from _differing(f"{name}.{key}", ours.get(key), theirs.get(key))
    elif not _equal(recorded, again):
        values = f"{_in_short(recorded)} recorded, {_in_short(again)} again"
        if name == "right" and isinstance(recorded, str) and len(recorded) == len(again):
            values = f"{_flips(recorded, again)} of {len(again)} answers are others"
        yield f"{name}: {values}"


def _equal(recorded: Any, again: Any) -> bool:
    if isinstance(recorded, list | tuple) and isinstance(again, list | tuple):
        return len(recorded) == len(again) and all(map(_equal, recorded, again))
    if isinstance(recorded, float) and isinstance(again, float | int):
        return math.isclose(recorded, again, rel_tol=_DIGITS, abs_tol=_DIGITS)
    return type(recorded) is type(again) and bool(recorded == again)


def _in_short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}..."


def _flips(recorded: str, again: str) -> int:
    return sum(first != second for first, second in zip(recorded, again, strict=True))


def _is_near(record: RunRecord, again: RunRecord) -> bool:
    """Tell whether another rounding may be all that lies between two records of one experiment."""
    is_head = record.kind.startswith("fit") and not record.method.startswith("attentive")
    samples = again.split["test"]
    answered = is_head and len(record.right) == len(again.right)
    if answered and _flips(record.right, again.right) > max(_FEWEST, _HEAD_SHARE * samples):
        return False
    for part, of in (("val", again.split["val"]), ("test", samples)):
        recorded, replayed = (_primary(getattr(each, part)) for each in (record, again))
        if recorded is None or replayed is None:
            return False
        # the spread of a share among so many samples: what another training, or another machine's rounding, may move it by
        error = math.sqrt(max(replayed * (1 - replayed), 0) / max(of, 1))
        if abs(recorded - replayed) > max(_FEWEST / max(of, 1), _HEAD_SHARE if is_head else error) + _DIGITS:
            return False
    return True


def _primary(scores: dict[str, Any]) -> float | None:
    value = next((scores[name] for name in _PRIMARY if name in scores), None)
    return float(value) if isinstance(value, float | int) else None


# by featcache's code is meant what its files hold: between two releases a solver's last digits may move
_ROUNDING = ("code", "python", "processors", "cpu", "device", "runtime")


def _elsewhere(recorded: dict[str, Any], here: dict[str, Any]) -> Iterator[str]:
    """Yield what may round otherwise here than where a record was made, or is not known of there."""
    then_installed, installed = recorded.get("versions", {}), here.get("versions", {})
    libraries = sorted({*then_installed, *installed} - {"featcache"})
    pairs = [(name, then_installed.get(name), installed.get(name)) for name in libraries]
    pairs += [(name, recorded.get(name), here.get(name)) for name in _ROUNDING]
    for name, then, now in pairs:
        if then is None:
            yield f"{name} not recorded"
        elif then != now:
            yield f"{name} {_in_short(then)}, here {_in_short(now)}"


def _percent(record: RunRecord | None) -> str:
    score = None if record is None else _primary(record.test)
    return "-" if score is None else f"{100 * score:.2f}"


def _spent(record: RunRecord | None) -> str:
    return "-" if record is None else f"{sum(record.seconds.values()):.1f}"


@dataclass(frozen=True, repr=False)
class AgainstResult(Displayed):
    """Own records beside published ones of the same key, and what was refused.

    Attributes:
        records: own ones that have published ones to stand beside.
        published: those, of all keys.
        refused: of own records without, what makes each unlike.
    """

    records: tuple[RunRecord, ...]
    published: tuple[RunRecord, ...]
    refused: tuple[str, ...] = ()

    def gap(self, record: RunRecord) -> Gap | None:
        """Return what an own record is ahead of the published one that is best on validation, sample by sample."""
        rival = self.rival(record)
        return None if rival is None else between_records(record, rival)

    def rival(self, record: RunRecord) -> RunRecord | None:
        """Return the published record that an own one is held against: the best on validation, of its seed if any."""
        alike = [each for each in self.published if _key(each) == _key(record)]
        of_seed = [each for each in alike if each.seed == record.seed] or alike
        return max(of_seed, key=lambda each: _primary(each.val) or 0.0, default=None)

    def table(self) -> Table:
        """Return own and published rows of each key together, the best on validation first."""
        headers = ("whose", "dataset", "backbone", "method", "seed", "validation %", "test %", "ahead of published", "95 %")
        rows = []
        for key in dict.fromkeys(map(_key, self.records)):
            group = [("own", record) for record in self.records if _key(record) == key]
            group += [("published", record) for record in self.published if _key(record) == key]
            for whose, record in sorted(group, key=lambda each: -(_primary(each[1].val) or 0.0)):
                rows.append((whose, *self._cells(record, is_own=whose == "own")))
        notes = ["ahead: points of the published row that is best on validation, on the same samples"]
        if len({record.kind for record in (*self.records, *self.published)}) > 1:
            notes.append(_OTHER_VALIDATION)
        return Table(headers, rows, note="\n".join((*notes, *(f"not compared: {reason}" for reason in self.refused))))

    def _cells(self, record: RunRecord, *, is_own: bool) -> tuple[str, ...]:
        names = (record.dataset, record.backbone, record.method, str(record.seed))
        scores = tuple(
            "-" if (value := _primary(part)) is None else f"{100 * value:.1f}" for part in (record.val, record.test)
        )
        between = self.gap(record) if is_own else None
        points = "" if between is None else f"{between.points:+.1f}"
        interval = "" if between is None else signed_interval(between.ci, "")
        return (*names, *scores, points, interval)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of a comparison with published records."""
        rows = []
        for record in self.records:
            between, rival = self.gap(record), self.rival(record)
            rows.append(
                {
                    "cell": record.cell,
                    "published_cell": None if rival is None else rival.cell,
                    "test": record.test,
                    "published": None if rival is None else rival.test,
                    "gap": None if between is None else asdict(between),
                }
            )
        return {"compared": rows, "refused": list(self.refused)}


def compare_with_published(records: Sequence[RunRecord], published: Sequence[RunRecord]) -> AgainstResult:
    """Put own records beside published ones of the same samples, split, metric and protocol; others are refused.

    Raises:
        DataError: no own record has a published one that it may stand beside.
    """
    keys = {_key(record) for record in published}
    alike = tuple(record for record in records if _key(record) in keys)
    refused = tuple(dict.fromkeys(_unlike(record, published) for record in records if _key(record) not in keys))
    if not alike:
        reasons = " ".join(f"{reason}." for reason in refused) or "There is no own record."
        raise DataError(f"nothing is comparable with the published records: {reasons}")
    theirs = {_key(record) for record in alike}
    return AgainstResult(alike, tuple(record for record in published if _key(record) in theirs), refused)


def _key(record: RunRecord) -> tuple[str, tuple[tuple[str, int], ...], str, int]:
    """Return what two records must share: test samples and labels, sizes of the parts, the score, the protocol."""
    metric = next((name for name in _PRIMARY if name in record.test), "")
    return record.test_items, tuple(sorted(record.split.items())), metric, record.protocol


def _unlike(record: RunRecord, published: Sequence[RunRecord]) -> str:
    """Return why no published record may stand beside one: how the nearest differs."""
    ours = _key(record)
    names = ("test samples", "split", "metric", "protocol")

    def unlike(rival: RunRecord) -> list[int]:
        return [place for place, pair in enumerate(zip(ours, _key(rival), strict=True)) if pair[0] != pair[1]]

    named = [each for each in published if each.dataset == record.dataset] or list(published)
    nearest = min(named, key=lambda each: len(unlike(each)), default=None)
    if nearest is None:
        return f"{record.dataset}: no published record"
    theirs = _key(nearest)
    told = [
        f"other {names[place]}" + (f" ({_in_short(theirs[place])}, own {_in_short(ours[place])})" if place in {2, 3} else "")
        for place in unlike(nearest)
    ]
    return f"{record.dataset}: {' and '.join(told)}"
