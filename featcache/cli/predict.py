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
def predict_command(head: Path, images: tuple[str, ...], target: Path | None, as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Label IMAGES (files, folders, or - for a list on stdin) with a HEAD that `featcache fit` wrote.

    CSV with path, label and the probability of each class; an image that cannot be read gets a row with its reason.
    """
    from featcache.api import predict

    paths = [line.rstrip("\n") for line in sys.stdin if line.strip()] if images == ("-",) else list(images)
    bundle, found = predict(
        head, paths, settings=options.take_settings(given), weights=given["weights"], trust=given["trust"]
    )
    if target is None:
        _write(sys.stdout, bundle, found, as_json=as_json)
        return
    with target.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        _write(file, bundle, found, as_json=as_json)


def _write(file: Any, bundle: "Bundle", found: "Iterator[Prediction]", *, as_json: bool) -> None:
    if as_json:
        from featcache.reports.records import SCHEMA_VERSION

        for one in found:
            known = None if one.probabilities is None else dict(zip(bundle.classes, one.probabilities.tolist(), strict=True))
            said = {"path": one.path, "label": one.label, "probabilities": known, "reason": one.reason}
            file.write(json.dumps({"schema_version": SCHEMA_VERSION, **said}) + "\n")
        return
    from featcache.progress import printable
    from featcache.reports.tables import inert

    writer = csv.writer(file, lineterminator="\n")
    knows = hasattr(bundle.estimator, "predict_proba")
    shown = printable if file.isatty() else str  # a terminal obeys what stands in a file's name; a file keeps it
    writer.writerow(["path", "label", *(map(inert, _columns(bundle.classes)) if knows else ()), "reason"])
    for one in found:
        numbers = (
            [f"{value:.6g}" for value in one.probabilities] if one.probabilities is not None else [""] * len(bundle.classes)
        )
        path, label, reason = (shown(inert(text or "")) for text in (one.path, one.label, one.reason))
        writer.writerow([path, label, *(numbers if knows else ()), reason])


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
def export_command(head: Path, out: Path, as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Write a HEAD with its backbone as one ONNX model, OUT, after it has agreed with them on real images."""
    from featcache.api import export

    settings = options.take_settings(given)
    model = export(head, out, check=given["check"], weights=given["weights"], trust=given["trust"], settings=settings)
    if as_json:
        summary = {"model": str(model.path), "difference": model.difference, "images": model.images}
        options.emit(summary | {"notes": list(model.notes)})
        return
    click.echo(f"{model.path}: scores differ by at most {model.difference:.1g} on {model.images} images")
