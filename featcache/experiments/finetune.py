"""The job of fine-tuning: probe, extraction at the freeze boundary, training behind it, and the gap at its price."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import origins
from featcache.datasets.base import require_one_label
from featcache.errors import CutError, DataError, StorageError, UsageError
from featcache.evaluation.metrics import Gap, gap
from featcache.evaluation.splits import Split, make_split, restricted
from featcache.evaluation.tasks import Task
from featcache.experiments.experiment import Experiment, Outcome, aligned, decode_correct
from featcache.experiments.fit import PROBE, PROBES, FitPlan, HeadResult, Ledger, groups_of, in_memory, run_fit
from featcache.extraction.feature_cache import Estimate, Extracted, FeatureCache, Output
from featcache.extraction.lookup import backbone_identity
from featcache.finetuning.plan import FineTunePlan
from featcache.fingerprint import canonical
from featcache.heads import bundle
from featcache.progress import logger
from featcache.reports.records import RunRecord, append_record, read_records
from featcache.specs import INPUT, POOLED, BackboneSpec, Views
from featcache.store.atomic import remove_file
from featcache.store.rows import Features

if TYPE_CHECKING:
    from featcache.backbones.base import Backbone
    from featcache.finetuning.checkpoint import Checkpoint
    from featcache.finetuning.finetuner import FineTuned
    from featcache.finetuning.model import LinearHead, Take
    from featcache.finetuning.unfreezing import Trainable

_DRIFTED = 0.5
_USABLE = 0.9  # of a disk's free room
_IN_NAMES = 8  # digits of an experiment's name that its files' names have


@dataclass(frozen=True)
class FineTuneResult:
    """A fine-tuned backbone with its record; ``bundle`` is its head, for predicting and exporting.

    ``keeper`` has the finished training's state until it is cleared.
    """

    tuned: "FineTuned"
    record: RunRecord
    checkpoint: Path
    bundle: Path
    computed_images: int
    keeper: "Checkpoint"

    @property
    def jobs(self) -> "tuple[FineTuneResult, ...]":
        """This one, as of a sweep of one depth."""
        return (self,)

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
            "gained": self.tuned.best > 0,
            "seconds": record.seconds,
            "lr": self.tuned.lr,
            "epochs": [asdict(epoch) for epoch in self.tuned.history],
            "best_epoch": self.tuned.best,
            "val_by_lr": record.params["val_by_lr"],
            "copies": record.copies,
            "cka": self.tuned.similarity,
            "checkpoint": str(self.checkpoint),
            "bundle": str(self.bundle),
            "notes": list(record.notes),
        }


def run_finetune(
    bench: FeatureCache,
    plan: FineTunePlan,
    *,
    probes: Sequence[str] = (),
    group: str | None = None,
    seed: int = 0,
    records: Path | None = None,
    ledger: Ledger | None = None,
) -> FineTuneResult:
    """Fit the probe, extract at the freeze boundary if needed, train what follows it, and compare on the same images.

    Args:
        bench: the data set and the backbone.
        plan: what trains, and how.
        probes: heads beside ridge, nearest neighbours and logistic: the gap is to the best of all on validation.
        group: the column of the source's manifest whose values stay together, such as a patient.
        seed: of the split, the probe, the order of training.
        records: a JSONL file that gets the record.
        ledger: of heads that this command has fitted already.
    """
    inputs = FineTuneInputs(bench, probes, group, seed, ledger or Ledger())
    trainable = inputs.trainable(plan)
    inputs.extract([trainable], plan)
    job = _tune_apart(inputs, plan, trainable, records)
    job.keeper.clear()
    return job


@dataclass(frozen=True)
class SweepResult:
    """Fine-tuning at every depth, the shallowest first."""

    jobs: tuple[FineTuneResult, ...]

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of a sweep."""
        best = max(self.jobs, key=lambda job: job.record.val["accuracy"])
        return {"depths": [job.summary for job in self.jobs], "best_on_validation": best.record.method}


