"""The library's commands as functions; the command line only parses options and calls these."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from featcache.display import Displayed
from featcache.errors import DataError, FeatcacheError, UsageError
from featcache.reports import RECORDS
from featcache.specs import INPUT, POOLED, BackboneSpec, StoredDtype, Views, check_seed, check_value

# What runs is imported by the function that runs it: `featcache.fit` on a hit must not pay for PyTorch, nor a signature
# for the ten modules behind its types.
if TYPE_CHECKING:
    from featcache.datasets import Dataset, PartlyLabelled
    from featcache.experiments.advise import AdviceResult
    from featcache.experiments.audit import AuditResult
    from featcache.experiments.bench import BenchResult, Places
    from featcache.experiments.export import Exported, ModelFile
    from featcache.experiments.finetune import FineTuneResult, SweepResult
    from featcache.experiments.fit import FitPlan, FitResult
    from featcache.experiments.gap import GapResult
    from featcache.experiments.next_samples import NextResult
    from featcache.experiments.predict import Prediction
    from featcache.experiments.report import Format, PagePlan, Report
    from featcache.extraction.feature_cache import Estimate, Extracted, FeatureCache, Output, Settings
    from featcache.finetuning import FineTunePlan
    from featcache.heads.bundle import Bundle
    from featcache.heads.rejection import RejectPlan
    from featcache.reports import RunRecord
    from featcache.reports.tables import AgainstResult, ReplayResult

Tabled = TypeVar("Tabled", bound=Displayed)


def extract(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    cut: str = POOLED,
    dtype: StoredDtype | None = None,
    views: Views | None = None,
    settings: "Settings | None" = None,
) -> "Extracted":
    """Compute a frozen backbone's features of a data set, unless they are cached.

    >>> import featcache
    >>> extracted = featcache.extract("sklearn:digits")  # doctest: +SKIP
    >>> extracted.store.features().X.shape  # doctest: +SKIP
    (1797, 480)

    Args:
        data: what ``open_dataset`` takes, or what it has opened, under a name of its own for example.
        backbone: ``mini``, a timm name, or a BackboneSpec.
        cut: ``pooled``, ``tokens`` (what is pooled), a stage's name, several layers such as ``layer3+layer4``, or ``input``.
        dtype: what rows are stored in; embeddings float32 and activation maps float16 by default.
        views: how many views of each image: rows are then (views, ...).
        settings: cache folder, batch size, device, runtime.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    return extract_cuts(data, backbone, cuts=[cut], dtype=dtype, views=views, settings=settings)[0]


def extract_cuts(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    cuts: Sequence[str],
    dtype: StoredDtype | None = None,
    views: Views | None = None,
    settings: "Settings | None" = None,
) -> "list[Extracted]":
    """As ``extract``, for several cuts in one pass over the images; ``dtype`` is that of all but ``input``.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    cache = _feature_cache(data, backbone, settings)
    return cache.features(_outputs(cuts, dtype), views, thumbnails=_thumbnails_of(cache))


def estimate(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    cuts: Sequence[str] = (POOLED,),
    dtype: StoredDtype | None = None,
    views: Views | None = None,
    settings: "Settings | None" = None,
) -> "Estimate":
    """Say what ``extract_cuts`` would compute, write and take.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    cache = _feature_cache(data, backbone, settings)
    return cache.estimate(_outputs(cuts, dtype), views, thumbnails=_thumbnails_of(cache))


def _thumbnails_of(cache: "FeatureCache") -> int | None:
    """Return the pixels a side of thumbnails where there are classes: heads come next, and with them what looks at these."""
    from featcache.datasets.decoding import SIDE

    return SIDE if len(cache.dataset.table.labels) > 1 else None


