"""Errors that a user can act on: one type a remedy, each with the exit code of the command line."""

from collections.abc import Iterable
from typing import Any

INTERRUPTED = 130  # exit code


def interrupt(_signal: int, _frame: Any) -> None:
    """Treat SIGTERM as Ctrl-C, which every stage knows how to end on: a signal's handler."""
    # One way to end: a batch system's SIGTERM commits what is computed, as Ctrl-C does.
    raise KeyboardInterrupt


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " Did you mean X?", with the names that are nearest to a mistyped one, "" where none is near."""
    import difflib

    close = difflib.get_close_matches(name, list(names), n=3)
    return f" Did you mean {', '.join(close)}?" if close else ""


class FeatcacheError(Exception):
    """Base of every error that featcache raises on purpose; its text says what, where and what to do next."""

    exit_code = 1


class UsageError(FeatcacheError):
    """A flag or an argument cannot be honoured: change the call."""

    exit_code = 2


class DataError(FeatcacheError):
    """The images, labels or weights that were given cannot be used: change the data."""

    exit_code = 3


class StorageError(FeatcacheError):
    """The disk or the store failed, or holds what featcache did not write there."""

    exit_code = 4


class SetupError(FeatcacheError):
    """The machine lacks something: weights that cannot be downloaded, a broken installation."""

    exit_code = 5


class CutError(FeatcacheError):
    """A backbone cannot be cut where it was asked to be."""

    exit_code = 2


class UnreadableSample(Exception):  # noqa: N818 - it names what was met, and becomes a reason in the quarantine list
    """A sample cannot be used; the text says why."""
