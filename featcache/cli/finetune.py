"""``featcache finetune``."""

from typing import Any

import click

from featcache.cli import options
from featcache.specs import RATES


@click.command()
@options.source_options
@options.backbone_options
@click.option(
    "--unfreeze", default="last:1", show_default=True, help="last:K stages, P% of parameters, a stage's name, all."
)
@click.option("--epochs", type=click.IntRange(min=1), default=10, show_default=True, help="At most.")
@click.option(
    "--patience", type=click.IntRange(min=1), default=3, show_default=True, help="Epochs without gain that end it."
)
@click.option("--train-batch", type=click.IntRange(min=1), default=32, show_default=True, help="Images a training step.")
@click.option(
    "--lr", multiple=True, type=float, default=RATES, show_default=True, help="Of the last stage; tried on validation."
)
@click.option("--head-lr", type=float, default=1e-3, show_default=True, help="Of the head.")
@click.option("--layer-decay", type=float, default=0.75, show_default=True, help="Factor from each stage to the one before.")
@click.option("--weight-decay", type=float, default=0.05, show_default=True, help="Of matrices.")
@click.option("--train-batchnorm", is_flag=True, help="Let BatchNorm statistics of the trained part move.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), help="Of the stored activations; default float16.")
@click.option("--probe", "probes", multiple=True, default=["logistic"], show_default=True, help="Heads the gap is taken to.")
@options.seed_option
@options.run_options
@options.json_option
def command(as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Train the last part of a backbone from cached activations and print the gap to the best probe."""
    from featcache.api import finetune
    from featcache.specs import FineTunePlan, Unfreeze

    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    names = ("epochs", "patience", "lr", "head_lr", "layer_decay", "weight_decay", "train_batchnorm", "dtype")
    plan = FineTunePlan(
        Unfreeze.parse(given.pop("unfreeze")),
        batch_size=given.pop("train_batch"),
        **{name: given.pop(name) for name in names},
    )
    job = finetune(source, spec, plan=plan, settings=settings, **given)
    summary = job.summary
    if as_json:
        options.emit(summary)
        return
    probe, seconds = summary["probe"], summary["seconds"]
    click.echo(
        f"{summary['unfreeze']:10} test {options.percent(summary['test'])}; epoch {job.tuned.best} at rate {job.tuned.lr:g}"
    )
    click.echo(f"{probe['head']:10} test {options.percent(probe['test'])}")
    gap = summary["gap"]
    if gap is not None:
        click.echo(
            f"gap        {gap['points']:+.1f} points (95 % interval {gap['ci'][0]:+.1f} to {gap['ci'][1]:+.1f}, "
            f"p = {gap['p_value']:.2g})"
        )
    click.echo(
        f"cost       fine-tuning: extract {seconds['extract']:.1f} s, train {seconds['train']:.1f} s; "
        f"probe: extract {probe['seconds']['extract']:.1f} s, fit {probe['seconds']['fit']:.1f} s"
    )
    click.echo(summary["checkpoint"])
