"""Worker threads that read, decode and compute whole batches, each by itself.

A worker takes a batch from file to rows without handing anything over, so that all cores stay busy and nothing waits for
anything but the feed of paths and the queue of results.
"""

import atexit
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.images import decode_both
from featcache.errors import UnreadableSample
from featcache.extraction.scan import DatasetFiles, Positions, quarantine_unread
from featcache.fingerprint import DigestSet
from featcache.resources import cores
from featcache.specs import INPUT, Transform, Views
from featcache.store.manifests import Quarantined

if TYPE_CHECKING:
    from featcache.backbones.base import Preprocess

Pixels = NDArray[np.uint8]
Rows = tuple[NDArray[Any], ...]
_SMALL_SECONDS = 0.6e-3  # to read and decode an image; below it the interpreter's share is most of the work
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
    """What is decoded beside the images ``of`` a transform: by another, for the files that it is ``asked`` of (n,)."""

    of: Transform
    transform: Transform
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
        return decode_both(content, beside.of, self._views, beside.transform)


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


SelectRuntime = Callable[[Pixels, int], Runtime]  # given a first batch, and how many images are to be computed


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
