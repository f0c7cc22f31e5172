"""One entry of the cache: immutable content-named parts and the manifests that list them."""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.errors import StorageError
from featcache.fingerprint import canonical, sha256_of_bytes, sha256_of_file
from featcache.specs import FeatureSpec
from featcache.store import files
from featcache.store.atomic import create_file, make_folder, replace_file, sweep
from featcache.store.files import Array, Listing, Part, Seen

TABLE = "features.h5"
TABLE_LIMIT = 2 << 30
_KEPT_MANIFESTS = 20


@dataclass(frozen=True)
class FileRecord:
    """A content-named file that a manifest lists."""

    name: str
    sha256: str
    bytes: int
    rows: int


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


@dataclass(frozen=True)
class Features:
    """The rows of a source's images, in its order: X (n, ...), y (n,) int64 indexing ``classes``."""

    X: Array
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    splits: tuple[str, ...]
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class RowReader:
    """Reads rows of an entry from its memory-mapped parts, as Features.X in the same order but not in memory."""

    maps: tuple[Array, ...]
    part: NDArray[np.int64]
    row: NDArray[np.int64]
    shape: tuple[int, ...] = field(default=())

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.row)

    def take(self, index: NDArray[np.int64]) -> Array:
        """Return rows (k, ...) by their positions (k,)."""
        out = np.empty((len(index), *self.maps[0].shape[1:]), self.maps[0].dtype)
        parts = self.part[index]
        for number in np.unique(parts):
            chosen = parts == number
            out[chosen] = self.maps[number][self.row[index[chosen]]]
        return out


