"""One pass of a frozen prefix over the images of a data set: workers take batches from files to rows, entries keep them.

A worker takes a batch from file to rows without handing anything over, so that all cores stay busy and nothing waits for
anything but the feed of paths and the queue of results. An entry lets rows wait until they make a part, and lists the images
in the end.
"""

import atexit
import math
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from time import time_ns
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets import Dataset
from featcache.datasets.decoding import decode_both
from featcache.display import bytes_text, logger, printable, progress
from featcache.errors import DataError, StorageError
from featcache.extraction.files import (
    Batch,
    BatchReader,
    DatasetFiles,
    DigestSet,
    Pixels,
    Positions,
    Rows,
    Scan,
    Thumbnails,
    scan,
)
from featcache.resources import cores
from featcache.specs import INPUT, StoredDtype, Transform, Views
from featcache.store.hdf5 import Part
from featcache.store.manifests import Quarantined

if TYPE_CHECKING:
    from featcache.backbones.base import Preprocess
    from featcache.extraction.runtimes import WrittenPart
    from featcache.store.entry import FeatureStore

# A part is what an interrupt can cost: small at first, so that a run killed early keeps something; later as large as a
# reader likes to map, and no larger than what memory spares for each entry.
PART_ROWS = 4096
PART_BYTES = 64 << 20
MIN_PART_SECONDS = 2.0
MAX_PART_SECONDS = 30.0
TOLERATED_BAD_IMAGES = 10  # in a small data set a share would forbid even one
_AHEAD_BYTES = 256 << 20
_MOST_WORKERS = 16  # each holds a batch of pixels and, with OpenVINO, a model


@dataclass(frozen=True)
class Workers:
    """How many threads take batches, and how many cores each of them computes on."""

    count: int
    threads: int