def fit(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    heads: Sequence[str] | None = None,
    plan: "FitPlan | None" = None,
    seed: int = 0,
    settings: "Settings | None" = None,
) -> "FitResult":
    """Train scikit-learn heads on a data set's embeddings, extracted first if needed.

    >>> import featcache
    >>> featcache.fit("photos", heads=["logistic", "knn"])  # doctest: +SKIP

    Args:
        data: as of ``extract``.
        backbone: as of ``extract``.
        heads: their names, all else as usual; a logistic one by default.
        plan: which heads, and how, instead of ``heads``.
        seed: of the drawn splits and of the heads' own randomness.
        settings: as of ``extract``.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.fit import FitPlan, run_fit

    if heads is not None and plan is not None:
        raise UsageError("`heads` and `plan` are both given: write the heads into the plan, FitPlan(heads=...).")
    usual = FitPlan() if heads is None else FitPlan(_names(heads, "heads"))
    seed, plan = check_seed(seed), check_value(plan or usual, FitPlan, "plan")
    cache = _feature_cache(data, backbone, settings)
    return _tracked(run_fit(cache, plan, seed=seed, records=cache.settings.cache / RECORDS), cache.settings, "fit")


def predict(
    head: str | Path,
    images: Sequence[str | Path],
    *,
    reject: "RejectPlan | None" = None,
    weights: str | None = None,
    trust: bool = False,
    settings: "Settings | None" = None,
) -> "tuple[Bundle, Iterator[Prediction]]":
    """Label images with a head that ``fit`` wrote, in the order given; nothing is kept.

    Args:
        head: its file.
        images: files and folders, of texts as of images; tables of texts; of a head that was trained on columns, manifests
            that have these columns.
        reject: say of each image, too, which classes may be true, and whether the head knows; by default that is not asked.
        weights: where the backbone's weights file is now, if it has moved.
        trust: load a head that somebody else made: it can run any code.
        settings: device, batch size, runtime, workers.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.predict import find_samples, label_manifests, label_samples, needs_tables, samples_of
    from featcache.extraction.feature_cache import Settings
    from featcache.heads.bundle import load
    from featcache.heads.rejection import Rejection, RejectPlan

    bundle, settings = load(Path(head), trust=trust), settings or Settings()
    rejection = None if reject is None else Rejection.of(bundle, check_value(reject, RejectPlan, "reject"))
    if needs_tables(bundle, places := list(map(Path, images))):
        return bundle, label_manifests(bundle, places, settings, weights=weights, rejection=rejection)
    kind = samples_of(bundle)
    paths = list(find_samples(map(str, images), kind))
    if not paths:
        raise DataError(f"{', '.join(map(str, images)) or 'nothing'}: there is no {kind} to label.")
    return bundle, label_samples(bundle, paths, settings, weights=weights, rejection=rejection)


def export(
    head: str | Path,
    path: "str | Path | ModelFile",
    *,
    check: "str | Path | Dataset | None" = None,
    weights: str | None = None,
    trust: bool = False,
    settings: "Settings | None" = None,
) -> "Exported":
    """Write backbone and head as one ONNX model, once it has agreed with them on real images.

    Args:
        head: the head's file.
        path: where the model goes; a ``ModelFile`` says, too, whether it tells when it does not know, as ``predict`` does.
        check: images to compare on; the data set that the head was trained on, if left out.
        weights: where the backbone's weights file is now, if it has moved.
        trust: load a head that somebody else made: it can run any code.
        settings: device.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.datasets import Dataset, open_dataset
    from featcache.experiments import export as exporting
    from featcache.extraction.feature_cache import Settings
    from featcache.heads.bundle import load

    bundle = load(Path(head), trust=trust)
    where = check or bundle.card.get("data")
    if where is None:
        raise DataError(f"{head}: its card does not say on which images it was trained: give some to compare on (`check`).")
    try:
        images = where if isinstance(where, Dataset) else open_dataset(where)
    except FeatcacheError as error:
        if check is not None:
            raise
        raise DataError(f"{error} The model is compared with the head on images: give some with `check`.") from error
    file = path if isinstance(path, exporting.ModelFile) else exporting.ModelFile(Path(path))
    return exporting.export(bundle, file, images, settings or Settings(), weights=weights)


def finetune(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    unfreeze: str = "last:1",
    plan: "FineTunePlan | None" = None,
    probes: Sequence[str] = (),
    group: str | None = None,
    seed: int = 0,
    settings: "Settings | None" = None,
) -> "FineTuneResult":
    """Train part of a backbone from cached activations and measure the gap to the best probe.

    ``plan`` replaces ``unfreeze`` where it is given. The gap is to the best on validation of ridge, nearest neighbours,
    logistic and ``probes``; ``group`` is a manifest's column whose values are never in two parts.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.finetune import FineTuneInputs, run_finetune
    from featcache.finetuning import FineTunePlan, Unfreeze

    plan = check_value(plan or FineTunePlan(Unfreeze.parse(unfreeze)), FineTunePlan, "plan")
    seed, probes = check_seed(seed), check_value(probes, tuple[str, ...], "probes")
    group = check_value(group, str | None, "group")
    cache = _feature_cache(data, backbone, settings)
    inputs = FineTuneInputs(cache, probes=probes, group=group, seed=seed)
    return _tracked(run_finetune(inputs, plan, records=cache.settings.cache / RECORDS), cache.settings, "finetune")


