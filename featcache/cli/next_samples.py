"""``featcache next``."""

from pathlib import Path
from typing import Any

import click

from featcache.cli import options


@click.command("next", cls=options.Command)
@options.source_options
@options.grouped(
    "Choice",
    click.option("--n", "n", type=options.POSITIVE, default="50", show_default=True, help="Choose so many."),
    click.option(
        "--unlabelled",
        multiple=True,
        metavar="PATH",
        help="Choose from these too: a file, a folder, or a table of paths; repeat it for more.",
    ),
    click.option(
        "--group",
        metavar="COLUMN",
        help="Choose one of each value of this column of a CSV or Parquet, such as patient, before another of it.",
    ),
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped("Output", click.option("--csv", "csv_file", type=options.FILE, help="Write the choice into this CSV."))
@options.json_option
def next_command(as_json: bool, csv_file: Path | None, **flags: Any) -> None:  # noqa: FBT001
    """Choose what to label next: what stands for most of the rest, and later what a probe is unsure of, too.

    Without a label is a row of a table whose label is empty, an image of a folder without class folders, and what
    --unlabelled names. What the choice is worth is simulated on the labels that are there.
    """
    from featcache.api import next_samples
    from featcache.datasets.unlabelled import open_partly
    from featcache.reports.audit import write_csv

    spec, settings = options.take_spec(flags), options.take_settings(flags)
    names = {name: flags.pop(name) for name in ("data", "name", "data_root", "download", "group")}
    opened = open_partly(**names)
    result = next_samples(opened, spec, settings=settings, **flags)
    if csv_file is not None:
        write_csv(csv_file, result.csv)
    if as_json:
        options.emit(result.summary)
        return
    click.echo(result.table().plain())
    if csv_file is not None:
        click.echo(str(csv_file))
