"""One entry of the cache: immutable content-named parts and the manifests that list them."""

import json
import math
import mmap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featcache.errors import StorageError
from featcache.fingerprint import canonical, sha256_of_bytes, sha256_of_chunks, sha256_of_file
from featcache.solvers.scaled import Streamed
from featcache.specs import FeatureSpec
from featcache.store import files
from featcache.store.atomic import create_file, make_folder, replace_file_by, sweep
from featcache.store.files import Array, Listing, Part, Seen
from featcache.store.stamps import Stamps

TABLE = "features.h5"
TABLE_LIMIT = 2 << 30
_BLOCK_BYTES = 2 << 20
_KEPT_MANIFESTS = 20


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


@dataclass(frozen=True)
class Features:
    """The rows of a source's images, in its order: X (n, ...), y (n,) int64 indexing ``classes``.

    X is an array, but for ``Streamed`` where ``streamed`` gave them.
    """

    X: Any
    y: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: Sequence[str]
    splits: Sequence[str]
    sha256: Sequence[str]


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

    def forget(self) -> None:
        """Let go of the pages that were read: they stay with the system, and no longer count as this process's memory."""
        for array in self.maps:
            held = getattr(array, "_mmap", None)
            if held is not None and hasattr(held, "madvise"):
                held.madvise(mmap.MADV_DONTNEED)

    def take(self, index: NDArray[np.int64]) -> Array:
        """Return rows (k, ...) by their positions (k,)."""
        if len(self.maps) == 1:
            return np.asarray(self.maps[0][self.row[index]])
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
        self._just_written: set[FileRecord] = set()

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

    def refresh(self) -> None:
        """Look at the newest version from now on."""
        self._manifest = None

    def add_part(self, part: Part, runtime: str = "") -> FileRecord:
        """Write a part to disk; it counts once a commit lists it."""
        return replace(self._add_file(files.part_chunks(part), ".h5", len(part.seen.paths)), runtime=runtime)

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
        listed = self._add_file([files.encode_listing(listing)], ".items.h5", len(listing.labels)) if listing else None
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

    def digests(self) -> set[bytes]:
        """Return the SHA-256 of every image that has a row."""
        return {row.tobytes() for record in self.manifest.parts for row in self._seen(record).sha256}

    def locate(self, sha256: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return where images' rows are, by the SHA-256 of their bytes (n, 32): number of the part, row in it (n, 2).

        Raises:
            StorageError: an image has no row.
        """
        seen = [self._seen(record).sha256 for record in self.manifest.parts]
        sizes = np.array([len(one) for one in seen], dtype=np.int64)
        have = _as_keys(np.concatenate([np.empty((0, 32), np.uint8), *seen]))
        order = np.argsort(have, kind="stable")
        wanted, have = _as_keys(sha256), have[order]
        ascending = np.argsort(wanted, kind="stable")  # a search goes faster where the one before it ended
        found = np.empty(len(wanted), np.int64)
        found[ascending] = np.searchsorted(have, wanted[ascending])
        if len(wanted) and (not len(have) or (have[np.minimum(found, len(have) - 1)] != wanted).any()):
            raise StorageError(f"{self.path}: an image of its listing has no row. Delete the entry and extract again.")
        rows = order[found] if len(wanted) else np.empty(0, np.int64)
        ends = np.cumsum(sizes)
        parts = np.searchsorted(ends, rows, side="right")
        return np.stack([parts, rows - (ends - sizes)[parts] if len(rows) else rows], axis=1)

    def rows_of(self, sha256: NDArray[np.uint8]) -> Array:
        """Return the rows of images by the SHA-256 of their bytes (n, 32), listed or not."""
        reader = self._reader_of(sha256)
        return reader.take(np.arange(len(reader)))

    def seen(self) -> Iterator[Seen]:
        """Yield what is remembered of files, oldest first."""
        for record in self.manifest.parts:
            yield self._seen(record)
            if (copies := files.read_copies(self._part_path(record))) is not None:
                yield copies
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
        """Return a reader of the listed images' rows, from files whose hashes are right."""
        listing = self.listing()
        if self._table_is_current():
            mapped, rows = files.map_features(self.path / TABLE), np.arange(len(listing.labels))
            return RowReader((mapped,), np.zeros_like(rows), rows, mapped.shape[1:])
        return self._reader_of(listing.seen.sha256)

    def _reader_of(self, sha256: NDArray[np.uint8]) -> RowReader:
        maps = tuple(files.map_features(self._checked(record)) for record in self.manifest.parts)
        where = self.locate(sha256)
        return RowReader(maps, where[:, 0], where[:, 1], maps[0].shape[1:] if maps else ())

    def features(self) -> Features:
        """Return the listed images' rows in memory.

        Raises:
            StorageError: the entry is not complete, or a file in it is damaged.
        """
        if self._table_is_current():
            with ThreadPoolExecutor(1) as beside:
                rows = beside.submit(files.read_features, self.path / TABLE)
                return replace(self.labelled(), X=rows.result())
        labelled, reader = self.labelled(), self.reader()
        return replace(labelled, X=reader.take(np.arange(len(reader))))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (n, ...) that the listed images' rows have together."""
        rows = files.map_features(self._part_path(self.manifest.parts[0])).shape[1:] if self.manifest.parts else ()
        return self.manifest.listing.rows if self.manifest.listing else 0, *rows

    def streamed(self) -> Features:
        """Return the listed images' embeddings (n, d) as rows that are read when they are asked for."""
        reader = self.reader()
        return replace(self.labelled(), X=Streamed(reader.take, reader.shape[0], np.arange(len(reader))))

    def labelled(self) -> Features:
        """Return labels, paths and splits, with an empty X."""
        listing = self.listing()
        return Features(
            X=np.empty((len(listing.labels), 0)),
            y=listing.labels,
            classes=listing.classes,
            paths=listing.seen.paths,
            splits=files.Column(listing.splits, files.split_name),
            sha256=files.Column(listing.seen.sha256, files.hex_of),
        )

    def write_table(self, limit: int = TABLE_LIMIT) -> Path | None:
        """Write ``features.h5`` where it is missing or out of date; ``None`` where the rows exceed ``limit`` bytes.

        Raises:
            StorageError: a file of that name is there which featcache did not write.
        """
        path, listing = self.path / TABLE, self.manifest.listing
        if path.exists() and files.table_attributes(path) is None:
            raise StorageError(f"{path}: was not written by featcache. Move it away and run again.")
        if self._table_is_current():
            return path
        if not listing or not self.manifest.parts or self._row_bytes() * listing.rows > limit:
            return None
        full = self.listing()
        reader = self._reader_of(full.seen.sha256)
        shape, dtype = (len(reader), *reader.shape), reader.maps[0].dtype
        before, after = files.frame_table(shape, dtype, full, self._table_attributes())
        step = max(1, _BLOCK_BYTES // max(1, self._row_bytes()))

        def pieces() -> Iterator[memoryview]:
            yield from before
            for start in range(0, len(reader), step):
                yield files.bytes_of(reader.take(np.arange(start, min(start + step, len(reader)))))
                reader.forget()
            yield from after

        digests: list[str] = []
        replace_file_by(path, lambda file: digests.append(sha256_of_chunks(_written(file, pieces()))))
        self._stamps.note(path, digests[0])
        return path

    @cached_property
    def _stamps(self) -> Stamps:
        return Stamps(self.path / "checked.json")

    def _table_attributes(self) -> dict[str, str]:
        """Return what a table of the newest listing says of itself: the same wherever and whenever it is made."""
        listing = self.manifest.listing
        return {
            "featcache_key": self.key,
            "featcache_listing": (files.listing_content(self._checked(listing)) or listing.sha256) if listing else "",
            "featcache_spec": canonical(self.spec),
        }

    def _table_is_current(self) -> bool:
        """Tell whether ``features.h5`` is there, whole, and of the newest listing."""
        path = self.path / TABLE
        noted = self._stamps.sha256(TABLE)
        if not noted or not path.exists() or files.table_attributes(path) != self._table_attributes():
            return False
        return self._stamps.is_whole(path, noted)

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

    def _add_file(self, chunks: Sequence[memoryview], suffix: str, rows: int) -> FileRecord:
        digest = sha256_of_chunks(chunks)
        record = FileRecord(f"{digest[:16]}{suffix}", digest, sum(map(len, chunks)), rows)
        replace_file_by(self._part_path(record), lambda file: file.writelines(chunks))
        self._just_written.add(record)
        return record

    def _row_bytes(self) -> int:
        rows = files.map_features(self._part_path(self.manifest.parts[0]))
        return math.prod(rows.shape[1:]) * rows.dtype.itemsize

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
        path = self._part_path(record)
        if record in self._just_written and path.exists():
            return path
        if not path.exists() or not self._stamps.is_whole(path, record.sha256):
            raise StorageError(f"{self._problem(record)}. Delete the entry {self.path} and extract again.")
        return path

    def _seen(self, record: FileRecord) -> Seen:
        return files.read_seen(self._part_path(record))


def _foreign(path: Path) -> bool:
    """Tell whether a path in an entry without spec.json is nothing that a killed start would leave."""
    return path.name not in {"parts", "requests", "spec.json"} and not path.name.startswith(".tmp-")


def now_ns() -> int:
    """Return the time that hashes are dated with, in nanoseconds."""
    return time.time_ns()


def _as_keys(sha256: NDArray[np.uint8]) -> NDArray[Any]:
    """Return hashes (n, 32) as n comparable values."""
    return np.ascontiguousarray(sha256).view("S32").reshape(-1)


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


def _written(file: BinaryIO, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """Write pieces while the one who takes them looks at them."""
    with ThreadPoolExecutor(1) as beside:
        for piece in pieces:
            done = beside.submit(file.write, piece)
            yield piece
            done.result()
