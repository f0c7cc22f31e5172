"""``featcache predict``."""

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


@click.command()
@click.argument("head", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, required=True)
@click.option("--weights", help="Where the backbone's weights file is now.")
@click.option("--trust", is_flag=True, help="Load a head that somebody else made: it can run any code.")
@click.option("--to", "target", type=click.Path(path_type=Path), help="Write there instead of to stdout.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line instead of CSV.")
@options.compute_options
def command(head: Path, images: tuple[str, ...], target: Path | None, as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Label IMAGES (files, folders, or - for a list on stdin) with a HEAD that ``featcache fit`` wrote.

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
