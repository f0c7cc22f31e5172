"""Grids of experiments: a TOML file into cells, of which those without a record are run; and records run again.

A grid is data sets x backbones x (heads and unfreezes) x seeds. What is run again is run from nothing but its record, and
held against it.
"""

import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from featcache.datasets import Dataset, open_dataset
from featcache.display import Displayed, Table, logger
from featcache.errors import DataError, FeatcacheError, StorageError, UsageError, did_you_mean
from featcache.evaluation import Task
from featcache.experiments.experiment import Experiment, forget_state
from featcache.experiments.finetune import FineTuneInputs, Sweep, run_finetune
from featcache.experiments.fit import PROBE, PROBES, FitPlan, Ledger, in_memory, run_fit
from featcache.extraction import backbone_identity
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.files import DatasetFiles
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.fingerprint import canonical
from featcache.heads import ALL, ENSEMBLE, HEAD_NAMES, MEMBERS, STREAMING, in_order, members_of
from featcache.reports import RECORDS, RunRecord, append_once, append_record, head_asked, read_records
from featcache.reports import tables as report
from featcache.reports.tables import Replayed, ReplayResult, compare_again
from featcache.specs import (
    RUNTIMES,
    BackboneSpec,
    TransformOverrides,
    Views,
    check_fields,
    check_seed,
    check_value,
    freeze_args,
)
from featcache.store.disk import make_folder, replace_file

_SPEC, _READ = ("pool", "precision"), ("layers", "views")
_OVERRIDES = tuple(field.name for field in fields(TransformOverrides))
_MOST_BYTES = 10_000_000
_KINDS: dict[type, str] = {dict: "table", str: "text"}
_PLAN_KEYS = tuple(field.name for field in fields(FineTunePlan) if field.name != "unfreeze")
_TRAINED = ("heads", "tuned")  # folders of an entry that hold what was trained from it
_SUFFIXES = ("", ".csv", ".parquet", ".npz", ".h5", ".hdf5", ".tar")
_BUNDLED = {"digits": "sklearn:digits"}  # sets that lie on every machine, for records that do not say how to open theirs


@dataclass(frozen=True)
class DataEntry:
    """A data set of a grid, as commands take it, and how heads are chosen and split on it."""

    data: str
    name: str | None = None
    group: str | None = None
    data_root: Path | None = None
    download: bool = False
    folds: int | None = None

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        check_fields(self)


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone of a grid, and what of it heads are trained on: layers side by side, several views, the best pooling."""

    spec: BackboneSpec
    best_pool: bool = False
    layers: tuple[str, ...] = ()
    views: int = 1

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        check_fields(self)
        FitPlan(layers=self.layers, best_pool=self.best_pool, views=self.views)  # what it refuses is refused here


@dataclass(frozen=True)
class Grid:
    """What a pipeline file asks for; seeds vary the drawn splits, the heads and the order of training."""

    name: str
    data: tuple[DataEntry, ...]
    backbones: tuple[BackboneEntry, ...]
    heads: tuple[str, ...]
    plans: tuple[FineTunePlan, ...]
    seeds: tuple[int, ...]
    gap: FineTunePlan | None = None


def load_grid(path: Path) -> Grid:
    """Read a pipeline file; environment variables in paths are filled in.

    Raises:
        UsageError: the file is absent, not TOML, has an unknown key, or names an unset variable.
    """
    try:
        table = tomllib.loads(_text(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such pipeline file.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # TOML's and UTF-8's own errors are ValueErrors
        hint = " Write [[dataset]] above each data set, [[backbone]] above each backbone." if "twice" in str(error) else ""
        raise UsageError(f"{path}: not TOML ({error}).{hint}") from error
    try:
        return _grid(table, path)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _text(path: Path) -> str:
    """Return a small regular file's text: a pipe would be waited for, a device read for ever."""
    size = path.stat().st_size
    if not path.is_file() or size > _MOST_BYTES:
        raise UsageError(f"{path}: a TOML file of at most {_MOST_BYTES} bytes is needed.")
    return path.read_text(encoding="utf-8")


