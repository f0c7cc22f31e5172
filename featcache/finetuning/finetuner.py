"""Train what follows a cut, from the activations that are stored there, starting from the linear probe.

The head starts as the probe (LP-FT: Kumar et al. 2022, arXiv 2202.10054); BatchNorm of the trained part stays in
inference mode unless asked; rate and epoch are chosen on validation, where what cannot be told apart by accuracy is not
told apart by it, and the start itself is epoch 0. Then the same training runs once more on train and validation together,
as long as the kept epoch and with a rate that falls to zero at its end, as the probe was refitted (as Grill et al. 2020,
BYOL, appendix D, do for fine-tuning).
"""

import contextlib
import copy
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from featcache.backbones.base import Backbone
from featcache.display import progress
from featcache.evaluation.metrics import TestResult, cka, scores_on_test
from featcache.evaluation.splits import Split
from featcache.finetuning.loop import DivergedError, Epoch, Plain, TrainContext, Trained, Trial, epoch_of, noise
from featcache.finetuning.model import Checkpoint, LinearHead, SuffixAndHead, Take, embed, predict, to_device
from featcache.finetuning.optim import ProcessGroup, choose_precision
from featcache.finetuning.plan import FineTunePlan
from featcache.finetuning.unfreezing import Trainable, merge_lora, open_up
from featcache.resources import keep_freed_memory
from featcache.specs import Precision

