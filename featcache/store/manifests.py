"""An entry's versions: its manifests and requests, read as if anybody could have written them, and the files they list.

What is wrong with the bytes of any file, and what the newest version does not need. Nothing is changed here but parts, which
are joined: a part may only go once a version without it is committed.
"""

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from featcache.errors import StorageError
from featcache.fingerprint import canonical, sha256_of_bytes, sha256_of_file
from featcache.store import hdf5
from featcache.store.disk import abandoned, parse, parse_stamps, read_plain, sealed, unsealed
from featcache.store.hdf5 import Array, FileIndex, Listing, Part

if TYPE_CHECKING:
    from featcache.store.entry import FeatureStore

OTHER_BYTES = "its bytes are not what featcache wrote"
PART_SUFFIX, LISTING_SUFFIX = ".h5", ".items.h5"
FOLDERS = ("", "parts", "requests", "heads", "tuned")  # all in which a writer leaves temporary files when it is killed
PART_BYTES = 64 << 20  # a part is hashed and held whole: joining stops well below what memory a small machine has
_SMALL_BYTES = PART_BYTES // 4  # parts above this are left: joining them would rewrite much and save few files
_YOUNG_SECONDS = 3600  # who has written a part may yet have to commit it
_ENTRY = "entry"
_Read = TypeVar("_Read")
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
        raise ValueError(OTHER_BYTES)
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


class Inspection:
    """Reads an entry's files one after the other and collects what is wrong with each.

    Args:
        folder: of the entry.
        key: its own.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.problems: list[str] = []
        self._folder = folder
        self._key = key

    def notes(self) -> None:
        """Look at spec.json, the requests and checked.json."""
        self._try(self._folder / "spec.json", lambda path: _as_spelt(path, indent=1))
        for path in sorted((self._folder / "requests").glob("*.json")):
            self._try(path, lambda path: read_request(path, self._key))
        if (checked := self._folder / "checked.json").exists():
            self._try(checked, lambda path: parse_stamps(unsealed(_as_spelt(path), self._key)))

    def manifests(self) -> Manifest | None:
        """Look at all versions, each of which must name the one before; return the newest that can be read."""
        read: dict[int, Manifest] = {}
        for number in numbers_in(self._folder):
            manifest = self._try(self._manifest(number), lambda path: as_written(path, self._key))
            if manifest is not None:
                read[number] = manifest
        # Each version has the hash of the one before: a manifest put in from elsewhere breaks the chain.
        for number, manifest in read.items():
            if number + 1 in read and read[number + 1].previous != hash_of(manifest):
                self.problems.append(f"{self._manifest(number)}: is not the version that the next one follows")
        return read[max(read)] if read else None

    def parts(self, manifest: Manifest) -> None:
        """Look at listed parts, at the listing, whether its samples have rows, and at parts that nothing lists."""
        rows, all_whole = set[bytes](), True
        for record in manifest.parts:
            seen = self._try(self._read_part(record), lambda path, record=record: _read_part(path, record))  # type: ignore[misc]
            all_whole = all_whole and seen is not None
            rows.update(digest.tobytes() for digest in (seen.sha256 if seen else ()))
        if (listed := manifest.listing) is not None:
            seen = self._try(self._read_part(listed), lambda path: _listing(path, listed))
            without = sum(digest.tobytes() not in rows for digest in seen.sha256) if all_whole and seen else 0
            if without:
                self.problems.append(
                    f"{self._read_part(listed)}: {without} samples have no row, `featcache extract` computes it"
                )
        listed_names = {record.name for record in (*manifest.parts, *([listed] if listed else []))}
        for path in sorted((self._folder / "parts").glob(f"*{PART_SUFFIX}")):
            if path.name not in listed_names:
                self._try(path, _named_by_content)

    def _try(self, path: Path, look: Callable[[Path], _Read]) -> _Read | None:
        try:
            return look(path)
        except StorageError as error:
            self.problems.append(str(error))
        except FileNotFoundError:
            self.problems.append(f"{path}: missing")
        except (OSError, ValueError) as error:
            self.problems.append(f"{path}: {error}")
        return None

    def _manifest(self, number: int) -> Path:
        return self._folder / f"manifest-{number}.json"

    def _read_part(self, record: FileRecord) -> Path:
        return self._folder / "parts" / record.name


def _as_spelt(path: Path, indent: int | None = None) -> dict[str, object]:
    content = read_plain(path)
    note = parse(content)
    if json.dumps(note, indent=indent).encode() != content:
        raise ValueError(OTHER_BYTES)
    return note


def _require_bytes(path: Path, record: FileRecord) -> None:
    if path.stat().st_size != record.bytes or not path.is_file() or sha256_of_file(path) != record.sha256:
        raise ValueError(OTHER_BYTES)


def _require_row_count(count: int, record: FileRecord) -> None:
    if count != record.rows:
        raise ValueError(f"{count} rows, its manifest says {record.rows}")


def _read_part(path: Path, record: FileRecord) -> FileIndex:
    _require_bytes(path, record)
    seen = hdf5.read_file_index(path)
    hdf5.read_copies(path)
    _require_row_count(len(seen), record)
    _require_row_count(len(hdf5.map_features(path)), record)
    return seen


def _listing(path: Path, record: FileRecord) -> FileIndex:
    _require_bytes(path, record)
    listing = hdf5.read_listing(path)
    _require_row_count(len(listing.labels), record)
    return listing.files


def _named_by_content(path: Path) -> None:
    if not path.is_file() or not sha256_of_file(path).startswith(path.name.split(".")[0]):
        raise ValueError(f"{OTHER_BYTES}; nothing lists it, `featcache store gc` removes it")


@dataclass(frozen=True)
class Litter:
    """A file that nothing needs, why, and its size."""

    path: Path
    why: str
    bytes: int


@dataclass(frozen=True)
class Joining:
    """Parts to be written anew, and how many of their rows are of samples that are no longer there, or are there twice."""

    parts: tuple[FileRecord, ...] = ()
    dropped: int = 0


def litter_in(folders: Sequence[Path]) -> Iterator[Litter]:
    """Yield temporary files whose writers are gone."""
    for folder in folders:
        for path in abandoned(folder):
            yield Litter(path, "left by a process that is gone", _size(path))


def litter_of(store: "FeatureStore") -> Iterator[Litter]:
    """Yield what an entry's newest version does not need."""
    yield from litter_in([store.path / name for name in FOLDERS])
    manifest = store.manifest
    listed = {record.name for record in (*manifest.parts, *([manifest.listing] if manifest.listing else []))}
    for path in sorted((store.path / "parts").glob(f"*{PART_SUFFIX}")):
        # A young part may belong to a process that is about to commit it.
        if path.name not in listed and _is_old(path):
            why = (
                "list of samples before the entry's last change"
                if path.name.endswith(LISTING_SUFFIX)
                else "rows that no version of the entry lists"
            )
            yield Litter(path, why, _size(path))
    for number in numbers_in(store.path):
        if number < manifest.number:
            path = store.path / f"manifest-{number}.json"
            yield Litter(path, "manifest of the entry before its last change", _size(path))
    for path in store.broken_requests():
        yield Litter(path, "note of the flags that led to the entry, damaged", _size(path))


