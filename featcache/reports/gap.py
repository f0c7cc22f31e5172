"""The way from a linear probe to the whole network tuned, as a table, a sentence and a waterfall."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.display import Table
from featcache.reports.tables import new_figure, require_picture, save_figure
from featcache.reports.wording import interval_text

if TYPE_CHECKING:
    from featcache.experiments.gap import GapResult, GapStep

NOT_KEPT = "not better on validation"
_COLOURS = {"": "0.45", "pooling": "C0", "other layers": "C1", "attention": "C2", "weights": "C3"}


def gap_table(result: "GapResult", price: float | None = None) -> Table:
    """Return the steps with their scores, what each adds on the test images to what was kept before, and what it costs.

    ``price`` is of an hour.
    """
    rows = [(*_row(step, result.kept[0]), *_money(step, price)) for step in result.steps]
    headers = ("step", "changes", "validation %", "test %", "95 % interval", "adds, points", "95 % interval", "p", "seconds")
    note = "validation: on the images that all steps share; seconds: with extraction and all that led to a step"
    return Table((*headers, "price") if price else headers, rows, note=note)


def _row(step: "GapStep", first: "GapStep") -> tuple[str, ...]:
    test = step.record.test
    scores = f"{100 * step.val[0]:.1f}", f"{100 * test['accuracy']:.1f}", interval_text(test["accuracy_ci"], 100, 1)
    if step.between is not None:
        points, low_high = step.between.points, step.between.ci
        spread = f"{low_high[0]:+.1f} to {low_high[1]:+.1f}" if low_high else interval_text(None, 1, 1)
        gain = f"{points:+.1f}", spread, f"{step.between.p_value:.2g}"
    else:
        gain = ("" if step is first else NOT_KEPT), "", ""
    return (step.name, step.origin or "-", *scores, *gain, f"{step.seconds:.1f}")


def _money(step: "GapStep", price: float | None) -> tuple[str, ...]:
    return (f"{step.seconds / 3600 * price:.4f}",) if price else ()


def gap_lines(result: "GapResult", price: float | None = None) -> Iterator[str]:
    """Yield the table and what follows from it."""
    yield gap_table(result, price).plain()
    yield ""
    yield gap_sentence(result)
    if result.left:
        yield f"The budget left no time for {', '.join(result.left)}: with more of it the same command goes on from here."


def gap_sentence(result: "GapResult") -> str:
    """Return of what the whole gain consists."""
    whole = result.whole
    if whole is None:
        tried = ", ".join(result.origins) or "nothing"
        return f"No step gained on validation over the linear probe ({tried} tried): its features are enough here."
    spread = f"95 % interval {whole.ci[0]:+.1f} to {whole.ci[1]:+.1f}" if whole.ci else "too few groups for an interval"
    parts = [f"{points} {origin}" for origin, points in _shares(result).items()]
    noise = " That is inside the noise of so few test images." if whole.is_noise else ""
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return (
        f"Of {whole.points:+.1f} points over the linear probe ({spread}, p = {whole.p_value:.2g}) are {listed}; "
        f"{result.kept[-1].name} is the best on validation.{noise}"
    )


def _shares(result: "GapResult") -> dict[str, str]:
    """Return the points of what has changed, rounded so that they add up to the whole as it is rounded."""
    total, told, shares = 0, 0.0, {}
    count = len(result.kept[0].record.right)
    for origin, images in result.images.items():
        total += images
        upto = round(100 * total / count, 1)
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
    bottom = min(100 * step.record.test["accuracy"] for step in result.kept)
    level = 0.0
    for place, step in enumerate(result.steps):
        accuracy, colour = 100 * step.record.test["accuracy"], _COLOURS[step.origin]
        if not step.is_kept:
            axes.plot(place, accuracy, "x", color=colour)
            continue
        start = level if step.between else min(bottom, accuracy) - 5
        axes.bar(place, accuracy - start, bottom=start, color=colour, label=step.origin or "linear probe")
        if step.between is not None and step.between.ci:
            low, high = (level + points for points in step.between.ci)
            axes.errorbar(place, accuracy, yerr=[[accuracy - low], [high - accuracy]], fmt="none", color="black", capsize=3)
        axes.annotate(
            f"{step.between.points:+.1f}" if step.between else f"{accuracy:.1f}",
            (place, max(start, accuracy)),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize="small",
        )
        level = accuracy
    first = result.steps[0].record
    axes.set_xticks(range(len(result.steps)), [step.name for step in result.steps], rotation=30, ha="right")
    axes.set(
        ylabel="test accuracy, % (crosses: not kept)",
        title=f"{first.dataset}, {first.backbone}",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small")
    return save_figure(figure, path)
