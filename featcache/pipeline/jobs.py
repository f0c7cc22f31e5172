"""Jobs: one command's work from a data set to run records, extracting first whatever is not in the cache."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.cache import identify
from featcache.checked import check_fields
from featcache.errors import UsageError
from featcache.machine import free_memory
from featcache.metrics import confusion, gap, per_class
from featcache.pipeline.recording import aligned, bits, cell_of, new_record
from featcache.pipeline.workbench import Extracted, Workbench
from featcache.progress import logger
from featcache.records import RunRecord, append_record
from featcache.solvers.scaled import Streamed
from featcache.sources import read_column
from featcache.specs import POOLED, Views
from featcache.splits import Split, items_hash, make_free_split, make_split
from featcache.store import Features

if TYPE_CHECKING:
    from featcache.stages.controls import Control
    from featcache.stages.curves import Curve
    from featcache.stages.fit import FittedHead
    from featcache.stages.targets import FittedTarget

PROBE = "logistic"
_MOST_SHOTS = 1_000_000
_MOST_IN_A_MATRIX = 50
_COPIES = 2.5  # of the features in float32, that the heads that take the most memory need


@dataclass(frozen=True)
class HeadJob:
    """A fitted head with its record."""

    fitted: "FittedHead"
    record: RunRecord
    bundle: Path
    confusion: NDArray[np.int64]
    classes: tuple[str, ...]

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
    controls: bool = True
    format: Literal["joblib", "skops"] = "joblib"

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind, and those that nothing could be trained with."""
        check_fields(self)
        if not self.heads:
            raise UsageError("heads: at least one is needed, such as logistic.")
        if self.folds is not None and self.folds < 0:
            raise UsageError(f"folds {self.folds}: 0 or more is needed.")
        if self.budget is not None and self.budget < 0:
            raise UsageError(f"budget {self.budget:g}: seconds from 0 are needed.")
        if not all(1 <= shots <= _MOST_SHOTS for shots in self.shots):
            raise UsageError(f"shots {self.shots}: whole numbers from 1 to {_MOST_SHOTS} are needed.")
        if not all(values for _, values in self.grid):
            raise UsageError("grid: at least one value a parameter is needed.")
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
class TargetJob:
    """A fitted head for several labels or a number, with its record."""

    fitted: "FittedTarget"
    record: RunRecord
    bundle: Path

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``heads`` of ``featcache fit``."""
        return self.fitted.summary | {"bundle": str(self.bundle)}


@dataclass(frozen=True)
class HeadJobs:
    """What ``fit`` has done: the embeddings' entry, the heads, controls that need no backbone, and curves."""

    extracted: Extracted
    heads: "list[HeadJob]"
    controls: "list[Control]"
    curves: "list[Curve]"
    targets: "list[TargetJob]" = field(default_factory=list)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache fit``."""
        return {
            "extract": self.extracted.summary,
            "heads": [*(job.summary for job in self.heads), *(job.summary for job in self.targets)],
            "controls": [control.summary for control in self.controls],
            "curves": [curve.summary for curve in self.curves],
        }


def fit_heads(bench: Workbench, plan: FitPlan, *, seed: int = 0, records: Path | None = None, keep: bool = True) -> HeadJobs:
    """Extract embeddings if needed and train heads on them; records are appended to a JSONL file.

    ``keep`` writes the heads' files: of several processes that train together one does.

    Raises:
        UsageError: a head is unknown; nothing has been computed then.
    """
    from featcache import heads
    from featcache.stages.fit import ensemble, fit, members_of

    for name in plan.heads:
        heads.require_head(name)
    names = members_of(plan.heads)
    candidates = plan.candidates()
    if candidates and (len(names) != 1 or plan.target != "label"):
        raise UsageError("--grid is of one --head, for one class an image.")
    if candidates:
        heads.require_params(names[0], candidates)
    if plan.views > 1 and (plan.target != "label" or plan.shots or plan.curve):
        raise UsageError("--views trains heads of one class an image; leave out --target, --shots and --curve.")
    done = bench.extracted("+".join(plan.layers) or POOLED, views=Views(plan.views))
    features, names = _features(done, plan, names)
    groups = _groups(bench, features, plan.group)
    if plan.target != "label":
        return HeadJobs(done, [], [], [], _fit_targets(bench, done, features, groups, plan, seed, records))
    split = make_split(features.y, features.splits, features.classes, seed, groups=groups, folds=plan.folds)
    jobs: list[HeadJob] = []
    started = time.monotonic()
    for name in names:
        if plan.budget is not None and jobs and time.monotonic() - started > plan.budget:
            left = names[names.index(name) :]
            logger.warning("--budget %g s is spent: without %s", plan.budget, ", ".join(left))
            break
        if name == heads.ENSEMBLE:
            fitted = ensemble(features, split, [job.fitted for job in jobs], plan.views)
        else:
            fitted = fit(features, split, name, seed=seed, grid=candidates, views=plan.views)
        jobs.append(_keep_head(bench, done, features, split, fitted, plan, seed, records, keep=keep))
    found = _controls(bench, features, split, jobs, seed) if plan.controls and not isinstance(features.X, Streamed) else []
    return HeadJobs(done, jobs, found, _curves(features, split, plan, jobs[0].fitted.name, seed))


def _features(done: Extracted, plan: FitPlan, names: list[str]) -> tuple[Features, list[str]]:
    """Return the features, streamed where they are too large for memory, and the heads that can train on them.

    Raises:
        UsageError: a head was asked for that needs all of them in memory.
    """
    from featcache import heads

    needed, free = _COPIES * 4 * math.prod(done.store.shape), free_memory()
    if needed <= free:
        return done.store.features(), names
    can = [name for name, family in heads.HEADS.items() if family.streams]
    room = f"the features need {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free"
    able = [name for name in names if name in can]
    if plan.target != "label" or plan.views > 1 or not able or ("all" not in plan.heads and able != names):
        raise UsageError(
            f"{room}: only --head {' and '.join(can)}, of one view and one class an image, read them from disk."
        )
    if able != names:
        logger.warning("%s: without %s", room, ", ".join(name for name in names if name not in can))
    logger.info("%s: they are read from disk in every pass", room)
    return done.store.streamed(), able


def _fit_targets(
    bench: Workbench,
    done: Extracted,
    features: Features,
    groups: list[str] | None,
    plan: FitPlan,
    seed: int,
    records: Path | None,
) -> list[TargetJob]:
    from featcache import bundle
    from featcache.heads import NUMBER_HEADS
    from featcache.stages.targets import fit_labels, fit_number

    split = make_free_split(len(features.y), features.splits, seed, groups)
    jobs = []
    wanted = ("logistic",) if plan.target == "labels" else tuple(name for name in plan.heads if name in NUMBER_HEADS)
    for name in wanted or NUMBER_HEADS:
        fitted = (
            fit_labels(features, split, plan.candidates())
            if plan.target == "labels"
            else fit_number(features, split, name, plan.candidates())
        )
        method = _method(f"{name} ({plan.target})", plan)
        cell = cell_of(bench.spec, features, method, plan.choice(), seed)
        card = card_of(bench, done) | {
            "classes": list(fitted.names),
            "target": fitted.target,
            "head": fitted.head,
            "params": fitted.params,
            "test": asdict(fitted.test),
        }
        path = done.store.path / "heads" / f"{name}-{plan.target}-seed{seed}-{cell[:8]}"
        path = bundle.save(fitted.estimator, card, path, plan.format)
        record = new_record(
            bench,
            done,
            features,
            split,
            kind=f"fit-{plan.target}",
            cell=cell,
            method=method,
            seed=seed,
            request=plan.choice(),
            params=fitted.params,
            val=asdict(fitted.val),
            test=asdict(fitted.test),
            right="",
            seconds={"extract": done.cost[0], "fit": round(fitted.seconds, 3)},
            images_per_second=done.cost[1],
            artefact=path.relative_to(bench.settings.cache).as_posix(),
        )
        if records:
            append_record(records, record)
        jobs.append(TargetJob(fitted, record, path))
    return jobs


def _method(head: str, plan: FitPlan) -> str:
    """Return what tables call a head: with what it is trained on, where that is not the usual."""
    on = [*([f"on {'+'.join(plan.layers)}"] if plan.layers else []), *([f"{plan.views} views"] if plan.views > 1 else [])]
    return " ".join([head, *on])


def card_of(bench: Workbench, done: Extracted) -> dict[str, Any]:
    """Return what a head's file says of its features."""
    return {
        "feature_key": done.store.key,
        "backbone": identify(bench.spec),
        "weights": str(Path(bench.spec.weights).resolve()) if bench.spec.weights else None,
        "data": bench.source.location,
        "cut": done.cut,
    }


