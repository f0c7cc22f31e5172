"""An experiment: one model to be trained and tested. Its key, its record and its head's card are made here alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import absolute_name
from featcache.datasets import Dataset
from featcache.display import logger
from featcache.errors import DataError
from featcache.evaluation import Columns, Task, column_names
from featcache.evaluation.metrics import Kind, TestResult, encode_correct
from featcache.evaluation.splits import Split
from featcache.finetuning import FineTunePlan
from featcache.fingerprint import as_stored, fingerprint
from featcache.reports import PROTOCOL, RunRecord, append_once, record_from, stamp
from featcache.specs import POOLED, TOKENS
from featcache.store import Features, RowReader
from featcache.store.disk import remove_file
from featcache.store.entry import FeatureStore

if TYPE_CHECKING:
    from featcache.extraction.feature_cache import Extracted, FeatureCache
    from featcache.extraction.files import DatasetFiles
    from featcache.heads import FittedHead
    from featcache.heads.bundle import Format

_IN_NAMES = 8  # digits of a key that files are called by: enough for the experiments of one entry


@dataclass(frozen=True)
class Outcome:
    """What training and testing one model came to, on ``split``; ``right`` (t,): which test samples it had right.

    ``notes`` are of the model, ``of_rows`` of the rows that it trained on.
    """

    split: Split
    params: Mapping[str, Any]
    val: Any
    test: Any
    seconds: Mapping[str, float]
    samples_per_second: float | None
    right: NDArray[np.bool_] | None = None
    probe: dict[str, Any] | None = None
    gap: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    of_rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeadFile:
    """A trained head on the way to its file: ``stem`` is its path without the format's suffix.

    ``facts`` are said of it in its card; they come last, so that a tuned backbone names its own weights. ``tested`` and
    ``answers``, of validation (n, classes), are kept where they are given.
    """

    estimator: Any
    stem: Path
    facts: Mapping[str, Any]
    format: "Format" = "joblib"
    tested: TestResult | None = None
    answers: NDArray[Any] | None = None


@dataclass(frozen=True)
class Experiment:
    """One model to be trained and tested on a data set.

    Attributes:
        cache: the data set and the backbone.
        task: the samples, and what is to be told of them.
        method: what tables call it.
        plan: how a backbone is fine-tuned, or what is asked of a head otherwise than usual.
        seed: of whatever is drawn.
    """

    cache: "FeatureCache"
    task: Task
    method: str
    plan: FineTunePlan | Mapping[str, Any]
    seed: int

    @cached_property
    def key(self) -> str:
        """The experiment's name: everything that decides its outcome but the code. Records call it ``cell``."""
        plan = _named(self.plan) | self._group if isinstance(self.plan, FineTunePlan) else dict(self.plan)
        return fingerprint(
            {
                "backbone": self.cache.identity,
                "items": self.task.identity.items,
                "splits": list(self.task.identity.splits),
                "method": self.method,
                "plan": plan or None,  # records of before name nothing where nothing was asked for
                "seed": self.seed,
            }
        )

    @property
    def short_key(self) -> str:
        """The key as it stands in the names of files."""
        return self.key[:_IN_NAMES]

    def path(self, entry: "Extracted", stem: str) -> Path:
        """Return where what it trains lies, without a suffix: among an entry's heads, or its tuned backbones."""
        folder = "tuned" if isinstance(self.plan, FineTunePlan) else "heads"
        return entry.store.path / folder / f"{stem}-seed{self.seed}-{self.short_key}"

    def keep(
        self, entry: "Extracted", artefact: Path, outcome: Outcome, head: HeadFile, records: Path | None = None
    ) -> RunRecord:
        """Write a head with its card and then the experiment's record, in this order; return the record.

        Args:
            entry: as of ``record``.
            artefact: as of ``record``.
            outcome: as of ``record``.
            head: what answers, in the end.
            records: the file that gets the record.
        """
        from featcache.heads import bundle

        record = self.record(entry, artefact, outcome)
        card = self.card(entry) | {"test": record.test, **head.facts}
        if not isinstance(self.plan, FineTunePlan):  # by these ``stored`` knows it again
            card |= {"record": record.stored, "split": outcome.split.fingerprint}
            if entry.cut == TOKENS:
                card |= _on_tokens(card)
        if head.tested is not None:
            card["tested"] = bundle.packed(head.tested)
        bundle.save(head.estimator, card, head.stem, head.format, answers=head.answers)
        if records is not None:
            append_once(records, record, self.cache.settings.tracker)
        return record

    def record(self, entry: "Extracted", artefact: Path, outcome: Outcome) -> RunRecord:
        """Return the record of the experiment.

        Args:
            entry: whose rows trained the model.
            artefact: the file that holds it, somewhere below the cache.
            outcome: what it came to.
        """
        split = outcome.split
        plan = {"plan": asdict(self.plan)} | self._group if isinstance(self.plan, FineTunePlan) else dict(self.plan)
        kind = "finetune" if isinstance(self.plan, FineTunePlan) else "fit"
        record = RunRecord(
            kind=kind if self.task.kind == "label" else f"{kind}-{self.task.kind}",
            cell=self.key,
            dataset=entry.store.path.parent.name,
            backbone=self.cache.spec.label,
            method=self.method,
            cut=entry.cut,
            seed=self.seed,
            feature_key=entry.store.key,
            request={"backbone": self.cache.identity} | plan,
            params=dict(outcome.params),
            split=split.sizes(),
            test_items=self.task.items(split.test),
            val=asdict(outcome.val),
            test=asdict(outcome.test),
            right="" if outcome.right is None else encode_correct(outcome.right),
            seconds={"extract": entry.cost[0], **outcome.seconds},
            samples_per_second=outcome.samples_per_second,
            probe=outcome.probe,
            gap=outcome.gap,
            artefact=artefact.relative_to(self.cache.settings.cache).as_posix(),
            test_groups=numbered(split.test_groups),
            copies=dict(split.copies),
            notes=(*outcome.of_rows, *split.remarks, *outcome.notes),
            protocol=PROTOCOL,
            source=source_of(self.cache.dataset, self.task),
            **_stamped(entry),
        )
        return replace(record, environment=record.environment | {"recipes": record.recipes})

    def card(self, entry: "Extracted") -> dict[str, Any]:
        """Return what a head's file says of where its backbone is, what that was, how its samples are opened again."""
        spec, source = self.cache.spec, self.cache.dataset
        return {
            "feature_key": entry.store.key,
            # a path that is relative would mean another file from another folder
            "backbone": self.cache.identity | {"name": absolute_name(spec)},
            "loaded": entry.store.spec["backbone"],
            "transform": entry.store.spec["transform"],
            "weights": str(Path(spec.weights).resolve()) if spec.weights else None,
            "data": source.reopens or source.location,
            "cut": entry.cut,
            "classes": list(self.task.names),
            "target": self.task.kind,
        }

    def stored(
        self, entry: "Extracted", stem: str, split: Split, how: "Format"
    ) -> "tuple[FittedHead, RunRecord, Path] | None":
        """Return the head of this very experiment, on these rows and parts, with its record and file, where there is one.

        Args:
            entry: whose rows trained it.
            stem: as of ``path``.
            split: of the task.
            how: the file's format.
        """
        from featcache.heads import bundle

        path = bundle.head_path(self.path(entry, stem), how)
        card = bundle.own_card(path)
        if card is None or not isinstance(card.get("record"), dict):  # cards of before have none
            return None
        if not _is_calibrated(path, card):
            return None
        try:
            record = record_from(card["record"])
        except DataError:
            return None
        # the key has the name of a group's column, not its values: other values part the samples otherwise
        names = (record.cell, record.feature_key, tuple(card["classes"]), card.get("split"))
        if names != (self.key, entry.store.key, self.task.names, split.fingerprint) or not record.is_current:
            return None
        logger.debug("Taken from the cache: %s in %s, fitted %s", record.method, path, record.time)
        return bundle.fitted_head(path, card, record, self.task.kind), record, path

    @property
    def _group(self) -> dict[str, Any]:
        return {"group": self.task.group} if self.task.group else {}


