"""Train what follows a cut, from the activations that are stored there, starting from the linear probe.

The head starts as the probe (LP-FT: Kumar et al. 2022, arXiv 2202.10054); BatchNorm of the trained part stays in
inference mode unless asked, or unless validation says otherwise of images of another size than those of pretraining, and
then starts from the training images' statistics (AdaBN: Li et al. 2016), with the probe fitted under them; rate
and epoch are chosen on validation, where what cannot be told apart by accuracy is not told apart by it, and the start
itself is epoch 0. How far weights go from the start towards that epoch's is chosen there too (WiSE-FT: Wortsman et al.
2022, section 3). Then the same training runs once more on train and validation together, as long as the kept epoch and
with a rate that falls to zero at its end, as the probe was refitted (as Grill et al. 2020, BYOL, appendix D, do for
fine-tuning).
"""

import contextlib
import copy
import io
import mmap
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache.display import logger, progress
from featcache.errors import FeatcacheError
from featcache.evaluation.metrics import Scores, TestResult, cka, evaluate_on_test
from featcache.evaluation.splits import Split
from featcache.finetuning.loop import (
    DTYPES,
    ROUNDING,
    DivergedError,
    Epoch,
    Plain,
    ProcessGroup,
    TrainContext,
    Trained,
    Trial,
    embed,
    epoch_of,
    noise,
    predict,
    set_training,
    settle_batchnorm,
    to_device,
)
from featcache.finetuning.model import LinearHead, Network, OpenNetwork, SuffixAndHead, merge_lora
from featcache.resources import keep_freed_memory
from featcache.specs import LIVE_BATCHNORM, Precision
from featcache.store.disk import is_signed, make_folder, remove_file, replace_file_by, sign

# what is called overfitting: the validation loss rose by this share and this much, and training is so far ahead in accuracy
_RISE, _SLIGHT, _AHEAD = 1.1, 0.01, 0.02
_SHARES = (0.25, 0.5, 0.75, 1.0)  # of the way from the start to the best epoch
_TRIED: tuple[Precision, Precision] = ("float32", "bfloat16")
_ROUNDS = 2  # after one that is not counted: the first step of each precision also compiles kernels and finds memory
_PAYS = 1.2  # times the speed of float32: what is faster by less may be so by chance
_STATE = b"featcache: state of a training\n"  # what a signature is for
_SIGNATURE = 64  # hexadecimal digits
_LAYOUT = 4  # of a training's state: one of an older version is begun again


@dataclass(frozen=True)
class RateSearch:
    """What the search came to.

    Attributes:
        best: the trial of the rate that is kept.
        rates: for each rate that was tried the validation accuracy of its best epoch.
        share: of the way from the start to that epoch, that is kept.
        val: scores on validation there.
        network: trained on ``train`` alone: where a deeper training may start.
    """

    best: Trained
    rates: dict[str, float]
    share: float
    val: Scores
    network: Network


@dataclass(frozen=True)
class TrainingState:
    """How far a training has come: what its checkpoint keeps, beside the seconds.

    Attributes:
        finished: the rates that were tried to their end, each with its validation accuracy.
        contenders: of these trials those that may still be the best: only their weights are kept.
        trial: the state of the one in flight, at a rate or of the refit.
    """

    finished: tuple[tuple[str, float], ...] = ()
    contenders: tuple[Trained, ...] = ()
    trial: Plain | None = None

    @classmethod
    def of(cls, plain: Plain) -> "TrainingState":
        """Return what ``plain`` gave."""
        finished = tuple((name, accuracy) for name, accuracy in plain["finished"])
        return cls(finished, tuple(map(_trial_of, plain["best"])), plain["trial"])

    def plain(self) -> Plain:
        """Return it as a checkpoint keeps it; tensors are shared."""
        best = [asdict(replace(trial, state={})) | {"state": trial.state} for trial in self.contenders]
        return {"finished": list(self.finished), "best": best, "trial": self.trial}

    def ended(self, trained: Trained, images: int) -> "TrainingState":
        """Return it after one more rate, judged by so many images."""
        name = f"{trained.lr:g}{f' {LIVE_BATCHNORM}' if trained.live else ''}"
        finished = (*self.finished, (name, trained.best.val.accuracy))
        return TrainingState(finished, tuple(not_worse([*self.contenders, trained], images)))


