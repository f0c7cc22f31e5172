"""How results are told, in terminals, notebooks and CSV: tables and sentences of what was fitted, tuned or advised."""

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.decoding import STATISTICS
from featcache.display import Table, csv_cell, printable
from featcache.evaluation.metrics import per_class
from featcache.fingerprint import as_named
from featcache.reports import RunRecord
from featcache.reports.tables import NO_GAIN, new_figure, require_picture, save_figure, signed_interval
from featcache.specs import LIVE_BATCHNORM
from featcache.store.disk import replace_file

if TYPE_CHECKING:
    from featcache.evaluation.intervals import Interval
    from featcache.evaluation.metrics import Gap
    from featcache.evaluation.splits import MoreSamples
    from featcache.experiments.advise import AdviceResult, Evidence
    from featcache.experiments.audit import AuditResult, Suspect
    from featcache.experiments.backbone_race import Standing
    from featcache.experiments.fit import FitResult, HeadResult
    from featcache.experiments.gap import GapResult, GapStep
    from featcache.extraction.feature_cache import Extracted
    from featcache.heads.baselines import Baseline
    from featcache.heads.checks import Removal
    from featcache.heads.search import Curve

_WIDEST_MATRIX = 20  # classes whose confusion matrix still fits a terminal of 120 columns
_CONFUSIONS = 10
NO_BACKBONE = "needs no backbone"
START_STAYS = "no epoch did better there than what training starts from by more than the noise: that start is kept"
TOO_FEW = "too few to tell"  # samples or groups, for an interval
_SCORES = {  # of each kind of record: the score that chooses, what a table calls it, its factor and digits
    "fit": ("accuracy", "%", 100, 1),
    "fit-labels": ("mean_average_precision", "mAP %", 100, 1),
    "fit-number": ("r2", "R2", 1, 3),
}
NOT_KEPT = "not better on validation"
_FOOT = 5  # points below and above all steps: a whole axis would hide what they add
_COLOURS = {"": "0.45", "pooling": "C0", "other layers": "C1", "attention": "C2", "weights": "C3"}
_DEPTHS = {
    "features": "train a head on its features only",
    "last": "train its last stages too",
    "all": "train all of its weights",
}
COLUMNS = ("kind", "path", "label", "split", "other", "other_label", "other_split", "score")
_SHOWN = 5  # suspects of a kind in a terminal; a file has all of them
ABOUT = {
    "label": "label is doubted",
    "dark": "very dark",
    "bright": "very bright",
    "long": "very long or high",
    "tiny": "much smaller than the others",
    "outlier": "like no other sample",
}


def extract_lines(result: "Extracted") -> Iterator[str]:
    """Yield what an extraction has done, and where its rows are."""
    summary = as_named(result.summary)
    speed = f", {summary['samples_per_second']} samples/s" if summary["samples_per_second"] else ""
    runtime = f" with {summary['runtime']}" if summary["runtime"] else ""
    yield (
        f"{summary['rows']} rows ({summary['computed']} computed in {summary['seconds']:.1f} s{speed}{runtime}, "
        f"{summary['reused']} reused, {len(summary['quarantined'])} samples left out)"
    )
    if summary["left"]:
        yield f"{summary['left']} samples are left to the other parts; the last one to end completes the entry"
    table = result.store.path / "features.h5"
    yield str(table if table.exists() else result.store.path)


def fit_table(result: "FitResult") -> Table:
    """Return every head and every baseline, the best on validation first."""
    records = [head.record for head in result.heads]
    score, unit, *_ = _SCORES[records[0].kind if records else "fit"]
    rows = [(_rank(record.val, score), _fit_row(record)) for record in records]
    # baselines stand among the heads, not below them: a head that one of them beats must look so
    rows += [(_rank(asdict(baseline.val), score), _baseline_row(baseline, score)) for baseline in result.baselines]
    headers = ("head", f"validation {unit}", f"test {unit}", "95 % interval", "seconds", "chosen")
    return Table(headers, [row for _, row in sorted(rows, key=lambda ranked: ranked[0])])


def _rank(val: dict[str, Any], score: str) -> tuple[float, float]:
    """Return what the smaller of is better: by the score, then by log-loss, where a head gives probabilities."""
    loss = val.get("log_loss")  # accuracy ties often on some hundred samples
    return -val[score], float("inf") if loss is None else loss


