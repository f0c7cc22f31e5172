"""``featcache bench`` and ``featcache quickstart``."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import options

if TYPE_CHECKING:
    from featcache.experiments.bench import BenchResult

FAILED = 3
_GRID: options.Glossary = (
    "PIPELINE's keys",
    (
        ("heads, unfreeze", 'Lists of what runs, such as heads = ["logistic", "knn"] and unfreeze = ["last:1"].'),
        ("seeds", "A list of whole numbers, [0] by default: every cell runs once with each."),
        ("name, group", "What records and tables are called; a column that groups every data set that names none."),
        (
            "[[dataset]]",
            "A table for each data set: data, which is any DATA of `featcache fit --help`, and options such as name.",
        ),
        ("[[backbone]]", "A table for each backbone: name, and options such as weights; without any, mini."),
        ("[finetune]", "How everything in unfreeze trains: epochs, lr, batch_size and so on."),
    ),
)


@click.command("bench", cls=options.Command, glossary=_GRID)
@click.argument("pipeline", type=options.FILE)
@options.grouped(
    "Grid",
    click.option("--out", type=options.FOLDER, help="Write records and tables to this folder."),
    options.group_option,
    options.max_bad_option,
)
@options.run_options
@options.json_option
def bench_command(pipeline: Path, out: Path | None, group: str | None, as_json: bool, **flags: Any) -> None:  # noqa: FBT001
    """Run the missing cells of PIPELINE, a TOML file, and write its records and tables.

    A cell is a data set, a backbone, a head or fine-tuning, and a seed. Without --out records and tables go to benchmarks/
    where there is one, else to the current folder. docs/grids.md describes every key.
    """
    from featcache.api import bench

    settings = options.take_settings(flags)
    show(bench(pipeline, out=out, group=group, settings=settings), as_json=as_json)


def show(result: "BenchResult", *, as_json: bool) -> None:
    """Print a grid's table or its JSON; end with 3 where a cell failed."""
    from dataclasses import asdict

    from featcache.cli import spelling
    from featcache.reports.tables import short_table

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
        click.echo(short_table(result.records).plain())
        click.echo("gap: points of test accuracy to the head that is best on validation, on the same images")
        counts = f"{result.computed_images} images computed, {result.computed_cells} cells run"
        click.echo(f"{counts}; the table is in {result.paths['md']}, the records are in {result.paths['records']}")
    if result.failures:
        click.get_current_context().exit(FAILED)


@click.command("quickstart", cls=options.Command)
@options.cache_option
@options.notes_options
@options.json_option
def quickstart_command(cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Run probes and fine-tuning on scikit-learn's 1,797 scanned digits with the bundled backbone, and print the table.

    Needs no network. Run again, everything comes from the cache.
    """
    from importlib import resources

    from featcache.api import RECORDS, bench
    from featcache.extraction.feature_cache import Settings
    from featcache.extraction.lookup import default_cache

    where = cache or default_cache()
    with resources.as_file(resources.files("featcache") / "assets" / "quickstart.toml") as pipeline:
        result = bench(pipeline, out=where / RECORDS.parent, settings=Settings(where))
    show(result, as_json=as_json)
    if not as_json:
        click.echo("Now your own images: featcache fit FOLDER --head logistic --head knn")
