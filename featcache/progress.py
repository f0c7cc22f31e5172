"""Progress bars and notes on stderr, silenced in one place."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

logger = logging.getLogger("featcache")
_silent: ContextVar[bool] = ContextVar("silent", default=False)


class Printable(logging.Formatter):
    """Notes as a terminal may show them: names of files and messages of other libraries can hold escape sequences."""

    def __init__(self, wording: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self.wording = wording

    def format(self, record: logging.LogRecord) -> str:
        """Return a record's text in the user's words, control characters spelt out."""
        return printable(self.wording(super().format(record)))


def printable(text: str) -> str:
    """Return a text with whatever moves a cursor, recolours or forges a line spelt out: escapes, ends of lines."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape", "surrogatepass").decode() for char in text)


def set_up_notes(*, quiet: bool = False, verbose: bool = False, wording: Callable[[str], str] = str) -> None:
    """Send notes to stderr, for the command line: errors only, the usual ones, or all; ``wording`` names flags in them."""
    _silent.set(quiet)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Printable(wording))
    # Replaced, not added to: a second command in one process would say everything twice.
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO)


@contextmanager
def progress(total: int, title: str, unit: str = "img", start: int = 0) -> Iterator[Any]:
    """Yield a bar with an ``update(n)``; shown on a terminal only, and once it has run for a second."""
    # Here: commands without a bar do not pay for it.
    from tqdm import tqdm

    hidden = _silent.get() or not sys.stderr.isatty()
    with tqdm(
        total=total, desc=title, unit=unit, initial=start, delay=1, disable=hidden, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        yield bar
