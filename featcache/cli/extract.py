"""``featcache extract``."""

from typing import Any

import click

from featcache.cli import options


@click.command()
@options.data_argument
@options.backbone_options
@click.option("--cut", default="pooled", show_default=True, help="pooled, a stage's name, or input.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="Of stored rows; pooled float32, stages float16.")
@options.run_options
@options.json_option
def command(as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Compute the features of DATA once and keep them; run again, only new and changed images are computed."""
    from featcache.api import extract

    spec, settings = options.take_spec(given), options.take_settings(given)
    done = extract(given.pop("data"), spec, settings=settings, **given)
    summary = done.summary
    if as_json:
        options.emit(summary)
        return
    speed = f", {summary['images_per_second']} images/s" if summary["images_per_second"] else ""
    click.echo(
        f"{summary['rows']} rows ({summary['computed']} computed in {summary['seconds']:.1f} s{speed}, "
        f"{summary['reused']} reused, {len(summary['quarantined'])} images left out)"
    )
    click.echo(f"{done.store.path}/features.h5" if (done.store.path / "features.h5").exists() else done.store.path)
