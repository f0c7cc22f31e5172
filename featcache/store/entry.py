"""One entry of the cache: immutable content-named parts and the manifests that list them."""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from featcache.display import logger, seconds_text
from featcache.errors import StorageError, UsageError
from featcache.fingerprint import canonical, fingerprint, sha256_of_chunks, sha256_of_file
from featcache.specs import INPUT, FeatureSpec, Tokenisation, Transform
from featcache.store import Features, LazyRows, RowReader, hdf5, manifests
from featcache.store.disk import (
    Signs,
    Stamps,
    create_file,
    is_temporary,
    make_folder,
    parse,
    read_plain,
    remove_abandoned,
    remove_file,
    replace_file,
    replace_file_by,
    signs,
    time_of,
)
from featcache.store.hdf5 import Array, FileIndex, Listing, Part
from featcache.store.manifests import LISTING_SUFFIX, OTHER_BYTES, PART_SUFFIX, FileRecord, Inspection, Manifest, Quarantined

TABLE = "features.h5"
TABLE_LIMIT = 2 << 30  # the table is a copy for people: above this the disk is worth more than rows kept twice
# A folder that was copied under another entry's name would otherwise answer for that entry's key.
_NAMED_BY_KEY = re.compile(r".*-([0-9a-f]{8})")
_BLOCK_BYTES = 2 << 20  # hashed by one thread while another writes it: small enough for a core's cache
_KEPT_MANIFESTS = 20  # a reader that listed the folder just before a commit still finds the version that it chose


@dataclass(frozen=True)
class Remembered:
    """What one version of an entry says of files.

    Attributes:
        files: what was seen of them, oldest first.
        with_row: the SHA-256 of those whose rows are there; a copy's or a listing's word is none: the row may have been
            lost before it was written.
        quarantined: those that cannot be used.
        listing: the samples as last seen, ``None`` before the first extraction has come to its end.
        has_parts: whether anything was ever computed.
    """

    files: tuple[FileIndex, ...]
    with_row: frozenset[bytes]
    quarantined: tuple[Quarantined, ...]
    listing: Listing | None
    has_parts: bool