def run_sweep(
    bench: FeatureCache,
    plan: FineTunePlan,
    *,
    probes: Sequence[str] = (),
    group: str | None = None,
    seed: int = 0,
    records: Path | None = None,
) -> SweepResult:
    """Fine-tune at every depth from the last stage to the whole backbone; ``plan.unfreeze`` is left aside.

    All boundaries are extracted in one pass. Each depth starts from the weights of the one before it and takes over its
    rate, once one depth has gained on the probe: the others' rates need no search.
    """
    from featcache.finetuning.unfreezing import depths

    inputs = FineTuneInputs(bench, probes, group, seed, Ledger())
    plans = [replace(plan, unfreeze=unfreeze) for unfreeze in depths(bench.backbone.stages)]
    trainable = [inputs.trainable(one) for one in plans]
    inputs.extract(trainable, plan)
    jobs: list[FineTuneResult] = []
    gained: FineTuneResult | None = None
    for one, behind in zip(plans, trainable, strict=True):
        rates = (gained.tuned.lr,) if gained else one.lr
        job = _tune_apart(inputs, replace(one, lr=rates), behind, records, after=gained)
        jobs.append(job)
        gained = job if job.tuned.best > 0 else gained
    for job in jobs:  # not before: a sweep that is killed finds the depths that it has trained
        job.keeper.clear()
    return SweepResult(tuple(jobs))


