"""``featcache finetune``."""

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from featcache.cli import options
from featcache.finetuning.plan import OPTIMISERS, RATES, FineTunePlan

if TYPE_CHECKING:
    from featcache.reports.records import RunRecord

_PLAN = tuple(field.name for field in fields(FineTunePlan) if field.name not in {"unfreeze", "batch_size"})
_recipe = options.several(
    click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="At most."),
    click.option(
        "--patience", type=click.IntRange(min=1), default=3, show_default=True, help="Epochs without gain that end it."
    ),
    click.option("--train-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images at a time."),
    click.option(
        "--accumulate", type=click.IntRange(min=1), default=1, show_default=True, help="Batches a step of the optimiser."
    ),
    click.option(
        "--lr",
        "--lr-sweep",
        multiple=True,
        type=options.NUMBER,
        default=RATES,
        show_default=True,
        help="Of the last stage; the best on validation is kept; may be repeated.",
    ),
    click.option("--head-lr", type=options.NUMBER, default=1e-3, show_default=True, help="Of the head."),
    click.option(
        "--layer-decay",
        type=options.NUMBER,
        default=0.75,
        show_default=True,
        help="Factor from each stage to the one before.",
    ),
    click.option("--optimiser", type=click.Choice(OPTIMISERS), default="adamw", show_default=True, help="What steps."),
    click.option("--weight-decay", type=options.NUMBER, default=0.05, show_default=True, help="Of matrices."),
    click.option(
        "--warmup", type=options.NUMBER, default=0.1, show_default=True, help="Share of steps in which rates rise."
    ),
    click.option("--label-smoothing", type=options.NUMBER, default=0.1, show_default=True, help="Of the training loss."),
    click.option(
        "--views",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Stored augmentations an image, view 0 the plain one; every epoch draws one.",
    ),
    click.option("--augment", is_flag=True, help="Flip and shift pixels as they are read (--unfreeze all)."),
    click.option("--mixup", type=options.NUMBER, default=0.0, show_default=True, help="Alpha of mixing pairs; 0: none."),
    click.option("--drop-path", type=options.NUMBER, default=0.0, show_default=True, help="Of the last residual branch."),
    click.option("--ema", type=options.NUMBER, default=0.0, show_default=True, help="Decay of averaged weights; 0: none."),
    click.option(
        "--clip", type=options.NUMBER, default=0.0, show_default=True, help="Greatest norm of the gradient; 0: none."
    ),
    click.option("--train-batchnorm", is_flag=True, help="Let BatchNorm statistics of the trained part move."),
    click.option(
        "--train-precision",
        type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
        help="Of training steps; default: bfloat16 on GPUs that have it, else float32; auto: on CPUs (AMX) too, if faster.",
    ),
    click.option("--dtype", type=click.Choice(["float32", "float16"]), help="Of the stored activations; default float16."),
    click.option("--refit/--no-refit", default=True, show_default=True, help="Train once more on train and val together."),
)


@click.command()
@options.source_options
@options.backbone_options
@click.option(
    "--unfreeze",
    default="last:1",
    show_default=True,
    help="last:K stages, P% of parameters, a stage's name, all; norm, bias or lora:R, with :STAGES behind.",
)
@click.option("--sweep", "at_every_depth", is_flag=True, help="Every depth, from the last stage to all, instead.")
@_recipe
@click.option(
    "--cache-budget",
    type=options.Bytes(),
    help="Room for stored activations, such as 20GB; beyond it they are computed in every epoch.",
)
@click.option(
    "--probe",
    "probes",
    multiple=True,
    help="One more head beside ridge, knn and logistic: the gap is to the best of them on validation.",
)
@options.group_option
@click.option("--price", type=options.NUMBER, help="Of an hour on this machine, to tell the costs in money.")
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="A picture of the curves: .png, .svg, .pdf.")
@options.seed_option
@options.run_options
@options.json_option
def command(as_json: bool, at_every_depth: bool, price: float | None, plot: Path | None, **given: Any) -> None:  # noqa: FBT001
    """Train the last part of a backbone from cached activations and print the gap to the best probe."""
    from dataclasses import replace

    from featcache.api import finetune, sweep
    from featcache.finetuning.plan import Unfreeze
    from featcache.reports.plots import draw, require_picture
    from featcache.reports.wording import finetune_lines

    if plot is not None:
        require_picture(plot)
    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    settings = replace(settings, budget=given.pop("cache_budget"))
    given["precision"] = given.pop("train_precision")
    plan = FineTunePlan(
        Unfreeze.parse(given.pop("unfreeze")),
        batch_size=given.pop("train_batch"),
        **{name: given.pop(name) for name in _PLAN},
    )
    options.announce(source, spec)
    result = (sweep if at_every_depth else finetune)(source, spec, plan=plan, settings=settings, **given)
    if int(os.environ.get("RANK", "0")):  # of several processes one speaks
        return
    records = [job.record for job in result.jobs]
    if plot is not None:
        draw(records, plot)
    money = [_money(record, price) for record in records] if price else []
    if as_json:
        options.emit(result.summary | ({"money": money} if price else {}))
        return
    for line in finetune_lines(records):
        click.echo(line)
    for name, cost in zip((record.method for record in records), money, strict=False):
        click.echo(f"{name}: price {cost['tuned']:.4f}, of the probe {cost['probe']:.4f}")
    for job in result.jobs:
        click.echo(f"{job.record.method} is kept in {job.checkpoint}, its head in {job.bundle}.")
    if plot is not None:
        click.echo(str(plot))


def _money(record: "RunRecord", price: float | None) -> dict[str, float]:
    """Return what fine-tuning and the probe have cost."""
    probe = record.probe or {"seconds": {}}
    return {
        name: round(sum(seconds.values()) / 3600 * (price or 0), 6)
        for name, seconds in (("tuned", record.seconds), ("probe", probe["seconds"]))
    }
