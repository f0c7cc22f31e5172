"""``featcache fit``."""

from typing import Any

import click

from featcache.cli import options
from featcache.finetuning.plan import HEAD_NAMES

_HEADS = f"{', '.join(name for name in HEAD_NAMES if name != 'all')}; all for each, the cheapest first."
_PLAN = ("heads", "layers", "views", "grid", "folds", "budget", "target", "group", "shots", "curve", "baselines", "format")
_FOLDS = "Choose by cross-validation; 0: by the val split.  [default: 5 below 1000 images]"


@click.command()
@options.source_options
@options.backbone_options
@click.option("--head", "heads", multiple=True, default=["logistic"], show_default=True, help=_HEADS)
@click.option("--layers", type=options.Names(), help="Train on several layers side by side, such as layer3,layer4.")
@click.option(
    "--views",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Train on so many views each, average their answers.",
)
@click.option("--grid", multiple=True, type=options.Grid(), help="Values to choose from, such as C=0.1,1,10.")
@click.option("--folds", type=click.IntRange(0), help=_FOLDS)
@click.option("--budget", type=options.Seconds(), help="Begin no further head after this time, such as 60s or 5m.")
@click.option(
    "--target",
    type=click.Choice(["label", "labels", "number"]),
    default="label",
    show_default=True,
    help="What a label is: a class, several with ; between, a number.",
)
@options.group_option
@click.option("--shots", type=options.Numbers(), help="Train on so many images a class too, such as 1,2,4,8,16.")
@click.option("--curve", is_flag=True, help="Train on 1% to 100% of the training images too.")
@click.option(
    "--controls/--no-controls", "baselines", default=True, show_default=True, help="Also methods that need no backbone."
)
@click.option("--format", type=click.Choice(["joblib", "skops"]), default="joblib", show_default=True, help="Of the files.")
@options.seed_option
@options.run_options
@options.json_option
def command(as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Train heads on the features of DATA, extracted first if needed.

    Parameters are chosen on the validation split or by cross-validation, the head is refitted on train and validation, the
    test split is read once.
    """
    from featcache.api import fit
    from featcache.experiments.fit import FitPlan

    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    given |= {name: given[name] or () for name in ("layers", "shots")}
    plan = FitPlan(**{name: given.pop(name) for name in _PLAN})
    done = fit(source, spec, plan=plan, settings=settings, **given)
    if as_json:
        options.emit(done.summary)
        return
    for job in done.heads:
        params = ", ".join(f"{name} = {options.short(value)}" for name, value in job.record.params.items())
        scores = f"test {options.percent(job.record.test)}; {params or 'no parameter'}; {job.fitted.seconds:.1f} s"
        click.echo(f"{job.record.method:9} {scores}")
        click.echo(f"          {job.bundle}")
    for target in done.targets:
        test = target.record.test
        scores = ", ".join(f"{name} {value:.3f}" for name, value in test.items() if isinstance(value, float))
        click.echo(f"{target.record.method}: test {scores}; {target.fitted.seconds:.1f} s")
        click.echo(f"          {target.bundle}")
    if done.baselines:
        click.echo("without a backbone:")
    for control in done.baselines:
        click.echo(f"          test {options.percent(control.summary['test'])}; {control.name}")
    for curve in done.curves:
        slope = "" if curve.slope is None else f"; the error falls as images to the power of {curve.slope:.2f}"
        click.echo(f"{curve.head} by training images{slope}:")
        for point in curve.points:
            what = f"{point.shots} a class" if point.shots else f"{100 * (point.share or 0):g} %"
            click.echo(f"          {point.images:6} ({what}): {100 * point.mean:.1f} ± {100 * point.std:.1f} %")