def workers_here() -> Workers:
    """Return the workers for the cores that this process may use."""
    count = min(cores(), _MOST_WORKERS)
    return Workers(count, cores() // count)


@dataclass(frozen=True)
class Runtime:
    """What computes: ``run`` takes pixels uint8 (b, h, w, 3) to rows (b, ...), one a cut, on ``workers`` threads at once.

    ``difference`` is its greatest one from PyTorch's, relative to the greatest activation; ``seconds`` are a batch's. One of
    ``any_size`` takes batches of any number, and gives a row that does not depend on it.
    """

    run: Callable[[Pixels], Rows]
    name: str = ""
    difference: float = 0.0
    seconds: float = math.inf
    workers: int = 1
    any_size: bool = False


NO_RUNTIME = Runtime(lambda pixels: (pixels,))  # of a run that computes nothing but pixels
SelectRuntime = Callable[[Pixels, int], Runtime]  # given a first batch, and how many images are to be computed


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

    @property
    def kept(self) -> int:
        """How many images have a row once what waits is committed."""
        return int(self._cached.sum())

    def start(self, share: float) -> frozenset[bytes]:
        """Begin a run that books a share of its seconds here; return the contents that have a row already."""
        self.share = share
        before = self.scanned.with_row
        self._with_row = DigestSet(len(before) + len(self.scanned.pending), before)
        self._is_empty = not before
        self._part_started = self._booked = time.monotonic()
        return before

    def take(self, batch: Batch, rows: NDArray[Any]) -> None:
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

    def finish(self, plan: ExtractPlan, lasted: tuple[float, float], runtime: Runtime) -> ExtractReport:
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
        reason = "a copy of a sample that could not be read"
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
        raise DataError(f"{dataset.location}: none of the {total} {dataset.kind}s can be used ({example}).")
    if bad > max(TOLERATED_BAD_IMAGES, max_bad * total):
        raise DataError(
            f"{dataset.location}: {bad} of {total} {dataset.kind}s cannot be used ({example}). The other rows are kept: "
            f"repair the files and run again, or allow it with `max_bad={math.ceil(1000 * bad / total) / 1000}`."
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


def extract(
    files: DatasetFiles,
    writers: Sequence[EntryWriter],
    select: SelectRuntime,
    plan: ExtractPlan,
    beside: tuple[EntryWriter, Transform] | None = None,
) -> list[ExtractReport]:
    """Compute the rows that entries lack in one pass, commit them part by part, then list the images as they are now.

    Killed at any point it loses the parts in flight; run again it goes on. An interrupt commits those too.

    Args:
        files: the images.
        writers: the entries that take the rows.
        select: chooses what computes; called only if anything is computed.
        plan: how the run goes.
        beside: an entry of thumbnails, and their transform: of images that are decoded anyhow its rows are computed too.
            It is not listed: its own pass finds them.

    Raises:
        DataError: too many images cannot be used, or none can.
        StorageError: the disk failed, or will not hold the rows.
    """
    started, cached = time.monotonic(), _begin(writers)
    pending = np.flatnonzero(np.logical_or.reduce([writer.lacks for writer in writers]))
    beside = beside if check_room(writers, pending, plan, beside[0] if beside else None) else None
    thumbnails = _decoded_beside(plan, *beside) if beside else None
    reader = BatchReader(files, pending, plan.preprocess, plan.views, cached, thumbnails)
    going = _Pass(reader, writers, beside[0] if beside and thumbnails else None, len(pending))
    try:
        if len(pending) and plan.remote is not None:
            going.runtime = Runtime(NO_RUNTIME.run, plan.remote(files, pending, cached, writers))
        elif len(pending):
            going.run(select, plan)
        going.commit()  # of all entries before any is listed: whoever is killed meanwhile has the rows
        lasted = started, time.monotonic()
        return [writer.finish(plan, lasted, going.runtime) for writer in writers]
    except BaseException as error:  # an interrupt keeps what was computed
        going.rescue(error)
        raise


def _begin(writers: Sequence[EntryWriter]) -> frozenset[bytes]:
    """Let each entry bear its share of the seconds; return the contents that have a row in all of them."""
    lacking = [len(writer.scanned.pending) for writer in writers]
    shares = [count / max(1, sum(lacking)) for count in lacking]
    return frozenset.intersection(*(writer.start(share) for writer, share in zip(writers, shares, strict=True)))


def _decoded_beside(plan: ExtractPlan, writer: EntryWriter, of_thumbnails: Transform) -> Thumbnails | None:
    """Begin an entry of thumbnails, and return how they are made of what is decoded for a plan anyhow."""
    transform = plan.preprocess.spec
    if not isinstance(transform, Transform):
        return None
    writer.start(0.0)  # the pass is the others' doing: theirs are its seconds
    return Thumbnails(lambda content, views: decode_both(content, transform, views, of_thumbnails), writer.lacks)


class _Pass:
    """One run over images on this machine; ``runtime`` is what computes."""

    def __init__(
        self, reader: BatchReader, writers: Sequence[EntryWriter], thumbnails: EntryWriter | None, images: int
    ) -> None:
        self._reader, self._writers, self._thumbnails, self._images = reader, writers, thumbnails, images
        self._all = [*writers, thumbnails] if thumbnails is not None else writers
        self.runtime = NO_RUNTIME

    def run(self, select: SelectRuntime, plan: ExtractPlan) -> None:
        """Take batches from files to rows; the last of them wait when it ends."""
        started, dataset = time.monotonic(), self._writers[0].files.dataset
        with (
            progress(self._images, f"extract {dataset.name}", dataset.kind) as bar,
            closing(computed(self._reader, select, self._images, plan.batch_size)) as batches,
        ):
            for self.runtime, batch in batches:
                self._take(batch)
                bar.update(len(batch))
                if any(writer.is_due(started) for writer in self._all):
                    self.commit(started)

    def _take(self, batch: Batch) -> None:
        say_left_out(batch.bad)
        for number, writer in enumerate(self._writers):
            writer.take(batch, batch.rows[number] if batch.fresh else np.empty(0))
        if self._thumbnails is not None and batch.beside:
            self._thumbnails.take_rows(np.array(batch.beside, np.int64), np.concatenate(batch.thumbnails))

    def commit(self, started: float | None = None) -> None:
        """Let entries keep the rows that wait: all of them, or where a run that has ``started`` then owes it."""
        if self._thumbnails is not None:  # first: what has all of its rows is not looked at again for them
            self._thumbnails.commit("")
        for writer in self._writers:
            if started is None or writer.is_due(started):
                writer.commit(self.runtime.name)

    def rescue(self, ended_by: BaseException) -> None:
        """Let each entry keep what waits as far as it can; of an interrupt say how much: what went wrong first is told."""
        for writer in self._all:
            try:
                writer.commit("" if writer is self._thumbnails else self.runtime.name)
            except StorageError as error:
                logger.warning("%s", error)
                ended_by = error
        if self._images and isinstance(ended_by, KeyboardInterrupt):
            kept, files = min(writer.kept for writer in self._writers), self._writers[0].files
            logger.warning("%d of %d %ss are computed and kept", kept, len(files), files.dataset.kind)


def measure(files: DatasetFiles, positions: Positions, plan: ExtractPlan, runtime: Runtime, blank: NDArray[Any]) -> float:
    """Return the seconds that computing some samples would take, from a first batch in one worker, after a ``blank`` one."""
    runtime.run(blank)  # what is computed first takes longer
    started = time.perf_counter()
    batch = BatchReader(files, positions, plan.preprocess, plan.views).fill(plan.batch_size)
    if not batch.fresh:
        return 0.0
    compute(batch, runtime, plan.batch_size)
    return (time.perf_counter() - started) / len(batch) * len(positions) / runtime.workers


def check_room(
    writers: Sequence[EntryWriter], pending: Positions, plan: ExtractPlan, thumbnails: EntryWriter | None = None
) -> bool:
    """Say how much will be computed and written; tell whether thumbnails are among it: some are lacking and have room.

    Raises:
        StorageError: an entry's disk has less room than its rows need.
    """
    images = len(pending)
    total = sum(images * plan.views.count * int(np.prod(writer.row)) * np.dtype(writer.dtype).itemsize for writer in writers)
    free = min(shutil.disk_usage(writer.store.path).free for writer in writers)
    if total > free:
        raise StorageError(
            f"{writers[0].store.path}: {total / 1e9:.1f} GB would be written ({total / images / 1e3:.0f} kB a sample), "
            f"{free / 1e9:.1f} GB are free. Use another `cache` or a later cut."
        )
    more = int(thumbnails.lacks[pending].sum() * np.prod(thumbnails.row)) if thumbnails is not None else 0
    takes_thumbnails = more > 0 and 2 * (total + more) <= free  # a table is as large as the rows that it is made of
    if images:
        total += more if takes_thumbnails else 0
        purpose = f"{plan.purpose}: " if plan.purpose else ""
        size = (bytes_text(total), total / images / 1e3)
        also = f", thumbnails{'' if purpose else ' for the baselines'} with them" if takes_thumbnails else ""
        kind = writers[0].scanned.files.dataset.kind + ("s" if images > 1 else "")
        logger.info("%s%d %s to compute, %s to write (%.1f kB each)%s", purpose, images, kind, *size, also)
    return takes_thumbnails


@contextmanager
def reading_ahead(reader: BatchReader, size: int, room: int = _AHEAD_BYTES) -> Iterator[deque[Batch]]:
    """Yield a queue that one thread fills with batches, up to ``room`` bytes of pixels, as long as the block lasts."""
    batches: deque[Batch] = deque()
    stop = threading.Event()

    def read() -> None:
        free = room
        while free > 0 and len(batch := reader.fill(size, stop.is_set)):
            batches.append(batch)
            free -= sum(pixels.nbytes for pixels in batch.pixels)

    with ThreadPoolExecutor(1) as beside:
        reading = beside.submit(read)
        try:
            yield batches
        finally:
            stop.set()
    reading.result()


def filled_up(pixels: Sequence[Pixels], size: int) -> Pixels:
    """Return images (views, h, w, 3) as one array of ``size``, the last of them repeated: rows do not depend on company."""
    return np.stack([*pixels, *[pixels[-1]] * (size - len(pixels))])


def sample(batch: Batch, size: int) -> Pixels:
    """Return what a runtime is made ready with: a batch of ``size`` images, uint8 (size, h, w, 3)."""
    pixels = filled_up(batch.pixels[:size], size)
    return pixels.reshape(-1, *pixels.shape[2:])[:size]


def compute(batch: Batch, runtime: Runtime, size: int) -> Batch:
    """Give a batch its rows and drop its pixels."""
    if batch.fresh:
        run = runtime.run
        size = len(batch.fresh) if runtime.any_size else size
        pixels = filled_up(batch.pixels, size)
        flat, views = pixels.reshape(-1, *pixels.shape[2:]), pixels.shape[1]
        pieces = [run(flat[start : start + size]) for start in range(0, len(flat), size)]
        joined = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]
        shaped = (rows.reshape(size, views, *rows.shape[1:]) if views > 1 else rows for rows in joined)
        batch.rows = tuple(rows[: len(batch.fresh)] for rows in shaped)
    batch.pixels = []
    return batch


def beside_pixels(cuts: Sequence[str], run: Callable[[Pixels], Rows] | None) -> Callable[[Pixels], Rows]:
    """Return what computes all cuts, given what computes those behind the input."""

    def both(pixels: Pixels) -> Rows:
        rows = iter(run(pixels) if run else ())
        return tuple(pixels if cut == INPUT else next(rows) for cut in cuts)

    return both


def computed(
    reader: BatchReader, select: SelectRuntime, images: int, size: int
) -> Generator[tuple[Runtime, Batch], None, None]:
    """Yield batches with their rows, and what has computed them: chosen with the first, while others are read already."""
    first, runtime = reader.fill(size), NO_RUNTIME
    ahead: deque[Batch] = deque()
    if first.fresh:
        # making a runtime ready takes seconds that would be lost to reading
        with reading_ahead(reader, size) as ahead:
            runtime = select(sample(first, size), images)
    ahead.appendleft(first)
    del first  # its pixels would be held to the end
    with closing(run_batches(reader, runtime, size, ahead)) as batches:
        for batch in batches:
            yield runtime, batch


def run_batches(
    reader: BatchReader, runtime: Runtime, size: int, read_already: deque[Batch]
) -> Generator[Batch, None, None]:
    """Yield batches with their rows as workers finish them; closing it stops the workers.

    Those read already come first, filled up where reading was broken off; taken out of their queue they are not held twice.
    """
    results: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=2 * runtime.workers)
    stop = threading.Event()

    def work() -> None:
        begun, last = None, None
        try:
            while not stop.is_set():
                with suppress(IndexError):  # not asked whether there is one: another worker may take it meanwhile
                    begun = read_already.popleft()
                batch, begun = reader.fill(size, stop.is_set, begun), None
                if not len(batch):
                    break
                results.put(compute(batch, runtime, size))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            last = error
        results.put(last)

    threads = [threading.Thread(target=work, name=f"featcache-{n}", daemon=True) for n in range(runtime.workers)]

    def end() -> None:
        stop.set()
        _drain(results, threads)

    # Whoever leaves the generator where it is: at the interpreter's end a thread inside PyTorch would abort it.
    atexit.register(end)
    for thread in threads:
        thread.start()
    working = len(threads)
    try:
        while working:
            result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is not None:
                yield result
            else:
                working -= 1
    finally:
        atexit.unregister(end)
        end()


def _drain(results: "queue.Queue[Any]", threads: Sequence[threading.Thread]) -> None:
    while any(thread.is_alive() for thread in threads):
        try:
            results.get(timeout=0.05)
        except queue.Empty:
            continue
