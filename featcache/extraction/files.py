"""What a command knows of a data set's files and an entry lacks of them, and batches of those, read and decoded."""

import hashlib
import struct
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache import datasets
from featcache.datasets import Dataset
from featcache.display import progress
from featcache.errors import UnreadableSample
from featcache.specs import Views
from featcache.store.hdf5 import SPLITS, FileIndex, Listing
from featcache.store.manifests import Quarantined

if TYPE_CHECKING:
    from featcache.backbones.base import Preprocess
    from featcache.store.entry import Remembered

Positions = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Rows = tuple[NDArray[Any], ...]
_SMALL_SECONDS = 0.6e-3  # to read and decode an image; below it the interpreter's share is most of the work
_MTIME, _CTIME = 1, 3  # columns of a file's stat
_NO_STAT = (-1, -1, -1, -1)
_SIGNS = struct.Struct("=4q")  # a row of them
_NO_POSITIONS: Positions = np.empty(0, np.int64)
_DIGEST = hashlib.sha256().digest_size
_FREE = bytes(_DIGEST)  # an empty slot; no content is known whose SHA-256 is zero


class DigestSet:
    """Some SHA-256 values, each once, in an open-addressed table: 48 bytes each where a set of Python's takes some 130.

    Args:
        most: how many there will be at most.
        digests: those it holds from the start.
    """

    def __init__(self, most: int, digests: Iterable[bytes] = ()) -> None:
        self._slots = most + most // 2 + 1
        self._table = bytearray(_DIGEST * self._slots)
        for digest in digests:
            self.add(digest)

    def add(self, digest: bytes) -> bool:
        """Add a value (32 bytes) where it is not there yet, and tell whether it was not."""
        # A SHA-256 is evenly spread: its first bytes are a hash of their own, and Python's would take longer.
        place = int.from_bytes(digest[:8], "little") % self._slots
        while True:
            slot = slice(_DIGEST * place, _DIGEST * place + _DIGEST)
            held = self._table[slot]
            if held == digest:
                return False
            if held == _FREE:
                self._table[slot] = digest
                return True
            place = (place + 1) % self._slots

    def __contains__(self, digest: bytes) -> bool:
        """Tell whether a value (32 bytes) is there."""
        place = int.from_bytes(digest[:8], "little") % self._slots
        while (held := self._table[_DIGEST * place : _DIGEST * place + _DIGEST]) != _FREE:
            if held == digest:
                return True
            place = (place + 1) % self._slots
        return False