def _groups(bench: Workbench, features: Features, column: str | None) -> list[str] | None:
    if column is None:
        return None
    of_path = dict(zip((item.path for item in bench.source.items), read_column(bench.source.location, column), strict=True))
    return [of_path[path] for path in features.paths]


def _curves(features: Features, split: Split, plan: FitPlan, head: str, seed: int) -> "list[Curve]":
    from featcache.stages.curves import learning_curve, shot_curve

    found = []
    if plan.shots:
        found.append(shot_curve(features, split, head, plan.shots, seed=seed))
    if plan.curve:
        found.append(learning_curve(features, split, head, seed=seed))
    return found


def _controls(bench: Workbench, features: Features, split: Split, jobs: Sequence[HeadJob], seed: int) -> "list[Control]":
    """Train the controls on the same split, and warn where one does as well as the best head."""
    from featcache.stages.controls import SIDE, controls

    features, take = aligned(features, bench.thumbnails(SIDE).store)
    if items_hash(features.sha256, split.test, features.y) != jobs[0].record.test_items:
        return []
    found = controls(take(np.arange(len(features.y))), features.y, split, seed)
    best_head = min(jobs, key=lambda job: job.fitted.val.rank)
    best = max(found, key=lambda control: control.tested.scores.accuracy)
    between = gap(best_head.fitted.tested.right, best.tested.right, groups=split.test_groups)
    if between.is_noise or between.points < 0:
        logger.warning(
            "%s reaches %.1f %% without a backbone, %s %.1f %%: this data set may not need one",
            best.name,
            100 * best.tested.scores.accuracy,
            best_head.record.method,
            100 * best_head.fitted.tested.scores.accuracy,
        )
    return found