def forget_state(folder: Path, cell: str) -> None:
    """Remove what a training has left in a data set's folder that was killed after its record was written.

    Raises:
        StorageError: the disk failed.
    """
    for path in folder.glob(f"*/tuned/*-{cell[:_IN_NAMES]}.unfinished"):
        remove_file(path)


def source_of(dataset: Dataset, task: Task) -> dict[str, Any]:
    """Return what tells a data set apart and opens it again, without the folders that it lies in here."""
    text = dataset.reopens or dataset.location
    kind, colon, rest = ("", "", text) if Path(text).is_absolute() else text.partition(":")
    rest = rest.partition("@")[0] if kind == "torchvision" else rest  # behind it stands the folder
    data = f"{kind}{colon}{Path(rest).name if Path(rest).is_absolute() else rest}"
    return as_stored({"data": data, "samples": len(task.identity.splits), "items": task.identity.items})


def _stamped(entry: "Extracted") -> dict[str, Any]:
    """Return where and when, with what computed the entry's rows: runtimes differ by rounding, and are in no key."""
    stamped = stamp()
    runtimes = sorted({part.runtime for part in entry.store.manifest.parts if part.runtime})
    return stamped | {"environment": stamped["environment"] | {"runtime": "+".join(runtimes)}}


def _on_tokens(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the card of a head says that trained on tokens, which are the same whatever pooling is asked for.

    One that trained on a pooling of them answers from the pooled cut of a backbone that pools so.
    """
    kind = card["params"].get("pool")
    pool = {"pool": kind or "default"}
    cut = TOKENS if kind is None else POOLED
    return {"cut": cut, "backbone": card["backbone"] | pool, "loaded": card["loaded"] | pool}


def _is_calibrated(path: Path, card: Mapping[str, Any]) -> bool:
    """Tell whether a head can say when it does not know, or never could: whoever is told to fit again must get it."""
    facts = card.get("calibration")
    neighbours = (facts or {}).get("neighbours")
    return facts is not None and (neighbours is None or (path.parent / str(neighbours["file"])).is_file())


def _named(plan: FineTunePlan) -> dict[str, Any]:
    """Return a plan as keys name it: what nobody asks for is named as ever, so that experiments keep their names."""
    return asdict(plan) | {"train_batchnorm": {None: False, False: "frozen", True: True}[plan.train_batchnorm]}


def numbered(groups: NDArray[np.int64] | None) -> list[int] | None:
    """Return the groups of some samples as plain numbers from 0 on, ``None`` where there are no groups."""
    return None if groups is None else np.unique(groups, return_inverse=True)[1].tolist()


def aligned(task: Task, store: FeatureStore) -> tuple[NDArray[np.int64], Task, Callable[[NDArray[np.int64]], NDArray[Any]]]:
    """Return which of a task's samples (k,) an entry has too, the task of those alone, and what reads its rows so."""
    reader: RowReader = store.reader()
    position = {path: index for index, path in enumerate(store.listing().files.paths)}
    keep = np.array([index for index, path in enumerate(task.features.paths) if path in position], dtype=np.int64)
    task = task.restricted(keep)
    where = np.array([position[path] for path in task.features.paths], dtype=np.int64)
    return keep, task, lambda index: reader.take(where[index])


def task_of(
    files: "DatasetFiles", features: Features, kind: Kind = "label", group: str | None = None, columns: Sequence[str] = ()
) -> Task:
    """Return the task of listed samples, in groups and with columns beside them where these are asked for.

    Raises:
        DataError: as of ``FeatureCache.require``.
    """
    group_of = {} if group is None else files.groups(group)
    values_of = files.columns(column_names(columns)) if columns else {}
    groups = None if group is None else [group_of[path] for path in features.paths]
    beside = Columns(tuple(columns), [values_of[path] for path in features.paths]) if columns else None
    return Task(features, kind, groups, group, beside)
