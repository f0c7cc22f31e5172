"""The flow of one machine: worker threads that read, decode and compute whole batches, each by itself.

A worker takes a batch from file to rows without handing anything over, so that all cores stay busy and nothing waits for
anything but the feed of paths and the queue of results.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import Dataset, FileStat
from featcache.datasets.images import UnreadableImage, decode
from featcache.extraction.lookup import FileIndex, quarantine_unread, settled
from featcache.fingerprint import DigestSet, sha256_of_bytes
from featcache.specs import INPUT, StoredDtype, Transform, Views
from featcache.store.manifests import Quarantined

Pixels = NDArray[np.uint8]
Rows = tuple[NDArray[Any], ...]
_SMALL_SECONDS = 0.6e-3  # to read and decode an image
_AHEAD_BYTES = 256 << 20

Compute = Callable[[Pixels], Rows]


@dataclass
class Batch:
    """Images on their way: ``pixels`` uint8 (b, views, h, w, 3) belong to ``fresh``; ``copies`` have their row elsewhere."""

    fresh: list[tuple[int, bytes, FileStat | None]] = field(default_factory=list)
    copies: list[tuple[int, bytes, FileStat | None]] = field(default_factory=list)
    bad: list[Quarantined] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    rows: Rows = ()

    def __len__(self) -> int:
        """Return the number of images looked at."""
        return len(self.fresh) + len(self.copies) + len(self.bad)

    @property
    def sighted(self) -> FileIndex:
        """The images that have a row here."""
        return FileIndex.of(self.fresh)


class BatchReader:
    """Fills batches from a shared feed of positions; many threads may fill at once.

    Args:
        dataset: the images.
        positions: which of its items, in this order.
        transform: how files become pixels.
        views: how many views of each.
        done: the SHA-256 of images that need no row.
    """

    def __init__(
        self,
        dataset: Dataset,
        positions: Sequence[int] | NDArray[np.int64],
        transform: Transform,
        views: Views,
        done: Collection[bytes],
    ) -> None:
        self._dataset = dataset
        self._feed = iter(positions)
        self._transform = transform
        self._views = views
        self._claimed = DigestSet(len(done) + len(positions), done)
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
        path, digest = self._dataset.table.path(position), b""
        try:
            stat = settled(self._dataset.stat(path))
            content = self._dataset.read(path)
            digest = bytes.fromhex(sha256_of_bytes(content))
            with self._lock:
                is_new = self._claimed.add(digest)
            if not is_new:
                batch.copies.append((position, digest, stat))
                return
            batch.pixels.append(self._decoded(content))
            batch.fresh.append((position, digest, stat))
        except OSError as error:
            batch.bad.append(quarantine_unread(path, error))
        except UnreadableImage as error:
            batch.bad.append(Quarantined(path, digest.hex(), str(error)))
        except Exception as error:  # noqa: BLE001 - one image never ends a run, whatever a reader raises
            batch.bad.append(Quarantined(path, digest.hex(), f"{type(error).__name__}: {error}"))

    def _decoded(self, content: bytes) -> Pixels:
        try:
            return decode(content, self._transform, self._views)
        except MemoryError:
            with self._lock:  # the others come to rest at the feed: once more, with their room
                return decode(content, self._transform, self._views)


@contextmanager
def reading_ahead(reader: BatchReader, size: int, room: int = _AHEAD_BYTES) -> Iterator[deque[Batch]]:
    """Yield a queue that one thread fills with batches, up to ``room`` bytes of pixels, as long as the block lasts."""
    batches: deque[Batch] = deque()
    stop = threading.Event()

    def read() -> None:
        left = room
        while left > 0 and len(batch := reader.fill(size, stop.is_set)):
            batches.append(batch)
            left -= sum(pixels.nbytes for pixels in batch.pixels)

    with ThreadPoolExecutor(1) as beside:
        done = beside.submit(read)
        try:
            yield batches
        finally:
            stop.set()
    done.result()


def filled_up(pixels: Sequence[Pixels], size: int) -> Pixels:
    """Return images (views, h, w, 3) as one array of ``size``, the last of them repeated: rows do not depend on company."""
    return np.stack([*pixels, *[pixels[-1]] * (size - len(pixels))])


def sample(batch: Batch, size: int) -> Pixels:
    """Return what a runtime is made ready with: a batch of ``size`` images, uint8 (size, h, w, 3)."""
    pixels = filled_up(batch.pixels[:size], size)
    return pixels.reshape(-1, *pixels.shape[2:])[:size]


def compute(batch: Batch, run: Compute, size: int) -> Batch:
    """Give a batch its rows and drop its pixels."""
    if batch.fresh:
        pixels = filled_up(batch.pixels, size)
        flat, views = pixels.reshape(-1, *pixels.shape[2:]), pixels.shape[1]
        pieces = [run(flat[start : start + size]) for start in range(0, len(flat), size)]
        joined = [np.concatenate(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True)]
        shaped = (rows.reshape(size, views, *rows.shape[1:]) if views > 1 else rows for rows in joined)
        batch.rows = tuple(rows[: len(batch.fresh)] for rows in shaped)
    batch.pixels = []
    return batch


def beside_pixels(cuts: Sequence[str], run: Compute | None) -> Compute:
    """Return what computes all cuts, given what computes those behind the input."""

    def both(pixels: Pixels) -> Rows:
        rows = iter(run(pixels) if run else ())
        return tuple(pixels if cut == INPUT else next(rows) for cut in cuts)

    return both


def in_dtype(several: Sequence[NDArray[Any]], dtype: StoredDtype) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return rows as they will be stored, and which of them are finite."""
    with np.errstate(over="ignore"):
        rows = (several[0] if len(several) == 1 else np.concatenate(several)).astype(dtype, copy=False)
    if dtype == "uint8":
        return rows, np.ones(len(rows), dtype=bool)
    return rows, np.isfinite(rows.reshape(len(rows), -1)).all(axis=1)


