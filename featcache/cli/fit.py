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
@click.option(
    "--per-class", "show_classes", is_flag=True, help="Show the best head's scores class by class, and its confusion matrix."
)
@click.option(
    "--mistakes",
    type=click.IntRange(0),
    default=0,
    metavar="N",
    help="Show the N most confident mistakes of the best head on test.",
)
@options.seed_option
@options.run_options
@options.json_option
def command(as_json: bool, show_classes: bool, mistakes: int, **given: Any) -> None:  # noqa: FBT001
    """Train heads on the features of DATA, extracted first if needed.

    Parameters are chosen on the validation split or by cross-validation, the head is refitted on train and validation, the
    test split is read once.
    """
    from dataclasses import asdict

    from featcache.api import fit
    from featcache.experiments.fit import FitPlan
    from featcache.reports.wording import fit_lines, mistake_lines, per_class_lines

    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    given |= {name: given[name] or () for name in ("layers", "shots")}
    plan = FitPlan(**{name: given.pop(name) for name in _PLAN})
    options.announce(source, spec)
    result = fit(source, spec, plan=plan, settings=settings, **given)
    if as_json:
        summary = result.summary
        for head, described in zip(result.heads, summary["heads"], strict=False):  # a number's heads come behind them
            described.update({"mistakes": [asdict(mistake) for mistake in head.mistakes(mistakes)]} if mistakes else {})
        options.emit(summary)
        return
    for line in fit_lines(result):
        click.echo(line)
    if result.best is None:  # a number, or several labels an image, have no classes to be mistaken for each other
        return
    if show_classes:
        for line in per_class_lines(result.best):
            click.echo(line)
    if mistakes:
        for line in mistake_lines(result.best, mistakes, source.location):
            click.echo(line)
