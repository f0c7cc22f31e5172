"""Run a frozen prefix once over the images of a source and keep its rows."""

import math
import shutil
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import Dataset
from featcache.errors import DataError, StorageError
from featcache.extraction import ray_engine as cluster
from featcache.extraction.loader import (
    Batch,
    BatchReader,
    Compute,
    Pixels,
    compute,
    in_dtype,
    not_finite,
    reading_ahead,
    run_batches,
    sample,
)
from featcache.extraction.lookup import FileIndex, FileIndexBuilder, Hit, Scan, make_listing, scan, with_content
from featcache.extraction.lookup import plan as decide
from featcache.extraction.ray_engine import WorkerConfig, WrittenPart
from featcache.fingerprint import DigestSet
from featcache.progress import logger, printable, progress
from featcache.specs import StoredDtype, Transform, Views
from featcache.store.entry import FeatureStore, now_ns
from featcache.store.hdf5 import Part
from featcache.store.manifests import Quarantined

PART_ROWS = 4096
PART_BYTES = 64 << 20
MIN_PART_SECONDS = 2.0
MAX_PART_SECONDS = 30.0
TOLERATED_BAD_IMAGES = 10


@dataclass(frozen=True)
class Sink:
    """An entry that takes rows, and what it lacks. ``row`` is one row's shape, without views."""

    store: FeatureStore
    stock: Scan
    dtype: StoredDtype
    row: tuple[int, ...]


@dataclass(frozen=True)
class Ready:
    """What computes: pixels uint8 (b, h, w, 3) to rows (b, ...), one a sink, on so many threads at once."""

    run: Compute
    workers: int = 1
    runtime: str = ""
    difference: float = 0.0


Prepare = Callable[[Pixels, int], Ready]


@dataclass(frozen=True)
class ExtractPlan:
    """How a run goes, whichever entries it fills.

    ``part`` is (i, n), counted from 1: only that share of the images is computed, by the hash of their paths. ``remote``
    computes on a Ray cluster. ``purpose`` names a pass that nobody asked for. Without ``lists`` the rows are kept and
    the entry's listing stays as it is.
    """

    transform: Transform
    views: Views = field(default_factory=Views)
    batch_size: int = 32
    max_bad: float = 0.01
    part: tuple[int, int] | None = None
    remote: WorkerConfig | None = None
    lists: bool = True
    purpose: str = ""


def is_mine(dataset: Dataset, part: tuple[int, int], position: int) -> bool:
    """Tell whether an item belongs to a part (i, n), by the checksum of its path."""
    return zlib.crc32(dataset.samples[position].path.encode("utf-8", "surrogateescape")) % part[1] == part[0] - 1


@dataclass(frozen=True)
class ExtractReport:
    """What an extraction did; ``left`` images are for others to compute."""

    rows: int
    computed: int
    quarantined: tuple[Quarantined, ...]
    seconds: float
    left: int = 0
    runtime: str = ""
    difference: float = 0.0
    cached: FileIndex = field(default_factory=lambda: FileIndex.of([]), repr=False)

    @property
    def reused(self) -> int:
        """Rows that were there already."""
        return self.rows - self.computed


