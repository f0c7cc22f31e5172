"""``featcache fit``."""

from typing import Any

import click

from featcache.cli import options


@click.command()
@options.source_options
@options.backbone_options
@click.option("--head", "heads", multiple=True, default=["logistic"], show_default=True, help="logistic, mlp, knn, ridge.")
@options.seed_option
@options.run_options
@options.json_option
def command(as_json: bool, **given: Any) -> None:  # noqa: FBT001
    """Train heads on the features of DATA, extracted first if needed.

    Parameters are chosen on the validation split, the head is refitted on train and validation, the test split is read
    once.
    """
    from featcache.api import fit

    spec, settings, source = options.take_spec(given), options.take_settings(given), options.take_source(given)
    done, jobs = fit(source, spec, settings=settings, **given)
    if as_json:
        options.emit({"extract": done.summary, "heads": [job.summary for job in jobs]})
        return
    for job in jobs:
        params = ", ".join(f"{name} = {value:g}" for name, value in job.record.params.items())
        click.echo(f"{job.record.method:9} test {options.percent(job.record.test)}; {params}; {job.fitted.seconds:.1f} s")
        click.echo(f"          {job.bundle}")
