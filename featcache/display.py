"""What people see: notes, progress and tables; and a stranger's text, made harmless for whatever reads it.

Names of classes and files, and whatever stands in a record, may hold a formula, markup, a script, an escape sequence or a
mark that turns the reading order. Here, and nowhere else, is what each format would obey.
"""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

logger = logging.getLogger("featcache")
_silent: ContextVar[bool] = ContextVar("silent", default=False)
# Seconds: from which on a job is told of; between two lines of one, at first and after hours.
_WORTH_A_LINE, _SOONEST, _LATEST = 2.0, 10.0, 300.0
# Full-width signs too: spreadsheets of East Asian locales take them for the plain ones.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|&~#$])")
_EDGES = re.compile(r"(?<!\w)_|_(?!\w)")  # inside of a word they mark nothing, and mobilenetv2_100 stays readable
_LINKS = re.compile(r"://|(?<=www)\.", re.IGNORECASE)  # bare addresses become links by themselves
_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "^": r"\textasciicircum{}",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "%": r"\%",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "[": "{[}",  # behind the end of a row it would be an argument: the space to the next one
    "]": "{]}",
    "*": "{*}",
}


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
def progress(total: int, title: str, unit: str = "sample") -> Iterator["Progress"]:
    """Yield what is told how far a job is, and says in one line what it has come to where it took its time."""
    told = Progress(total, title, unit)
    with told.bar or nullcontext():
        yield told
    told.end()


class Progress:
    """How far a job is: a bar that goes when it ends, on a terminal or in a notebook; elsewhere a line now and then.

    Lines are notes: whoever wants none turns those off.
    """

    def __init__(self, total: int, title: str, unit: str) -> None:
        self.total, self.title, self.unit = total, title, unit
        self.count, self.about = 0, ""
        self._begun, self._due = time.monotonic(), _WORTH_A_LINE
        self._first: tuple[int, float] | None = None  # count and seconds: what is made ready before it tells of no speed
        self.bar = (
            _terminal_bar(total, title, unit) if not _silent.get() and (sys.stderr.isatty() or _in_notebook()) else None
        )

    def update(self, count: int) -> None:
        """Count what was done."""
        self.count += count
        passed = time.monotonic() - self._begun
        if self.bar is not None:
            self.bar.update(count)
        elif self._first is None:
            self._first = self.count, passed
        elif passed >= self._due and self._first[0] < self.count < self.total:
            # a log of hours is read by its end: of them every tenth is enough
            self._due = passed + min(max(_SOONEST, passed / 10), _LATEST)
            self._say(passed, *self._first)

    def skip(self, count: int) -> None:
        """Take off what will not be done, or was done before."""
        self.total -= count
        if self.bar is not None:
            self.bar.total = self.total

    def tell(self, about: str) -> None:
        """Say this beside what follows."""
        self.about = about
        if self.bar is not None:
            self.bar.set_postfix_str(about)

    def end(self) -> None:
        """Leave one line of what took long enough to have been waited for."""
        passed = time.monotonic() - self._begun
        if self.count and passed >= _WORTH_A_LINE:
            rate = self.count / passed
            speed = f" ({rate:.0f} a second)" if rate >= 2 else ""
            logger.info("%s: %s in %s%s", self.title, self._counted(f"{self.count:,}"), seconds_text(passed), speed)

    def _say(self, passed: float, before: int, until: float) -> None:
        remaining = (passed - until) / (self.count - before) * (self.total - self.count)
        if remaining < _WORTH_A_LINE:
            return  # the line that stays comes as soon
        counted, share = self._counted(f"{self.count:,} of {self.total:,}"), 100 * self.count / self.total
        about = f"about {seconds_text(remaining)} to go{f'; {self.about}' if self.about else ''}"
        logger.info("%s: %s (%.0f %%) in %s, %s", self.title, counted, share, seconds_text(passed), about)

    def _counted(self, number: str) -> str:
        return f"{number} {self.unit}{'' if self.total == 1 else 's'}"


def bytes_text(count: float) -> str:
    """Return an amount of data as people say it: ``1.5 MB``, and of less than a tenth ``31.0 kB``."""
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def seconds_text(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _terminal_bar(total: int, title: str, unit: str) -> Any:
    # Here: commands without a bar do not pay for it.
    from tqdm import tqdm

    return tqdm(total=total, desc=title, unit=f" {unit}s", leave=False, delay=1, dynamic_ncols=True, file=sys.stderr)


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
    return cell in {"", "-"} or cell.lstrip("+-").rstrip("*").replace(".", "", 1).isdecimal()


def csv_cell(text: str) -> str:
    """Return a cell that no spreadsheet takes for a formula; as a file's content it is otherwise as it was."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def markdown_cell(text: str) -> str:
    """Return a cell of a Markdown table: no markup, no link, no second cell, and no letter that cannot be seen."""
    plain = _EDGES.sub(r"\\_", _MARKDOWN.sub(r"\\\1", printable(text)))
    return _LINKS.sub(lambda match: ":\\/\\/" if match[0] == "://" else "\\.", plain)


def latex_cell(text: str) -> str:
    """Return a cell of a LaTeX table: no command, no comment, no end of the cell."""
    return "".join(_LATEX.get(char, char) for char in printable(text))


def tag(name: str, *content: str, **attributes: object) -> Markup:
    """Return an element of HTML or SVG: texts are escaped and printable, ``Markup`` stays, ``class_`` is ``class``.

    Attributes that are ``None`` are left out; numbers are written with two digits behind the point at most.
    """
    told = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    inside = "".join(f' {key}="{escape(_attribute(value))}"' for key, value in told.items())
    # not by Markup's own format, which takes half of a page's time: attributes and texts are escaped here
    return Markup(f"<{name}{inside}>{''.join(map(html_text, content))}</{name}>")  # noqa: S704


def html_text(text: object) -> Markup:
    """Return a text for a page, escaped and with what cannot be seen spelt out."""
    return text if isinstance(text, Markup) else escape(printable(str(text)))


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else printable(str(value))


def booktabs(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: int) -> str:
    """Return a LaTeX table by the rules of the package booktabs; the first ``texts`` columns stand on the left."""
    lines = [" & ".join(map(latex_cell, row)) + r" \\" for row in (headers, *rows)]
    columns = "l" * texts + "r" * (len(headers) - texts)
    table = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
    return "\n".join([*table, r"\end{tabular}"])
