"""The versions of an entry: what each lists, how it is written, and that nothing else is believed."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from featcache.fingerprint import canonical, sha256_of_bytes
from featcache.store.hdf5 import Listing
from featcache.store.json_files import parse, read_plain, sealed, unsealed

PART_SUFFIX, LISTING_SUFFIX = ".h5", ".items.h5"
_NUMBERED = re.compile(r"manifest-([1-9][0-9]{0,17})\.json")
_DIGITS = re.compile(r"[0-9a-f]{64}")
_NAMED = 16  # digits of a file's hash in its name


@dataclass(frozen=True)
class FileRecord:
    """A content-named file that a manifest lists; ``runtime`` is what computed its rows."""

    name: str
    sha256: str
    bytes: int
    rows: int
    runtime: str = ""


@dataclass(frozen=True)
class Quarantined:
    """An image that gave no row, and why; ``sha256`` is empty where it could not even be read."""

    path: str
    sha256: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """One version of an entry: what it holds, what computing that took, and the hash of the version before."""

    number: int = 0
    previous: str = ""
    parts: tuple[FileRecord, ...] = ()
    quarantined: tuple[Quarantined, ...] = ()
    listing: FileRecord | None = None
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Number of stored rows, those of removed images included."""
        return sum(part.rows for part in self.parts)


def name_of(sha256: str, suffix: str) -> str:
    """Return what a file is called by its content."""
    return f"{sha256[:_NAMED]}{suffix}"


def numbers_in(folder: Path) -> list[int]:
    """Return the numbers of the manifests in a folder, newest first; files of any other name are none."""
    found = (_NUMBERED.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in found if match), reverse=True)


def hash_of(manifest: Manifest) -> str:
    """Return what the next version remembers this one by."""
    return sha256_of_bytes(canonical(manifest).encode())


def encode(manifest: Manifest, key: str) -> bytes:
    """Return a manifest as the bytes of its file, sealed for the entry of a key."""
    return json.dumps(sealed(asdict(manifest), key)).encode()


def read(path: Path, key: str) -> Manifest:
    """Read a manifest.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not what was written for this entry under this name.
    """
    manifest = _parsed(unsealed(parse(read_plain(path)), key))
    if path.name != f"manifest-{manifest.number}.json":
        raise ValueError(f"it is number {manifest.number}")
    return manifest


def as_written(path: Path, key: str) -> Manifest:
    """Read a manifest and compare every byte with what this version, or one before there were seals, would write.

    Raises:
        OSError: it cannot be read.
        ValueError: a byte is another.
    """
    manifest = read(path, key)
    if read_plain(path) not in {encode(manifest, key), json.dumps(asdict(manifest)).encode()}:
        raise ValueError("its bytes are not what featcache wrote")
    return manifest


def union(old: tuple[FileRecord, ...], new: Sequence[FileRecord]) -> tuple[FileRecord, ...]:
    """Return old parts and those new ones that are not among them."""
    names = {record.name for record in old}
    return (*old, *(record for record in new if record.name not in names))


def merge_quarantine(
    old: tuple[Quarantined, ...], new: Sequence[Quarantined], listing: Listing | None
) -> tuple[Quarantined, ...]:
    """Return the quarantine list, newest word on each path; a listing settles it: what it does not name is stale."""
    if listing is not None:
        return tuple(sorted(new, key=lambda item: item.path))
    by_path = {item.path: item for item in (*old, *new)}
    return tuple(by_path[path] for path in sorted(by_path))


def _parsed(data: Mapping[str, Any]) -> Manifest:
    listing, seconds = data.get("listing"), data.get("seconds")
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not 0 <= seconds < math.inf:
        raise ValueError("seconds")
    previous = _text(data, "previous")
    if previous and not _DIGITS.fullmatch(previous):
        raise ValueError("previous")
    return Manifest(
        number=_count(data, "number"),
        previous=previous,
        parts=tuple(_record(part, PART_SUFFIX) for part in _list(data, "parts")),
        quarantined=tuple(_quarantined(item) for item in _list(data, "quarantined")),
        listing=_record(listing, LISTING_SUFFIX) if listing is not None else None,
        seconds=float(seconds),
    )


def _record(data: object, suffix: str) -> FileRecord:
    """Return a listed file; its name must be that of its content, so that it leads nowhere else."""
    if not isinstance(data, dict):
        raise ValueError("a file in it")  # noqa: TRY004 - of the file's content, not of an argument
    sha256 = _text(data, "sha256")
    if not _DIGITS.fullmatch(sha256) or _text(data, "name") != name_of(sha256, suffix):
        raise ValueError("the name of a file in it")
    runtime = _text(data, "runtime") if "runtime" in data else ""
    return FileRecord(name_of(sha256, suffix), sha256, _count(data, "bytes"), _count(data, "rows"), runtime)


def _quarantined(data: object) -> Quarantined:
    if not isinstance(data, dict):
        raise ValueError("an image left out")  # noqa: TRY004 - of the file's content, not of an argument
    sha256 = _text(data, "sha256")
    if sha256 and not _DIGITS.fullmatch(sha256):
        raise ValueError("the hash of an image left out")
    return Quarantined(_text(data, "path"), sha256, _text(data, "reason"))


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise ValueError(name)  # noqa: TRY004 - of the file's content, not of an argument
    return value


def _count(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(name)
    return value


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise ValueError(name)  # noqa: TRY004 - of the file's content, not of an argument
    return value
