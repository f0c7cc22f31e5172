"""Where accuracy comes from: better pooling, other layers, other weights; every step on the same test images."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from featcache.display import Displayed, Table, logger
from featcache.errors import CutError, UsageError
from featcache.evaluation.metrics import Gap, decode_correct, gap, score
from featcache.evaluation.tasks import require_kind
from featcache.experiments.finetune import sweep_steps
from featcache.experiments.finetune_inputs import FineTuneInputs
from featcache.experiments.fit import PROBE, FitPlan, HeadResult, Ledger, run_fit
from featcache.extraction.feature_cache import FeatureCache
from featcache.finetuning.plan import FineTunePlan
from featcache.reports.records import RunRecord
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
        val: accuracy and log-loss on the validation images that all steps share.
        is_kept: whether it is better there than all before it.
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
    def rank(self) -> tuple[float, float]:
        """What the smaller of is better on validation."""
        return -self.val[0], self.val[1]


@dataclass(frozen=True, repr=False)
class GapResult(Displayed):
    """All steps in their order, and those that the budget left no time for."""

    steps: tuple[GapStep, ...]
    left: tuple[str, ...] = ()

    @property
    def kept(self) -> list[GapStep]:
        """The steps that are better on validation than all before them, the linear probe first."""
        return [step for step in self.steps if step.is_kept]

    @property
    def whole(self) -> Gap | None:
        """From the linear probe to the last step that was kept; ``None`` where no other was."""
        first, *_, last = self.kept if len(self.kept) > 1 else (None, None)
        return None if first is None or last is None else _between(last.record, first.record)

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
        whole = self.whole
        return {
            "dataset": self.steps[0].record.dataset,
            "backbone": self.steps[0].record.backbone,
            "steps": [
                {
                    "step": step.name,
                    "changes": step.origin,
                    "kept": step.is_kept,
                    "validation": {"accuracy": step.val[0], "log_loss": step.val[1]},
                    "test": step.record.test,
                    "images": step.images,
                    "gap": None if step.between is None else asdict(step.between),
                    "seconds": step.record.seconds,
                }
                for step in self.steps
            ],
            "images": self.images,
            "test_images": len(self.steps[0].record.right),
            "gap": None if whole is None else asdict(whole),
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
    require_kind(cache.dataset, "label")
    ways = _ways(cache, plan, group, seed, records)
    started, steps, left = time.monotonic(), list[GapStep](), list[str]()
    for name, origin, act in ways:
        if budget is not None and steps and time.monotonic() - started > budget:
            left.append(name)
            continue
        try:
            taken = act()
        except (CutError, UsageError) as error:
            if not steps:
                raise
            logger.warning("%s is left out: %s", name, error)
            continue
        if steps and taken.record.test_items != steps[0].record.test_items:
            logger.warning("%s is left out: some images have no row there, it was tested on others", name)
            continue
        steps.append(_placed(name, origin, taken, [step for step in steps if step.is_kept]))
    if left:
        logger.warning(
            "`budget` %g s is spent: without %s; run again with more, what was trained is kept", budget, ", ".join(left)
        )
    return GapResult(tuple(steps), tuple(left))


@dataclass(frozen=True)
class _Taken:
    """What a step came to: its record, and accuracy and log-loss on the validation images that all steps share."""

    record: RunRecord
    val: tuple[float, float]
    is_gain: bool = True


_Way = tuple[str, Origin, Callable[[], _Taken]]


def _ways(cache: FeatureCache, plan: FineTunePlan, group: str | None, seed: int, records: Path | None) -> Iterator[_Way]:
    """Yield the steps, each with what takes it; the backbone is loaded for the last ones' names alone."""
    fitting = FitPlan((PROBE,), group=group, baselines=False)
    ledger = Ledger()

    def fitted(more: FitPlan) -> _Taken:
        (head,) = run_fit(cache, more, seed=seed, records=records, ledger=ledger).heads
        return _Taken(head.record, _on_validation(head))

    yield "linear", "", partial(fitted, fitting)
    layers = [stage.name for stage in cache.backbone.stages[-_LAYERS:]]
    yield "layers", "other layers", partial(fitted, replace(fitting, layers=(*layers, POOLED)))
    inputs = FineTuneInputs(cache, group=group, seed=seed, ledger=ledger)
    depths = sweep_steps(inputs, plan, records=records)

    def tuned() -> _Taken:
        result = next(depths)
        return _Taken(result.record, _val_of(result.record.val), result.gained)

    from featcache.finetuning.unfreezing import depths as depths_of

    for unfreeze in depths_of(cache.backbone.stages):
        yield unfreeze.text, "weights", tuned


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
    if not kept or not taken.is_gain or step.rank >= kept[-1].rank:
        return step
    before = kept[-1].record
    images = int(decode_correct(step.record.right).sum()) - int(decode_correct(before.right).sum())
    return replace(step, is_kept=True, images=images, between=_between(step.record, before))


def _between(record: RunRecord, before: RunRecord) -> Gap:
    groups = None if record.test_groups is None else np.array(record.test_groups)
    return gap(decode_correct(record.right), decode_correct(before.right), groups=groups)
