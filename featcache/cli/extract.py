"""``featcache extract``."""

from typing import Any

import click

from featcache.cli import options


@click.command("extract", cls=options.Command)
@options.source_options
@options.grouped(
    "What is stored",
    click.option(
        "--cut",
        "cuts",
        metavar="CUT",
        multiple=True,
        default=["pooled"],
        show_default=True,
        help="Store the activations at this cut: pooled, a stage's name, or input; repeat it: all come from one pass.",
    ),
    click.option(
        "--layers", metavar="A,B", help="Store the pooled activations of these layers side by side, instead of --cut."
    ),
    click.option(
        "--dtype",
        type=click.Choice(["float32", "float16"]),
        help="Store rows as this; by default embeddings are float32 and activations of a stage float16.",
    ),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
        show_default=True,
        help="Store so many views of each image: the usual one first, then seeded augmentations.",
    ),
    click.option("--views-seed", type=options.SEED, default=0, show_default=True, help="Draw augmentations from this seed."),
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Computing",
    click.option(
        "--part", type=options.PART, help="Compute this share only, such as 2/4: several processes may fill one entry."
    ),
    click.option(
        "--engine",
        type=click.Choice(["local", "ray"]),
        default="local",
        show_default=True,
        help="Compute on this machine, or on the Ray cluster that it belongs to.",
    ),
    click.option("--dry-run", is_flag=True, help="Say what would be computed and written and how long it takes, and stop."),
)
@options.json_option
def extract_command(as_json: bool, dry_run: bool, **flags: Any) -> None:  # noqa: FBT001
    """Compute the features of DATA once and keep them; run again, only new and changed images are computed."""
    from featcache.api import estimate, extract_cuts
    from featcache.reports.wording import extract_lines
    from featcache.specs import Views

    spec, settings, dataset = options.take_inputs(flags)
    options.announce(dataset, spec)
    cuts, layers = flags.pop("cuts"), flags.pop("layers")
    if layers:
        from featcache.specs import cut_of_layers

        cuts = (cut_of_layers(layers.split(",")),)
    flags["views"] = Views(flags.pop("views"), flags.pop("views_seed"))
    if dry_run:
        _print_estimate(estimate(dataset, spec, cuts=cuts, settings=settings, **flags), as_json=as_json)
        return
    results = extract_cuts(dataset, spec, cuts=cuts, settings=settings, **flags)
    if as_json:
        summaries = [result.summary for result in results]
        options.emit(summaries[0] if len(summaries) == 1 else {"extracts": summaries})
        return
    for result in results:
        for line in extract_lines(result):
            click.echo(line)


def _print_estimate(estimate: Any, *, as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        options.emit({"dry_run": asdict(estimate)})
        return
    click.echo(
        f"{estimate.images} images, {estimate.to_compute} to compute: {estimate.bytes / 1e6:.1f} MB to write, "
        f"about {estimate.seconds:.0f} s (without a faster runtime)"
    )
