"""Jobs: one command's work from a data set to run records, extracting first whatever is not in the cache."""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.datasets.base import require_one_label
from featcache.datasets.tables import read_column
from featcache.errors import DataError, UsageError
from featcache.evaluation.metrics import confusion, gap, per_class
from featcache.evaluation.splits import Split, few_shot, make_free_split, make_split, restricted
from featcache.evaluation.tasks import Task
from featcache.experiments.experiment import Experiment, Outcome, aligned
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output
from featcache.progress import logger
from featcache.reports.records import RunRecord, append_record
from featcache.resources import free_memory
from featcache.specs import POOLED, Views, check_fields, cut_of_layers
from featcache.store.entry import FeatureStore
from featcache.store.rows import Features, LazyRows

if TYPE_CHECKING:
    from featcache.heads.baselines import Baseline
    from featcache.heads.curves import Curve
    from featcache.heads.fit import FittedHead
    from featcache.heads.fit_multioutput import FittedTarget

PROBE = "logistic"
PROBES = ("ridge", "knn", PROBE)  # what the gap is taken to at least: the cheap ones
_MOST_SHOTS = 1_000_000
_MOST_IN_A_MATRIX = 50
_COPIES = 2.5  # of the features in float32, that the heads that take the most memory need


@dataclass(frozen=True)
class Mistake:
    """A test image that a head takes for another class, and the probability that it gives that class, if it gives any."""

    path: str
    label: str
    predicted: str
    confidence: float | None


