"""Where accuracy comes from: pooling, other layers, attention, other weights; every step on the same test samples."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.display import Displayed, Table, logger
from featcache.errors import CutError, UsageError
from featcache.evaluation.metrics import Gap, log_loss
from featcache.experiments.experiment import Experiment, task_of
from featcache.experiments.finetune import FineTuneInputs, Sweep
from featcache.experiments.fit import PROBE, FitPlan, HeadResult, Ledger, is_fitted, run_fit
from featcache.extraction.feature_cache import FeatureCache
from featcache.finetuning import FineTunePlan
from featcache.fingerprint import as_stored
from featcache.reports import RunRecord, append_once
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
        samples: how many more test samples are right than by what was kept before, where it is kept.
        between: that in points, with its paired interval.
        starts_from: the kept step whose weights it goes on from; nothing where it needs none of them.
        seconds_before: what led to that, where the record does not count it.
    """

    name: str
    origin: Origin
    record: RunRecord
    val: tuple[float, float]
    is_kept: bool
    samples: int = 0
    between: Gap | None = None
    starts_from: str = ""
    seconds_before: float = 0.0

    @property
    def seconds(self) -> float:
        """What it costs with all that led to it, extraction included."""
        return self.seconds_before + sum(self.record.seconds.values())

    @property
    def accuracy(self) -> float:
        """The accuracy on the test samples."""
        return float(self.record.test["accuracy"])

    def is_better(self, other: "GapStep") -> bool:
        """Tell whether it is better on validation: of two heads on all samples of their folds, not on the val part alone."""
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
    def samples(self) -> dict[str, int]:
        """How many test samples more are right, by what has changed: they add up to those of the whole."""
        return {origin: sum(step.samples for step in self.kept if step.origin == origin) for origin in self.origins}

    @property
    def origins(self) -> list[Origin]:
        """What was tried, in order."""
        return list(dict.fromkeys(step.origin for step in self.steps if step.origin))

    def table(self) -> Table:
        """Return the steps with their scores, gains and costs."""
        from featcache.reports.wording import gap_table

        return gap_table(self)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache gap``."""
        total = self.total
        summary = {
            "dataset": self.steps[0].record.dataset,
            "backbone": self.steps[0].record.backbone,
            "steps": [
                as_stored(
                    {
                        "step": step.name,
                        "changes": step.origin,
                        "kept": step.is_kept,
                        "validation": step.record.val,
                        "val_part": {"accuracy": step.val[0], "log_loss": step.val[1]},
                        "test": step.record.test,
                        "samples": step.samples,
                        "gap": None if step.between is None else asdict(step.between),
                        "seconds": step.record.seconds,
                        "starts_from": step.starts_from or None,
                        "seconds_with_all_before": round(step.seconds, 3),
                        "notes": list(step.record.notes),
                    }
                )
                for step in self.steps
            ],
            "samples": self.samples,
            "test_samples": len(self.steps[0].record.right),
            "gap": None if total is None else asdict(total),
            "left": list(self.left),
        }
        return as_stored(summary)


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

    A step is kept where it is better on validation than all before it; its gain on the test samples is against what was kept
    before, so that gains add up to the whole gap. Weights go on from the last depth that was kept, at first from the linear
    probe under the kept pooling. What an earlier command has fitted or trained is told where the budget is spent too.

    Args:
        cache: the data set and the backbone.
        plan: how weights are trained; ``unfreeze`` is left aside.
        group: a manifest's column whose values are never in two parts.
        seed: of the split and of training.
        budget: seconds after which no further step is begun.
        records: a JSONL file that gets the records of all steps.
    """
    cache.require("label", group)
    started, steps, left = time.monotonic(), list[GapStep](), list[str]()
    for way in _ways(cache, plan, (group, seed), records, steps):
        is_there = way.is_there()
        if budget is not None and steps and not is_there and time.monotonic() - started > budget:
            left.append(way.name)
            continue
        if not is_there:
            logger.info("Step %s%s", way.name, way.origin and f" ({way.origin})")
        steps += filter(None, [_step_of(way, steps)])
    if left:
        logger.warning("`budget` %g s is spent: without %s", budget, ", ".join(left))
        return GapResult(tuple(steps), left=tuple(left))
    record = _recorded(GapResult(tuple(steps)), gap_experiment(cache, plan, group, seed), plan)
    if records is not None:
        append_once(records, record, cache.settings.tracker)
    return GapResult(tuple(steps), record=record)


def gap_experiment(cache: FeatureCache, plan: FineTunePlan, group: str | None, seed: int) -> Experiment:
    """Return the experiment that all steps are together."""
    task = task_of(cache.files, cache.extracted().store.labelled(), group=group)
    return Experiment(cache, task, "gap", {"steps": asdict(plan)} | ({"group": group} if group else {}), seed)


def _recorded(result: GapResult, experiment: Experiment, plan: FineTunePlan) -> RunRecord:
    """Return the record: the best step's, with what each step came to and the gap to the linear probe."""
    first, last = result.kept[0].record, result.kept[-1].record
    probe = {"head": PROBE, "of": [PROBE], "start": PROBE, "val": first.val, "test": first.test, "seconds": first.seconds}
    steps = {
        step.name: as_stored({"changes": step.origin, "test": step.accuracy, "kept": step.is_kept, "samples": step.samples})
        for step in result.steps
    }
    group = {"group": experiment.task.group} if experiment.task.group else {}
    request = {"backbone": experiment.cache.identity, "plan": asdict(plan)} | group
    total = None if result.total is None else asdict(result.total)
    params = {"best": result.kept[-1].name, "steps": steps}
    told: dict[str, Any] = {
        "request": request,
        "params": params,
        "probe": probe,
        "gap": total,
        "seconds": _costs(result.steps),
    }
    return replace(last, kind="gap", cell=experiment.key, method="gap", notes=(), **told)