class FineTuneInputs:
    """What fine-tuning stands on: the probe, and the entries at freeze boundaries."""

    def __init__(self, bench: FeatureCache, probes: Sequence[str], group: str | None, seed: int, ledger: Ledger) -> None:
        from featcache import heads
        from featcache.finetuning.distributed import ProcessGroup

        for name in probes:
            heads.require_head(name)
        require_one_label(bench.dataset)
        self.processes = ProcessGroup()
        self.bench, self.seed, self.group = bench, seed, group
        self._heads, self._ledger = tuple(dict.fromkeys((*PROBES, *probes))), ledger
        self._notes: dict[str, tuple[str, ...]] = {}
        self._entries: dict[str, Extracted] = {}

    def trainable(self, plan: FineTunePlan) -> "Trainable":
        """Return what trains."""
        from featcache.finetuning.unfreezing import select_trainable

        return select_trainable(self.bench.backbone.stages, plan.unfreeze, self.bench.backbone.module)

    def extract(self, several: Sequence["Trainable"], plan: FineTunePlan) -> None:
        """Extract at some boundaries and for the probe, in one pass; at the input where that cannot be or takes too much."""
        with self.processes.one_first():
            self._extract(several, plan)
            _ = self.probes

    def _extract(self, several: Sequence["Trainable"], plan: FineTunePlan) -> None:
        cuts = {trainable.cut: self._where(trainable.cut, plan) for trainable in several}
        left = self._within_budget(list(dict.fromkeys(cut for cut, _ in cuts.values())), plan)
        for cut, (where, notes) in cuts.items():
            if where not in left:
                note = f"the activations at {where} exceed the room for them: the frozen part runs again in every epoch."
                logger.warning(note)
                cuts[cut] = (INPUT, (*notes, note))
        wanted = list(dict.fromkeys(cut for cut, _ in cuts.values()))
        targets = [Output(cut, plan.dtype if cut != INPUT else None) for cut in wanted]
        if plan.views == 1:
            done = self.bench.features([Output(POOLED), *targets])[1:]
        else:
            done = self.bench.features(targets, Views(plan.views))
        entries = dict(zip(wanted, done, strict=True))
        self._entries = {cut: entries[where] for cut, (where, _) in cuts.items()}
        self._notes = {cut: notes for cut, (_, notes) in cuts.items()}

    def entry(self, cut: str) -> tuple[Extracted, tuple[str, ...]]:
        """Return the entry that stands for a boundary, and what is to be said of it."""
        return self._entries[cut], self._notes[cut]

    @cached_property
    def probes(self) -> list[HeadResult]:
        """The fitted heads."""
        from featcache import heads

        names = self._heads
        if not in_memory(self.bench.extracted().store):
            names = tuple(name for name in names if name in heads.HEADS and heads.HEADS[name].streams)
            logger.warning("the features do not fit memory: the gap is to the best of %s alone", ", ".join(names))
        plan = FitPlan(names, group=self.group, baselines=False)
        return run_fit(self.bench, plan, seed=self.seed, ledger=self._ledger, keep=self.processes.rank == 0).heads

    @property
    def best_probe(self) -> RunRecord:
        """The head that did best on validation."""
        records = [job.record for job in self.probes]
        return max(records, key=lambda record: (record.val["accuracy"], record.method == PROBE))

    @cached_property
    def features(self) -> Features:
        """The embeddings that the heads were fitted on."""
        return self.bench.extracted().store.features()

    @cached_property
    def task(self) -> Task:
        """The images that have embeddings, with their classes."""
        return Task.of(self.features, "label", groups_of(self.bench, self.features, self.group), self.group)

    @cached_property
    def split(self) -> Split:
        """The probes' split."""
        features, groups = self.features, self.task.groups
        return make_split(features.y, features.splits, features.classes, self.seed, groups=groups, contents=features.sha256)

    @cached_property
    def linear_probes(self) -> "tuple[LinearHead, LinearHead]":
        """The linear probe fitted on train alone, and the one refitted on train and val."""
        from featcache import heads
        from featcache.finetuning.model import LinearHead

        fitted = next(job.fitted for job in self.probes if job.record.method == PROBE)
        features, train = self.features, self.split.train
        if fitted.solutions and not self.split.cross:  # the search's one fold was `train`: its head is the one wanted here
            (alone,) = fitted.solutions
        else:  # no fold of a cross-validation trains on all of `train`
            X = np.ascontiguousarray(features.X[train], dtype=np.float32)
            alone = heads.train(PROBE, fitted.params, X, features.y[train], self.seed)  # an optimum, or an error
        count = len(features.classes)
        return LinearHead(*heads.linear_weights(alone, count)), LinearHead(*heads.linear_weights(fitted.estimator, count))

    def _where(self, cut: str, plan: FineTunePlan) -> tuple[str, tuple[str, ...]]:
        """Return the cut to store at: the boundary itself, or the input where the backbone cannot be cut."""
        if plan.augment and cut != INPUT:
            raise UsageError("`augment` changes pixels: it needs `unfreeze='all'`, or `views=N` at a later boundary.")
        try:
            if cut != INPUT:
                self.bench.backbone.prefix(cut)
        except CutError as error:
            note = f"{error} The frozen part runs again in every epoch."
            logger.warning(note)
            return INPUT, (note,)
        return cut, ()

    def _within_budget(self, cuts: Sequence[str], plan: FineTunePlan) -> set[str]:
        """Return the cuts whose activations may be stored, the latest first; say what each costs.

        Raises:
            StorageError: not even the pixels fit.
        """
        import shutil

        free = int(shutil.disk_usage(self.bench.folder).free * _USABLE)
        budget = self.bench.settings.budget
        room = free if budget is None else min(free, budget)
        allowed: set[str] = set()
        for cut in (cut for cut in cuts if cut != INPUT):
            cost = self._cost(cut, plan)
            if cost.bytes <= room:
                allowed.add(cut)
                room -= cost.bytes
        if allowed != set(cuts):
            cost = self._cost(INPUT, plan)
            if cost.bytes > room:
                raise StorageError(
                    f"{self.bench.folder}: the images' pixels ({cost.bytes / 1e9:.1f} GB) do not fit: use another `cache`, "
                    "a larger `budget`, or unfreeze less."
                )
            allowed.add(INPUT)
        return allowed

    def _cost(self, cut: str, plan: FineTunePlan) -> Estimate:
        """Return what storing at a cut takes, and say it."""
        cost = self.bench.estimate([Output(cut, plan.dtype if cut != INPUT else None)], Views(plan.views))
        if cost.to_compute:
            logger.info(
                "activations at %s: %.1f MB and about %.0f s once; computed anew, that in each of up to %d epochs (%s)",
                cut,
                cost.bytes / 1e6,
                cost.seconds,
                plan.epochs * (len(plan.lr) + plan.refit),
                f"{plan.epochs} a rate{' and in the refit' if plan.refit else ''}",
            )
        return cost


def _tune_apart(
    inputs: FineTuneInputs,
    plan: FineTunePlan,
    trainable: "Trainable",
    records: Path | None,
    after: FineTuneResult | None = None,
) -> FineTuneResult:
    """Train, and leave the caller's random numbers as they were: new layers and dropout draw from PyTorch's own."""
    from featcache.extraction.runtimes import own_randomness

    with own_randomness(inputs.bench.backbone.device):
        return _tune(inputs, plan, trainable, records, after)


