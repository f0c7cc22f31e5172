"""``featcache store``."""

from pathlib import Path
from typing import Any

import click

from featcache.cli import options

DAMAGED = 4
cache_option = click.option(
    "--cache", type=click.Path(path_type=Path, file_okay=False), help="Which cache ($FEATCACHE_CACHE)."
)


@click.group()
def command() -> None:
    """List, describe, verify and clean up what the cache holds."""


@command.command("ls")
@cache_option
@options.json_option
def list_entries(cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the entries with their rows and sizes."""
    from featcache.errors import StorageError
    from featcache.extraction.lookup import default_cache, entry_folders
    from featcache.progress import printable
    from featcache.store.entry import FeatureStore

    where = cache or default_cache()
    found, broken = [], []
    for folder in entry_folders(where):
        try:
            found.append(_facts(FeatureStore.open(folder)))
        except StorageError as error:
            broken.append(str(error))
    if as_json:
        options.emit({"cache": str(where), "entries": found, "broken": broken})
    else:
        for facts in found:
            state = "" if facts["complete"] else "  not complete"
            click.echo(f"{facts['rows']:>9} rows {facts['bytes'] / 1e6:>9.1f} MB  {facts['entry']}{state}")
        for problem in broken:
            click.echo(f"   broken: {printable(problem)}")
        if not found and not broken:
            click.echo(f"nothing in {where}")
    if broken:
        click.get_current_context().exit(DAMAGED)


@command.command()
@click.argument("entry", type=click.Path(path_type=Path))
@options.json_option
def info(entry: Path, as_json: bool) -> None:  # noqa: FBT001
    """Describe one entry: what its numbers depend on, its images, what was left out and why."""
    import json
    from dataclasses import asdict

    from featcache.store.entry import FeatureStore

    store = FeatureStore.open(entry)
    facts = _facts(store) | {
        "spec": store.spec,
        "manifest": store.manifest.number,
        "quarantined": [asdict(item) for item in store.manifest.quarantined],
    }
    if as_json:
        options.emit(facts)
    else:
        click.echo(json.dumps(facts, indent=1))


@command.command()
@click.argument("entries", nargs=-1, type=click.Path(path_type=Path))
@cache_option
@options.json_option
def verify(entries: tuple[Path, ...], cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Check every byte of ENTRIES (default: the whole cache) against its hash; ends with 4 where one is damaged."""
    from featcache.experiments.verify import verify as look
    from featcache.extraction.lookup import default_cache
    from featcache.progress import printable

    checked, problems = look(cache or default_cache(), entries)
    if as_json:
        options.emit({"checked": checked, "problems": problems})
    else:
        for problem in problems:
            click.echo(printable(problem))
        click.echo(f"{checked} entries checked, {len(problems)} problems")
    if problems:
        click.get_current_context().exit(DAMAGED)


@command.command()
@click.argument("entries", nargs=-1, type=click.Path(path_type=Path))
@cache_option
@click.option("--yes", is_flag=True, help="Do it; without it is only said what would be done.")
@options.json_option
def gc(entries: tuple[Path, ...], cache: Path | None, yes: bool, as_json: bool) -> None:  # noqa: FBT001
    """Remove what ENTRIES (default: all) do not need: files of killed runs, old versions, rows of removed images.

    Many small parts are joined. Let nothing else use the cache meanwhile.
    """
    from featcache.experiments.collect import collect
    from featcache.extraction.lookup import default_cache
    from featcache.progress import printable

    found = collect(cache or default_cache(), entries, act=yes)
    if as_json:
        options.emit(found.summary | {"done": yes})
    else:
        for line in (*found.lines, *found.broken):
            click.echo(printable(line))
        size = sum(one.bytes for one in found.litter)
        click.echo(
            f"{len(found.litter)} files, {size / 1e6:.1f} MB" + ("" if yes else ": nothing was changed, --yes does it")
        )
    if found.broken:
        click.get_current_context().exit(DAMAGED)


def _facts(store: Any) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "entry": str(store.path),
        "key": store.key,
        "rows": manifest.listing.rows if manifest.listing else manifest.rows,
        "stored_rows": manifest.rows,
        "bytes": sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file()),
        "complete": manifest.listing is not None,
    }
