"""A source and a backbone side by side: obtain the entry of a cut, computing only what it lacks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from featcache.backbones import origins
from featcache.datasets.base import Dataset
from featcache.errors import DataError, StorageError, UsageError
from featcache.extraction import lookup as caching
from featcache.extraction.extract import ExtractPlan, ExtractReport, Prepare, Ready, Sink, extract, is_mine, measure
from featcache.extraction.loader import Pixels, beside_pixels
from featcache.extraction.lookup import FileIndex
from featcache.extraction.ray_engine import WorkerConfig
from featcache.fingerprint import fingerprint
from featcache.progress import logger
from featcache.specs import (
    INPUT,
    POOLED,
    BackboneSpec,
    FeatureSpec,
    RuntimeName,
    StoredDtype,
    Transform,
    TransformOverrides,
    Views,
    check_fields,
    stored_dtype,
)
from featcache.store.entry import FeatureStore

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone, TorchRuntime
    from featcache.extraction.runtimes import Workers

_SMALL_IMAGE = 128  # pixels; above it small batches keep their activations in the caches of a core
_TINY_IMAGE = 32  # pixels; up to it what the interpreter does for a batch weighs as much as computing it
_MOST_IN_A_BATCH, _MOST_WORKERS = 65_536, 1024
_SMALL_BATCH, _CPU_BATCH, _TINY_BATCH, _GPU_BATCH = 16, 64, 256, 128


@dataclass(frozen=True)
class Settings:
    """What changes how a job runs, and none of its numbers beyond rounding.

    ``batch_size`` ``None`` leaves it to the device; ``budget`` is how many bytes the activations of a fine-tuning may
    take; ``part`` (i, n) computes the i-th of n shares of the images, for several processes on one entry.
    """

    cache: Path = field(default_factory=caching.default_cache)
    batch_size: int | None = None
    device: str | None = None
    max_bad: float = 0.01
    rebind: bool = False
    runtime: RuntimeName = "auto"
    part: tuple[int, int] | None = None
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    budget: int | None = None

    def __post_init__(self) -> None:
        """Refuse what nothing could run with."""
        check_fields(self)
        for name, most in (("batch_size", _MOST_IN_A_BATCH), ("workers", _MOST_WORKERS)):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise UsageError(f"`{name}` {value}: 1 to {most} are possible.")
        if not 0 <= self.max_bad <= 1:
            raise UsageError(f"`max_bad` {self.max_bad}: a share from 0 to 1 is needed.")
        if self.budget is not None and self.budget < 0:
            raise UsageError(f"`budget` {self.budget}: a number of bytes from 0 is needed.")
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise UsageError(f"`part` {self.part}: (i, n) with i from 1 to n is needed.")


@dataclass(frozen=True)
class Output:
    """What is to be extracted: a cut, and the dtype that its rows are stored in."""

    cut: str = POOLED
    dtype: StoredDtype | None = None

    def __post_init__(self) -> None:
        """Refuse what is no cut's name and no dtype."""
        check_fields(self)


@dataclass(frozen=True)
class Extracted:
    """An entry that is complete for a source, and what it took."""

    store: FeatureStore
    report: ExtractReport
    backbone: str
    cut: str
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache extract``."""
        report = self.report
        return {
            "entry": str(self.store.path),
            "dataset": self.store.path.parent.name,
            "backbone": self.backbone,
            "cut": self.cut,
            "rows": report.rows,
            "computed": report.computed,
            "reused": report.reused,
            "quarantined": [asdict(item) for item in report.quarantined],
            "seconds": round(report.seconds, 3),
            "images_per_second": self.images_per_second,
            "left": report.left,
            "runtime": report.runtime,
            "runtime_difference": report.difference,
            "key": self.store.key,
            "notes": list(self.notes),
        }

    @property
    def cached(self) -> FileIndex:
        """Which of the source's items have which content."""
        return self.report.cached

    @property
    def images_per_second(self) -> float | None:
        """Images computed a second in this run, ``None`` where none was."""
        return round(self.report.computed / self.report.seconds, 1) if self.report.computed else None

    @property
    def cost(self) -> tuple[float, float | None]:
        """Seconds that computing the entry's rows took, whenever that was, and rows a second."""
        manifest = self.store.manifest
        return round(manifest.seconds, 3), round(manifest.rows / manifest.seconds, 1) if manifest.seconds else None


@dataclass(frozen=True)
class Estimate:
    """What an extraction would take: images in the source and to compute, bytes to write, seconds at PyTorch's speed."""

    images: int
    to_compute: int
    bytes: int
    seconds: float


