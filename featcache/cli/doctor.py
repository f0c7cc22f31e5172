"""``featcache doctor``."""

import click

from featcache.cli import options

BROKEN = 5


@click.command()
@options.json_option
def command(as_json: bool) -> None:  # noqa: FBT001
    """Check that the installation works, and say the exact repair where it does not."""
    from dataclasses import asdict

    from featcache.doctor import examine

    findings = examine()
    if as_json:
        options.emit({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.found}")
            if not finding.ok:
                click.echo(f"     repair: {finding.repair}")
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(BROKEN)
