"""``featcache bench``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import options

if TYPE_CHECKING:
    from featcache.experiments.bench import BenchResult

FAILED = 3


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder for records and tables.")
@click.option("--group", help="A manifest's column, of all data sets that name none: its values are never in two parts.")
@options.run_options
@options.json_option
def command(pipeline: Path, out: Path | None, group: str | None, as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Run the missing cells of PIPELINE, a TOML file, and write its records and tables.

    Without --out they go to benchmarks/ where there is one, else to the current folder.
    """
    from featcache.api import bench

    settings = options.take_settings(given)
    show(bench(pipeline, out=out, group=group, settings=settings), as_json=as_json)


def show(result: "BenchResult", *, as_json: bool) -> None:
    """Print a grid's table or its JSON; end with 3 where a cell failed."""
    from dataclasses import asdict

    from featcache.cli.border import spelling
    from featcache.reports.tables import plain

    if as_json:
        options.emit(
            {
                "records": [asdict(record) for record in result.records],
                "tables": result.paths,
                "failures": list(map(spelling(click.get_current_context()), result.failures)),
                "computed_images": result.computed_images,
                "computed_cells": result.computed_cells,
            }
        )
    else:
        click.echo(plain(result.records))
        click.echo("gap: points of test accuracy to the head that is best on validation, on the same images")
        click.echo(f"{result.computed_images} images computed, {result.computed_cells} cells run. {result.paths['md']}")
    if result.failures:
        click.get_current_context().exit(FAILED)
