"""The three kinds of HDF5 file in an entry: parts, listings, and ``features.h5``.

All are built in memory and written by Python: libhdf5 crashes the process when a disk fills up (h5py issue 914).
"""

import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache.errors import StorageError
from featcache.fingerprint import sha256_of_chunks
from featcache.resources import cores

Array = NDArray[Any]
Chunks = list[memoryview]
SPLITS = ("", "train", "val", "test")
# What spec.json can ask for. Another dtype in a file means that it is none of ours.
_STORED = tuple(map(np.dtype, ("float32", "float16", "uint8", "int32")))
_DIGEST_BYTES = 32
_FIRST_SIGNS = 3  # size, mtime, inode
_PIECE_BYTES = 16 << 20  # long enough that the disk is waited for, not calls
_TEXTS_AT_ONCE = 8192  # a million paths as Python's texts would take 100 MB at once


class Column(Sequence[str]):
    """Texts of n rows, decoded when they are looked at: most readers of a large entry look at few."""

    def __init__(self, values: Array, decode: Callable[[Any], str]) -> None:
        self._values = values
        self._decode = decode

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._values)

    def __iter__(self) -> Iterator[str]:
        """Yield the texts in order."""
        return map(self._decode, self._values)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...

    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        """Return one text, or a slice's as a tuple."""
        values = self._values[index]
        return tuple(map(self._decode, values)) if isinstance(index, slice) else self._decode(values)

    def __eq__(self, texts: object) -> bool:
        """Tell whether another sequence has the same texts."""
        return isinstance(texts, Sequence) and tuple(self) == tuple(texts)

    __hash__ = None  # type: ignore[assignment]

    def encoded(self, start: int, end: int) -> Array | None:
        """Return some texts as the bytes (k,) that they are kept as, ``None`` where those are not all ASCII."""
        values = self._values[start:end]
        return values if values.dtype.kind == "S" and values.tobytes().isascii() else None

    def __repr__(self) -> str:
        return f"Column({', '.join(map(repr, self[:3]))}{', ...' if len(self) > 3 else ''})"


@dataclass(frozen=True)
class FileIndex:
    """Which bytes stood at which paths, and by what sign to recognise them: columns of n rows.

    ``sha256`` is uint8 (n, 32); ``stat`` is int64 (n, 4): size in bytes, mtime in ns, inode, ctime in ns (-1 where
    unknown); ``checked_ns`` is a time before which none of the bytes were hashed.
    """

    paths: Sequence[str]
    sha256: NDArray[np.uint8]
    stat: NDArray[np.int64]
    checked_ns: int

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.sha256)

    def take(self, rows: NDArray[Any]) -> "FileIndex":
        """Return some of the files, by row numbers or a mask."""
        numbers = np.arange(len(self))[rows]
        return FileIndex(tuple(map(self.paths.__getitem__, numbers)), self.sha256[rows], self.stat[rows], self.checked_ns)

    @classmethod
    def joined(cls, indexes: "Sequence[FileIndex]") -> "FileIndex":
        """Return the files of several indexes, one index after the other."""
        paths = tuple(path for index in indexes for path in index.paths)
        sha256, stat = (np.concatenate([getattr(index, name) for index in indexes]) for name in ("sha256", "stat"))
        return cls(paths, sha256, stat, min(index.checked_ns for index in indexes))


@dataclass(frozen=True)
class Listing:
    """The samples of a data set as last seen, in its order; ``labels`` index ``classes``, ``splits`` index SPLITS."""

    files: FileIndex
    labels: NDArray[np.int64]
    splits: NDArray[np.uint8]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Some rows and what they were computed from; ``copies`` have their row here or elsewhere.

    ``features`` are the rows in pieces (m, ...), all of one dtype, one after the other; at least one.
    """

    features: Sequence[Array]
    files: FileIndex
    copies: FileIndex | None = None


def part_chunks(part: Part) -> Chunks:
    """Return a part as the bytes of an HDF5 file, chunk by chunk: the rows are not copied."""
    first = part.features[0]

    def fill(file: h5py.File) -> None:
        _write_file_index(file, part.files)
        if part.copies is not None:
            _write_file_index(file.create_group("copies"), part.copies)

    before, after = _around_rows((len(part.files), *first.shape[1:]), first.dtype, fill)
    return [*before, *map(bytes_of, part.features), *after]


def bytes_of(rows: Array) -> memoryview:
    """Return rows as the bytes that they are stored as, copied only where they do not lie side by side."""
    return np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data


def encode_listing(listing: Listing) -> memoryview:
    """Return a listing as the bytes of an HDF5 file; its attribute ``content`` is the hash of all but the files' times."""

    def fill(file: h5py.File) -> None:
        _write_file_index(file, listing.files)
        file.create_dataset("label", data=listing.labels)
        file.create_dataset("split", data=listing.splits)
        file.create_dataset("classes", data=_encoded_names(listing.classes))
        columns = (file[name][:] for name in ("path", "sha256", "label", "split", "classes"))
        file.attrs["content"] = sha256_of_chunks(
            chunk for column in columns for chunk in (f"{column.dtype}{column.shape}".encode(), bytes_of(column))
        )

    return _in_memory(fill)