class FeatureCache:
    """A source and a backbone, with the backbone loaded only when something has to be computed."""

    def __init__(
        self,
        dataset: Dataset,
        spec: BackboneSpec,
        settings: Settings,
        *,
        lists: bool = True,
        transform: Transform | None = None,
        purpose: str = "",
    ) -> None:
        self.dataset = dataset
        self._transform = transform
        self.spec = spec
        self.settings = settings
        self.lists = lists
        self._purpose = purpose
        self._content: str | None = None
        for note in dataset.notes:
            logger.warning(note)

    def thumbnails(self, side: int) -> Extracted:
        """Return the entry of the whole images, squeezed into so many pixels a side; no backbone is loaded."""
        transform = Transform(side, crop_mode="squash", interpolation="bilinear")
        spec = BackboneSpec("pixels", overrides=TransformOverrides(input_size=side))
        settings = replace(self.settings, part=None, engine="local")
        quiet = replace(self.dataset, notes=())
        return FeatureCache(quiet, spec, settings, transform=transform, purpose="thumbnails for the baselines").extracted(
            INPUT
        )

    @cached_property
    def folder(self) -> Path:
        """The data set's folder in the cache."""
        return caching.dataset_folder(self.settings.cache, self.dataset, rebind=self.settings.rebind)

    @cached_property
    def backbone(self) -> "Backbone":
        """The loaded backbone; the first use imports torch."""
        from featcache.backbones.base import device_of
        from featcache.backbones.timm_models import load_backbone

        device = self.settings.device
        backbone = load_backbone(self.spec, device_of(device) if device is not None else None)
        if backbone.file_sha256 is not None and self._facts["weights"] != f"sha256:{backbone.file_sha256}":
            raise DataError(f"`weights` {self.spec.weights}: changed while this ran. Run again.")
        self._content = fingerprint([asdict(backbone.loaded), asdict(backbone.transform)])
        return backbone

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return caching.backbone_identity(self.spec)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this backbone from others in records: its spec, and where that has but a name the content behind it.

        The content is that of the loaded backbone, or of the entry that answers in its place.
        """
        if not origins.by_name(self.spec):
            return self._facts
        if self._content is None:
            _ = self.backbone
        return self._facts | {"content": f"sha256:{self._content}"}

    def key(self, cut: str, dtype: StoredDtype, views: Views) -> str:
        """Return the cache key that rows of the loaded backbone have."""
        return self._feature_spec(caching.CacheRequest(self.spec, cut, dtype, views)).key

    def extracted(self, cut: str = POOLED, dtype: StoredDtype | None = None, views: Views | None = None) -> Extracted:
        """Return the entry of a cut, computing what it lacks."""
        return self.features([Output(cut, dtype)], views)[0]

    def features(self, targets: Sequence[Output], views: Views | None = None) -> list[Extracted]:
        """Return the entries of several cuts, computing what they lack in one pass over the images."""
        views = views or Views()
        requests = [caching.CacheRequest(self.spec, one.cut, stored_dtype(one.cut, one.dtype), views) for one in targets]
        opened = self._open(requests)
        done = {number: hit for number, (store, stock) in enumerate(opened) if (hit := self._hit(store, stock))}
        for number in done:
            self._remember(opened[number][0], requests[number])
        left = [number for number in range(len(requests)) if number not in done]
        if left:
            sinks, prepare = self._sinks([(requests[number].cut, *opened[number]) for number in left])
            with self.threads():
                reports = self._run(sinks, prepare, views)
            for number, report in zip(left, reports, strict=True):
                self._remember(opened[number][0], requests[number])
                done[number] = report
        return [
            Extracted(opened[number][0], done[number], self.spec.label, requests[number].cut, self.dataset.notes)
            for number in range(len(requests))
        ]

    def estimate(self, targets: Sequence[Output], views: Views | None = None) -> Estimate:
        """Say what an extraction would compute, write and take; measures a first batch, and keeps nothing of it."""
        views = views or Views()
        requests = [caching.CacheRequest(self.spec, one.cut, stored_dtype(one.cut, one.dtype), views) for one in targets]
        found = [(request, stock) for request, (_, stock) in zip(requests, self._find(requests), strict=True)]
        wanted = sorted({int(position) for _, stock in found for position in stock.pending})
        if not wanted:
            return Estimate(len(self.dataset.samples), 0, 0, 0.0)
        plan = self.plan_for(self.backbone.transform, views)
        program_cuts = [request.cut for request, _ in found if request.cut != INPUT]
        shapes = self._shapes([request.cut for request, _ in found])
        with self.threads():
            seconds = measure(
                self.dataset, wanted, plan, self._eager(program_cuts) if program_cuts else None, self._workers.count
            )
        sizes = [
            len(stock.pending) * views.count * int(np.prod(shape)) * np.dtype(request.dtype).itemsize
            for (request, stock), shape in zip(found, shapes, strict=True)
        ]
        return Estimate(len(self.dataset.samples), len(wanted), sum(sizes), seconds)

    def _find(self, requests: Sequence[caching.CacheRequest]) -> list[tuple[FeatureStore | None, caching.Scan]]:
        """Return the entries that are there, by the flags or by the key, with what they lack.

        A backbone that has to be loaded, or is, decides alone: what it computes must not come beside rows of another that
        its name stood for before, nor be trained on beside those.
        """
        found = [(store, self._stock(store)) for store in (caching.find_entry(self.folder, request) for request in requests)]
        lacks = any(len(stock.pending) for _, stock in found)
        if "backbone" in self.__dict__ or (lacks and self._transform is None):
            keyed = [self._of_key(self._feature_spec(request)) for request in requests]
            return [
                before
                if before[0] is not None and store is not None and before[0].path == store.path
                else (store, self._stock(store))
                for before, store in zip(found, keyed, strict=True)
            ]
        for (store, _), request in zip(found, requests, strict=True):
            if store is not None and request.cut != INPUT:
                self._content = fingerprint([store.spec["backbone"], store.spec["transform"]])
        return found

    def _of_key(self, spec: FeatureSpec) -> FeatureStore | None:
        path = caching.find_key(self.folder, spec)
        return FeatureStore.open(path) if path is not None else None

    def _open(self, requests: Sequence[caching.CacheRequest]) -> list[tuple[FeatureStore, caching.Scan]]:
        """Return the entries of some requests, made where they are not there, with what they lack."""
        opened = []
        for (store, stock), request in zip(self._find(requests), requests, strict=True):
            if store is not None:
                opened.append((store, stock))
                continue
            spec = self._feature_spec(request)
            if self._transform is None and (reason := caching.why_miss(self.folder, spec)):
                logger.info("not in the cache; the nearest entry differs in %s", reason)
            made = FeatureStore.create(caching.entry_path(self.folder, self.spec.label, spec), spec)
            opened.append((made, self._stock(made)))
        return opened

    def _stock(self, store: FeatureStore | None) -> caching.Scan:
        """Return what an entry lacks, of this run's share of the images."""
        part = self.settings.part
        if part is None:
            return caching.scan(self.dataset, store)
        return caching.scan(self.dataset, store, among=partial(is_mine, self.dataset, part), hashes_new=False)

    def _remember(self, store: FeatureStore, request: caching.CacheRequest) -> None:
        """Note the flags that led to an entry, and the content of the files behind a name where that is known."""
        loaded = self.backbone if "backbone" in self.__dict__ else None
        if loaded is not None and not loaded.is_current:
            return  # the flags mean another network by now
        facts = request.to_json()
        if loaded is not None and loaded.origin is not None and loaded.content is not None:
            facts["origin"] = {"place": asdict(loaded.origin), "content": loaded.content}
        elif origins.by_name(self.spec) and self._transform is None:
            return  # recognised by what was noted before; nothing new is known
        with suppress(StorageError):  # a cache that cannot be written answers all the same
            store.remember_request(facts)

    def _hit(self, store: FeatureStore, stock: caching.Scan) -> ExtractReport | None:
        if self.settings.part is not None or not isinstance(caching.plan(self.dataset, store, stock), caching.Hit):
            return None
        store.tidy()
        caching.renew(self.dataset, store, stock)
        store.write_table()
        unusable = [item for item in store.manifest.quarantined if item.sha256]
        return ExtractReport(len(stock.cached) - len(unusable), 0, (*unusable, *stock.unreadable), 0.0, cached=stock.cached)

    def _sinks(self, opened: Sequence[tuple[str, FeatureStore, caching.Scan]]) -> tuple[list[Sink], Prepare]:
        """Return the entries to fill, and what makes the backbone ready: not even loaded where nothing is computed."""
        busy = [cut for cut, _, stock in opened if len(stock.pending)]
        shapes = iter(self._shapes(busy))
        sinks = [
            Sink(store, stock, store.spec["dtype"], next(shapes) if len(stock.pending) else ()) for _, store, stock in opened
        ]
        cuts = [cut for cut, _, _ in opened]
        return sinks, lambda first, left: self.prepare(cuts, first, left)

    def prepare(self, cuts: Sequence[str], first: Pixels, left: int) -> Ready:
        """Return what computes some cuts, made ready on a first batch for so many images."""
        computed = [cut for cut in cuts if cut != INPUT]
        if not computed:
            return Ready(beside_pixels(cuts, None), self._workers.count)
        from featcache.extraction.runtimes import choose

        chosen = choose(
            self.backbone.program(computed),
            first,
            images_left=left,
            wish=self.settings.runtime,
            device=self.backbone.device,
            precision=self.spec.precision,
            workers=self._workers,
        )
        logger.debug("runtime %s, %d workers", chosen.name, self._workers.count)
        return Ready(beside_pixels(cuts, chosen.run), self._workers.count, chosen.name, chosen.difference)

    def _shapes(self, cuts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the shape of one row at each cut, found by computing a blank image."""
        if not cuts:
            return []
        size = (self._transform or self.backbone.transform).input_size
        computed = [cut for cut in cuts if cut != INPUT]
        blank = np.zeros((1, size, size, 3), np.uint8)
        rows = iter(self._eager(computed)(blank) if computed else ())
        return [(size, size, 3) if cut == INPUT else next(rows).shape[1:] for cut in cuts]

    def _eager(self, cuts: Sequence[str]) -> "TorchRuntime":
        from featcache.backbones.base import TorchRuntime

        return TorchRuntime(self.backbone.program(cuts), self.backbone.device, self.spec.precision)

    @cached_property
    def _workers(self) -> "Workers":
        from featcache.extraction.runtimes import Workers, workers_here

        return Workers(self.settings.workers, 1) if self.settings.workers else workers_here()

    @contextmanager
    def threads(self) -> Iterator[None]:
        """Give torch the cores that one worker has, where a backbone is loaded."""
        if "backbone" not in self.__dict__:
            yield
            return
        from featcache.extraction.runtimes import threads_per_worker

        with threads_per_worker(self._workers.threads):
            yield

    def _run(self, sinks: list[Sink], prepare: Prepare, views: Views) -> list[ExtractReport]:
        stored = sinks[0].store.spec["transform"]
        three = {name: tuple(stored[name]) if stored[name] else None for name in ("mean", "std")}
        plan = self.plan_for(Transform(**(stored | three)), views)
        if self.settings.engine == "ray" and any(len(sink.stock.pending) for sink in sinks):
            plan = replace(plan, remote=self._recipe(sinks, plan))
        return extract(self.dataset, sinks, prepare, plan)

    def _recipe(self, sinks: Sequence[Sink], plan: ExtractPlan) -> WorkerConfig:
        weights = self.spec.weights
        anywhere = replace(
            self.spec,
            name=origins.absolute_name(self.spec),  # actors have working folders of their own
            weights=str(Path(weights).resolve()) if weights else None,
        )
        return WorkerConfig(
            anywhere,
            self.backbone.loaded,
            tuple(sink.store.spec["cut"] for sink in sinks),
            tuple(sink.store.path.resolve() for sink in sinks),
            tuple(sink.dtype for sink in sinks),
            plan.transform,
            plan.views,
            plan.batch_size,
            self.settings.device,
            self.settings.runtime,
            self.settings.workers,
        )

    def plan_for(self, transform: Transform, views: Views) -> ExtractPlan:
        """Return how images are extracted with these settings."""
        size = self.settings.batch_size
        if size is None:
            on_gpu = "backbone" in self.__dict__ and self.backbone.device.type != "cpu"
            size = _GPU_BATCH if on_gpu else _cpu_batch(transform.input_size)
        return ExtractPlan(
            transform, views, size, self.settings.max_bad, self.settings.part, lists=self.lists, purpose=self._purpose
        )

    def _feature_spec(self, request: caching.CacheRequest) -> FeatureSpec:
        transform = self._transform or self.backbone.transform
        views, seed = request.views.count, request.views.seed if request.views.count > 1 else 0
        if request.cut == INPUT:
            return FeatureSpec(transform.pixels_only(), None, INPUT, dtype="uint8", views=views, views_seed=seed)
        _ = self.backbone.whole  # an impossible pooling is refused before an entry is made
        backbone, precision = self.backbone.loaded, self.spec.precision
        version = self.backbone.format_version(request.cut)
        return FeatureSpec(transform, backbone, request.cut, precision, request.dtype, views, seed, version)


def _cpu_batch(pixels: int) -> int:
    """Return how many images of so many pixels a side a worker takes at a time."""
    if pixels <= _TINY_IMAGE:
        return _TINY_BATCH
    return _SMALL_BATCH if pixels > _SMALL_IMAGE else _CPU_BATCH
