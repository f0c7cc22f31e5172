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
        colour = f"C{number}"
        _draw_curve(losses, record, colour, train=0, val=2)
        _draw_curve(accuracies, record, colour, train=1, val=3, scale=100)
        _point(prices, sum(record.seconds.values()), record.test, record.method, colour)
    first = records[0]
    if first.probe is not None:
        _point(prices, sum(first.probe["seconds"].values()), first.probe["test"], f"probe ({first.probe['head']})", "black")
    _label_axes(losses, accuracies, prices, first.request.get("plan", {}).get("label_smoothing", 0.0))
    figure.suptitle(f"{first.dataset}, {first.backbone}")
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix.removeprefix("."), dpi=120)
    make_folder(path.parent)
    replace_file(path, content.getvalue())
    return path


def _label_axes(losses: Any, accuracies: Any, prices: Any, smoothing: float) -> None:
    smoothed = f", labels smoothed by {smoothing:g}" if smoothing else ""
    losses.set(xlabel="epoch (ringed: kept)", ylabel=f"loss (dotted: training{smoothed})")
    accuracies.set(xlabel="epoch (ringed: kept)", ylabel="accuracy, % (dotted: training)")
    for axes in (losses, accuracies):
        axes.xaxis.get_major_locator().set_params(integer=True)
    prices.set(xlabel="seconds, extraction included", ylabel="test accuracy, % (95 % interval)", xscale="log")
    prices.margins(0.15, 0.25)  # room for the legend
    for set_format in (prices.xaxis.set_major_formatter, prices.xaxis.set_minor_formatter):
        set_format("{x:g}")  # 90, not 9 x 10^1
    for axes in (losses, accuracies, prices):
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)


def _draw_curve(axes: Any, record: RunRecord, colour: str, *, train: int, val: int, scale: float = 1) -> None:
    """Draw two columns of a record's curve: training dotted, validation with the best epoch ringed."""
    curve, best = record.params["curve"], record.params["best_epoch"]
    for column, style, name in ((val, "-", record.method), (train, ":", None)):
        # Epoch 0 is the start, on which nothing was trained: its training columns are null.
        values = [float("nan") if epoch[column] is None else epoch[column] * scale for epoch in curve]
        axes.plot(range(len(curve)), values, style, color=colour, label=name, marker="o", markersize=3)
        if column == val and best < len(values):
            axes.plot(best, values[best], "o", color=colour, markersize=9, fillstyle="none")


def _point(axes: Any, seconds: float, test: dict[str, Any], name: str, colour: str) -> None:
    accuracy, interval = 100 * test["accuracy"], test["accuracy_ci"]
    spread = [[accuracy - 100 * interval[0]], [100 * interval[1] - accuracy]] if interval else None
    axes.errorbar(max(seconds, 1e-3), accuracy, yerr=spread, fmt="o", color=colour, label=name, capsize=3)


def _figure(panels: int) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SetupError("pictures need matplotlib: `pip install 'featcache[plot]'`.") from None
    # Without pyplot: no window system is asked for, and no global state is left behind.
    return Figure(figsize=(5 * panels, 4), layout="constrained")