class RowBuffer:
    """Rows that are not yet in a part, in room that every part uses again; see ``FileIndexBuilder``."""

    def __init__(self, like: NDArray[Any], batch_size: int) -> None:
        self._full = max(1, min(PART_ROWS, PART_BYTES // max(1, like[:1].nbytes)))
        most = self._full + batch_size
        self._rows = np.empty((most, *like.shape[1:]), like.dtype)
        self._sightings = FileIndexBuilder(most)
        self._batches: list[slice] = []

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._batches[-1].stop if self._batches else 0

    @property
    def is_full(self) -> bool:
        """Whether they make a part."""
        return len(self) >= self._full

    def add(self, sighted: FileIndex, rows: NDArray[Any]) -> None:
        """Put down a batch's rows."""
        place = slice(len(self), len(self) + len(rows))
        self._rows[place] = rows
        self._sightings.add(sighted)
        self._batches.append(place)

    def in_order(self) -> tuple[FileIndex, list[NDArray[Any]]]:
        """Return the images and their rows, batch by batch in the source's order."""
        sighted = self._sightings.sighted
        ordered = sorted(self._batches, key=lambda place: int(sighted.index[place.start]))
        return FileIndex.joined([sighted.take(place) for place in ordered]), [self._rows[place] for place in ordered]

    def clear(self) -> None:
        """Let the room be used again."""
        self._sightings.clear()
        self._batches = []


@dataclass
class EntryWriter:
    """What a run has learned for one entry, and the rows that are not yet in a part."""

    sink: Sink
    there: set[bytes]
    batch_size: int
    share: float  # of the pass's seconds: those of all its entries add up to them
    cached: FileIndexBuilder = field(init=False)
    quarantined: list[Quarantined] = field(default_factory=list)
    copies: list[FileIndex] = field(default_factory=list)
    have: DigestSet = field(init=False)
    waiting: RowBuffer | None = None
    part_started: float = field(default_factory=time.monotonic)
    booked: float = field(default_factory=time.monotonic)
    computed: int = 0

    def __post_init__(self) -> None:
        self.cached = FileIndexBuilder(len(self.sink.stock.pending))
        self.have = DigestSet(len(self.there) + len(self.sink.stock.pending), self.there)

    def take(self, batch: Batch, rows: NDArray[Any], dataset: Dataset) -> None:
        """Sort a batch into rows, known images and bad ones."""
        self.quarantined += batch.bad
        if batch.copies:
            copies = self._lacked(FileIndex.of(batch.copies))
            self.cached.add(copies)
            self.copies.append(copies)
        if not batch.fresh:
            return
        sighted = batch.sighted
        rows, finite = in_dtype([rows], self.sink.dtype)
        unusable = not_finite(dataset, sighted.take(~finite), self.sink.dtype)
        say_left_out(unusable)
        self.quarantined += unusable
        self.cached.add(self._lacked(sighted.take(finite)))
        new = finite & ~with_content(sighted, self.there)
        if new.any():
            if self.waiting is None:
                self.waiting = RowBuffer(rows, self.batch_size)
            which = slice(None) if new.all() else new  # most often all: no copy but the one into the room
            self.waiting.add(sighted.take(which), rows[which])

    def _settled_copies(self) -> tuple[FileIndex, FileIndex]:
        """Return the copies that have their row by now, or their place in quarantine, and the others.

        A copy can come before its original, which another worker still computes: were it written down at once, and the
        original lost to an interrupt, every later run would look for a row that nobody computes.
        """
        copies = FileIndex.joined(self.copies)
        if not len(copies):
            return copies, copies
        several = (*self.sink.store.manifest.quarantined, *self.quarantined)
        bad = {bytes.fromhex(one.sha256) for one in several if one.sha256}
        settled = np.array([digest in self.have or digest in bad for digest in copies.digests()], dtype=bool)
        return copies.take(settled), copies.take(~settled)

    def _lacked(self, sighted: FileIndex) -> FileIndex:
        """Return the items that this entry, not only another of the run, had to look at."""
        lacked = self.sink.stock.pending
        if not len(lacked):
            return FileIndex.of([])
        found = np.minimum(np.searchsorted(lacked, sighted.index), len(lacked) - 1)
        return sighted.take(lacked[found] == sighted.index)

    def is_due(self, started: float) -> bool:
        """Tell whether to commit: parts grow with the run, from 2 s of work to 30 s."""
        if not self.waiting:
            return False
        now = time.monotonic()
        patience = min(MAX_PART_SECONDS, max(MIN_PART_SECONDS, (now - started) / 10))
        return self.waiting.is_full or now - self.part_started >= patience

    def seconds(self, until: float | None = None) -> float:
        """Return this entry's share of the seconds that have gone by since the last that were booked, and book them."""
        now = time.monotonic() if until is None else until
        passed, self.booked = max(0.0, now - self.booked), max(now, self.booked)
        return passed * self.share

    def adopt(self, written: WrittenPart, number: int) -> None:
        """Make a part count that a worker has written, as the ``number``-th entry of the run."""
        bad, record = written.bad[number], written.parts[number]
        say_left_out(bad)
        self.quarantined += bad
        for seen in (written.good[number], written.copies):
            self.cached.add(self._lacked(seen))
        parts = [record] if record else []
        self.sink.store.commit(parts=parts, quarantined=[one for one in bad if one.sha256], seconds=self.seconds())
        self.computed += len(written.good[number])

    def commit(self, dataset: Dataset, runtime: str) -> None:
        """Make the waiting rows count."""
        nothing = FileIndex.of([]), [np.empty((0, *self.sink.row), self.sink.dtype)]
        sighted, features = self.waiting.in_order() if self.waiting else nothing
        for digest in sighted.digests():
            self.have.add(digest)
        copies, early = self._settled_copies()
        if len(sighted) or len(copies):
            now = now_ns()
            also = copies.seen(dataset, now) if len(copies) else None
            part = Part(features, sighted.seen(dataset, now), also)
            record = self.sink.store.add_part(part, runtime)
            bad = [bad for bad in self.quarantined if bad.sha256]
            self.sink.store.commit(parts=[record], quarantined=bad, seconds=self.seconds())
            self.computed += len(sighted)
            self.copies = [early]
        if self.waiting:
            self.waiting.clear()
        self.part_started = time.monotonic()


def extract(dataset: Dataset, sinks: Sequence[Sink], prepare: Prepare, plan: ExtractPlan) -> list[ExtractReport]:
    """Compute the rows that entries lack in one pass, commit them part by part, then list the images as they are now.

    Killed at any point it loses the parts in flight; run again it goes on. An interrupt commits those too.

    Args:
        dataset: the images.
        sinks: the entries that take the rows.
        prepare: makes ready what computes, given a first batch and how many images are left; called only if any is.
        plan: how the run goes.

    Raises:
        DataError: too many images cannot be used, or none can.
        StorageError: the disk failed, or will not hold the rows.
    """
    started = time.monotonic()
    lacking = sum(len(sink.stock.pending) for sink in sinks)
    harvests = [
        EntryWriter(sink, sink.store.digests(), plan.batch_size, len(sink.stock.pending) / lacking if lacking else 0.0)
        for sink in sinks
    ]
    wanted = np.unique(np.concatenate([np.empty(0, np.int64), *(sink.stock.pending for sink in sinks)]))
    check_room(sinks, len(wanted), plan.views.count, plan.purpose)
    ready = Ready(lambda pixels: (pixels,))
    if len(wanted) and plan.remote is not None:
        ready = _compute_there(dataset, wanted, harvests, plan.remote)
    elif len(wanted):
        ready = _compute_here(dataset, wanted, harvests, prepare, plan)
    ended = time.monotonic()
    return [_finish(dataset, harvest, plan, (started, ended), ready) for harvest in harvests]


def _compute_here(
    dataset: Dataset, wanted: NDArray[np.int64], harvests: Sequence[EntryWriter], prepare: Prepare, plan: ExtractPlan
) -> Ready:
    started, ready = time.monotonic(), Ready(lambda pixels: (pixels,))
    done = set.intersection(*(harvest.there for harvest in harvests))
    reader = BatchReader(dataset, wanted, plan.transform, plan.views, done)
    try:
        with progress(len(wanted), f"extract {dataset.name}") as bar:
            first = reader.fill(plan.batch_size)
            ahead = deque[Batch]()
            if first.fresh:
                with reading_ahead(reader, plan.batch_size) as ahead:
                    ready = prepare(sample(first, plan.batch_size), len(wanted))
            ahead.appendleft(first)
            del first
            with closing(run_batches(reader, ready.run, plan.batch_size, ready.workers, ahead)) as batches:
                for batch in batches:
                    _sort_in(batch, harvests, dataset)
                    bar.update(len(batch))
                    for harvest in harvests:
                        if harvest.is_due(started):
                            harvest.commit(dataset, ready.runtime)
    finally:
        for harvest in harvests:
            harvest.commit(dataset, ready.runtime)
    return ready


def _compute_there(
    dataset: Dataset, wanted: NDArray[np.int64], harvests: Sequence[EntryWriter], recipe: WorkerConfig
) -> Ready:
    done = set.intersection(*(harvest.there for harvest in harvests))
    with (
        progress(len(wanted), f"extract {dataset.name}") as bar,
        closing(cluster.run(dataset, wanted.tolist(), done, recipe)) as units,
    ):
        for written in units:
            for number, harvest in enumerate(harvests):
                harvest.adopt(written, number)
            bar.update(written.images)
    return Ready(lambda pixels: (pixels,), runtime="ray")


def measure(dataset: Dataset, positions: Sequence[int], plan: ExtractPlan, run: Compute | None, workers: int) -> float:
    """Return the seconds that computing some images would take, from a first batch in one worker."""
    reader = BatchReader(dataset, positions, plan.transform, plan.views, ())
    batch = reader.fill(plan.batch_size)
    if not batch.fresh:
        return 0.0
    compute(batch, run or (lambda pixels: (pixels,)), plan.batch_size)  # warms up
    started = time.perf_counter()
    batch = BatchReader(dataset, positions, plan.transform, plan.views, ()).fill(plan.batch_size)
    compute(batch, run or (lambda pixels: (pixels,)), plan.batch_size)
    return (time.perf_counter() - started) / max(1, len(batch)) * len(positions) / workers


def check_room(sinks: Sequence[Sink], images: int, views: int, purpose: str = "") -> None:
    """Say how much will be computed and written; refuse what a disk cannot hold.

    Raises:
        StorageError: an entry's disk has less room than its rows need.
    """
    sizes = [images * views * int(np.prod(sink.row)) * np.dtype(sink.dtype).itemsize for sink in sinks]
    total = sum(sizes)
    for sink in sinks:
        free = shutil.disk_usage(sink.store.path).free
        if total > free:
            raise StorageError(
                f"{sink.store.path}: {total / 1e9:.1f} GB would be written ({total / images / 1e3:.0f} kB an image), "
                f"{free / 1e9:.1f} GB are free. Use another `cache` or a later cut."
            )
    if images:
        what = f"{purpose}: " if purpose else ""
        logger.info(
            "%s%d images to compute, %.1f MB to write (%.1f kB an image)", what, images, total / 1e6, total / images / 1e3
        )


def say_left_out(several: Sequence[Quarantined]) -> None:
    """Tell the user which images give no row, and why."""
    for bad in several:
        logger.warning("%s: left out: %s", printable(bad.path), printable(bad.reason))


def _sort_in(batch: Batch, harvests: Sequence[EntryWriter], dataset: Dataset) -> None:
    say_left_out(batch.bad)
    rows: Iterator[NDArray[Any]] = iter(batch.rows)
    for harvest in harvests:
        harvest.take(batch, next(rows, np.empty(0)), dataset)


def _finish(
    dataset: Dataset, harvest: EntryWriter, plan: ExtractPlan, lasted: tuple[float, float], ready: Ready
) -> ExtractReport:
    """List the images as they are now; of several parts, the one that comes last does it."""
    left_over = harvest.seconds(until=lasted[1])
    store, stock = harvest.sink.store, harvest.sink.stock
    cached, quarantined, left = FileIndex.joined([stock.cached, harvest.cached.sighted]), harvest.quarantined, 0
    if plan.part is not None:
        store.refresh()
        stock = scan(dataset, store, hashes_new=False)
        cached, quarantined, left = stock.cached, [], len(stock.pending)
    reasons = {
        bytes.fromhex(bad.sha256): bad.reason for bad in (*store.manifest.quarantined, *harvest.quarantined) if bad.sha256
    }
    is_bad = with_content(cached, reasons)
    bad = cached.take(is_bad)
    paths = {one.path for one in quarantined}
    quarantined += [
        Quarantined(dataset.samples[index].path, digest.hex(), reasons[digest])
        for index, digest in zip(bad.index, bad.digests(), strict=True)
        if dataset.samples[index].path not in paths
    ]
    early = FileIndex.joined(harvest.copies).index if plan.part is None else ()
    orphaned = np.isin(cached.index, early)
    reason = "a copy of an image that could not be read"
    quarantined += [Quarantined(dataset.samples[index].path, "", reason) for index in cached.index[orphaned]]
    cached, all_bad = cached.take(~is_bad & ~orphaned), (*quarantined, *stock.unreadable)
    if not plan.lists:
        store.commit(quarantined=[bad for bad in all_bad if bad.sha256], seconds=left_over)
    elif not left and not isinstance(decide(dataset, store, stock), Hit):
        _judge(dataset, len(cached), all_bad, plan.max_bad)
        store.commit(quarantined=all_bad, listing=make_listing(dataset, cached, now_ns()), seconds=left_over)
        store.write_table()
    seconds = time.monotonic() - lasted[0]
    return ExtractReport(len(cached), harvest.computed, all_bad, seconds, left, ready.runtime, ready.difference, cached)


def _judge(dataset: Dataset, good: int, quarantined: tuple[Quarantined, ...], max_bad: float) -> None:
    bad, total = len(quarantined), len(dataset.samples)
    example = f"{quarantined[0].path}: {quarantined[0].reason}" if quarantined else ""
    if not good:
        raise DataError(f"{dataset.location}: none of the {total} images can be used ({example}).")
    if bad > max(TOLERATED_BAD_IMAGES, max_bad * total):
        raise DataError(
            f"{dataset.location}: {bad} of {total} images cannot be used ({example}). The other rows are kept: repair the "
            f"files and run again, or allow it with `max_bad={math.ceil(1000 * bad / total) / 1000}`."
        )
