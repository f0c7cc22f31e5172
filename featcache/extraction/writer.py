"""What an entry takes from a run: rows until they make a part, images that need none, and in the end the listing."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from time import time_ns
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import Dataset
from featcache.display import logger, printable
from featcache.errors import DataError, StorageError
from featcache.extraction.files import DatasetFiles, Positions, Scan, scan
from featcache.fingerprint import DigestSet
from featcache.specs import StoredDtype, Views
from featcache.store.hdf5 import Part
from featcache.store.manifests import Quarantined

if TYPE_CHECKING:
    from featcache.backbones.base import Preprocess
    from featcache.extraction.extract import Runtime
    from featcache.extraction.files import Batch
    from featcache.extraction.ray_engine import WrittenPart
    from featcache.store.entry import FeatureStore

# A part is what an interrupt can cost: small at first, so that a run killed early keeps something; later as large as a
# reader likes to map, and no larger than what memory spares for each entry.
PART_ROWS = 4096
PART_BYTES = 64 << 20
MIN_PART_SECONDS = 2.0
MAX_PART_SECONDS = 30.0
TOLERATED_BAD_IMAGES = 10  # in a small data set a share would forbid even one


@dataclass(frozen=True)
class ExtractPlan:
    """How a run goes, whichever entries it fills.

    ``part`` is (i, n), counted from 1: only that share of the images is computed, by the hash of their paths. ``remote``
    computes elsewhere, on a Ray cluster. ``purpose`` names a pass that nobody asked for. Without ``lists`` the rows are kept
    and the entry's listing stays as it is.
    """

    preprocess: "Preprocess"
    views: Views = field(default_factory=Views)
    batch_size: int = 32
    max_bad: float = 0.01
    part: tuple[int, int] | None = None
    remote: "Callable[[DatasetFiles, Positions, frozenset[bytes], Sequence[EntryWriter]], str] | None" = None
    lists: bool = True
    purpose: str = ""


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did; ``left`` images are for others to compute, ``positions`` (rows,) are those with a row."""

    rows: int
    computed: int
    quarantined: tuple[Quarantined, ...]
    seconds: float
    left: int = 0
    runtime: str = ""
    difference: float = 0.0
    positions: Positions = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    @property
    def reused(self) -> int:
        """Rows that were there already."""
        return self.rows - self.computed