@dataclass(frozen=True)
class FineTuned:
    """A trained suffix and head with its history.

    Attributes:
        network: as it was tested.
        history: the epochs of the rate that was kept, epoch 0 the start.
        best: the epoch that was kept.
        lr: the rate that was kept.
        live: whether BatchNorm statistics of the trained part moved.
        rates: for each rate that was tried the validation accuracy of its best epoch.
        share: of the way from the start to the kept epoch, that was gone.
        val: scores on validation there.
        tested: scores on the test split.
        seconds: of all training, that of killed processes included up to the last state that they kept.
        samples_per_second: of the kept rate's.
        similarity: linear CKA of the embeddings of validation images before and after (Kornblith et al. 2019).
        precision: what training steps were computed in.
        refitted: whether the model has trained on validation images too; not where that left it worse on them.
        from_train: as it was chosen, trained on ``train`` alone: where a deeper training may start.
        finished: as it was tested, the weights not copied: what a deeper training answers with that gains nothing.
        remarks: what the curves say against more epochs, or for others.
    """

    network: OpenNetwork
    history: tuple[Epoch, ...]
    best: int
    lr: float
    live: bool
    rates: dict[str, float]
    share: float
    val: Scores
    tested: TestResult
    seconds: float
    samples_per_second: float
    similarity: float
    precision: Precision
    refitted: bool
    from_train: Network
    finished: Network
    remarks: tuple[str, ...]


def is_gain(accuracy: float, scaled_loss: float, start: Epoch, images: int) -> bool:
    """Tell whether what was chosen is better than the start: by more than the noise, or as accurate at a lower scaled loss.

    The best of many epochs and rates is ahead by an image or two of a small validation split anyway.
    """
    if accuracy > start.val.accuracy + noise(start.val.accuracy, images) - ROUNDING:
        return True
    return accuracy >= start.val.accuracy and scaled_loss < start.scaled_loss


def _trial_of(fields: dict[str, Any]) -> Trained:
    history = tuple(epoch_of(epoch) for epoch in fields["history"])
    return Trained(**(fields | {"history": history, "best": epoch_of(fields["best"])}))