class FeatureStore:
    """One entry of the cache: the rows of one data set under one FeatureSpec.

    Many processes may read and commit at once: a reader sees the highest manifest, which lists only whole files.
    """

    def __init__(self, path: Path, spec_text: str) -> None:
        self.path = path
        self._spec_text = spec_text
        self._manifest: Manifest | None = None

    @classmethod
    def create(cls, path: Path, spec: FeatureSpec) -> "FeatureStore":
        """Open an entry, made first where it is not there yet.

        Raises:
            StorageError: the folder cannot be written, or holds another entry or foreign files.
        """
        if not (path / "spec.json").exists():
            if path.exists() and any(_foreign(inside) for inside in path.iterdir()):
                raise StorageError(f"{path}: not an entry of featcache and not empty. Move it away, or use another --cache.")
            make_folder(path / "parts")
            make_folder(path / "requests")
            create_file(path / "spec.json", json.dumps(asdict(spec) | {"key": spec.key}, indent=1).encode())
        store = cls.open(path)
        if store.key != spec.key:
            raise StorageError(f"{path}: holds features under another key. Move it away, or use another --cache.")
        sweep(path / "parts")
        sweep(path)
        return store

    @classmethod
    def open(cls, path: Path | str) -> "FeatureStore":
        """Open an entry that is there.

        Raises:
            StorageError: there is none, or it was not written by featcache.
        """
        path = Path(path)
        try:
            text = (path / "spec.json").read_text()
            if "key" not in json.loads(text):
                raise KeyError("key")
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{path}: not an entry of featcache ({error}).") from error
        return cls(path, text)

    @property
    def spec(self) -> dict[str, Any]:
        """The FeatureSpec as plain data, with its key."""
        loaded: dict[str, Any] = json.loads(self._spec_text)
        return loaded

    @property
    def key(self) -> str:
        """The cache key, 64 hexadecimal digits."""
        return str(self.spec["key"])

    @property
    def manifest(self) -> Manifest:
        """The newest version as of the first use or the last commit."""
        if self._manifest is None:
            self._manifest = self._newest()
        return self._manifest

    def add_part(self, part: Part) -> FileRecord:
        """Write a part to disk; it counts once a commit lists it."""
        return self._add_file(files.encode_part(part), ".h5", len(part.features))

    def commit(
        self,
        *,
        parts: Sequence[FileRecord] = (),
        quarantined: Sequence[Quarantined] = (),
        listing: Listing | None = None,
        seconds: float = 0.0,
    ) -> Manifest:
        """Make parts, quarantined images and a listing count: all of them, or none when killed.

        ``seconds`` are added to what the entry's rows have cost. A commit that another process forestalled is merged
        with that one's and tried again.
        """
        listed = self._add_file(files.encode_listing(listing), ".items.h5", len(listing.labels)) if listing else None
        while True:
            base = self._newest()
            merged = replace(
                base,
                number=base.number + 1,
                previous=_hash(base),
                parts=_union(base.parts, parts),
                quarantined=_merge_quarantine(base.quarantined, quarantined, listing),
                listing=listed or base.listing,
                seconds=round(base.seconds + seconds, 3),
            )
            if replace(merged, number=0, previous="") == replace(base, number=0, previous="") and base.number:
                self._manifest = base
                return base
            made = create_file(self._manifest_path(merged.number), json.dumps(asdict(merged)).encode())
            if made and self._is_in_the_chain(merged):
                self._manifest = merged
                self._prune(merged.number)
                return merged

    def known_rows(self) -> dict[bytes, tuple[int, int]]:
        """Return where each image's row is, by the SHA-256 of its bytes: number of the part, row in it."""
        return {
            bytes(digest): (number, row)
            for number, record in enumerate(self.manifest.parts)
            for row, digest in enumerate(files.read_seen(self._part_path(record)).sha256)
        }

    def seen(self) -> Iterator[Seen]:
        """Yield what is remembered of files, oldest first."""
        for record in self.manifest.parts:
            yield files.read_seen(self._part_path(record))
        if self.manifest.listing is not None:
            yield self.listing().seen

    def listing(self) -> Listing:
        """Return the images as last seen.

        Raises:
            StorageError: no extraction has come to its end yet.
        """
        if self.manifest.listing is None:
            raise StorageError(f"{self.path}: not complete. Run the same `featcache extract` again to resume.")
        return files.read_listing(self._checked(self.manifest.listing))

    def reader(self) -> RowReader:
        """Return a reader of the listed images' rows, after checking every part's hash."""
        maps = tuple(files.map_features(self._checked(record)) for record in self.manifest.parts)
        listing, known = self.listing(), self.known_rows()
        where = np.array([known[bytes(digest)] for digest in listing.seen.sha256], dtype=np.int64).reshape(-1, 2)
        return RowReader(maps, where[:, 0], where[:, 1], maps[0].shape[1:] if maps else ())

    def features(self) -> Features:
        """Return the listed images' rows in memory.

        Raises:
            StorageError: the entry is not complete, or a file in it is damaged.
        """
        return self.labelled(self.reader())

    def labelled(self, reader: RowReader | None = None) -> Features:
        """Return labels, paths and splits, with the rows where a reader is given and an empty X where not."""
        listing = self.listing()
        rows = reader.take(np.arange(len(reader))) if reader is not None else np.empty((len(listing.labels), 0))
        return Features(
            X=rows,
            y=listing.labels,
            classes=listing.classes,
            paths=listing.seen.paths,
            splits=tuple(files.SPLITS[split] for split in listing.splits),
            sha256=tuple(bytes(digest).hex() for digest in listing.seen.sha256),
        )

    def write_table(self) -> Path | None:
        """Write ``features.h5`` where it is missing or out of date; ``None`` where the rows exceed 2 GB.

        Raises:
            StorageError: a file of that name is there which featcache did not write.
        """
        path, listing = self.path / TABLE, self.manifest.listing
        attributes = {
            "featcache_key": self.key,
            "featcache_listing": listing.sha256 if listing else "",
            "featcache_spec": canonical(self.spec),
        }
        if path.exists():
            found = files.table_attributes(path)
            if found is None:
                raise StorageError(f"{path}: was not written by featcache. Move it away and run again.")
            if found == attributes:
                return path
        if not listing or not self.manifest.parts or self._row_bytes() * listing.rows > TABLE_LIMIT:
            return None
        reader = self.reader()
        rows = reader.take(np.arange(len(reader)))
        replace_file(path, files.encode_table(rows, self.listing(), attributes))
        return path

    def verify(self) -> list[str]:
        """Return what is wrong with the entry's files, one line each; hashes every byte."""
        records = [*self.manifest.parts, *([self.manifest.listing] if self.manifest.listing else [])]
        problems = [problem for record in records if (problem := self._problem(record))]
        table = self.path / TABLE
        if table.exists() and files.table_attributes(table) is None:
            problems.append(f"{table}: was not written by featcache")
        return problems

    def remember_request(self, request: dict[str, Any]) -> None:
        """Keep the flags that led here, so that they are recognised without loading a backbone."""
        text = json.dumps(request, sort_keys=True, indent=1).encode()
        path = self.path / "requests" / f"{sha256_of_bytes(text)[:16]}.json"
        if not path.exists():
            make_folder(path.parent)
            create_file(path, text)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Yield the flags that led here."""
        for path in sorted((self.path / "requests").glob("*.json")):
            try:
                yield json.loads(path.read_text())
            except (OSError, ValueError):
                continue

    def _add_file(self, content: bytes, suffix: str, rows: int) -> FileRecord:
        digest = sha256_of_bytes(content)
        record = FileRecord(f"{digest[:16]}{suffix}", digest, len(content), rows)
        replace_file(self._part_path(record), content)
        return record

    def _row_bytes(self) -> int:
        return int(files.map_features(self._part_path(self.manifest.parts[0]))[:1].nbytes)

    def _part_path(self, record: FileRecord) -> Path:
        return self.path / "parts" / record.name

    def _manifest_path(self, number: int) -> Path:
        return self.path / f"manifest-{number}.json"

    def _numbers(self) -> list[int]:
        found = (path.stem.removeprefix("manifest-") for path in self.path.glob("manifest-*.json"))
        return sorted((int(number) for number in found if number.isdigit()), reverse=True)

    def _newest(self) -> Manifest:
        while numbers := self._numbers():
            try:
                return self._read_manifest(numbers[0])
            except FileNotFoundError:
                continue  # overtaken and pruned since it was listed: look again
        return Manifest()

    def _read_manifest(self, number: int) -> Manifest:
        path = self._manifest_path(number)
        try:
            return _parse_manifest(json.loads(path.read_text()))
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{path}: damaged ({error}). Delete it to fall back to the version before.") from error

    def _is_in_the_chain(self, manifest: Manifest) -> bool:
        """Tell whether a manifest just made counts: a number that was pruned can be taken again, by one who slept."""
        if self._numbers()[0] == manifest.number:
            return True
        try:
            return self._read_manifest(manifest.number + 1).previous == _hash(manifest)
        except FileNotFoundError:
            return False

    def _prune(self, newest: int) -> None:
        for number in self._numbers():
            if number <= newest - _KEPT_MANIFESTS:
                self._manifest_path(number).unlink(missing_ok=True)

    def _problem(self, record: FileRecord) -> str:
        path = self._part_path(record)
        if not path.exists():
            return f"{path}: missing"
        if path.stat().st_size != record.bytes or sha256_of_file(path) != record.sha256:
            return f"{path}: its bytes are not what featcache wrote"
        return ""

    def _checked(self, record: FileRecord) -> Path:
        problem = self._problem(record)
        if problem:
            raise StorageError(f"{problem}. Delete the entry {self.path} and extract again.")
        return self._part_path(record)


def _foreign(path: Path) -> bool:
    """Tell whether a path in an entry without spec.json is nothing that a killed start would leave."""
    return path.name not in {"parts", "requests", "spec.json"} and not path.name.startswith(".tmp-")


def now_ns() -> int:
    """Return the time that hashes are dated with, in nanoseconds."""
    return time.time_ns()


def _hash(manifest: Manifest) -> str:
    return sha256_of_bytes(canonical(manifest).encode())


def _union(old: tuple[FileRecord, ...], new: Sequence[FileRecord]) -> tuple[FileRecord, ...]:
    names = {record.name for record in old}
    return (*old, *(record for record in new if record.name not in names))


def _merge_quarantine(
    old: tuple[Quarantined, ...], new: Sequence[Quarantined], listing: Listing | None
) -> tuple[Quarantined, ...]:
    """Return the quarantine list, newest word on each path; a listing settles it: what it does not name is stale."""
    if listing is not None:
        return tuple(sorted(new, key=lambda item: item.path))
    by_path = {item.path: item for item in (*old, *new)}
    return tuple(by_path[path] for path in sorted(by_path))


def _parse_manifest(data: dict[str, Any]) -> Manifest:
    return Manifest(
        number=int(data["number"]),
        previous=str(data["previous"]),
        parts=tuple(FileRecord(**part) for part in data["parts"]),
        quarantined=tuple(Quarantined(**item) for item in data["quarantined"]),
        listing=FileRecord(**data["listing"]) if data["listing"] else None,
        seconds=float(data["seconds"]),
    )
