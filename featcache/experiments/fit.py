"""Heads on a data set's embeddings: each is fitted once, its file answers from then on."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import origin_of
from featcache.datasets.decoding import SIDE
from featcache.display import Displayed, Table, logger
from featcache.errors import DataError, FeatcacheError, StorageError, UsageError
from featcache.evaluation import ColumnCoder, Task, column_names
from featcache.evaluation.metrics import Kind, at_temperature, confusion, per_class
from featcache.evaluation.splits import Split, few_shot, restricted
from featcache.experiments.experiment import (
    Experiment,
    HeadFile,
    Outcome,
    aligned,
    forget_state,
    task_of,
)
from featcache.experiments.poolings import PoolingChoice, choose_pooling, read_choice
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output
from featcache.fingerprint import fingerprint
from featcache.heads import ALL, ATTENTIVE, ENSEMBLE, STREAMING, ZEROSHOT, FittedHead, bundle, heads_for, require_params
from featcache.heads.baselines import Baseline
from featcache.reports import PROTOCOL, RunRecord, append_once
from featcache.resources import free_memory, libraries_load
from featcache.specs import CLIP, POOLED, TOKENS, Views, check_fields, cut_of_layers
from featcache.store import Features, beside
from featcache.store.disk import keep_note, kept_note
from featcache.store.entry import FeatureStore

if TYPE_CHECKING:
    from featcache.heads.search import Curve
    from featcache.heads.zeroshot import ClassRows

# plain ones: which wording suits a data set is the user's to say
PROMPTS = ("a photo of a {}.", "a photo of the {}.", "a {}.")
PROBE = "logistic"
PROBES = ("ridge", "knn", PROBE)  # what the gap is taken to at least: the cheap ones
_MOST_SHOTS = 1_000_000
_MOST_IN_A_MATRIX = 50
_SAMPLED = 4096  # training samples whose embeddings tell how much embeddings vary
_COPIES = 2.5  # of the features in float32, that the heads that take the most memory need


@dataclass(frozen=True)
class Mistake:
    """A test sample that a head takes for another class, and the probability that it gives that class, if it gives any."""

    path: str
    label: str
    predicted: str
    confidence: float | None


@dataclass(frozen=True, repr=False)
class HeadResult(Displayed):
    """A fitted head with its record and its file; ``paths`` and ``labels`` are those of the test samples, in order."""

    fitted: FittedHead
    record: RunRecord
    bundle: Path
    task: Task
    split: Split

    def table(self) -> Table:
        """Return its row of the table of heads, without weights and answers."""
        return self.record.table()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, or the labels, by number."""
        return self.task.names

    @property
    def confusion(self) -> NDArray[np.int64]:
        """How many test samples of each class (rows) are taken for each class (columns)."""
        return confusion(self.task.y[self.split.test], self.fitted.tested.predicted, len(self.classes))

    def mistakes(self, count: int) -> list[Mistake]:
        """Return wrong answers on the test split, the most confident first; without probabilities in the samples' order."""
        tested, test = self.fitted.tested, self.split.test
        wrong = np.flatnonzero(~tested.right)
        if tested.confidence is not None:
            wrong = wrong[np.argsort(-tested.confidence[wrong], kind="stable")]  # stable: equal ones keep their order
        return [
            Mistake(
                self.task.features.paths[test[place]],
                self.classes[self.task.y[test[place]]],
                self.classes[tested.predicted[place]],
                None if tested.confidence is None else float(tested.confidence[place]),
            )
            for place in wrong[:count].tolist()
        ]

    @property
    def summary(self) -> dict[str, Any]:
        """One element of the list ``heads`` of ``featcache fit``."""
        record = self.record
        of_kind: dict[str, Any] = {"head": self.fitted.name, "target": self.task.kind}
        if self.task.kind == "label":
            matrix = self.confusion
            of_kind = {
                "head": record.method,
                "per_class": per_class(matrix, self.classes),
                "confusion": matrix.tolist() if len(self.classes) <= _MOST_IN_A_MATRIX else None,
            }
        return of_kind | {
            "best_params": record.params,
            "val": record.val,
            "test": record.test,
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
        best_pool: train on the pooling of the last activations that does best on validation.
        views: so many views of each sample train, and are averaged over in answers.
        grid: parameters to choose from, for one head, instead of its own.
        folds: of cross-validation; ``None`` leaves it to the size of the data, 0 takes the val split.
        budget: seconds after which no further head is begun.
        target: what a label is: a class, several labels with ``;`` between, or a number.
        group: the column of the data set's manifest whose values stay together, such as a patient.
        columns: of the manifest, that heads are given beside the embedding: numbers, and categories, one number each;
            ``NAME:category`` takes a column's numbers for names.
        prompts: texts with {} for a class, whose rows are averaged: what zero-shot heads begin with.
        shots: train on so many samples a class too, several times.
        curve: train on shares of the training samples too, several times.
        baselines: train trivial methods beside, which need no backbone.
        format: of the bundles.
    """

    heads: tuple[str, ...] = (PROBE,)
    layers: tuple[str, ...] = ()
    best_pool: bool = False
    views: int = 1
    grid: tuple[tuple[str, tuple[int | float, ...]], ...] = ()
    folds: int | None = None
    budget: float | None = None
    target: Kind = "label"
    group: str | None = None
    columns: tuple[str, ...] = ()
    prompts: tuple[str, ...] = PROMPTS
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
        if self.best_pool and self.layers:
            raise UsageError("`best_pool` is of the last activations, `layers` have averages: leave one of them out.")
        column_names(self.columns)
        if not self.prompts or not all("{}" in prompt for prompt in self.prompts):
            raise UsageError(
                "`prompts`: at least one is needed, each with {} where a class stands, as in 'a photo of a {}.'."
            )
        Views(self.views)

    def names(self) -> list[str]:
        """Return the heads to fit, the cheapest first.

        Raises:
            UsageError: a head is unknown, or something does not go with what is to be told.
        """
        # whoever names no head means the usual ones of the kind
        usual = self.heads == FitPlan.heads and self.target != "label"
        names, candidates = heads_for(self.target, (ALL,) if usual else self.heads), self.candidates()
        if candidates and len(names) != 1:
            raise UsageError(f"`grid` is of one head, not of {', '.join(names)}: name one in `heads`.")
        if candidates:
            require_params(names[0], candidates)
        if {*names} & {*ATTENTIVE} and (self.views > 1 or self.layers or self.shots or self.curve or self.columns):
            raise UsageError(
                f"`heads` {names[-1]} trains on tokens: without `views`, `layers`, `columns`, `shots` and `curve`."
            )
        if {*names} & {*ZEROSHOT} and (self.layers or self.best_pool or self.columns):
            raise UsageError(
                f"`heads` {', '.join(ZEROSHOT)} compare texts with the embedding: without `layers`, `best_pool`, `columns`."
            )
        if self.shots and self.target != "label":
            raise UsageError(
                f"`shots` are samples a class, and for `target` {self.target} a sample has no one class: use `curve`."
            )
        return names

    def cuts(self, names: Sequence[str]) -> list[str]:
        """Return what is extracted for some heads, the tokens of attentive ones last."""
        usual = TOKENS if self.best_pool else cut_of_layers(self.layers) if self.layers else POOLED
        attentive = [name for name in names if name in ATTENTIVE]
        return list(dict.fromkeys(([usual] if len(attentive) < len(names) else []) + [TOKENS] * len(attentive)))

    def candidates(self) -> list[dict[str, Any]] | None:
        """Return all combinations of the grid's values, ``None`` where there is no grid."""
        names, values = [name for name, _ in self.grid], [values for _, values in self.grid]
        return [dict(zip(names, chosen, strict=True)) for chosen in product(*values)] if names else None

    def choice(self) -> dict[str, Any]:
        """Return what was asked for otherwise than usual in how parameters are chosen: another experiment."""
        usual = FitPlan()
        return {
            name: getattr(self, name)
            for name in ("grid", "folds", "group", "columns", "best_pool")
            if getattr(self, name) != getattr(usual, name)
        }

    def experiment(self, cache: FeatureCache, task: Task, head: str, seed: int, members: Sequence[str] = ()) -> Experiment:
        """Return the experiment that a head is; an ensemble's depends on those that it may be made of.

        Tables call it by the head, with what it is trained on, where that is not the usual.
        """
        if head in ATTENTIVE and self.best_pool:  # the same experiment, whatever others are trained on
            return replace(self, best_pool=False).experiment(cache, task, head, seed, members)
        words = [head if task.kind == "label" else f"{head} ({task.kind})"]
        words += [f"on {'+'.join(self.layers)}"] if self.layers else []
        words += ["best pool"] if self.best_pool else []
        words += [f"{self.views} views"] if self.views > 1 else []
        words += [f"with {', '.join(column_names(self.columns))}"] if self.columns else []
        plan = self.choice() | ({"members": list(members)} if members else {})
        if head in ZEROSHOT:
            texts = origin_of(cache.spec)
            plan |= {"prompts": list(self.prompts), "texts": texts.content() if texts is not None else None}
        if (columns := task.identity.columns) is not None:
            plan |= {"column_values": columns}
        return Experiment(cache, task, " ".join(words), plan, seed)


@dataclass(frozen=True, repr=False)
class FitResult(Displayed):
    """What ``fit`` has done: the embeddings' entry, the heads, baselines that need no backbone, and curves.

    ``pooling`` is what was chosen, where that was asked for; ``lone_columns`` are what each column reaches alone;
    ``ahead`` is the paired gap from the best baseline to the best head, each of them by validation.
    """

    extracted: Extracted
    heads: list[HeadResult]
    baselines: list[Baseline]
    curves: "list[Curve]"
    pooling: PoolingChoice | None = None
    lone_columns: list[Baseline] = field(default_factory=list)
    ahead: dict[str, Any] | None = None

    def table(self) -> Table:
        """Return heads and baselines, the best on validation first."""
        from featcache.reports.wording import fit_table

        return fit_table(self)

    @property
    def best(self) -> HeadResult | None:
        """The head that is best on validation, by accuracy and then log-loss; the test split has no say in it."""
        return min(self.heads, key=lambda head: head.fitted.val.rank, default=None)

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache fit``."""
        columns = {"columns": [column.summary for column in self.lone_columns]} if self.lone_columns else {}
        return (
            {
                "extract": self.extracted.summary,
                "heads": [head.summary for head in self.heads],
                "controls": [baseline.summary for baseline in self.baselines],
                "curves": [curve.summary for curve in self.curves],
            }
            | ({"pooling": asdict(self.pooling)} if self.pooling is not None else {})
            | columns
            | ({"ahead": self.ahead} if self.ahead is not None else {})
        )


@dataclass
class Ledger:
    """What one command has said of splits, so that nothing is said twice."""

    said: set[str] = field(default_factory=set)

    def tell(self, task: Task, split: Split) -> None:
        """Say how samples are split, and what is wrong with that."""
        splits = task.features.splits
        sizes = ", ".join(f"{count} {name}" for name, count in split.sizes().items())
        drawn = [name for name in ("val", "test") if name not in splits]
        how = f" ({' and '.join(drawn)} drawn)" if drawn else ""
        chosen = f"; parameters are chosen on {len(split.cross)} folds of train and val" if split.cross else ""
        told = f"split: {sizes}{how}{chosen}"
        if told not in self.said:
            logger.info(told)
        for note in split.remarks:
            if note not in self.said:
                logger.warning(note)
        self.said.update((told, *split.remarks))


def run_fit(
    cache: FeatureCache,
    plan: FitPlan,
    *,
    seed: int = 0,
    records: Path | None = None,
    ledger: Ledger | None = None,
    only: Collection[str] | None = None,
) -> FitResult:
    """Extract embeddings if needed and train heads on them; records are appended to a JSONL file.

    Args:
        cache: the data set and the backbone.
        plan: which heads, and how.
        seed: of the drawn splits and of the heads' own randomness.
        records: the file that gets the records.
        ledger: of what this command has said.
        only: heads whose records are wanted, where some are fitted for the sake of others.

    Raises:
        UsageError: a head is unknown, or does not go with the plan; nothing has been computed then.
    """
    names = plan.names()
    _require_kind(cache, names)
    outputs = [Output(cut) for cut in plan.cuts(names)]
    cache.require(plan.target, plan.group, plan.columns)
    entry, *_ = entries = cache.features(outputs, Views(plan.views), thumbnails=SIDE if plan.baselines else None)
    names = _trainable(entry.store, plan, names)
    fitting = _Fitting.of(cache, entry, plan, seed)
    task, split = fitting.task, fitting.split
    for shots in plan.shots:  # what cannot be drawn is said before anything is trained
        few_shot(split, task.features.y, shots, seed, task.features.sha256)
    (ledger or Ledger()).tell(task, split)
    recorded = {name: records for name in names if only is None or name in only}
    results = fitting.in_turn(names, entries[-1], recorded)
    trivial, lone, ahead = fitting.baselines(results) if plan.baselines else ([], [], None)
    pooling = read_choice(*fitting.note("pooling")) if plan.best_pool else None
    return FitResult(entry, results, trivial, fitting.curves(results[0].fitted.name), pooling, lone, ahead)


def is_fitted(cache: FeatureCache, plan: FitPlan, *, seed: int = 0) -> bool:
    """Tell whether one head is there already, so that ``run_fit`` extracts and trains nothing for it."""
    (name,) = names = plan.names()
    outputs = [Output(cut) for cut in plan.cuts(names)]
    cache.require(plan.target, plan.group, plan.columns)
    if not cache.holds(outputs, Views(plan.views)):
        return False
    (entry,) = cache.features(outputs, Views(plan.views))
    fitting = _Fitting.of(cache, entry, plan, seed)
    return fitting.stored(name, fitting.experiment(name)) is not None


@dataclass(frozen=True)
class _Fitting:
    """One data set's samples, split, and an entry's rows of them: what all heads of a command are trained on."""

    cache: FeatureCache
    entry: Extracted
    task: Task
    split: Split
    plan: FitPlan
    seed: int

    @classmethod
    def of(cls, cache: FeatureCache, entry: Extracted, plan: FitPlan, seed: int) -> "_Fitting":
        """Return that of all samples of an entry, in groups and with columns where these are given."""
        task = task_of(cache.files, entry.store.labelled(), plan.target, plan.group, plan.columns)
        return cls(cache, entry, task, task.split(seed, plan.folds), plan, seed)

    @property
    def loaded(self) -> Task:
        """The task with what heads train on: read only where something is trained."""
        return self._inputs[0]

    @cached_property
    def _features(self) -> Features:
        """The rows as they are stored, or pooled."""
        store = self.entry.store
        if self.plan.best_pool:
            return replace(self.task.features, X=self.pooled[1])
        return store.features() if in_memory(store) else store.streamed()

    @cached_property
    def _inputs(self) -> tuple[Task, ColumnCoder | None]:
        """The task with its features, columns behind them where there are any, and how those became numbers."""
        features, columns = self._features, self.task.columns
        if columns is None:
            return replace(self.task, features=features), None
        train = self.split.train
        sample = features.X[train[np.linspace(0, len(train) - 1, min(len(train), _SAMPLED)).astype(np.int64)]]
        coder = columns.coder(train).weighted(sample.reshape(-1, sample.shape[-1]), columns, train)
        logger.info("columns: %s", "; ".join(column.text for column in coder.columns))
        return replace(self.task, features=replace(features, X=beside(features.X, coder.encode(columns.values)))), coder

    @cached_property
    def pooled(self) -> tuple[PoolingChoice, NDArray[np.float32]]:
        """The pooling that validation chooses, and its rows."""
        note = self.note("pooling")
        return choose_pooling(self.cache.backbone, self.entry.store, self.task, self.split, self.seed, note=note)

    def note(self, stem: str) -> tuple[Path, tuple[str, str]]:
        """Return the file that keeps what all heads share, whatever they choose from, and the names of what it is of."""
        plan = {name: value for name, value in self.plan.choice().items() if name != "grid"}
        plan |= {"protocol": PROTOCOL}  # what another one chose is chosen again
        experiment = Experiment(self.cache, self.task, stem, plan, self.seed)
        path = experiment.path(self.entry, stem)
        return path.with_name(f"{path.name}.json"), (experiment.key, self.split.fingerprint)

    def in_turn(self, names: Sequence[str], tokens: Extracted, records: Mapping[str, Path | None]) -> list[HeadResult]:
        """Return the heads that can be fitted, in turn until the budget is spent; ``records``: the file of each, if any."""
        attending, budget, started = self.beside(tokens), self.plan.budget, time.monotonic()
        results: list[HeadResult] = []
        for number, name in enumerate(names):
            if budget is not None and results and time.monotonic() - started > budget:
                logger.warning("`budget` %g s is spent: without %s", budget, ", ".join(names[number:]))
                break
            fitting = attending if name in ATTENTIVE else self
            results += filter(None, [fitting.result(name, results, records.get(name))])
        return results

    def beside(self, entry: Extracted) -> "_Fitting":
        """Return the same of another entry, of the samples that it has too."""
        if entry is self.entry:
            return self
        keep, task, _ = aligned(self.task, entry.store)
        return replace(self, entry=entry, task=task, split=restricted(self.split, keep))

    def result(self, name: str, before: Sequence[HeadResult], records: Path | None) -> HeadResult | None:
        """Return a head: from its file, or trained; of all heads, one that cannot be trained here costs no other."""
        experiment = self.experiment(name, before)
        if stored := self.stored(name, experiment):
            for note in stored.record.notes[len(self.split.remarks) :]:
                logger.warning(note)
            # one that was fitted before may be in the file already; another file is given it all the same
            if records is not None:
                append_once(records, stored.record, self.cache.settings.tracker)
            return stored
        try:
            result = self._keep(experiment, self._stem(name), self._train(name, before), records)
        except DataError as error:
            if ALL not in self.plan.heads:
                raise
            logger.warning("%s is left out: %s", name, error)
            return None
        if name in ATTENTIVE:  # once head and record are on the disk, and not before
            forget_state(self.cache.folder, experiment.key)
        return result

    def stored(self, name: str, experiment: Experiment) -> HeadResult | None:
        """Return a head that an earlier command has fitted, if it has."""
        stored = experiment.stored(self.entry, self._stem(name), self.split, self.plan.format)
        return None if stored is None else HeadResult(*stored, self.task, self.split)

    def experiment(self, name: str, before: Sequence[HeadResult] = ()) -> Experiment:
        """Return the experiment that a head is, of an ensemble with those before it that it may be made of."""
        members = [head.fitted.name for head in before if head.fitted.name not in ATTENTIVE] if name == ENSEMBLE else []
        return self.plan.experiment(self.cache, self.task, name, self.seed, members)

    def _stem(self, name: str) -> str:
        return name if self.task.kind == "label" else f"{name}-{self.task.kind}"

    def _train(self, name: str, before: Sequence[HeadResult]) -> FittedHead:
        with libraries_load():
            from featcache.heads.search import ensemble, fit

        plan = self.plan
        if name in ATTENTIVE:
            from featcache.experiments.poolings import fit_attentive

            experiment = plan.experiment(self.cache, self.task, name, self.seed)
            return fit_attentive(experiment, self.entry, self.split, name)
        if name in ZEROSHOT:
            from featcache.heads.zeroshot import fit_zeroshot

            return fit_zeroshot(name, self.loaded, self.split, self.class_rows, self.seed, plan.views)
        if name == ENSEMBLE:
            members = [self._with_answers(head).fitted for head in before if head.fitted.name not in ATTENTIVE]
            fitted = ensemble(self.loaded, self.split, members, plan.views)
        else:
            fitted = fit(self.loaded, self.split, name, seed=self.seed, grid=plan.candidates(), views=plan.views)
        return replace(fitted, params=fitted.params | {"pool": self.pooled[0].kind}) if plan.best_pool else fitted

    @cached_property
    def class_rows(self) -> "ClassRows":
        """What the text tower says of the classes: both towers are loaded once, for all heads and all commands after it."""
        from featcache.backbones.clip import embed_classes, towers_content
        from featcache.heads.zeroshot import ClassRows

        names = [name.replace("_", " ") for name in self.task.names]
        content = towers_content(self.cache.spec)
        seal = fingerprint([content, names, list(self.plan.prompts)])
        path = self.entry.store.path / "heads" / f"texts-{seal[:16]}.json"
        # towers whose files cannot be told without loading them may be others today
        rows = kept_note(path, [seal], ClassRows.read, "the texts are embedded again") if content else None
        if rows is None:
            texts = embed_classes(self.cache.spec, names, self.plan.prompts, self.cache.backbone.device)
            rows = ClassRows(texts.rows, texts.scale, texts.bias)
            with suppress(StorageError):  # a cache that cannot be written answers all the same
                keep_note(path, [seal], rows.stored)
        return rows

    def _with_answers(self, head: HeadResult) -> HeadResult:
        """Return a head with what it answered on validation: one whose file holds none, being too large, is fitted again."""
        tells = head.fitted.tested.confidence is not None
        return replace(head, fitted=self._train(head.fitted.name, ())) if tells and head.fitted.answers is None else head

    def _keep(self, experiment: Experiment, stem: str, fitted: FittedHead, records: Path | None) -> HeadResult:
        """Write a head with its record, so that it need not be fitted again, and return both."""
        for note in fitted.notes:
            logger.warning(note)
        entry, plan, tested = self.entry, self.plan, fitted.tested
        place = experiment.path(entry, stem)
        path = bundle.head_path(place, plan.format)
        outcome = Outcome(
            self.split,
            fitted.params,
            fitted.val,
            tested.scores,
            {"fit": round(fitted.seconds, 3)} | ({"pooling": self.pooled[0].seconds} if "pool" in fitted.params else {}),
            entry.cost[1],
            right=tested.right,
            notes=fitted.notes,
        )
        facts = {
            "head": fitted.name,
            "params": fitted.params,
            "scaled_by": fitted.temperature,
            "views": plan.views,
            "calibration": self._calibration(fitted),
        }
        if self.task.columns is not None and (coder := self._inputs[1]) is not None:
            facts["columns"] = coder.card
        head = HeadFile(fitted.estimator, place, facts, plan.format, tested, fitted.answers)
        return HeadResult(fitted, experiment.keep(entry, path, outcome, head, records), path, self.task, self.split)

    def _calibration(self, fitted: FittedHead) -> dict[str, Any]:
        """Return what tells when a head should not answer; nothing of one that gives no class a probability."""
        from featcache.heads.rejection import Calibration

        if fitted.unseen is None or fitted.temperature is None:
            return {}
        samples, probabilities = fitted.unseen.samples, at_temperature(fitted.unseen.answers, fitted.temperature)
        names = None if self.task.groups is None else [self.task.groups[place] for place in samples.tolist()]
        contents = [self.task.features.sha256[place] for place in samples.tolist()]
        calibration = Calibration.of(self.task.y[samples], probabilities, contents, self.split.units[samples], names)
        return calibration.facts | ({} if self._training_rows is None else {"neighbours": self._training_rows})

    @cached_property
    def _training_rows(self) -> dict[str, str] | None:
        """The file, written once for all heads, of training samples that tell how familiar others are.

        They are the first by content, since hashes are as good as drawn.
        """
        from featcache.heads.rejection import MOST_ROWS, TrainingRows

        if self.entry.cut == TOKENS and not self.plan.best_pool:
            return None
        contents, both = self.task.features.sha256, self.split.train_val
        samples = np.array(sorted(both.tolist(), key=lambda place: contents[place])[:MOST_ROWS])
        rows = self._features.X[samples]
        X = (rows if self.plan.views == 1 else rows[:, 0]).astype(np.float32)  # the first view is the sample as it is
        training = TrainingRows.of(X, self.task.y[samples], self.split.units[samples], self._widths(X.shape[1]))
        return training.keep(self.entry.store.path / "heads")

    def _widths(self, dims: int) -> tuple[int, ...]:
        """Return how many of so many dims each layer has: none of one layer, nor where that cannot be told."""
        if not self.plan.layers:
            return ()
        try:
            widths = self.cache.layer_widths(self.entry)
        except FeatcacheError as error:  # no weights to be had: rows that are cached need none, nor does the head
            logger.warning("How familiar samples are is told of all layers as one: %s", error)
            return ()
        return widths if sum(widths) == dims else ()

    def baselines(self, heads: Sequence[HeadResult]) -> tuple[list[Baseline], list[Baseline], dict[str, Any] | None]:
        """Return the baselines on the same split, each column alone, and what the best head is ahead of the best one by.

        They lie in a file as heads do, with the warnings that came of comparing heads with them: paired tests load SciPy.
        """
        path, names = self.note("baselines")
        best = min(heads, key=lambda head: head.fitted.val.rank)
        note = kept_note(path, names, dict, "the baselines are trained again")
        cell = best.record.cell
        if note is None or cell not in note.get("ahead", {}):  # those of before say nothing of it
            if not in_memory(self.entry.store):
                return [], [], None
            before: dict[str, Any] = note or {}
            results, lone, told = self._compare(best, *self._read_baselines(before))
            by_cell = {name: before.get(name, {}) | {cell: said} for name, said in told.items()}
            note = {"results": [result.stored for result in results]} | by_cell
            note |= {"columns": [result.stored for result in lone]} if lone else {}
            keep_note(path, names, note)
        for warning in filter(None, note["warnings"][cell].split("\n")):
            logger.warning(warning)
        return *self._read_baselines(note), note["ahead"][cell]

    def _read_baselines(self, note: Mapping[str, Any]) -> tuple[list[Baseline], list[Baseline]]:
        results, lone = (
            [Baseline.read(self.task.kind, stored) for stored in note.get(name, ())] for name in ("results", "columns")
        )
        return results, lone

    def _compare(
        self, best: HeadResult, results: list[Baseline], lone: list[Baseline]
    ) -> tuple[list[Baseline], list[Baseline], dict[str, Any]]:
        """Train the baselines, unless they were before for another head, and say what this one is ahead of the best by."""
        from featcache.heads.baselines import best_on_validation, gap_to, of_columns, warning_of, warning_of_columns

        keep, common, train = self._without_backbone()
        shared = restricted(self.split, keep)
        if not results:
            results = train(common.y, shared, self.seed)
            if common.columns is not None:
                together, *lone = of_columns(common.columns, common.y, shared, self.seed)
                results.append(together)
        method = best.record.method
        rival = best_on_validation(results)
        between = gap_to(rival, best.fitted, shared, keep, self.split)
        warning = warning_of(rival, best.fitted, method, between)
        warnings = "\n".join([*filter(None, [warning]), *warning_of_columns(lone, results[0], best.fitted, method)])
        ahead = None if between is None else {"head": method, "baseline": rival.name, **asdict(between)}
        return results, lone, {"warnings": warnings, "ahead": ahead}

    def _without_backbone(self) -> "tuple[NDArray[np.int64], Task, Callable[[NDArray[Any], Split, int], list[Baseline]]]":
        """Return which samples baselines see (k,), the task of those alone, and what trains them on these."""
        if self.cache.dataset.kind == "text":
            from featcache.datasets import decode_text
            from featcache.heads.baselines import text_baselines

            texts = [decode_text(self.cache.dataset.read(path)) for path in self.task.features.paths]
            return np.arange(len(texts)), self.task, partial(text_baselines, texts)
        from featcache.heads.baselines import baselines

        keep, common, take = aligned(self.task, self.cache.thumbnails(SIDE).store)
        if left_out := len(self.task.features.y) - len(keep):
            logger.warning("baselines: %d samples have no thumbnail, they are compared on the others", left_out)
        return keep, common, partial(baselines, take(np.arange(len(keep))))

    def curves(self, head: str) -> "list[Curve]":
        """Train a head on so many samples a class, and on shares of the training samples, where that is asked for."""
        if not (self.plan.shots or self.plan.curve):
            return []
        from featcache.heads.search import Embeddings, learning_curve, shot_curve

        drawn: list[Curve] = []
        if head in ZEROSHOT:
            from featcache.heads.zeroshot import ClassEmbeddings

            embeddings: Embeddings = ClassEmbeddings.beside(self.class_rows, self.loaded, self.plan.views)
        else:
            embeddings = Embeddings.of(self.loaded, self.plan.views)
        if self.plan.shots:
            drawn.append(shot_curve(embeddings, self.split, head, self.plan.shots, seed=self.seed))
        if self.plan.curve:
            drawn.append(learning_curve(embeddings, self.split, head, seed=self.seed))
        if self.task.kind == "label":  # for reports, which draw them; records have no room for what no table shows
            for curve, how in zip(drawn, (["shots"] if self.plan.shots else []) + ["shares"], strict=False):
                path = self.entry.store.path / "heads" / f"curve-{head}-{how}-seed{self.seed}.json"
                with suppress(StorageError):  # a cache that cannot be written answers all the same
                    keep_note(path, [self.entry.store.key], curve.summary)
        return drawn


def _require_kind(cache: FeatureCache, names: Sequence[str]) -> None:
    """Refuse heads of texts where there is no text tower whose rows lie beside the embeddings.

    Raises:
        UsageError: so it is.
    """
    if not {*names} & {*ZEROSHOT}:
        return
    if not cache.spec.name.startswith(CLIP):
        raise UsageError(f"`heads` {', '.join(ZEROSHOT)} need a model with a text tower, `backbone=clip:MODEL/TAG`.")
    if cache.spec.pool != "default":
        raise UsageError(f"`pool` {cache.spec.pool}: texts lie beside the model's own embedding: leave it out.")


def _trainable(store: FeatureStore, plan: FitPlan, names: list[str]) -> list[str]:
    """Return the heads that can train on an entry: where its features do not fit memory, those that stream them.

    What is pooled is in memory, or refused when it is.

    Raises:
        UsageError: a head was asked for that needs all of them in memory.
    """
    if plan.best_pool or in_memory(store):
        return names
    room = f"the features need {_needed(store) / 1e9:.1f} GB of memory and {free_memory() / 1e9:.1f} GB are free"
    able = [name for name in names if name in STREAMING]
    if plan.target != "label" or plan.views > 1 or not able or (ALL not in plan.heads and able != names):
        raise UsageError(
            f"{room}: only `heads` {' and '.join(STREAMING)}, of one view and one class a sample, read them from disk."
        )
    if able != names:
        logger.warning("%s: without %s", room, ", ".join(name for name in names if name not in STREAMING))
    logger.info("%s: they are read from disk in every pass", room)
    return able


def in_memory(store: FeatureStore) -> bool:
    """Tell whether all heads can train on an entry's features in memory."""
    return _needed(store) <= free_memory()


def _needed(store: FeatureStore) -> float:
    rows = (store.shape[0], 2 * max(store.shape[1:])) if store.spec["cut"] == TOKENS else store.shape  # vectors of tokens
    return _COPIES * 4 * math.prod(rows)
