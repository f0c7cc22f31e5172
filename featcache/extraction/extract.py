"""Run a frozen prefix once over the images of a data set and keep its rows."""

import shutil
import time
import zlib
from collections.abc import Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import Dataset
from featcache.display import logger, progress
from featcache.errors import StorageError
from featcache.extraction.loader import (
    NO_RUNTIME,
    Batch,
    BatchReader,
    Runtime,
    SelectRuntime,
    Thumbnails,
    compute,
    computed,
)
from featcache.extraction.scan import DatasetFiles, Positions
from featcache.extraction.writer import EntryWriter, ExtractPlan, ExtractReport, say_left_out
from featcache.specs import Transform

if TYPE_CHECKING:
    from featcache.extraction.ray_engine import WorkerConfig


def positions_of(dataset: Dataset, part: tuple[int, int]) -> Positions:
    """Return the images that belong to a part (i, n), by the checksum of their paths."""
    paths = (dataset.table.path(position) for position in range(len(dataset.samples)))
    shares = [zlib.crc32(path.encode("utf-8", "surrogateescape")) % part[1] for path in paths]
    return np.flatnonzero(np.array(shares) == part[0] - 1)


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
    started = time.monotonic()
    lacking = sum(len(writer.scanned.pending) for writer in writers)
    cached = frozenset.intersection(*(writer.start(len(writer.scanned.pending) / max(1, lacking)) for writer in writers))
    pending = np.flatnonzero(np.logical_or.reduce([writer.lacks for writer in writers]))
    check_room(writers, len(pending), plan, beside[0] if beside else None)
    runtime = NO_RUNTIME
    if len(pending) and plan.remote is not None:
        runtime = _compute_remotely(files, pending, cached, writers, plan.remote)
    elif len(pending):
        thumbnails = None
        if beside is not None and isinstance(transform := plan.preprocess.spec, Transform):
            beside[0].start(0.0)  # the pass is the others' doing: theirs are its seconds
            thumbnails = Thumbnails(transform, beside[1], beside[0].lacks)
        reader = BatchReader(files, pending, plan.preprocess, plan.views, cached, thumbnails)
        runtime = _Pass(reader, writers, beside[0] if beside else None, len(pending)).run(select, plan)
    lasted = started, time.monotonic()
    return [writer.finish(plan, lasted, runtime) for writer in writers]


class _Pass:
    """One run over images on this machine."""

    def __init__(
        self, reader: BatchReader, writers: Sequence[EntryWriter], thumbnails: EntryWriter | None, images: int
    ) -> None:
        self._reader, self._writers, self._thumbnails, self._images = reader, writers, thumbnails, images

    def run(self, select: SelectRuntime, plan: ExtractPlan) -> Runtime:
        """Take batches from files to rows; return what computed them."""
        started, runtime = time.monotonic(), NO_RUNTIME
        name = self._writers[0].files.dataset.name
        try:
            with (
                progress(self._images, f"extract {name}") as bar,
                closing(computed(self._reader, select, self._images, plan.batch_size)) as batches,
            ):
                for runtime, batch in batches:
                    self._take(batch)
                    bar.update(len(batch))
                    if any(writer.is_due(started) for writer in self._writers):
                        self._commit(runtime, started)
        finally:  # an interrupt keeps what was computed
            self._commit(runtime)
        return runtime

    def _take(self, batch: Batch) -> None:
        say_left_out(batch.bad)
        for number, writer in enumerate(self._writers):
            writer.take(batch, batch.rows[number] if batch.fresh else np.empty(0))
        if self._thumbnails is not None and batch.beside:
            self._thumbnails.take_rows(np.array(batch.beside, np.int64), np.concatenate(batch.thumbnails))

    def _commit(self, runtime: Runtime, started: float | None = None) -> None:
        for writer in self._writers:
            if started is None or writer.is_due(started):
                writer.commit(runtime.name)
        if self._thumbnails is not None:
            self._thumbnails.commit("")


def _compute_remotely(
    files: DatasetFiles, pending: Positions, cached: frozenset[bytes], writers: Sequence[EntryWriter], config: "WorkerConfig"
) -> Runtime:
    from featcache.extraction import ray_engine

    with (
        progress(len(pending), f"extract {files.dataset.name}") as bar,
        closing(ray_engine.run(files.dataset, pending.tolist(), cached, config)) as units,
    ):
        for written in units:
            files.learn(written.positions, written.files)
            for number, writer in enumerate(writers):
                writer.adopt(written, number)
            bar.update(written.images)
    return Runtime(NO_RUNTIME.run, "ray")


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
