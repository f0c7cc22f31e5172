"""Fine-tune from stored activations, compare with the best probe on the same samples, and tell the gap at its price."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import absolute_name
from featcache.display import Displayed, Table, logger, seconds_text
from featcache.errors import CutError, StorageError, UsageError
from featcache.evaluation import Task
from featcache.evaluation.metrics import Gap, decode_correct, paired_gap
from featcache.evaluation.splits import Split
from featcache.experiments.experiment import Experiment, HeadFile, Outcome, aligned, forget_state, task_of
from featcache.experiments.fit import PROBE, PROBES, FitPlan, HeadResult, Ledger, in_memory, run_fit
from featcache.extraction import backbone_identity
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output
from featcache.finetuning import FineTunePlan, depths
from featcache.fingerprint import canonical
from featcache.heads import STREAMING, FittedHead, require_head
from featcache.reports import PROTOCOL, RunRecord, append_once, read_records
from featcache.reports.tables import NO_GAIN
from featcache.reports.wording import START_STAYS, finetune_table
from featcache.specs import INPUT, LIVE_BATCHNORM, POOLED, BackboneSpec, Views

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone
    from featcache.finetuning.finetuner import Checkpoint, FineTuned
    from featcache.finetuning.loop import Epoch, ProcessGroup
    from featcache.finetuning.model import LinearHead, Take, Trainable

_STEEP, _DEAD = 1e4, 1e-5  # a weight, and a feature's deviation, beside the median one
_USABLE = 0.9  # of a disk's free room: parts are written beside what they replace, and others write too
_DRIFTED = 0.5  # CKA below which the embeddings are no longer the probe's


@dataclass(frozen=True, repr=False)
class FineTuneResult(Displayed):
    """A fine-tuned backbone with its record; ``bundle`` is its head, for predicting and exporting.

    Attributes:
        record: what was asked for and what came out.
        epochs: of the rate that was kept, epoch 0 the start, as plain values.
        similarity: linear CKA of the embeddings before and after.
        checkpoint: the file of the tuned network.
        bundle: the file of its head.
        computed_samples: whose activations were extracted for it.
        tuned: the network in memory; ``None`` where an earlier command has trained it.
        unfinished: the training's state, until it is cleared.
        remarks: what a reader of the gap should know.
        folds: of train and val on which the heads beside it were judged; 0 for the val part alone, as it was itself.
    """

    record: RunRecord
    epochs: tuple[dict[str, Any], ...]
    similarity: float
    checkpoint: Path
    bundle: Path
    computed_samples: int = 0
    tuned: "FineTuned | None" = None
    unfinished: "Checkpoint | None" = None
    remarks: tuple[str, ...] = ()
    folds: int = 0

    def table(self) -> Table:
        """Return it beside the probe that its gap is to."""
        return finetune_table([self.record], self.folds)

    @property
    def jobs(self) -> "tuple[FineTuneResult, ...]":
        """This one, as of a sweep of one depth."""
        return (self,)

    @property
    def gained(self) -> bool:
        """Whether an epoch did better on validation than the start."""
        return bool(self.record.params["best_epoch"] > 0)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache finetune``."""
        record = self.record
        return {
            "dataset": record.dataset,
            "backbone": record.backbone,
            "unfreeze": record.method,
            "cut": record.cut,
            "test": record.test,
            "val": record.val,
            "probe": record.probe,
            "gap": record.gap,
            "gained": self.gained,
            "seconds": record.seconds,
            "lr": record.params["lr"],
            "epochs": list(self.epochs),
            "best_epoch": record.params["best_epoch"],
            "val_by_lr": record.params["val_by_lr"],
            "copies": record.copies,
            "cka": self.similarity,
            "checkpoint": str(self.checkpoint),
            "bundle": str(self.bundle),
            "notes": list(record.notes),
        }