def not_finite(dataset: Dataset, sighted: FileIndex, dtype: StoredDtype) -> list[Quarantined]:
    """Return the places in quarantine of images whose activations overflow."""
    better = ", try dtype float32" if dtype == "float16" else ""
    reason = f"its activations are not finite in {dtype}{better}"
    return [
        Quarantined(dataset.samples[index].path, digest.hex(), reason)
        for index, digest in zip(sighted.index, sighted.digests(), strict=True)
    ]


def run_batches(
    reader: BatchReader, run: Compute, size: int, workers: int, read_already: deque[Batch]
) -> Generator[Batch, None, None]:
    """Yield batches with their rows as workers finish them; closing it stops the workers.

    Those read already come first, filled up where reading was broken off, and are taken out of their queue, so that their
    rows are not held twice.
    """
    results: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=2 * workers)
    stop = threading.Event()

    def work() -> None:
        last: BaseException | None = None
        try:
            while not stop.is_set():
                try:
                    begun = read_already.popleft()
                except IndexError:
                    begun = None
                batch = reader.fill(size, stop.is_set, begun)
                if not len(batch):
                    break
                results.put(compute(batch, run, size))
        except BaseException as error:  # noqa: BLE001 - it is raised again in the main thread
            last = error
        results.put(last)

    threads = [threading.Thread(target=work, name=f"featcache-{number}", daemon=True) for number in range(workers)]
    for thread in threads:
        thread.start()
    left = len(threads)
    try:
        while left:
            got = results.get()
            if isinstance(got, Batch):
                yield got
            elif got is None:
                left -= 1
            else:
                left -= 1
                raise got
    finally:
        stop.set()
        _drain(results, threads)


def _drain(results: "queue.Queue[Any]", threads: Sequence[threading.Thread]) -> None:
    while any(thread.is_alive() for thread in threads):
        try:
            results.get(timeout=0.05)
        except queue.Empty:
            continue
