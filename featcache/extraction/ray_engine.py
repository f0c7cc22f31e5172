"""Extraction on a Ray cluster: decoding on CPUs, a pool of backbone actors, each part written where it was computed.

Features never pass through the driver: an actor writes its part into the entry and returns the part's name. A part's rows
depend on its images alone, so that a unit of work that was lost is simply done again. The cache must be on a file system
that all nodes share, and so must the images.
"""

import os
import pickle
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import Dataset
from featcache.errors import SetupError, UsageError
from featcache.extraction.loader import Batch, BatchReader, beside_pixels, compute, in_dtype, not_finite, sample
from featcache.extraction.lookup import FileIndex
from featcache.progress import logger
from featcache.specs import INPUT, BackboneSpec, LoadedBackbone, RuntimeName, StoredDtype, Transform, Views
from featcache.store.entry import FeatureStore
from featcache.store.hdf5 import Part
from featcache.store.manifests import FileRecord, Quarantined

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
    transform: Transform
    views: Views
    batch_size: int
    device: str | None
    runtime: RuntimeName
    actors: int | None


@dataclass(frozen=True)
class WrittenPart:
    """A unit of work that is on disk: a part for each entry (``None`` where no row was good), and what was seen."""

    parts: tuple[FileRecord | None, ...]
    good: tuple[FileIndex, ...]
    copies: FileIndex
    bad: tuple[tuple[Quarantined, ...], ...]
    images: int


def run(
    dataset: Dataset, positions: Sequence[int], done: set[bytes], recipe: WorkerConfig
) -> Generator[WrittenPart, None, None]:
    """Yield units of work as actors finish them; the caller commits them.

    Raises:
        SetupError: Ray is not installed.
        UsageError: the source lives in this process alone.
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
        yield from _run(ray, dataset, positions, done, recipe)
    finally:
        if started_here:
            ray.shutdown()
            if before is None:  # the caller's environment is left as it was
                os.environ.pop("RAY_USAGE_STATS_ENABLED", None)


def _run(
    ray: Any, dataset: Dataset, positions: Sequence[int], done: set[bytes], recipe: WorkerConfig
) -> Generator[WrittenPart, None, None]:
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
    on_gpu = gpus > 0 and (recipe.device or "cuda").startswith("cuda")
    count = recipe.actors or (gpus if on_gpu else max(1, cpus // 2))
    cores = min(1.0, cpus / (2 * count))
    share = {"num_gpus": 1} if on_gpu else {"num_cpus": cores}
    actor = ray.remote(max_restarts=_RETRIES, max_task_retries=_RETRIES, **share)(_Actor)
    decode = ray.remote(num_cpus=cores, max_retries=_RETRIES)(decode_unit)
    shared, cached = ray.put(dataset), ray.put(done)
    actors = [actor.remote(recipe, len(positions) // count) for _ in range(count)]
    size = max(recipe.batch_size, min(UNIT, -(-len(positions) // (4 * count))))
    units = [list(positions[start : start + size]) for start in range(0, len(positions), size)]
    logger.debug("ray: %d units of %d images, %d actors of %s", len(units), size, count, share)
    waiting: dict[Any, int] = {}
    load = [0] * count
    feed = iter(units)
    while True:
        while sum(load) < 2 * count and (unit := next(feed, None)) is not None:
            which = int(np.argmin(load))
            pixels = decode.remote(shared, unit, recipe.transform, recipe.views, cached)
            waiting[actors[which].work.remote(shared, pixels)] = which
            load[which] += 1
        if not waiting:
            return
        (ready,), _ = ray.wait(list(waiting), num_returns=1)
        load[waiting.pop(ready)] -= 1
        yield ray.get(ready)


def decode_unit(dataset: Dataset, positions: Sequence[int], transform: Transform, views: Views, done: set[bytes]) -> Batch:
    """Return a unit's images, decoded."""
    batch = BatchReader(dataset, positions, transform, views, done).fill(len(positions))
    batch.pixels = [np.stack(batch.pixels)] if batch.pixels else []
    return batch


class _Actor:
    """Holds one loaded backbone and writes the parts that it computes."""

    def __init__(self, recipe: WorkerConfig, images: int) -> None:
        self._recipe = recipe
        self._stores = [FeatureStore.open(path) for path in recipe.entries]
        self._computed = [cut for cut in recipe.cuts if cut != INPUT]
        self._images = images
        self._run: Any = None
        self._runtime = ""

    def _prepare(self, first: NDArray[np.uint8]) -> None:
        import torch

        from featcache.backbones.timm_models import load_backbone
        from featcache.extraction.runtimes import Workers, choose

        torch.set_num_threads(1)
        device = torch.device(self._recipe.device) if self._recipe.device else None
        backbone = load_backbone(self._recipe.spec, device)
        if backbone.loaded != self._recipe.loaded:
            raise SetupError(f"`engine` ray: {backbone.spec.name} has other weights on this node than on the driver.")
        chosen = choose(
            backbone.program(self._computed),
            first,
            images_left=self._images,
            wish=self._recipe.runtime,
            device=backbone.device,
            precision=backbone.spec.precision,
            workers=Workers(1, 1),
        )
        self._run, self._runtime = chosen.run, chosen.name

    def work(self, dataset: Dataset, unit: Batch) -> WrittenPart:
        """Compute a unit and write its parts."""
        size = self._recipe.batch_size
        pixels = unit.pixels[0] if unit.pixels else np.empty((0, 1, 1, 1, 3), np.uint8)
        collected: list[list[NDArray[Any]]] = [[] for _ in self._recipe.cuts]
        for start in range(0, len(pixels), size):
            piece = Batch(fresh=unit.fresh[start : start + size], pixels=list(pixels[start : start + size]))
            if self._computed and self._run is None:
                self._prepare(sample(piece, size))
            compute(piece, beside_pixels(self._recipe.cuts, self._run), size)
            for rows, new in zip(collected, piece.rows, strict=True):
                rows.append(new)
        sighted = unit.sighted
        parts: list[FileRecord | None] = []
        good: list[FileIndex] = []
        bad: list[tuple[Quarantined, ...]] = []
        for store, dtype, several in zip(self._stores, self._recipe.dtypes, collected, strict=True):
            record, kept, unusable = write_part(store, dtype, several, sighted, dataset, self._runtime)
            parts.append(record)
            good.append(kept)
            bad.append((*unit.bad, *unusable))
        return WrittenPart(tuple(parts), tuple(good), FileIndex.of(unit.copies), tuple(bad), len(unit))


def write_part(
    store: FeatureStore,
    dtype: StoredDtype,
    several: Sequence[NDArray[Any]],
    sighted: FileIndex,
    dataset: Dataset,
    runtime: str,
) -> tuple[FileRecord | None, FileIndex, list[Quarantined]]:
    """Write rows as a part, not yet committed; those that are not finite in its dtype are returned as unusable."""
    if not len(sighted):
        return None, sighted, []
    rows, finite = in_dtype(several, dtype)
    kept = sighted.take(finite)
    bad = not_finite(dataset, sighted.take(~finite), dtype)
    newest = int(sighted.stat[:, [1, 3]].max(initial=0))  # by the clock that dates the files
    record = store.add_part(Part([rows[finite]], kept.seen(dataset, newest)), runtime) if len(kept) else None
    return record, kept, bad
