"""Where accuracy comes from: pooling, other layers, attention, other weights; every step on the same test images."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.display import Displayed, Table, logger
from featcache.errors import CutError, UsageError
from featcache.evaluation.metrics import Gap, score
from featcache.evaluation.tasks import Task
from featcache.experiments.experiment import Experiment, groups_of, require_task
from featcache.experiments.finetune import sweep_steps
from featcache.experiments.finetune_inputs import FineTuneInputs
from featcache.experiments.fit import PROBE, FitPlan, HeadResult, Ledger, run_fit
from featcache.extraction.feature_cache import FeatureCache
from featcache.finetuning.plan import FineTunePlan
from featcache.reports.records import RunRecord, append_once
from featcache.reports.tables import between_records
from featcache.specs import POOLED

Origin = Literal["", "pooling", "other layers", "attention", "weights"]
_LAYERS = 4  # the last ones, beside the embedding: as in linear evaluations of Caron et al. (2021, section 4.1)


@dataclass(frozen=True)
class GapStep:
    """One step from the linear probe to the whole network tuned.

    Attributes:
        name: what it is, such as ``last:1``.
        origin: what it changes about the features; nothing at the first.
        record: what was trained, chosen on validation and tested.
        val: accuracy and log-loss on the val part, which all steps share.
        is_kept: whether it is better on validation than all before it.
        images: how many more test images are right than by what was kept before, where it is kept.
        between: that in points, with its paired interval.
    """

    name: str
    origin: Origin
    record: RunRecord
    val: tuple[float, float]
    is_kept: bool
    images: int = 0
    between: Gap | None = None

    @property
    def seconds(self) -> float:
        """What it costs with all that led to it, extraction included."""
        return sum(self.record.seconds.values())

    @property
    def accuracy(self) -> float:
        """The accuracy on the test images."""
        return float(self.record.test["accuracy"])

    def is_better(self, other: "GapStep") -> bool:
        """Tell whether it is better on validation: of two heads on all images of their folds, not on the val part alone."""
        own, others = self.val, other.val
        if "weights" not in (self.origin, other.origin):
            own, others = _val_of(self.record.val), _val_of(other.record.val)
        return (-own[0], own[1]) < (-others[0], others[1])


@dataclass(frozen=True, repr=False)
class GapResult(Displayed):
    """All steps in their order, their record, and those that the budget left no time for: there is no record then."""

    steps: tuple[GapStep, ...]
    record: RunRecord | None = None
    left: tuple[str, ...] = ()

    @property
    def kept(self) -> list[GapStep]:
        """The steps that are better on validation than all before them, the linear probe first."""
        return [step for step in self.steps if step.is_kept]

    @property
    def total(self) -> Gap | None:
        """From the linear probe to the last step that was kept; ``None`` where no other was."""
        first, *_, last = self.kept if len(self.kept) > 1 else (None, None)
        return None if first is None or last is None else between_records(last.record, first.record)

    @property
    def images(self) -> dict[str, int]:
        """How many test images more are right, by what has changed: they add up to those of the whole."""
        return {origin: sum(step.images for step in self.kept if step.origin == origin) for origin in self.origins}

    @property
    def origins(self) -> list[Origin]:
        """What was tried, in order."""
        return list(dict.fromkeys(step.origin for step in self.steps if step.origin))

    def table(self) -> Table:
        """Return the steps with their scores, gains and costs."""
        from featcache.reports.gap import gap_table

        return gap_table(self)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache gap``."""
        total = self.total
        return {
            "dataset": self.steps[0].record.dataset,
            "backbone": self.steps[0].record.backbone,
            "steps": [
                {
                    "step": step.name,
                    "changes": step.origin,
                    "kept": step.is_kept,
                    "validation": step.record.val,
                    "val_part": {"accuracy": step.val[0], "log_loss": step.val[1]},
                    "test": step.record.test,
                    "images": step.images,
                    "gap": None if step.between is None else asdict(step.between),
                    "seconds": step.record.seconds,
                }
                for step in self.steps
            ],
            "images": self.images,
            "test_images": len(self.steps[0].record.right),
            "gap": None if total is None else asdict(total),
            "left": list(self.left),
        }


def run_gap(
    cache: FeatureCache,
    plan: FineTunePlan,
    *,
    group: str | None = None,
    seed: int = 0,
    budget: float | None = None,
    records: Path | None = None,
) -> GapResult:
    """Take the way from a linear probe to the whole network tuned step by step, on one split.

    A step is kept where it is better on validation than all before it; its gain is measured on the test images against
    what was kept before, so that gains add up to the whole gap. What an earlier command has fitted or trained is taken.

    Args:
        cache: the data set and the backbone.
        plan: how weights are trained; ``unfreeze`` is left aside.
        group: a manifest's column whose values are never in two parts.
        seed: of the split and of training.
        budget: seconds after which no further step is begun.
        records: a JSONL file that gets the records of all steps.
    """
    require_task(cache, "label", group)
    started, steps, left = time.monotonic(), list[GapStep](), list[str]()
    for name, origin, act in _ways(cache, plan, (group, seed), records, steps):
        if budget is not None and steps and time.monotonic() - started > budget:
            left.append(name)
        elif (step := _step_of(name, origin, act, steps)) is not None:
            steps.append(step)
    if left:
        logger.warning("`budget` %g s is spent: without %s", budget, ", ".join(left))
        return GapResult(tuple(steps), left=tuple(left))
    result = GapResult(tuple(steps))
    record = _recorded(result, gap_experiment(cache, plan, group, seed), plan)
    if records:
        append_once(records, record)
    return replace(result, record=record)


