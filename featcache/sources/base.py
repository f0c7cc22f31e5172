"""What a source is: a named list of labelled images, and a way to read each one's bytes."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from featcache.errors import DataError
from featcache.fingerprint import fingerprint

SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source: its path relative to the source, its class and, where it is given, its split."""

    path: str
    label: str
    split: str = ""


@dataclass(frozen=True, slots=True)
class FileStat:
    """What tells cheaply that an image has not changed since it was hashed: of a file, or of what holds it."""

    size: int
    mtime_ns: int
    inode: int


class Contents(Protocol):
    """Where the bytes of a source's images are; many threads read at once."""

    def read(self, path: str) -> bytes:
        """Return an image's bytes, or raise OSError."""

    def stat(self, path: str) -> FileStat | None:
        """Return what tells that an image has not changed, ``None`` where nothing does, or raise OSError."""


@dataclass(frozen=True)
class Files:
    """Images that are files below a folder."""

    root: Path

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        with open(f"{self.root}/{path}", "rb", buffering=0) as file:  # noqa: PTH123 - pathlib takes as long as reading
            return file.readall()

    def stat(self, path: str) -> FileStat:
        """Return a file's size, time and inode."""
        found = os.stat(f"{self.root}/{path}")  # noqa: PTH116 - as above
        return FileStat(found.st_size, found.st_mtime_ns, found.st_ino)


@dataclass(frozen=True)
class Blobs:
    """Images in memory."""

    content: Mapping[str, bytes]

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        return self.content[path]

    def stat(self, path: str) -> None:
        """Return nothing: there is no file."""


@dataclass(frozen=True)
class Numbered:
    """Images that one file holds by number: ``read_at`` gives the bytes of the n-th, ``holder`` is that file."""

    numbers: Mapping[str, int]
    read_at: Callable[[int], bytes]
    holder: Path | None = None

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        return self.read_at(self.numbers[path])

    def stat(self, path: str) -> FileStat | None:
        """Return the holder's size and time, with the image's number."""
        if self.holder is None:
            return None
        found = self.holder.stat()
        return FileStat(found.st_size, found.st_mtime_ns, self.numbers[path])


@dataclass(frozen=True)
class Source:
    """A named list of labelled images. ``notes`` are things about it that the user should hear."""

    name: str
    location: str
    items: tuple[Item, ...]
    contents: Contents = field(default_factory=lambda: Blobs({}))
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(sorted({item.label for item in self.items}, key=natural))

    def read(self, path: str) -> bytes:
        """Return an image's bytes.

        Raises:
            OSError: it cannot be read.
        """
        return self.contents.read(path)

    def stat(self, path: str) -> FileStat | None:
        """Return what tells that an image has not changed, ``None`` where nothing does.

        Raises:
            OSError: it cannot be reached.
        """
        return self.contents.stat(path)


def split_of(text: object, where: str) -> str:
    """Return a split's name as featcache writes it, "" for none.

    Raises:
        DataError: it is none of train, val, test.
    """
    name = str(text if text is not None else "").strip().lower()
    if name and name not in SPLIT_FOLDERS:
        raise DataError(f"{where}: split {name!r} is none of train, val, test.")
    return SPLIT_FOLDERS.get(name, "")


def require_whole(items: list[Item], where: str) -> None:
    """Refuse a list that names an image twice, or gives a split to some only.

    Raises:
        DataError: it does.
    """
    seen: set[str] = set()
    twice = [item.path for item in items if item.path in seen or seen.add(item.path)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"{where}: {twice[0]} is listed more than once ({len(twice)} such paths).")
    if 0 < sum(not item.split for item in items) < len(items):
        raise DataError(f"{where}: some rows have a split and some have none: fill in all of them, or none.")


def location_hash(location: str) -> str:
    """Return six digits that tell two sources of one name apart."""
    return fingerprint(location)[:6]


def safe_name(name: str) -> str:
    """Return a data set's name as a folder can bear it."""
    kept = "".join(char if char.isalnum() or char in "._-" else "-" for char in name).strip(".-")
    return kept or "data"


def natural(name: str) -> tuple[tuple[int, str], ...]:
    """Order names so that ``class2`` comes before ``class10``."""
    parts: list[tuple[int, str]] = []
    digits = ""
    for char in f"{name}\0":
        if char.isascii() and char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((int(digits), digits))
            digits = ""
        parts.append((-1, char))
    return tuple(parts)
