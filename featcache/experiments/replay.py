"""Run recorded experiments again, from nothing but their records, and hold what comes out against what was recorded."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.display import logger
from featcache.errors import DataError, FeatcacheError, StorageError
from featcache.experiments.finetune import Sweep, run_finetune
from featcache.experiments.finetune_inputs import FineTuneInputs
from featcache.experiments.fit import PROBES, FitPlan, Ledger, run_fit
from featcache.extraction import backbone_identity
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.files import DatasetFiles
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.fingerprint import canonical
from featcache.reports import RECORDS, RunRecord, append_record, head_asked
from featcache.reports.comparison import Replayed, ReplayResult, compare_again
from featcache.specs import RUNTIMES, BackboneSpec

if TYPE_CHECKING:
    from featcache.experiments.bench import Grid

_TRAINED = ("heads", "tuned")  # folders of an entry that hold what was trained from it
_SUFFIXES = ("", ".csv", ".parquet", ".npz", ".h5", ".hdf5", ".tar")
_BUNDLED = {"digits": "sklearn:digits"}  # sets that lie on every machine, for records that do not say how to open theirs


@dataclass(frozen=True)
class Places:
    """Where a replay finds what a record only names.

    Attributes:
        pipeline: a grid's file whose data sets and backbones are looked through first.
        data_root: a folder that holds data sets under their names, torchvision's too; else the current one.
        checkpoint: the file of backbones that were loaded from a file.
        features: a cache whose features are taken instead of computed anew.
        reuse: work in that cache itself, so that heads and trainings that lie there answer.
        out: a JSONL file that gets the new records.
    """

    pipeline: Path | None = None
    data_root: Path | None = None
    checkpoint: str | None = None
    features: Path | None = None
    reuse: bool = False
    out: Path | None = None

    @cached_property
    def grid(self) -> "Grid | None":
        """What the pipeline asks for."""
        from featcache.experiments.bench import load_grid

        return None if self.pipeline is None else load_grid(self.pipeline)

    def dataset(self, record: RunRecord) -> Dataset:
        """Open a record's data set.

        Raises:
            DataError: it lies nowhere.
        """
        for entry in () if self.grid is None else self.grid.data:
            dataset = open_dataset(entry.data, entry.name, data_root=entry.data_root, download=entry.download)
            if _bears(record.dataset, dataset.name):
                return replace(dataset, name=record.dataset)
        text = str(record.source.get("data") or _BUNDLED.get(record.dataset, ""))
        if ":" in text:  # a kind that needs no folder, or torchvision's
            return open_dataset(text, record.dataset, data_root=self.data_root)
        root = self.data_root or Path()
        # a record may come from a stranger: what it names is looked for in that folder, and nowhere above it
        names = dict.fromkeys(Path(name).name for name in (text, record.dataset) if name)
        paths = (root / f"{name}{suffix}" for name in names for suffix in _SUFFIXES)
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise DataError(
                f"its data set {record.dataset} is not in {root}: say where it is (`data_root`), or give its grid."
            )
        return open_dataset(path, record.dataset)

    def backbone(self, identity: dict[str, Any]) -> BackboneSpec:
        """Return the backbone that a record names.

        Raises:
            DataError: its weights are of a file that is not here, or another one.
        """
        for entry in () if self.grid is None else self.grid.backbones:
            if canonical(backbone_identity(entry.spec)) == canonical(identity):
                return entry.spec
        weights = identity.get("weights")
        spec = BackboneSpec.of_facts(identity, weights)
        if weights is None or not weights.startswith("sha256:"):
            return spec
        if self.checkpoint is None:
            raise DataError(f"its weights are a file of SHA-256 {weights[7:23]}...: say where it is (`checkpoint`).")
        spec = replace(spec, weights=self.checkpoint)
        if backbone_identity(spec)["weights"] != weights:
            raise DataError(f"{self.checkpoint}: its SHA-256 is not the recorded {weights[7:23]}...: give the file it was.")
        return spec


def _bears(recorded: str, name: str) -> bool:
    return recorded == name or re.fullmatch(rf"{re.escape(name)}-[0-9a-f]{{6}}", recorded) is not None


def run_replay(records: Sequence[RunRecord], places: Places, settings: Settings) -> ReplayResult:
    """Run records' experiments again, in a cache of their own that is removed behind them, and compare.

    Args:
        records: of ``fit``, ``finetune``, ``gap`` or a grid.
        places: where data sets and weights lie.
        settings: how to compute; the runtime is the recorded one, where that is not told and it is installed.

    Raises:
        StorageError: the disk failed.
    """
    with _scratch(places, settings) as here:
        replayer = _Replayer(records, places, here)
        return ReplayResult(tuple(map(replayer.run, records)))


@contextmanager
def _scratch(places: Places, settings: Settings) -> Iterator[Settings]:
    """Yield settings whose cache holds nothing that was trained before, unless that is asked for."""
    if places.reuse and places.features is not None:
        yield replace(settings, cache=places.features)
        return
    with TemporaryDirectory(prefix="featcache-replay-") as folder:
        cache = Path(folder)
        if places.features is not None and places.features.is_dir():
            # copied, not linked: a link changes the times by which files are known to be unchanged
            shutil.copytree(places.features, cache, ignore=shutil.ignore_patterns(*_TRAINED), dirs_exist_ok=True)
        yield replace(settings, cache=cache)


@dataclass
class _Replayer:
    """Runs records one after the other; what one has computed, the next of the same data set takes."""

    records: Sequence[RunRecord]
    places: Places
    settings: Settings
    caches: dict[str, FeatureCache] = field(default_factory=dict)
    files: dict[str, DatasetFiles] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)

    def run(self, record: RunRecord) -> Replayed:
        number = self.records.index(record) + 1
        logger.info("%d of %d: %s, %s, seed %d", number, len(self.records), record.dataset, record.method, record.seed)
        try:
            replayed = compare_again(record, self._again(record))
        except FeatcacheError as error:
            if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
                raise  # a disk that is full takes no other record's run either
            replayed = Replayed(record, None, "not run", (str(error),))
        if self.places.out is not None and replayed.again is not None:
            append_record(self.places.out, replayed.again)
        logger.info("%s%s", replayed.verdict, f": {replayed.differences[0]}" if replayed.differences else "")
        return replayed

    def _again(self, record: RunRecord) -> RunRecord:
        ways: dict[str, Callable[[FeatureCache, RunRecord], RunRecord]] = {
            "fit": self._fit,
            "fit-labels": self._fit,
            "fit-number": self._fit,
            "finetune": self._finetune,
            "gap": self._gap,
        }
        if record.kind not in ways:
            raise DataError(f"records of the kind {record.kind!r:.40} are not run again: {', '.join(ways)} are.")
        try:
            return ways[record.kind](self._cache(record), record)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # what stands in its request is a stranger's
            raise DataError(f"its request cannot be read ({type(error).__name__}: {error}).") from error

    def _cache(self, record: RunRecord) -> FeatureCache:
        name = canonical([record.dataset, record.request["backbone"]])
        if name not in self.caches:
            spec = self.places.backbone(record.request["backbone"])
            if record.dataset not in self.files:
                self.files[record.dataset] = DatasetFiles(self.places.dataset(record))
            files = self.files[record.dataset]
            runtime: Any = record.environment.get("runtime")
            settings = self.settings
            if settings.runtime == "auto" and runtime in RUNTIMES and _is_here(runtime):
                settings = replace(settings, runtime=runtime)
            self.caches[name] = FeatureCache(files.dataset, spec, settings, files=files)
        return self.caches[name]

    def _fit(self, cache: FeatureCache, record: RunRecord) -> RunRecord:
        asked, told = record.request, head_asked(record.method)
        if told is None:
            raise DataError(f"its method {record.method!r:.60} is none of a head's.")
        plan = FitPlan(
            heads=(*asked.get("members", ()), told.head),
            layers=told.layers,
            views=told.views,
            target={"fit-labels": "labels", "fit-number": "number"}.get(record.kind, "label"),  # type: ignore[arg-type]
            baselines=False,
            **{name: asked[name] for name in ("grid", "folds", "group", "columns", "best_pool") if name in asked},
        )
        results = run_fit(cache, plan, seed=record.seed, ledger=self.ledger).heads
        return next(result.record for result in results if result.fitted.name == told.head)

    def _finetune(self, cache: FeatureCache, record: RunRecord) -> RunRecord:
        plan, inputs = _plan_of(record), self._inputs(cache, record)
        if " after " not in record.method:
            return run_finetune(inputs, plan, records=self._kept).record
        return self._of_sweep(inputs, record, plan)

    def _of_sweep(self, inputs: FineTuneInputs, record: RunRecord, plan: FineTunePlan) -> RunRecord:
        """Return a depth that went on from shallower ones: those are run before it, as its method names them."""
        names = record.method.split(" after ")[::-1]
        base = next((each for each in self.records if _same_run(each, record) and each.method == names[0]), None)
        if base is None:
            raise DataError(f"it goes on from {names[0]}, whose record is not among these: give the records of all depths.")
        # later depths have the rate of the one before; the first has what was asked for
        plan = replace(plan, lr=_plan_of(base).lr)
        sweep = Sweep(inputs, plan, self._kept)
        places = {each.unfreeze.text: place for place, each in enumerate(sweep.plans)}
        if unknown := [name for name in names if name not in places]:
            raise DataError(f"its depth {unknown[0]} is none of this backbone.")
        for name in names[:-1]:
            sweep.take(places[name])
            sweep.keep(places[name])
        return sweep.take(places[names[-1]]).record

    @property
    def _kept(self) -> Path | None:
        """The file of the records whose trainings may answer, where that is asked for."""
        return self.settings.cache / RECORDS if self.places.reuse else None

    def _inputs(self, cache: FeatureCache, record: RunRecord) -> FineTuneInputs:
        names = (record.probe or {}).get("of", PROBES)
        probes = tuple(name for name in names if name not in PROBES)
        return FineTuneInputs(cache, probes=probes, group=record.request.get("group"), seed=record.seed, ledger=self.ledger)

    def _gap(self, cache: FeatureCache, record: RunRecord) -> RunRecord:
        from featcache.experiments.gap import run_gap

        result = run_gap(
            cache, _plan_of(record), group=record.request.get("group"), seed=record.seed, records=self._kept
        ).record
        if result is None:
            raise DataError("no step of it could be taken.")
        return result


def _same_run(first: RunRecord, second: RunRecord) -> bool:
    of_both = ((each.dataset, each.seed, canonical(each.request["backbone"]), each.test_items) for each in (first, second))
    return next(of_both) == next(of_both)


def _plan_of(record: RunRecord) -> FineTunePlan:
    plan = record.request["plan"]
    if not record.protocol and plan.get("train_batchnorm") is False:
        plan = plan | {"train_batchnorm": None}  # before protocols were numbered that stood for what is the default now
    return FineTunePlan(**(plan | {"unfreeze": Unfreeze(**plan["unfreeze"])}))


def _is_here(runtime: str) -> bool:
    from featcache.extraction.runtimes import is_installed

    return runtime == "torch" or is_installed(runtime)