def frame_table(
    shape: tuple[int, ...], dtype: np.dtype[Any], listing: Listing, attributes: dict[str, str]
) -> tuple[Chunks, Chunks]:
    """Return what stands before and after the rows of a ``features.h5``, what people open with h5py alone.

    The rows themselves need not fit into memory.
    """

    def fill(file: h5py.File) -> None:
        file.attrs.update(attributes)
        file.create_dataset("labels", data=listing.labels)
        _write_texts(file, "class_names", listing.classes)
        _write_texts(file, "paths", listing.files.paths)
        _write_encoded(file, "splits", np.array(SPLITS, np.bytes_)[listing.splits])
        digits = np.frombuffer(listing.files.sha256.tobytes().hex().encode(), "S64")
        _write_encoded(file, "item_sha256", digits, "ascii")

    return _around_rows(shape, dtype, fill)


def _around_rows(shape: tuple[int, ...], dtype: np.dtype[Any], fill: Callable[[h5py.File], None]) -> tuple[Chunks, Chunks]:
    """Return an HDF5 file's bytes before and after the rows of its data set ``features``, which are left out."""
    file = _Sparse()
    with h5py.File(file, "w") as hdf:
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        # Early, so that the rows' place is known before there are any; never filled, since they are written over it.
        how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        how.set_obj_track_times(False)  # the same content is the same file, whenever it is written
        space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype, logical=True)
        rows_at = h5py.h5d.create(hdf.id, b"features", kind, space, how).get_offset()
        fill(hdf)
    if rows_at is None:
        return file.content(0, file.size), []
    end = rows_at + math.prod(shape) * dtype.itemsize
    return file.content(0, rows_at), file.content(end, max(end, file.size))


def _write_texts(file: h5py.File, name: str, texts: Sequence[str]) -> None:
    """Write texts at a fixed length, encoded some at a time: as Python objects they would take several times their room."""

    def piece(start: int) -> Array:
        end = start + _TEXTS_AT_ONCE
        encoded = texts.encoded(start, end) if isinstance(texts, Column) else None
        return encoded if encoded is not None else np.array([_in_utf8(text) for text in texts[start:end]], np.bytes_)

    pieces = [piece(start) for start in range(0, len(texts), _TEXTS_AT_ONCE)]
    _write_encoded(file, name, np.concatenate(pieces) if pieces else np.empty(0, "S1"))


def _write_encoded(file: h5py.File, name: str, texts: Array, encoding: str = "utf-8") -> None:
    file.create_dataset(name, data=texts.view(h5py.string_dtype(encoding, texts.dtype.itemsize)))


class _Sparse(io.RawIOBase):
    """A file in memory that holds only the pages written to, for HDF5's metadata around rows that are written elsewhere."""

    _PAGE = 1 << 16

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, bytearray] = {}
        self._at = 0
        self.size = 0

    def content(self, start: int, end: int) -> list[memoryview]:
        """Return the bytes from one offset to another in pieces, without copying them."""
        self._at = start
        nothing = memoryview(bytes(self._PAGE))
        return [
            (memoryview(self._pages[page]) if page in self._pages else nothing)[inside : inside + length]
            for _, page, inside, length in self._spans(end - start)
        ]

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset."""
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        """Return the offset."""
        return self._at

    def truncate(self, size: int | None = None) -> int:
        """Set the file's size."""
        self.size = self._at if size is None else size
        return self.size

    def readinto(self, buffer: Any) -> int:
        """Read from the offset on; what was never written is zero."""
        view = memoryview(buffer).cast("B")
        for start, page, inside, length in self._spans(len(view)):
            held = self._pages.get(page)
            view[start : start + length] = held[inside : inside + length] if held else bytes(length)
        self._at += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        """Write at the offset."""
        view = memoryview(data).cast("B")
        for start, page, inside, length in self._spans(len(view)):
            held = self._pages.setdefault(page, bytearray(self._PAGE))
            held[inside : inside + length] = view[start : start + length]
        self._at += len(view)
        self.size = max(self.size, self._at)
        return len(view)

    def _spans(self, length: int) -> Iterator[tuple[int, int, int, int]]:
        covered = 0
        while covered < length:
            page, inside = divmod(self._at + covered, self._PAGE)
            step = min(length - covered, self._PAGE - inside)
            yield covered, page, inside, step
            covered += step


