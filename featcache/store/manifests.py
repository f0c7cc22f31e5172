"""An entry's small JSON files, read as if anybody could have written them: its versions, and the flags that led to it."""

import json
import math
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache.fingerprint import canonical, fingerprint, sha256_of_bytes

if TYPE_CHECKING:
    from featcache.store.hdf5 import Listing

_SEAL = "check"
_MOST_BYTES = 256 << 20  # a manifest of a million parts; a file that is larger is none of ours


def read_plain(path: Path, most: int = _MOST_BYTES) -> bytes:
    """Return the bytes of a file, at most so many.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a device, a pipe or a folder, or larger.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would wait for its writer
    try:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("not a plain file")
        if facts.st_size > most:
            raise ValueError(f"{facts.st_size} bytes")
        with os.fdopen(os.dup(descriptor), "rb") as file:
            return file.read()
    finally:
        os.close(descriptor)


def parse(content: bytes) -> dict[str, Any]:
    """Return the one object that a JSON file holds.

    Raises:
        ValueError: it holds something else.
    """
    try:
        note = json.loads(content, parse_constant=_refused)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(note, dict):
        raise ValueError("not an object")  # noqa: TRY004 - of the file's content, not of an argument
    return note


def read_note(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else.
    """
    return parse(read_plain(path))


def sealed(note: Mapping[str, Any], *where: str) -> dict[str, Any]:
    """Return a note with its own hash, so that it is known again whole, and nowhere but ``where`` it belongs."""
    return {**note, _SEAL: fingerprint([*where, dict(note)])}


def unsealed(note: Mapping[str, Any], *where: str) -> dict[str, Any]:
    """Return a note without its hash; one that was written before there were any passes.

    Raises:
        ValueError: it is not what was sealed, or from elsewhere.
    """
    content = {name: value for name, value in note.items() if name != _SEAL}
    if _SEAL in note and note[_SEAL] != fingerprint([*where, content]):
        raise ValueError("its content is not what was written here")
    return content


def parse_stamps(note: dict[str, object]) -> dict[str, list[str | int]]:
    """Return what ``checked.json`` says of each file: SHA-256, size, mtime, ctime, inode, and when it was hashed.

    Raises:
        ValueError: it says something else.
    """
    for name, stamp in note.items():
        kinds = [type(value) for value in stamp] if isinstance(stamp, list) else []
        if kinds != [str, int, int, int, int, int]:
            raise ValueError(f"what it says of {name}")
    return note  # type: ignore[return-value]  # as just checked


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


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
    """A sample that gave no row, and why; ``sha256`` is empty where it could not even be read."""

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
        """Number of stored rows, those of removed samples included."""
        return sum(part.rows for part in self.parts)


def name_of(sha256: str, suffix: str) -> str:
    """Return what a file is called by its content."""
    return f"{sha256[:_NAMED]}{suffix}"


def numbers_in(folder: Path) -> list[int]:
    """Return the numbers of the manifests in a folder, newest first; files of any other name are none."""
    matches = (_NUMBERED.fullmatch(path.name) for path in folder.iterdir())
    return sorted((int(match[1]) for match in matches if match), reverse=True)


def hash_of(manifest: Manifest) -> str:
    """Return what the next version remembers this one by."""
    return sha256_of_bytes(canonical(manifest).encode())


def encode_manifest(manifest: Manifest, key: str) -> bytes:
    """Return a manifest as the bytes of its file, sealed for the entry of a key."""
    return json.dumps(sealed(asdict(manifest), key)).encode()


def read_manifest(path: Path, key: str) -> Manifest:
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
    manifest = read_manifest(path, key)
    if read_plain(path) not in {encode_manifest(manifest, key), json.dumps(asdict(manifest)).encode()}:
        raise ValueError("its bytes are not what featcache wrote")
    return manifest


def union(old: tuple[FileRecord, ...], new: Sequence[FileRecord]) -> tuple[FileRecord, ...]:
    """Return old parts and those new ones that are not among them."""
    names = {record.name for record in old}
    return (*old, *(record for record in new if record.name not in names))


def merge_quarantine(
    old: tuple[Quarantined, ...], new: Sequence[Quarantined], listing: "Listing | None"
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
    # The name is derived from the hash below: a manifest can list no path outside its own entry.
    previous = _string(data, "previous")
    if previous and not _DIGITS.fullmatch(previous):
        raise ValueError("previous")
    return Manifest(
        number=_whole_number(data, "number"),
        previous=previous,
        parts=tuple(_file_record(part, PART_SUFFIX) for part in _list(data, "parts")),
        quarantined=tuple(_quarantined(item) for item in _list(data, "quarantined")),
        listing=_file_record(listing, LISTING_SUFFIX) if listing is not None else None,
        seconds=float(seconds),
    )


def _file_record(data: object, suffix: str) -> FileRecord:
    """Return a listed file; its name must be that of its content, so that it leads nowhere else."""
    if not isinstance(data, dict):
        raise ValueError("a file in it")  # noqa: TRY004 - of the file's content, not of an argument
    sha256 = _string(data, "sha256")
    if not _DIGITS.fullmatch(sha256) or _string(data, "name") != name_of(sha256, suffix):
        raise ValueError("the name of a file in it")
    runtime = _string(data, "runtime") if "runtime" in data else ""
    return FileRecord(name_of(sha256, suffix), sha256, _whole_number(data, "bytes"), _whole_number(data, "rows"), runtime)


def _quarantined(data: object) -> Quarantined:
    if not isinstance(data, dict):
        raise ValueError("a sample left out")  # noqa: TRY004 - of the file's content, not of an argument
    sha256 = _string(data, "sha256")
    if sha256 and not _DIGITS.fullmatch(sha256):
        raise ValueError("the hash of a sample left out")
    return Quarantined(_string(data, "path"), sha256, _string(data, "reason"))


def _string(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    if not isinstance(value, str):
        raise ValueError(name)  # noqa: TRY004 - of the file's content, not of an argument
    return value


def _whole_number(data: Mapping[str, Any], name: str) -> int:
    value = data.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError(name)
    return value


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name)
    if not isinstance(value, list):
        raise ValueError(name)  # noqa: TRY004 - of the file's content, not of an argument
    return value


_ENTRY = "entry"


def encode_request(request: Mapping[str, Any], key: str) -> tuple[str, bytes]:
    """Return a request's file name and bytes, bound to the entry of a key."""
    content = json.dumps({**request, _ENTRY: key}, sort_keys=True, indent=1).encode()
    return f"{sha256_of_bytes(content)[:_NAMED]}.json", content


def read_request(path: Path, key: str) -> dict[str, Any]:
    """Return a request.

    Raises:
        OSError: it cannot be read.
        ValueError: its content is not what its name says, or it belongs to another entry.
    """
    content = read_plain(path)
    if path.stem != sha256_of_bytes(content)[:_NAMED]:
        raise ValueError("its bytes are not what its name says")
    request = parse(content)
    if request.pop(_ENTRY, key) != key:  # those written before there was a binding have none
        raise ValueError("it belongs to another entry")
    return request
