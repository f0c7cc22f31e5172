"""``featcache audit``."""

from pathlib import Path
from typing import Any

import click

from featcache.cli import options


@click.command("audit", cls=options.Command)
@options.source_options
@options.grouped(
    "Audit",
    click.option(
        "--beside",
        multiple=True,
        default=("mini",),
        show_default=True,
        metavar="BACKBONE|none",
        help="Heads on embeddings of this backbone doubt labels too; repeat it for more, none for no other.",
    ),
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    click.option("--csv", "csv_file", type=options.FILE, help="Write all suspects into this CSV."),
    click.option(
        "--fix",
        "fixed",
        type=options.FILE,
        help="Write a CSV manifest of the images without training copies of test images, exact copies and blank images; no "
        "image is touched.",
    ),
)
@options.json_option
def audit_command(
    *, as_json: bool, csv_file: Path | None, fixed: Path | None, beside: tuple[str, ...], **flags: Any
) -> None:
    """Look for copies across splits, likely wrong labels, odd images and shortcuts, and say what they do to test accuracy.

    Copies are found though they are encoded again, resized or mirrored. Nothing is changed.
    """
    from featcache.api import audit
    from featcache.experiments.audit import cleaned
    from featcache.reports.audit import audit_lines, manifest_csv, suspects_csv, write_csv

    spec, settings, dataset = options.take_inputs(flags)
    if fixed is not None:
        cleaned(dataset, {})  # what no manifest can list is refused before anything is computed
    backbones = [name for name in beside if name != "none"]
    result = audit(dataset, spec, beside=backbones, settings=settings, **flags)
    if csv_file is not None:
        write_csv(csv_file, suspects_csv(result.suspects))
    if fixed is not None:
        write_csv(fixed, manifest_csv(cleaned(dataset, result.dropped)))
    if as_json:
        options.emit(result.summary)
        return
    for line in audit_lines(result):
        click.echo(line)
    if csv_file is not None:
        click.echo(str(csv_file))
    if fixed is not None:
        click.echo(f"{fixed}: without {len(result.dropped)} images")