def sweep(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    plan: "FineTunePlan | None" = None,
    probes: Sequence[str] = (),
    group: str | None = None,
    seed: int = 0,
    settings: "Settings | None" = None,
) -> "SweepResult":
    """Fine-tune at every depth, from the last stage to the whole backbone; ``plan.unfreeze`` is left aside.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.finetune import FineTuneInputs, run_sweep
    from featcache.finetuning import FineTunePlan, Unfreeze

    plan = check_value(plan or FineTunePlan(Unfreeze.parse("all")), FineTunePlan, "plan")
    seed, probes = check_seed(seed), check_value(probes, tuple[str, ...], "probes")
    group = check_value(group, str | None, "group")
    cache = _feature_cache(data, backbone, settings)
    inputs = FineTuneInputs(cache, probes=probes, group=group, seed=seed)
    return _tracked(run_sweep(inputs, plan, records=cache.settings.cache / RECORDS), cache.settings, "finetune")


def gap(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    plan: "FineTunePlan | None" = None,
    group: str | None = None,
    seed: int = 0,
    budget: float | None = None,
    settings: "Settings | None" = None,
) -> "GapResult":
    """Take the accuracy of a tuned network apart: what is pooling, other layers, attention, weights.

    ``plan.unfreeze`` is left aside: weights are trained at every depth. ``budget`` are seconds after which no further step
    is begun; called again it goes on from there.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.gap import run_gap
    from featcache.finetuning import FineTunePlan, Unfreeze

    plan = check_value(plan or FineTunePlan(Unfreeze.parse("all")), FineTunePlan, "plan")
    seed, group = check_seed(seed), check_value(group, str | None, "group")
    budget = check_value(budget, float | None, "budget")
    cache = _feature_cache(data, backbone, settings)
    result = run_gap(cache, plan, group=group, seed=seed, budget=budget, records=cache.settings.cache / RECORDS)
    return _tracked(result, cache.settings, "gap")


def audit(
    data: "str | Path | Dataset",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    beside: Sequence[str | BackboneSpec] = ("mini",),
    group: str | None = None,
    seed: int = 0,
    settings: "Settings | None" = None,
) -> "AuditResult":
    """Look for copies across splits, likely wrong labels, odd images and shortcuts, and for what they do to test accuracy.

    >>> import featcache
    >>> audited = featcache.audit("photos")  # doctest: +SKIP
    >>> audited.leaks.leaked.change_ci  # doctest: +SKIP

    Args:
        data: as of ``extract``; nothing of it is changed.
        backbone: as of ``extract``.
        beside: other backbones, on whose embeddings heads doubt labels too; two that see differently doubt better.
        group: a manifest's column whose values are never in two parts.
        seed: of the drawn splits, folds and the sample that thresholds are fitted on.
        settings: as of ``extract``.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.audit import run_audit

    seed, group = check_seed(seed), check_value(group, str | None, "group")
    names = check_value(beside, tuple[str | BackboneSpec, ...], "beside")
    specs = [BackboneSpec(name) if isinstance(name, str) else name for name in names]
    return run_audit(_feature_cache(data, backbone, settings), beside=specs, group=group, seed=seed)


def advise(
    data: "str | Path | Dataset",
    backbones: Sequence[str | BackboneSpec] = (),
    *,
    group: str | None = None,
    seed: int = 0,
    budget: float | None = None,
    settings: "Settings | None" = None,
) -> "AdviceResult":
    """Find the backbone that does best on samples of the images, and what speaks for training its weights.

    >>> import featcache
    >>> advice = featcache.advise("photos", ["resnet50"])  # doctest: +SKIP
    >>> advice.backbone, advice.depth, advice.chance  # doctest: +SKIP

    Args:
        data: as of ``extract``; its test split is not looked at.
        backbones: candidates beside the bundled ones and those that have rows of this data set already.
        group: a manifest's column whose values are never in two parts.
        seed: of splits, samples and draws.
        budget: seconds after which no further step is begun.
        settings: as of ``extract``.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.experiments.advise import run_advise

    seed, group = check_seed(seed), check_value(group, str | None, "group")
    budget = check_value(budget, float | None, "budget")
    names = check_value(backbones, tuple[str | BackboneSpec, ...], "backbones")
    specs = [BackboneSpec(name) if isinstance(name, str) else name for name in names]
    cache = _feature_cache(data, specs[0] if specs else BackboneSpec(), settings)
    return run_advise(cache, specs, group=group, seed=seed, budget=budget)


