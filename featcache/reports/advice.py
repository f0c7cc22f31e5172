"""Advice and audits for a terminal; the suspects of an audit as CSV, and the cleaned manifest."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.datasets.thumbnails import STATISTICS
from featcache.display import Table, csv_cell, printable
from featcache.reports.wording import interval_text
from featcache.store.atomic import replace_file

if TYPE_CHECKING:
    from featcache.evaluation.intervals import Interval
    from featcache.evaluation.metrics import Gap
    from featcache.evaluation.splits import MoreSamples
    from featcache.experiments.advise import AdviceResult, Evidence
    from featcache.experiments.audit import AuditResult, Suspect
    from featcache.experiments.backbone_race import Standing
    from featcache.heads.checks import Removal

_DEPTHS = {
    "features": "train a head on its features only",
    "last": "train its last stages too",
    "all": "train all of its weights",
}
COLUMNS = ("kind", "path", "label", "split", "other", "other_label", "other_split", "score")
_SHOWN = 5  # suspects of a kind in a terminal; a file has all of them
ABOUT = {
    "label": "label is doubted",
    "long": "very long or high",
    "tiny": "much smaller than the others",
    "outlier": "like no other sample",
}


def advice_table(result: "AdviceResult") -> Table:
    """Return the candidates, the best first: accuracy on samples that a head had not seen, and the chance to be the best."""
    rows = [_standing_row(standing) for standing in result.standings]
    heads = [f"{head} %" for head in result.standings[0].accuracies]
    title = f"{result.dataset}: heads on features, on samples that they had not seen"
    return Table(("backbone", "samples", *heads, "best or as good", "s per 1,000", ""), rows, title)


def _standing_row(standing: "Standing") -> tuple[str, ...]:
    price = standing.runner.price(1000)
    cells = (f"{100 * accuracy:.1f}" for accuracy in standing.accuracies.values())
    chance = _percent_sure(standing.chance)
    where = "left there" if standing.is_left else ""
    name = standing.runner.spec.text
    return (name, str(standing.samples), *cells, chance, f"{price:.1f}" if price else "cached", where)


def advice_lines(result: "AdviceResult") -> Iterator[str]:
    """Yield the candidates, then the answers, each with what it rests on."""
    yield advice_table(result).plain()
    yield ""
    name, evidence = printable(result.backbone.text), result.evidence
    if len(result.standings) == 1:
        yield f"Backbone: {name}, the only candidate."
    else:
        open_ = "; that is open, compare the best ones on all samples" if result.is_open else ""
        told = _percent_sure(result.chance)
        yield f"Backbone: {name}. {told} sure that no candidate is better by over half a point{open_}."
    # advice against which the short training leans is a trial, and said to be one
    trial = ", to find out" if evidence.is_open and (evidence.pays or 0.0) < 0.5 else ""
    yield f"Weights: {_DEPTHS[evidence.depth[0]]}{trial}. {_sureness(evidence)}"
    yield f"The textbook rule: {_textbook(evidence)}"
    yield f"More samples: {more_text(result.more)}"
    yield ""
    yield "Evidence:"
    yield from (f"  {line}" for line in evidence_lines(evidence))
    if result.missing:
        yield f"Not measured: {'; '.join(result.missing)}."
    spent = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    yield f"Cost: {spent}. Rows stay in the cache; the test split was not looked at."


def _percent_sure(chance: float) -> str:
    # draws of one sample never make certain, whatever share of them agrees
    return "over 99 %" if chance > 0.99 else "under 1 %" if chance < 0.01 else f"{100 * chance:.0f} %"


def _sureness(evidence: "Evidence") -> str:
    if evidence.pays is None:
        return "How sure that is was not measured: no short training was made."
    does, sure = ("pays", evidence.pays) if evidence.pays >= 0.5 else ("does not pay", 1 - evidence.pays)
    open_ = (
        "; that is open, a fine-tuning will tell, and answer with its probe where it gains nothing"
        if evidence.is_open
        else ""
    )
    return f"{_percent_sure(sure)} sure, by a short training of the last stage, that it {does} by over half a point{open_}."


def _textbook(evidence: "Evidence") -> str:
    if evidence.textbook is None:
        return "needs to know whether the task is like the backbone's, which was not measured."
    kind = {True: "like what the last features tell", False: "unlike it: earlier layers add", None: "of unknown kind"}
    amount = f"{evidence.samples} training samples, {kind[evidence.is_similar]}"
    return f"{_DEPTHS[evidence.textbook]} ({amount})."


def more_text(more: "MoreSamples | None") -> str:
    """Return what more samples would bring to a head on features."""
    if more is None:
        return "too few for a learning curve, or too few of them wrong."
    low, high = more.interval
    nothing = "; it may be nothing" if low <= 0 else ""
    return (
        f"+{more.samples} to {more.now}: {more.points:+.1f} points, {low:+.1f} to {high:+.1f}{nothing} (a head on features; "
        f"the error falls as samples to the power of {more.slope:.2f})."
    )


def evidence_lines(evidence: "Evidence") -> Iterator[str]:
    """Yield what was measured, a line each."""
    size = f"{evidence.samples} samples of {evidence.classes} classes"
    yield f"{size} to train and choose on, {evidence.seen} of them looked at"
    told = ", ".join(f"{head} {100 * accuracy:.1f} %" for head, accuracy in evidence.accuracies.items())
    statistics = "" if evidence.statistics is None else f", neighbours by {STATISTICS} {100 * evidence.statistics:.1f} %"
    yield f"heads on features: {told}; without a backbone: commonest class {100 * evidence.majority:.1f} %{statistics}"
    if evidence.layers is not None:
        yield f"several layers less the last one: {_gain_text(evidence.layers)}"
    if evidence.tuned is not None:
        wrong = "" if evidence.error_left is None else f"; it leaves {100 * evidence.error_left:.1f} % wrong"
        yield f"last stage shortly trained less its probe, on the same samples: {_gain_text(evidence.tuned)}{wrong}"


def _gain_text(gap: "Gap") -> str:
    return f"{gap.points:+.1f} points ({interval_text(gap.ci, 1, 1)}, p = {gap.p_value:.2g})"


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
