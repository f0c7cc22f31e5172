"""Jobs: one command's work from a data set to run records, extracting first whatever is not in the cache."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache import cache as caching
from featcache.errors import CutError
from featcache.stages.extract import ExtractReport, extract
from featcache.fingerprint import fingerprint
from featcache.progress import logger
from featcache.records import RunRecord, append_record, stamp
from featcache.sources import Source
from featcache.specs import (
    INPUT,
    POOLED,
    BackboneSpec,
    FeatureSpec,
    FineTunePlan,
    StoredDtype,
    Transform,
    stored_dtype,
)
from featcache.splits import Split, items_hash, make_split
from featcache.store import Features, FeatureStore, RowReader

if TYPE_CHECKING:
    from featcache.backbone import Backbone
    from featcache.stages.finetune import FineTuned, LinearHead
    from featcache.stages.fit import FittedHead

PROBE = "logistic"


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
        """Images computed a second, ``None`` where none was."""
        return round(self.report.computed / self.report.seconds, 1) if self.report.computed else None


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

        device = torch.device(self.settings.device) if self.settings.device else None
        return load_backbone(self.spec, device)

    def extracted(self, cut: str = POOLED, dtype: StoredDtype | None = None) -> Extracted:
        """Return the entry of a cut, computing what it lacks."""
        request = caching.Request(self.spec, cut, stored_dtype(cut, dtype))
        store = caching.recognise(self.folder, request)
        if store is not None:
            stock = caching.take_stock(self.source, store)
            decision = caching.plan(self.source, store, stock)
            if isinstance(decision, caching.Hit):
                quarantined = (*store.manifest.quarantined, *stock.unreachable)
                report = ExtractReport(len(stock.known) - len(store.manifest.quarantined), 0, quarantined, 0.0)
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


@dataclass(frozen=True)
class HeadJob:
    """A fitted head with its record."""

    fitted: "FittedHead"
    record: RunRecord

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``heads`` of ``featcache fit``."""
        record = self.record
        return {
            "head": record.method,
            "best_params": record.params,
            "val": record.val,
            "test": record.test,
            "seconds": record.seconds["fit"],
            "bundle": record.artefact,
            "notes": list(record.notes),
        }


def fit_heads(
    bench: Workbench, names: Sequence[str], *, seed: int = 0, records: Path | None = None
) -> tuple[Extracted, list[HeadJob]]:
    """Extract embeddings if needed and train heads on them; records are appended to a JSONL file.

    Raises:
        UsageError: a head is unknown; nothing has been computed then.
    """
    from featcache.stages.fit import fit, save_bundle
    from featcache.heads import require_head

    for name in names:
        require_head(name)
    done = bench.extracted()
    features = done.store.features()
    split = make_split(features.y, features.splits, features.classes, seed)
    jobs = []
    for name in names:
        fitted = fit(features, split, name, seed=seed)
        for note in fitted.notes:
            logger.warning(note)
        cell = cell_of(bench.spec, features, name, None, seed)
        path = done.store.path / "heads" / f"{name}-seed{seed}-{cell[:8]}.joblib"
        save_bundle(fitted, path, classes=features.classes, feature_key=done.store.key)
        record = RunRecord(
            kind="fit",
            cell=cell,
            dataset=done.store.path.parent.name,
            backbone=bench.spec.label,
            method=name,
            cut=POOLED,
            seed=seed,
            feature_key=done.store.key,
            request={"backbone": asdict(bench.spec)},
            params=fitted.params,
            split=split.sizes(),
            test_items=items_hash(features.sha256, split.test, features.y),
            val=asdict(fitted.val),
            test=asdict(fitted.tested.scores),
            right=_bits(fitted.tested.right),
            seconds={"extract": round(done.report.seconds, 3), "fit": round(fitted.seconds, 3)},
            images_per_second=done.images_per_second,
            artefact=str(path),
            notes=fitted.notes,
            **stamp(),
        )
        jobs.append(HeadJob(fitted, record))
        if records:
            append_record(records, record)
    return done, jobs