def read_file_index(path: Path) -> FileIndex:
    """Read what a part or a listing was made from.

    Raises:
        StorageError: the file is not as featcache writes it.
    """
    with _reading(path) as file:
        return _read_file_index(file)


def read_copies(path: Path) -> FileIndex | None:
    """Read which further files a part knows the content of.

    Raises:
        StorageError: the file is not as featcache writes it.
    """
    with _reading(path) as file:
        return _read_file_index(_member(file, "copies", h5py.Group)) if "copies" in file else None


def read_listing(path: Path) -> Listing:
    """Read a listing.

    Raises:
        StorageError: the file is not as featcache writes it.
    """
    with _reading(path) as file:
        names = _column(file, "classes", "S")
        files = _read_file_index(file)
        labels = _column(file, "label", np.int64, rows=len(files))
        splits = _column(file, "split", np.uint8, rows=len(files))
        if len(labels) and not (0 <= labels.min() <= labels.max() < len(names) and splits.max() < len(SPLITS)):
            raise ValueError("a label or a split that it does not name")
        return Listing(files, labels, splits, tuple(os.fsdecode(bytes(name)) for name in names))


def listing_content(path: Path) -> str:
    """Return the hash of what a listing says apart from the files' times, "" where it was written without.

    Raises:
        StorageError: the file is not as featcache writes it.
    """
    with _reading(path) as file:
        return str(file.attrs.get("content", ""))


def map_features(path: Path) -> Array:
    """Return the features (n, ...) of a part or of a ``features.h5`` as a read-only memory map.

    Raises:
        StorageError: the file is not as featcache writes it.
    """
    with _reading(path) as file:
        dataset = _contiguous(file, "features")
        shape, dtype, offset = dataset.shape, dataset.dtype, dataset.id.get_offset()
        if dtype not in _STORED or not shape:
            raise ValueError(f"features of {dtype}, {shape}")
    if not math.prod(shape):
        return np.empty(shape, dtype)
    return np.memmap(path, mode="r", dtype=dtype, shape=shape, offset=offset)


