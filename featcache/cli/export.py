"""``featcache export``."""

from pathlib import Path
from typing import Any

import click

from featcache.cli import options


@click.command()
@click.argument("head", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--check", help="Images to compare on, as DATA; by default the data set that the head was trained on.")
@click.option("--weights", help="Where the backbone's weights file is now.")
@click.option("--trust", is_flag=True, help="Load a head that somebody else made: it can run any code.")
@options.compute_options
@options.json_option
def command(head: Path, out: Path, as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Write a HEAD with its backbone as one ONNX model, OUT, after it has agreed with them on real images."""
    from featcache.api import export

    settings = options.take_settings(given)
    done = export(head, out, check=given["check"], weights=given["weights"], trust=given["trust"], settings=settings)
    if as_json:
        summary = {"model": str(done.path), "difference": done.difference, "images": done.images}
        options.emit(summary | {"notes": list(done.notes)})
        return
    click.echo(f"{done.path}: scores differ by at most {done.difference:.1g} on {done.images} images")
