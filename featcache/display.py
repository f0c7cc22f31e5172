"""Results for people: tables as plain text for a terminal, as HTML for a notebook."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


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

        from featcache.progress import printable

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
