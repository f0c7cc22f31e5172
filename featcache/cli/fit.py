"""``featcache fit``."""

from typing import Any

import click

from featcache.cli import options

_HEADS = "centroid, ridge, knn, logistic, svm, lda, rbf, mlp, boosting, ensemble; all for each, the cheapest first."
_FOLDS = "Choose by cross-validation; 0: by the val split.  [default: 5 below 1000 images]"


@click.command()
@options.source_options
@options.backbone_options
@click.option("--head", "heads", multiple=True, default=["logistic"], show_default=True, help=_HEADS)
@click.option("--grid", multiple=True, type=options.Grid(), help="Values to choose from, such as C=0.1,1,10.")
@click.option("--folds", type=click.IntRange(0), help=_FOLDS)
@click.option("--budget", type=options.Seconds(), help="Begin no further head after this time, such as 60s or 5m.")
@click.option("--controls/--no-controls", default=True, show_default=True, help="Also methods that need no backbone.")
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
    from featcache.pipeline.jobs import FitPlan

    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    plan = FitPlan(*(given.pop(name) for name in ("heads", "grid", "folds", "budget", "controls", "format")))
    done, jobs, controls = fit(source, spec, plan=plan, settings=settings, **given)
    if as_json:
        options.emit(
            {"extract": done.summary, "heads": [job.summary for job in jobs], "controls": [one.summary for one in controls]}
        )
        return
    for job in jobs:
        params = ", ".join(f"{name} = {options.short(value)}" for name, value in job.record.params.items())
        scores = f"test {options.percent(job.record.test)}; {params or 'no parameter'}; {job.fitted.seconds:.1f} s"
        click.echo(f"{job.record.method:9} {scores}")
        click.echo(f"          {job.bundle}")
    if controls:
        click.echo("without a backbone:")
    for control in controls:
        click.echo(f"          {options.percent(control.summary['test'])}; {control.name}")
