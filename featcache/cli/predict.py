"""``featcache predict`` and ``featcache export``."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import options

if TYPE_CHECKING:
    from featcache.experiments.predict import Prediction
    from featcache.heads.bundle import Bundle


head_options = options.grouped(
    "Head",
    click.option("--weights", help="Look for the backbone's weights file here, if it has moved."),
    click.option("--trust", is_flag=True, help="Load a head that somebody else made: it can run any code."),
)


@click.command("predict", cls=options.Command)
@click.argument("head", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True, type=click.Path())
@head_options
@options.compute_options
@options.grouped(
    "Output",
    click.option("--to", "target", type=click.Path(path_type=Path), help="Write to this file instead of to stdout."),
    click.option("--json", "as_json", is_flag=True, help="Write one JSON object a line instead of CSV."),
)
def predict_command(head: Path, images: tuple[str, ...], target: Path | None, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Label IMAGES (files, folders, or - for a list on stdin) with a HEAD that `featcache fit` wrote.

    CSV with path, label and the probability of each class; an image that cannot be read gets a row with its reason.
    """
    from featcache.api import predict

    paths = [line.rstrip("\n") for line in sys.stdin if line.strip()] if images == ("-",) else list(images)
    settings = options.take_settings(flags)
    bundle, predictions = predict(head, paths, settings=settings, weights=flags["weights"], trust=flags["trust"])
    if target is None:
        _write(sys.stdout, bundle, predictions, as_json=as_json)
        return
    # paths that are no UTF-8 go out as the bytes they came in
    with target.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        _write(file, bundle, predictions, as_json=as_json)


def _write(file: Any, bundle: "Bundle", predictions: "Iterator[Prediction]", *, as_json: bool) -> None:
    if as_json:
        from featcache.reports.records import SCHEMA_VERSION

        for image in predictions:
            numbers = image.probabilities
            shares = None if numbers is None else dict(zip(bundle.classes, numbers.tolist(), strict=True))
            facts = {"path": image.path, "label": image.label, "probabilities": shares, "reason": image.reason}
            file.write(json.dumps({"schema_version": SCHEMA_VERSION, **facts}) + "\n")
        return
    from featcache.progress import printable
    from featcache.reports.tables import inert

    writer = csv.writer(file, lineterminator="\n")
    shown = printable if file.isatty() else str  # a terminal obeys what stands in a file's name; a file keeps it
    columns = _columns(bundle.classes) if hasattr(bundle.estimator, "predict_proba") else []
    writer.writerow(["path", "label", *map(inert, columns), "reason"])
    for image in predictions:
        numbers = image.probabilities
        cells = [""] * len(columns) if numbers is None else [f"{number:.6g}" for number in numbers][: len(columns)]
        path, label, reason = (shown(inert(text or "")) for text in (image.path, image.label, image.reason))
        writer.writerow([path, label, *cells, reason])


def _columns(classes: Sequence[str]) -> list[str]:
    """Return what the columns of probabilities are called: classes' names, marked where one is a column's name already."""
    clash = not {"path", "label", "reason"}.isdisjoint(classes)
    return [f"p({name})" if clash else name for name in classes]


@click.command("export", cls=options.Command)
@click.argument("head", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@head_options
@options.grouped(
    "Head",
    click.option(
        "--check", metavar="DATA", help="Compare on these images; by default on those that the head was trained on."
    ),
)
@options.compute_options
@options.json_option
def export_command(head: Path, out: Path, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Write a HEAD with its backbone as one ONNX model, OUT, after it has agreed with them on real images."""
    from featcache.api import export

    settings = options.take_settings(flags)
    model = export(head, out, check=flags["check"], weights=flags["weights"], trust=flags["trust"], settings=settings)
    if as_json:
        summary = {"model": str(model.path), "difference": model.difference, "images": model.images}
        options.emit(summary | {"notes": list(model.notes)})
        return
    click.echo(f"{model.path}: scores differ by at most {model.difference:.1g} on {model.images} images")
