"""Tables, CSV or Parquet, of images' paths or of texts, with labels and splits; and what a label may be, everywhere."""

import csv
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from featcache.datasets import (
    ArrayReader,
    Dataset,
    FileReader,
    Sample,
    require_file,
    require_whole,
    safe_name,
    split_of,
)
from featcache.errors import DataError, SetupError
from featcache.specs import SampleKind

_MOST_CHARACTERS = 10_000  # a caption fits, a file that was taken for a label does not
_BETWEEN = ";"  # what ``target` labels` divides a text at


class Labels:
    """Turns the values of one source into labels.

    Text, whole numbers and true or false are labels; so are other finite numbers, for ```target` number``, where whole
    ones lose their ".0". A list of those is one text with ``;`` between, for ```target` labels``: ``lists`` says whether
    there was any. None, NaN, "" and, where classes have names, numbers below zero are missing.

    Args:
        where: the source, for errors.
        names: the classes that whole numbers stand for, if they stand for any.
    """

    def __init__(self, where: str, names: Sequence[str] = ()) -> None:
        self.lists = False
        self._where, self._names = where, tuple(_storable(name, f"{where}, class names") for name in names)
        if len(set(names)) < len(names):
            twice = next(name for number, name in enumerate(names) if name in names[:number])
            raise DataError(f"{where}: two classes are called {twice!r}. Give each class a name of its own.")

    def read(self, value: Any, row: object) -> str | None:
        """Return a value's label, ``None`` where it is missing.

        Raises:
            DataError: it is no label; the message names the row.
        """
        if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.names is None:
            value = value[()]
        if isinstance(value, list | tuple | set | np.ndarray) and getattr(value, "ndim", 1) == 1:
            return self._joined(list(value), row)
        return self._text(value, row)

    def _joined(self, values: list[Any], row: object) -> str:
        self.lists = True
        texts = [self._text(value, row) for value in values]
        # A separator inside a label would split it in two when labels are read again.
        if None in texts or any(_BETWEEN in text or "|" in text for text in texts if text):
            raise DataError(f"{self._where}, {row}: a list of labels holds a missing one, or one with ; or | in it.")
        return _BETWEEN.join(text for text in texts if text)

    def _text(self, value: Any, row: object) -> str | None:
        if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 and not isinstance(value, np.void):
            value = value.item()  # NumPy's and PyTorch's scalars
        if value is None or (isinstance(value, float | Decimal) and math.isnan(value)):
            return None
        if isinstance(value, bytes):
            value = value.decode("utf-8", "surrogateescape")
        if isinstance(value, str):
            return _storable(value, f"{self._where}, {row}") if value.strip() else None
        if isinstance(value, bool):
            return str(value)
        if not isinstance(value, int | float | Decimal) or not math.isfinite(value):
            raise DataError(f"{self._where}, {row}: {_abbreviated(value)} is no label: text or a whole number is.")
        number = int(value) if value == int(value) else value
        return self._named(number, row) if self._names else str(number)

    def _named(self, number: float | Decimal, row: object) -> str | None:
        if number < 0:
            return None
        if not isinstance(number, int) or number >= len(self._names):
            raise DataError(f"{self._where}, {row}: {number} is the number of none of the {len(self._names)} classes.")
        return self._names[number] if self._names[number].strip() else None


def labelled(
    labels: Sequence[str | None], splits: Sequence[str], where: str, name: Callable[[int], str]
) -> tuple[list[int], list[str]]:
    """Return which rows can be used, and a note where that is not all of them.

    A split without any label, as sets with a secret test part have it, is left out. Else no label may be missing. ``name``
    tells what a row is called.

    Raises:
        DataError: a label is missing; the message names the row.
    """
    missing = [number for number, label in enumerate(labels) if label is None]
    if not missing:
        return list(range(len(labels))), []
    having = {split for label, split in zip(labels, splits, strict=True) if label is not None}
    unlabelled = {split for split in splits if split} - having
    unexplained = [number for number in missing if splits[number] not in unlabelled]
    if unexplained or not having:
        first = (unexplained or missing)[0]
        raise DataError(
            f"{where}, {name(first)}: no label ({len(unexplained or missing)} such of {len(labels)}). "
            "Fill in what is missing, or take these images out."
        )
    notes = [
        f"{where}: left out: {splits.count(split)} images of the split {split}, none of which has a label"
        for split in sorted(unlabelled)
    ]
    return [number for number, label in enumerate(labels) if label is not None], notes