@dataclass(eq=False)
class Finetuner:
    """Trains a suffix and its head: ``search`` for rate and epoch, ``refit``, ``test``, in this order; ``run`` does all.

    A training that was killed goes on: what its checkpoint has of each step is not computed again. The checkpoint is the
    caller's to clear, once what came out is on the disk: until then a training that has ended is found there as well.

    Attributes:
        network: is trained in place.
        context: on what it trains, and how.
        split: which images train, choose and test.
        refitted: what epoch 0 answers with, where it stays the best, and where the refit starts: the probe that was refitted
            on train and val, or the finished shallower network.
        checkpoint: where the state is kept.
        tries_live: whether the best rate is tried with BatchNorm statistics that move, too.
        probe: fits the linear probe on embeddings (k, d) and classes (k,): where BatchNorm statistics are to move, features
            are others from the first batch on than those that the start was fitted on.

    Raises:
        StorageError: the state cannot be kept.
    """

    network: OpenNetwork
    context: TrainContext
    split: Split
    refitted: Network
    checkpoint: "Checkpoint"
    tries_live: bool = False
    probe: Callable[[NDArray[np.float64], NDArray[np.int64]], LinearHead] | None = None

    def __post_init__(self) -> None:
        """Go back to where the checkpoint is, and choose the precision of steps."""
        keep_freed_memory()  # activations of the same sizes come and go at every step
        saved, plan, processes = self.checkpoint.load(), self.context.plan, self.context.processes
        if not processes.agrees(saved is not None):  # all of them go on from there, or all begin
            saved = None
        self._state = TrainingState() if saved is None else TrainingState.of(saved)
        # kept with the state: measured again it might come out otherwise
        precision: Any = saved["precision"] if saved else plan.precision
        if precision in {None, "auto"}:
            batch = to_device(self.context.take(self.split.train[: plan.batch_size] * plan.views), self.context.device)
            precision = choose_precision(self.network.model, batch, processes, on_cpu=precision == "auto")
        self.context = replace(self.context, precision=precision)
        self._untouched = copy.deepcopy(self.network.model.state_dict())

    @cached_property
    def before(self) -> tuple[Epoch, NDArray[np.float64]]:
        """Epoch 0 and the embeddings of validation images: of a probe fitted on ``train`` alone, so that ``val`` is fair."""
        return self.context.before(self.split.val)

    def run(self) -> FineTuned:
        """Search, refit and test."""
        outcome = self.search()
        return self.test(outcome, refitted=self.refit(outcome))

    def search(self) -> RateSearch:
        """Train on ``train`` at every rate, each from the start, and keep the best rate and epoch on ``val``."""
        split, plan, model = self.split, self.context.plan, self.network.model
        start, finished = self.before[0], len(self._state.finished)  # judged before anything moves
        trials = len(plan.lr) + self.tries_live
        with progress(plan.epochs * trials * len(split.train), f"finetune {plan.unfreeze.text}") as bar:
            bar.skip(plan.epochs * len(split.train) * finished)
            for number in range(finished, trials):
                context, lr = (self.context, plan.lr[number]) if number < len(plan.lr) else (self._live, self._best.lr)
                model.load_state_dict(self._settled if context.plan.train_batchnorm else self._untouched)
                trial = Trial(context, lr, split.train, split.val, start)
                trained = trial.run(bar, self._keep_trial, self._state.trial)
                self._state = self._state.ended(trained, len(split.val))
                self._keep(self._state)
        best, share, val = self._blended()
        # low-rank updates are no part of the weights yet
        is_whole = self.network.trainable.spec.what != "lora"
        weights = copy.deepcopy(self.network.backbone.module.state_dict()) if is_whole else {}
        return RateSearch(best, dict(self._state.finished), share, val, Network(weights, model.linear_head()))

    @property
    def _best(self) -> Trained:
        """The trial that is the best so far, of those that accuracy cannot tell apart."""
        return min(self._state.contenders, key=lambda trial: trial.best.scaled_loss)

    @property
    def _live(self) -> TrainContext:
        return replace(self.context, plan=replace(self.context.plan, train_batchnorm=True))

    def _blended(self) -> tuple[Trained, float, Scores]:
        """Put the model where it does best on validation between its start and the best epoch, or at the start.

        Returns:
            The best trial, its best epoch 0 where none gains; the share of the way; and the scores there.
        """
        best, images, model, start = self._best, self.split.val, self.network.model, self.before[0]
        origin = self._settled if best.live and best.best.number else self._untouched
        tried = {1.0: (best.best.val, best.best.scaled_loss)}
        for share in _SHARES[:-1] if best.best.number else ():
            model.load_state_dict(between(origin, best.state, share))
            with contextlib.suppress(DivergedError):
                tried[share] = self.context.validate(images)
        highest = max(val.accuracy for val, _ in tried.values())
        least = highest - noise(highest, len(images)) - ROUNDING
        share = min((share for share in tried if tried[share][0].accuracy >= least), key=lambda share: tried[share][1])
        val, scaled_loss = tried[share]
        if best.best.number and not is_gain(val.accuracy, scaled_loss, start, len(images)):
            best, share, val = replace(best, best=start, state=self._untouched), 1.0, start.val
        model.load_state_dict(between(origin, best.state, share))
        return best, share, val

    def refit(self, outcome: RateSearch) -> bool:
        """Train on train and val together as long as the kept epoch, from the refitted probe; tell whether that is kept.

        Where no epoch was better than the start, the refitted probe is what the model is then.
        """
        best, split, plan, model = outcome.best, self.split, self.context.plan, self.network.model
        if best.best.number == 0:
            self._restart()
        if best.best.number == 0 or not plan.refit:
            return False
        chosen = copy.deepcopy(model.state_dict())
        self._restart()
        if best.live:
            self._settle(split.train_val)
        start = copy.deepcopy(model.state_dict())
        context = self._live if best.live else self.context
        trial = Trial(context, best.lr, split.train_val, None, self.before[0], epochs=best.best.number)
        with progress(best.best.number * len(split.train_val), f"refit {plan.unfreeze.text}") as bar:
            again = trial.run(bar, self._keep_trial, self._state.trial)
        model.load_state_dict(between(start, again.state, outcome.share))
        if not again.diverged and self._still_good(outcome.val.accuracy):
            return True
        model.load_state_dict(chosen)
        return False

    def test(self, outcome: RateSearch, *, refitted: bool) -> FineTuned:
        """Test the model as it is now, once, and return it with its history."""
        model, context, plan = self.network.model, self.context, self.context.plan
        if self.network.trainable.spec.what == "lora":
            merge_lora(model.suffix)
        seconds = self.checkpoint.seconds  # the test is no training
        after = embed(model, context.take, self.split.val * plan.views, plan.batch_size)
        answers = predict(model, context.take, self.split.test * plan.views, plan.batch_size)
        tested = evaluate_on_test(answers, context.y, self.split)
        return FineTuned(
            self.network,
            outcome.best.history,
            outcome.best.best.number,
            outcome.best.lr,
            outcome.best.live,
            outcome.rates,
            outcome.share,
            outcome.val,
            tested,
            seconds,
            outcome.best.samples_per_second,
            cka(self.before[1], after),
            context.precision,
            refitted,
            outcome.network,
            Network(self.network.backbone.module.state_dict(), model.linear_head()),
            remarks_on(outcome.best.history, mixes=plan.mixup > 0),
        )

    @cached_property
    def _settled(self) -> dict[str, Tensor]:
        """Where a trial starts whose BatchNorm statistics are to move: they are settled on ``train`` before."""
        self.network.model.load_state_dict(self._untouched)
        self._settle(self.split.train)
        return copy.deepcopy(self.network.model.state_dict())

    def _settle(self, images: NDArray[np.int64]) -> None:
        """Take BatchNorm statistics from some images, and the probe from what the network makes of them then."""
        model, context, plan = self.network.model, self.context, self.context.plan
        # drawn: images lie by class, and a batch of one class has other statistics than all
        rows = np.random.default_rng(context.seed).permutation(images) * plan.views
        if settle_batchnorm(model, context.take, rows, plan.batch_size) and self.probe is not None:
            model.set_head(self.probe(embed(model, context.take, images * plan.views, plan.batch_size), context.y[images]))

    def _keep(self, state: TrainingState) -> None:
        self.checkpoint.save(state.plain() | {"precision": self.context.precision})

    def _keep_trial(self, plain: Plain) -> None:
        self._keep(replace(self._state, trial=plain))

    def _restart(self) -> None:
        """Put the model where the refit begins: the weights untouched and the probe that was refitted, or the shallower."""
        self.network.model.load_state_dict(self._untouched)
        if self.refitted.weights:
            self.network.backbone.module.load_state_dict(self.refitted.weights)
        self.network.model.set_head(self.refitted.head)

    def _still_good(self, chosen: float) -> bool:
        """Tell whether the model is as accurate on ``val`` as the one that was chosen there, but for noise.

        It has trained on these images since: one that is worse on them is broken.
        """
        images = self.split.val
        with contextlib.suppress(DivergedError):
            return self.context.validate(images)[0].accuracy >= chosen - noise(chosen, len(images))
        return False


