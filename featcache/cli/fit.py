"""``featcache fit``."""

from typing import Any

import click

from featcache.cli import options
from featcache.heads.catalog import HEAD_NAMES

_HEADS = f"Train this head, or all, the cheapest first; repeat it for more. There are {', '.join(HEAD_NAMES[:-1])}."
_PLAN = ("heads", "layers", "views", "grid", "folds", "budget", "target", "group", "shots", "curve", "baselines", "format")


@click.command("fit", cls=options.Command)
@options.source_options
@options.grouped(
    "Heads",
    click.option(
        "--head", "heads", multiple=True, type=options.Head(), default=["logistic"], show_default=True, help=_HEADS
    ),
    click.option("--layers", type=options.NAMES, help="Train on these layers side by side, such as layer3,layer4."),
    click.option(
        "--views",
        type=options.POSITIVE,
        default=1,
        show_default=True,
        help="Train on so many augmented views of each image, and average the answers over them.",
    ),
    click.option(
        "--target",
        type=click.Choice(["label", "labels", "number"]),
        default="label",
        show_default=True,
        help="Take labels for this: a class, several labels with ; between, or a number.",
    ),
    click.option(
        "--format",
        type=click.Choice(["joblib", "skops"]),
        default="joblib",
        show_default=True,
        help="Write heads in this format; skops files run no code when they are loaded.",
    ),
    click.option("--budget", type=options.SECONDS, help="Begin no further head after this time, such as 60s or 5m."),
)
@options.grouped(
    "Choice and evaluation",
    click.option(
        "--grid", multiple=True, type=options.GRID, help="Choose from these values, such as C=0.1,1,10, for one head."
    ),
    click.option(
        "--folds",
        type=options.NATURAL,
        help="Choose by cross-validation over so many folds, by the val split with 0; by default 5 below 1000 images.",
    ),
    options.group_option,
    options.seed_option,
    click.option("--shots", type=options.COUNTS, help="Also train on so many images a class, such as 1,2,4,8,16."),
    click.option("--curve", is_flag=True, help="Also train on 1% to 100% of the training images."),
    click.option(
        "--baselines/--no-baselines",
        default=True,
        show_default=True,
        help="Also train methods that need no backbone: what it is worth is what it adds to them.",
    ),
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    click.option(
        "--per-class", "show_classes", is_flag=True, help="Show the best head's scores class by class and its confusions."
    ),
    click.option(
        "--mistakes",
        type=options.NATURAL,
        default=0,
        metavar="N",
        help="Show the N most confident mistakes of the best head on the test split.",
    ),
)
@options.json_option
def fit_command(as_json: bool, show_classes: bool, mistakes: int, **flags: Any) -> None:  # noqa: FBT001
    """Train heads on the features of DATA, extracted first if needed.

    Parameters are chosen on the validation split or by cross-validation, the head is refitted on train and validation, the
    test split is read once.
    """
    from dataclasses import asdict

    from featcache.api import fit
    from featcache.experiments.fit import FitPlan
    from featcache.reports.wording import fit_lines, mistake_lines, per_class_lines

    spec, settings, dataset = options.take_inputs(flags)
    flags |= {name: flags[name] or () for name in ("layers", "shots")}
    plan = FitPlan(**{name: flags.pop(name) for name in _PLAN})
    if plan.target != "label" and (show_classes or mistakes):
        raise click.UsageError(f"--per-class and --mistakes are of one class an image, not of --target {plan.target}.")
    options.announce(dataset, spec, plan.target)
    result = fit(dataset, spec, plan=plan, settings=settings, **flags)
    if as_json:
        summary = result.summary
        for head, described in zip(result.heads, summary["heads"], strict=True):
            described.update({"mistakes": [asdict(mistake) for mistake in head.mistakes(mistakes)]} if mistakes else {})
        options.emit(summary)
        return
    lines = [*fit_lines(result)]
    if result.best is not None:
        lines += per_class_lines(result.best) if show_classes else ()
        lines += mistake_lines(result.best, mistakes, dataset.location) if mistakes else ()
    for line in lines:
        click.echo(line)