def _storable(text: str, where: str) -> str:
    if len(text) > _MOST_CHARACTERS:
        raise DataError(f"{where}: a label of {len(text)} characters; {_MOST_CHARACTERS} are the most.")
    try:
        text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise DataError(f"{where}: the label {_abbreviated(text)} is no text that UTF-8 can write.") from None
    if "\0" in text:
        raise DataError(f"{where}: the label {_abbreviated(text)} has a NUL in it.")
    return text


def _abbreviated(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


# Names under which Parquet files hold images, Hugging Face's first.
_BYTES_COLUMNS = ("image", "bytes", "img", "jpg", "png")
_MOST_LINE = 1 << 20  # characters: csv would read a file without line ends whole before it complains
_MOST_TEXT = 16 << 20  # characters of a line where cells hold texts, and of a cell: what is too long is set aside later
_BATCH_BYTES = 64 << 20  # of decoded columns at a time
_TEXT = "text"  # the column of texts, where there is none of paths


@dataclass(frozen=True)
class _Asked:
    """Further columns to read: their names, the setting that names them, and whether rows need labels beside."""

    names: tuple[str, ...] = ()
    setting: str = "group"
    with_labels: bool = True


@dataclass
class _Rows:
    """A manifest's rows, as columns: what each is called, its label, its split, and columns that were asked for."""

    names: list[str] = field(default_factory=list)
    labels: list[str | None] = field(default_factory=list)
    splits: list[str] = field(default_factory=list)
    asked: list[tuple[str, ...]] = field(default_factory=list)
    texts: list[bytes] = field(default_factory=list)
    lists: bool = False
    notes: tuple[str, ...] = ()

    def add(self, name: str, label: str | None, split: object, where: str) -> None:
        """Put down a row."""
        if not name:
            raise DataError(f"{where}: path and label must not be empty.")
        if "\0" in name:
            raise DataError(f"{where}: a path has a NUL in it.")
        # Paths are compared as texts later: a//b and a/b are one image.
        self.names.append(PurePosixPath(name).as_posix())
        self.labels.append(label)
        self.splits.append(split_of(split, where))

    def labelled(self, path: Path, word: str, first: int) -> "tuple[list[int], list[Sample], tuple[str, ...]]":
        """Return which rows can be used, those as items, and the notes."""
        usable, notes = labelled(self.labels, self.splits, str(path), lambda number: f"{word} {number + first}")
        items = [Sample(self.names[number], self.labels[number] or "", self.splits[number]) for number in usable]
        return usable, items, (*self.notes, *notes)


def open_csv(path: Path) -> Dataset:
    """Open a table with the columns path and label, or text and label, and optionally split.

    Paths are absolute, or relative to it. Without a column of paths its samples are the texts, called by their rows.
    """
    rows = _csv_rows(path)
    usable, items, notes = rows.labelled(path, "line", 2)
    return _opened(path, rows, None, (usable, items), notes)


def open_parquet(path: Path) -> Dataset:
    """Open a Parquet file: path, label and optionally split; or the images' bytes in a column such as ``image``; or texts.

    A column of bytes is binary, or a struct of bytes and path as Hugging Face writes it; its class names are used.
    """
    rows, column = _parquet_rows(path)
    usable, items, notes = rows.labelled(path, "row", 0)
    return _opened(path, rows, column, (usable, items), notes)


def _opened(
    path: Path, rows: _Rows, column: str | None, used: tuple[Sequence[int], Sequence[Sample]], notes: tuple[str, ...] = ()
) -> Dataset:
    """Return the data set of some rows and their samples, which lie in the table, in a column of it, or beside it."""
    numbers, place = {sample.path: row for row, sample in zip(*used, strict=True)}, path.resolve()
    require_whole(used[1], str(path))
    reader: Any = FileReader(place.parent)
    if rows.texts or column is not None:
        read_at = rows.texts.__getitem__ if column is None else _RowGroups(path, column)
        reader = ArrayReader(numbers, read_at, place)
    kind: SampleKind = "text" if rows.texts or column == _TEXT else "image"
    return Dataset(safe_name(path.stem), str(place), tuple(used[1]), reader, notes, rows.lists, kind=kind)


def read_column(location: str, column: str) -> list[str]:
    """Return a manifest's values in one column as text, one for each image of its source.

    Raises:
        DataError: the source is no manifest, has no such column, or a value is missing.
    """
    usable, rows = _read_asked(Path(location), _Asked((column,)))
    missing = next((number for number in usable if not rows.asked[number][0]), None)
    if missing is not None:
        word, first = _counting(Path(location))
        raise DataError(f"`group` {column}: {location}, {word} {missing + first} has none.")
    return [rows.asked[number][0] for number in usable]


def read_columns(location: str, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return a manifest's values in some columns as text, "" where one is missing: a tuple for each image of its source.

    Raises:
        DataError: the source is no manifest, or has no such column.
    """
    usable, rows = _read_asked(Path(location), _Asked(tuple(names), "columns"))
    return [rows.asked[number] for number in usable]


def open_unlabelled(path: Path, names: Sequence[str]) -> tuple[Dataset, list[tuple[str, ...]]]:
    """Open a table of what is to be labelled, with each one's values in some columns; labels are not looked at.

    Raises:
        DataError: it is no manifest, has no such column, or names an image twice.
    """
    asked = _Asked(tuple(names), "columns", with_labels=False)
    _require_manifest(path, asked)
    rows, column = _rows_of(path, asked)
    samples = [Sample(name, "") for name in rows.names]
    return _opened(path, rows, column, (range(len(samples)), samples)), rows.asked


def open_partly_labelled(path: Path, names: Sequence[str]) -> tuple[Dataset, list[tuple[str, ...]]]:
    """Open a table in which labels may be missing, or their column: "" then; with each sample's values in some columns.

    A sample without a label needs no split: where there are splits it is of train.

    Raises:
        DataError: it is no table of samples, has no such column, or names a sample twice.
    """
    require_file(path)
    asked = _Asked(tuple(names), with_labels="label" in _columns_of(path))
    rows, column = _rows_of(path, asked)
    usual = "train" if any(rows.splits) else ""
    splits = [split or ("" if label else usual) for split, label in zip(rows.splits, rows.labels, strict=True)]
    samples = [Sample(*cells) for cells in zip(rows.names, (label or "" for label in rows.labels), splits, strict=True)]
    return _opened(path, rows, column, (range(len(samples)), samples), rows.notes), rows.asked


def _columns_of(path: Path) -> list[str]:
    """Return a table's columns; none where it cannot be read, which whoever reads its rows says."""
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            return next(csv.reader([file.readline(_MOST_LINE)]), [])
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return []
    try:
        names: list[str] = pq.read_schema(path).names
    except (OSError, pa.ArrowException):
        return []
    return names


def _read_asked(path: Path, asked: _Asked) -> tuple[list[int], _Rows]:
    """Return which rows are images of the manifest's source, and all rows with what was asked for."""
    _require_manifest(path, asked)
    rows, _ = _rows_of(path, asked)
    return rows.labelled(path, *_counting(path))[0], rows


def _require_manifest(path: Path, asked: _Asked) -> None:
    if path.suffix.lower() not in {".csv", ".parquet"}:
        raise DataError(
            f"`{asked.setting}` {','.join(asked.names)}: {path} is no manifest: list its images in a CSV or Parquet file."
        )


def _counting(path: Path) -> tuple[str, int]:
    """Return what a manifest's rows are called in errors, and the number of the first."""
    return ("line", 2) if path.suffix.lower() == ".csv" else ("row", 0)


def _rows_of(path: Path, asked: _Asked) -> tuple[_Rows, str | None]:
    return (_csv_rows(path, asked), None) if path.suffix.lower() == ".csv" else _parquet_rows(path, asked)


def _csv_rows(path: Path, asked: _Asked = _Asked()) -> _Rows:
    rows, read = _Rows(), Labels(str(path))
    try:
        is_of_texts = _holds_texts(_columns_of(path))  # by the first line
        # bytes that are no UTF-8 are the matter of the one text that holds them; in a path they are the file's fault
        errors, most = ("surrogateescape", _MOST_TEXT) if is_of_texts else ("strict", _MOST_LINE)
        # utf-8-sig: Excel begins its files with a byte order mark, which would stand in the first column's name.
        with path.open(newline="", encoding="utf-8-sig", errors=errors) as file, _cells_of(most):
            reader = csv.reader(_sane_lines(file, path, most))
            columns = next(reader, [])
            _require_columns(columns, path, asked)
            _require_single(columns, path, asked)
            at = {name: columns.index(name) for name in columns}
            for line, cells_read in enumerate((cells for cells in reader if cells), start=2):
                where = f"{path}, line {line}"
                if any(cells_read[len(columns) :]):
                    raise DataError(f"{where}: more cells than columns; a path or label with a comma needs quotes.")
                cells = cells_read + [""] * (len(columns) - len(cells_read))
                # without labels there are no splits either: what is labelled now belongs to none
                label = read.read(cells[at["label"]], f"line {line}") if asked.with_labels else None
                split = cells[at["split"]] if asked.with_labels and "split" in at else None
                rows.add(f"{line:08d}" if is_of_texts else cells[at["path"]], label, split, where)
                if is_of_texts:
                    rows.texts.append(cells[at[_TEXT]].encode("utf-8", "surrogateescape"))
                rows.asked.append(tuple(cells[at[name]] for name in asked.names))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    return rows


def _holds_texts(columns: Sequence[str]) -> bool:
    """Tell whether a table's samples are texts; beside paths of images a text is a caption."""
    return _TEXT in columns and "path" not in columns


@contextmanager
def _cells_of(characters: int) -> Iterator[None]:
    """Let a cell of a CSV file be so long: the library's limit is made for numbers and names."""
    before = csv.field_size_limit(max(characters, csv.field_size_limit()))
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _sane_lines(file: Any, path: Path, most: int) -> Iterator[str]:
    """Yield lines of a sane length: a file that is no manifest may be one line of any size."""
    while line := file.readline(most):
        if len(line) == most:
            raise DataError(f"{path}: not a CSV file: a line of over {most} characters.")
        yield line


def _parquet_rows(path: Path, asked: _Asked = _Asked()) -> tuple[_Rows, str | None]:
    """Return the rows, and the column of the images' bytes where there is one."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise SetupError(f"{path}: Parquet needs pyarrow: `pip install 'featcache[parquet]'`.") from None
    try:
        file = pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a Parquet file ({error}).") from error
    with file:
        schema = file.schema_arrow
        column = next(
            (name for name in _BYTES_COLUMNS if name in schema.names and _holds_bytes(schema.field(name).type)), None
        )
        if column is None:
            _require_columns(schema.names, path, asked)
            column = _TEXT if _holds_texts(schema.names) else None
        elif asked.with_labels and "label" not in schema.names:
            raise DataError(f"{path}: a column label is needed beside {column}, found {sorted(schema.names)}.")
        _require_single(schema.names, path, asked, column)
        _require_text(schema, column, path)
        # A row takes a byte at least, however well it is packed.
        if file.metadata.num_rows > path.stat().st_size:
            raise DataError(f"{path}: claims {file.metadata.num_rows} rows in {path.stat().st_size} bytes.")
        classes, broken = _class_names(schema.metadata or {})
        rows, read = _Rows(notes=(f"{path}: {broken}",) if broken else ()), Labels(str(path), classes)
        for number, row in enumerate(_records(file, column, asked.names)):
            inner_path = row.get("path", row.get("inner"))
            name = inner_path or ""
            if column is not None:
                name = f"{number:08d}" + (f"-{PurePosixPath(inner_path).name}" if inner_path else "")
            label = read.read(row["label"], f"row {number}") if asked.with_labels else None
            rows.add(name, label, row.get("split") if asked.with_labels else None, f"{path}, row {number}")
            rows.asked.append(tuple("" if row[name] is None else str(row[name]) for name in asked.names))
    rows.lists = read.lists
    return rows, column


def _records(file: Any, column: str | None, asked: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield rows without the images' bytes; as many at once as fit into memory if each were as large as all together."""
    import pyarrow as pa

    schema = file.schema_arrow
    names = [name for name in dict.fromkeys(("path", "label", "split", *asked)) if name in schema.names]
    struct = column is not None and pa.types.is_struct(schema.field(column).type)
    inner = struct and "path" not in names and any(part.name == "path" for part in schema.field(column).type)
    columns = [*names, f"{column}.path"] if inner else names
    for group in range(file.num_row_groups):
        facts = file.metadata.row_group(group)
        parts = [facts.column(number) for number in range(facts.num_columns)]
        columns_read = [
            part for part in parts if part.path_in_schema.split(".")[0] in names or part.path_in_schema in columns
        ]
        size = max(1, _BATCH_BYTES // max(1, *(part.total_uncompressed_size for part in columns_read)))
        for batch in file.iter_batches(size, row_groups=[group], columns=columns):
            values = {name: batch.column(name).to_pylist() for name in names}
            if inner:
                values["inner"] = [(value or {}).get("path") for value in batch.column(column).to_pylist()]
            for row in range(batch.num_rows):
                yield {name: cells[row] for name, cells in values.items()}


class _RowGroups:
    """Reads the bytes of the n-th row; a row group is decoded once for all its rows."""

    def __init__(self, path: Path, column: str) -> None:
        self._path, self._column = path, column
        self._lock = threading.Lock()
        self._held: dict[int, list[Any]] = {}
        self._ends: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path, "_column": self._column}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_path"], state["_column"])  # type: ignore[misc]

    def __call__(self, row: int) -> bytes:
        """Return the bytes of a row."""
        import pyarrow.parquet as pq

        with self._lock:
            with pq.ParquetFile(self._path, memory_map=True) as file:
                if not self._ends:
                    total = 0
                    for group in range(file.num_row_groups):
                        total += file.metadata.row_group(group).num_rows
                        self._ends.append(total)
                group = next(index for index, end in enumerate(self._ends) if row < end)
                if group not in self._held:
                    # Two row groups: readers of neighbouring images stand at most at one border.
                    while len(self._held) > 1:
                        self._held.pop(next(iter(self._held)))
                    self._held[group] = file.read_row_group(group, columns=[self._column])[self._column].to_pylist()
            value = self._held[group][row - (self._ends[group - 1] if group else 0)]
        content = value.get("bytes") if isinstance(value, dict) else value
        if isinstance(content, str):
            return content.encode("utf-8", "surrogateescape")
        if not isinstance(content, bytes):
            raise OSError(f"row {row} holds no bytes")
        return content


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_bytes(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _require_text(schema: Any, column: str | None, path: Path) -> None:
    """Refuse paths that are no text.

    Raises:
        DataError: they are not.
    """
    import pyarrow as pa

    names = ("path", "split", *([_TEXT] if column == _TEXT else []))
    kinds = {name: schema.field(name).type for name in names if name in schema.names}
    if column is not None and pa.types.is_struct(schema.field(column).type):
        kinds |= {f"{column}.path": part.type for part in schema.field(column).type if part.name == "path"}
    for name, kind in kinds.items():
        plain = kind.value_type if pa.types.is_dictionary(kind) else kind
        if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_null(plain)):
            raise DataError(f"{path}: the column {name} must be text, not {kind}.")


def _class_names(metadata: dict[bytes, bytes]) -> tuple[list[str], str]:
    """Return the class names that Hugging Face's schema notes for ``label``, and what is wrong with them if something is."""
    if b"huggingface" not in metadata:
        return [], ""
    try:
        described = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]
        names = described.get("names") if isinstance(described, dict) else None
        return [str(name) for name in names or []], ""
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        return [], f"its notes on class names cannot be read ({type(error).__name__}); classes are called by their numbers"


def _require_columns(columns: Sequence[str], path: Path, asked: _Asked) -> None:
    has_samples = bool({"path", _TEXT} & set(columns))
    if not asked.with_labels and not has_samples:
        raise DataError(f"{path}: a column path or text is needed, found {sorted(map(str, columns))}.")
    if asked.with_labels and not ("label" in columns and has_samples):
        raise DataError(
            f"{path}: the columns path and label are needed, or text and label (split is optional), found "
            f"{sorted(map(str, columns))}."
        )


def _require_single(columns: Sequence[str], path: Path, asked: _Asked, images: str | None = None) -> None:
    read = (_TEXT if _holds_texts(columns) else "path", "label", "split", *asked.names)
    twice = next((name for name in read if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}: two columns are called {twice}.")
    missing = next((name for name in asked.names if name not in columns), None)
    if missing is not None:
        raise DataError(f"`{asked.setting}` {missing}: {path.name} has no such column.")
    if images in asked.names:
        raise DataError(f"`{asked.setting}` {images}: this column of {path.name} holds the images.")
