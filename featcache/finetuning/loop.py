"""One trial: training at one rate, epoch by epoch, that can be broken off anywhere and taken up again exactly there."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featcache.evaluation.metrics import Scores, at_temperature, best_temperature, score
from featcache.evaluation.splits import Index
from featcache.finetuning.distributed import ProcessGroup
from featcache.finetuning.model import SuffixAndHead, Take, chunks, flipped_and_shifted, mixed, predict, set_training
from featcache.finetuning.optim import DTYPES, make_optimiser, parameter_groups, rate
from featcache.finetuning.plan import FineTunePlan
from featcache.progress import logger
from featcache.specs import Precision

_SAVE_SECONDS = 60.0
_ROUNDING = 1e-9  # of differences of accuracies
State = dict[str, Any]


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave; epoch 0 is where training starts from. Training's own scores are those of its batches.

    ``scaled_loss`` is the log-loss on validation at the temperature that is best there: the start was fitted without label
    smoothing and what is trained with it, so that plain losses tell their confidence apart rather than what they know.
    """

    number: int
    train_loss: float | None
    val: Scores
    seconds: float
    train_accuracy: float | None = None
    scaled_loss: float = math.inf

    @property
    def rank(self) -> tuple[float, float]:
        """What the smaller of is better: by accuracy, then by scaled log-loss."""
        return (-self.val.accuracy, self.scaled_loss)


def noise(accuracy: float, images: int) -> float:
    """Return by how much the accuracy on so many images is uncertain: a standard error, of at least one image.

    Candidates that are nearer to each other than this are not told apart by accuracy (the one-standard-error rule: Breiman
    et al. 1984, section 3.4.3): on a small validation split a single image would decide otherwise.
    """
    share = (accuracy * images + 1) / (images + 2)  # Laplace's: no accuracy is certain
    return max(math.sqrt(share * (1 - share) / images), 1 / images)


@dataclass(frozen=True)
class Trained:
    """What one rate came to: its best epoch and the weights then, and whether a later one ended in no numbers at all."""

    lr: float
    history: tuple[Epoch, ...]
    best: Epoch
    state: dict[str, Tensor]
    images_per_second: float
    diverged: bool = False


class DivergedError(ArithmeticError):
    """Losses or answers are no numbers any more."""


@dataclass(frozen=True)
class TrainContext:
    """What stays the same while rates are tried.

    Attributes:
        model: is trained in place.
        stages: the parameters that train, stage by stage, in forward order.
        take: gives rows (k, ...) by their positions; the views of an image lie one after the other.
        y: labels (n,) int64.
        plan: how.
        processes: those that share the work.
        seed: of the order of images, of views, mixing and dropout.
        precision: what steps are computed in.
    """

    model: SuffixAndHead
    stages: tuple[tuple[nn.Parameter, ...], ...]
    take: Take
    y: NDArray[np.int64]
    plan: FineTunePlan
    processes: ProcessGroup
    seed: int
    precision: Precision

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device

    def validate(self, index: Index, model: SuffixAndHead | None = None) -> tuple[Scores, float]:
        """Return a model's scores on some images and its scaled log-loss, each process looking at its share of them.

        Raises:
            DivergedError: it answers with no numbers.
        """
        model, everything = model or self.model, np.arange(len(index))
        mine = self.processes.share(everything)
        answers = np.zeros((len(index), model.head.out_features))
        if len(mine):
            answers[mine] = predict(model, self.take, index[mine] * self.plan.views, self.plan.batch_size)
        answers = self.processes.total(answers, self.device)
        if not np.isfinite(answers).all():
            raise DivergedError
        truth = self.y[index]
        temperature = best_temperature(truth, answers)
        scaled = answers if temperature is None else at_temperature(answers, temperature)
        return score(truth, answers), score(truth, scaled).log_loss or 0.0