def _fit_row(record: RunRecord) -> tuple[str, ...]:
    score, _, factor, digits = _SCORES[record.kind]
    numbers = (f"{factor * record.val[score]:.{digits}f}", f"{factor * record.test[score]:.{digits}f}")
    interval = interval_text(record.test[f"{score}_ci"], factor, digits)
    return (record.method, *numbers, interval, f"{record.seconds['fit']:.1f}", params_text(record.params))


def _baseline_row(baseline: "Baseline", score: str) -> tuple[str, ...]:
    factor, digits = next((factor, digits) for name, _, factor, digits in _SCORES.values() if name == score)
    (val, _), (test, interval) = baseline.val.primary, baseline.tested.scores.primary
    numbers = (f"{factor * val:.{digits}f}", f"{factor * test:.{digits}f}")
    return (baseline.name, *numbers, interval_text(interval, factor, digits), f"{baseline.seconds:.1f}", NO_BACKBONE)


def interval_text(interval: Sequence[float] | None, factor: float, digits: int) -> str:
    """Return an interval in words, of numbers times a factor."""
    return f"{factor * interval[0]:.{digits}f} to {factor * interval[1]:.{digits}f}" if interval else TOO_FEW


def gap_interval(interval: Sequence[float] | None) -> str:
    """Return the interval of a gap as sentences have it."""
    return f"95 % interval {signed_interval(interval, '')}" if interval else "too few groups for an interval"


def params_text(params: dict[str, Any]) -> str:
    """Return chosen parameters in words."""
    return ", ".join(f"{name} = {_short(value)}" for name, value in params.items())


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    return f"{value:g}" if isinstance(value, float | int) else str(value)


def fit_lines(result: "FitResult") -> Iterator[str]:
    """Yield the table, the winner in a sentence with its file, and the curves that were asked for."""
    yield fit_table(result).plain()
    yield ""
    heads = result.heads
    score = _SCORES[heads[0].record.kind][0]
    # by validation, as parameters were chosen: the best of many test scores would be the luckiest
    best = min(heads, key=lambda head: _rank(head.record.val, score))
    if result.pooling is not None:
        yield f"{_capital(result.pooling.text)}."
    among = f" is the best of {len(heads)} heads on validation" if len(heads) > 1 else ""
    yield f"{best.record.method}{among}: test {test_text(best.record)}."
    if (ahead := result.ahead) is not None:
        interval = gap_interval(ahead["ci"])
        yield f"That is {ahead['points']:+.1f} points to {ahead['baseline']} ({interval}, p = {ahead['p_value']:.2g})."
    beside = " (the others' files are beside it)" if len(heads) > 1 else ""
    yield f"It is kept in {best.bundle}{beside}."
    for curve in result.curves:
        yield from _curve_lines(curve)


def test_text(record: RunRecord) -> str:
    """Return a record's test score with its interval, in words."""
    if "accuracy" in record.test:
        return percent(record.test)
    score, unit, factor, digits = _SCORES[record.kind]
    interval = record.test[f"{score}_ci"]
    told = f"95 % interval {interval_text(interval, factor, digits)}" if interval else "too few samples for an interval"
    error = f", mean absolute error {record.test['mae']:.4g}" if "mae" in record.test else ""
    return f"{unit.removesuffix(' %')} {factor * record.test[score]:.{digits}f} ({told}){error}"


def percent(test: dict[str, Any]) -> str:
    """Return an accuracy with its interval, in words."""
    if not test["accuracy_ci"]:
        return f"{100 * test['accuracy']:.1f} % (too few groups for an interval)"
    return f"{100 * test['accuracy']:.1f} % (95 % interval {interval_text(test['accuracy_ci'], 100, 1)})"


def _curve_lines(curve: "Curve") -> Iterator[str]:
    slope = "" if curve.slope is None else f"; the error falls as samples to the power of {curve.slope:.2f}"
    rows = []
    for point in curve.points:
        drawn = f"{point.shots} a class" if point.shots else f"{100 * (point.share or 0):g} %"
        rows.append((str(point.samples), drawn, f"{100 * point.mean:.1f}", f"{100 * point.std:.1f}"))
    yield ""
    headers = ("training samples", "that is", "test %", "std over draws")
    yield Table(headers, rows, f"{curve.head} by training samples{slope}").plain()


def per_class_lines(head: "HeadResult") -> Iterator[str]:
    """Yield a head's scores class by class on the test split, and which classes it takes for which."""
    yield ""
    yield per_class_table(head.confusion, head.classes, f"{head.record.method}, class by class on test").plain()
    yield ""
    yield confusion_table(head).plain()