def _costs(steps: Sequence[GapStep]) -> dict[str, float]:
    """Return what all steps took, each entry's extraction once: none could be left out, since validation chose among all."""
    extracted = {step.record.feature_key: step.record.seconds["extract"] for step in steps}
    trained = [step.record.seconds.get(name, 0.0) for step in steps for name in ("fit", "pooling", "train")]
    return {"extract": round(sum(extracted.values()), 3), "train": round(sum(trained), 3)}


@dataclass(frozen=True)
class _Taken:
    """What a step came to: its record, and accuracy and log-loss on the validation samples that all steps share."""

    record: RunRecord
    val: tuple[float, float]
    is_gain: bool = True


@dataclass(frozen=True)
class _Way:
    """A step before it is taken: how, whether an earlier command did, and the kept step that it would go on from."""

    name: str
    origin: Origin
    take: Callable[[], _Taken]
    is_there: Callable[[], bool]
    start: GapStep | None = None


def _step_of(way: _Way, steps: Sequence[GapStep]) -> GapStep | None:
    """Take a step, unless it cannot be taken here or is tested on other samples than the first."""
    try:
        taken = way.take()
    except (CutError, UsageError) as error:
        if not steps:
            raise
        logger.warning("%s is left out: %s", way.name, error)
        return None
    if steps and taken.record.test_items != steps[0].record.test_items:
        logger.warning("%s is left out: some samples have no row there, it was tested on others", way.name)
        return None
    return _placed(way, taken, [step for step in steps if step.is_kept])


def _ways(
    cache: FeatureCache, plan: FineTunePlan, asked: tuple[str | None, int], records: Path | None, steps: Sequence[GapStep]
) -> Iterator[_Way]:
    """Yield the steps, each once those before it are placed; ``asked`` are group and seed, ``steps`` what was placed."""
    group, seed = asked
    fitting, ledger = FitPlan((PROBE,), group=group, baselines=False), Ledger()

    def fitted(name: str, origin: Origin, **changes: Any) -> _Way:
        def take() -> _Taken:
            (head,) = run_fit(cache, chosen, seed=seed, records=records, ledger=ledger).heads
            return _Taken(head.record, _on_validation(head))

        chosen = replace(fitting, **changes)
        return _Way(name, origin, take, lambda: is_fitted(cache, chosen, seed=seed))

    yield fitted("linear", "")
    yield fitted("pooling", "pooling", best_pool=True)
    yield fitted("layers", "other layers", layers=(*cache.stage_names[-_LAYERS:], POOLED))
    yield fitted("attentive", "attention", heads=("attentive",))
    # where another pooling is better, weights are trained under it
    pooled = next((step for step in steps if step.is_kept and step.origin == "pooling"), None)
    spec = cache.spec if pooled is None else replace(cache.spec, pool=pooled.record.params["pool"])
    tuning = FeatureCache(replace(cache.dataset, notes=()), spec, cache.settings, files=cache.files)
    inputs = FineTuneInputs(tuning, group=group, seed=seed, ledger=ledger)
    yield from _depths(Sweep(inputs, plan, records), pooled or steps[0], steps)


def _depths(sweep: Sweep, start: GapStep, steps: Sequence[GapStep]) -> Iterator[_Way]:
    """Yield the depths; each goes on from the last that was kept, the first from a linear probe."""
    tried: list[int] = []

    def take(place: int) -> _Taken:
        tried.append(place)
        result = sweep.take(place)
        return _Taken(result.record, _val_of(result.record.val), result.gained)

    def is_there(place: int) -> bool:
        # what a depth goes on from is not known where the budget leaves out one before it
        return len(tried) == place and sweep.finished(place) is not None

    for place, depth in enumerate(sweep.plans):
        name = depth.unfreeze.text
        yield _Way(name, "weights", partial(take, place), partial(is_there, place), start)
        if steps[-1].name == name and steps[-1].is_kept:
            sweep.keep(place)
            start = steps[-1]
    if len(tried) == len(sweep.plans):
        sweep.end()


def _on_validation(head: HeadResult) -> tuple[float, float]:
    """Return accuracy and log-loss on the samples of the val part, each answered by a head that had not seen it."""
    answers, split = head.fitted.answers, head.split
    if answers is None:  # too large for the head's file
        return _val_of(head.record.val)
    judged = np.concatenate([fold.val for fold in split.folds])
    is_shared = np.isin(judged, split.val)
    y_true, told = head.task.y[judged[is_shared]], answers[is_shared]
    # not all scores: those of scikit-learn's take longer to load than a repeated gap does for the rest
    if told.ndim == 1:
        return float((told == y_true).mean()), float("inf")
    return float((told.argmax(axis=1) == y_true).mean()), log_loss(y_true, told)


def _val_of(scores: dict[str, Any]) -> tuple[float, float]:
    loss = scores["log_loss"]
    return scores["accuracy"], float("inf") if loss is None else loss


def _placed(way: _Way, taken: _Taken, kept: Sequence[GapStep]) -> GapStep:
    """Return a step after those that were kept before it."""
    step = GapStep(way.name, way.origin, taken.record, taken.val, is_kept=not kept)
    if way.start is not None:
        is_counted = "before" in taken.record.seconds  # of one depth after another: all depths that led there
        before = way.start.seconds_before if is_counted else way.start.seconds
        step = replace(step, starts_from=way.start.name, seconds_before=before)
    if not kept or not taken.is_gain or not step.is_better(kept[-1]):
        return step
    last = kept[-1].record
    samples = step.record.right.count("1") - last.right.count("1")
    return replace(step, is_kept=True, samples=samples, between=between_records(step.record, last))
