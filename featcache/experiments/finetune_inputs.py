"""What fine-tunings of one data set and backbone share: the fitted heads, the split, and the rows stored at their cuts."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.display import logger
from featcache.errors import CutError, StorageError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import decode_correct
from featcache.evaluation.splits import Split, restricted
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output
from featcache.finetuning import FineTunePlan
from featcache.heads import STREAMING, require_head
from featcache.specs import INPUT, POOLED, Views

if TYPE_CHECKING:
    from featcache.experiments.fit import HeadResult, Ledger
    from featcache.finetuning.loop import ProcessGroup
    from featcache.finetuning.model import LinearHead, Take, Trainable
    from featcache.heads import FittedHead
    from featcache.reports import RunRecord

_STEEP, _DEAD = 1e4, 1e-5  # a weight, and a feature's deviation, beside the median one
_USABLE = 0.9  # of a disk's free room: parts are written beside what they replace, and others write too


@dataclass(frozen=True)
class StoredRows:
    """The rows that one fine-tuning trains on, and what it starts from and is compared with.

    Attributes:
        trainable: what trains.
        entry: at the cut.
        task: the samples that have both an embedding and a row there.
        split: of these samples.
        take: gives their rows by positions, view after view.
        start: the linear probe fitted on train alone, and the one refitted on train and val.
        probe: the record of the best probe.
        correct: which of the test samples (t,) the best probe has right.
        notes: what is to be said of the rows.
    """

    trainable: "Trainable"
    entry: Extracted
    task: Task
    split: Split
    take: "Take"
    start: "tuple[LinearHead, LinearHead]"
    probe: "RunRecord"
    correct: NDArray[np.bool_]
    notes: tuple[str, ...]


@dataclass(eq=False)
class FineTuneInputs:
    """The data set and the backbone, the probes that fine-tuning is compared with, and the entries at freeze boundaries.

    Attributes:
        cache: the data set and the backbone.
        probes: heads beside ridge, nearest neighbours and logistic: the gap is to the best of all on validation.
        group: the column of the source's manifest whose values stay together, such as a patient.
        seed: of the split, the probe, the order of training.
        ledger: of what this command has said.
    """

    cache: FeatureCache
    probes: Sequence[str] = ()
    group: str | None = None
    seed: int = 0
    ledger: "Ledger | None" = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared, before anything is computed."""
        from featcache.experiments.experiment import require_task

        for name in self.probes:
            require_head(name)
        require_task(self.cache, "label", self.group)

    @cached_property
    def processes(self) -> "ProcessGroup":
        """Those that train together."""
        from featcache.finetuning.loop import ProcessGroup

        return ProcessGroup()

    def all_agree(self, each: bool) -> bool:  # noqa: FBT001 - what is voted on
        """Tell whether all processes say yes: two that went different ways would wait for each other for ever."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # asked before torch is needed for anything
            return each
        return self.processes.agrees(each)

    def prepare(self, plans: Sequence[FineTunePlan]) -> list[StoredRows]:
        """Return each plan's rows; plans differ in what trains, and all that they and the probe need comes of one pass."""
        from featcache.finetuning.model import select_trainable

        backbone = self.cache.backbone
        trainables = [select_trainable(backbone.stages, plan.unfreeze, backbone.module) for plan in plans]
        with self.processes.one_first():
            entries = self._extract([trainable.cut for trainable in trainables], plans[0])
            _ = self.fitted
        return [self._rows(trainable, *entries[trainable.cut], plans[0].views) for trainable in trainables]

    def _extract(self, boundaries: Sequence[str], plan: FineTunePlan) -> dict[str, tuple[Extracted, tuple[str, ...]]]:
        """Extract at some boundaries; at the input where that cannot be or takes too much."""
        places = {cut: self._where(cut, plan) for cut in boundaries}
        affordable = self._within_budget(list(dict.fromkeys(cut for cut, _ in places.values())), plan)
        for boundary, (cut, notes) in places.items():
            if cut not in affordable:
                note = f"the activations at {cut} exceed the room for them: the frozen part runs again in every epoch."
                logger.warning(note)
                places[boundary] = (INPUT, (*notes, note))
        cuts = list(dict.fromkeys(cut for cut, _ in places.values()))
        outputs = [self._output(cut, plan) for cut in cuts]
        if plan.views == 1:
            entries = self.cache.features([Output(POOLED), *outputs])[1:]
        else:  # the probes' embeddings are of the plain sample: a pass of its own, of one view
            entries = self.cache.features(outputs, Views(plan.views))
        at = dict(zip(cuts, entries, strict=True))
        return {boundary: (at[cut], notes) for boundary, (cut, notes) in places.items()}

    def _rows(self, trainable: "Trainable", entry: Extracted, notes: tuple[str, ...], views: int) -> StoredRows:
        """Return the rows that an entry has of the samples that have embeddings too."""
        from featcache.experiments.experiment import aligned

        probe, start = self.best_probe, self.linear_probes
        keep, task, take = aligned(self.task, entry.store)
        split = self.split
        if missing := len(self.task.features.y) - len(keep):  # such as one that overflows float16 there
            split = task.counted(restricted(split, keep))
            untested = len(self.split.test) - len(split.test)
            note = f"{missing} samples have no activations at {entry.cut} and are left out, {untested} of them test samples"
            notes = (*notes, note)
            logger.warning(note)
        correct = decode_correct(probe.right)[np.isin(self.split.test, keep)]

        def take_views(index: NDArray[np.int64]) -> NDArray[Any]:
            stored: NDArray[Any] = take(index // views)[np.arange(len(index)), index % views]
            return stored

        chosen = take if views == 1 else take_views
        return StoredRows(trainable, entry, task, split, chosen, start, probe, correct, notes)

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """The heads that fine-tuning is compared with: where features do not fit memory, those that read from disk."""
        from featcache.experiments.fit import PROBES, in_memory

        names = tuple(dict.fromkeys((*PROBES, *self.probes)))
        if in_memory(self.cache.extracted().store):
            return names
        names = tuple(name for name in names if name in STREAMING)
        logger.warning("the features do not fit memory: the gap is to the best of %s alone", ", ".join(names))
        return names

    @cached_property
    def fitted(self) -> "list[HeadResult]":
        """The fitted heads."""
        from featcache.experiments.fit import FitPlan, run_fit

        plan = FitPlan(self.head_names, group=self.group, baselines=False)
        return run_fit(self.cache, plan, seed=self.seed, ledger=self.ledger).heads

    @property
    def best_probe(self) -> "RunRecord":
        """The head that did best on validation; of equals the one that training starts from."""
        from featcache.experiments.fit import PROBE

        records = [job.record for job in self.fitted]
        return max(records, key=lambda record: (record.val["accuracy"], record.method == PROBE))

    @cached_property
    def task(self) -> Task:
        """The samples that have embeddings, with their classes: those that the probes are fitted on."""
        from featcache.experiments.experiment import task_of

        return task_of(self.cache.files, self.cache.extracted().store.labelled(), group=self.group)

    @property
    def split(self) -> Split:
        """The probes' split."""
        return self.fitted[0].split

    @cached_property
    def linear_probes(self) -> "tuple[LinearHead, LinearHead]":
        """The linear probe fitted on train alone, and the one refitted on train and val."""
        fitted, train, train_val = self._probe, self.split.train, self.split.train_val
        features = self.cache.extracted().store.features
        if fitted.solutions and not self.split.cross:  # the search's one fold was `train`: its head is the one wanted here
            (alone,) = fitted.solutions
            first = self._start(alone, lambda: features().X[train])
        else:  # no fold of a cross-validation trains on all of `train`
            first = self.probe_on(features().X[train], features().y[train])
        return first, self._start(fitted.estimator, lambda: features().X[train_val])

    @property
    def _probe(self) -> "FittedHead":
        from featcache.experiments.fit import PROBE

        return next(job.fitted for job in self.fitted if job.record.method == PROBE)

    def probe_on(self, X: NDArray[Any], y: NDArray[np.int64]) -> "LinearHead":
        """Return the linear probe, its parameters as chosen, fitted on other embeddings (k, d), classes y (k,)."""
        from featcache.experiments.fit import PROBE
        from featcache.heads.search import train as train_head

        rows = np.ascontiguousarray(X, dtype=np.float32)
        return self._start(train_head(PROBE, self._probe.params, rows, y, self.seed), lambda: X)  # an optimum, or an error

    def _start(self, estimator: Any, embeddings: Callable[[], NDArray[Any]]) -> "LinearHead":
        """Return a fitted probe as training starts from it; the ``embeddings`` (k, d) it was fitted on are rarely read."""
        from featcache.finetuning.model import LinearHead
        from featcache.heads.linear import linear_weights

        return _without_dead(LinearHead(*linear_weights(estimator, len(self.task.names))), embeddings)

    def _where(self, cut: str, plan: FineTunePlan) -> tuple[str, tuple[str, ...]]:
        """Return the cut to store at: the boundary itself, or the input where the backbone cannot be cut."""
        if plan.augment and cut != INPUT:
            raise UsageError(
                "`augment` changes what is decoded: it needs `unfreeze='all'`, or `views=N` at a later boundary."
            )
        try:
            if cut != INPUT:
                self.cache.backbone.prefix(cut)
        except CutError as error:
            note = f"{error} The frozen part runs again in every epoch."
            logger.warning(note)
            return INPUT, (note,)
        return cut, ()

    def _within_budget(self, cuts: Sequence[str], plan: FineTunePlan) -> set[str]:
        """Return the cuts whose activations may be stored, the latest first; say what each costs.

        Raises:
            StorageError: not even the decoded samples fit.
        """
        free = int(shutil.disk_usage(self.cache.folder).free * _USABLE)
        budget = self.cache.settings.budget
        room = free if budget is None else min(free, budget)
        views = Views(plan.views)
        sizes = self.cache.sizes([self._output(cut, plan) for cut in cuts], views)
        allowed: set[str] = set()
        for cut, size in zip(cuts, sizes, strict=True):
            if cut != INPUT and size <= room:
                allowed.add(cut)
                room -= size
        if allowed != set(cuts):  # one entry of decoded samples stands for all cuts that do not fit
            (decoded,) = self.cache.sizes([self._output(INPUT, plan)], views)
            if decoded > room:
                raise StorageError(
                    f"{self.cache.folder}: the decoded samples ({decoded / 1e9:.1f} GB) do not fit: use another `cache`, "
                    "a larger `budget`, or unfreeze less."
                )
            allowed.add(INPUT)
        self._tell_cost([*(cut for cut in cuts if cut in allowed and cut != INPUT), *({INPUT} & allowed)], plan)
        return allowed

    @staticmethod
    def _output(cut: str, plan: FineTunePlan) -> Output:
        return Output(cut, plan.dtype if cut != INPUT else None)

    def _tell_cost(self, cuts: Sequence[str], plan: FineTunePlan) -> None:
        """Say what storing at some cuts takes, all of them in one pass."""
        cost = self.cache.estimate([self._output(cut, plan) for cut in cuts], Views(plan.views))
        if cost.to_compute:
            logger.info(
                "activations at %s: %.1f MB, once about %.0f s; without the cache that in each of up to %d epochs (%s)",
                cuts[0] if len(cuts) == 1 else f"{len(cuts)} cuts, from {cuts[0]} to {cuts[-1]}",
                cost.bytes / 1e6,
                cost.seconds,
                plan.epochs * (len(plan.lr) + plan.refit),
                f"{plan.epochs} a rate{' and in the refit' if plan.refit else ''}",
            )


def _without_dead(head: "LinearHead", embeddings: Callable[[], NDArray[Any]]) -> "LinearHead":
    """Return a probe that leaves out features which do not vary but for rounding.

    Scaled to a deviation of 1 as the others they have weights of millions, and the first step of training, which moves
    them by a thousandth, would drown all else.
    """
    from featcache.finetuning.model import LinearHead

    greatest = np.abs(head.weights).max(axis=0)
    if greatest.max() <= _STEEP * np.median(greatest):
        return head
    X = embeddings().astype(np.float64)
    deviations, mean = X.std(axis=0), X.mean(axis=0)
    dead = deviations < _DEAD * np.median(deviations)
    weights = np.where(dead, 0.0, head.weights)
    return LinearHead(weights, head.bias + (head.weights - weights) @ mean)