def per_class_table(matrix: NDArray[np.int64], classes: Sequence[str], title: str = "") -> Table:
    """Return each class's scores, of a confusion matrix."""
    rows = [
        (row["class"], str(row["support"]), *(f"{100 * row[name]:.1f}" for name in ("precision", "recall", "f1")))
        for row in per_class(matrix, classes)
    ]
    return Table(("class", "test samples", "precision %", "recall %", "F1 %"), rows, title)


def confusion_table(head: "HeadResult") -> Table:
    """Return the confusion matrix; of more classes than a terminal has room for, the most frequent confusions alone."""
    matrix, classes = head.confusion, head.classes
    # rows are true classes, as in scikit-learn
    if len(classes) <= _WIDEST_MATRIX:
        rows = [(name, *map(str, row)) for name, row in zip(classes, matrix.tolist(), strict=True)]
        return Table(("true class", *classes), rows, "Confusion: how many samples of each class (rows) are taken for which")
    wrong = matrix - np.diag(np.diag(matrix))
    places = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    pairs = [divmod(int(place), len(classes)) for place in places]
    rows = [(classes[true], classes[taken], str(wrong[true, taken])) for true, taken in pairs if wrong[true, taken]]
    return Table(("true class", "taken for", "samples"), rows, "The most frequent confusions")


def mistake_lines(head: "HeadResult", count: int, location: str = "") -> Iterator[str]:
    """Yield the most confident mistakes on the test split, as paths that open where samples are files below ``location``."""
    mistakes = head.mistakes(count)
    rows = [
        (
            _path_text(location, each.path),
            each.label,
            each.predicted,
            "-" if each.confidence is None else f"{100 * each.confidence:.1f}",
        )
        for each in mistakes
    ]
    total = int((~head.fitted.tested.right).sum())
    is_sure = bool(mistakes) and mistakes[0].confidence is not None
    yield ""
    part = f"The {len(rows)} most confident of" if is_sure else f"{len(rows)} of"  # without probabilities none comes first
    shown = (
        f"{part} {total} mistakes" if len(rows) < total else "The only mistake" if total == 1 else f"All {total} mistakes"
    )
    unsure = "" if is_sure or not mistakes else ", which knows no probabilities"
    title = f"{shown} of {head.record.method} on test{unsure}"
    headers = ("sample", "true class", "taken for", "confidence %")
    yield Table(headers, rows, title).plain() if rows else f"No mistake of {head.record.method} on test."


def _path_text(location: str, path: str) -> str:
    place = Path(location)
    file = (place if place.is_dir() else place.parent) / path  # a manifest's paths begin beside it
    return str(file) if file.is_file() else path


def finetune_table(records: Sequence[RunRecord], folds: int = 0) -> Table:
    """Return fine-tuned backbones of one data set beside the probe that their gaps are to, chosen on so many folds."""
    rows, note = [_tuned_row(record) for record in records], ""
    probe = records[0].probe
    if probe is not None:
        val, test, seconds = probe["val"]["accuracy"], probe["test"], probe["seconds"]
        mark, split = "*" if folds else "", records[0].split
        numbers = (f"{100 * val:.1f}{mark}", f"{100 * test['accuracy']:.1f}", interval_text(test["accuracy_ci"], 100, 1))
        if folds:  # another number of other samples: as one column the two would be taken for comparable
            note = (
                f"* on {folds} folds of train and val, {split['train'] + split['val']} samples; what was trained is judged "
                f"on the {split['val']} of val alone. Compare the two on test."
            )
        rows.append(
            (f"{probe['head']} (best probe)", *numbers, "-", "-", f"{seconds['extract']:.1f}", f"{seconds['fit']:.1f}")
        )
    headers = ("trained", "validation %", "test %", "95 % interval", "gap, points", "p", "extract s", "train s")
    return Table(headers, rows, note=note)


def _tuned_row(record: RunRecord) -> tuple[str, ...]:
    gap, test = record.gap, record.test
    numbers = (
        f"{100 * record.val['accuracy']:.1f}",
        f"{100 * test['accuracy']:.1f}",
        interval_text(test["accuracy_ci"], 100, 1),
    )
    between = (f"{gap['points']:+.1f}", f"{gap['p_value']:.2g}") if gap else (NO_GAIN, "-")
    trained = record.seconds["train"] + record.seconds.get("before", 0.0)  # of a depth that goes on from another: both
    return (record.short_method, *numbers, *between, f"{record.seconds['extract']:.1f}", f"{trained:.1f}")


