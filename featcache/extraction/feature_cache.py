"""A data set and a backbone side by side: obtain the entry of a cut, computing only what it lacks."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache import extraction as entries
from featcache.backbones import absolute_name, is_by_name
from featcache.datasets import Dataset
from featcache.datasets.decoding import ImagePreprocess
from featcache.display import Displayed, Table, facts_table, logger
from featcache.errors import DataError, StorageError, UsageError
from featcache.evaluation import column_names
from featcache.evaluation.metrics import Kind
from featcache.extraction.extract import (
    NO_RUNTIME,
    EntryWriter,
    ExtractPlan,
    ExtractReport,
    Runtime,
    Workers,
    beside_pixels,
    extract,
    measure,
    renew,
    workers_here,
)
from featcache.extraction.files import DatasetFiles, Pixels, Positions, Rows, Scan, scan
from featcache.fingerprint import fingerprint
from featcache.resources import libraries_load
from featcache.specs import (
    INPUT,
    POOLED,
    TOKENS,
    BackboneSpec,
    FeatureSpec,
    RuntimeName,
    StoredDtype,
    Tokenisation,
    Transform,
    TransformOverrides,
    Views,
    check_fields,
    cut_of_layers,
    layers_of,
    stored_dtype,
)
from featcache.store.disk import keep_note, kept_note
from featcache.store.entry import FeatureStore, drop_rows

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone, Preprocess
    from featcache.extraction.runtimes import WorkerConfig

_SMALL_IMAGE = 128  # pixels; above it small batches keep their activations in the caches of a core
_TINY_IMAGE = 32  # pixels; up to it what the interpreter does for a batch weighs as much as computing it
_MOST_IN_A_BATCH, _MOST_WORKERS = 65_536, 1024
_SMALL_BATCH, _CPU_BATCH, _TINY_BATCH, _GPU_BATCH = 16, 64, 256, 128
_TEXTS, _GPU_TEXTS = 256, 4096  # texts at a time: of so many most lengths have pieces that are full


@dataclass(frozen=True)
class Settings:
    """What changes how a job runs, and none of its numbers beyond rounding.

    ``batch_size`` ``None`` leaves it to the device; ``budget`` is how many bytes the activations of a fine-tuning may
    take; ``part`` (i, n) computes the i-th of n shares of the images, for several processes on one entry; ``tracker``
    is told of epochs and records (``reports.trackers.Tracker``).
    """

    cache: Path = field(default_factory=entries.default_cache)
    batch_size: int | None = None
    device: str | None = None
    max_bad: float = 0.01
    rebind: bool = False
    runtime: RuntimeName = "auto"
    part: tuple[int, int] | None = None
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    budget: int | None = None
    tracker: Any = None

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
        # by what it is asked for: trackers are known higher up alone
        if self.tracker is not None and not (hasattr(self.tracker, "on_epoch") and hasattr(self.tracker, "on_record")):
            raise UsageError(f"`tracker` {self.tracker!r}: a Tracker is needed.")


@dataclass(frozen=True)
class Output:
    """What is to be extracted: a cut, and the dtype that its rows are stored in."""

    cut: str = POOLED
    dtype: StoredDtype | None = None

    def __post_init__(self) -> None:
        """Refuse what is no cut's name and no dtype."""
        check_fields(self)


@dataclass(frozen=True, repr=False)
class Extracted(Displayed):
    """An entry that is complete for a data set, and what it took."""

    store: FeatureStore
    report: ExtractReport
    backbone: str
    cut: str
    notes: tuple[str, ...] = ()

    def table(self) -> Table:
        """Return what there is and what this run computed of it."""
        report, bad = self.report, len(self.report.quarantined)
        title = f"{self.store.path.parent.name}, {self.backbone}, {self.cut}"
        rows = f"{report.rows}, {report.computed} computed in {report.seconds:.1f} s"
        return facts_table(title, rows=rows, images_left_out=bad or None, entry=self.store.path)

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
    """What an extraction would take: images in the data set and to compute, bytes to write, seconds at PyTorch's speed."""

    images: int
    to_compute: int
    bytes: int
    seconds: float


def remark_on_toy(spec: BackboneSpec, dataset: Dataset) -> None:
    """Tell whoever takes the toy for samples of their own of what is for results."""
    if spec.name == "mini" and not dataset.location.startswith("sklearn:"):
        logger.info("mini is a toy that is quick to try things with: lite0, the default, or a timm name is for results")