def _tune(
    inputs: FineTuneInputs,
    plan: FineTunePlan,
    trainable: "Trainable",
    records: Path | None,
    after: FineTuneResult | None = None,
) -> FineTuneResult:
    from featcache.finetuning.checkpoint import Checkpoint, save_checkpoint
    from featcache.finetuning.finetuner import finetune

    bench, seed = inputs.bench, inputs.seed
    at_cut, notes = inputs.entry(trainable.cut)
    keep, task, take = _rows(inputs.task, at_cut, plan.views)
    split = restricted(inputs.split, keep)
    if left_out := len(inputs.features.y) - len(keep):
        test = len(inputs.split.test) - len(split.test)
        notes = (
            *notes,
            f"{left_out} images have no activations at {at_cut.cut} and are left out, {test} of them test images",
        )
        logger.warning(notes[-1])
    start, probe = inputs.linear_probes
    own = _trainable(bench, plan)
    method, shallower = plan.unfreeze.text, None
    if after is not None:
        weights, start = after.tuned.from_train
        own.module.load_state_dict(weights)
        shallower, method = after.tuned.finished, f"{method} after {after.record.method}"
    experiment = Experiment(bench, task, method, plan, seed)
    path = experiment.path(at_cut, plan.unfreeze.text.replace(":", "").replace("%", "pct"))
    folder, name, processes = path.parent, path.name, inputs.processes
    keeper = Checkpoint(folder / f"{name}.unfinished", writes=processes.rank == 0)
    tuned = finetune(
        own,
        own.suffix(at_cut.cut),
        take,
        task.features.y,
        split,
        plan,
        trainable,
        start=start,
        probe=probe,
        shallower=shallower,
        seed=seed,
        keeper=keeper,
        processes=processes,
    )
    facts = {
        "backbone": bench.identity,
        "classes": list(task.names),
        "transform": asdict(own.transform),
        "unfreeze": plan.unfreeze.text,
    }
    checkpoint = folder / f"{name}.safetensors"
    best_probe = inputs.best_probe
    outcome = Outcome(
        split,
        params={
            "best_epoch": tuned.best,
            "lr": tuned.lr,
            "val_by_lr": {f"{lr:g}": val for lr, val in tuned.rates.items()},
            "stages": [stage.name for stage in trainable.stages],
            "cka": round(tuned.similarity, 4),
            "precision": tuned.precision,
            "refitted": tuned.refitted,
            "curve": [
                [epoch.train_loss, epoch.train_accuracy, epoch.val.log_loss, epoch.val.accuracy, round(epoch.seconds, 3)]
                for epoch in tuned.history
            ],
        },
        val=tuned.history[tuned.best].val,
        test=tuned.tested.scores,
        right=tuned.tested.right,
        seconds={"train": round(tuned.seconds, 3)},
        images_per_second=round(tuned.images_per_second, 1),
        probe={
            "head": best_probe.method,
            "of": [job.record.method for job in inputs.probes],
            "start": PROBE if after is None else after.record.method,
            "val": best_probe.val,
            "test": best_probe.test,
            "seconds": best_probe.seconds,
        },
    )
    record = experiment.record(at_cut, checkpoint, outcome)
    if tuned.best > 0:
        right = decode_correct(best_probe.right)[np.isin(inputs.split.test, keep)]
        record = replace(record, gap=asdict(gap(tuned.tested.right, right, groups=split.test_groups)))
    remarks = _remarks(tuned, record, plan)
    for note in remarks:
        logger.warning("%s: %s", method, note)
    record = replace(record, notes=(*notes, *record.notes, *remarks))
    with processes.one_first():
        if (
            processes.rank == 0
        ):  # in this order, and the state is cleared last: a kill anywhere finds a training that has ended
            save_checkpoint(own.module, tuned.model, checkpoint, facts)
            _save_head(experiment, at_cut, tuned, own, checkpoint, plan)
            if records and not _is_recorded(record, records):
                append_record(records, record)
    head = bundle.head_path(folder / name)
    return FineTuneResult(tuned, record, checkpoint, head, at_cut.report.computed, keeper)


