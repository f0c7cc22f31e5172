"""An audit for a terminal, its suspects as CSV, and the cleaned manifest."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.display import Table, printable
from featcache.reports.inert import csv_cell
from featcache.store.atomic import replace_file

if TYPE_CHECKING:
    from featcache.evaluation.intervals import Interval
    from featcache.evaluation.suspects import Removal
    from featcache.experiments.audit import AuditResult, Suspect

COLUMNS = ("kind", "path", "label", "split", "other", "other_label", "other_split", "score")
_SHOWN = 5  # suspects of a kind in a terminal; a file has all of them
ABOUT = {
    "label": "label is doubted",
    "long": "very long or high",
    "tiny": "much smaller than the others",
    "outlier": "like no other sample",
}


def audit_table(result: "AuditResult") -> Table:
    """Return how many suspects of each kind each part has."""
    rows = [(ABOUT.get(kind, kind), *map(str, parts.values())) for kind, parts in result.counts.items()]
    sizes = ", ".join(f"{count} {name}" for name, count in result.samples.items())
    note = "" if rows else "Nothing suspicious."
    return Table(("suspects", "train", "val", "test"), rows, f"{result.dataset}, {result.backbone}: {sizes} samples", note)


def audit_lines(result: "AuditResult") -> Iterator[str]:
    """Yield the counts, the first suspects of each kind, and what follows for scores."""
    yield audit_table(result).plain()
    for kind in result.counts:
        of_kind = [suspect for suspect in result.suspects if suspect.kind == kind]
        yield ""
        # where heads err often they doubt right labels: a count of doubts alone would read as one of errors
        often = (
            f" (the probe errs on {100 * (1 - result.leaks.leaked.accuracy):.1f} % of test samples; {_doubting(result)})"
            if kind == "label"
            else ""
        )
        yield f"{ABOUT.get(kind, kind)}{often}:"
        yield from (f"  {_suspect_text(suspect)}" for suspect in of_kind[:_SHOWN])
        if len(of_kind) > _SHOWN:
            yield f"  and {len(of_kind) - _SHOWN} more"
    yield ""
    yield from leak_lines(result)
    yield from _shortcut_lines(result)
    if result.shift is not None:
        low, high = result.shift.auc_ci
        same = "like training samples" if low <= 0.5 <= high else "unlike training samples" if low > 0.5 else "hard to tell"
        told = f"{result.shift.auc:.3f} ({low:.3f} to {high:.3f}; 0.5 is chance)"
        yield f"Test samples are {same}: told apart with an AUC of {told}."
    yield from result.missing


def _doubting(result: "AuditResult") -> str:
    told = (f"{weight:.2f} {name}" for name, weight in result.doubting.items() if weight >= 0.005)
    return f"by {', '.join(map(printable, told))}"


def leak_lines(result: "AuditResult") -> Iterator[str]:
    """Yield test accuracy with and without leaked and doubtful test samples."""
    leaks = result.leaks
    leaked = leaks.leaked
    yield f"The logistic probe has {100 * leaked.accuracy:.1f} % of {result.samples['test']} test samples right."
    if leaked.removed:
        yield f"Without the {leaked.removed} that train or val hold a copy of: {_removal_text(leaked)}."
    if leaks.retrained is not None:
        gap = leaks.retrained
        spread = f"{gap.ci[0]:+.1f} to {gap.ci[1]:+.1f}" if gap.ci else "too few groups for an interval"
        yield (
            f"Trained without those copies, on all test samples: {100 * leaked.accuracy - gap.points:.1f} %; having seen "
            f"them is worth {gap.points:+.1f} points ({spread}, p = {gap.p_value:.2g})."
        )
    if leaks.doubtful.removed > leaked.removed:
        yield (
            f"Without {leaks.doubtful.removed - leaked.removed} of doubtful labels too: {_removal_text(leaks.doubtful)}; at "
            "most that, since labels are doubted where heads are wrong. Look at them first."
        )


def _removal_text(removal: "Removal") -> str:
    if removal.accuracy_without is None or removal.change is None or removal.change_ci is None:
        return "too few are left to tell"
    return f"{100 * removal.accuracy_without:.1f} % ({_points(removal.change, removal.change_ci)})"


def _points(change: float, interval: "Interval") -> str:
    low, high = (100 * end for end in interval)
    return f"{100 * change:+.1f} points, {low:+.1f} to {high:+.1f}"


def _shortcut_lines(result: "AuditResult") -> Iterator[str]:
    for shortcut in result.shortcuts:
        gap = shortcut.over_majority
        spread = f"{gap.ci[0]:+.1f} to {gap.ci[1]:+.1f}" if gap.ci else "no interval"
        text = (
            f"{shortcut.measure} alone: {100 * shortcut.accuracy:.1f} % on test, {gap.points:+.1f} over the commonest class"
        )
        yield f"{'SHORTCUT: ' if shortcut.is_near else ''}{text} ({spread})"


def _suspect_text(suspect: "Suspect") -> str:
    text = f"{printable(suspect.path)} ({printable(suspect.label)}, {suspect.split})"
    if suspect.other:
        return f"{text} = {printable(suspect.other)} ({printable(suspect.other_label)}, {suspect.other_split})"
    return f"{text}, rather {printable(suspect.other_label)}" if suspect.other_label else text


def suspects_csv(suspects: Sequence["Suspect"]) -> str:
    """Return all suspects as CSV; a cell that a spreadsheet would run as a formula is quoted with an apostrophe."""
    rows = (
        [csv_cell(cell) if isinstance(cell, str) else f"{cell:.6g}" for cell in astuple(suspect)] for suspect in suspects
    )
    return _csv([COLUMNS, *rows])


def write_csv(path: Path, text: str) -> None:
    """Write a CSV; names that are no UTF-8 go out as the bytes that they came in.

    Raises:
        StorageError: the disk failed.
    """
    replace_file(path, text.encode("utf-8", "surrogateescape"))


def manifest_csv(rows: Iterable[Sequence[str]]) -> str:
    """Return rows as CSV, each cell as it is: a manifest names files and classes, and is read by this program."""
    return _csv(rows)


def _csv(rows: Iterable[Sequence[str]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()
