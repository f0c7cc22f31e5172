"""``featcache bench`` on records that are there already: its options, and what it prints."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from featcache.cli import options
from featcache.display import printable

replay_options = options.grouped(
    "Replay",
    click.option(
        "--from-record",
        "recorded",
        type=options.FILE,
        help="Run what this JSONL file records again, in a cache of its own, and compare; PIPELINE may then say where data "
        "sets and backbones are.",
    ),
    click.option("--only", metavar="CELL", default="", help="Run those records alone whose cell begins so."),
    click.option("--data-root", type=options.FOLDER, help="Look in this folder for the data sets that records name."),
    click.option("--checkpoint", type=options.FILE, help="Load this file where a record's backbone was loaded from a file."),
    click.option(
        "--reuse", is_flag=True, help="Let heads and trainings of --cache answer; without it only its features are taken."
    ),
)


@dataclass(frozen=True)
class ReplayFlags:
    """What was asked of a replay."""

    recorded: Path | None
    only: str
    data_root: Path | None
    checkpoint: Path | None
    reuse: bool


def take_replay(flags: dict[str, Any]) -> ReplayFlags:
    """Take a replay's options out of a command's."""
    asked = ReplayFlags(**{name: flags.pop(name) for name in ("recorded", "only", "data_root", "checkpoint", "reuse")})
    if asked.recorded is None and asked != ReplayFlags(None, "", None, None, reuse=False):
        raise click.UsageError("--only, --data-root, --checkpoint and --reuse are of --from-record.")
    if asked.reuse and flags["cache"] is None:
        raise click.UsageError("--reuse needs --cache: whose heads and trainings are meant.")
    return asked


def show_replay(
    pipeline: Path | None, out: Path | None, asked: ReplayFlags, flags: dict[str, Any], *, as_json: bool
) -> bool:
    """Run records again and print what came out; return whether all of them are confirmed."""
    from featcache.api import replay
    from featcache.cli import spelling
    from featcache.experiments.replay import Places

    assert asked.recorded is not None
    new_records = None if out is None else out / asked.recorded.name
    checkpoint = None if asked.checkpoint is None else str(asked.checkpoint)
    places = Places(pipeline, asked.data_root, checkpoint, flags["cache"], reuse=asked.reuse, out=new_records)
    result = replay(asked.recorded, places, only=asked.only, settings=options.take_settings(flags))
    if as_json:
        options.emit(result.summary)
        return result.agrees
    click.echo(result.table().plain())
    worded = spelling(click.get_current_context())
    for line in result.lines:
        click.echo(printable(worded(line)))
    return result.agrees