@dataclass(frozen=True, repr=False)
class SweepResult(Displayed):
    """Fine-tuning at every depth, the shallowest first."""

    jobs: tuple[FineTuneResult, ...]

    def table(self) -> Table:
        """Return the depths beside the probe."""
        return finetune_table([job.record for job in self.jobs], self.jobs[0].folds)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of a sweep."""
        best = max(self.jobs, key=lambda job: job.record.val["accuracy"])
        return {"depths": [job.summary for job in self.jobs], "best_on_validation": best.record.method}


@dataclass(frozen=True)
class Boundary:
    """What trains, the entry at the cut before it, and what is to be said of that cut."""

    trainable: "Trainable"
    entry: Extracted
    notes: tuple[str, ...]


@dataclass(frozen=True)
class StoredRows:
    """The rows that one fine-tuning trains on, and what it starts from and is compared with.

    Attributes:
        task: the samples that have both an embedding and a row there.
        split: of these samples.
        take: gives their rows by positions, view after view.
        start: the linear probe fitted on train alone, and the one refitted on train and val.
        probe: the record of the best probe.
        correct: which of the test samples (t,) the best probe has right.
        notes: what is to be said of the rows.
    """

    task: Task
    split: Split
    take: "Take"
    start: "tuple[LinearHead, LinearHead]"
    probe: RunRecord
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
    ledger: Ledger | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be compared, before anything is computed."""
        for name in self.probes:
            require_head(name)
        self.cache.require("label", self.group)

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

    def prepare(self, plans: Sequence[FineTunePlan]) -> list[Boundary]:
        """Return each plan's boundary; plans differ in what trains, and all that they and the probe need is one pass's."""
        from featcache.finetuning.model import select_trainable

        backbone = self.cache.backbone
        trainables = [select_trainable(backbone.stages, plan.unfreeze, backbone.module) for plan in plans]
        with self.processes.one_first():
            entries = self._extract([trainable.cut for trainable in trainables], plans[0])
            _ = self.fitted
        return [Boundary(trainable, *entries[trainable.cut]) for trainable in trainables]

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

    def rows(self, boundary: Boundary, views: int) -> StoredRows:
        """Return the rows that an entry has of the samples that have embeddings too."""
        probe, start = self.best_probe, self.linear_probes
        entry, split, notes = boundary.entry, self.split, boundary.notes
        keep, task, take = aligned(self.task, entry.store)
        if missing := len(self.task.features.y) - len(keep):  # such as one that overflows float16 there
            split = task.part_of(split, keep)
            untested = len(self.split.test) - len(split.test)
            note = f"{missing} samples have no activations at {entry.cut} and are left out, {untested} of them test samples"
            notes = (*notes, note)
            logger.warning(note)
        correct = decode_correct(probe.right)[np.isin(self.split.test, keep)]

        def take_views(index: NDArray[np.int64]) -> NDArray[Any]:
            stored: NDArray[Any] = take(index // views)[np.arange(len(index)), index % views]
            return stored

        chosen = take if views == 1 else take_views
        return StoredRows(task, split, chosen, start, probe, correct, notes)

    @cached_property
    def head_names(self) -> tuple[str, ...]:
        """The heads that fine-tuning is compared with: where features do not fit memory, those that read from disk."""
        names = tuple(dict.fromkeys((*PROBES, *self.probes)))
        if in_memory(self.cache.extracted().store):
            return names
        names = tuple(name for name in names if name in STREAMING)
        logger.warning("The features do not fit memory: the gap is to the best of %s alone", ", ".join(names))
        return names

    @cached_property
    def fitted(self) -> list[HeadResult]:
        """The fitted heads."""
        plan = FitPlan(self.head_names, group=self.group, baselines=False)
        return run_fit(self.cache, plan, seed=self.seed, ledger=self.ledger).heads

    @property
    def best_probe(self) -> RunRecord:
        """The head that did best on validation; of equals the one that training starts from."""
        records = [job.record for job in self.fitted]
        return max(records, key=lambda record: (record.val["accuracy"], record.method == PROBE))

    @cached_property
    def task(self) -> Task:
        """The samples that have embeddings, with their classes: those that the probes are fitted on."""
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
    def _probe(self) -> FittedHead:
        return next(job.fitted for job in self.fitted if job.record.method == PROBE)

    def probe_on(self, X: NDArray[Any], y: NDArray[np.int64]) -> "LinearHead":
        """Return the linear probe, its parameters as chosen, fitted on other embeddings (k, d), classes y (k,)."""
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
                "Activations at %s are computed once (about %s) and kept (%.1f MB): each of up to %d epochs reads them "
                "instead of computing them again",
                cuts[0] if len(cuts) == 1 else f"{len(cuts)} cuts, from {cuts[0]} to {cuts[-1]}",
                seconds_text(cost.seconds),
                cost.bytes / 1e6,
                plan.epochs * (len(plan.lr) + plan.refit),
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


def run_finetune(inputs: FineTuneInputs, plan: FineTunePlan, *, records: Path | None = None) -> FineTuneResult:
    """Fit the probe, extract at the freeze boundary if needed, train what follows it, and compare on the same samples.

    What an earlier command has trained to its end and recorded is not trained again.

    Args:
        inputs: the data set, the backbone, and the heads to compare with.
        plan: what trains, and how.
        records: a JSONL file that gets the record.
    """
    result = find_finished(inputs, plan, plan.unfreeze.text, records)
    if not inputs.all_agree(result is not None) or result is None:
        (boundary,) = inputs.prepare([plan])
        result = FineTuneJob(inputs, plan, boundary).run(records)
    elif records is not None:
        append_once(records, result.record, inputs.cache.settings.tracker)
    _tell([result])
    _forget(inputs, [result])
    return result


def run_sweep(inputs: FineTuneInputs, plan: FineTunePlan, *, records: Path | None = None) -> SweepResult:
    """Fine-tune at every depth from the last stage to the whole backbone; ``plan.unfreeze`` is left aside."""
    sweep = Sweep(inputs, plan, records)
    for place in range(len(sweep.plans)):
        if sweep.take(place).gained:
            sweep.keep(place)
    _tell(sweep.results)
    sweep.end()
    return SweepResult(tuple(sweep.results))


class Sweep:
    """Fine-tunings from the last stage to the whole backbone, taken one after another, the shallowest first.

    Each depth goes on from the weights of the last one that was kept, at its rate: the others' rates need no search. What an
    earlier command has trained is taken from its record; whoever stops finds the trained depths when the sweep goes on. All
    boundaries are extracted in one pass, once a depth has to be trained.

    Args:
        inputs: as of ``run_finetune``.
        plan: how all depths train; ``unfreeze`` is left aside.
        records: a JSONL file that gets the records.
    """

    def __init__(self, inputs: FineTuneInputs, plan: FineTunePlan, records: Path | None = None) -> None:
        unfreezes = depths(len(inputs.cache.stage_names))
        self.inputs, self.records = inputs, records
        self.plans = [replace(plan, unfreeze=unfreeze) for unfreeze in unfreezes]
        self._results: dict[int, FineTuneResult] = {}
        self._before: dict[int, int | None] = {}  # of each depth: the one that it goes on from
        self._last_kept: int | None = None
        self._looked_up: dict[tuple[int, int | None], FineTuneResult | None] = {}

    @property
    def results(self) -> list[FineTuneResult]:
        """What was taken, the shallowest first."""
        return list(self._results.values())

    @cached_property
    def _boundaries(self) -> list[Boundary]:
        return self.inputs.prepare(self.plans)

    def finished(self, place: int) -> FineTuneResult | None:
        """Return what an earlier command has trained at a depth after the last that was kept, if it has."""
        asked = (place, self._last_kept)
        if asked not in self._looked_up:
            before = None if self._last_kept is None else self._results[self._last_kept]
            plan = _after(self.plans[place], before)
            result = find_finished(self.inputs, plan, _method_after(plan, before), self.records)
            self._looked_up[asked] = result
        return self._looked_up[asked]

    def take(self, place: int) -> FineTuneResult:
        """Return what a depth comes to, trained where it was not before."""
        result = self.finished(place)
        self._before[place] = self._last_kept
        if not self.inputs.all_agree(result is not None) or result is None:
            result = self._train(place)
        elif self.records is not None:
            append_once(self.records, result.record, self.inputs.cache.settings.tracker)
        self._results[place] = result
        return result

    def keep(self, place: int) -> None:
        """Let deeper ones go on from a depth."""
        self._last_kept = place

    def end(self) -> None:
        """Forget the states of all trainings: not before the last depth, since a sweep that goes on starts from them."""
        _forget(self.inputs, self.results)

    def _train(self, place: int) -> FineTuneResult:
        earlier, before = self._before[place], None
        if earlier is not None:
            if self._results[earlier].tuned is None:  # of an earlier command: its state has the weights, or it trains again
                self._results[earlier] = self._train(earlier)
            before = self._results[earlier]
        plan = _after(self.plans[place], before)
        return FineTuneJob(self.inputs, plan, self._boundaries[place], before).run(self.records)


def _after(plan: FineTunePlan, gained: FineTuneResult | None) -> FineTunePlan:
    """Return a depth's plan: at the rate of the one before that gained, where one has."""
    return plan if gained is None else replace(plan, lr=(gained.record.params["lr"],))


def _method_after(plan: FineTunePlan, gained: FineTuneResult | None) -> str:
    """Return what tables call a fine-tuning: what trains, and after what."""
    return plan.unfreeze.text if gained is None else f"{plan.unfreeze.text} after {gained.record.method}"


@dataclass(frozen=True)
class FineTuneJob:
    """One fine-tuning: what it stands on, how and where it trains, and the shallower one that it goes on from."""

    inputs: FineTuneInputs
    plan: FineTunePlan
    boundary: Boundary
    after: FineTuneResult | None = None

    @cached_property
    def rows(self) -> StoredRows:
        """What it trains on."""
        return self.inputs.rows(self.boundary, self.plan.views)

    @cached_property
    def experiment(self) -> Experiment:
        """What it is as an experiment: key, files, record, card."""
        method = _method_after(self.plan, self.after)
        return Experiment(self.inputs.cache, self.rows.task, method, self.plan, self.inputs.seed)

    @cached_property
    def stem(self) -> Path:
        """What its files' names begin with."""
        return self.experiment.path(self.boundary.entry, self.plan.unfreeze.text.replace(":", "").replace("%", "pct"))

    @property
    def checkpoint(self) -> Path:
        """The file of the tuned network."""
        return self.stem.with_name(f"{self.stem.name}.safetensors")  # dots of a stage's name are no suffix

    def run(self, records: Path | None) -> FineTuneResult:
        """Train, compare and write; PyTorch's generators, of which dropout and new layers draw, are left as they were."""
        from featcache.extraction.runtimes import own_randomness
        from featcache.finetuning.finetuner import Checkpoint
        from featcache.heads.bundle import head_path

        processes, stem, rows, entry = self.inputs.processes, self.stem, self.rows, self.boundary.entry
        with own_randomness(self.inputs.cache.backbone.device):
            state = stem.with_name(f"{stem.name}.unfinished")
            unfinished = Checkpoint(state, writes=processes.rank == 0, protocol=PROTOCOL)
            tuned = self._train(unfinished)
            right, groups = tuned.tested.right, rows.split.test_groups
            outcome = self._outcome(tuned, paired_gap(right, rows.correct, groups=groups) if tuned.best > 0 else None)
            with processes.one_first():
                if processes.rank == 0:
                    # the state is cleared after all of it: a kill anywhere finds a training that has ended
                    record = self._keep(tuned, outcome, records)
                else:
                    record = self.experiment.record(entry, self.checkpoint, outcome)
        epochs = tuple(asdict(epoch) for epoch in tuned.history)
        facts = (tuned.similarity, self.checkpoint, head_path(stem), entry.report.computed, tuned, unfinished)
        return FineTuneResult(record, epochs, *facts, remarks=outcome.notes, folds=len(self.rows.split.cross))

    def _train(self, unfinished: "Checkpoint") -> "FineTuned":
        from featcache.finetuning.finetuner import Finetuner
        from featcache.finetuning.loop import TrainContext
        from featcache.finetuning.model import Network, moving_norms, open_up

        inputs, rows, plan, trainable = self.inputs, self.rows, self.plan, self.boundary.trainable
        start, refitted = (Network({}, head) for head in rows.start)
        if self.after is not None and self.after.tuned is not None:
            start, refitted = self.after.tuned.from_train, self.after.tuned.finished
        backbone, cut = inputs.cache.backbone, self.boundary.entry.cut
        on_epoch, may_move = self._told, plan.train_batchnorm is None and _is_resized(backbone)
        network = open_up(backbone, trainable, cut, start, drop_path=plan.drop_path, seed=inputs.seed)
        how = (rows.take, rows.task.features.y, plan, inputs.processes, inputs.seed)
        context = TrainContext(network.model, network.stages, *how, on_epoch=on_epoch)
        tries_live = may_move and bool(moving_norms(network.model))
        return Finetuner(network, context, rows.split, refitted, unfinished, tries_live, inputs.probe_on).run()

    @property
    def _told(self) -> "Callable[[float, Epoch], None] | None":
        """What tells the command's tracker of each epoch; of several processes one does."""
        cache, tracker = self.inputs.cache, self.inputs.cache.settings.tracker
        if tracker is None or self.inputs.processes.rank:
            return None
        name = f"{cache.dataset.name} {cache.spec.label} {self.experiment.method} seed {self.inputs.seed}"

        def tell(rate: float, epoch: "Epoch") -> None:
            val = {"validation accuracy": epoch.val.accuracy, "validation log-loss": epoch.val.log_loss}
            facts = {"number": epoch.number, "train loss": epoch.train_loss, "train accuracy": epoch.train_accuracy} | val
            numbers = {key: value for key, value in facts.items() if value is not None}
            tracker.on_epoch(name, self.experiment.key, rate, numbers)

        return tell

    def _outcome(self, tuned: "FineTuned", between: Gap | None) -> Outcome:
        """Return what it came to, with the gap to the best probe and what is to be said of it."""
        rows, seconds = self.rows, {"train": round(tuned.seconds, 3)}
        if self.after is not None:  # a depth that goes on from another needed all that the other did
            seconds["before"] = round(sum(self.after.record.seconds.values()), 3)
        return Outcome(
            rows.split,
            params=_params(tuned),
            val=tuned.val,
            test=tuned.tested.scores,
            right=tuned.tested.right,
            seconds=seconds,
            samples_per_second=round(tuned.samples_per_second, 1),
            probe=self._probe(),
            gap=None if between is None else asdict(between),
            notes=self._remarks(tuned, between),
            of_rows=rows.notes,
        )

    def _remarks(self, tuned: "FineTuned", between: Gap | None) -> tuple[str, ...]:
        """Return what a reader of the gap should know."""
        remarks = []
        if between is not None and between.is_noise:
            told = "95 % interval {:+.1f} to {:+.1f}".format(*between.ci) if between.ci else "too few groups to tell"
            remarks.append(
                f"the gap of {between.points:+.1f} points to {self.rows.probe.method} is inside the noise of "
                f"{len(self.rows.split.test)} test samples ({told})"
            )
        if self.plan.refit and tuned.best > 0 and not tuned.refitted:
            again = "trained again on train and validation it was worse on the latter"
            remarks.append(f"{again}: the one trained on train is kept")
        if tuned.best == 0:
            remarks.append(f"{NO_GAIN}: {START_STAYS}")
        remarks += tuned.remarks
        if tuned.similarity < _DRIFTED:
            remarks.append(f"the embeddings are other ones now than the probe's (CKA {tuned.similarity:.2f})")
        return tuple(remarks)

    def _probe(self) -> dict[str, Any]:
        best = self.rows.probe
        return {
            "head": best.method,
            "of": [job.record.method for job in self.inputs.fitted],
            "start": PROBE if self.after is None else self.after.record.method,
            "val": best.val,
            "test": best.test,
            "seconds": best.seconds,
        }

    def _keep(self, tuned: "FineTuned", outcome: Outcome, records: Path | None) -> RunRecord:
        """Write the tuned network; its head, which predicts as any other with it as its backbone; and last the record."""
        from featcache.backbones.timm_models import hash_weights
        from featcache.finetuning.model import save_checkpoint
        from featcache.heads.linear import linear_estimator

        cache, backbone = self.inputs.cache, tuned.network.backbone
        transform = asdict(backbone.preprocess.spec)
        facts = {
            "backbone": cache.identity,
            "classes": list(self.rows.task.names),
            "transform": transform,
            "unfreeze": self.plan.unfreeze.text,
            # the record has the curve alone: with these what an earlier command has trained is reported whole
            "epochs": [asdict(epoch) for epoch in tuned.history],
            "cka": tuned.similarity,
            "split": self.inputs.split.fingerprint,
        }
        save_checkpoint(backbone.module, tuned.network.model, self.checkpoint, facts)
        head = tuned.network.model.linear_head()
        estimator = linear_estimator(head.weights, head.bias)
        spec: BackboneSpec = replace(cache.spec, weights=str(self.checkpoint.resolve()), random_init=None)
        weights = hash_weights(backbone.module)
        told = {
            "backbone": backbone_identity(spec) | {"name": absolute_name(spec)},
            "weights": spec.weights,
            "loaded": asdict(replace(cache.backbone.loaded, tag="file", weights_sha256=weights)),
            "transform": transform,
            "cut": POOLED,
            "head": self.plan.unfreeze.text,
            "params": {"lr": tuned.lr, "epoch": tuned.best},
        }
        file = HeadFile(estimator, self.stem, told)
        return self.experiment.keep(self.boundary.entry, self.checkpoint, outcome, file, records)


def _is_resized(backbone: "Backbone") -> bool:
    """Tell whether pretrained weights see samples of another size than they were trained on."""
    size = backbone.spec.overrides.input_size
    published = (getattr(backbone.module, "pretrained_cfg", None) or {}).get("input_size", (size,))
    return backbone.spec.random_init is None and size is not None and size != published[-1]


def _params(tuned: "FineTuned") -> dict[str, Any]:
    return {
        "best_epoch": tuned.best,
        "lr": tuned.lr,
        "val_by_lr": tuned.rates,
        "share": tuned.share,
        "live_batchnorm": tuned.live,
        **({"batchnorm_settled": True} if any(name.endswith(LIVE_BATCHNORM) for name in tuned.rates) else {}),
        "stages": [stage.name for stage in tuned.network.trainable.stages],
        "curve_smoothing": 0.0,  # records of before have training's loss with its label smoothing
        "cka": round(tuned.similarity, 4),
        "precision": tuned.precision,
        "refitted": tuned.refitted,
        "curve": [
            [epoch.train_loss, epoch.train_accuracy, epoch.val.log_loss, epoch.val.accuracy, round(epoch.seconds, 3)]
            for epoch in tuned.history
        ],
    }


def find_finished(inputs: FineTuneInputs, plan: FineTunePlan, method: str, records: Path | None) -> FineTuneResult | None:
    """Return what an earlier command has trained: the same experiment, its record, checkpoint and head all there."""
    plan_text = canonical(asdict(plan))
    alike = [
        record
        for record in (read_records([records], warn=False) if records else [])
        if (record.kind, record.method, record.seed) == ("finetune", method, inputs.seed)
        and record.is_current
        and canonical(record.request.get("plan")) == plan_text
    ]
    if not alike:  # told without looking at the data set: embeddings that are missing are extracted in one pass, later
        return None
    key = Experiment(inputs.cache, inputs.task, method, plan, inputs.seed).key
    for record in reversed(alike):
        # the heads that it was compared with are no part of the experiment's name
        if record.cell == key and set((record.probe or {})["of"]) == set(inputs.head_names):
            return _read_again(record, inputs)
    return None


def _read_again(record: RunRecord, inputs: FineTuneInputs) -> FineTuneResult | None:
    from safetensors import safe_open

    from featcache.heads.bundle import head_path

    checkpoint = inputs.cache.settings.cache / record.artefact
    head = head_path(checkpoint.with_name(checkpoint.name.removesuffix(".safetensors")))
    if not checkpoint.is_file() or not head.is_file():
        return None
    try:
        with safe_open(checkpoint, framework="numpy") as file:
            facts = json.loads(file.metadata()["featcache"])
        trained = (tuple(facts["epochs"]), facts["cka"], checkpoint, head)
        result = FineTuneResult(record, *trained, remarks=record.notes, folds=len(inputs.split.cross))
    except Exception as error:  # noqa: BLE001 - a damaged file fails in any way; one of an earlier version has no epochs
        logger.info("%s: trained anew (%s: %s)", checkpoint, type(error).__name__, error)
        return None
    # the key names the column, not its values: who belongs together may be another now
    is_parted_so = inputs.group is None or facts.get("split") == inputs.split.fingerprint
    return result if is_parted_so else None


def _tell(results: Sequence[FineTuneResult]) -> None:
    """Say what is to be said of fine-tunings, and which of them are an earlier command's."""
    again = [result for result in results if result.tuned is None]
    if again:
        names = ", ".join(result.record.short_method for result in again)
        file = str(again[0].checkpoint) if len(again) == 1 else f"{again[0].checkpoint} and what is named like it"
        logger.info("%s: trained already (%s); remove %s to train again", names, again[-1].record.time, file)
    for result in results:
        for remark in result.remarks:
            if not remark.startswith(NO_GAIN):  # the result's own sentence says it
                logger.warning("%s: %s", result.record.short_method, remark)


def _forget(inputs: FineTuneInputs, results: Sequence[FineTuneResult]) -> None:
    """Clear the states of trainings that have ended, and what an earlier command left that was killed at its end."""
    for result in results:
        if result.unfinished is not None:
            result.unfinished.clear()
        else:
            forget_state(inputs.cache.folder, result.record.cell)