def finetune_lines(records: Sequence[RunRecord], folds: int = 0) -> Iterator[str]:
    """Yield the table, and of each fine-tuning what it gains over the probe, at which cost, and how it was chosen."""
    yield finetune_table(records, folds).plain()
    yield ""
    for record in records:
        yield f"{record.short_method}: {_gain(record)}"
        tried = ", ".join(f"{rate}: {100 * val:.1f} %" for rate, val in record.params["val_by_lr"].items())
        yield f"  epoch {record.params['best_epoch']} at rate {_kept_at(record.params)} (on validation by rate: {tried})"
    if len(records) > 1:
        yield _sweep_sentence(records)
    probe = records[0].probe
    if probe is not None:
        cost = probe["seconds"]
        yield (
            f"The probe is {probe['head']}, the best on validation of {', '.join(probe['of'])}; its cost: extract "
            f"{cost['extract']:.1f} s, fit {cost['fit']:.1f} s."
        )


def _kept_at(params: dict[str, Any]) -> str:
    share = params.get("share", 1.0)  # records of before have none
    way = f", {100 * share:g} % of the way from the start to its weights" if share < 1 else ""
    return f"{params['lr']:g}{f' {LIVE_BATCHNORM}' if params.get('live_batchnorm') else ''}{way}"


def _sweep_sentence(records: Sequence[RunRecord]) -> str:
    """Return what follows from a sweep: the depth that validation chooses, with its test score and its price."""
    # a depth that gained nothing answers as the one that it started from
    gained = [record for record in records if record.gap is not None]
    best = min(gained, key=lambda record: _rank(record.val, "accuracy"), default=None)
    if best is None:
        return f"Of {len(records)} depths none gained on validation over the probe: here the frozen backbone is enough."
    return (
        f"Of {len(records)} depths {best.short_method} is the best on validation: test {percent(best.test)}, {_gain(best)}"
    )


def _gain(record: RunRecord) -> str:
    """Return what fine-tuning has gained over the probe, with interval and p, and at which cost."""
    seconds = record.seconds
    before = f", {seconds['before']:.1f} s for the shallower one it starts from" if "before" in seconds else ""
    cost = f"cost: extract {seconds['extract']:.1f} s, train {seconds['train']:.1f} s{before}"
    if record.gap is None:
        return f"{NO_GAIN}: {START_STAYS}; {cost}."
    interval = gap_interval(record.gap["ci"])
    return f"gap {record.gap['points']:+.1f} points ({interval}, p = {record.gap['p_value']:.2g}); {cost}{_worth(record)}."


def _worth(record: RunRecord) -> str:
    """Return what a point of accuracy has cost beyond the probe, in words."""
    if record.gap is None or record.probe is None or record.gap["points"] <= 0:
        return ""
    more = sum(record.seconds.values()) - sum(record.probe["seconds"].values())
    return f", {more / record.gap['points']:.1f} s a point" if more > 0 else ""


def gap_table(result: "GapResult", price: float | None = None) -> Table:
    """Return the steps with their scores, what each adds on the test samples to what was kept before, and what it costs.

    ``price`` is of an hour.
    """
    rows = [
        (*_cells(step, result.kept[0]), *((f"{step.seconds / 3600 * price:.4f}",) if price else ())) for step in result.steps
    ]
    scores = ("validation %", "val part %", "test %", "95 % interval")
    headers = ("step", "changes", *scores, "adds, points", "95 % interval", "p", "seconds")
    return Table((*headers, "price") if price else headers, rows)


def _cells(step: "GapStep", first: "GapStep") -> tuple[str, ...]:
    test = step.record.test
    # what is trained is judged on the val part alone: in the heads' column it would be taken for comparable
    of_all = "-" if step.origin == "weights" else f"{100 * step.record.val['accuracy']:.1f}"
    val = of_all, f"{100 * step.val[0]:.1f}"
    scores = *val, f"{100 * test['accuracy']:.1f}", interval_text(test["accuracy_ci"], 100, 1)
    if step.between is not None:
        points, spread = step.between.points, signed_interval(step.between.ci, TOO_FEW)
        gain = f"{points:+.1f}", spread, f"{step.between.p_value:.2g}"
    else:
        gain = ("" if step is first else NOT_KEPT), "", ""
    return (step.name, step.origin or "-", *scores, *gain, f"{step.seconds:.1f}")