class DatasetFiles:
    """A data set's files as one command finds them: each is looked at once, however many entries ask about it.

    So is each column of its manifest that groups or columns beside the rows are taken from.

    Columns have their final size from the start, by position in the data set's samples: small things that last, put down
    between the large arrays that come and go with every batch, would keep those from finding their place again. Threads
    may read different files at once.

    Attributes:
        sha256: uint8 (n, 32), of those that are ``hashed``.
        hashed: bool (n,), whose bytes were read, or whose signs an entry remembers.
        unreadable: those that could not even be reached, by position.
    """

    def __init__(self, dataset: Dataset) -> None:
        count = len(dataset.samples)
        self.dataset = dataset
        self.hashed = np.zeros(count, bool)
        self.unreadable: dict[int, Quarantined] = {}
        self._columns: dict[tuple[str, ...], Mapping[str, Any]] = {}
        self._looked = np.zeros(count, bool)
        self._settled = np.zeros(count, bool)  # looked at, and old enough to be recognised by what was found
        # Written through bytes: assigning a row of an array takes several times longer, and small images are many.
        self._digest_bytes, self._stat_bytes = bytearray(_DIGEST * count), bytearray(_SIGNS.size * count)
        self.sha256 = np.frombuffer(self._digest_bytes, np.uint8).reshape(count, _DIGEST)
        self._stat = np.frombuffer(self._stat_bytes, np.int64).reshape(count, 4)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self.hashed)

    def path(self, position: int) -> str:
        """Return a file's path, as the data set calls it."""
        return self.dataset.table.path(position)

    def share(self, part: tuple[int, int]) -> Positions:
        """Return the positions that belong to a part (i, n), by the checksum of their paths."""
        paths = (self.path(position) for position in range(len(self)))
        shares = [zlib.crc32(path.encode("utf-8", "surrogateescape")) % part[1] for path in paths]
        return np.flatnonzero(np.array(shares) == part[0] - 1)

    def groups(self, column: str) -> Mapping[str, str]:
        """Return what each path belongs to, by a column of the data set's manifest.

        Raises:
            DataError: it is no manifest, has no such column, or a sample no value there.
        """
        from featcache.datasets.tables import read_column

        return self._by_path(("group", column), lambda: read_column(self.dataset.location, column))

    def columns(self, names: Sequence[str]) -> Mapping[str, tuple[str, ...]]:
        """Return the manifest's values in some columns for each path, "" where one is missing.

        Raises:
            DataError: the data set is no manifest, or has no such column.
        """
        from featcache.datasets.tables import read_columns

        return self._by_path(("columns", *names), lambda: read_columns(self.dataset.location, names))

    def _by_path(self, key: tuple[str, ...], read: Callable[[], Sequence[Any]]) -> Mapping[str, Any]:
        if key not in self._columns:
            self._columns[key] = dict(zip((sample.path for sample in self.dataset.samples), read(), strict=True))
        return self._columns[key]

    def look(self, positions: Positions) -> None:
        """Look at files that were not looked at yet; those that cannot be reached become ``unreadable``."""
        for position in positions[~self._looked[positions]].tolist():
            if position in self.unreadable:
                continue
            try:
                self._look(position)
            except OSError as error:
                self.unreadable[position] = quarantine_unread(self.path(position), error)

    def read(self, position: int) -> tuple[bytes, bytes]:
        """Return a file's bytes and their SHA-256, which is noted.

        Raises:
            OSError: it cannot be read.
        """
        # What was found before the bytes were read is a safe sign of them, however long before: a later change has other
        # times. A file that was young then is looked at again: by now it may be old enough to be recognised.
        path = self.path(position) if self._settled[position] else self._look(position)
        content = self.dataset.read(path)
        digest = hashlib.sha256(content).digest()
        self._digest_bytes[position * _DIGEST : (position + 1) * _DIGEST] = digest
        self.hashed[position] = True
        return content, digest

    def hash(self, positions: Positions) -> None:
        """Find out the content of files that no entry knows by their signs."""
        with progress(len(positions), "looking at changed files", "file") as bar:
            for position in positions.tolist():
                try:
                    self.read(position)
                except OSError as error:
                    self.unreadable[position] = quarantine_unread(self.path(position), error)
                bar.update(1)

    def learn(self, positions: Sequence[int] | Positions, files: FileIndex) -> None:
        """Note what another process found of files (k,)."""
        self.sha256[positions], self._stat[positions] = files.sha256, files.stat
        self.hashed[positions] = self._looked[positions] = True
        self._settled[positions] = files.stat[:, _MTIME] != -1

    def digest(self, position: int) -> bytes:
        """Return a file's SHA-256; it must be ``hashed``."""
        digest: bytes = self.sha256[position].tobytes()
        return digest

    def digests(self, positions: Positions) -> list[bytes]:
        """Return the SHA-256 of files (k,)."""
        return [row.tobytes() for row in self.sha256[positions]]

    def are_among(self, positions: Positions, digests: Collection[bytes] | DigestSet) -> NDArray[np.bool_]:
        """Return which files (k,) have one of some contents."""
        if not digests:
            return np.zeros(len(positions), dtype=bool)
        return np.array([digest in digests for digest in self.digests(positions)], dtype=bool)

    def index(self, positions: Positions, checked_ns: int) -> FileIndex:
        """Return what an entry is to remember of files (k,)."""
        stat = np.where(self._settled[positions][:, None], self._stat[positions], -1)
        return FileIndex(tuple(map(self.path, positions.tolist())), self.sha256[positions], stat, checked_ns)

    def listing(self, positions: Positions, checked_ns: int) -> Listing:
        """Return the listing of files (k,) that have a row, in the data set's order."""
        positions, table, classes = np.sort(positions), self.dataset.table, self.dataset.classes
        label_of = {name: number for number, name in enumerate(classes)}
        of_label, of_split = table.kinds(positions)
        labels = np.array([label_of[name] for name in table.labels], np.int64)[of_label]
        splits = np.array([SPLITS.index(name) for name in table.splits], np.uint8)[of_split]
        return Listing(self.index(positions, checked_ns), labels, splits, classes)

    def are_as(self, positions: Positions, files: FileIndex, rows: Positions) -> NDArray[np.bool_]:
        """Return which files (k,), all looked at, have the signs that an entry remembers of them in rows (k,)."""
        then, now = files.stat[rows], self._stat[positions]
        now[then[:, _CTIME] < 0, _CTIME] = -1  # listings from before ctime was kept have three signs
        newest = np.maximum(now[:, _MTIME], now[:, _CTIME])
        has_signs = self._stat[positions, _MTIME] != -1
        same: NDArray[np.bool_] = (then == now).all(axis=1) & has_signs & (newest < files.checked_ns - datasets.RACY_NS)
        return same

    def are_settled(self, positions: Positions) -> NDArray[np.bool_]:
        """Return which files (k,) will be recognised by their signs from now on."""
        return self._settled[positions]

    def _look(self, position: int) -> str:
        path = self.path(position)
        stat = self.dataset.stat(path)
        _SIGNS.pack_into(self._stat_bytes, position * _SIGNS.size, *(stat or _NO_STAT))
        self._settled[position] = stat is not None and stat.is_settled()
        self._looked[position] = True
        return path


