"""Run records into tables, Markdown for people and CSV for programs, and into pictures of fine-tuning."""

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tabulate import tabulate

from featcache.display import Table, booktabs, csv_cell, markdown_cell, printable
from featcache.errors import SetupError, UsageError
from featcache.evaluation.metrics import Gap, decode_correct, paired_gap
from featcache.reports import RunRecord
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


# Where no epoch gained, the probe is the answer: a gap of +0.0 would read as a measured tie.
NO_GAIN = "no gain on validation"


@dataclass(frozen=True)
class _Group:
    """The records of one table row: the same experiment under several seeds."""

    records: tuple[RunRecord, ...]

    @property
    def first(self) -> RunRecord:
        return self.records[0]


def rows(records: Sequence[RunRecord]) -> list[list[str]]:
    """Return the table's cells as text, in the order of the records' first appearance; of a cell the latest counts.

    Gaps are to the head that did best on validation for the same data set, backbone, groups and seed, among the table's
    and those that fine-tuning was compared with itself; records with other test items are not compared.
    """
    return [_row(_Group(group), latest_of(records)) for group in groups_of_seeds(records)]


def latest_of(records: Sequence[RunRecord]) -> tuple[RunRecord, ...]:
    """Return of each cell its last run, as a rerun is meant to replace."""
    return tuple({record.cell: record for record in records}.values())


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
    return Table(headers, [(*row[:7], *row[8:]) for row in rows(records)])


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
        first.method,
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
    compared = record.probe or {}
    if has_no_gain(record) and compared.get("start", "logistic") == "logistic":
        return Gap(0.0, None, 1.0)
    rival = _best_probe(record, records)
    probe_accuracy = compared.get("val", {}).get("accuracy", -1.0)
    if record.gap is not None and (rival is None or rival.val["accuracy"] <= probe_accuracy) and "of" in compared:
        return Gap(record.gap["points"], record.gap["ci"], record.gap["p_value"])
    if rival is None or rival.cell == record.cell:
        return None
    return between_records(record, rival)


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