def same_table(path: Path, listing: Listing, rows: Callable[[int, int], Array]) -> bool:
    """Tell whether a ``features.h5`` says what a listing and its rows (from, to) say, however it spells it.

    Raises:
        StorageError: the file is not as featcache writes it.
    """
    with _reading(path) as file:
        expected = {
            "class_names": [_in_utf8(name) for name in listing.classes],
            "paths": [_in_utf8(name) for name in listing.files.paths],
            "splits": [SPLITS[split].encode() for split in listing.splits],
            "item_sha256": [hex_of(digest).encode() for digest in listing.files.sha256],
        }
        if set(file) != {"features", "labels", *expected}:
            return False
        if any(_column(file, name, "S").tolist() != values for name, values in expected.items()):
            return False
        if not np.array_equal(_column(file, "labels", np.int64), listing.labels):
            return False
    table = map_features(path)
    step = max(1, _PIECE_BYTES // max(1, table[:1].nbytes))
    pieces = ((start, min(start + step, len(table))) for start in range(0, len(table), step))
    return len(table) == len(listing.labels) and all(
        bytes_of(table[start:end]) == bytes_of(rows(start, end)) for start, end in pieces
    )


def read_features(path: Path) -> Array:
    """Return the features (n, ...) of a ``features.h5`` in memory, read by all cores: copying is most of the work."""
    mapped = map_features(path)
    rows = np.empty(mapped.shape, mapped.dtype)
    if not rows.size:
        return rows
    start: int = mapped.offset  # type: ignore[attr-defined]
    content = memoryview(rows.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
    step = max(_PIECE_BYTES, -(-len(content) // cores()))

    def read(begin: int) -> None:
        with path.open("rb", buffering=0) as file:
            file.seek(start + begin)
            rest = content[begin : begin + step]
            while rest:
                count = file.readinto(rest)
                if not count:
                    raise StorageError(f"{path}: shorter than it says. `featcache store verify` says what is damaged.")
                rest = rest[count:]

    with ThreadPoolExecutor(cores()) as readers:
        list(readers.map(read, range(0, len(content), step)))
    return rows


def table_attributes(path: Path) -> dict[str, str] | None:
    """Return the attributes of a ``features.h5``, ``None`` where the file is not one of featcache's."""
    try:
        with _reading(path) as file:
            attributes = {str(name): str(value) for name, value in file.attrs.items()}
    except StorageError:
        return None
    return attributes if "featcache_key" in attributes else None


def is_foreign(path: Path) -> bool:
    """Tell whether a file is sound HDF5, and none that featcache writes."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    try:
        with _reading(path) as file:
            return "featcache_key" not in file.attrs and "checked_ns" not in file.attrs
    except StorageError:
        return False


def _in_memory(fill: Callable[[h5py.File], None]) -> memoryview:
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        fill(file)
    return content.getbuffer()


@contextmanager
def _reading(path: Path) -> Iterator[h5py.File]:
    """Open a file of an entry; whatever goes wrong with its content is one error."""
    try:
        if not path.is_file():  # a pipe would wait for its writer
            raise ValueError("no such file")
        with h5py.File(path, "r", locking=False) as file:  # files never change once they are there
            yield file
    except StorageError:
        raise
    except Exception as error:  # h5py has an exception for every way that a file can be odd
        why = str(error) or type(error).__name__
        raise StorageError(
            f"{path}: not as featcache writes it ({why}). `featcache store verify` says what is damaged."
        ) from error


def _member(group: h5py.Group, name: str, kind: type) -> Any:
    """Return a member of a group that is really in it: a link may lead into any file of the user's."""
    # HDF5 follows soft and external links without asking: those could read any file of the user's as features.
    if name not in group or group.id.links.get_info(name.encode()).type != h5py.h5l.TYPE_HARD:
        raise ValueError(f"no {name}")
    member = group[name]
    if not isinstance(member, kind):
        raise ValueError(f"{name} is another kind of thing")  # noqa: TRY004 - of the file's content, not of an argument
    return member


def _contiguous(group: h5py.Group, name: str) -> Any:
    """Return a data set whose bytes all lie in this very file, one behind the other, as many as it says."""
    dataset = _member(group, name, h5py.Dataset)
    made = dataset.id.get_create_plist()
    if made.get_layout() != h5py.h5d.CONTIGUOUS or made.get_external_count() or dataset.shape is None:
        raise ValueError(f"{name} is not kept in one piece")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    offset = dataset.id.get_offset()
    # Checked before memory is taken: a planted size of a terabyte ends in an error, not in a full machine.
    if size and (offset is None or offset + size > os.stat(group.file.filename).st_size):  # noqa: PTH116 - a text
        raise ValueError(f"{name} is larger than the file")
    return dataset


def _column(group: h5py.Group, name: str, kind: Any, *, rows: int | None = None, width: int | None = None) -> Array:
    """Return a column (n,) or (n, ``width``) of one dtype, or of bytes where ``kind`` is "S".

    Raises:
        ValueError: it is another, or has not so many ``rows``.
    """
    dataset = _contiguous(group, name)
    shape, dtype = dataset.shape, dataset.dtype
    is_kind = dtype.kind == "S" if kind == "S" else dtype == np.dtype(kind)
    fits = shape[:1] == (rows,) if rows is not None else len(shape) > 0
    if not is_kind or not fits or shape[1:] != (() if width is None else (width,)):
        raise ValueError(f"{name} of {dtype}, {shape}")
    values: Array = dataset[:]
    return values


def _write_file_index(file: h5py.Group, files: FileIndex) -> None:
    file.attrs["checked_ns"] = files.checked_ns
    file.create_dataset("path", data=_encoded_names(files.paths))
    file.create_dataset("sha256", data=files.sha256)
    file.create_dataset("stat", data=files.stat[:, :_FIRST_SIGNS])
    file.create_dataset("ctime", data=files.stat[:, _FIRST_SIGNS])  # beside it, as files without are read too


def _read_file_index(file: h5py.Group) -> FileIndex:
    names = _column(file, "path", "S")
    sha256 = _column(file, "sha256", np.uint8, rows=len(names), width=_DIGEST_BYTES)
    stat = _column(file, "stat", np.int64, rows=len(names), width=_FIRST_SIGNS)
    unknown = np.full(len(names), -1)
    changed = _column(file, "ctime", np.int64, rows=len(names)) if "ctime" in file else unknown
    checked = file.attrs.get("checked_ns")
    if not isinstance(checked, np.integer):
        raise ValueError("checked_ns")  # noqa: TRY004 - of the file's content, not of an argument
    return FileIndex(Column(names, _decode_name), sha256, np.column_stack([stat, changed]), int(checked))


def _encoded_names(names: Sequence[str]) -> Array:
    """Return file names as fixed-length bytes: names that are not UTF-8 survive."""
    return np.array([os.fsencode(name) for name in names] or [b""], dtype=np.bytes_)[: len(names)]


def _decode_name(name: bytes) -> str:
    return os.fsdecode(bytes(name))


def hex_of(digest: NDArray[np.uint8]) -> str:
    """Return a hash's hexadecimal digits."""
    return digest.tobytes().hex()


def split_name(split: int) -> str:
    """Return a split's name by its number."""
    return SPLITS[split]


def _in_utf8(name: str) -> bytes:
    """Return a name in UTF-8, bytes that are none spelt out."""
    content = os.fsencode(name)
    try:
        content.decode()
    except UnicodeDecodeError:
        return content.decode("utf-8", "backslashreplace").encode()
    return content