def next_samples(
    data: "str | Path | PartlyLabelled",
    backbone: str | BackboneSpec = BackboneSpec.name,
    *,
    unlabelled: Sequence[str | Path] = (),
    n: int = 50,
    seed: int = 0,
    settings: "Settings | None" = None,
) -> "NextResult":
    """Choose which samples to label next: what stands for most of the rest, later what a probe is unsure of, too.

    >>> import featcache
    >>> chosen = featcache.next_samples("photos", unlabelled=["new_photos"], n=20)  # doctest: +SKIP
    >>> chosen.samples[0].path, chosen.saving  # doctest: +SKIP

    Args:
        data: as of ``extract``, labels may be missing: in rows of a table, or in all of a folder without class folders; or
            what ``featcache.datasets.open_partly`` has opened, which takes a column of groups.
        backbone: as of ``extract``.
        unlabelled: files, folders and tables of unlabelled samples beside those.
        n: how many to choose.
        seed: of the simulation on the labels that are there.
        settings: as of ``extract``.

    Raises:
        FeatcacheError: its subclass says what to change.
    """
    from featcache.datasets import PartlyLabelled, open_partly
    from featcache.experiments.next_samples import run_next

    seed, count = check_seed(seed), check_value(n, int, "n")
    opened = data if isinstance(data, PartlyLabelled) else open_partly(data)
    opened = opened.beside(check_value(unlabelled, tuple[str | Path, ...], "unlabelled"))
    # what its entry lists stays: a part of these samples has no label
    cache = _feature_cache(opened.dataset, backbone, settings, lists=False)
    return run_next(cache, opened.groups, count, seed)


def bench(
    pipeline: str | Path, *, out: Path | None = None, group: str | None = None, settings: "Settings | None" = None
) -> "BenchResult":
    """Run the missing cells of a pipeline file and write its records and tables.

    ``group`` is a manifest's column whose values are never in two parts, of all data sets that name none.

    Raises:
        UsageError: the file asks for what cannot be done.
        StorageError: the disk failed.
    """
    from featcache.experiments.bench import load_grid, run_bench
    from featcache.extraction.feature_cache import Settings

    grid = load_grid(Path(pipeline))
    grid = replace(grid, data=tuple(replace(entry, group=entry.group or group) for entry in grid.data))
    settings = settings or Settings()
    return _tracked(run_bench(grid, settings, out or default_out()), settings, f"bench {grid.name}")


def quickstart(cache: Path | None = None, *, text: bool = False, plan: "PagePlan | None" = None) -> "BenchResult":
    """Run the whole road on a small data set that is installed along, and make a page of its records.

    Args:
        cache: where everything is kept; the default cache by default.
        text: on texts, by an encoder that is made on the spot, of random weights; else on digits, by the bundled backbone.
        plan: what the page shows beside the records.

    Raises:
        SetupError: texts need transformers.
        StorageError: the disk failed.
    """
    from importlib import resources

    from featcache.experiments.bench import BackboneEntry, load_grid, run_bench
    from featcache.extraction import default_cache
    from featcache.extraction.feature_cache import Settings

    where = cache or default_cache()
    folder = where / RECORDS.parent
    with resources.as_file(resources.files("featcache") / "assets") as assets:
        grid = load_grid(assets / f"quickstart{'-text' if text else ''}.toml")
    if text:
        from featcache.backbones.encoders import write_tiny_encoder
        from featcache.datasets.arrays import other_docstrings

        encoder = write_tiny_encoder(folder / "tiny-encoder", other_docstrings())
        grid = replace(grid, backbones=(BackboneEntry(BackboneSpec(f"text:{encoder}")),))
    result = run_bench(grid, Settings(where), folder)
    if not result.records:
        return result
    page = Path(result.paths["records"]).with_suffix(".html")
    report(result.paths["records"], {"html": page}, plan=plan, cache=where)
    return replace(result, paths=result.paths | {"html": str(page)})


def replay(
    records: str | Path, places: "Places | None" = None, *, only: str = "", settings: "Settings | None" = None
) -> "ReplayResult":
    """Run the experiments of a file of records again, in a cache of their own, and compare what comes out.

    >>> featcache.replay("benchmarks/quickstart.jsonl").agrees  # doctest: +SKIP
    True

    Args:
        records: a JSONL file of ``bench`` or a cache's ``records/runs.jsonl``.
        places: where data sets and weights lie, and what may be reused.
        only: the beginning of the cells to run; all of them by default.
        settings: device, batch size, runtime, workers; its cache is left alone.

    Raises:
        DataError: no such record is in the file.
        StorageError: the disk failed.
    """
    from featcache.experiments.bench import Places, run_replay
    from featcache.extraction.feature_cache import Settings

    places = check_value(places or Places(), Places, "places")
    chosen = [record for record in read_published(records) if record.cell.startswith(only)]
    if not chosen:
        raise DataError(f"{records}: no record's cell begins with {only!r:.70} (`only`).")
    return run_replay(chosen, places, settings or Settings())


