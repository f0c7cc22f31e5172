"""``featcache finetune`` and ``featcache gap``."""

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from featcache.cli import options
from featcache.finetuning import OPTIMISERS, RATES, FineTunePlan, Unfreeze
from featcache.specs import Precision

if TYPE_CHECKING:
    from featcache.reports import RunRecord

_PLAN = tuple(field.name for field in fields(FineTunePlan) if field.name not in {"unfreeze", "batch_size", "precision"})


@click.command("finetune", cls=options.Command)
@options.source_options
@options.grouped(
    "What trains",
    click.option(
        "--unfreeze",
        metavar="PART",
        default="last:1",
        help="Train this part: last:K stages, P% of the parameters, a stage and all behind it, or all; norm, bias or lora:R "
        "train those alone, with :last:K behind of the last K stages.",
    ),
    click.option(
        "--sweep", "at_every_depth", is_flag=True, help="Train at every depth instead, from the last stage to all."
    ),
    click.option(
        "--train-batchnorm/--no-train-batchnorm",
        default=None,
        help="Let BatchNorm statistics of the trained part move, or not; by default validation chooses where images have "
        "another size than in pretraining.",
    ),
    click.option(
        "--dtype", type=click.Choice(["float32", "float16"]), help="Store activations as this; by default as float16."
    ),
    options.cache_budget_option,
    click.option(
        "--refit/--no-refit",
        default=True,
        help="Train once more on train and validation together, as long as the best epoch on validation.",
    ),
)
@options.grouped(
    "Optimisation",
    click.option("--epochs", type=options.POSITIVE, default=10, help="Train so many epochs at most."),
    click.option(
        "--patience",
        type=options.POSITIVE,
        default=3,
        help="End a training after so many epochs without gain on validation.",
    ),
    click.option("--train-batch", type=options.POSITIVE, default=32, help="Train on so many images at a time."),
    click.option(
        "--accumulate", type=options.POSITIVE, default=1, help="Add up the gradients of so many batches before each step."
    ),
    click.option(
        "--lr",
        "--lr-sweep",
        multiple=True,
        type=options.NUMBER,
        default=RATES,
        help="Try this rate for the last stage; repeat it: the best on validation is kept.",
    ),
    click.option("--head-lr", type=options.NUMBER, default=1e-3, help="Train the head at this rate."),
    click.option(
        "--layer-decay",
        type=options.NUMBER,
        default=0.75,
        help="Multiply the rate by this from each stage to the one before it.",
    ),
    click.option("--optimiser", type=click.Choice(OPTIMISERS), default="adamw", help="Step with this."),
    click.option("--weight-decay", type=options.NUMBER, default=0.05, help="Decay weight matrices by this."),
    click.option(
        "--warmup", type=options.NUMBER, default=0.1, help="Let rates rise over this share, from 0 to 1, of all steps."
    ),
    click.option("--clip", type=options.NUMBER, default=0.0, help="Clip gradients to this norm; 0 does not."),
    click.option("--ema", type=options.NUMBER, default=0.0, help="Average weights with this decay; 0 does not."),
    click.option(
        "--train-precision",
        type=click.Choice([*get_args(Precision), "auto"]),
        help="Train in this precision; by default bfloat16 on GPUs that have it, else float32; auto: on CPUs, if faster.",
    ),
)
@options.grouped(
    "Regularisation",
    click.option("--label-smoothing", type=options.NUMBER, default=0.1, help="Smooth labels by this in training."),
    click.option("--mixup", type=options.NUMBER, default=0.0, help="Mix pairs with this alpha; 0 does not."),
    click.option(
        "--drop-path", type=options.NUMBER, default=0.0, help="Leave out the last residual branch this often; 0 never does."
    ),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
        help="Store so many views of each image, the plain one and augmentations; every epoch draws one of them.",
    ),
    click.option("--augment", is_flag=True, help="Flip and shift stored pixels as they are read (with --unfreeze all)."),
)
@options.grouped(
    "Comparison",
    click.option(
        "--probe",
        "probes",
        multiple=True,
        type=options.Head(),
        help="Compare with this head too: the gap is to the best on validation of ridge, knn, logistic and these.",
    ),
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    options.price_option,
    options.track_option,
    click.option("--plot", type=options.FILE, help="Draw loss, accuracy and costs into this file: .png, .svg or .pdf."),
)
@options.json_option
def finetune_command(as_json: bool, at_every_depth: bool, price: float | None, plot: Path | None, **flags: Any) -> None:  # noqa: FBT001
    """Train the last part of a backbone from cached activations and print the gap to the best probe."""
    from featcache.api import finetune, sweep
    from featcache.reports.tables import draw_records, require_picture
    from featcache.reports.wording import finetune_lines

    if plot is not None:
        require_picture(plot)
    plan = FineTunePlan(
        Unfreeze.parse(flags.pop("unfreeze")),
        batch_size=flags.pop("train_batch"),
        precision=flags.pop("train_precision"),
        **{name: flags.pop(name) for name in _PLAN},
    )
    spec, settings, dataset = options.take_inputs(flags)
    settings = replace(settings, budget=flags.pop("cache_budget"))
    result = (sweep if at_every_depth else finetune)(dataset, spec, plan=plan, settings=settings, **flags)
    if int(os.environ.get("RANK", "0")):  # of several processes one speaks
        return
    records = [job.record for job in result.jobs]
    if plot is not None:
        draw_records(records, plot)
    money = [_money(record, price) for record in records] if price else []
    if as_json:
        options.emit(result.summary | ({"money": money} if price else {}))
        return
    options.show(finetune_lines(records))
    for name, cost in zip((record.short_method for record in records), money, strict=False):
        click.echo(f"{name}: price {cost['tuned']:.4f}, of the probe {cost['probe']:.4f}")
    options.show(
        (f"{job.record.short_method} is kept in {job.checkpoint}, its head in {job.bundle}." for job in result.jobs), plot
    )
    options.tell_page(records[0].dataset, settings.cache)


def _money(record: "RunRecord", price: float | None) -> dict[str, float]:
    """Return what fine-tuning and the probe have cost."""
    probe = record.probe or {"seconds": {}}
    # extraction is part of the price of both, each counted as if it had been alone
    return {
        name: round(sum(seconds.values()) / 3600 * (price or 0), 6)
        for name, seconds in (("tuned", record.seconds), ("probe", probe["seconds"]))
    }


@click.command("gap", cls=options.Command)
@options.source_options
@options.grouped(
    "Steps",
    click.option(
        "--budget", type=options.SECONDS, help="Begin no further step after this time, such as 10m; a second run goes on."
    ),
    click.option("--epochs", type=options.POSITIVE, default=10, help="Train so many epochs at most."),
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
    from featcache.api import gap
    from featcache.reports.tables import require_picture
    from featcache.reports.wording import draw_gap, gap_lines

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
    options.show(gap_lines(result, price), plot)
    options.tell_page(result.steps[0].record.dataset, settings.cache)
