"""Extraction on a Ray cluster: decoding on CPUs, a pool of backbone actors, each part written where it was computed.

Features never pass through the driver: an actor writes its part into the entry and returns the part's name. A part's rows
depend on its images alone, so that a unit of work that was lost is simply done again. The cache must be on a file system
that all nodes share, and so must the images.
"""

import os
import pickle
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import Dataset
from featcache.display import logger, progress
from featcache.errors import SetupError, UsageError
from featcache.extraction.extract import (
    NO_RUNTIME,
    EntryWriter,
    Runtime,
    Workers,
    beside_pixels,
    compute,
    in_dtype,
    not_finite,
    sample,
)
from featcache.extraction.files import Batch, BatchReader, DatasetFiles, Pixels, Positions
from featcache.specs import INPUT, BackboneSpec, LoadedBackbone, RuntimeName, StoredDtype, Views
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import FileIndex, Part
from featcache.store.manifests import FileRecord, Quarantined

if TYPE_CHECKING:
    from featcache.backbones.base import Preprocess

UNIT = 1024
_RETRIES = 3


@dataclass(frozen=True)
class WorkerConfig:
    """What an actor needs to compute as this process would: the backbone as asked for and as it must turn out."""

    spec: BackboneSpec
    loaded: LoadedBackbone | None
    cuts: tuple[str, ...]
    entries: tuple[Path, ...]
    dtypes: tuple[StoredDtype, ...]
    preprocess: "Preprocess"
    views: Views
    batch_size: int
    device: str | None
    runtime: RuntimeName
    actors: int | None


@dataclass(frozen=True)
class WrittenPart:
    """A unit of work that is on disk: a part for each entry (``None`` where no row was good), and what was seen.

    ``good`` are positions of images that have a row, entry by entry; ``files`` (k,) is what was found at ``positions`` (k,).
    """

    parts: tuple[FileRecord | None, ...]
    good: tuple[Positions, ...]
    copies: Positions
    bad: tuple[tuple[Quarantined, ...], ...]
    images: int
    positions: Positions
    files: FileIndex


@dataclass(frozen=True)
class DecodedUnit:
    """A unit's images, decoded: pixels (b, views, h, w, 3) of ``fresh`` images, and what was seen on the way."""

    pixels: Pixels
    fresh: Positions
    copies: Positions
    bad: tuple[Quarantined, ...]
    files: FileIndex  # of the fresh ones, then of the copies


def compute_remotely(
    config: WorkerConfig, files: DatasetFiles, pending: Positions, cached: frozenset[bytes], writers: Sequence[EntryWriter]
) -> str:
    """Let a cluster compute what entries lack, and make its parts count; return what computed them.

    Raises:
        SetupError: Ray is not installed.
        UsageError: the data set lives in this process alone.
    """
    with (
        progress(len(pending), f"extract {files.dataset.name}") as bar,
        closing(run(files.dataset, pending.tolist(), cached, config)) as units,
    ):
        for written in units:
            files.learn(written.positions, written.files)
            for number, writer in enumerate(writers):
                writer.adopt(written, number)
            bar.update(written.images)
    return "ray"


def run(
    dataset: Dataset, positions: Sequence[int], cached: frozenset[bytes], config: WorkerConfig
) -> Generator[WrittenPart, None, None]:
    """Yield units of work as actors finish them; the caller commits them.

    Raises:
        SetupError: Ray is not installed.
        UsageError: the data set lives in this process alone.
    """
    try:
        import ray
    except ImportError:
        raise SetupError("`engine` ray needs Ray: `pip install 'featcache[ray]'`.") from None
    try:
        pickle.dumps(dataset)
    except Exception as error:
        raise UsageError(f"{dataset.location}: `engine` ray cannot send it to other nodes. Use files or shards.") from error
    started_here = not ray.is_initialized()
    if started_here:
        before = os.environ.get("RAY_USAGE_STATS_ENABLED")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield from _run(ray, dataset, positions, cached, config)
    finally:
        if started_here:
            ray.shutdown()
            if before is None:  # the caller's environment is left as it was
                os.environ.pop("RAY_USAGE_STATS_ENABLED", None)


