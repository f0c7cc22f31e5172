"""``featcache gap``."""

from pathlib import Path
from typing import Any

import click

from featcache.cli import options


@click.command("gap", cls=options.Command)
@options.source_options
@options.grouped(
    "Steps",
    click.option(
        "--budget", type=options.SECONDS, help="Begin no further step after this time, such as 10m; a second run goes on."
    ),
    click.option("--epochs", type=options.POSITIVE, default=10, show_default=True, help="Train so many epochs at most."),
    options.cache_budget_option,
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    options.price_option,
    options.track_option,
    click.option("--plot", type=options.FILE, help="Draw the steps as a waterfall into this file: .png, .svg or .pdf."),
)
@options.json_option
def gap_command(as_json: bool, price: float | None, plot: Path | None, epochs: int, **flags: Any) -> None:  # noqa: FBT001
    """Take the gap between a linear probe and the whole network tuned apart: pooling, other layers, attention, weights.

    Every step is tested on the same images, and kept where it is better on validation than all before it: what the kept ones
    add adds up to the whole gap. What was fitted or trained before is taken from the cache.
    """
    from dataclasses import replace

    from featcache.api import gap
    from featcache.finetuning.plan import FineTunePlan, Unfreeze
    from featcache.reports.gap import draw_gap, gap_lines
    from featcache.reports.tables import require_picture

    if plot is not None:
        require_picture(plot)
    spec, settings, dataset = options.take_inputs(flags)
    settings = replace(settings, budget=flags.pop("cache_budget"))
    plan = FineTunePlan(Unfreeze.parse("all"), epochs=epochs)
    result = gap(dataset, spec, plan=plan, settings=settings, **flags)
    if plot is not None:
        draw_gap(result, plot)
    if as_json:
        money = [round(step.seconds / 3600 * price, 6) for step in result.steps] if price else []
        options.emit(result.summary | ({"money": money} if price else {}))
        return
    for line in gap_lines(result, price):
        click.echo(line)
    if plot is not None:
        click.echo(str(plot))
    options.tell_page(result.steps[0].record.dataset, settings.cache)