def _grid(table: dict[str, Any], path: Path) -> Grid:
    _only(table, {"name", "seeds", "heads", "unfreeze", "gap", "group", "dataset", "backbone", "finetune"}, "the file")
    settings = _typed(table, "finetune", dict, {})
    _only(settings, set(_PLAN_KEYS), "[finetune]")
    if "lr" in settings and not isinstance(settings["lr"], list):
        settings = settings | {"lr": [settings["lr"]]}
    base = FineTunePlan(Unfreeze.parse("all"), **settings)
    plans = tuple(replace(base, unfreeze=Unfreeze.parse(text)) for text in _strings(table, "unfreeze"))
    group = check_value(table.get("group"), str | None, "group")
    data = tuple(_data(entry, group) for entry in _tables(table, "dataset", []))
    backbones = tuple(_backbone(entry) for entry in _tables(table, "backbone", [{}]))
    heads = _strings(table, "heads")
    if unknown := [head for head in heads if head not in HEAD_NAMES]:
        raise UsageError(
            f"heads: {unknown[0]!r}: choose from {', '.join(HEAD_NAMES)}.{did_you_mean(unknown[0], HEAD_NAMES)}"
        )
    if not data:
        raise UsageError("at least one [[dataset]] is needed.")
    takes_apart = _typed(table, "gap", bool, default=False)
    if not heads and not plans and not takes_apart:
        raise UsageError('nothing to run: give heads = ["logistic"], unfreeze = ["last:1"] or gap = true.')
    seeds = _typed(table, "seeds", list, [0])
    if not seeds:
        raise UsageError("seeds: at least one whole number from 0 is needed.")
    name = _file_name(_typed(table, "name", str, path.stem))
    if plans and any(backbone.best_pool for backbone in backbones):
        raise UsageError('[[backbone]] pool = "auto" is chosen for heads and by gap: name a pooling beside `unfreeze`.')
    seeds = tuple(dict.fromkeys(check_seed(seed, "seeds") for seed in seeds))
    return Grid(name, data, backbones, heads, plans, seeds, base if takes_apart else None)


def _file_name(name: str) -> str:
    """Return a name that stands for a file in the output folder and nowhere else: a pipeline may come from a stranger.

    Raises:
        UsageError: it holds a separator or what no file's name should.
    """
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name):
        raise UsageError(f"name: {name[:60]!r}: letters, digits, spaces and . _ + - are possible, up to 100 of them.")
    return name


