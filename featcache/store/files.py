"""The three kinds of HDF5 file in an entry: parts, listings, and ``features.h5``.

All are built in memory and written by Python: libhdf5 crashes the process when a disk fills up (h5py issue 914).
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featcache.errors import StorageError

Array = NDArray[Any]
SPLITS = ("", "train", "val", "test")


@dataclass(frozen=True)
class Seen:
    """Which bytes stood at some paths, and by what sign to recognise them: n rows.

    ``sha256`` is uint8 (n, 32); ``stat`` is int64 (n, 3): size in bytes, mtime in ns, inode (-1 where unknown);
    ``checked_ns`` is when the bytes were hashed.
    """

    paths: tuple[str, ...]
    sha256: NDArray[np.uint8]
    stat: NDArray[np.int64]
    checked_ns: int


@dataclass(frozen=True)
class Listing:
    """The images of a source as last seen, in its order; ``labels`` index ``classes``, ``splits`` index SPLITS."""

    seen: Seen
    labels: NDArray[np.int64]
    splits: NDArray[np.uint8]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """Some rows: features (n, ...) and what they were computed from."""

    features: Array
    seen: Seen


def encode_part(part: Part) -> bytes:
    """Return a part as the bytes of an HDF5 file."""

    def fill(file: h5py.File) -> None:
        file.create_dataset("features", data=part.features)
        _write_seen(file, part.seen)

    return _in_memory(fill)


def encode_listing(listing: Listing) -> bytes:
    """Return a listing as the bytes of an HDF5 file."""

    def fill(file: h5py.File) -> None:
        _write_seen(file, listing.seen)
        file.create_dataset("label", data=listing.labels)
        file.create_dataset("split", data=listing.splits)
        file.create_dataset("classes", data=_names(listing.classes))

    return _in_memory(fill)


def encode_table(features: Array, listing: Listing, attributes: dict[str, str]) -> bytes:
    """Return ``features.h5``: what people open with h5py alone."""

    def fill(file: h5py.File) -> None:
        file.attrs.update(attributes)
        file.create_dataset("features", data=features)
        file.create_dataset("labels", data=listing.labels)
        text = h5py.string_dtype("utf-8")
        file.create_dataset("class_names", data=[_readable(name) for name in listing.classes], dtype=text)
        file.create_dataset("paths", data=[_readable(path) for path in listing.seen.paths], dtype=text)
        file.create_dataset("splits", data=[SPLITS[split] for split in listing.splits], dtype=text)
        hashes = [bytes(row).hex() for row in listing.seen.sha256]
        file.create_dataset("item_sha256", data=hashes, dtype=h5py.string_dtype("ascii", 64))

    return _in_memory(fill)


def read_seen(path: Path) -> Seen:
    """Read what a part or a listing was made from."""
    with _open(path) as file:
        return _read_seen(file)


def read_listing(path: Path) -> Listing:
    """Read a listing."""
    with _open(path) as file:
        classes = tuple(os.fsdecode(bytes(name)) for name in file["classes"][:])
        return Listing(_read_seen(file), file["label"][:], file["split"][:], classes)


def map_features(path: Path) -> Array:
    """Return a part's features (n, ...) as a read-only memory map."""
    with _open(path) as file:
        dataset = file["features"]
        offset = dataset.id.get_offset()
        if offset is None or dataset.external or dataset.is_virtual:
            raise StorageError(f"{path}: not a part that featcache wrote.")
        shape, dtype = dataset.shape, dataset.dtype
    return np.memmap(path, mode="r", dtype=dtype, shape=shape, offset=offset)


def table_attributes(path: Path) -> dict[str, str] | None:
    """Return the attributes of a ``features.h5``, ``None`` where the file is not one of featcache's."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            found = {str(name): str(value) for name, value in file.attrs.items()}
    except OSError:
        return None
    return found if "featcache_key" in found else None


def _in_memory(fill: Callable[[h5py.File], None]) -> bytes:
    name = f"memory-{secrets.token_hex(8)}"  # HDF5 knows files by name, in memory too
    with h5py.File(name, "w", driver="core", backing_store=False) as file:
        fill(file)
        file.flush()
        return bytes(file.id.get_file_image())


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r", locking=False)  # files never change once they are there
    except OSError as error:
        raise StorageError(f"{path}: not a readable HDF5 file. `featcache store verify` says what is damaged.") from error


def _write_seen(file: h5py.File, seen: Seen) -> None:
    file.attrs["checked_ns"] = seen.checked_ns
    file.create_dataset("path", data=_names(seen.paths))
    file.create_dataset("sha256", data=seen.sha256)
    file.create_dataset("stat", data=seen.stat)


def _read_seen(file: h5py.File) -> Seen:
    try:
        paths = tuple(os.fsdecode(bytes(name)) for name in file["path"][:])
        return Seen(paths, file["sha256"][:], file["stat"][:], int(file.attrs["checked_ns"]))
    except KeyError as error:
        raise StorageError(f"{file.filename}: not a file that featcache wrote ({error}).") from error


def _names(names: tuple[str, ...]) -> Array:
    """Return file names as fixed-length bytes: names that are not UTF-8 survive."""
    return np.array([os.fsencode(name) for name in names] or [b""], dtype=np.bytes_)[: len(names)]


def _readable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")