@dataclass(frozen=True)
class TuneJob:
    """A fine-tuned backbone with its record."""

    tuned: "FineTuned"
    record: RunRecord
    computed_images: int

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache finetune``."""
        record = self.record
        return {
            "dataset": record.dataset,
            "backbone": record.backbone,
            "unfreeze": record.method,
            "cut": record.cut,
            "test": record.test,
            "val": record.val,
            "probe": record.probe,
            "gap": record.gap,
            "seconds": record.seconds,
            "epochs": [asdict(epoch) for epoch in self.tuned.history],
            "best_epoch": self.tuned.best,
            "checkpoint": record.artefact,
            "notes": list(record.notes),
        }


def finetune_job(
    bench: Workbench,
    plan: FineTunePlan,
    *,
    probes: Sequence[str] = (PROBE,),
    seed: int = 0,
    records: Path | None = None,
) -> TuneJob:
    """Fit the probe, extract at the freeze boundary if needed, train what follows it, and compare on the same images."""
    from featcache.stages.finetune import finetune, save_checkpoint
    from featcache.metrics import gap
    from featcache.unfreeze import thaw

    pooled, heads = fit_heads(bench, tuple(dict.fromkeys((PROBE, *probes))), seed=seed)
    best_probe = min(heads, key=lambda job: (-job.record.val["accuracy"], job.record.method != PROBE))
    thawed = thaw(bench.backbone.stages, plan.unfreeze)
    at_cut, suffix_cut, notes = _extract_at(bench, thawed.cut, plan)
    features, reader = _aligned(pooled.store.features(), at_cut.store)
    split = make_split(features.y, features.splits, features.classes, seed)
    started = time.monotonic()
    start, probe = _probe_heads(features, split, heads[0].fitted, seed)
    own = bench.backbone.separate()
    tuned = finetune(
        own, own.suffix(suffix_cut), reader, features.y, split, plan, thawed, start=start, probe=probe, seed=seed
    )
    train_seconds = time.monotonic() - started
    cell = cell_of(bench.spec, features, plan.unfreeze.text, plan, seed)
    name = f"{plan.unfreeze.text.replace(':', '').replace('%', 'pct')}-seed{seed}-{cell[:8]}.safetensors"
    facts = {
        "backbone": asdict(bench.spec),
        "classes": list(features.classes),
        "transform": asdict(own.transform),
        "unfreeze": plan.unfreeze.text,
    }
    checkpoint = save_checkpoint(own, tuned.model, at_cut.store.path / "tuned" / name, facts)
    same_items = items_hash(features.sha256, split.test, features.y)
    compared = gap(tuned.tested.right, _unbits(best_probe.record.right), seed) if (
        same_items == best_probe.record.test_items
    ) else None
    record = RunRecord(
        kind="finetune",
        cell=cell,
        dataset=at_cut.store.path.parent.name,
        backbone=bench.spec.label,
        method=plan.unfreeze.text,
        cut=at_cut.cut,
        seed=seed,
        feature_key=at_cut.store.key,
        request={"backbone": asdict(bench.spec), "plan": asdict(plan)},
        params={"best_epoch": tuned.best, "stages": [stage.name for stage in thawed.stages]},
        split=split.sizes(),
        test_items=same_items,
        val=asdict(tuned.history[tuned.best].val),
        test=asdict(tuned.tested.scores),
        right=_bits(tuned.tested.right),
        seconds={"extract": round(at_cut.report.seconds, 3), "train": round(train_seconds, 3)},
        images_per_second=round(tuned.images_per_second, 1),
        probe={
            "head": best_probe.record.method,
            "test": best_probe.record.test,
            "seconds": best_probe.record.seconds,
        },
        gap=asdict(compared) if compared else None,
        artefact=str(checkpoint),
        notes=notes,
        **stamp(),
    )
    if records:
        append_record(records, record)
    return TuneJob(tuned, record, pooled.report.computed + at_cut.report.computed)


def cell_of(
    spec: BackboneSpec, features: Features, method: str, plan: FineTunePlan | None, seed: int
) -> str:
    """Return the name of an experiment: everything that decides its outcome but the code."""
    everything = np.arange(len(features.y))
    return fingerprint(
        {
            "backbone": asdict(spec),
            "items": items_hash(features.sha256, everything, features.y),
            "splits": list(features.splits),
            "method": method,
            "plan": asdict(plan) if plan else None,
            "seed": seed,
        }
    )


def _extract_at(bench: Workbench, cut: str, plan: FineTunePlan) -> tuple[Extracted, str, tuple[str, ...]]:
    """Extract at the freeze boundary; where the backbone cannot be cut, at its input: slower, and said."""
    try:
        return bench.extracted(cut, plan.dtype if cut != INPUT else None), cut, ()
    except CutError as error:
        note = f"{error} The frozen part runs again in every epoch."
        logger.warning(note)
        return bench.extracted(INPUT), INPUT, (note,)


def _aligned(features: Features, store: FeatureStore) -> tuple[Features, Callable[[NDArray[np.int64]], NDArray[Any]]]:
    """Return the images that both entries have, and a function that reads the second's rows in the first's order."""
    reader: RowReader = store.reader()
    position = {path: index for index, path in enumerate(store.listing().seen.paths)}
    keep = np.array([index for index, path in enumerate(features.paths) if path in position], dtype=np.int64)
    if len(keep) < len(features.paths):
        features = replace(
            features,
            X=features.X[keep],
            y=features.y[keep],
            paths=tuple(features.paths[index] for index in keep),
            splits=tuple(features.splits[index] for index in keep),
            sha256=tuple(features.sha256[index] for index in keep),
        )
    where = np.array([position[path] for path in features.paths], dtype=np.int64)
    return features, lambda index: reader.take(where[index])


def _probe_heads(features: Features, split: Split, fitted: "FittedHead", seed: int) -> tuple["LinearHead", "LinearHead"]:
    """Return the linear probe fitted on train alone, and the one refitted on train and val."""
    from featcache import heads
    from featcache.stages.finetune import LinearHead

    X = np.ascontiguousarray(features.X, dtype=np.float32)
    on_train, _ = heads.train(PROBE, fitted.params, X[split.train], features.y[split.train], seed)
    classes = len(features.classes)
    return LinearHead(*heads.linear_weights(on_train, classes)), LinearHead(*heads.linear_weights(fitted.estimator, classes))


def _bits(right: NDArray[np.bool_]) -> str:
    return "".join("1" if one else "0" for one in right)


def _unbits(text: str) -> NDArray[np.bool_]:
    return np.frombuffer(text.encode(), dtype=np.uint8) == ord("1")