def _tables(table: dict[str, Any], key: str, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = table.get(key, default)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{key}: write [[{key}]] and its keys below.")
    return entries


def _data(entry: dict[str, Any], group: str | None) -> DataEntry:
    """Return a data set; ``group`` is the file's own, for those that name none."""
    _only(entry, {field.name for field in fields(DataEntry)}, "[[dataset]]")
    if "data" not in entry:
        raise UsageError("[[dataset]]: data = PATH is needed.")
    data = _expand(_typed(entry, "data", str, ""))
    root = check_value(entry.get("data_root"), str | None, "[[dataset]] data_root")
    roots = {} if root is None else {"data_root": Path(_expand(root))}
    return DataEntry(**({"group": group} | entry | roots | {"data": data}))


def _backbone(entry: dict[str, Any]) -> BackboneEntry:
    if "pretrained" in entry:
        raise UsageError("[[backbone]] has no key 'pretrained': `random_init` = 0 draws random weights from that seed.")
    _only(entry, {"name", "weights", "random_init", "model_args", *_SPEC, *_READ, *_OVERRIDES}, "[[backbone]]")
    best_pool = entry.get("pool") == "auto"
    entry = entry | ({"pool": "default"} if best_pool else {})
    overrides: dict[str, Any] = {
        key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in _OVERRIDES if key in entry
    }
    weights = check_value(entry.get("weights"), str | None, "[[backbone]] weights")
    spec = BackboneSpec(
        name=_typed(entry, "name", str, BackboneSpec.name),
        weights=_expand(weights) if weights is not None else None,
        random_init=entry.get("random_init"),
        model_args=freeze_args(_typed(entry, "model_args", dict, {})),
        overrides=TransformOverrides(**overrides),
        **{key: entry[key] for key in _SPEC if key in entry},
    )
    return BackboneEntry(spec, best_pool, **{key: entry[key] for key in _READ if key in entry})


def _expand(text: str) -> str:
    expanded = str(Path(os.path.expandvars(text)).expanduser()) if not text.startswith("sklearn:") else text
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UsageError(f"{text}: set the environment variable {unset[1]} first.")
    return expanded


def _strings(table: dict[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(table, key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise UsageError(f"{key}: a list of strings is needed.")
    return tuple(dict.fromkeys(values))


def _typed(table: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise UsageError(f"{key}: a {_KINDS.get(kind, kind.__name__)} is needed, not {value!r:.60}.")
    return value


def _only(table: dict[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise UsageError(
            f"{where} has no key {unknown[0]!r}; it takes {', '.join(sorted(allowed))}.{did_you_mean(unknown[0], allowed)}"
        )


@dataclass(frozen=True, repr=False)
class BenchResult(Displayed):
    """What a grid came to: its records in the grid's order, what failed, and where it is written."""

    records: tuple[RunRecord, ...]
    failures: tuple[str, ...]
    computed_samples: int
    computed_cells: int
    paths: dict[str, str]

    def table(self) -> Table:
        """Return the grid's table, in fewer columns than the file's."""
        return report.short_table(self.records)


def run_bench(grid: Grid, settings: Settings, out: Path) -> BenchResult:
    """Run what is missing of a grid; a cell that fails is reported and the others go on, but where the disk fails.

    Args:
        grid: what to run.
        settings: how to run it.
        out: the folder for NAME.jsonl (records), NAME.md and NAME.csv (tables).

    Raises:
        StorageError: the disk failed: nothing more could be kept.
    """
    make_folder(out)
    runner = _Runner(grid, settings, out / f"{grid.name}.jsonl")
    try:
        for data in grid.data:
            for backbone in grid.backbones:
                runner.guarded(f"{data.data} x {backbone.spec.label}", partial(runner.run, data, backbone))
    finally:
        result = _write_tables(runner, out)
    return result


def _write_tables(runner: "_Runner", out: Path) -> BenchResult:
    """Render the records that there are, after an interrupt too."""
    latest = {record.cell: record for record in read_records([runner.path], warn=False)}
    cells = list(runner.cells)
    if runner.failures:  # whose cells are not known: what an earlier run has recorded of them stays in the table
        cells += [cell for cell in latest if cell not in set(cells)]
    records = tuple(latest[cell] for cell in cells if cell in latest)
    paths = {"records": str(runner.path)}
    failed = "".join(f"\nNot run: {failure}\n" for failure in runner.failures)
    for suffix, text in (("md", f"{report.markdown(records)}\n{failed}"), ("csv", report.to_csv(records))):
        path = out / f"{runner.grid.name}.{suffix}"
        replace_file(path, text.encode())
        paths[suffix] = str(path)
    return BenchResult(records, tuple(runner.failures), runner.computed_samples, runner.computed_cells, paths)


class _Runner:
    def __init__(self, grid: Grid, settings: Settings, path: Path) -> None:
        self.grid = grid
        self.settings = settings
        self.path = path
        methods = len(_expanded(grid.heads)) + len(grid.plans) + (grid.gap is not None)
        self.total = len(grid.data) * len(grid.backbones) * methods * len(grid.seeds)
        self.there = {record.cell for record in read_records([path]) if record.is_current}
        self.files: dict[DataEntry, DatasetFiles] = {}
        self.cells: list[str] = []
        self.failures: list[str] = []
        self.computed_samples = 0
        self.computed_cells = 0

    def guarded(self, what: str, act: Callable[[], None]) -> None:
        try:
            act()
        except FeatcacheError as error:
            if isinstance(error, StorageError) and isinstance(error.__cause__, OSError):
                raise  # a disk that is full or fails takes no other cell's record either
            logger.error("%s: %s", what, error)
            self.failures.append(f"{what}: {error}")

    def run(self, data: DataEntry, backbone: BackboneEntry) -> None:
        if data not in self.files:  # the files are looked at once, whichever backbones compute from them
            dataset = open_dataset(data.data, data.name, data_root=data.data_root, download=data.download)
            self.files = {data: DatasetFiles(dataset)}
        files = self.files[data]
        bench = FeatureCache(files.dataset, backbone.spec, self.settings, files=files)
        ledger = Ledger()
        if self.grid.heads:
            self._run_heads(bench, data, backbone, ledger)
        if self.grid.plans:
            self._run_plans(bench, data, ledger)
        if self.grid.gap is not None:
            self._run_gap(bench, data, self.grid.gap)

    def _run_heads(self, bench: FeatureCache, data: DataEntry, backbone: BackboneEntry, ledger: Ledger) -> None:
        plan = FitPlan(
            layers=backbone.layers,
            best_pool=backbone.best_pool,
            views=backbone.views,
            folds=data.folds,
            group=data.group,
            baselines=False,
        )
        (cut,) = plan.cuts([PROBE])
        entry = bench.extracted(cut, views=Views(backbone.views))
        self.computed_samples += entry.report.computed
        task = Task(entry.store.labelled(), group=data.group)
        for head in self._fitting(in_memory(entry.store)):
            fitting = replace(plan, heads=_with_members(head, self.grid.heads))
            members = [name for name in fitting.heads if name != head]
            for seed in self.grid.seeds:
                cell = fitting.experiment(bench, task, head, seed, members).key
                what = f"{bench.dataset.name}, {backbone.spec.label}, {head}, seed {seed}"
                self._cell(cell, what, partial(self._fit, bench, head, fitting, seed, ledger))

    def _run_plans(self, bench: FeatureCache, data: DataEntry, ledger: Ledger) -> None:
        entry = bench.extracted()
        self.computed_samples += entry.report.computed
        task = Task(entry.store.labelled(), group=data.group)
        for plan in self.grid.plans:
            for seed in self.grid.seeds:
                cell = Experiment(bench, task, plan.unfreeze.text, plan, seed).key
                if cell in self.there:
                    forget_state(bench.folder, cell)
                what = f"{bench.dataset.name}, {bench.spec.label}, {plan.unfreeze.text}, seed {seed}"
                self._cell(cell, what, partial(self._tune, bench, plan, data.group, seed, ledger))

    def _run_gap(self, bench: FeatureCache, data: DataEntry, plan: FineTunePlan) -> None:
        from featcache.experiments.gap import gap_experiment

        for seed in self.grid.seeds:
            cell = gap_experiment(bench, plan, data.group, seed).key
            what = f"{bench.dataset.name}, {bench.spec.label}, gap, seed {seed}"
            self._cell(cell, what, partial(self._take_apart, bench, plan, data.group, seed))

    def _take_apart(self, bench: FeatureCache, plan: FineTunePlan, group: str | None, seed: int) -> None:
        """Run all steps; theirs are no cells of the grid: their records go where those of commands are."""
        from featcache.experiments.gap import run_gap

        record = run_gap(bench, plan, group=group, seed=seed, records=self.settings.cache / RECORDS).record
        if record is not None:
            append_once(self.path, record)

    def _fitting(self, in_memory: bool) -> list[str]:  # noqa: FBT001
        """Return the heads that have rows; of ``all`` those that read from disk, where features do not fit memory."""
        names = _expanded(self.grid.heads)
        if in_memory or ALL not in self.grid.heads:
            return names
        able = [name for name in names if name in STREAMING]
        logger.warning("The features do not fit memory: without %s", ", ".join(name for name in names if name not in able))
        return able

    def _cell(self, cell: str, what: str, act: Callable[[], None]) -> None:
        self.cells.append(cell)
        if cell in self.there:
            return
        logger.info("%d of %d: %s", len(self.cells), self.total, what)
        self.guarded(what, act)
        self.computed_cells += 1

    def _fit(self, bench: FeatureCache, head: str, plan: FitPlan, seed: int, ledger: Ledger) -> None:
        run_fit(bench, plan, seed=seed, records=self.path, ledger=ledger, only={head})

    def _tune(self, bench: FeatureCache, plan: FineTunePlan, group: str | None, seed: int, ledger: Ledger) -> None:
        job = run_finetune(FineTuneInputs(bench, group=group, seed=seed, ledger=ledger), plan, records=self.path)
        self.computed_samples += job.computed_samples


def _expanded(heads: Sequence[str]) -> list[str]:
    """Return the heads that have rows of their own: for ``all`` each of them."""
    return list(dict.fromkeys(name for head in heads for name in (in_order([ALL]) if head == ALL else [head])))


def _with_members(head: str, heads: Sequence[str]) -> tuple[str, ...]:
    """Return a head, an ensemble with those that it may be made of: the usual ones, and those of its kind beside it."""
    if head != ENSEMBLE:
        return (head,)
    others = in_order([ALL]) if ALL in heads else [*members_of([ENSEMBLE]), *(name for name in heads if name in MEMBERS)]
    return tuple(in_order(others))


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
