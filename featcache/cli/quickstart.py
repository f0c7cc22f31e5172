"""``featcache quickstart``."""

from pathlib import Path

import click

from featcache.cli import options


@click.command()
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Where entries go ($FEATCACHE_CACHE).")
@options.notes_options
@options.json_option
def command(cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Run probes and fine-tuning on scikit-learn's 1,797 scanned digits with the bundled backbone, and print the table.

    Needs no network. Run again, everything comes from the cache.
    """
    from importlib import resources

    from featcache.api import RECORDS, bench
    from featcache.cli.bench import show
    from featcache.extraction.feature_cache import Settings
    from featcache.extraction.lookup import default_cache

    where = cache or default_cache()
    with resources.as_file(resources.files("featcache") / "assets" / "quickstart.toml") as pipeline:
        result = bench(pipeline, out=where / RECORDS.parent, settings=Settings(where))
    show(result, as_json=as_json)
    if not as_json:
        click.echo("Now your own images: featcache fit FOLDER --head logistic --head knn")
