"""``featcache backbones``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from featcache.cli import options


@click.command()
@click.argument("pattern", default="*")
@click.option("--sizes", is_flag=True, help="Also parameters and embedding width (builds each model: slow for many).")
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Which cache ($FEATCACHE_CACHE).")
@options.json_option
def command(pattern: str, sizes: bool, cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the backbones whose name matches PATTERN (a shell pattern such as 'resnet*').

    Up to 20 matches, sizes are shown as well.
    """
    from featcache.backbones.timm_models import list_backbones, model_size
    from featcache.extraction.lookup import default_cache, entry_folders

    cached = {folder.name.split(".")[0] for folder in entry_folders(cache or default_cache())}
    found = list(list_backbones(pattern))
    few = 20
    rows = []
    for facts in found:
        row: dict[str, Any] = {
            "name": facts.name,
            "input_size": facts.input_size,
            "pretrained": facts.pretrained,
            "cached": facts.name.split(".")[0] in cached,
        }
        if sizes or len(found) <= few:
            size = model_size(facts.name)
            row |= asdict(size) if size else {}
        rows.append(row)
    if as_json:
        options.emit({"backbones": rows})
        return
    for row in rows:
        measured = ""
        if "width" in row:
            measured = f"{row['parameters'] / 1e6:7.1f} M parameters {row['gmacs']:7.2f} GMACs  width {row['width']:5}"
        marks = ("pretrained" if row["pretrained"] else "no weights") + (", cached" if row["cached"] else "")
        click.echo(f"{row['name']:45} {row['input_size']:4} px {measured}  {marks}")
    if not rows:
        click.echo(f"no backbone matches {pattern!r}")
