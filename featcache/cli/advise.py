"""``featcache advise``."""

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
    from featcache.reports.advise import advice_lines

    specs = [_backbone_of(text) for text in backbones]
    settings, dataset = options.take_settings(flags), options.take_dataset(flags)
    result = advise(dataset, specs, settings=settings, **flags)
    if as_json:
        options.emit(result.summary)
        return
    for line in advice_lines(result):
        click.echo(line)


def _backbone_of(text: str) -> Any:
    from featcache.specs import BackboneSpec

    # a folder's path may hold an equals sign
    name, equals, weights = (text, "", "") if text.startswith("local-dir:") else text.partition("=")
    if equals and not weights:
        raise click.UsageError(f"--backbone {text}: the file of the weights is missing behind the equals sign.")
    return BackboneSpec(name, weights=weights or None)
