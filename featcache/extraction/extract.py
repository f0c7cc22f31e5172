"""One pass of a frozen prefix over the images of a data set: workers take batches from files to rows, entries keep them.

A worker takes a batch from file to rows without handing anything over, so that all cores stay busy and nothing waits for
anything but the feed of paths and the queue of results.
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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.images import decode_both
from featcache.display import logger, progress
from featcache.errors import StorageError
from featcache.extraction.files import Batch, BatchReader, DatasetFiles, Pixels, Positions, Rows, Thumbnails
from featcache.extraction.writer import EntryWriter, ExtractPlan, ExtractReport, say_left_out
from featcache.resources import cores
from featcache.specs import INPUT, Transform

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
    check_room(writers, len(pending), plan, beside[0] if beside else None)
    thumbnails = _decoded_beside(plan, *beside) if beside and len(pending) else None
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
    except BaseException:  # an interrupt keeps what was computed
        going.rescue()
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
        self.runtime = NO_RUNTIME

    def run(self, select: SelectRuntime, plan: ExtractPlan) -> None:
        """Take batches from files to rows; the last of them wait when it ends."""
        started, name = time.monotonic(), self._writers[0].files.dataset.name
        with (
            progress(self._images, f"extract {name}") as bar,
            closing(computed(self._reader, select, self._images, plan.batch_size)) as batches,
        ):
            for self.runtime, batch in batches:
                self._take(batch)
                bar.update(len(batch))
                if any(writer.is_due(started) for writer in self._writers):
                    self.commit(started)

    def _take(self, batch: Batch) -> None:
        say_left_out(batch.bad)
        for number, writer in enumerate(self._writers):
            writer.take(batch, batch.rows[number] if batch.fresh else np.empty(0))
        if self._thumbnails is not None and batch.beside:
            self._thumbnails.take_rows(np.array(batch.beside, np.int64), np.concatenate(batch.thumbnails))

    def commit(self, started: float | None = None) -> None:
        """Let entries keep the rows that wait: all of them, or where a run that has ``started`` then owes it."""
        for writer in self._writers:
            if started is None or writer.is_due(started):
                writer.commit(self.runtime.name)
        if self._thumbnails is not None:
            self._thumbnails.commit("")

    def rescue(self) -> None:
        """Let each entry keep what waits as far as it can: what went wrong first is what is told."""
        for writer in [*self._writers, *([self._thumbnails] if self._thumbnails is not None else [])]:
            try:
                writer.commit("" if writer is self._thumbnails else self.runtime.name)
            except StorageError as error:
                logger.warning("%s", error)


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
    writers: Sequence[EntryWriter], images: int, plan: ExtractPlan, thumbnails: EntryWriter | None = None
) -> None:
    """Say how much will be computed and written; refuse what a disk cannot hold.

    Raises:
        StorageError: an entry's disk has less room than its rows need.
    """
    sizes = [images * plan.views.count * int(np.prod(writer.row)) * np.dtype(writer.dtype).itemsize for writer in writers]
    if thumbnails is not None:
        sizes.append(int(thumbnails.lacks.sum() * np.prod(thumbnails.row)))
    total = sum(sizes)
    for writer in writers:
        free = shutil.disk_usage(writer.store.path).free
        if total > free:
            raise StorageError(
                f"{writer.store.path}: {total / 1e9:.1f} GB would be written ({total / images / 1e3:.0f} kB an image), "
                f"{free / 1e9:.1f} GB are free. Use another `cache` or a later cut."
            )
    if images:
        purpose = f"{plan.purpose}: " if plan.purpose else ""
        size = (total / 1e6, total / images / 1e3)
        also = ", thumbnails for the baselines with them" if thumbnails is not None else ""
        kind = writers[0].scanned.files.dataset.kind
        logger.info("%s%d %ss to compute, %.1f MB to write (%.1f kB each)%s", purpose, images, kind, *size, also)


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
