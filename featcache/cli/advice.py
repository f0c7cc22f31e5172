"""``featcache advise``, ``audit`` and ``next``: what to do with a data set before more is trained on it."""

from pathlib import Path
from typing import Any

import click

from featcache.cli import options


@click.command("advise", cls=options.Command)
@options.source_options
@options.grouped(
    "Advice",
    click.option(
        "-b",
        "--backbone",
        "backbones",
        multiple=True,
        metavar="NAME[=FILE]",
        help="Try this one too, with the weights of a FILE if one is named; repeat it for more. lite0, mini and those with "
        "rows of DATA in the cache are tried in any case.",
    ),
    click.option(
        "--budget", type=options.SECONDS, help="Begin no further step that would end after this time, such as 10m."
    ),
    options.group_option,
    options.seed_option,
)
@options.run_options
@options.json_option
def advise_command(as_json: bool, backbones: tuple[str, ...], **flags: Any) -> None:  # noqa: FBT001
    """Say which backbone is best for DATA, whether to train its weights, and what more images would bring.

    Measured on samples, which the cache keeps: the test split is not looked at. Each answer comes with its evidence, how
    sure it is, and what the textbook rule says.
    """
    from featcache.api import advise
    from featcache.reports.wording import advice_lines

    specs = [_backbone_of(text) for text in backbones]
    settings, dataset = options.take_settings(flags), options.take_dataset(flags)
    result = advise(dataset, specs, settings=settings, **flags)
    if as_json:
        options.emit(result.summary)
        return
    options.show(advice_lines(result))


def _backbone_of(text: str) -> Any:
    from featcache.specs import BackboneSpec

    # a folder's path may hold an equals sign
    name, equals, weights = (text, "", "") if text.startswith("local-dir:") else text.partition("=")
    if equals and not weights:
        raise click.UsageError(f"--backbone {text}: the file of the weights is missing behind the equals sign.")
    return BackboneSpec(name, weights=weights or None)


@click.command("audit", cls=options.Command)
@options.source_options
@options.grouped(
    "Audit",
    click.option(
        "--beside",
        multiple=True,
        default=("mini",),
        metavar="BACKBONE|none",
        help="Heads on embeddings of this backbone doubt labels too; repeat it for more, none for no other.",
    ),
    options.group_option,
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped(
    "Output",
    click.option("--csv", "csv_file", type=options.FILE, help="Write all suspects into this CSV."),
    click.option(
        "--fix",
        "fixed",
        type=options.FILE,
        help="Write a CSV manifest of the images without training copies of test images, exact copies and blank images; no "
        "image is touched.",
    ),
)
@options.json_option
def audit_command(
    *, as_json: bool, csv_file: Path | None, fixed: Path | None, beside: tuple[str, ...], **flags: Any
) -> None:
    """Look for copies across splits, likely wrong labels, odd images and shortcuts, and say what they do to test accuracy.

    Copies are found though they are encoded again, resized or mirrored. Nothing is changed.
    """
    from featcache.api import audit
    from featcache.experiments.audit import cleaned
    from featcache.reports.wording import audit_lines, manifest_csv, suspects_csv, write_csv

    spec, settings, dataset = options.take_inputs(flags)
    if fixed is not None:
        cleaned(dataset, {})  # what no manifest can list is refused before anything is computed
    backbones = [name for name in beside if name != "none"]
    result = audit(dataset, spec, beside=backbones, settings=settings, **flags)
    if csv_file is not None:
        write_csv(csv_file, suspects_csv(result.suspects))
    if fixed is not None:
        write_csv(fixed, manifest_csv(cleaned(dataset, result.dropped)))
    if as_json:
        options.emit(result.summary)
        return
    options.show(audit_lines(result), csv_file)
    if fixed is not None:
        click.echo(f"{fixed}: without {len(result.dropped)} images")


@click.command("next", cls=options.Command)
@options.source_options
@options.grouped(
    "Choice",
    click.option("--n", "n", type=options.POSITIVE, default="50", help="Choose so many."),
    click.option(
        "--unlabelled",
        multiple=True,
        metavar="PATH",
        help="Choose from these too: a file, a folder, or a table of paths; repeat it for more.",
    ),
    click.option(
        "--group",
        metavar="COLUMN",
        help="Choose one of each value of this column of a CSV or Parquet, such as patient, before another of it.",
    ),
    options.seed_option,
)
@options.backbone_options
@options.run_options
@options.grouped("Output", click.option("--csv", "csv_file", type=options.FILE, help="Write the choice into this CSV."))
@options.json_option
def next_command(as_json: bool, csv_file: Path | None, **flags: Any) -> None:  # noqa: FBT001
    """Choose what to label next: what stands for most of the rest, and later what a probe is unsure of, too.

    Without a label is a row of a table whose label is empty, an image of a folder without class folders, and what
    --unlabelled names. What the choice is worth is simulated on the labels that are there.
    """
    from featcache.api import next_samples
    from featcache.datasets import open_partly
    from featcache.reports.wording import write_csv

    spec, settings = options.take_spec(flags), options.take_settings(flags)
    names = {name: flags.pop(name) for name in ("data", "name", "data_root", "download", "group")}
    opened = open_partly(**names)
    result = next_samples(opened, spec, settings=settings, **flags)
    if csv_file is not None:
        write_csv(csv_file, result.csv)
    if as_json:
        options.emit(result.summary)
        return
    options.show([result.table().plain()], csv_file)
