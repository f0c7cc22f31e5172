"""Progress bars and notes on stderr, silenced in one place."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

quiet: ContextVar[bool] = ContextVar("quiet", default=False)
logger = logging.getLogger("featcache")


@contextmanager
def progress(total: int, what: str, unit: str = "img", done: int = 0) -> Iterator[Any]:
    """Yield a bar with an ``update(n)``; shown on a terminal only, and once it has run for a second."""
    from tqdm import tqdm

    hidden = quiet.get() or not sys.stderr.isatty()
    with tqdm(
        total=total, desc=what, unit=unit, initial=done, delay=1, disable=hidden, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        yield bar
