"""Pictures of fine-tuning: how it learned, and accuracy against its price."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.errors import SetupError, UsageError
from featcache.reports.records import RunRecord
from featcache.store.atomic import make_folder, replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMATS = ("png", "svg", "pdf")


def require_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is computed for it.

    Raises:
        UsageError: its format is none that is known.
        SetupError: matplotlib is not installed.
    """
    if path.suffix.removeprefix(".") not in _FORMATS:
        raise UsageError(f"{path}: pictures end in {', '.join(f'.{name}' for name in _FORMATS)}.")
    _figure(1)


def draw_records(records: Sequence[RunRecord], path: Path) -> Path:
    """Draw fine-tuning records: loss and accuracy over the epochs, and test accuracy against seconds beside the probe.

    Args:
        records: of fine-tuning runs on the same images.
        path: of the picture; its suffix says which format.

    Raises:
        UsageError: the format is none that is known.
        SetupError: matplotlib is not installed.
        StorageError: the disk failed.
    """
    import io

    require_picture(path)
    figure = _figure(3)
    losses, accuracies, prices = figure.subplots(1, 3)
    for number, record in enumerate(records):
        curve, colour = record.params["curve"], f"C{number}"
        epochs = range(len(curve))
        for column, style, axes in ((0, ":", losses), (2, "-", losses), (1, ":", accuracies), (3, "-", accuracies)):
            values = [
                float("nan") if epoch[column] is None else epoch[column] * (100 if axes is accuracies else 1)
                for epoch in curve
            ]
            name = record.method if style == "-" else None
            axes.plot(epochs, values, style, color=colour, label=name, marker="o", markersize=3)
            if style == "-" and (best := record.params["best_epoch"]) < len(values):
                axes.plot(best, values[best], "o", color=colour, markersize=9, fillstyle="none")
        seconds = sum(record.seconds.values())
        _point(prices, seconds, record.test, record.method, colour)
    first = records[0]
    if first.probe is not None:
        _point(prices, sum(first.probe["seconds"].values()), first.probe["test"], f"probe ({first.probe['head']})", "black")
    smoothing = first.request.get("plan", {}).get("label_smoothing", 0.0)
    smoothed = f", labels smoothed by {smoothing:g}" if smoothing else ""
    losses.set(xlabel="epoch (ringed: kept)", ylabel=f"loss (dotted: training{smoothed})")
    accuracies.set(xlabel="epoch (ringed: kept)", ylabel="accuracy, % (dotted: training)")
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
    prices.set(xlabel="seconds, extraction included", ylabel="test accuracy, % (95 % interval)", xscale="log")
    prices.margins(0.15, 0.25)  # room for the legend
    for which in (prices.xaxis.set_major_formatter, prices.xaxis.set_minor_formatter):
        which("{x:g}")  # 90, not 9 x 10^1
    for axes in (losses, accuracies, prices):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.suptitle(f"{first.dataset}, {first.backbone}")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=120)
    make_folder(path.parent)
    replace_file(path, content.getvalue())
    return path


def _point(axes: Any, seconds: float, test: dict[str, Any], name: str, colour: str) -> None:
    accuracy, interval = 100 * test["accuracy"], test["accuracy_ci"]
    spread = [[accuracy - 100 * interval[0]], [100 * interval[1] - accuracy]] if interval else None
    axes.errorbar(max(seconds, 1e-3), accuracy, yerr=spread, fmt="o", color=colour, label=name, capsize=3)


def _figure(panels: int) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("pictures need matplotlib: `pip install 'featcache[plot]'`.") from None
    return Figure(figsize=(5 * panels, 4), layout="constrained")