@dataclass(frozen=True)
class Scan:
    """An entry held against a data set's files, by their positions.

    ``cached`` (k,), ascending, have a row or a place in quarantine; ``pending`` (m,), ascending, are new, changed, or not
    looked at; ``unreadable`` could not even be opened. ``renewed`` are known by their bytes alone, and have signs now that a
    listing can remember them by. ``with_row`` are the contents whose rows the entry has. On a hit (``is_hit``) it answers as
    it is; else ``pending`` are to be computed, and with none of them only the listing is out of date.
    """

    files: DatasetFiles
    cached: Positions
    pending: Positions
    unreadable: tuple[Quarantined, ...] = ()
    renewed: int = 0
    with_row: frozenset[bytes] = frozenset()
    is_hit: bool = False


def scan(
    files: DatasetFiles, entry: "Remembered | None", *, among: Positions | None = None, hashes_new: bool = True
) -> Scan:
    """Find out which files an entry knows: by path, size, times and inode, else by their content.

    Only positions ``among``, ascending, are looked at. Without ``hashes_new`` a path that was never seen is to be read,
    whatever its content: who computes one share of many must not read the others'.
    """
    among = np.arange(len(files)) if among is None else among
    bad = {(image.path, bytes.fromhex(image.sha256)) for image in entry.quarantined if image.sha256} if entry else set()
    if entry is None or not (entry.files or bad):
        return Scan(files, _NO_POSITIONS, among)
    contents = entry.with_row | {digest for _, digest in bad}
    where: dict[str, tuple[int, int]] = {}
    for number, index in enumerate(entry.files):
        where.update((path, (number, row)) for row, path in enumerate(index.paths))

    files.look(among)
    recognised = _recognised(files, among, entry.files, where)
    if contents:  # else no content is worth reading a file for
        unsure = among[~files.hashed[among]]
        if not hashes_new:
            paths = set(where) | {image.path for image in entry.quarantined}
            unsure = np.array([position for position in unsure.tolist() if files.path(position) in paths], np.int64)
        files.hash(np.array([position for position in unsure.tolist() if position not in files.unreadable], np.int64))
    reached = np.array([position not in files.unreadable for position in among.tolist()], dtype=bool)
    has_place = reached & files.hashed[among]
    has_place[has_place] = files.are_among(among[has_place], contents)
    cached, pending = among[has_place], among[reached & ~has_place]
    unreadable = tuple(files.unreadable[position] for position in among[~reached].tolist())
    renewed = int((files.are_settled(cached) & ~recognised[has_place]).sum())
    is_hit = entry.has_parts and not len(pending) and _is_listed(files, cached, bad, entry.listing)
    return Scan(files, cached, pending, unreadable, renewed, entry.with_row, is_hit)


def _recognised(
    files: DatasetFiles, among: Positions, remembered: Sequence[FileIndex], where: dict[str, tuple[int, int]]
) -> NDArray[np.bool_]:
    """Return which files (k,) have the signs by which an entry remembers them; their content is noted."""
    places = np.array([where.get(files.path(position), (-1, -1)) for position in among.tolist()], np.int64).reshape(-1, 2)
    recognised = np.zeros(len(among), bool)
    for number, index in enumerate(remembered):
        chosen = np.flatnonzero(places[:, 0] == number)
        chosen = chosen[files.are_as(among[chosen], index, places[chosen, 1])]
        recognised[chosen] = True
        unread = chosen[~files.hashed[among[chosen]]]  # what was read in this command is known better
        files.sha256[among[unread]] = index.sha256[places[unread, 1]]
        files.hashed[among[unread]] = True
    return recognised


