"""Run the missing cells of a grid and write its records and tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from featcache.datasets import open_dataset
from featcache.display import Displayed, Table
from featcache.errors import FeatcacheError, StorageError
from featcache.evaluation.tasks import Task
from featcache.experiments.experiment import Experiment
from featcache.experiments.finetune import forget_state, run_finetune
from featcache.experiments.finetune_inputs import FineTuneInputs
from featcache.experiments.fit import FitPlan, Ledger, in_memory, run_fit
from featcache.experiments.grid import BackboneEntry, DataEntry, Grid
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.scan import DatasetFiles
from featcache.finetuning.plan import FineTunePlan
from featcache.heads.catalog import ALL, ENSEMBLE, MEMBERS, STREAMING, in_order, members_of
from featcache.progress import logger
from featcache.reports import tables as report
from featcache.reports.records import RunRecord, read_records
from featcache.specs import POOLED, Views, cut_of_layers
from featcache.store.atomic import make_folder, replace_file


@dataclass(frozen=True, repr=False)
class BenchResult(Displayed):
    """What a grid came to: its records in the grid's order, what failed, and where it is written."""

    records: tuple[RunRecord, ...]
    failures: tuple[str, ...]
    computed_images: int
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
    records = tuple(latest[cell] for cell in runner.cells if cell in latest)
    paths = {"records": str(runner.path)}
    for suffix, text in (("md", report.markdown(records) + "\n"), ("csv", report.to_csv(records))):
        path = out / f"{runner.grid.name}.{suffix}"
        replace_file(path, text.encode())
        paths[suffix] = str(path)
    return BenchResult(records, tuple(runner.failures), runner.computed_images, runner.computed_cells, paths)


class _Runner:
    def __init__(self, grid: Grid, settings: Settings, path: Path) -> None:
        self.grid = grid
        self.settings = settings
        self.path = path
        self.total = len(grid.data) * len(grid.backbones) * (len(_expanded(grid.heads)) + len(grid.plans)) * len(grid.seeds)
        self.there = {record.cell for record in read_records([path])}
        self.files: dict[DataEntry, DatasetFiles] = {}
        self.cells: list[str] = []
        self.failures: list[str] = []
        self.computed_images = 0
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

    def _run_heads(self, bench: FeatureCache, data: DataEntry, backbone: BackboneEntry, ledger: Ledger) -> None:
        cut = cut_of_layers(backbone.layers) if backbone.layers else POOLED
        entry = bench.extracted(cut, views=Views(backbone.views))
        self.computed_images += entry.report.computed
        task = Task.of(entry.store.labelled(), group=data.group)
        plan = FitPlan(layers=backbone.layers, views=backbone.views, folds=data.folds, group=data.group, baselines=False)
        for head in self._fitting(in_memory(entry.store)):
            fitting = replace(plan, heads=_with_members(head, self.grid.heads))
            members = [name for name in fitting.heads if name != head]
            for seed in self.grid.seeds:
                cell = fitting.experiment(bench, task, head, seed, members).key
                what = f"{bench.dataset.name} {head}, seed {seed}"
                self._cell(cell, what, partial(self._fit, bench, head, fitting, seed, ledger))

    def _run_plans(self, bench: FeatureCache, data: DataEntry, ledger: Ledger) -> None:
        entry = bench.extracted()
        self.computed_images += entry.report.computed
        task = Task.of(entry.store.labelled(), group=data.group)
        for plan in self.grid.plans:
            for seed in self.grid.seeds:
                cell = Experiment(bench, task, plan.unfreeze.text, plan, seed).key
                if cell in self.there:
                    forget_state(bench.folder, cell)
                what = f"{bench.dataset.name} {plan.unfreeze.text}, seed {seed}"
                self._cell(cell, what, partial(self._tune, bench, plan, data.group, seed, ledger))

    def _fitting(self, in_memory: bool) -> list[str]:  # noqa: FBT001
        """Return the heads that have rows; of ``all`` those that read from disk, where features do not fit memory."""
        names = _expanded(self.grid.heads)
        if in_memory or ALL not in self.grid.heads:
            return names
        able = [name for name in names if name in STREAMING]
        logger.warning("the features do not fit memory: without %s", ", ".join(name for name in names if name not in able))
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
        self.computed_images += job.computed_images


def _expanded(heads: Sequence[str]) -> list[str]:
    """Return the heads that have rows of their own: for ``all`` each of them."""
    return list(dict.fromkeys(name for head in heads for name in (in_order([ALL]) if head == ALL else [head])))


def _with_members(head: str, heads: Sequence[str]) -> tuple[str, ...]:
    """Return a head, an ensemble with those that it may be made of: the usual ones, and those of its kind beside it."""
    if head != ENSEMBLE:
        return (head,)
    others = in_order([ALL]) if ALL in heads else [*members_of([ENSEMBLE]), *(name for name in heads if name in MEMBERS)]
    return tuple(in_order(others))