class FeatureCache:
    """A data set and a backbone, which is loaded only when something has to be computed.

    Of one command there is one for each backbone: the data set's files are looked at once in its life, and an entry that
    has answered answers the same until its end.

    Args:
        dataset: the images.
        spec: the backbone.
        settings: how to compute.
        lists: whether entries list the images as they are now, beside keeping their rows.
        preprocess: of arrays that no backbone asks for.
        files: what the command knows of the files already.
    """

    def __init__(
        self,
        dataset: Dataset,
        spec: BackboneSpec,
        settings: Settings,
        *,
        lists: bool = True,
        preprocess: "Preprocess | None" = None,
        files: DatasetFiles | None = None,
    ) -> None:
        self.dataset = dataset
        self.spec = spec
        self.settings = settings
        self.lists = lists
        self.files = files or DatasetFiles(dataset)
        self._preprocess = preprocess
        # what passes are for that nobody asked for: whoever has a backbone tried, or asked beside the chosen one, says so
        self.purpose = "thumbnails for the baselines" if preprocess is not None else ""
        self._content: str | None = None
        self._complete: dict[tuple[str, StoredDtype, Views], Extracted] = {}
        self._thumbnails: dict[int, FeatureCache] = {}
        if preprocess is None and spec.samples != dataset.kind:
            raise UsageError(_OTHER_SAMPLES[dataset.kind].format(backbone=spec.name, data=dataset.location))
        for note in dataset.notes:
            logger.warning(note)

    def thumbnails(self, side: int) -> Extracted:
        """Return the entry of the whole images, squeezed into so many pixels a side; no backbone is loaded."""
        return self._thumbnail_cache(side).extracted(INPUT)

    def _thumbnail_cache(self, side: int) -> "FeatureCache":
        if side not in self._thumbnails:
            preprocess = ImagePreprocess(Transform(side, crop_mode="squash", interpolation="bilinear"))
            spec = BackboneSpec("pixels", overrides=TransformOverrides(input_size=side))
            settings = replace(self.settings, part=None, engine="local")
            quiet = replace(self.dataset, notes=())
            self._thumbnails[side] = FeatureCache(
                quiet, spec, settings, lists=self.lists, preprocess=preprocess, files=self.files
            )
        return self._thumbnails[side]

    @cached_property
    def folder(self) -> Path:
        """The data set's folder in the cache."""
        return entries.dataset_folder(self.settings.cache, self.dataset, rebind=self.settings.rebind)

    @cached_property
    def backbone(self) -> "Backbone":
        """The loaded backbone; the first use imports torch."""
        with libraries_load():
            from featcache.backbones import open_backbone
            from featcache.backbones.base import device_of

        device = self.settings.device
        backbone = open_backbone(self.spec, device_of(device) if device is not None else None)
        if backbone.file_sha256 is not None and self._facts["weights"] != f"sha256:{backbone.file_sha256}":
            raise DataError(f"`weights` {self.spec.weights}: changed while this ran. Run again.")
        self._content = fingerprint([asdict(backbone.loaded), asdict(backbone.preprocess.spec)])
        return backbone

    @cached_property
    def _facts(self) -> dict[str, Any]:
        return entries.backbone_identity(self.spec)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this backbone from others in records: its spec, and where that has but a name the content behind it.

        The content is that of the loaded backbone, or of the entry that answers in its place.
        """
        if not is_by_name(self.spec):
            return self._facts
        if self._content is None:
            _ = self.backbone
        return self._facts | {"content": f"sha256:{self._content}"}

    def key(self, cut: str, dtype: StoredDtype, views: Views) -> str:
        """Return the cache key that rows of the loaded backbone have."""
        return self._feature_spec(self._request(Output(cut, dtype), views)).key

    def _request(self, output: Output, views: Views) -> entries.CacheRequest:
        dtype = stored_dtype(output.cut, output.dtype, self.spec.samples)
        return entries.CacheRequest(self.spec, self._facts, output.cut, dtype, views)

    def extracted(self, cut: str = POOLED, dtype: StoredDtype | None = None, views: Views | None = None) -> Extracted:
        """Return the entry of a cut, computing what it lacks."""
        return self.features([Output(cut, dtype)], views)[0]

    def features(
        self, outputs: Sequence[Output], views: Views | None = None, *, thumbnails: int | None = None
    ) -> list[Extracted]:
        """Return the entries of several cuts, computing what they lack in one pass over the images.

        Where ``thumbnails`` of so many pixels a side will be asked for too, those of the images that are decoded anyhow
        are kept in the same pass.
        """
        views = views or Views()
        if views.count > 1 and self.dataset.kind == "text":
            raise UsageError(f"`views` {views.count}: a text has one view, augmentations are of images.")
        requests = [self._request(output, views) for output in outputs]
        keys = [(request.cut, request.dtype, views) for request in requests]
        answers = {key: self._complete[key] for key in keys if key in self._complete}
        unanswered = [request for request in requests if (request.cut, request.dtype, views) not in answers]
        for request, extracted in zip(unanswered, self._extracted(unanswered, thumbnails), strict=True):
            answers[request.cut, request.dtype, views] = extracted
            if not extracted.report.left:  # what was computed is told once
                again = replace(extracted.report, computed=0, seconds=0.0)
                self._complete[request.cut, request.dtype, views] = replace(extracted, report=again)
        return [answers[key] for key in keys]

    def _extracted(self, requests: Sequence[entries.CacheRequest], thumbnails: int | None) -> list[Extracted]:
        opened = self._open(requests)
        reports = [self._hit(store, scanned) for store, scanned in opened]
        missing = [number for number, report in enumerate(reports) if report is None]
        for number, report in enumerate(reports):
            if report is not None:
                self._remember(opened[number][0], requests[number])
        if missing:
            computed = self._compute([opened[number] for number in missing], requests[missing[0]].views, thumbnails)
            for number, report in zip(missing, computed, strict=True):
                self._remember(opened[number][0], requests[number])
                reports[number] = report
        return [
            Extracted(store, report, self.spec.label, request.cut, self.dataset.notes)
            for (store, _), report, request in zip(opened, reports, requests, strict=True)
            if report is not None
        ]

    def require(self, kind: Kind, group: str | None, columns: Sequence[str] = ()) -> None:
        """Refuse what the data set does not tell, before anything is extracted for it.

        Raises:
            DataError: it tells another kind of thing; it is no manifest, has no such column, or a sample no group.
            UsageError: a column is no such as could be trained on.
        """
        self.dataset.require_kind(kind)
        if group is not None:
            self.files.groups(group)
        if columns:
            self.files.columns(column_names(columns))

    def holds(self, outputs: Sequence[Output], views: Views | None = None) -> bool:
        """Tell whether the flags lead to entries of some cuts that lack nothing, so that no backbone is needed for them."""
        for output in outputs:
            request = self._request(output, views or Views())
            if (request.cut, request.dtype, request.views) in self._complete:
                continue
            if not self._scan(entries.find_entry(self.folder, request)).is_hit:
                return False
        return True

    @cached_property
    def stage_names(self) -> tuple[str, ...]:
        """The names of the backbone's stages, in forward order.

        They are noted beside the embeddings: to load a backbone for its stages' names would take ten times what everything
        else of a command takes whose results are all there.
        """
        request = self._request(Output(), Views()).to_json()  # other versions may tell other stages
        return tuple(
            _noted(self.extracted().store, "stages", request, lambda: [stage.name for stage in self.backbone.stages])
        )

    def layer_widths(self, entry: "Extracted") -> tuple[int, ...]:
        """How many dims of an entry's rows each of several layers has, none where they are of one; noted as stages are."""
        names = layers_of(entry.cut)
        if len(names) < 2:
            return ()

        def ask() -> list[int]:
            from featcache.backbones.base import TorchRuntime

            program = self.backbone.program([name if name == POOLED else cut_of_layers([name]) for name in names])
            run = TorchRuntime(program, self.backbone.device, "float32")
            return [rows.shape[1] for rows in run(self.backbone.example_inputs(1))]

        return tuple(_noted(entry.store, "widths", entry.store.key, ask))

    def estimate(self, outputs: Sequence[Output], views: Views | None = None, *, thumbnails: int | None = None) -> Estimate:
        """Say what ``features`` would compute, write and take; measures a first batch, and keeps nothing of it."""
        views = views or Views()
        requests = [self._request(output, views) for output in outputs]
        scans = [scanned for _, scanned in self._find(requests)]
        pending = np.unique(np.concatenate([scanned.pending for scanned in scans]))
        if not len(pending):
            return Estimate(len(self.files), 0, 0, 0.0)
        plan = self.plan_for(self.backbone.preprocess, views)
        computed = [request.cut for request in requests if request.cut != INPUT]
        with self.threads():
            run = self._eager(computed) if computed else NO_RUNTIME.run
            runtime = Runtime(run, workers=self._workers.count, any_size=self.dataset.kind == "text")
            seconds = measure(self.files, pending, plan, runtime, self.backbone.example_inputs(plan.batch_size))
        size = sum(self._bytes(requests, scans)) + self._bytes_beside(pending, thumbnails)
        return Estimate(len(self.files), len(pending), size, seconds)

    def _bytes_beside(self, pending: Positions, thumbnails: int | None) -> int:
        """Return what thumbnails of the images that are decoded anyhow would take, where they have none."""
        if thumbnails is None or not self._sees_images:
            return 0
        return len(np.intersect1d(pending, self._thumbnail_cache(thumbnails).without_pixels())) * 3 * thumbnails**2

    def sizes(self, outputs: Sequence[Output], views: Views | None = None) -> list[int]:
        """Return how many bytes an extraction would write of each cut."""
        views = views or Views()
        requests = [self._request(output, views) for output in outputs]
        return self._bytes(requests, [scanned for _, scanned in self._find(requests)])

    def _bytes(self, requests: Sequence[entries.CacheRequest], scans: Sequence[Scan]) -> list[int]:
        pending = [len(scanned.pending) for scanned in scans]
        shapes = iter(self._shapes([request.cut for request, count in zip(requests, pending, strict=True) if count]))
        return [
            count * request.views.count * int(np.prod(next(shapes))) * np.dtype(request.dtype).itemsize if count else 0
            for request, count in zip(requests, pending, strict=True)
        ]

    def _find(self, requests: Sequence[entries.CacheRequest]) -> list[tuple[FeatureStore | None, Scan]]:
        """Return the entries that are there, by the flags or by the key, with what they lack.

        A backbone that has to be loaded, or is, decides alone: what it computes must not come beside rows of another that
        its name stood for before, nor be trained on beside those.
        """
        by_flags = [
            (store, self._scan(store)) for store in (entries.find_entry(self.folder, request) for request in requests)
        ]
        lacks = any(len(scanned.pending) for _, scanned in by_flags)
        if "backbone" in self.__dict__ or (lacks and self._preprocess is None):
            by_key = [self._of_key(self._feature_spec(request)) for request in requests]
            return [
                before
                if before[0] is not None and store is not None and before[0].path == store.path
                else (store, self._scan(store))
                for before, store in zip(by_flags, by_key, strict=True)
            ]
        for (store, _), request in zip(by_flags, requests, strict=True):
            if store is not None and request.cut != INPUT:
                self._content = fingerprint([store.spec["backbone"], store.spec["transform"]])
        return by_flags

    def _of_key(self, spec: FeatureSpec) -> FeatureStore | None:
        try:
            path = entries.find_key(self.folder, spec)
        except StorageError:
            if spec.cut != INPUT:
                raise
            return None  # it is begun anew where it is to be filled
        return FeatureStore.open(path) if path is not None else None

    def _open(self, requests: Sequence[entries.CacheRequest]) -> list[tuple[FeatureStore, Scan]]:
        """Return the entries of some requests, made where they are not there, with what they lack."""
        opened = []
        for (store, scanned), request in zip(self._find(requests), requests, strict=True):
            if store is not None:
                opened.append((store, scanned))
                continue
            spec = self._feature_spec(request)
            if self._preprocess is None and request.cut != INPUT and (reason := entries.why_miss(self.folder, spec)):
                logger.info("Not in the cache; the nearest entry differs in %s", reason)
            if request.cut == POOLED and not self.purpose:
                remark_on_toy(self.spec, self.dataset)
            made = FeatureStore.create(entries.entry_path(self.folder, self.spec.label, spec), spec)
            opened.append((made, self._scan(made)))
        return opened

    def _scan(self, store: FeatureStore | None) -> Scan:
        """Return what an entry lacks, of this run's share of the images."""
        try:
            entry = store.remembered() if store is not None else None
        except StorageError as error:
            # what is decoded costs a moment; what a backbone computed may have cost days, and is asked for; of processes
            # that share the work each would drop what the others have made
            if store is None or store.spec["cut"] != INPUT or self._share is not None:
                raise
            drop_rows(store.path, error)
            store.refresh()
            entry = store.remembered()
        if self._share is None:
            return scan(self.files, entry)
        return scan(self.files, entry, among=self._share, hashes_new=False)

    @cached_property
    def _share(self) -> Positions | None:
        part = self.settings.part
        return self.files.share(part) if part is not None else None

    def _remember(self, store: FeatureStore, request: entries.CacheRequest) -> None:
        """Note the flags that led to an entry, and the content of the files behind a name where that is known."""
        loaded = self.backbone if "backbone" in self.__dict__ else None
        if loaded is not None and not loaded.is_current:
            return  # the flags mean another network by now
        facts = request.to_json()
        if loaded is not None and loaded.origin is not None and loaded.content is not None:
            facts["origin"] = {"place": asdict(loaded.origin), "content": loaded.content}
        elif is_by_name(self.spec) and self._preprocess is None:
            return  # recognised by what was noted before; nothing new is known
        with suppress(StorageError):  # a cache that cannot be written answers all the same
            store.remember_request(facts)

    def _hit(self, store: FeatureStore, scanned: Scan) -> ExtractReport | None:
        if self.settings.part is not None or not scanned.is_hit:
            return None
        store.tidy()
        renew(store, scanned)
        store.write_table()
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("Taken from the cache: %s", store.about)
        unusable = [image for image in store.manifest.quarantined if image.sha256]
        has_row = ~self.files.are_among(scanned.cached, {bytes.fromhex(image.sha256) for image in unusable})
        bad = (*unusable, *scanned.unreadable)
        return ExtractReport(int(has_row.sum()), 0, bad, 0.0, positions=scanned.cached[has_row])

    def _compute(
        self, opened: Sequence[tuple[FeatureStore, Scan]], views: Views, thumbnails: int | None
    ) -> list[ExtractReport]:
        """Compute what entries lack in one pass. The backbone is not even loaded where nothing is computed."""
        busy = iter(self._shapes([store.spec["cut"] for store, scanned in opened if len(scanned.pending)]))
        shapes = [next(busy) if len(scanned.pending) else () for _, scanned in opened]
        # without a backbone that was loaded nothing is read: only the listing is out of date
        preprocess = self._preprocess or (self.backbone.preprocess if any(shapes) else ImagePreprocess(Transform()))
        plan = self.plan_for(preprocess, views)
        writers = [
            EntryWriter(store, scanned, shape, plan.batch_size)
            for (store, scanned), shape in zip(opened, shapes, strict=True)
        ]
        cuts = [store.spec["cut"] for store, _ in opened]
        beside = None
        if self.settings.engine == "ray" and any(len(writer.scanned.pending) for writer in writers):
            from featcache.extraction.runtimes import compute_remotely

            plan = replace(plan, remote=partial(compute_remotely, self._worker_config(writers, plan)))
        elif thumbnails is not None and self._sees_images:
            beside = self._thumbnail_cache(thumbnails).as_beside(plan.batch_size)
        with self.threads():
            return extract(self.files, writers, lambda first, images: self.prepare(cuts, first, images), plan, beside)

    @property
    def _sees_images(self) -> bool:
        """Whether images are decoded here, and all of them."""
        return self.settings.engine != "ray" and self.settings.part is None and self.dataset.kind == "image"

    def without_pixels(self) -> Positions:
        """Return the images whose pixels are not kept."""
        return self._scan(self._of_key(self._feature_spec(self._request(Output(INPUT), Views())))).pending

    def as_beside(self, batch_size: int) -> tuple[EntryWriter, Transform]:
        """Return what fills this cache's pixels while another one's images are decoded."""
        assert isinstance(self._preprocess, ImagePreprocess)
        ((store, scanned),) = self._open([self._request(Output(INPUT), Views())])
        return EntryWriter(store, scanned, self._preprocess.shape, batch_size), self._preprocess.spec

    def prepare(self, cuts: Sequence[str], first: Pixels, images: int) -> Runtime:
        """Return what computes some cuts, made ready on a first batch for so many images."""
        computed = [cut for cut in cuts if cut != INPUT]
        if not computed:
            return Runtime(beside_pixels(cuts, None), workers=self._workers.count)
        from featcache.extraction.runtimes import runtime_of

        runtime = runtime_of(self.backbone, computed, first, images, self.settings.runtime, self._workers)
        logger.debug("runtime %s, %d workers", runtime.name, runtime.workers)
        return replace(runtime, run=beside_pixels(cuts, runtime.run))

    def _shapes(self, cuts: Sequence[str]) -> list[tuple[int, ...]]:
        """Return the shape of one row at each cut, found by computing a blank image."""
        if not cuts:
            return []
        computed = [cut for cut in cuts if cut != INPUT]
        rows = iter(self._eager(computed)(self.backbone.example_inputs(1)) if computed else ())
        preprocess = self._preprocess or self.backbone.preprocess
        return [preprocess.shape if cut == INPUT else next(rows).shape[1:] for cut in cuts]

    def _eager(self, cuts: Sequence[str]) -> Callable[[NDArray[Any]], Rows]:
        from featcache.extraction.runtimes import eager_run

        return eager_run(self.backbone, cuts)

    @cached_property
    def _workers(self) -> Workers:
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

    def _worker_config(self, writers: Sequence[EntryWriter], plan: ExtractPlan) -> "WorkerConfig":
        from featcache.extraction.runtimes import WorkerConfig

        weights = self.spec.weights
        anywhere = replace(
            self.spec,
            name=absolute_name(self.spec),  # actors have working folders of their own
            weights=str(Path(weights).resolve()) if weights else None,
        )
        return WorkerConfig(
            anywhere,
            self.backbone.loaded,
            tuple(writer.store.spec["cut"] for writer in writers),
            tuple(writer.store.path.resolve() for writer in writers),
            tuple(writer.dtype for writer in writers),
            plan.preprocess,
            plan.views,
            plan.batch_size,
            self.settings.device,
            self.settings.runtime,
            self.settings.workers,
        )

    def plan_for(self, preprocess: "Preprocess", views: Views) -> ExtractPlan:
        """Return how images are extracted with these settings."""
        size = self.settings.batch_size
        if size is None:
            on_gpu = "backbone" in self.__dict__ and self.backbone.device.type != "cpu"
            if isinstance(preprocess.spec, Tokenisation):
                size = _GPU_TEXTS if on_gpu else _TEXTS
            else:
                size = _GPU_BATCH if on_gpu else _cpu_batch(preprocess.shape[0])
        return ExtractPlan(
            preprocess, views, size, self.settings.max_bad, self.settings.part, lists=self.lists, purpose=self.purpose
        )

    def _feature_spec(self, request: entries.CacheRequest) -> FeatureSpec:
        transform = (self._preprocess or self.backbone.preprocess).spec
        views, seed = request.views.count, request.views.seed if request.views.count > 1 else 0
        if request.cut == INPUT:
            shared = transform.pixels_only() if isinstance(transform, Transform) else transform
            return FeatureSpec(shared, None, INPUT, dtype=request.dtype, views=views, views_seed=seed)
        _ = self.backbone.whole  # an impossible pooling is refused before an entry is made
        backbone, precision = self.backbone.loaded, self.spec.precision
        if request.cut == TOKENS:  # they are what comes before any pooling
            backbone = replace(backbone, pool="default")
        version = self.backbone.format_version(request.cut)
        return FeatureSpec(transform, backbone, request.cut, precision, request.dtype, views, seed, version)


_OTHER_SAMPLES = {
    "text": "`backbone` {backbone}: takes images, and {data} holds texts: name an encoder, text:NAME or text:FOLDER.",
    "image": "`backbone` {backbone}: takes texts, and {data} holds images: name a backbone of images, such as lite0.",
}


def _noted(store: FeatureStore, stem: str, request: Any, ask: Callable[[], list[Any]]) -> list[Any]:
    """Return what is noted beside an entry's heads of one request, or what a backbone that has to be loaded says."""
    path, where = store.path / "heads" / f"{stem}.json", (store.key,)
    note = kept_note(path, where, dict, f"the backbone is loaded for its {stem}") or {}
    if note.get("request") != request:
        note = {"request": request, stem: ask()}
        with suppress(StorageError):  # a cache that cannot be written answers all the same
            keep_note(path, where, note)
    told: list[Any] = note[stem]
    return told


def _cpu_batch(pixels: int) -> int:
    """Return how many images of so many pixels a side a worker takes at a time."""
    if pixels <= _TINY_IMAGE:
        return _TINY_BATCH
    return _SMALL_BATCH if pixels > _SMALL_IMAGE else _CPU_BATCH
