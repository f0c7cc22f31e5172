"""What people see: notes and progress on stderr, tables as plain text for a terminal, as HTML for a notebook."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from html import escape
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
    """Yield a bar with an ``update(n)``; shown on a terminal or in a notebook, and once it has run for a second."""
    # Here: commands without a bar do not pay for it.
    from tqdm import tqdm

    hidden = _silent.get() or not (sys.stderr.isatty() or _in_notebook())
    with tqdm(
        total=total, desc=title, unit=unit, initial=start, delay=1, disable=hidden, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        yield bar


def _in_notebook() -> bool:
    """Tell whether this is a notebook's kernel, whose stderr is no terminal and shows a bar all the same."""
    ipython = sys.modules.get("IPython")  # never imported for this: a kernel has
    return ipython is not None and type(ipython.get_ipython()).__name__ == "ZMQInteractiveShell"


@dataclass(frozen=True)
class Table:
    """Cells as text; ``title`` stands above them, ``note`` below."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""

    def plain(self) -> str:
        """Return the table for a terminal: numbers stand on the right, what would move its cursor is spelt out."""
        from tabulate import tabulate  # 20 ms that a command without a table does not pay

        from featcache.display import printable

        cells = [[printable(cell) for cell in row] for row in self.rows]
        columns = list(zip(*cells, strict=True)) or [()] * len(self.headers)
        numeric = [number > 0 and all(map(_is_number, column)) for number, column in enumerate(columns)]  # the first: names
        align = ["right" if is_numeric else "left" for is_numeric in numeric]
        # no numparse: a class that is called 1e5 or 007 is a name
        body = tabulate(
            cells,
            headers=list(map(printable, self.headers)),
            tablefmt="simple",
            disable_numparse=True,
            colalign=align if cells else None,
        )
        return "\n".join(part for part in (printable(self.title), body, printable(self.note)) if part)

    def html(self) -> str:
        """Return the table for a notebook; every text is escaped, since class and file names are a stranger's."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.headers)
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows)
        title = f"<caption>{escape(self.title)}</caption>" if self.title else ""
        note = f"<p>{escape(self.note)}</p>" if self.note else ""
        return f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{note}"


class Displayed:
    """What shows itself as a few lines in a terminal and as a table in a notebook."""

    def table(self) -> Table:
        """Return what is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self.table().plain()

    def _repr_html_(self) -> str:
        return self.table().html()


def facts_table(title: str, **facts: object) -> Table:
    """Return names and values as a table of two columns; what is ``None`` or empty is left out."""
    rows = [(name.replace("_", " "), str(fact)) for name, fact in facts.items() if fact is not None]
    return Table((title, ""), [(name, fact) for name, fact in rows if fact])


def _is_number(cell: str) -> bool:
    return cell in {"", "-"} or cell.lstrip("+-").replace(".", "", 1).isdecimal()