def remarks_on(history: Sequence[Epoch], *, mixes: bool) -> tuple[str, ...]:
    """Return what is to be said of a training's curves, the start first; of mixed images few are right in any case."""
    first, last, remarks = history[0], history[-1], []
    if last.train_accuracy is None:  # no epoch
        return ()
    if last.train_accuracy < first.val.accuracy - _AHEAD and not mixes:
        remarks.append(
            f"it hardly learns: after {last.number} epochs {100 * last.train_accuracy:.1f} % of the training samples are "
            f"right, where it started with {100 * first.val.accuracy:.1f} % of validation's: try other rates (`lr`), more "
            "`epochs`, or `train_batchnorm`"
        )
    losses = [epoch.val.log_loss or 0.0 for epoch in history[1:]]  # the start had no label smoothing
    has_risen = losses[-1] > _RISE * (lowest := min(losses)) + _SLIGHT
    if has_risen and last.train_accuracy - last.val.accuracy >= _AHEAD:
        remarks.append(
            f"it overfits: the validation loss rose from {lowest:.3f} to {losses[-1]:.3f} while "
            f"{100 * last.train_accuracy:.1f} % of the training samples became right"
        )
    return tuple(remarks)


def between(start: dict[str, Tensor], end: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return weights a share of the way from one state to another; what is counted is as at the end."""
    return {
        name: torch.lerp(start[name], value, share) if share < 1 and value.is_floating_point() else value
        for name, value in end.items()
    }


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
    near = [trial for trial in gained if trial.best.val.accuracy >= highest - noise(highest, images) - ROUNDING]
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


def choose_precision(model: SuffixAndHead, rows: Tensor, processes: ProcessGroup, *, on_cpu: bool) -> Precision:
    """Return bfloat16 on GPUs that have it (since Ampere), and if asked on CPUs (AMX) where a step is clearly faster in it.

    All processes come to the same choice.

    Args:
        model: the one to train; neither weights nor statistics are changed.
        rows: a batch of stored rows on the model's device.
        processes: those that share the work.
        on_cpu: try it on CPUs too.
    """
    if rows.device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    features: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.10
    if not on_cpu or rows.device.type != "cpu" or not features.get("amx_bf16"):
        return "float32"
    # measured, since having AMX is not enough: most backbones are two to three times as fast, depthwise ones can be slower
    set_training(model, train_batchnorm=False)
    rounds = [[_step_seconds(model, rows, precision) for precision in _TRIED] for _ in range(1 + _ROUNDS)]
    slow, fast = processes.total(np.min(rounds[1:], axis=0), rows.device)
    return "bfloat16" if slow > _PAYS * fast else "float32"


def _step_seconds(model: SuffixAndHead, rows: Tensor, precision: Precision) -> float:
    dtype, start = DTYPES[precision], time.perf_counter()
    with torch.autocast(rows.device.type, dtype, enabled=dtype is not None):
        loss = model(rows).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


class Checkpoint:
    """Keeps an unfinished training's state in one file, or nowhere; of several processes only one ``writes``.

    A state is taken up under the ``protocol`` that it was kept under alone: another one starts from another probe.
    ``seconds`` count from where it is made, those of killed processes included up to the last state that they kept.
    """

    def __init__(self, path: Path | None, *, writes: bool = True, protocol: int = 0) -> None:
        self._path = path
        self._writes = writes
        self._names = {"layout": _LAYOUT, "protocol": protocol}
        self._started, self._seconds_before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """What training has taken."""
        return self._seconds_before + time.monotonic() - self._started

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept last, ``None`` where there is none or it is not whole and this user's own.

        Raises:
            SetupError: the secret that states are signed with is not the user's own.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            why = "" if _is_own(self._path) else "was changed, or was not written by you on this machine"
            state = None if why else torch.load(self._path, map_location="cpu", weights_only=True)
        except FeatcacheError:
            raise
        except FileNotFoundError:  # another process has trained the same to its end meanwhile
            return None
        except Exception as error:  # noqa: BLE001 - a damaged file fails in any way
            why = f"cannot be read ({type(error).__name__})"
        if why:
            logger.warning("%s: %s: training begins again", self._path, why)
            return None
        if not isinstance(state, dict) or any(state.get(name) != value for name, value in self._names.items()):
            return None
        self._seconds_before = float(state["seconds"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was kept.

        Raises:
            StorageError: the disk failed.
        """
        if self._path is None or not self._writes:
            return
        buffer = io.BytesIO()
        torch.save(state | self._names | {"seconds": self.seconds}, buffer)
        content = buffer.getbuffer()
        # behind the content, where PyTorch looks past it: a state of wrong kinds or shapes would fail anywhere in training
        signature = sign(_STATE, content).encode()
        make_folder(self._path.parent)
        replace_file_by(self._path, lambda file: file.writelines((content, signature)))

    def clear(self) -> None:
        """Forget what was kept: once checkpoint, head and record are on the disk, and not before.

        Raises:
            StorageError: the disk failed.
        """
        if self._path is not None and self._writes:
            remove_file(self._path)


def _is_own(path: Path) -> bool:
    """Tell whether a state's file ends in this user's signature of what stands before it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        signature = content[-_SIGNATURE:].decode("ascii")
        with memoryview(content) as view, view[:-_SIGNATURE] as signed:
            return is_signed(signature, _STATE, signed)
