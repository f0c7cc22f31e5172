"""A stranger's text, made harmless for each thing that reads a report; for terminals and pages ``display.printable`` is it.

Names of classes and files, and whatever stands in a record, may hold a formula, markup, a script, an escape sequence or a
mark that turns the reading order. Here, and nowhere else, is what each format would obey.
"""

import re
from collections.abc import Sequence

from markupsafe import Markup, escape

from featcache.display import printable

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
