"""The command line's last border: whatever ends a command becomes one line and an exit code."""

import contextlib
import io
import logging
import os
import sys
import traceback

import click

from featcache.errors import INTERRUPTED, FeatcacheError
from featcache.progress import printable

_FAULT = (
    "This is a fault of featcache. What was computed is kept; with FEATCACHE_TRACEBACK=1 it says where it happened, for a "
    "report."
)
UNEXPECTED, DISK, SETUP = 1, 4, 5


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
