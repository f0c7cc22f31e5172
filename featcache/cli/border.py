"""The command line's last border: whatever ends a command becomes one line and an exit code."""

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator

import click

from featcache.errors import INTERRUPTED, FeatcacheError
from featcache.progress import printable

_FAULT = (
    "This is a fault of featcache. What was computed is kept; with FEATCACHE_TRACEBACK=1 it says where it happened, for a "
    "report."
)
UNEXPECTED, DISK, SETUP = 1, 4, 5
_FIELD = re.compile(r"(?<!`)`((?:[A-Z]\w*\.)?([a-z]\w*))(?:=([^`]*))?`(?!`)")
_QUOTES = "'\""
# Options go by their own names; these are the fields that have another one, with their owner where two share a name.
_RENAMED = {
    "FineTunePlan.batch_size": "train_batch",
    "FineTunePlan.precision": "train_precision",
    "BackboneSpec.name": "backbone",
    "Views.count": "views",
    "Views.seed": "views_seed",
    "budget": "cache_budget",
    "decoder": "decode",
    "heads": "probes",
}


def spelling(ctx: click.Context) -> Callable[[str], str]:
    """Return what spells the fields that a library's text names as flags of the running command.

    "`max_bad=0.1`" becomes "--max-bad 10.0%" where the command has that option. What it has no flag for, such as a key of a
    pipeline file, stays as the bare name.
    """
    root = ctx.find_root()
    name = root.invoked_subcommand
    command = root.command.get_command(root, name) if isinstance(root.command, click.Group) and name else None
    options = {field: option for option in (_options(command) if command else ()) for field in _fields(option)}
    if name == "bench":
        options.pop("group", None)  # a key of the pipeline file as well, and more often that

    def spelt(match: re.Match[str]) -> str:
        owned, field, value = match.groups()
        names = (_RENAMED[owned],) if owned in _RENAMED and owned != field else (field, _RENAMED.get(field, ""))
        option = next((options[name] for name in names if name in options), None)
        if option is None:
            return field if value is None else f"{field}={value}"
        return _spelt(option, value)

    return lambda text: _FIELD.sub(spelt, text)


def _options(command: click.Command) -> Iterator[click.Option]:
    """Yield a command's options, a group's with those of all of its commands."""
    yield from (parameter for parameter in command.params if isinstance(parameter, click.Option))
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        yield from _options(below)


def _fields(option: click.Option) -> list[str]:
    """Return what a field may be called that an option sets: as the function's parameter, or as the flag."""
    return [option.name or "", *(flag.removeprefix("--").replace("-", "_") for flag in option.opts if flag.startswith("--"))]


def _spelt(option: click.Option, value: str | None) -> str:
    flag = next(flag for flag in option.opts if flag.startswith("--"))
    if value is None:
        return flag
    if option.is_flag:
        return flag if value == "True" else (option.secondary_opts or [flag])[0]
    return f"{flag} {getattr(option.type, 'spelt', str)(value.strip(_QUOTES))}"


def ended_by(error: BaseException) -> int:
    """Say on stderr what ended a command, and return the exit code."""
    if isinstance(error, click.Abort):  # click's name for an interrupt, and for any file that came to its end too soon
        error = error.__cause__ or KeyboardInterrupt()
    if isinstance(error, KeyboardInterrupt):
        click.echo("interrupted: what was computed is kept, the same command goes on from there.", err=True)
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(shown)
        for line in shown.getvalue().splitlines():
            click.echo(printable(line), err=True)
        return error.exit_code
    return _failed(error)


def _failed(error: BaseException) -> int:
    if isinstance(error, FeatcacheError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError):
        text, code = f"{error.filename or 'disk'}: {error.strerror or error}", DISK
    elif isinstance(error, MemoryError):
        text, code = f"not enough memory ({error or 'none left'}): a smaller --batch-size or fewer --workers help.", SETUP
    else:
        # a user gets a line; whoever looks for the cause gets the traceback too
        if os.environ.get("FEATCACHE_TRACEBACK") or logging.getLogger("featcache").isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        text, code = f"unexpected {type(error).__name__}: {error}. {_FAULT}", UNEXPECTED
    click.echo(f"error: {printable(text)}", err=True)
    return code


def discard_output() -> None:
    """Let Python's last flush go nowhere, where whoever read our output has gone: no error of ours."""
    with contextlib.suppress(OSError, ValueError):  # where output is no file there is nothing to turn away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_any_name() -> None:
    """Let file names that are no UTF-8 go out as the bytes they came in, instead of ending a table in the middle."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