def gap_lines(result: "GapResult", price: float | None = None) -> Iterator[str]:
    """Yield the table and what follows from it."""
    yield gap_table(result, price).plain()
    yield "A step is kept where it is more accurate on validation than all kept before, or as accurate and surer,"
    yield "and where a training gains on its start by more than the noise. Weights are compared on the val part, heads"
    yield "with heads on all samples that choose. Seconds: with all that led to a step."
    yield ""
    yield gap_sentence(result)
    if result.left:
        yield f"The budget left no time for {', '.join(result.left)}: with more of it the same command goes on from here."


def gap_sentence(result: "GapResult") -> str:
    """Return of what the whole gain consists."""
    total = result.total
    if total is None:
        tried = ", ".join(result.origins)
        if not tried:
            return "Only the linear probe was taken: nothing is known yet of what would add to it."
        return f"No step gained on validation over the linear probe ({tried} tried): its features are enough here."
    spread = gap_interval(total.ci)
    told = f"{total.points:+.1f} points from the linear probe on test ({spread}, p = {total.p_value:.2g})"
    if total.points <= 0:
        return f"{result.kept[-1].name}, the best on validation, is {told}: no gain."
    parts = [f"{points} {origin}" for origin, points in adding_up(result.samples, len(result.kept[0].record.right)).items()]
    noise = " That is inside the noise of so few test samples." if total.is_noise else ""
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return (
        f"Of {total.points:+.1f} points over the linear probe ({spread}, p = {total.p_value:.2g}) are {listed}; "
        f"{result.kept[-1].name} is the best on validation.{noise}"
    )


def adding_up(gained: Mapping[str, int], count: int) -> dict[str, str]:
    """Return by what samples of so many were gained, as points, rounded so that they add up as the whole is."""
    added, told, shares = 0, 0.0, {}
    for origin, samples in gained.items():
        added += samples
        upto = round(100 * added / count, 1)
        shares[origin] = f"{upto - told:+.1f}"
        told = upto
    return shares


def draw_gap(result: "GapResult", path: Path) -> Path:
    """Draw the waterfall: each step from what was kept before it, with the interval of what it adds.

    Raises:
        UsageError: the picture's format is none that is known.
        SetupError: matplotlib is not installed.
        StorageError: the disk failed.
    """
    require_picture(path)
    figure = new_figure(1 + len(result.steps) / 8)
    axes = figure.subplots()
    level = 0.0
    for place, step in enumerate(result.steps):
        if step.is_kept:
            _draw_step(axes, place, step, level)
            level = 100 * step.accuracy
        else:
            axes.plot(place, 100 * step.accuracy, "x", color=_COLOURS[step.origin], label=step.origin)
    axes.set_xticks(range(len(result.steps)), [step.name for step in result.steps], rotation=30, ha="right")
    first = result.steps[0].record
    axes.set(ylabel="test accuracy, % (crosses: not kept)", title=f"{first.dataset}, {first.backbone}")
    seen = [100 * step.accuracy for step in result.steps]
    axes.set_ylim(max(0.0, min(seen) - _FOOT), min(100.0, max(seen) + _FOOT))  # the rest of long intervals is left out
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    return save_figure(figure, path)


def _draw_step(axes: Any, place: int, step: "GapStep", level: float) -> None:
    accuracy, between = 100 * step.accuracy, step.between
    axes.bar(place, accuracy - level, bottom=level, color=_COLOURS[step.origin], label=step.origin or "linear probe")
    if between is not None and between.ci:
        low, high = (level + points - accuracy for points in between.ci)
        axes.errorbar(place, accuracy, yerr=[[-low], [high]], fmt="none", color="black", capsize=3)
    text = f"{accuracy:.1f}" if between is None else f"{between.points:+.1f}"
    where = (place, max(level, accuracy))
    axes.annotate(text, where, xytext=(8, 3), textcoords="offset points", ha="left", fontsize="small")


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
        yield f"Backbone: {name}. {_capital(told)} sure that no candidate is better by over half a point{open_}."
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


def _capital(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


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
    sure_text = _capital(_percent_sure(sure))
    return f"{sure_text} sure, by a short training of the last stage, that it {does} by over half a point{open_}."


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
        yield f"{_capital(ABOUT.get(kind, kind))}{often}:"
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
        over = f"{gap.points:+.1f} over the commonest class"
        text = f"{_capital(shortcut.measure)} alone: {100 * shortcut.accuracy:.1f} % on test, {over}"
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