# what is called overfitting: the validation loss rose by this share and this much, and training is so far ahead in accuracy
_RISE, _SLIGHT, _AHEAD = 1.1, 0.01, 0.02
_ROUNDING = 1e-9  # of differences of accuracies
_LAYOUT = 3  # of a training's state: one of an older version is begun again


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: ``take`` gives rows (k, ...) stored at the cut, the views of an image one after the other.

    ``y`` are the labels (n,) int64; the split says which images train, choose and test.
    """

    cut: str
    take: Take
    y: NDArray[np.int64]
    split: Split


@dataclass(frozen=True)
class Network:
    """A backbone's weights and a head; no weights where they are those that the backbone has anyway."""

    weights: dict[str, Tensor]
    head: LinearHead


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        on_train: the probe fitted on ``train`` alone: every rate starts from it, so that ``val`` judges it fairly.
        refitted: the probe refitted on train and val: what epoch 0 answers with, where it stays the best, and where the
            refit starts.
        shallower: the finished network that takes the refitted probe's place, where its training on ``train`` was the start.
    """

    on_train: LinearHead
    refitted: LinearHead
    shallower: Network | None = None


@dataclass(frozen=True)
class RateSearch:
    """What the search came to.

    Attributes:
        best: the trial of the rate that is kept.
        rates: for each rate that was tried the validation accuracy of its best epoch.
        network: trained on ``train`` alone: where a deeper training may start.
    """

    best: Trained
    rates: dict[float, float]
    network: Network


@dataclass(frozen=True)
class FineTuned:
    """A trained suffix and head with its history.

    Attributes:
        model: as it was tested.
        history: the epochs of the rate that was kept, epoch 0 the start.
        best: the epoch that was kept.
        lr: the rate that was kept.
        rates: for each rate that was tried the validation accuracy of its best epoch.
        tested: scores on the test split.
        seconds: of all training, that of killed processes included up to the last state that they kept.
        images_per_second: of the kept rate's.
        similarity: linear CKA of the embeddings of validation images before and after (Kornblith et al. 2019).
        precision: what training steps were computed in.
        refitted: whether the model has trained on validation images too; not where that left it worse on them.
        from_train: as it was chosen, trained on ``train`` alone: where a deeper training may start.
        finished: as it was tested, the weights not copied: what a deeper training answers with that gains nothing.
    """

    model: SuffixAndHead
    history: tuple[Epoch, ...]
    best: int
    lr: float
    rates: dict[float, float]
    tested: TestResult
    seconds: float
    images_per_second: float
    similarity: float
    precision: Precision
    refitted: bool
    from_train: Network
    finished: Network

    @property
    def overfits(self) -> str:
        """What the curves say against more epochs, "" if nothing."""
        losses = [epoch.val.log_loss or 0.0 for epoch in self.history[1:]]  # the start had no label smoothing
        last = self.history[-1]
        if last.train_accuracy is None or losses[-1] <= _RISE * (lowest := min(losses)) + _SLIGHT:
            return ""
        if last.train_accuracy - last.val.accuracy < _AHEAD:
            return ""
        return (
            f"it overfits: the validation loss rose from {lowest:.3f} to {losses[-1]:.3f} while "
            f"{100 * last.train_accuracy:.1f} % of the training images became right"
        )


@dataclass(frozen=True)
class TrainingState:
    """How far a training has come: what its checkpoint keeps, beside the seconds.

    Attributes:
        precision: what steps are computed in, once that is chosen.
        finished: the rates that were tried to their end, each with its validation accuracy.
        contenders: of these trials those that may still be the best: only their weights are kept.
        trial: the state of the one in flight, at a rate or of the refit.
    """

    precision: Precision | Literal["auto"] | None
    finished: tuple[tuple[float, float], ...] = ()
    contenders: tuple[Trained, ...] = ()
    trial: Plain | None = None

    @classmethod
    def of(cls, plain: Plain) -> "TrainingState":
        """Return what ``plain`` gave."""
        finished = tuple((lr, accuracy) for lr, accuracy in plain["finished"])
        return cls(plain["precision"], finished, tuple(map(_trial_of, plain["best"])), plain["trial"])

    def plain(self) -> Plain:
        """Return it as a checkpoint keeps it; tensors are shared."""
        best = [asdict(replace(trial, state={})) | {"state": trial.state} for trial in self.contenders]
        return {
            "layout": _LAYOUT,
            "precision": self.precision,
            "finished": list(self.finished),
            "best": best,
            "trial": self.trial,
        }

    def ended(self, trained: Trained, images: int) -> "TrainingState":
        """Return it after one more rate, judged by so many images."""
        finished = (*self.finished, (trained.lr, trained.best.val.accuracy))
        return TrainingState(self.precision, finished, tuple(not_worse([*self.contenders, trained], images)))


def _trial_of(fields: dict[str, Any]) -> Trained:
    history = tuple(epoch_of(epoch) for epoch in fields["history"])
    return Trained(**(fields | {"history": history, "best": epoch_of(fields["best"])}))


@dataclass(eq=False)
class Finetuner:
    """Trains a suffix and its head: ``search`` for rate and epoch, ``refit``, ``test``, in this order; ``run`` does all.

    A training that was killed goes on: what its checkpoint has of each step is not computed again. The checkpoint is the
    caller's to clear, once what came out is on the disk: until then a training that has ended is found there as well.

    Attributes:
        backbone: the one whose parameters the suffix shares; they are changed.
        trainable: which parameters train.
        plan: rates, epochs, patience, ...
        data: what is trained on.
        start: where training starts.
        seed: of the order of images and of dropout.
        checkpoint: where the state is kept.
        processes: those that share the work.

    Raises:
        SetupError: low-rank updates need peft.
        StorageError: the state cannot be kept.
    """

    backbone: Backbone
    trainable: Trainable
    plan: FineTunePlan
    data: TrainingSet
    start: Start
    seed: int = 0
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(None))
    processes: ProcessGroup = field(default_factory=ProcessGroup)

    def __post_init__(self) -> None:
        """Put head and suffix together, go back to where the checkpoint is, and judge the start."""
        self._started, self._seconds_before = time.monotonic(), 0.0
        keep_freed_memory()  # activations of the same sizes come and go at every step
        self.model = SuffixAndHead(self.backbone.suffix(self.data.cut), self.start.on_train).to(self.backbone.device)
        stages = open_up(self.backbone, self.model, self.trainable, self.seed)
        self._state = self._resumed()
        plan, data, precision = self.plan, self.data, self._state.precision
        self._context = TrainContext(
            self.model,
            stages,
            data.take,
            data.y,
            plan,
            self.processes,
            self.seed,
            precision,  # type: ignore[arg-type]
        )
        self._untouched = copy.deepcopy(self.model.state_dict())
        self._embeddings = self._embed()
        val, scaled = self._context.validate(data.split.val)
        self._before = Epoch(0, None, val, 0.0, scaled_loss=scaled)

    def run(self) -> FineTuned:
        """Search, refit and test."""
        outcome = self.search()
        return self.test(outcome, refitted=self.refit(outcome))

    def search(self) -> RateSearch:
        """Train on ``train`` at every rate, each from the start, and keep the best rate and epoch on ``val``."""
        split, plan = self.data.split, self.plan
        finished = len(self._state.finished)
        with progress(plan.epochs * len(plan.lr) * len(split.train), f"finetune {plan.unfreeze.text}") as bar:
            bar.update(plan.epochs * len(split.train) * finished)
            for lr in plan.lr[finished:]:
                self.model.load_state_dict(self._untouched)
                trained = self._train(Trial(self._context, lr, split.train, split.val, self._before), bar)
                self._state = self._state.ended(trained, len(split.val))
                self._save(self._state)
        # of those that accuracy cannot tell apart
        best = min(self._state.contenders, key=lambda trial: trial.best.scaled_loss)
        self.model.load_state_dict(best.state)
        return RateSearch(best, dict(self._state.finished), self._network())

    def refit(self, outcome: RateSearch) -> bool:
        """Train on train and val together as long as the kept epoch, from the refitted probe; tell whether that is kept.

        Where no epoch was better than the start, the refitted probe is what the model is then.
        """
        best, split = outcome.best, self.data.split
        if best.best.number == 0 or self.plan.refit:
            self._restart()
        if best.best.number == 0 or not self.plan.refit:
            return False
        trial = Trial(self._context, best.lr, split.train_val, None, self._before, epochs=best.best.number)
        with progress(best.best.number * len(split.train_val), f"refit {self.plan.unfreeze.text}") as bar:
            again = self._train(trial, bar)
        self.model.load_state_dict(again.state)
        if not again.diverged and self._still_good(best.best.val.accuracy):
            return True
        self.model.load_state_dict(best.state)
        return False

    def test(self, outcome: RateSearch, *, refitted: bool) -> FineTuned:
        """Test the model as it is now, once, and return it with its history."""
        if self.trainable.spec.what == "lora":
            merge_lora(self.model.suffix)
        seconds = self._seconds  # the test is no training
        after, data, plan = self._embed(), self.data, self.plan
        tested = scores_on_test(
            lambda index: predict(self.model, data.take, index * plan.views, plan.batch_size), data.y, data.split
        )
        return FineTuned(
            self.model,
            outcome.best.history,
            outcome.best.best.number,
            outcome.best.lr,
            outcome.rates,
            tested,
            seconds,
            outcome.best.images_per_second,
            cka(self._embeddings, after),
            self._context.precision,
            refitted,
            outcome.network,
            Network(self.backbone.module.state_dict(), self.model.linear_head()),
        )

    def _resumed(self) -> TrainingState:
        """Return the state to go on from, with a precision chosen."""
        saved = self.checkpoint.load() or {}
        self._seconds_before = float(saved.get("seconds", 0.0))
        if not self.processes.agrees(bool(saved)):  # all of them go on from there, or all begin
            saved = {}
        state = TrainingState.of(saved) if saved.get("layout") == _LAYOUT else TrainingState(self.plan.precision)
        if state.precision not in {None, "auto"}:  # kept with the state: measured again it might come out otherwise
            return state
        rows = self.data.take(self.data.split.train[: self.plan.batch_size] * self.plan.views)
        batch, on_cpu = to_device(rows, self.backbone.device), self.plan.precision == "auto"
        return replace(state, precision=choose_precision(self.model, batch, self.processes, on_cpu=on_cpu))

    @property
    def _seconds(self) -> float:
        """What training has taken, that of killed processes included up to the last state that they kept."""
        return self._seconds_before + time.monotonic() - self._started

    def _save(self, state: TrainingState) -> None:
        self.checkpoint.save(state.plain() | {"seconds": self._seconds})

    def _train(self, trial: Trial, bar: Any) -> Trained:
        """Run a trial, from where the state has it if it does."""
        if self._state.trial is not None:
            trial.resume(self._state.trial)
        state, self._state = self._state, replace(self._state, trial=None)
        return trial.run(bar, lambda plain: self._save(replace(state, trial=plain)))

    def _restart(self) -> None:
        """Put the model where the refit begins: the weights untouched and the probe that was refitted, or the shallower."""
        shallower = self.start.shallower
        self.model.load_state_dict(self._untouched)
        if shallower is not None:
            self.backbone.module.load_state_dict(shallower.weights)
        self.model.set_head(self.start.refitted if shallower is None else shallower.head)

    def _still_good(self, chosen: float) -> bool:
        """Tell whether the model is as accurate on ``val`` as the one that was chosen there, but for noise.

        It has trained on these images since: one that is worse on them is broken.
        """
        images = self.data.split.val
        with contextlib.suppress(DivergedError):
            return self._context.validate(images)[0].accuracy >= chosen - noise(chosen, len(images))
        return False

    def _embed(self) -> NDArray[np.float64]:
        return embed(self.model, self.data.take, self.data.split.val * self.plan.views, self.plan.batch_size)

    def _network(self) -> Network:
        """Return the weights and the head as they are; low-rank updates are no part of the weights yet."""
        if self.trainable.spec.what == "lora":
            return Network({}, self.model.linear_head())
        return Network(copy.deepcopy(self.backbone.module.state_dict()), self.model.linear_head())


def not_worse(trials: Sequence[Trained], images: int) -> list[Trained]:
    """Return the trials that may be the best: of those whose accuracy cannot be told apart, that is the lowest scaled loss.

    Args:
        trials: in the order they were run in.
        images: that judged them.
    """
    gained = [trial for trial in trials if trial.best.number > 0]
    if not gained:
        return list(trials[:1])
    highest = max(trial.best.val.accuracy for trial in gained)
    near = [trial for trial in gained if trial.best.val.accuracy >= highest - noise(highest, images) - _ROUNDING]
    return [
        trial
        for place, trial in enumerate(near)
        if not any(_beats(rival, trial, earlier=number < place) for number, rival in enumerate(near) if number != place)
    ]


def _beats(trial: Trained, rival: Trained, *, earlier: bool) -> bool:
    """Tell whether a trial is as good as another in accuracy and in loss, better in one of them or run before it."""
    as_accurate = trial.best.val.accuracy >= rival.best.val.accuracy
    return (
        as_accurate and trial.best.scaled_loss <= rival.best.scaled_loss and (earlier or trial.best.rank != rival.best.rank)
    )