class FeatureStore:
    """One entry of the cache: the rows of one data set under one FeatureSpec.

    Many processes may read and commit at once: a reader sees the highest manifest, which lists only whole files.

    Attributes:
        path: its folder.
        spec: the FeatureSpec as plain data, with its key.
        key: the cache key, 64 hexadecimal digits.
    """

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self.path, self.spec, self.key = path, spec, str(spec["key"])
        self._manifest: Manifest | None = None
        self._just_written: set[FileRecord] = set()
        self._listing: tuple[FileRecord, Listing] | None = None

    def __repr__(self) -> str:
        return f"FeatureStore({str(self.path)!r})"

    @classmethod
    def create(cls, path: Path, spec: FeatureSpec) -> "FeatureStore":
        """Open an entry, made first where it is not there yet.

        Raises:
            StorageError: the folder cannot be written, or holds another entry or foreign files.
        """
        note, content = path / "spec.json", json.dumps(asdict(spec) | {"key": spec.key}, indent=1).encode()
        if not note.exists():
            if path.exists() and any(_foreign(inside) for inside in path.iterdir()):
                raise StorageError(f"{path}: not an entry of featcache and not empty. Move it away, or use another `cache`.")
            # Folders before the note: as soon as spec.json is there, this is an entry that others write into.
            make_folder(path / "parts")
            make_folder(path / "requests")
            create_file(note, content)
        try:
            store = cls.open(path)
        except StorageError as error:
            if manifests.numbers_in(path):
                if spec.cut != INPUT:
                    raise
                drop_rows(path, error)
            replace_file(note, content)  # torn when the entry was begun, or emptied now: nothing of it counts yet
            store = cls.open(path)
        if store.key != spec.key:
            raise StorageError(f"{path}: holds features under another key. Move it away, or use another `cache`.")
        store.tidy()
        return store

    @classmethod
    def open(cls, path: Path | str) -> "FeatureStore":
        """Open an entry that is there.

        Raises:
            StorageError: there is none, or what it says of itself is not what featcache wrote there.
        """
        path = Path(path)
        try:
            # A plain file of sane size only: a pipe in its place would be waited for, a device would never end.
            spec = parse(read_plain(path / "spec.json"))
            key = spec.pop("key")
        except OSError as error:
            raise StorageError(f"{path}: not an entry of featcache ({error}).") from error
        except (ValueError, KeyError) as error:
            where = path / "spec.json"
            raise StorageError(f"{where}: damaged ({error}). Delete the entry {path} and extract again.") from error
        named = _NAMED_BY_KEY.fullmatch(path.resolve().name)
        if fingerprint(spec) != key or (named and named[1] != key[: len(named[1])]):
            raise StorageError(
                f"{path / 'spec.json'}: damaged, it is not what the entry's key was made of. Delete the entry {path} and "
                "extract again."
            )
        if not _is_spec(spec):
            raise StorageError(f"{path / 'spec.json'}: not of this version of featcache. Move {path} away.")
        return cls(path, spec | {"key": key})

    def tidy(self) -> None:
        """Remove what killed writers left; a cache that cannot be written stays as it is."""
        for folder in manifests.FOLDERS:
            remove_abandoned(self.path / folder)

    @property
    def manifest(self) -> Manifest:
        """The newest version as of the first use or the last commit."""
        if self._manifest is None:
            self._manifest = self._newest()
        return self._manifest

    @property
    def about(self) -> str:
        """What a hit has come upon, in words."""
        manifest = self.manifest
        runtimes = " and ".join(dict.fromkeys(part.runtime for part in manifest.parts if part.runtime))
        made, changed = time_of(self.path / "spec.json"), time_of(self._manifest_path(manifest.number))
        when = f"made {made}" if changed == made else f"made {made}, last changed {changed}"
        how = f"computed in {seconds_text(manifest.seconds)}{f' with {runtimes}' if runtimes else ''}"
        return f"{manifest.rows} rows in {self.path}, key {self.key[:16]}, {when}, {how}"

    def refresh(self) -> None:
        """Look at the newest version from now on."""
        self._manifest = None

    def add_part(self, part: Part, runtime: str = "") -> FileRecord:
        """Write a part to disk; it counts once a commit lists it."""
        return replace(self._add_file(hdf5.part_chunks(part), PART_SUFFIX, len(part.files)), runtime=runtime)

    def commit(
        self,
        *,
        parts: Sequence[FileRecord] = (),
        quarantined: Sequence[Quarantined] = (),
        listing: Listing | None = None,
        seconds: float = 0.0,
        instead_of: Sequence[FileRecord] = (),
    ) -> Manifest:
        """Make parts, quarantined samples and a listing count: all of them, or none when killed.

        Parts come beside those that are there, but for those they are ``instead_of``; ``seconds`` are added to the entry's.
        """
        # Parts of a moment ago are old enough by now for their times to be believed instead of hashing them again.
        self._stamps.settle()
        content = [hdf5.encode_listing(listing)] if listing else []
        # On disk before the manifest that names it: a killed commit leaves a file too many, never a name too many.
        listed = self._add_file(content, LISTING_SUFFIX, len(listing.labels)) if listing else None
        gone = {record.name for record in instead_of}
        while True:
            base = self._newest()
            merged = replace(
                base,
                number=base.number + 1,
                previous=manifests.hash_of(base),
                parts=manifests.union(tuple(part for part in base.parts if part.name not in gone), parts),
                quarantined=manifests.merge_quarantine(base.quarantined, quarantined, listing),
                listing=listed or base.listing,
                seconds=round(base.seconds + seconds, 3),
            )
            # A version that says nothing new would only push older ones, and their readers, towards the end.
            if replace(merged, number=0, previous="") == replace(base, number=0, previous="") and base.number:
                self._manifest = base
                return base
            # By a link to the next free number: one process wins it, the others merge with its version and try again.
            made = create_file(self._manifest_path(merged.number), manifests.encode_manifest(merged, self.key))
            if made and self._is_in_the_chain(merged):
                self._manifest = merged
                self._prune(merged.number)
                return merged

    def locate(self, sha256: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return where samples' rows are, by the SHA-256 of their bytes (n, 32): number of the part, row in it (n, 2).

        Raises:
            StorageError: a sample has no row.
        """
        digests = [files.sha256 for files in self.row_files()]
        sizes = np.array([len(column) for column in digests], dtype=np.int64)
        stored = _as_keys(np.concatenate([np.empty((0, 32), np.uint8), *digests]))
        order = np.argsort(stored, kind="stable")
        asked, stored = _as_keys(sha256), stored[order]
        ascending = np.argsort(asked, kind="stable")  # a search goes faster where the one before it ended
        places = np.empty(len(asked), np.int64)
        places[ascending] = np.searchsorted(stored, asked[ascending])
        if len(asked) and (not len(stored) or (stored[np.minimum(places, len(stored) - 1)] != asked).any()):
            raise StorageError(f"{self.path}: a sample of its listing has no row. Run the same `featcache extract` again.")
        rows = order[places] if len(asked) else np.empty(0, np.int64)
        ends = np.cumsum(sizes)
        parts = np.searchsorted(ends, rows, side="right")
        return np.stack([parts, rows - (ends - sizes)[parts] if len(rows) else rows], axis=1)

    def rows_of(self, sha256: NDArray[np.uint8]) -> Array:
        """Return the rows of samples by the SHA-256 of their bytes (n, 32), listed or not."""
        reader = self._reader_of(sha256)
        return reader.take(np.arange(len(reader)))

    def remembered(self) -> Remembered:
        """Return what the entry says of files, all of it read once.

        Raises:
            StorageError: a file in it is missing or damaged.
        """
        manifest, rows, files = self.manifest, self.row_files(), list[FileIndex]()
        for record, index in zip(manifest.parts, rows, strict=True):
            copies = hdf5.read_copies(self._part_path(record))
            files += [index] if copies is None else [index, copies]
        listing = None if manifest.listing is None else self.listing()
        files += [] if listing is None else [listing.files]
        with_row = frozenset(digest.tobytes() for index in rows for digest in index.sha256)
        return Remembered(tuple(files), with_row, manifest.quarantined, listing, bool(manifest.parts))

    def listing(self) -> Listing:
        """Return the samples as last seen.

        Raises:
            StorageError: no extraction has come to its end yet.
        """
        record = self.manifest.listing
        if record is None:
            raise StorageError(f"{self.path}: not complete. Run the same `featcache extract` again to resume.")
        if self._listing is None or self._listing[0] != record:  # of a version: what is listed since is in another file
            listing = hdf5.read_listing(self._checked(record))
            if len(listing.labels) != record.rows:
                raise StorageError(f"{self._part_path(record)}: not what its manifest says. {self._remedy}")
            self._listing = record, listing
        return self._listing[1]

    def reader(self) -> RowReader:
        """Return a reader of the listed samples' rows, from files whose hashes are right."""
        listing, path = self.listing(), self.path / TABLE
        # The table holds the rows in the listing's order: one map and no search. It may be replaced at any moment.
        if current := self._current_table():
            mapped, rows = self._map(path, len(listing.labels)), np.arange(len(listing.labels))
            if self._still(path, current):
                return RowReader((mapped,), np.zeros_like(rows), rows, mapped.shape[1:])
        return self._reader_of(listing.files.sha256)

    def _reader_of(self, sha256: NDArray[np.uint8]) -> RowReader:
        parts = self.manifest.parts
        maps = tuple(self._map(path, record.rows) for path, record in zip(self._paths(parts), parts, strict=True))
        if len({mapped.shape[1:] for mapped in maps}) > 1:
            raise StorageError(f"{self.path}: rows of several shapes. {self._remedy}")
        where = self.locate(sha256)
        return RowReader(maps, where[:, 0], where[:, 1], maps[0].shape[1:] if maps else ())

    def _map(self, path: Path, rows: int) -> Array:
        mapped = hdf5.map_features(path)
        if len(mapped) != rows or mapped.dtype != np.dtype(self.spec["dtype"]):
            raise StorageError(f"{path}: {len(mapped)} rows of {mapped.dtype} are not what was asked for. {self._remedy}")
        return mapped

    def part_of(self, record: FileRecord) -> tuple[FileIndex, FileIndex | None, Array]:
        """Return which samples a part has rows of, which copies of them it knows, and the rows, not in memory."""
        path = self._checked(record)
        return hdf5.read_file_index(path), hdf5.read_copies(path), self._map(path, record.rows)

    @property
    def _remedy(self) -> str:
        return f"Delete the entry {self.path} and extract again."

    def features(self) -> Features:
        """Return the listed samples' rows in memory.

        Raises:
            StorageError: the entry is not complete, or a file in it is damaged.
        """
        path = self.path / TABLE
        if current := self._current_table():
            with ThreadPoolExecutor(1) as beside:
                rows = beside.submit(hdf5.read_features, path)
                # Decoding labels costs the interpreter, copying rows the memory bus: side by side neither is waited for.
                labelled = self.labelled()
            if self._still(path, current):
                self._map(path, len(labelled.y))
                return replace(labelled, X=rows.result())
        labelled = self.labelled()
        reader = self.reader()
        return replace(labelled, X=reader.take(np.arange(len(reader))))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (n, ...) that the listed samples' rows have together."""
        return self.manifest.listing.rows if self.manifest.listing else 0, *self._row_shape()

    def streamed(self) -> Features:
        """Return the listed samples' embeddings (n, d) as rows that are read when they are asked for."""
        reader = self.reader()
        return replace(self.labelled(), X=LazyRows(reader.take, reader.shape[0], np.arange(len(reader))))

    def labelled(self) -> Features:
        """Return labels, paths and splits, with an empty X."""
        listing = self.listing()
        return Features(
            X=np.empty((len(listing.labels), 0)),
            y=listing.labels,
            classes=listing.classes,
            paths=listing.files.paths,
            splits=hdf5.Column(listing.splits, hdf5.split_name),
            sha256=hdf5.Column(listing.files.sha256, hdf5.hex_of),
        )

    def write_table(self, limit: int = TABLE_LIMIT) -> Path | None:
        """Write ``features.h5`` where it is missing or out of date; ``None`` where the rows exceed ``limit`` bytes.

        Raises:
            StorageError: a file of that name is there which featcache did not write.
        """
        path, listing = self.path / TABLE, self.manifest.listing
        if self._current_table():
            return path
        self._make_way(path)
        if not listing or not self.manifest.parts or self._row_bytes() * listing.rows > limit:
            return None
        digests: list[str] = []
        replace_file_by(path, lambda file: digests.append(sha256_of_chunks(_written(file, self._table_pieces()))))
        self._stamps.note(path, digests[0])
        return path

    def _table_pieces(self) -> Iterator[memoryview]:
        """Yield the bytes of ``features.h5`` as the parts and the listing have them, rows block by block."""
        full = self.listing()
        reader = self._reader_of(full.files.sha256)
        shape, dtype = (len(reader), *reader.shape), reader.maps[0].dtype
        before, after = hdf5.frame_table(shape, dtype, full, self._table_attributes())
        step = max(1, _BLOCK_BYTES // max(1, self._row_bytes()))
        yield from before
        for start in range(0, len(reader), step):
            yield hdf5.bytes_of(reader.take(np.arange(start, min(start + step, len(reader)))))
            # Pages that were read count as this process's memory until their map is closed.
            reader.forget()
        yield from after

    def _make_way(self, path: Path) -> None:
        """Look at what stands where ``features.h5`` goes: ours is written over, another's is not."""
        if not path.exists():
            return
        attributes, noted = hdf5.table_attributes(path), self._stamps.sha256(TABLE)
        if attributes is None and (not noted or hdf5.is_foreign(path)):
            raise StorageError(f"{path}: was not written by featcache. Move it away and run again.")
        if attributes is None or (noted and attributes == self._table_attributes()):
            logger.warning("%s: was changed or damaged, it is written again", path)

    @cached_property
    def _stamps(self) -> Stamps:
        return Stamps(self.path / "checked.json", self.key)

    def _table_attributes(self) -> dict[str, str]:
        """Return what a table of the newest listing says of itself: the same wherever and whenever it is made."""
        listing = self.manifest.listing
        return {
            "featcache_key": self.key,
            "featcache_listing": (hdf5.listing_content(self._checked(listing)) or listing.sha256) if listing else "",
            "featcache_spec": canonical(self.spec),
        }

    def _current_table(self) -> Signs | None:
        """Return the signs of ``features.h5`` where it is there, whole, and of the newest listing."""
        path, noted = self.path / TABLE, self._stamps.sha256(TABLE)
        try:
            before = signs(path)
        except OSError:
            return None
        if not noted or hdf5.table_attributes(path) != self._table_attributes():
            return None
        return before if self._stamps.is_whole(path, noted) and self._still(path, before) else None

    def _still(self, path: Path, before: Signs) -> bool:
        """Tell whether a path leads to the file that it led to before: another process may have put a newer one there."""
        try:
            return signs(path) == before
        except OSError:
            return False

    def verify(self) -> list[str]:
        """Return what is wrong with the entry's files, one line each; reads every byte of them."""
        inspection = Inspection(self.path, self.key)
        inspection.notes()
        self._manifest = inspection.manifests() or Manifest()
        inspection.parts(self._manifest)
        if (self.path / TABLE).exists() and (problem := self._table_problem()):
            inspection.problems.append(f"{self.path / TABLE}: {problem}")
        return inspection.problems

    def _table_problem(self) -> str:
        """Return what is wrong with ``features.h5``; one of which nothing was noted must say what the parts say."""
        path, noted = self.path / TABLE, Stamps(self.path / "checked.json", self.key).sha256(TABLE)
        attributes = hdf5.table_attributes(path)
        if attributes is None and not noted:
            return "was not written by featcache"
        sha256 = sha256_of_file(path) if path.is_file() else ""
        if noted and sha256 == noted:
            return ""
        try:
            # its writer may have been killed before it noted the hash, and HDF5 of another version spells the same otherwise
            if attributes == self._table_attributes() and (
                sha256_of_chunks(self._table_pieces()) == sha256 or (not noted and self._says_the_same(path))
            ):
                return ""
        except StorageError as error:
            return f"cannot be compared with the parts: {error}"
        return f"{OTHER_BYTES}; the next `featcache extract` writes it again"

    def _says_the_same(self, path: Path) -> bool:
        listing = self.listing()
        reader = self._reader_of(listing.files.sha256)
        return hdf5.same_table(path, listing, lambda start, end: reader.take(np.arange(start, end)))

    def remember_request(self, request: dict[str, Any]) -> None:
        """Keep the flags that led here, so that they are recognised without loading a backbone."""
        name, content = manifests.encode_request(request, self.key)
        path = self.path / "requests" / name
        for broken in self.broken_requests():
            remove_file(broken)
        if not path.exists():
            make_folder(path.parent)
            create_file(path, content)

    def requests(self) -> Iterator[dict[str, Any]]:
        """Yield the flags that led here; a file whose name is not its content's hash says nothing."""
        for path in sorted((self.path / "requests").glob("*.json")):
            if (request := self._request_in(path)) is not None:
                yield request

    def broken_requests(self) -> list[Path]:
        """Return the files of flags that say nothing any more."""
        return [path for path in sorted((self.path / "requests").glob("*.json")) if self._request_in(path) is None]

    def _request_in(self, path: Path) -> dict[str, Any] | None:
        try:
            return manifests.read_request(path, self.key)
        except (OSError, ValueError):
            return None

    def _add_file(self, chunks: Sequence[memoryview], suffix: str, rows: int) -> FileRecord:
        digest = sha256_of_chunks(chunks)
        record = FileRecord(manifests.name_of(digest, suffix), digest, sum(map(len, chunks)), rows)
        path = self._part_path(record)
        replace_file_by(path, lambda file: file.writelines(chunks))
        self._just_written.add(record)
        with contextlib.suppress(OSError):
            self._stamps.wrote(path, digest)
        return record

    def _row_shape(self) -> tuple[int, ...]:
        return hdf5.map_features(self._checked(self.manifest.parts[0])).shape[1:] if self.manifest.parts else ()

    def _row_bytes(self) -> int:
        return int(math.prod(self._row_shape()) * np.dtype(self.spec["dtype"]).itemsize)

    def _part_path(self, record: FileRecord) -> Path:
        return self.path / "parts" / record.name

    def _manifest_path(self, number: int) -> Path:
        return self.path / f"manifest-{number}.json"

    def _newest(self) -> Manifest:
        missing = 0
        # No lock: between the listing of the folder and the reading others commit and prune.
        while numbers := manifests.numbers_in(self.path):
            try:
                return self._read_manifest(numbers[0])
            except FileNotFoundError as error:
                if missing == numbers[0]:
                    raise StorageError(f"{self._manifest_path(missing)}: leads nowhere. Delete it.") from error
                missing = numbers[0]  # overtaken and pruned since it was listed: look again
        return Manifest()

    def _read_manifest(self, number: int) -> Manifest:
        path = self._manifest_path(number)
        try:
            return manifests.read_manifest(path, self.key)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise StorageError(f"{path}: damaged ({error}). Delete it to fall back to the version before.") from error

    def _is_in_the_chain(self, manifest: Manifest) -> bool:
        """Tell whether a manifest just made counts: a number that was pruned can be taken again, by one who slept."""
        if manifests.numbers_in(self.path)[0] == manifest.number:
            return True
        try:
            return self._read_manifest(manifest.number + 1).previous == manifests.hash_of(manifest)
        except FileNotFoundError:
            return False

    def _prune(self, newest: int) -> None:
        for number in manifests.numbers_in(self.path):
            if number <= newest - _KEPT_MANIFESTS:
                remove_file(self._manifest_path(number))

    def _checked(self, record: FileRecord) -> Path:
        return self._paths([record])[0]

    def _paths(self, records: Sequence[FileRecord]) -> list[Path]:
        """Return where listed files lie, each of them whole.

        Raises:
            StorageError: one is missing, or its bytes are not what was written.
        """
        paths = [self._part_path(record) for record in records]
        fresh = [record in self._just_written and path.is_file() for record, path in zip(records, paths, strict=True)]
        # A size is looked at first: a file of another length, planted or torn, is not worth hashing.
        for path, record in zip(paths, records, strict=True):
            if path.is_file() and path.stat().st_size != record.bytes:
                raise StorageError(f"{path}: {OTHER_BYTES}. {self._remedy}")
        doubtful = [
            (path, record.sha256) for path, record, is_fresh in zip(paths, records, fresh, strict=True) if not is_fresh
        ]
        for (path, _), is_whole in zip(doubtful, self._stamps.are_whole(doubtful), strict=True):
            if not is_whole:
                why = OTHER_BYTES if path.exists() else "missing"
                raise StorageError(f"{path}: {why}. {self._remedy}")
        return paths

    def row_files(self) -> list[FileIndex]:
        """Return which samples' rows each part holds, in order."""
        parts = self.manifest.parts
        seen = [hdf5.read_file_index(path) for path in self._paths(parts)]
        for record, rows in zip(parts, seen, strict=True):
            if len(rows.paths) != record.rows:
                raise StorageError(f"{self._part_path(record)}: not what its manifest says. {self._remedy}")
        return seen


def drop_rows(path: Path, damage: StorageError) -> None:
    """Let an entry of decoded samples begin anew, of which a file is damaged; what was trained from it stays.

    Raises:
        StorageError: a file cannot be removed.
    """
    where = str(damage).partition(": ")[0]
    logger.warning("%s: damaged; decoded samples are made anew from their files, nothing else is lost", where)
    # versions first: killed on the way there are rows that nothing lists, never a list without rows
    for file in (*path.glob("manifest-*.json"), *path.glob(f"parts/*{PART_SUFFIX}")):
        remove_file(file)
    make_folder(path / "parts")


def _foreign(path: Path) -> bool:
    """Tell whether a path in an entry without spec.json is nothing that a killed start would leave."""
    return path.name not in {"parts", "requests", "spec.json"} and not is_temporary(path)


def _is_spec(spec: dict[str, Any]) -> bool:
    """Tell whether a spec that fits its key has the kinds of values that are relied upon."""
    transform, backbone = spec.get("transform"), spec.get("backbone")
    try:
        kind = Transform if {"mean", "std"} <= set(transform or ()) else Tokenisation
        kind(**transform)  # type: ignore[arg-type]  # refuses what is none
    except (TypeError, UsageError):
        return False
    return (
        (backbone is None or (isinstance(backbone, dict) and isinstance(backbone.get("weights_sha256"), str)))
        and isinstance(spec.get("cut"), str)
        and spec.get("dtype") in {"float32", "float16", "uint8", "int32"}
    )


def _as_keys(sha256: NDArray[np.uint8]) -> NDArray[Any]:
    """Return hashes (n, 32) as n comparable values."""
    # As bytes of one length each comparison is one call; zeros at the end are left out on both sides alike.
    return np.ascontiguousarray(sha256).view("S32").reshape(-1)


def _written(file: BinaryIO, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """Write pieces while the one who takes them looks at them."""
    with ThreadPoolExecutor(1) as beside:
        for piece in pieces:
            writing = beside.submit(file.write, piece)
            yield piece
            writing.result()