def _keep_head(
    bench: Workbench,
    done: Extracted,
    features: Features,
    split: Split,
    fitted: "FittedHead",
    plan: FitPlan,
    seed: int,
    records: Path | None,
    *,
    keep: bool,
) -> HeadJob:
    from featcache import bundle

    for note in fitted.notes:
        logger.warning(note)
    cell = cell_of(bench.spec, features, _method(fitted.name, plan), plan.choice(), seed)
    card = card_of(bench, done) | {
        "classes": list(features.classes),
        "target": "label",
        "head": fitted.name,
        "params": fitted.params,
        "temperature": fitted.temperature,
        "views": plan.views,
        "test": asdict(fitted.tested.scores),
    }
    path = done.store.path / "heads" / f"{fitted.name}-seed{seed}-{cell[:8]}"
    path = bundle.save(fitted.estimator, card, path, plan.format) if keep else bundle.head_path(path, plan.format)
    record = new_record(
        bench,
        done,
        features,
        split,
        kind="fit",
        cell=cell,
        method=_method(fitted.name, plan),
        seed=seed,
        request=plan.choice(),
        params=fitted.params,
        val=asdict(fitted.val),
        test=asdict(fitted.tested.scores),
        right=bits(fitted.tested.right),
        seconds={"extract": done.cost[0], "fit": round(fitted.seconds, 3)},
        images_per_second=done.cost[1],
        artefact=path.relative_to(bench.settings.cache).as_posix(),
        notes=fitted.notes,
    )
    if records:
        append_record(records, record)
    matrix = confusion(features.y[split.test], fitted.tested.predicted, len(features.classes))
    return HeadJob(fitted, record, path, matrix, features.classes)