def compare(records: "Sequence[RunRecord]", published: str | Path) -> "AgainstResult":
    """Put own records beside published ones of the same test images, split, score and protocol; others are refused.

    >>> result = featcache.bench("grid.toml")  # doctest: +SKIP
    >>> featcache.compare(result.records, "published.jsonl")  # doctest: +SKIP

    Args:
        records: own ones, as ``bench`` returns them.
        published: a JSONL file of records.

    Raises:
        DataError: the file has no record, or none that an own one may stand beside.
    """
    from featcache.reports.tables import compare_with_published

    return compare_with_published(list(records), read_published(published))


def read_published(path: str | Path) -> "list[RunRecord]":
    """Read a file of records, of a cell that ran twice the latest.

    Raises:
        DataError: there is none in it.
    """
    from featcache.reports import read_records
    from featcache.reports.tables import latest_of

    latest = list(latest_of(read_records([Path(path)])))
    if not latest:
        raise DataError(f"{path}: there is no run record in it: a JSONL file that `featcache bench` wrote is needed.")
    return latest


def report(
    records: "str | Path | Sequence[str | Path]" = (),
    files: "Mapping[Format, str | Path | None] | None" = None,
    *,
    plan: "PagePlan | None" = None,
    datasets: Sequence[str] = (),
    cache: Path | None = None,
) -> "Report":
    """Make one page to send, or tables, of records.

    >>> import featcache
    >>> featcache.report(files={"html": "page.html"})  # doctest: +SKIP

    Args:
        records: JSONL files; all below the cache, where none is given.
        files: what is made, of ``html``, ``md``, ``csv`` and ``tex``, and where; ``None``: it is in the result's ``texts``.
        plan: what the page shows.
        datasets: report these alone.
        cache: the one that the records' heads and images are found by.

    Raises:
        DataError: there is no such record.
        StorageError: a file cannot be read or written.
    """
    from featcache.experiments.report import PagePlan, run_report
    from featcache.extraction import default_cache

    where = cache or default_cache()
    sources = [Path(records)] if isinstance(records, str | Path) else list(map(Path, records))
    sources = sources or sorted((where / RECORDS.parent).glob("*.jsonl")) or [where / RECORDS]
    targets = {kind: None if path is None else Path(path) for kind, path in (files or {}).items()}
    plan = check_value(plan or PagePlan(), PagePlan, "plan")
    return run_report(sources, targets, plan, where, check_value(datasets, tuple[str, ...], "datasets"))


def default_out() -> Path:
    """Return where tables go: ``benchmarks/`` where there is one, else the current folder."""
    return Path("benchmarks") if Path("benchmarks").is_dir() else Path()


def _outputs(cuts: Sequence[str], dtype: StoredDtype | None) -> "list[Output]":
    from featcache.extraction.feature_cache import Output

    return [Output(cut, None if cut == INPUT else dtype) for cut in dict.fromkeys(_names(cuts, "cuts"))]


def _names(values: Sequence[str], field: str) -> tuple[str, ...]:
    """Return some names as a tuple; one text is no list of them, though Python would take it for its letters."""
    names: tuple[str, ...] = check_value(values, tuple[str, ...], field)
    if not names:
        raise UsageError(f"{field}: at least one is needed.")
    return names


def _tracked(result: "Tabled", settings: "Settings", name: str) -> "Tabled":
    """Return a result once the tracker, where there is one, has been told its table."""
    if settings.tracker is not None:
        settings.tracker.on_result(name, result.table())
    return result


def _feature_cache(
    data: "str | Path | Dataset", backbone: str | BackboneSpec, settings: "Settings | None", *, lists: bool = True
) -> "FeatureCache":
    """Return a data set and a backbone with their entries; each argument is checked before anything is opened."""
    from featcache.datasets import Dataset, open_dataset
    from featcache.extraction.feature_cache import FeatureCache, Settings

    spec = BackboneSpec(backbone) if isinstance(backbone, str) else check_value(backbone, BackboneSpec, "backbone")
    settings = check_value(settings or Settings(), Settings, "settings")
    dataset = data if isinstance(data, Dataset) else open_dataset(check_value(data, str | Path, "data"))
    return FeatureCache(dataset, spec, settings, lists=lists)