class Trial:
    """Training at one rate from the model's present weights.

    Args:
        job: what is trained.
        lr: of the last stage.
        train: images to train on.
        val: images that judge epochs, or ``None``: then the last epoch is the best.
        before: epoch 0.
        epochs: how many there are at most; the rate falls to zero at their end.
    """

    def __init__(
        self, job: TrainContext, lr: float, train: Index, val: Index | None, before: Epoch, epochs: int | None = None
    ) -> None:
        plan = job.plan
        self._job, self._lr, self._train, self._val = job, lr, train, val
        self._epochs = epochs or plan.epochs
        groups = parameter_groups(job.stages, job.model.head, plan, lr)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimiser = make_optimiser(groups, plan)
        steps = self._epochs * math.ceil(len(train) / (plan.batch_size * plan.accumulate))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda step: rate(step, steps, plan.warmup))
        self._scaler = torch.amp.GradScaler(job.device.type, enabled=job.precision == "float16")
        average = get_ema_multi_avg_fn(plan.ema)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(job.model, multi_avg_fn=average, use_buffers=True) if plan.ema else None
        self._history = [before]
        self._best, self._state = before, copy.deepcopy(job.model.state_dict())
        self._accuracy, self._loss, self._stale = -1.0, math.inf, 0
        self._step, self._sums, self._spent = 0, np.zeros(2), 0.0

    def run(self, bar: Any, keep: Callable[[State], None]) -> Trained:
        """Train to the end; ``keep`` is given the state now and then, and after every epoch."""
        plan, images, diverged = self._job.plan, len(self._train), False
        while len(self._history) <= self._epochs and self._stale < plan.patience:
            try:
                self._epoch(bar, keep)
            except DivergedError:
                logger.warning("at rate %g training diverged in epoch %d: it is too high", self._lr, len(self._history))
                diverged = True
                break
            keep(self.state())
            bar.set_postfix_str(f"lr {self._lr:g}, val {100 * self._history[-1].val.accuracy:.1f} %")
        bar.update((self._epochs + 1 - len(self._history) - diverged) * images)
        seconds = sum(epoch.seconds for epoch in self._history[1:])
        speed = (len(self._history) - 1) * images / seconds if seconds else 0.0
        return Trained(self._lr, tuple(self._history), self._best, self._state, speed, diverged)

    def state(self) -> State:
        """Return everything that decides how training goes on; it shares its tensors, and is to be written at once."""
        return {
            "model": self._job.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict()["last_epoch"],
            "scaler": self._scaler.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "history": [asdict(epoch) for epoch in self._history],
            "best": asdict(self._best),
            "best_state": self._state,
            "stale": (self._accuracy, self._loss, self._stale),
            "step": self._step,
            "sums": self._sums.tolist(),
            "spent": self._spent,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self._job.device) if self._job.device.type == "cuda" else None,
        }

    def resume(self, state: State) -> None:
        """Go back to a state that was kept."""
        self._job.model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.last_epoch = state["schedule"]
        for group, base in zip(self._optimiser.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = base * self._schedule.lr_lambdas[0](state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average:
            self._average.load_state_dict(state["average"])
        self._history = [epoch_of(facts) for facts in state["history"]]
        self._best, self._state = epoch_of(state["best"]), state["best_state"]
        self._accuracy, self._loss, self._stale = state["stale"]
        self._step, self._sums, self._spent = state["step"], np.array(state["sums"]), state["spent"]
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"], self._job.device)

    def _epoch(self, bar: Any, keep: Callable[[State], None]) -> None:
        job, plan, number = self._job, self._job.plan, len(self._history)
        if self._step == 0:
            _seed(job.seed * 1000 + number, job.device)
        set_training(job.model, train_batchnorm=plan.train_batchnorm)
        rng = np.random.default_rng((job.seed, number))
        order = rng.permutation(self._train)
        rows = order * plan.views + rng.integers(plan.views, size=len(order))
        started = kept = time.monotonic()
        steps = list(chunks(np.arange(len(order)), plan.batch_size * plan.accumulate))
        done = min(self._step * plan.batch_size * plan.accumulate, len(order))
        bar.update(done)
        left = [[some[part] for part in chunks(np.arange(len(some)), plan.batch_size)] for some in steps[self._step :]]
        mine = [job.processes.share(part) for parts in left for part in parts]
        stored = iter(_ahead(job.take, [rows[part] for part in mine]))
        for parts in left:
            whole = sum(map(len, parts))
            self._sums += self._one_step([(next(stored), order[job.processes.share(part)]) for part in parts], whole, number)
            self._step += 1
            bar.update(whole)
            if time.monotonic() - kept > _SAVE_SECONDS:
                now = time.monotonic()
                self._spent, started = self._spent + now - started, now
                keep(self.state())
                kept = time.monotonic()
        loss, right = job.processes.total(self._sums, job.device) / len(order)
        seconds = self._spent + time.monotonic() - started
        self._step, self._sums, self._spent = 0, np.zeros(2), 0.0
        self._judge(number, float(loss), float(right), seconds)

    def _one_step(self, parts: Sequence[tuple[NDArray[Any], Index]], whole: int, number: int) -> NDArray[np.float64]:
        """Move the weights once; return the sums of losses and of right answers."""
        job, plan, dtype = self._job, self._job.plan, DTYPES[self._job.precision]
        sums = np.zeros(2)
        for place, (stored, images) in enumerate(parts):
            if not len(images):
                continue
            if plan.train_batchnorm:  # one image has no statistics: a last batch of one is normalised by the running ones
                set_training(job.model, train_batchnorm=len(images) > 1)
            rng = np.random.default_rng((job.seed, number, self._step, place, job.processes.rank))
            rows, y = to_device(stored, job.device), torch.from_numpy(job.y[images]).to(job.device)
            if plan.augment and rows.dtype == torch.uint8:
                rows = flipped_and_shifted(rows, rng)
            others, share = y, 1.0
            if plan.mixup:
                rows, partner, share = mixed(rows, plan.mixup, rng)
                others = y[partner]
            with torch.autocast(job.device.type, dtype, enabled=dtype is not None):
                logits = job.model(rows).float()
                loss = share * self._cross_entropy(logits, y)
                if share < 1:
                    loss = loss + (1 - share) * self._cross_entropy(logits, others)
            self._scaler.scale(loss / whole).backward()  # type: ignore[no-untyped-call]
            sums += loss.item(), int((logits.argmax(dim=1) == y).sum())
        job.processes.sum_gradients(self._parameters)
        if plan.clip:
            self._scaler.unscale_(self._optimiser)
            nn.utils.clip_grad_norm_(self._parameters, plan.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()
        self._optimiser.zero_grad(set_to_none=True)
        if self._average:
            self._average.update_parameters(job.model)
        return sums

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self._job.plan.label_smoothing, reduction="sum")

    def _judge(self, number: int, loss: float, right: float, seconds: float) -> None:
        """Validate, and keep the weights where they are the ones to keep so far (``kept``)."""
        if not math.isfinite(loss):
            raise DivergedError
        model: SuffixAndHead = self._average.module if self._average else self._job.model  # type: ignore[assignment]
        start = self._history[0]
        val, scaled = self._job.validate(self._val, model) if self._val is not None else (start.val, start.scaled_loss)
        epoch = Epoch(number, loss, val, seconds, right, scaled)
        self._history.append(epoch)
        if self._val is None or kept(self._history, len(self._val)) == number:
            self._best, self._state = epoch, copy.deepcopy(model.state_dict())
        now = val.log_loss if val.log_loss is not None else math.inf
        gained = val.accuracy > self._accuracy or now < self._loss or self._val is None
        self._stale = 0 if gained else self._stale + 1
        self._accuracy, self._loss = max(self._accuracy, val.accuracy), min(self._loss, now)


def kept(history: Sequence[Epoch], images: int) -> int:
    """Return which epoch is kept: the latest that cannot be told from the best, of those better than the start; else 0.

    Of epochs within the noise the latest: there the rate has fallen furthest, weights have come to rest, and the refit,
    whose rate falls to zero, is most like what was judged.

    Args:
        history: the epochs, the first of them the start.
        images: that judged them.
    """
    better = [epoch for epoch in history[1:] if epoch.rank < history[0].rank]
    if not better:
        return 0
    highest = max(epoch.val.accuracy for epoch in better)
    return max(epoch.number for epoch in better if epoch.val.accuracy >= highest - noise(highest, images) - _ROUNDING)


def _seed(seed: int, device: torch.device) -> None:
    """Seed dropout; whoever trains takes care that the caller's generators are put back."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def epoch_of(facts: dict[str, Any]) -> Epoch:
    """Return an epoch from its fields as plain values."""
    val: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in facts["val"].items()}
    return Epoch(**(facts | {"val": Scores(**val)}))


def _ahead(take: Take, several: Sequence[Index]) -> Iterator[NDArray[Any]]:
    """Yield the rows of several batches in order, two of them read before they are asked for."""
    with ThreadPoolExecutor(1) as beside:
        waiting: list[Future[NDArray[Any]]] = []
        try:
            for index in several:
                waiting.append(beside.submit(take, index))
                if len(waiting) > 2:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def to_device(rows: NDArray[Any], device: torch.device) -> Tensor:
    """Return stored rows on a device."""
    tensor = torch.from_numpy(rows)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