@dataclass(frozen=True)
class HeadResult:
    """A fitted head with its record; ``paths`` and ``labels`` are those of the test images, in its answers' order."""

    fitted: "FittedHead"
    record: RunRecord
    bundle: Path
    confusion: NDArray[np.int64]
    classes: tuple[str, ...]
    paths: tuple[str, ...] = field(default=(), repr=False)
    labels: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    def mistakes(self, count: int) -> list[Mistake]:
        """Return wrong answers on the test split, the most confident first; without probabilities in the images' order."""
        tested = self.fitted.tested
        wrong = np.flatnonzero(~tested.right)
        if tested.confidence is not None:
            wrong = wrong[np.argsort(-tested.confidence[wrong], kind="stable")]  # stable: equal ones keep their order
        return [
            Mistake(
                self.paths[image],
                self.classes[self.labels[image]],
                self.classes[tested.predicted[image]],
                None if tested.confidence is None else float(tested.confidence[image]),
            )
            for image in wrong[:count].tolist()
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``heads`` of ``featcache fit``."""
        record = self.record
        return {
            "head": record.method,
            "best_params": record.params,
            "val": record.val,
            "test": record.test,
            "per_class": per_class(self.confusion, self.classes),
            "confusion": self.confusion.tolist() if len(self.classes) <= _MOST_IN_A_MATRIX else None,
            "seconds": record.seconds["fit"],
            "bundle": str(self.bundle),
            "notes": list(record.notes),
        }


@dataclass(frozen=True)
class FitPlan:
    """How heads are trained.

    Attributes:
        heads: names; ``all`` for each, the cheapest first.
        layers: train on the pooled activations of these layers side by side; none: on the backbone's embedding.
        views: so many views of each image train, and are averaged over in answers.
        grid: parameters to choose from, for one head, instead of its own.
        folds: of cross-validation; ``None`` leaves it to the size of the data, 0 takes the val split.
        budget: seconds after which no further head is begun.
        target: what a label is: a class, several labels with ``;`` between, or a number.
        group: the column of the source's manifest whose values stay together, such as a patient.
        shots: train on so many images a class too, several times.
        curve: train on shares of the training images too, several times.
        controls: train trivial methods beside, which need no backbone.
        format: of the bundles.
    """

    heads: tuple[str, ...] = (PROBE,)
    layers: tuple[str, ...] = ()
    views: int = 1
    grid: tuple[tuple[str, tuple[int | float, ...]], ...] = ()
    folds: int | None = None
    budget: float | None = None
    target: Literal["label", "labels", "number"] = "label"
    group: str | None = None
    shots: tuple[int, ...] = ()
    curve: bool = False
    baselines: bool = True
    format: Literal["joblib", "skops"] = "joblib"

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind, and those that nothing could be trained with."""
        check_fields(self)
        if not self.heads:
            raise UsageError("`heads`: at least one is needed, such as logistic.")
        if self.folds is not None and self.folds < 0:
            raise UsageError(f"`folds` {self.folds}: 0 or more is needed.")
        if self.budget is not None and self.budget < 0:
            raise UsageError(f"`budget` {self.budget:g}: seconds from 0 are needed.")
        if not all(1 <= shots <= _MOST_SHOTS for shots in self.shots):
            raise UsageError(f"`shots` {self.shots}: whole numbers from 1 to {_MOST_SHOTS} are needed.")
        if not all(values for _, values in self.grid):
            raise UsageError("`grid`: at least one value a parameter is needed.")
        Views(self.views)

    def candidates(self) -> list[dict[str, Any]] | None:
        """Return all combinations of the grid's values, ``None`` where there is no grid."""
        names, values = [name for name, _ in self.grid], [values for _, values in self.grid]
        return [dict(zip(names, some, strict=True)) for some in product(*values)] if names else None

    def choice(self) -> dict[str, Any]:
        """Return what was asked for otherwise than usual in how parameters are chosen: another experiment."""
        usual = FitPlan()
        return {
            name: getattr(self, name) for name in ("grid", "folds", "group") if getattr(self, name) != getattr(usual, name)
        }


@dataclass(frozen=True)
class MultioutputResult:
    """A fitted head for several labels or a number, with its record."""

    fitted: "FittedTarget"
    record: RunRecord
    bundle: Path

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``heads`` of ``featcache fit``."""
        return self.fitted.summary | {"bundle": str(self.bundle), "notes": list(self.record.notes)}


@dataclass(frozen=True)
class FitResult:
    """What ``fit`` has done: the embeddings' entry, the heads, controls that need no backbone, and curves."""

    extracted: Extracted
    heads: "list[HeadResult]"
    baselines: "list[Baseline]"
    curves: "list[Curve]"
    targets: "list[MultioutputResult]" = field(default_factory=list)

    @property
    def best(self) -> "HeadResult | None":
        """The head that is best on validation, by accuracy and then log-loss; the test split has no say in it."""
        return min(self.heads, key=lambda head: head.fitted.val.rank, default=None)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache fit``."""
        return {
            "extract": self.extracted.summary,
            "heads": [*(job.summary for job in self.heads), *(job.summary for job in self.targets)],
            "controls": [baseline.summary for baseline in self.baselines],
            "curves": [curve.summary for curve in self.curves],
        }


@dataclass
class Ledger:
    """What one command has done already on one data set and backbone, so that nothing is fitted or said twice.

    Attributes:
        jobs: fitted heads by their cell.
        recorded: cells whose record is in the file.
        said: what was said of splits.
    """

    jobs: dict[str, HeadResult] = field(default_factory=dict)
    recorded: set[str] = field(default_factory=set)
    said: set[str] = field(default_factory=set)

    def slim(self) -> None:
        """Keep what fine-tuning asks for: the probes' records, and the estimator of the one it starts from."""
        kept = {cell: job for cell, job in self.jobs.items() if job.fitted.name in PROBES}
        self.jobs = {
            cell: job if job.fitted.name == PROBE else replace(job, fitted=replace(job.fitted, estimator=None))
            for cell, job in kept.items()
        }


def run_fit(
    bench: FeatureCache,
    plan: FitPlan,
    *,
    seed: int = 0,
    records: Path | None = None,
    ledger: Ledger | None = None,
    only: Collection[str] | None = None,
    keep: bool = True,
) -> FitResult:
    """Extract embeddings if needed and train heads on them; records are appended to a JSONL file.

    Args:
        bench: the data set and the backbone.
        plan: which heads, and how.
        seed: of the drawn splits and of the heads' own randomness.
        records: the file that gets the records.
        ledger: heads in it are not fitted again, and records in it not written again; it is brought up to date.
        only: heads whose records are wanted, where some are fitted for the sake of others.
        keep: write the heads' files: of several processes that train together one does.

    Raises:
        UsageError: a head is unknown, or does not go with the plan; nothing has been computed then.
    """
    from featcache import heads
    from featcache.heads.baselines import SIDE

    names = _heads_of(plan)
    if plan.target != "labels":
        require_one_label(bench.dataset)
    output = Output(cut_of_layers(plan.layers) if plan.layers else POOLED)
    side = SIDE if plan.baselines and plan.target == "label" else None
    (done,) = bench.features([output], Views(plan.views), thumbnails=side)
    features, names = _features(done, plan, names)
    groups = groups_of(bench, features, plan.group)
    task = Task.of(features, plan.target, groups, plan.group)
    if plan.target != "label":
        return FitResult(done, [], [], [], _fit_targets(bench, done, task, plan, seed, records))
    split = make_split(
        features.y, features.splits, features.classes, seed, groups=groups, folds=plan.folds, contents=features.sha256
    )
    for shots in plan.shots:
        few_shot(split, features.y, shots, seed, features.sha256)  # what cannot be drawn is said before anything is trained
    ledger = ledger if ledger is not None else Ledger()
    _say(task, split, ledger)
    jobs: list[HeadResult] = []
    started = time.monotonic()
    for name in names:
        if plan.budget is not None and jobs and time.monotonic() - started > plan.budget:
            left = names[names.index(name) :]
            logger.warning("`budget` %g s is spent: without %s", plan.budget, ", ".join(left))
            break
        members = [job.fitted.name for job in jobs] if name == heads.ENSEMBLE else []
        experiment = head_experiment(bench, task, name, plan, seed, members)
        cell = experiment.key
        if cell not in ledger.jobs:
            fitted = _fitted(name, jobs, features, split, plan, seed)
            if fitted is None:
                continue
            ledger.jobs[cell] = _keep_head(experiment, done, split, fitted, plan, keep=keep)
        job = ledger.jobs[cell]
        if records and cell not in ledger.recorded and (only is None or name in only):
            append_record(records, job.record)
            ledger.recorded.add(cell)
        jobs.append(job)
    found = _controls(bench, task, split, jobs, seed) if plan.baselines and not isinstance(features.X, LazyRows) else []
    return FitResult(done, jobs, found, _curves(features, split, plan, jobs[0].fitted.name, seed))


def _fitted(
    name: str, jobs: "list[HeadResult]", features: Features, split: Split, plan: FitPlan, seed: int
) -> "FittedHead | None":
    """Train one head; of all heads, one that cannot be trained on these images is said and costs no other."""
    from featcache.heads import ENSEMBLE
    from featcache.heads.fit import ensemble, fit

    try:
        if name == ENSEMBLE:
            return ensemble(features, split, [job.fitted for job in jobs], plan.views)
        return fit(features, split, name, seed=seed, grid=plan.candidates(), views=plan.views)
    except DataError as error:
        if "all" not in plan.heads:
            raise
        logger.warning("%s is left out: %s", name, error)
        return None


def head_experiment(
    cache: FeatureCache, task: Task, head: str, plan: FitPlan, seed: int, members: Sequence[str] = ()
) -> Experiment:
    """Return the experiment that a head is; an ensemble's depends on those that it may be made of."""
    what = head if task.kind == "label" else f"{head} ({task.kind})"
    return Experiment(
        cache, task, _method(what, plan), plan.choice() | ({"members": list(members)} if members else {}), seed
    )


def _heads_of(plan: FitPlan) -> list[str]:
    """Return the heads to fit, the cheapest first.

    Raises:
        UsageError: a head is unknown, or does not go with the plan.
    """
    from featcache import heads
    from featcache.heads.fit import members_of

    for name in plan.heads:
        heads.require_head(name)
    names, candidates = members_of(plan.heads), plan.candidates()
    if candidates and (len(names) != 1 or plan.target != "label"):
        raise UsageError("`grid` is of one head, for one class an image.")
    if candidates:
        heads.require_params(names[0], candidates)
    if plan.views > 1 and (plan.target != "label" or plan.shots or plan.curve):
        raise UsageError("`views` trains heads of one class an image; leave out `target`, `shots` and `curve`.")
    _require_target(plan)
    return names


def _require_target(plan: FitPlan) -> None:
    """Refuse what is for one class an image only, instead of leaving it out in silence.

    Raises:
        UsageError: the plan's target does not take something of it.
    """
    from featcache.heads import NUMBER_HEADS

    if plan.target == "label":
        return
    given = {
        "`shots`": bool(plan.shots),
        "`curve`": plan.curve,
        "`folds`": bool(plan.folds),
    }
    if refused := [name for name, asked in given.items() if asked]:
        raise UsageError(f"`target` {plan.target} chooses on the val split: it does not take {', '.join(refused)}.")
    able = (PROBE,) if plan.target == "labels" else NUMBER_HEADS
    if plan.heads != FitPlan().heads and (unable := [name for name in plan.heads if name not in {*able, "all"}]):
        raise UsageError(f"`heads` {unable[0]}: for `target` {plan.target} choose from {', '.join(able)}.")


def _say(task: Task, split: Split, ledger: Ledger) -> None:
    """Say once a command how images are split, and what is wrong with that."""
    features = task.features
    sizes = ", ".join(f"{count} {name}" for name, count in split.sizes().items())
    drawn = [name for name in ("val", "test") if name not in features.splits]
    how = f" ({' and '.join(drawn)} drawn)" if drawn else ""
    chosen = f"; parameters are chosen on {len(split.cross)} folds of train and val" if split.cross else ""
    told = f"split: {sizes}{how}{chosen}"
    if told not in ledger.said:
        logger.info(told)
    for note in (notes := task.remarks(split)):
        if note not in ledger.said:
            logger.warning(note)
    ledger.said.update((told, *notes))


def _features(done: Extracted, plan: FitPlan, names: list[str]) -> tuple[Features, list[str]]:
    """Return the features, streamed where they are too large for memory, and the heads that can train on them.

    Raises:
        UsageError: a head was asked for that needs all of them in memory.
    """
    from featcache import heads

    if in_memory(done.store):
        return done.store.features(), names
    can = [name for name, family in heads.HEADS.items() if family.streams]
    room = f"the features need {_needed(done.store) / 1e9:.1f} GB of memory and {free_memory() / 1e9:.1f} GB are free"
    able = [name for name in names if name in can]
    if plan.target != "label" or plan.views > 1 or not able or ("all" not in plan.heads and able != names):
        raise UsageError(
            f"{room}: only `heads` {' and '.join(can)}, of one view and one class an image, read them from disk."
        )
    if able != names:
        logger.warning("%s: without %s", room, ", ".join(name for name in names if name not in can))
    logger.info("%s: they are read from disk in every pass", room)
    return done.store.streamed(), able


def in_memory(store: FeatureStore) -> bool:
    """Tell whether all heads can train on an entry's features in memory."""
    return _needed(store) <= free_memory()


def _needed(store: FeatureStore) -> float:
    return _COPIES * 4 * math.prod(store.shape)


def _fit_targets(
    bench: FeatureCache, done: Extracted, task: Task, plan: FitPlan, seed: int, records: Path | None
) -> list[MultioutputResult]:
    from featcache.heads import NUMBER_HEADS, bundle
    from featcache.heads.fit_multioutput import fit_labels, fit_number

    features = task.features
    split = make_free_split(len(features.y), features.splits, seed, task.groups, features.sha256)
    _say(task, split, Ledger())
    jobs: list[MultioutputResult] = []
    wanted = (PROBE,) if plan.target == "labels" else tuple(name for name in plan.heads if name in NUMBER_HEADS)
    started = time.monotonic()
    for name in wanted or NUMBER_HEADS:
        if plan.budget is not None and jobs and time.monotonic() - started > plan.budget:
            logger.warning("`budget` %g s is spent: without %s", plan.budget, name)
            break
        fitted = (
            fit_labels(features, split, plan.candidates())
            if plan.target == "labels"
            else fit_number(features, split, name, plan.candidates())
        )
        experiment = head_experiment(bench, task, name, plan, seed)
        card = experiment.card(done, head=fitted.head, params=fitted.params, test=asdict(fitted.test))
        path = bundle.save(fitted.estimator, card, experiment.path(done, f"{name}-{plan.target}"), plan.format)
        outcome = Outcome(split, fitted.params, fitted.val, fitted.test, {"fit": round(fitted.seconds, 3)}, done.cost[1])
        record = experiment.record(done, path, outcome)
        if records:
            append_record(records, record)
        jobs.append(MultioutputResult(fitted, record, path))
    return jobs


def _method(head: str, plan: FitPlan) -> str:
    """Return what tables call a head: with what it is trained on, where that is not the usual."""
    on = [*([f"on {'+'.join(plan.layers)}"] if plan.layers else []), *([f"{plan.views} views"] if plan.views > 1 else [])]
    return " ".join([head, *on])


def groups_of(bench: FeatureCache, features: Features, column: str | None) -> list[str] | None:
    """Return what each image belongs to by a column of the source's manifest, ``None`` where none is asked for.

    Raises:
        DataError: the source is no manifest, has no such column, or an image no value there.
    """
    if column is None:
        return None
    values = read_column(bench.dataset.location, column)
    of_path = dict(zip((item.path for item in bench.dataset.samples), values, strict=True))
    return [of_path[path] for path in features.paths]


def _curves(features: Features, split: Split, plan: FitPlan, head: str, seed: int) -> "list[Curve]":
    from featcache.heads.curves import learning_curve, shot_curve

    found = []
    if plan.shots:
        found.append(shot_curve(features, split, head, plan.shots, seed=seed))
    if plan.curve:
        found.append(learning_curve(features, split, head, seed=seed))
    return found


def _controls(bench: FeatureCache, task: Task, split: Split, jobs: Sequence[HeadResult], seed: int) -> "list[Baseline]":
    """Train the controls on the same split, and warn where the best on validation does as well as the best head there."""
    from featcache.heads.baselines import SIDE, baselines, best_on_validation

    keep, common, take = aligned(task, bench.thumbnails(SIDE).store)
    if left_out := len(task.features.y) - len(keep):
        logger.warning("controls: %d images have no thumbnail, they are compared on the others", left_out)
    shared = restricted(split, keep)
    found = baselines(take(np.arange(len(keep))), common.y, shared, seed)
    best_head = min(jobs, key=lambda job: job.fitted.val.rank)
    best = best_on_validation(found)
    right = best_head.fitted.tested.right[np.isin(split.test, keep)]
    between = gap(right, best.tested.right, groups=shared.test_groups)
    if between.is_noise or between.points < 0:
        logger.warning(
            "%s reaches %.1f %% without a backbone, %s %.1f %%: this data set may not need one",
            best.name,
            100 * best.tested.scores.accuracy,
            best_head.record.method,
            100 * right.mean(),
        )
    return found


def _keep_head(
    experiment: Experiment, done: Extracted, split: Split, fitted: "FittedHead", plan: FitPlan, *, keep: bool
) -> HeadResult:
    from featcache.heads import bundle

    for note in fitted.notes:
        logger.warning(note)
    card = experiment.card(
        done,
        head=fitted.name,
        params=fitted.params,
        scaled_by=fitted.temperature,
        views=plan.views,
        test=asdict(fitted.tested.scores),
    )
    path = experiment.path(done, fitted.name)
    path = bundle.save(fitted.estimator, card, path, plan.format) if keep else bundle.head_path(path, plan.format)
    outcome = Outcome(
        split,
        fitted.params,
        fitted.val,
        fitted.tested.scores,
        {"fit": round(fitted.seconds, 3)},
        done.cost[1],
        right=fitted.tested.right,
        notes=fitted.notes,
    )
    record = experiment.record(done, path, outcome)
    features = experiment.task.features
    matrix = confusion(features.y[split.test], fitted.tested.predicted, len(features.classes))
    paths = tuple(features.paths[image] for image in split.test.tolist())
    return HeadResult(fitted, record, path, matrix, features.classes, paths, features.y[split.test])
