"""The way from a linear probe to the whole network tuned, as a table, a sentence and a waterfall."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.display import Table
from featcache.reports.tables import new_figure, require_picture, save_figure, signed_interval
from featcache.reports.wording import TOO_FEW, gap_interval, interval_text

if TYPE_CHECKING:
    from featcache.experiments.gap import GapResult, GapStep

NOT_KEPT = "not better on validation"
_FOOT = 5  # points below and above all steps: a whole axis would hide what they add
_COLOURS = {"": "0.45", "pooling": "C0", "other layers": "C1", "attention": "C2", "weights": "C3"}


def gap_table(result: "GapResult", price: float | None = None) -> Table:
    """Return the steps with their scores, what each adds on the test samples to what was kept before, and what it costs.

    ``price`` is of an hour.
    """
    rows = [(*_cells(step, result.kept[0]), *_price_cell(step, price)) for step in result.steps]
    scores = ("validation %", "val part %", "test %", "95 % interval")
    headers = ("step", "changes", *scores, "adds, points", "95 % interval", "p", "seconds")
    return Table((*headers, "price") if price else headers, rows)


def _cells(step: "GapStep", first: "GapStep") -> tuple[str, ...]:
    test = step.record.test
    val = f"{100 * step.record.val['accuracy']:.1f}", f"{100 * step.val[0]:.1f}"
    scores = *val, f"{100 * test['accuracy']:.1f}", interval_text(test["accuracy_ci"], 100, 1)
    if step.between is not None:
        points, spread = step.between.points, signed_interval(step.between.ci, TOO_FEW)
        gain = f"{points:+.1f}", spread, f"{step.between.p_value:.2g}"
    else:
        gain = ("" if step is first else NOT_KEPT), "", ""
    return (step.name, step.origin or "-", *scores, *gain, f"{step.seconds:.1f}")


def _price_cell(step: "GapStep", price: float | None) -> tuple[str, ...]:
    return (f"{step.seconds / 3600 * price:.4f}",) if price else ()


def gap_lines(result: "GapResult", price: float | None = None) -> Iterator[str]:
    """Yield the table and what follows from it."""
    yield gap_table(result, price).plain()
    yield "A step is kept where it is more accurate on validation than all kept before, or as accurate and surer: weights"
    yield "are compared on the val part, heads with heads on all samples that choose. Seconds: with all that led to a step."
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
    parts = [f"{points} {origin}" for origin, points in _added(result).items()]
    noise = " That is inside the noise of so few test samples." if total.is_noise else ""
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return (
        f"Of {total.points:+.1f} points over the linear probe ({spread}, p = {total.p_value:.2g}) are {listed}; "
        f"{result.kept[-1].name} is the best on validation.{noise}"
    )


def _added(result: "GapResult") -> dict[str, str]:
    """Return the points of what has changed, rounded so that they add up to the whole as it is rounded."""
    added, told, shares = 0, 0.0, {}
    count = len(result.kept[0].record.right)
    for origin, samples in result.samples.items():
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
