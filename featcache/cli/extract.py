"""``featcache extract``."""

from typing import Any

import click

from featcache.cli import options


@click.command()
@options.source_options
@options.backbone_options
@click.option(
    "--cut",
    "cuts",
    multiple=True,
    default=["pooled"],
    show_default=True,
    help="pooled, a stage's name, or input; may be repeated: one pass over the images.",
)
@click.option("--layers", metavar="A,B,...", help="Concatenate the pooled activations of several layers.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="Of stored rows; pooled float32, stages float16.")
@click.option(
    "--views", type=click.IntRange(min=1), default=1, show_default=True, help="Of each image: the usual one, augmentations."
)
@click.option("--views-seed", type=options.SEED, default=0, show_default=True, help="Of the augmentations.")
@click.option("--part", type=options.Part(), help="Compute this share only, such as 2/4; several processes fill one entry.")
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="This machine, or Ray's cluster.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be computed, written and how long it takes.")
@options.run_options
@options.json_option
def command(as_json: bool, dry_run: bool, **given: Any) -> None:  # noqa: FBT001
    """Compute the features of DATA once and keep them; run again, only new and changed images are computed."""
    from featcache.api import estimate, extract_cuts
    from featcache.reports.wording import extract_lines
    from featcache.specs import Views

    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    options.announce(source, spec)
    cuts, layers = given.pop("cuts"), given.pop("layers")
    if layers:
        from featcache.specs import cut_of_layers

        cuts = (cut_of_layers(layers.split(",")),)
    given["views"] = Views(given.pop("views"), given.pop("views_seed"))
    if dry_run:
        _print_estimate(estimate(source, spec, cuts=cuts, settings=settings, **given), as_json=as_json)
        return
    results = extract_cuts(source, spec, cuts=cuts, settings=settings, **given)
    if as_json:
        summaries = [result.summary for result in results]
        options.emit(summaries[0] if len(summaries) == 1 else {"extracts": summaries})
        return
    for result in results:
        for line in extract_lines(result):
            click.echo(line)


def _print_estimate(found: Any, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        options.emit({"dry_run": asdict(found)})
        return
    click.echo(
        f"{found.images} images, {found.to_compute} to compute: {found.bytes / 1e6:.1f} MB to write, "
        f"about {found.seconds:.0f} s (without a faster runtime)"
    )