def _is_listed(files: DatasetFiles, cached: Positions, bad: set[tuple[str, bytes]], listing: Listing | None) -> bool:
    """Tell whether a listing names these files with their present labels and splits, but for those in quarantine."""
    is_bad = files.are_among(cached, {digest for _, digest in bad})
    if listing is None or {(files.path(at), files.digest(at)) for at in cached[is_bad].tolist()} != bad:
        return False
    positions = cached[~is_bad]
    if len(positions) != len(listing.labels) or not np.array_equal(files.sha256[positions], listing.files.sha256):
        return False
    listed = zip(listing.files.paths, listing.labels.tolist(), listing.splits.tolist(), strict=True)
    samples = (files.dataset.samples[position] for position in positions.tolist())
    return all(
        (sample.path, sample.label, sample.split) == (path, listing.classes[label], SPLITS[split])
        for sample, (path, label, split) in zip(samples, listed, strict=True)
    )


def quarantine_unread(path: str, error: OSError) -> Quarantined:
    """Return the place in quarantine of a file that could not be read."""
    return Quarantined(path, "", f"cannot be read ({error.strerror or error})")


@dataclass
class Batch:
    """Images on their way, by their positions: ``pixels`` uint8 (b, views, h, w, 3) and ``rows`` belong to ``fresh``.

    ``copies`` have their row elsewhere. ``beside`` are those of ``fresh`` that ``thumbnails`` (1, h, w, 3) are of.
    """

    fresh: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    rows: Rows = ()
    beside: list[int] = field(default_factory=list)
    thumbnails: list[Pixels] = field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of images looked at."""
        return len(self.fresh) + len(self.copies) + len(self.bad)


@dataclass(frozen=True)
class Thumbnails:
    """What is decoded beside: ``decode`` gives both of a file's bytes, for the files that it is ``asked`` of (n,)."""

    decode: "Callable[[bytes, Views], tuple[Pixels, Pixels | None]]"
    asked: NDArray[np.bool_]


class BatchReader:
    """Fills batches from a shared feed of positions; many threads may fill at once.

    Args:
        files: the images.
        positions: which of them, in this order.
        preprocess: how files become arrays.
        views: how many views of each.
        cached: the SHA-256 of images that need no row.
        thumbnails: what is decoded beside.
    """

    def __init__(
        self,
        files: DatasetFiles,
        positions: Sequence[int] | Positions,
        preprocess: "Preprocess",
        views: Views,
        cached: Collection[bytes] = (),
        thumbnails: Thumbnails | None = None,
    ) -> None:
        self._files = files
        self._feed = iter(positions)
        self._preprocess = preprocess
        self._views = views
        self._thumbnails = thumbnails
        self._claimed = DigestSet(len(cached) + len(positions), cached)
        self._lock = threading.Lock()
        self._one_at_a_time = threading.Lock()
        self._small = False

    def fill(self, size: int, stopped: Callable[[], bool] = lambda: False, begun: Batch | None = None) -> Batch:
        """Return the next images, fewer than ``size`` fresh ones only where the feed ends; ``begun`` is filled up.

        Small images are mostly the interpreter's work: threads that read them at once would only wait for each other.
        """
        batch = begun or Batch()
        with self._one_at_a_time if self._small else nullcontext():
            started = time.perf_counter()
            while len(batch.fresh) < size and not stopped():
                with self._lock:
                    position = next(self._feed, None)
                if position is None:
                    break
                self._read(int(position), batch)
        if len(batch) and begun is None:
            self._small = (time.perf_counter() - started) / len(batch) < _SMALL_SECONDS
        return batch

    def _read(self, position: int, batch: Batch) -> None:
        digest = b""
        try:
            content, digest = self._files.read(position)
            with self._lock:
                is_new = self._claimed.add(digest)
            if not is_new:
                batch.copies.append(position)
                return
            pixels, thumbnail = self._decoded(content, position)
            batch.pixels.append(pixels)
            batch.fresh.append(position)
            if thumbnail is not None:
                batch.thumbnails.append(thumbnail)
                batch.beside.append(position)
        except OSError as error:
            batch.bad.append(quarantine_unread(self._files.path(position), error))
        except UnreadableSample as error:
            batch.bad.append(Quarantined(self._files.path(position), digest.hex(), str(error)))
        except Exception as error:  # noqa: BLE001 - one image never ends a run, whatever a reader raises
            batch.bad.append(Quarantined(self._files.path(position), digest.hex(), f"{type(error).__name__}: {error}"))

    def _decoded(self, content: bytes, position: int) -> tuple[Pixels, Pixels | None]:
        try:
            return self._prepared(content, position)
        except MemoryError:
            with self._lock:  # the others come to rest at the feed: once more, with their room
                return self._prepared(content, position)

    def _prepared(self, content: bytes, position: int) -> tuple[Pixels, Pixels | None]:
        beside = self._thumbnails
        if beside is None or not beside.asked[position]:
            return self._preprocess(content, self._views), None
        return beside.decode(content, self._views)
