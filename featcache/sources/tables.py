"""Manifests: CSV files and Parquet files that list images with labels and splits, Parquet with the images' bytes too."""

import csv
import json
import threading
from pathlib import Path, PurePosixPath
from typing import Any

from featcache.errors import DataError, SetupError
from featcache.sources.base import Files, Item, Numbered, Source, require_whole, safe_name, split_of

_BYTES_COLUMNS = ("image", "bytes", "img", "jpg", "png")


def open_csv(path: Path) -> Source:
    """Open a manifest with the columns path and label, and optionally split; paths are absolute, or relative to it."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    columns = set(rows[0]) if rows else set()
    _require_columns(columns, path)
    items = []
    for line, row in enumerate(rows, start=2):
        where = f"{path}, line {line}"
        if not row["path"] or not row["label"]:
            raise DataError(f"{where}: path and label must not be empty.")
        items.append(Item(PurePosixPath(row["path"]).as_posix(), row["label"], split_of(row.get("split"), where)))
    require_whole(items, str(path))
    return Source(safe_name(path.stem), str(path.resolve()), tuple(items), Files(path.resolve().parent))


def open_parquet(path: Path) -> Source:
    """Open a Parquet file: path, label and optionally split; or the images' bytes in a column such as ``image``.

    A column of bytes is binary, or a struct of bytes and path as Hugging Face writes it; its class names are used.
    """
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
    schema = file.schema_arrow
    column = next((name for name in _BYTES_COLUMNS if name in schema.names and _holds_bytes(schema.field(name).type)), None)
    if column is None:
        _require_columns(set(schema.names), path)
    elif "label" not in schema.names:
        raise DataError(f"{path}: a column label is needed beside {column}, found {sorted(schema.names)}.")
    names = [name for name in ("path", "label", "split") if name in schema.names]
    struct = column is not None and pa.types.is_struct(schema.field(column).type)
    if column is not None and struct and "path" not in names:
        names.append(f"{column}.path")
    rows = file.read(columns=names).to_pydict()
    count = len(rows["label"])
    inner = [(value or {}).get("path") for value in rows[column]] if column in rows else [None] * count
    classes = _class_names(schema.metadata or {})
    items = []
    for row in range(count):
        label, where = rows["label"][row], f"{path}, row {row}"
        given = rows.get("path", inner)[row]
        if label is None or label == "" or (column is None and not given):
            raise DataError(f"{where}: path and label must not be empty.")
        named = classes[label] if classes and isinstance(label, int) and 0 <= label < len(classes) else str(label)
        name = (
            PurePosixPath(given).as_posix()
            if column is None
            else f"{row:08d}" + (f"-{PurePosixPath(given).name}" if given else "")
        )
        items.append(Item(name, named, split_of(rows.get("split", [None] * count)[row], where)))
    require_whole(items, str(path))
    contents: Any = Files(path.resolve().parent)
    if column is not None:
        numbers = {item.path: row for row, item in enumerate(items)}
        contents = Numbered(numbers, _RowGroups(path, column), path.resolve())
    return Source(safe_name(path.stem), str(path.resolve()), tuple(items), contents)


def read_column(location: str, column: str) -> list[str]:
    """Return a manifest's values in one column as text, row by row.

    Raises:
        DataError: the source is no manifest, or has no such column.
    """
    path = Path(location)
    if path.suffix.lower() == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ())}
    elif path.suffix.lower() == ".parquet":
        import pyarrow.parquet as pq

        names = [name for name in pq.read_schema(path).names if name == column]
        columns = pq.read_table(path, columns=names).to_pydict()
    else:
        raise DataError(f"--group {column}: {location} is no manifest: list its images in a CSV or Parquet file.")
    if column not in columns:
        raise DataError(f"--group {column}: {path.name} has no such column.")
    return [str(value) for value in columns[column]]


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
                    while len(self._held) > 1:
                        self._held.pop(next(iter(self._held)))
                    self._held[group] = file.read_row_group(group, columns=[self._column])[self._column].to_pylist()
            value = self._held[group][row - (self._ends[group - 1] if group else 0)]
        content = value.get("bytes") if isinstance(value, dict) else value
        if content is None:
            raise OSError(f"row {row} holds no bytes")
        return bytes(content)


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(metadata: dict[bytes, bytes]) -> list[str]:
    """Return the class names that Hugging Face's schema notes for ``label``."""
    try:
        return [str(name) for name in json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _require_columns(columns: set[Any], path: Path) -> None:
    if not {"path", "label"} <= columns:
        raise DataError(
            f"{path}: the columns path and label are needed (split is optional), found {sorted(map(str, columns))}."
        )