def joining_of(store: "FeatureStore") -> Joining:
    """Return which parts are to be joined: small ones, where there are several, and those with rows that nothing needs."""
    listed = _wanted(store)
    taken: set[bytes] = set()
    to_join, small, dropped = [], [], 0
    for record, seen in zip(store.manifest.parts, store.row_files(), strict=True):
        keep = _kept(seen, listed, taken)
        if not _is_old(store.path / "parts" / record.name):
            continue
        if not keep.all():
            to_join.append(record)
            dropped += int((~keep).sum())
        elif record.bytes < _SMALL_BYTES:
            small.append(record)
    to_join += small if len(small) > 1 or to_join else []
    names = {record.name for record in to_join}
    return Joining(tuple(record for record in store.manifest.parts if record.name in names), dropped)


def join(store: "FeatureStore", joining: Joining) -> None:
    """Write parts anew, as few as may be, and commit them in the place of the old ones.

    Raises:
        StorageError: a part is damaged, or the disk failed.
    """
    # A sample that lies in two parts keeps the row that stays where it is, so that less is written.
    listed, taken = _wanted(store), set[bytes]()
    names = {record.name for record in joining.parts}
    for record, seen in zip(store.manifest.parts, store.row_files(), strict=True):
        if record.name not in names:  # the rows that stay where they are count first
            _kept(seen, listed, taken)
    written: list[FileRecord] = []
    # One runtime a part: its name is noted with the part, and runtimes differ by rounding.
    for runtime in dict.fromkeys(record.runtime for record in joining.parts):
        group = [record for record in joining.parts if record.runtime == runtime]
        written += (store.add_part(part, runtime) for part in _joined_parts(store, group, listed, taken))
    # One commit for all: a reader sees the old parts or the new ones, never a row twice or not at all.
    store.commit(parts=written, instead_of=joining.parts)


def _joined_parts(
    store: "FeatureStore", records: Sequence[FileRecord], listed: set[bytes] | None, taken: set[bytes]
) -> Iterator[Part]:
    rows: list[Array] = []
    seen_parts: list[FileIndex] = []
    copies: list[FileIndex] = []
    size = 0
    for record in records:
        seen, also, mapped = store.part_of(record)
        keep = _kept(seen, listed, taken)
        rows.append(mapped[keep])
        seen_parts.append(seen.take(keep))
        copies += [also.take(_kept(also, listed, set(), once=False))] if also is not None else []
        size += rows[-1].nbytes
        if size >= PART_BYTES:
            yield Part(rows, FileIndex.joined(seen_parts), FileIndex.joined(copies) if copies else None)
            rows, seen_parts, copies, size = [], [], [], 0
    if any(len(piece) for piece in rows):
        yield Part(rows, FileIndex.joined(seen_parts), FileIndex.joined(copies) if copies else None)


def _wanted(store: "FeatureStore") -> set[bytes] | None:
    """Return the content of the samples that have a place in the entry, ``None`` where all have."""
    if store.manifest.listing is None:
        return None
    return {digest.tobytes() for digest in store.listing().files.sha256}


def _kept(seen: FileIndex, listed: set[bytes] | None, taken: set[bytes], *, once: bool = True) -> NDArray[np.bool_]:
    keep = np.zeros(len(seen), dtype=bool)
    for row, digest in enumerate(map(bytes, seen.sha256)):
        keep[row] = (listed is None or digest in listed) and digest not in taken
        if once:
            taken.add(digest)
    return keep


def _is_old(path: Path) -> bool:
    return time.time() - path.stat().st_mtime > _YOUNG_SECONDS


def _size(path: Path) -> int:
    return path.stat().st_size