def _is_recorded(record: RunRecord, records: Path) -> bool:
    """Tell whether a file has this very training, to its epochs' seconds: it was killed once that was written."""

    def facts(one: RunRecord) -> str:
        return canonical([one.cell, one.params, one.right])

    return any(facts(one) == facts(record) for one in read_records([records], warn=False))


def forget_state(folder: Path, cell: str) -> None:
    """Remove what a training has left in a data set's folder that was killed after its record was written.

    Raises:
        StorageError: the disk failed.
    """
    for path in folder.glob(f"*/tuned/*-{cell[:_IN_NAMES]}.unfinished"):
        remove_file(path)


def _rows(task: Task, at_cut: Extracted, views: int) -> "tuple[NDArray[np.int64], Task, Take]":
    """Return which images both entries have, those alone, and what reads the second's rows, view after view."""
    keep, task, take = aligned(task, at_cut.store)
    if views == 1:
        return keep, task, take

    def one_view(index: NDArray[np.int64]) -> NDArray[Any]:
        rows: NDArray[Any] = take(index // views)[np.arange(len(index)), index % views]
        return rows

    return keep, task, one_view


def _trainable(bench: FeatureCache, plan: FineTunePlan) -> "Backbone":
    """Return a copy of the backbone that may be changed, with the plan's stochastic depth."""
    if not plan.drop_path:
        backbone = bench.backbone.separate()
        for module in backbone.module.modules():
            if type(module).__name__ == "DropPath":  # some models bring a rate of their own: the plan says none
                setattr(module, "drop_prob", 0.0)  # noqa: B010 - its type does not know it
        return backbone
    from featcache.backbones.timm_models import load_backbone

    spec = replace(bench.spec, model_args=(*bench.spec.model_args, ("drop_path_rate", plan.drop_path)))
    own = load_backbone(spec, bench.backbone.device)
    if own.loaded.weights_sha256 != bench.backbone.loaded.weights_sha256:
        raise DataError(f"`backbone` {spec.name}: its weights changed while this ran. Run again.")
    return own


def _save_head(
    experiment: Experiment,
    at_cut: Extracted,
    tuned: "FineTuned",
    own: "Backbone",
    checkpoint: Path,
    plan: FineTunePlan,
) -> None:
    """Write the tuned network's head beside it: with the checkpoint as its backbone it predicts and exports as any other."""
    from featcache.backbones.timm_models import hash_weights
    from featcache.heads import linear_estimator

    head, bench = tuned.model.linear_head(), experiment.cache
    spec: BackboneSpec = replace(bench.spec, weights=str(checkpoint.resolve()), random_init=None)
    card = experiment.card(
        at_cut,
        backbone=backbone_identity(spec) | {"name": origins.absolute_name(spec)},
        weights=spec.weights,
        loaded=asdict(replace(bench.backbone.loaded, tag="file", weights_sha256=hash_weights(own.module))),
        transform=asdict(own.transform),
        cut=POOLED,
        head=plan.unfreeze.text,
        params={"lr": tuned.lr, "epoch": tuned.best},
        test=asdict(tuned.tested.scores),
    )
    bundle.save(
        linear_estimator(head.weights, head.bias), card, checkpoint.with_name(checkpoint.name.removesuffix(".safetensors"))
    )


def _remarks(tuned: "FineTuned", record: RunRecord, plan: FineTunePlan) -> tuple[str, ...]:
    """Return what a reader of the gap should know."""
    found = []
    if record.gap is not None and record.probe is not None and (between := Gap(**record.gap)).is_noise:
        interval = f"95 % interval {between.ci[0]:+.1f} to {between.ci[1]:+.1f}" if between.ci else "too few groups to tell"
        found.append(
            f"the gap of {between.points:+.1f} points to {record.probe['head']} is inside the noise of "
            f"{record.split['test']} test images ({interval})"
        )
    if plan.refit and tuned.best > 0 and not tuned.refitted:
        found.append("trained again on train and validation it was worse on the latter: the one trained on train is kept")
    if tuned.best == 0:
        found.append("no gain on validation: no epoch did better there than where training started, which is the answer")
    if tuned.overfits:
        found.append(tuned.overfits)
    if tuned.similarity < _DRIFTED:
        found.append(f"the embeddings are other ones now than the probe's (CKA {tuned.similarity:.2f})")
    return tuple(found)
