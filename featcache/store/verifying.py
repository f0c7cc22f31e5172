"""Every byte of an entry compared with what was written: a line for each file that is not whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from featcache.errors import StorageError
from featcache.fingerprint import sha256_of_file
from featcache.store import checksums as stamps
from featcache.store import hdf5 as files
from featcache.store import manifests, requests
from featcache.store.hdf5 import Seen
from featcache.store.json_files import parse, read_plain, unsealed
from featcache.store.manifests import FileRecord, Manifest

OTHER_BYTES = "its bytes are not what featcache wrote"
_Read = TypeVar("_Read")


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
        self._try(self._folder / "spec.json", lambda path: _spelt(path, indent=1))
        for path in sorted((self._folder / "requests").glob("*.json")):
            self._try(path, lambda path: requests.read(path, self._key))
        if (checked := self._folder / "checked.json").exists():
            self._try(checked, lambda path: stamps.parsed(unsealed(_spelt(path), self._key)))

    def manifests(self) -> Manifest | None:
        """Look at all versions, each of which must name the one before; return the newest that can be read."""
        read: dict[int, Manifest] = {}
        for number in manifests.numbers_in(self._folder):
            manifest = self._try(self._manifest(number), lambda path: manifests.as_written(path, self._key))
            if manifest is not None:
                read[number] = manifest
        for number, manifest in read.items():
            if number + 1 in read and read[number + 1].previous != manifests.hash_of(manifest):
                self.problems.append(f"{self._manifest(number)}: is not the version that the next one follows")
        return read[max(read)] if read else None

    def parts(self, manifest: Manifest) -> None:
        """Look at listed parts, at the listing, whether its images have rows, and at parts that nothing lists."""
        rows, whole = set[bytes](), True
        for record in manifest.parts:
            seen = self._try(self._part(record), lambda path, record=record: _part(path, record))  # type: ignore[misc]
            whole = whole and seen is not None
            rows.update(digest.tobytes() for digest in (seen.sha256 if seen else ()))
        if (listed := manifest.listing) is not None:
            seen = self._try(self._part(listed), lambda path: _listing(path, listed))
            without = sum(digest.tobytes() not in rows for digest in seen.sha256) if whole and seen else 0
            if without:
                self.problems.append(f"{self._part(listed)}: {without} images have no row, `featcache extract` computes it")
        known = {record.name for record in (*manifest.parts, *([listed] if listed else []))}
        for path in sorted((self._folder / "parts").glob(f"*{manifests.PART_SUFFIX}")):
            if path.name not in known:
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

    def _part(self, record: FileRecord) -> Path:
        return self._folder / "parts" / record.name


def _spelt(path: Path, indent: int | None = None) -> dict[str, object]:
    content = read_plain(path)
    note = parse(content)
    if json.dumps(note, indent=indent).encode() != content:
        raise ValueError(OTHER_BYTES)
    return note


def _require_bytes(path: Path, record: FileRecord) -> None:
    if path.stat().st_size != record.bytes or not path.is_file() or sha256_of_file(path) != record.sha256:
        raise ValueError(OTHER_BYTES)


def _require_rows(found: int, record: FileRecord) -> None:
    if found != record.rows:
        raise ValueError(f"{found} rows, its manifest says {record.rows}")


def _part(path: Path, record: FileRecord) -> Seen:
    _require_bytes(path, record)
    seen = files.read_seen(path)
    files.read_copies(path)
    _require_rows(len(seen.paths), record)
    _require_rows(len(files.map_features(path)), record)
    return seen


def _listing(path: Path, record: FileRecord) -> Seen:
    _require_bytes(path, record)
    listing = files.read_listing(path)
    _require_rows(len(listing.labels), record)
    return listing.seen


def _named_by_content(path: Path) -> None:
    if not path.is_file() or not sha256_of_file(path).startswith(path.name.split(".")[0]):
        raise ValueError(f"{OTHER_BYTES}; nothing lists it, `featcache store gc` removes it")