def gap_experiment(cache: FeatureCache, plan: FineTunePlan, group: str | None, seed: int) -> Experiment:
    """Return the experiment that all steps are together."""
    features = cache.extracted().store.labelled()
    task = Task(features, "label", groups_of(features, require_task(cache, "label", group)), group)
    return Experiment(cache, task, "gap", {"steps": asdict(plan)} | ({"group": group} if group else {}), seed)


def _recorded(result: GapResult, experiment: Experiment, plan: FineTunePlan) -> RunRecord:
    """Return the record: the best step's, with what each step came to and the gap to the linear probe."""
    first, last = result.kept[0].record, result.kept[-1].record
    probe = {"head": PROBE, "of": [PROBE], "start": PROBE, "val": first.val, "test": first.test, "seconds": first.seconds}
    steps = {
        step.name: {
            "changes": step.origin,
            "test": step.accuracy,
            "kept": step.is_kept,
            "images": step.images,
        }
        for step in result.steps
    }
    request = {"backbone": experiment.cache.identity, "plan": asdict(plan)}
    total = None if result.total is None else asdict(result.total)
    params = {"best": result.kept[-1].name, "steps": steps}
    return replace(
        last, kind="gap", cell=experiment.key, method="gap", request=request, params=params, probe=probe, gap=total, notes=()
    )


def _step_of(name: str, origin: Origin, act: "Callable[[], _Taken]", steps: Sequence[GapStep]) -> GapStep | None:
    """Take a step, unless it cannot be taken here or is tested on other images than the first."""
    try:
        taken = act()
    except (CutError, UsageError) as error:
        if not steps:
            raise
        logger.warning("%s is left out: %s", name, error)
        return None
    if steps and taken.record.test_items != steps[0].record.test_items:
        logger.warning("%s is left out: some images have no row there, it was tested on others", name)
        return None
    return _placed(name, origin, taken, [step for step in steps if step.is_kept])


@dataclass(frozen=True)
class _Taken:
    """What a step came to: its record, and accuracy and log-loss on the validation images that all steps share."""

    record: RunRecord
    val: tuple[float, float]
    is_gain: bool = True


_Way = tuple[str, Origin, Callable[[], _Taken]]


def _ways(
    cache: FeatureCache, plan: FineTunePlan, asked: tuple[str | None, int], records: Path | None, steps: Sequence[GapStep]
) -> Iterator[_Way]:
    """Yield the steps, each with what takes it; ``asked`` are group and seed, ``steps`` those that were taken so far."""
    from featcache.finetuning.unfreezing import depths

    group, seed = asked
    fitting, ledger = FitPlan((PROBE,), group=group, baselines=False), Ledger()

    def fitted(more: FitPlan) -> _Taken:
        (head,) = run_fit(cache, more, seed=seed, records=records, ledger=ledger).heads
        return _Taken(head.record, _on_validation(head))

    yield "linear", "", partial(fitted, fitting)
    yield "pooling", "pooling", partial(fitted, replace(fitting, best_pool=True))
    layers = [stage.name for stage in cache.backbone.stages[-_LAYERS:]]
    yield "layers", "other layers", partial(fitted, replace(fitting, layers=(*layers, POOLED)))
    yield "attentive", "attention", partial(fitted, replace(fitting, heads=("attentive",)))
    # where another pooling is better, weights are trained under it
    pool = next((step.record.params["pool"] for step in steps if step.is_kept and step.origin == "pooling"), cache.spec.pool)
    tuning = FeatureCache(cache.dataset, replace(cache.spec, pool=pool), cache.settings, files=cache.files)
    tuned = sweep_steps(FineTuneInputs(tuning, group=group, seed=seed, ledger=ledger), plan, records=records)

    def deeper() -> _Taken:
        result = next(tuned)
        return _Taken(result.record, _val_of(result.record.val), result.gained)

    for unfreeze in depths(cache.backbone.stages):
        yield unfreeze.text, "weights", deeper


def _on_validation(head: HeadResult) -> tuple[float, float]:
    """Return accuracy and log-loss on the images of the val part, each answered by a head that had not seen it."""
    answers, split = head.fitted.answers, head.split
    if answers is None:  # too large for the head's file
        return _val_of(head.record.val)
    judged = np.concatenate([fold.val for fold in split.folds])
    is_shared = np.isin(judged, split.val)
    scores = score(head.task.y[judged[is_shared]], answers[is_shared])
    return _val_of(asdict(scores))


def _val_of(scores: dict[str, Any]) -> tuple[float, float]:
    loss = scores["log_loss"]
    return scores["accuracy"], float("inf") if loss is None else loss


def _placed(name: str, origin: Origin, taken: _Taken, kept: Sequence[GapStep]) -> GapStep:
    """Return a step after those that were kept before it."""
    step = GapStep(name, origin, taken.record, taken.val, is_kept=not kept)
    if not kept or not taken.is_gain or not step.is_better(kept[-1]):
        return step
    before = kept[-1].record
    images = step.record.right.count("1") - before.right.count("1")
    return replace(step, is_kept=True, images=images, between=between_records(step.record, before))