class RowBuffer:
    """Rows that are not yet in a part, in room that every part uses again."""

    def __init__(self, like: NDArray[Any], batch_size: int) -> None:
        self._full = max(1, min(PART_ROWS, PART_BYTES // max(1, like[:1].nbytes)))
        most = self._full + batch_size
        self._rows = np.empty((most, *like.shape[1:]), like.dtype)
        self._positions = np.empty(most, np.int64)
        self._batches: list[slice] = []

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._batches[-1].stop if self._batches else 0

    @property
    def is_full(self) -> bool:
        """Whether they make a part."""
        return len(self) >= self._full

    def add(self, positions: Positions, rows: NDArray[Any]) -> None:
        """Put down a batch's rows."""
        place = slice(len(self), len(self) + len(rows))
        self._rows[place], self._positions[place] = rows, positions
        self._batches.append(place)

    def in_order(self) -> tuple[Positions, list[NDArray[Any]]]:
        """Return the images and their rows, batch by batch in the data set's order."""
        ordered = sorted(self._batches, key=lambda place: int(self._positions[place.start]))
        return np.concatenate([self._positions[place] for place in ordered]), [self._rows[place] for place in ordered]

    def clear(self) -> None:
        """Let the room be used again."""
        self._batches = []


class EntryWriter:
    """An entry that takes rows: what a run has learned for it, and the rows that are not yet in a part.

    Args:
        store: the entry.
        scanned: what it lacks.
        row: one row's shape, without views.
        batch_size: of the rows that come at once, at most.
    """

    def __init__(self, store: "FeatureStore", scanned: Scan, row: tuple[int, ...], batch_size: int) -> None:
        self.store, self.scanned, self.files, self.row = store, scanned, scanned.files, row
        self.dtype = store.spec["dtype"]
        self.share = 0.0  # of the pass's seconds: those of all its entries add up to them
        self.quarantined: list[Quarantined] = []
        self.computed = 0
        self.lacks = np.zeros(len(self.files), bool)
        self.lacks[scanned.pending] = True
        self._batch_size = batch_size
        self._cached = np.zeros(len(self.files), bool)
        self._cached[scanned.cached] = True
        self._copies: list[int] = []
        self._waiting: RowBuffer | None = None
        self._part_started = self._booked = time.monotonic()

    def start(self, share: float) -> frozenset[bytes]:
        """Begin a run that books a share of its seconds here; return the contents that have a row already."""
        self.share = share
        before = self.scanned.with_row
        self._with_row = DigestSet(len(before) + len(self.scanned.pending), before)
        self._is_empty = not before
        self._part_started = self._booked = time.monotonic()
        return before

    def take(self, batch: "Batch", rows: NDArray[Any]) -> None:
        """Sort a batch into rows, images whose row is elsewhere, and bad ones."""
        self.quarantined += batch.bad
        copies = self._lacked(batch.copies)
        self._cached[copies] = True
        self._copies += copies.tolist()
        if batch.fresh:
            self.take_rows(np.array(batch.fresh, np.int64), rows)

    def take_rows(self, positions: Positions, rows: NDArray[Any]) -> None:
        """Let rows wait for the next part, but for those that are there and those that are not finite."""
        rows, finite = in_dtype([rows], self.dtype)
        unusable = positions[~finite]
        if len(unusable):
            bad = not_finite([*map(self.files.path, unusable.tolist())], self.files.digests(unusable), self.dtype)
            say_left_out(bad)
            self.quarantined += bad
        self._cached[self._lacked(positions[finite])] = True
        new = finite if self._is_empty else finite & ~self.files.are_among(positions, self._with_row)
        if new.any():
            if self._waiting is None:
                self._waiting = RowBuffer(rows, self._batch_size)
            chosen = slice(None) if new.all() else new  # most often all: no copy but the one into the room
            self._waiting.add(positions[chosen], rows[chosen])

    def _lacked(self, positions: Sequence[int] | Positions) -> Positions:
        """Return the images that this entry, not only another of the run, had to look at."""
        positions = np.asarray(positions, np.int64)
        return positions[self.lacks[positions]]

    def is_due(self, started: float) -> bool:
        """Tell whether to commit: parts grow with the run, from 2 s of work to 30 s."""
        if not self._waiting:
            return False
        now = time.monotonic()
        patience = min(MAX_PART_SECONDS, max(MIN_PART_SECONDS, (now - started) / 10))
        return self._waiting.is_full or now - self._part_started >= patience

    def seconds(self, until: float | None = None) -> float:
        """Return this entry's share of the seconds that have gone by since the last that were booked, and book them."""
        now = time.monotonic() if until is None else until
        passed, self._booked = max(0.0, now - self._booked), max(now, self._booked)
        return passed * self.share

    def adopt(self, written: "WrittenPart", number: int) -> None:
        """Make a part count that a worker has written, as the ``number``-th entry of the run."""
        bad, record = written.bad[number], written.parts[number]
        say_left_out(bad)
        self.quarantined += bad
        for positions in (written.good[number], written.copies):
            self._cached[self._lacked(positions)] = True
        parts = [record] if record else []
        self.store.commit(parts=parts, quarantined=[image for image in bad if image.sha256], seconds=self.seconds())
        self.computed += len(written.good[number])

    def commit(self, runtime: str) -> None:
        """Make the waiting rows count."""
        positions, rows = np.empty(0, np.int64), [np.empty((0, *self.row), self.dtype)]
        if self._waiting:
            positions, rows = self._waiting.in_order()
        for digest in self.files.digests(positions):
            self._with_row.add(digest)
        copies, early = self._settled_copies()
        if len(positions) or len(copies):
            now = time_ns()
            also = self.files.index(copies, now) if len(copies) else None
            record = self.store.add_part(Part(rows, self.files.index(positions, now), also), runtime)
            bad = [image for image in self.quarantined if image.sha256]
            self.store.commit(parts=[record], quarantined=bad, seconds=self.seconds())
            self.computed += len(positions)
            self._copies = early
        if self._waiting:
            self._waiting.clear()
        self._part_started = time.monotonic()

    def _settled_copies(self) -> tuple[Positions, list[int]]:
        """Return the copies that have their row by now, or their place in quarantine, and the others.

        A copy can come before its original, which another worker still computes: were it written down at once, and the
        original lost to an interrupt, every later run would look for a row that nobody computes.
        """
        if not self._copies:
            return np.empty(0, np.int64), []
        bad = {
            bytes.fromhex(image.sha256) for image in (*self.store.manifest.quarantined, *self.quarantined) if image.sha256
        }
        settled, early = list[int](), list[int]()
        for position in self._copies:
            digest = self.files.digest(position)
            (settled if digest in self._with_row or digest in bad else early).append(position)
        return np.array(settled, np.int64), early

    def finish(self, plan: ExtractPlan, lasted: tuple[float, float], runtime: "Runtime") -> ExtractReport:
        """List the images as they are now, all rows being kept; of several parts, the one that comes last does it."""
        unbooked, pending, early = self.seconds(until=lasted[1]), 0, list[int](self._copies)
        cached, quarantined, scanned = np.flatnonzero(self._cached), list(self.quarantined), self.scanned
        if plan.part is not None:  # others compute the other shares: what they have committed is known only now
            self.store.refresh()
            scanned = scan(self.files, self.store.remembered(), hashes_new=False)
            cached, quarantined, pending, early = np.sort(scanned.cached), [], len(scanned.pending), []
        cached, all_bad = self._sorted_out(cached, quarantined, early)
        all_bad += scanned.unreadable
        if not plan.lists:
            self.store.commit(quarantined=[image for image in all_bad if image.sha256], seconds=unbooked)
        elif not pending and not scanned.is_hit:
            require_usable(self.files.dataset, len(cached), all_bad, plan.max_bad)
            self.store.commit(quarantined=all_bad, listing=self.files.listing(cached, time_ns()), seconds=unbooked)
            self.store.write_table()
        seconds = time.monotonic() - lasted[0]
        return ExtractReport(
            len(cached), self.computed, all_bad, seconds, pending, runtime.name, runtime.difference, positions=cached
        )

    def _sorted_out(
        self, cached: Positions, quarantined: list[Quarantined], early: Sequence[int]
    ) -> tuple[Positions, tuple[Quarantined, ...]]:
        """Return which of the images that are known (k,) have a row, and the place in quarantine of each other one."""
        bad = (*self.store.manifest.quarantined, *self.quarantined)
        reasons = {bytes.fromhex(image.sha256): image.reason for image in bad if image.sha256}
        is_bad, is_early = self.files.are_among(cached, reasons), np.isin(cached, early)
        named = {image.path for image in quarantined}
        for position in cached[is_bad].tolist():
            path, digest = self.files.path(position), self.files.digest(position)
            if path not in named:
                quarantined.append(Quarantined(path, digest.hex(), reasons[digest]))
        reason = "a copy of an image that could not be read"
        quarantined += [Quarantined(self.files.path(position), "", reason) for position in cached[is_early].tolist()]
        return cached[~is_bad & ~is_early], tuple(quarantined)


def renew(store: "FeatureStore", scanned: Scan) -> None:
    """Let an entry that answers as it is remember files by their present signs, where it had to hash them again.

    Else every later run would hash them too. A cache that cannot be written is only slower.
    """
    if not scanned.renewed:
        return
    before = store.manifest
    store.refresh()
    if store.manifest.number == before.number:  # what another process has listed meanwhile is newer than this
        bad = {bytes.fromhex(image.sha256) for image in before.quarantined if image.sha256}
        cached = scanned.cached[~scanned.files.are_among(scanned.cached, bad)]
        with suppress(StorageError):
            store.commit(quarantined=before.quarantined, listing=scanned.files.listing(cached, time_ns()))


def say_left_out(images: Sequence[Quarantined]) -> None:
    """Tell the user which images give no row, and why."""
    for bad in images:
        logger.warning("%s: left out: %s", printable(bad.path), printable(bad.reason))


def require_usable(dataset: Dataset, good: int, quarantined: Sequence[Quarantined], max_bad: float) -> None:
    """Refuse a data set of which too much cannot be used.

    Raises:
        DataError: no image can, or more than the share ``max_bad`` and than a few cannot.
    """
    bad, total = len(quarantined), len(dataset.samples)
    example = f"{quarantined[0].path}: {quarantined[0].reason}" if quarantined else ""
    if not good:
        raise DataError(f"{dataset.location}: none of the {total} images can be used ({example}).")
    if bad > max(TOLERATED_BAD_IMAGES, max_bad * total):
        raise DataError(
            f"{dataset.location}: {bad} of {total} images cannot be used ({example}). The other rows are kept: repair the "
            f"files and run again, or allow it with `max_bad={math.ceil(1000 * bad / total) / 1000}`."
        )


def in_dtype(pieces: Sequence[NDArray[Any]], dtype: StoredDtype) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return rows as they will be stored, and which of them are finite."""
    with np.errstate(over="ignore"):
        rows = (pieces[0] if len(pieces) == 1 else np.concatenate(pieces)).astype(dtype, copy=False)
    if dtype in {"uint8", "int32"}:
        return rows, np.ones(len(rows), dtype=bool)
    return rows, np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)


def not_finite(paths: Sequence[str], digests: Sequence[bytes], dtype: StoredDtype) -> list[Quarantined]:
    """Return the places in quarantine of images whose activations overflow."""
    better = ", try dtype float32" if dtype == "float16" else ""
    reason = f"its activations are not finite in {dtype}{better}"
    return [Quarantined(path, digest.hex(), reason) for path, digest in zip(paths, digests, strict=True)]