def _run(
    ray: Any, dataset: Dataset, positions: Sequence[int], cached: frozenset[bytes], config: WorkerConfig
) -> Generator[WrittenPart, None, None]:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    on_gpu = gpus > 0 and (config.device or "cuda").startswith("cuda")
    count = config.actors or (gpus if on_gpu else max(1, cpus // 2))
    cores = min(1.0, cpus / (2 * count))
    share = {"num_gpus": 1} if on_gpu else {"num_cpus": cores}
    actor = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **share)(_Actor)
    decode = ray.remote(num_cpus=cores, max_retries=_RETRIES)(decode_unit)
    shared, without = ray.put(dataset), ray.put(cached)
    actors = [actor.remote(config, len(positions) // count) for _ in range(count)]
    size = max(config.batch_size, min(UNIT, -(-len(positions) // (4 * count))))
    units = [list(positions[start : start + size]) for start in range(0, len(positions), size)]
    logger.debug("ray: %d units of %d images, %d actors of %s", len(units), size, count, share)
    waiting: dict[Any, int] = {}
    load = [0] * count
    feed = iter(units)
    while True:
        while sum(load) < 2 * count and (unit := next(feed, None)) is not None:
            which = int(np.argmin(load))
            pixels = decode.remote(shared, unit, config.preprocess, config.views, without)
            waiting[actors[which].work.remote(pixels)] = which
            load[which] += 1
        if not waiting:
            return
        (finished,), _ = ray.wait(list(waiting), num_returns=1)
        load[waiting.pop(finished)] -= 1
        yield ray.get(finished)


def decode_unit(
    dataset: Dataset, positions: Sequence[int], preprocess: "Preprocess", views: Views, cached: frozenset[bytes]
) -> DecodedUnit:
    """Return a unit's images, decoded."""
    files = DatasetFiles(replace(dataset, samples=[dataset.samples[position] for position in positions]))
    batch = BatchReader(files, range(len(positions)), preprocess, views, cached).fill(len(positions))
    pixels = np.stack(batch.pixels) if batch.pixels else np.empty((0, 1, 1, 1, 3), np.uint8)
    fresh, copies = (np.array(numbers, np.int64) for numbers in (batch.fresh, batch.copies))
    looked_at = np.concatenate([fresh, copies])
    newest = int(files.index(looked_at, 0).stat[:, [1, 3]].max(initial=0))  # by the clock that dates the files
    at = np.asarray(positions, np.int64)
    return DecodedUnit(pixels, at[fresh], at[copies], tuple(batch.bad), files.index(looked_at, newest))


class _Actor:
    """Holds one loaded backbone and writes the parts that it computes."""

    def __init__(self, config: WorkerConfig, images: int) -> None:
        self._config = config
        self._stores = [FeatureStore.open(path) for path in config.entries]
        self._computed = [cut for cut in config.cuts if cut != INPUT]
        self._images = images
        self._runtime: Runtime | None = None

    def _prepare(self, first: NDArray[np.uint8]) -> None:
        import torch

        from featcache.backbones import open_backbone
        from featcache.extraction.runtimes import runtime_of

        torch.set_num_threads(1)
        device = torch.device(self._config.device) if self._config.device else None
        backbone = open_backbone(self._config.spec, device)
        if backbone.loaded != self._config.loaded:
            raise SetupError(f"`engine` ray: {backbone.spec.name} has other weights on this node than on the driver.")
        config = self._config
        self._runtime = runtime_of(backbone, self._computed, first, self._images, config.runtime, Workers(1, 1))

    def work(self, unit: DecodedUnit) -> WrittenPart:
        """Compute a unit and write its parts."""
        size, count = self._config.batch_size, len(unit.fresh)
        collected: list[list[NDArray[Any]]] = [[] for _ in self._config.cuts]
        for start in range(0, count, size):
            piece = Batch(fresh=unit.fresh[start : start + size].tolist(), pixels=list(unit.pixels[start : start + size]))
            if self._computed and self._runtime is None:
                self._prepare(sample(piece, size))
            runtime = self._runtime or NO_RUNTIME
            run = beside_pixels(self._config.cuts, runtime.run if self._computed else None)
            compute(piece, replace(runtime, run=run), size)
            for rows, new in zip(collected, piece.rows, strict=True):
                rows.append(new)
        parts: list[FileRecord | None] = []
        good: list[Positions] = []
        bad: list[tuple[Quarantined, ...]] = []
        files = unit.files.take(np.arange(count))
        for store, dtype, rows in zip(self._stores, self._config.dtypes, collected, strict=True):
            record, finite, unusable = write_part(store, dtype, rows, files, self._runtime.name if self._runtime else "")
            parts.append(record)
            good.append(unit.fresh[finite])
            bad.append((*unit.bad, *unusable))
        positions = np.concatenate([unit.fresh, unit.copies])
        images = len(positions) + len(unit.bad)
        return WrittenPart(tuple(parts), tuple(good), unit.copies, tuple(bad), images, positions, unit.files)


def write_part(
    store: FeatureStore, dtype: StoredDtype, pieces: Sequence[NDArray[Any]], files: FileIndex, runtime: str
) -> tuple[FileRecord | None, NDArray[np.bool_], list[Quarantined]]:
    """Write rows as a part, not yet committed, but for those that are not finite in its dtype: return which are."""
    if not len(files):
        return None, np.zeros(0, bool), []
    rows, finite = in_dtype(pieces, dtype)
    unusable = files.take(~finite)
    bad = not_finite(unusable.paths, [row.tobytes() for row in unusable.sha256], dtype)
    record = store.add_part(Part([rows[finite]], files.take(finite)), runtime) if finite.any() else None
    return record, finite, bad
