"""A source and a backbone side by side: obtain the entry of a cut, computing only what it lacks."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featcache import cache as caching
from featcache.errors import UsageError
from featcache.progress import logger
from featcache.sources import Source
from featcache.specs import INPUT, POOLED, BackboneSpec, FeatureSpec, StoredDtype, Transform, stored_dtype
from featcache.stages.extract import ExtractReport, extract
from featcache.store import TABLE, FeatureStore

if TYPE_CHECKING:
    from featcache.backbone import Backbone


@dataclass(frozen=True)
class Settings:
    """What changes how a job runs, and none of its numbers."""

    cache: Path
    batch_size: int = 32
    device: str | None = None
    max_bad: float = 0.01
    rebind: bool = False


@dataclass(frozen=True)
class Extracted:
    """An entry that is complete for a source, and what it took."""

    store: FeatureStore
    report: ExtractReport
    backbone: str
    cut: str

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
            "key": self.store.key,
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


class Workbench:
    """A source and a backbone, with the backbone loaded only when something has to be computed."""

    def __init__(self, source: Source, spec: BackboneSpec, settings: Settings) -> None:
        self.source = source
        self.spec = spec
        self.settings = settings
        for note in source.notes:
            logger.warning(note)

    @cached_property
    def folder(self) -> Path:
        """The data set's folder in the cache."""
        return caching.dataset_folder(self.settings.cache, self.source, rebind=self.settings.rebind)

    @cached_property
    def backbone(self) -> "Backbone":
        """The loaded backbone; the first use imports torch."""
        import torch

        from featcache.backbone import load_backbone

        if self.settings.device is None:
            return load_backbone(self.spec)
        try:
            device = torch.empty(0, device=self.settings.device).device
        except (RuntimeError, AssertionError) as error:
            raise UsageError(f"--device {self.settings.device}: {str(error).splitlines()[0]}") from error
        return load_backbone(self.spec, device)

    def extracted(self, cut: str = POOLED, dtype: StoredDtype | None = None) -> Extracted:
        """Return the entry of a cut, computing what it lacks."""
        request = caching.Request(self.spec, cut, stored_dtype(cut, dtype))
        store = caching.recognise(self.folder, request)
        if store is not None:
            stock = caching.take_stock(self.source, store)
            decision = caching.plan(self.source, store, stock)
            if isinstance(decision, caching.Hit):
                if not (store.path / TABLE).exists():
                    store.write_table()
                unusable = [item for item in store.manifest.quarantined if item.sha256]
                report = ExtractReport(len(stock.known) - len(unusable), 0, (*unusable, *stock.unreachable), 0.0)
                return Extracted(store, report, self.spec.label, cut)
            if not decision.to_read:
                return self._extract(store, stock, None, cut)
        spec = self._feature_spec(request)
        path = caching.entry_path(self.folder, self.spec.label, spec)
        if not path.exists() and (reason := caching.why_miss(self.folder, spec)):
            logger.info("not in the cache; the nearest entry differs in %s", reason)
        store = FeatureStore.create(path, spec)
        stock = caching.take_stock(self.source, store)
        runner = self.backbone.runner(cut) if cut != INPUT and stock.to_read else None
        done = self._extract(store, stock, runner, cut)
        store.remember_request(request.described())
        return done

    def _extract(self, store: FeatureStore, stock: caching.Stock, runner: Any, cut: str) -> Extracted:
        stored = store.spec
        three = {name: tuple(stored["transform"][name]) if stored["transform"][name] else None for name in ("mean", "std")}
        report = extract(
            self.source,
            store,
            stock,
            runner,
            transform=Transform(**(stored["transform"] | three)),
            dtype=stored["dtype"],
            batch_size=self.settings.batch_size,
            max_bad=self.settings.max_bad,
        )
        return Extracted(store, report, self.spec.label, cut)

    def _feature_spec(self, request: caching.Request) -> FeatureSpec:
        transform = self.backbone.transform
        if request.cut == INPUT:
            return FeatureSpec(transform.pixels_only(), None, INPUT, dtype="uint8")
        if request.cut != POOLED:
            self.backbone.trained_after(request.cut)
        return FeatureSpec(transform, self.backbone.loaded, request.cut, dtype=request.dtype)
