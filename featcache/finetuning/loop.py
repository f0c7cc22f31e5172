"""A trial: training at one rate, broken off anywhere and taken up again exactly there; its batches, epochs and processes."""

import copy
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from featcache.display import Progress, logger
from featcache.evaluation.metrics import Scores, at_temperature, best_temperature, score
from featcache.evaluation.splits import Index
from featcache.finetuning import FineTunePlan
from featcache.finetuning.model import SuffixAndHead, Take, moving_norms
from featcache.specs import Precision

_SAVE_SECONDS = 60.0  # what a kill costs at most; writing a large model's state takes some seconds
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MOMENTUM = 0.9
_PATIENCE = timedelta(days=7)  # the first process may extract for long while the others wait; the default is 30 minutes
ROUNDING = 1e-9  # of differences of accuracies
_SHIFT = 1 / 8  # of a side: the 4 of 32 pixels of He et al. 2016
Group = dict[str, Any]
Plain = dict[str, Any]  # what torch.load reads with weights_only: numbers, texts, lists, tensors


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
        """The smaller the better: by accuracy, then by scaled log-loss."""
        return (-self.val.accuracy, self.scaled_loss)


def noise(accuracy: float, images: int) -> float:
    """Return by how much the accuracy on so many images is uncertain: a standard error, of at least one image.

    Candidates that are nearer to each other than this are not told apart by accuracy (the one-standard-error rule: Breiman
    et al. 1984, section 3.4.3): on a small validation split a single image would decide otherwise.
    """
    share = (accuracy * images + 1) / (images + 2)  # Laplace's: no accuracy is certain
    return max(math.sqrt(share * (1 - share) / images), 1 / images)


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
    return max(epoch.number for epoch in better if epoch.val.accuracy >= highest - noise(highest, images) - ROUNDING)


def epoch_of(fields: dict[str, Any]) -> Epoch:
    """Return an epoch from its fields as plain values."""
    val: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields["val"].items()}
    return Epoch(**(fields | {"val": Scores(**val)}))


@dataclass(frozen=True)
class Trained:
    """What one rate came to: its best epoch and the weights then; whether a later one diverged, whether BatchNorm moved."""

    lr: float
    history: tuple[Epoch, ...]
    best: Epoch
    state: dict[str, Tensor]
    samples_per_second: float
    diverged: bool = False
    live: bool = False


class DivergedError(ArithmeticError):
    """Losses or probabilities are NaN or infinite."""


class ProcessGroup:
    """The processes of this run; alone, it does nothing."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if self.size > 1 and not dist.is_initialized():
            on_gpu = torch.cuda.is_available()
            if on_gpu:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            # both: gradients are summed on the GPU, barriers and votes are tensors on the CPU
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)

    def share(self, index: Index) -> Index:
        """Return this process's positions among those of a batch."""
        # every size-th: shares differ by one image at most, whatever the batch's length
        return index[self.rank :: self.size]

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes: each loss counts by its rows in the whole step."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:  # this process's share of a last batch may be empty; the sum needs all of them
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def total(self, numbers: NDArray[np.float64], device: torch.device) -> NDArray[Any]:
        """Return the sums of all processes' numbers."""
        if self.size == 1:
            return numbers
        tensor = torch.from_numpy(numbers.copy()).to(device)
        dist.all_reduce(tensor)
        return tensor.cpu().numpy()

    def agrees(self, each: bool) -> bool:  # noqa: FBT001 - what is voted on
        """Tell whether all processes say yes."""
        return bool(self.total(np.array([float(each)]), torch.device("cpu"))[0] == self.size)

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """Let the first process go through the block before the others: they find what it has put into the cache."""
        if self.rank:
            self._wait()
        try:
            yield
        finally:
            if not self.rank:
                self._wait()

    def _wait(self) -> None:
        if self.size > 1:
            dist.all_reduce(torch.zeros(1))


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
        precision: what steps are computed in; a ``Finetuner`` chooses it as the plan asks.
        on_epoch: is told the rate and each epoch that validation has judged.
    """

    model: SuffixAndHead
    stages: tuple[tuple[nn.Parameter, ...], ...]
    take: Take
    y: NDArray[np.int64]
    plan: FineTunePlan
    processes: ProcessGroup
    seed: int
    precision: Precision = "float32"
    on_epoch: Callable[[float, Epoch], None] | None = None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head.weight.device

    def validate(self, index: Index, model: SuffixAndHead | None = None) -> tuple[Scores, float]:
        """Return a model's scores on some images and its scaled log-loss, each process looking at its share of them.

        Raises:
            DivergedError: its probabilities are NaN or infinite.
        """
        model = model or self.model
        share = self.processes.share(np.arange(len(index)))
        predictions = np.zeros((len(index), model.head.out_features))
        if len(share):  # view 0 is the plain image: the first of each image's rows
            predictions[share] = predict(model, self.take, index[share] * self.plan.views, self.plan.batch_size)
        predictions = self.processes.total(predictions, self.device)  # the other processes' rows are zeros here
        if not np.isfinite(predictions).all():
            raise DivergedError
        y_true = self.y[index]
        temperature = best_temperature(y_true, predictions)
        scaled = predictions if temperature is None else at_temperature(predictions, temperature)
        return score(y_true, predictions), score(y_true, scaled).log_loss or 0.0

    def before(self, index: Index) -> tuple[Epoch, NDArray[np.float64]]:
        """Return epoch 0, judged by some images (k,), and their embeddings (k, d), which training will change."""
        val, scaled = self.validate(index)
        embeddings = embed(self.model, self.take, index * self.plan.views, self.plan.batch_size)
        return Epoch(0, None, val, 0.0, scaled_loss=scaled), embeddings


def set_training(model: nn.Module, *, train_batchnorm: bool) -> None:
    """Put what trains in training mode; frozen parts stay in inference mode, and BatchNorm too unless asked otherwise."""
    _set_training(model, parent=True)
    for module in model.modules():
        # statistics of small batches would change the features that the head was fitted on (LP-FT starts as the probe)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not train_batchnorm:  # noqa: SLF001 - no public name
            module.training = False


def _set_training(module: nn.Module, *, parent: bool) -> None:
    """Set a module by whether any of its parameters trains; one without any, such as dropout, is as its parent."""
    trains = [parameter.requires_grad for parameter in module.parameters()]
    module.training = any(trains) if trains else parent
    for child in module.children():
        _set_training(child, parent=module.training)


def predict(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> NDArray[np.float64]:
    """Return the probabilities (k, classes) of rows at some positions (k,)."""
    # softmax in float64: the log-loss is in the digits of probabilities near 0 and 1
    return _in_batches(lambda rows: F.softmax(model(rows).double(), dim=1), model, take, index, batch_size)


def embed(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> NDArray[np.float64]:
    """Return the embeddings (k, d) of rows at some positions (k,)."""
    return _in_batches(lambda rows: model.embed(rows).double(), model, take, index, batch_size)


def _in_batches(
    run: Callable[[Tensor], Tensor], model: SuffixAndHead, take: Take, index: Index, batch_size: int
) -> NDArray[np.float64]:
    model.eval()
    device = model.head.weight.device
    with torch.inference_mode():
        out = [run(torch.from_numpy(take(rows)).to(device)).cpu().numpy() for rows in chunks(index, batch_size)]
    return np.concatenate(out)


def settle_batchnorm(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> bool:
    """Let BatchNorm statistics of what trains be those of some rows (k,) alone; tell whether there are any such.

    AdaBN (Li et al. 2016, arXiv 1603.04779, section 3.2): where statistics are to move anyway, the first batches would throw
    out a head that was fitted on features under the old ones.
    """
    norms = moving_norms(model)
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # without a momentum: the mean over all batches
    with torch.no_grad():
        for rows in chunks(index, batch_size) if norms else ():
            if len(rows) > 1:  # one row has no statistics
                model.embed(torch.from_numpy(take(rows)).to(model.head.weight.device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum, norm.training = momentum, False
    return bool(norms)


def read_ahead(take: Take, batches: Sequence[Index]) -> Iterator[NDArray[Any]]:
    """Yield the rows of batches in order, two of them read before they are asked for."""
    # one thread: HDF5 reads one at a time anyway; two batches: a slow read hides behind a step, and memory stays small
    with ThreadPoolExecutor(1) as reader:
        waiting: list[Future[NDArray[Any]]] = []
        try:
            for index in batches:
                waiting.append(reader.submit(take, index))
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
    # pinned memory is copied while the GPU computes
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def flipped_and_shifted(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Return pixels (b, h, w, 3), half of the images mirrored, each shifted by up to an eighth of its sides.

    What would be empty is filled by reflection (He et al. 2016, section 4.2, on larger images).
    """
    count, height, width = pixels.shape[:3]
    down, across = (rng.integers(-int(_SHIFT * side), int(_SHIFT * side) + 1, count) for side in (height, width))
    rows = _reflected(np.arange(height) + down[:, None], height)
    columns = _reflected(np.arange(width) + across[:, None], width)
    columns = np.where(rng.random(count)[:, None] < 0.5, columns[:, ::-1], columns)
    images = torch.arange(count)[:, None, None]
    # one gather of bytes for the batch: an image at a time would cost an interpreted step for each
    return pixels[images, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns.copy())[:, None, :]]


def _reflected(positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    positions = np.abs(positions)
    return np.where(positions >= size, 2 * (size - 1) - positions, positions)


def mixed(rows: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Return rows (b, ...) each mixed with another, the partners' positions (b,), and the share of the first.

    Zhang et al. 2018 (mixup) on pixels, Verma et al. 2019 (manifold mixup) on activations.
    """
    share = float(rng.beta(alpha, alpha))
    partners = torch.from_numpy(rng.permutation(len(rows))).to(rows.device)
    rows = rows.float()  # stored as bytes or float16
    return share * rows + (1 - share) * rows[partners], partners, share


def chunks(index: Index, size: int) -> Iterator[Index]:
    """Yield the positions in consecutive chunks of ``size``, the last one shorter."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


@dataclass
class TrialState:
    """What a trial has come to, beside the weights in training and their optimiser.

    Attributes:
        history: the epochs, the first of them the start.
        best: the epoch that is kept so far.
        weights: the model's in that epoch.
        highest: accuracy on validation so far, the start left out.
        lowest: log-loss there so far.
        stale: epochs in succession that brought neither.
        step: how many steps of the epoch in flight have been taken.
        sums: of losses and of correct predictions in them.
        seconds: that processes before this one, or states before the last, have spent in it.
    """

    history: list[Epoch]
    best: Epoch
    weights: dict[str, Tensor]
    highest: float = -1.0
    lowest: float = math.inf
    stale: int = 0
    step: int = 0
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    seconds: float = 0.0

    def plain(self) -> Plain:
        """Return it as a checkpoint keeps it; tensors are shared."""
        return {
            "history": [asdict(epoch) for epoch in self.history],
            "best": asdict(self.best),
            "best_state": self.weights,
            "stale": (self.highest, self.lowest, self.stale),
            "step": self.step,
            "sums": self.sums.tolist(),
            "spent": self.seconds,
        }

    @classmethod
    def of(cls, plain: Plain) -> "TrialState":
        """Return what ``plain`` gave."""
        history, (highest, lowest, stale) = [epoch_of(fields) for fields in plain["history"]], plain["stale"]
        best, weights, sums = epoch_of(plain["best"]), plain["best_state"], np.array(plain["sums"])
        return cls(history, best, weights, highest, lowest, stale, plain["step"], sums, plain["spent"])

    def end_epoch(self) -> None:
        """Begin to count anew."""
        self.step, self.sums, self.seconds = 0, np.zeros(2), 0.0


class Trial:
    """Training at one rate from the model's present weights.

    Args:
        context: what is trained.
        lr: of the last stage.
        train: images to train on.
        val: images that judge epochs, or ``None``: then the last epoch is the best.
        before: epoch 0.
        epochs: how many there are at most; the rate falls to zero at their end.
    """

    def __init__(
        self, context: TrainContext, lr: float, train: Index, val: Index | None, before: Epoch, epochs: int | None = None
    ) -> None:
        plan = context.plan
        self._context, self._lr, self._train, self._val = context, lr, train, val
        self._epochs = epochs or plan.epochs
        groups = parameter_groups(context.stages, context.model.head, plan, lr)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimiser = make_optimiser(groups, plan)
        steps = self._epochs * math.ceil(len(train) / (plan.batch_size * plan.accumulate))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda step: rate(step, steps, plan.warmup))
        # gradients of float16 would underflow; bfloat16 has float32's range
        self._scaler = torch.amp.GradScaler(context.device.type, enabled=context.precision == "float16")
        average = get_ema_multi_avg_fn(plan.ema)  # type: ignore[no-untyped-call]
        self._average = AveragedModel(context.model, multi_avg_fn=average, use_buffers=True) if plan.ema else None
        self._state = TrialState([before], before, copy.deepcopy(context.model.state_dict()))

    def run(self, bar: Progress, keep: Callable[[Plain], None], saved: Plain | None = None) -> Trained:
        """Train to the end, from a saved state if given; ``keep`` is handed the state now and then and after every epoch."""
        if saved is not None:
            self._resume(saved)
            bar.skip((len(self._state.history) - 1) * len(self._train))
        plan, images, diverged, state = self._context.plan, len(self._train), False, self._state
        while len(state.history) <= self._epochs and state.stale < plan.patience:
            try:
                self._epoch(bar, keep)
            except DivergedError:
                logger.warning("At rate %g training diverged in epoch %d: it is too high", self._lr, len(state.history))
                diverged = True
                break
            keep(self.state())
            if self._context.on_epoch is not None and self._val is not None:
                self._context.on_epoch(self._lr, state.history[-1])
            judged = f", val {100 * state.history[-1].val.accuracy:.1f} %" if self._val is not None else ""
            bar.tell(f"lr {self._lr:g}{judged}")
        bar.skip((self._epochs + 1 - len(state.history) - diverged) * images)
        seconds = sum(epoch.seconds for epoch in state.history[1:])
        speed = (len(state.history) - 1) * images / seconds if seconds else 0.0
        return Trained(
            self._lr, tuple(state.history), state.best, state.weights, speed, diverged, bool(plan.train_batchnorm)
        )

    def state(self) -> Plain:
        """Return everything that decides how training goes on; it shares its tensors, and is to be written at once.

        What is drawn comes from (seed, epoch, step); only dropout draws from PyTorch's generators, which are kept.
        """
        device = self._context.device
        return self._state.plain() | {
            "model": self._context.model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict()["last_epoch"],
            "scaler": self._scaler.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def _resume(self, plain: Plain) -> None:
        """Go back to a state that was kept."""
        self._context.model.load_state_dict(plain["model"])
        self._optimiser.load_state_dict(plain["optimiser"])
        self._schedule.last_epoch = plain["schedule"]
        # LambdaLR's own state would need its function pickled: rates follow from the step
        for group, base in zip(self._optimiser.param_groups, self._schedule.base_lrs, strict=True):
            group["lr"] = base * self._schedule.lr_lambdas[0](plain["schedule"])
        self._scaler.load_state_dict(plain["scaler"])
        if self._average:
            self._average.load_state_dict(plain["average"])
        self._state = TrialState.of(plain)
        torch.set_rng_state(plain["random"])
        if plain["random_cuda"] is not None:
            torch.cuda.set_rng_state(plain["random_cuda"], self._context.device)

    def _epoch(self, bar: Progress, keep: Callable[[Plain], None]) -> None:
        context, plan, state, number = self._context, self._context.plan, self._state, len(self._state.history)
        if state.step == 0:  # else ``_resume`` has put the generators where the epoch was left
            _seed_dropout(context.seed * 1000 + number, context.device)
        set_training(context.model, train_batchnorm=bool(plan.train_batchnorm))
        rng = np.random.default_rng((context.seed, number))
        order = rng.permutation(self._train)
        rows = order * plan.views + rng.integers(plan.views, size=len(order))
        started = saved = time.monotonic()
        images_a_step = plan.batch_size * plan.accumulate
        steps = list(chunks(np.arange(len(order)), images_a_step))
        bar.skip(min(state.step * images_a_step, len(order)))
        batches = [[step[part] for part in chunks(np.arange(len(step)), plan.batch_size)] for step in steps[state.step :]]
        shares = [context.processes.share(batch) for step in batches for batch in step]
        stored = iter(read_ahead(context.take, [rows[share] for share in shares]))
        for step in batches:
            images = sum(map(len, step))
            shared = [(next(stored), order[context.processes.share(batch)]) for batch in step]
            state.sums += self._one_step(shared, images, number)
            state.step += 1
            bar.update(images)
            if time.monotonic() - saved > _SAVE_SECONDS:
                now = time.monotonic()
                state.seconds, started = state.seconds + now - started, now
                keep(self.state())
                saved = time.monotonic()
        loss, correct = context.processes.total(state.sums, context.device) / len(order)
        seconds = state.seconds + time.monotonic() - started
        state.end_epoch()
        self._judge(Epoch(number, float(loss), state.history[0].val, seconds, float(correct)))

    def _one_step(self, batches: Sequence[tuple[NDArray[Any], Index]], images: int, number: int) -> NDArray[np.float64]:
        """Move the weights once; return the sums of losses and of correct predictions.

        Args:
            batches: this process's stored rows and their images, batch by batch.
            images: of the step, in all processes.
            number: of the epoch.
        """
        context, plan = self._context, self._context.plan
        sums = np.zeros(2)
        for place, (stored, index) in enumerate(batches):
            if not len(index):
                continue
            if plan.train_batchnorm:  # one image has no statistics: a last batch of one is normalised by the running ones
                set_training(context.model, train_batchnorm=len(index) > 1)
            rng = np.random.default_rng((context.seed, number, self._state.step, place, context.processes.rank))
            sums += self._backward(to_device(stored, context.device), index, images, rng)
        context.processes.sum_gradients(self._parameters)
        if plan.clip:
            self._scaler.unscale_(self._optimiser)  # the norm is that of true gradients
            nn.utils.clip_grad_norm_(self._parameters, plan.clip)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        self._schedule.step()
        self._optimiser.zero_grad(set_to_none=True)
        if self._average:
            self._average.update_parameters(context.model)
        return sums

    def _backward(self, rows: Tensor, index: Index, images: int, rng: np.random.Generator) -> tuple[float, int]:
        """Add a batch's gradients, its part of a step of so many images; return its loss and its correct predictions."""
        context, plan, dtype = self._context, self._context.plan, DTYPES[self._context.precision]
        y = torch.from_numpy(context.y[index]).to(context.device)
        if plan.augment and rows.dtype == torch.uint8:
            rows = flipped_and_shifted(rows, rng)
        partners_y, share = y, 1.0
        if plan.mixup:
            rows, partners, share = mixed(rows, plan.mixup, rng)
            partners_y = y[partners]
        with torch.autocast(context.device.type, dtype, enabled=dtype is not None):
            logits = context.model(rows).float()  # the loss in float32 whatever the step's precision
            loss = self._cross_entropy(logits, (y, partners_y), share, plan.label_smoothing)
        # by the images of the whole step, not of the batch: accumulated, or of several processes, it is the same gradient
        self._scaler.scale(loss / images).backward()  # type: ignore[no-untyped-call]
        # what is told is validation's loss, without smoothing: the two curves of a picture are then comparable
        told = self._cross_entropy(logits.detach(), (y, partners_y), share, 0.0)
        return told.item(), int((logits.argmax(dim=1) == y).sum())

    @staticmethod
    def _cross_entropy(logits: Tensor, y: tuple[Tensor, Tensor], share: float, smoothing: float) -> Tensor:
        """Return the summed loss of a share of one class and the rest of another."""
        losses = [F.cross_entropy(logits, each, label_smoothing=smoothing, reduction="sum") for each in y[: 1 + (share < 1)]]
        return losses[0] if share == 1 else share * losses[0] + (1 - share) * losses[1]

    def _judge(self, trained: Epoch) -> None:
        """Validate after an epoch, and keep the weights where they are the ones to keep so far (``kept``)."""
        state, epoch = self._state, trained
        if not math.isfinite(trained.train_loss or 0.0):
            raise DivergedError
        model: SuffixAndHead = self._average.module if self._average else self._context.model  # type: ignore[assignment]
        start = state.history[0]
        val, scaled = self._context.validate(self._val, model) if self._val is not None else (start.val, start.scaled_loss)
        epoch = replace(trained, val=val, scaled_loss=scaled)
        state.history.append(epoch)
        if self._val is None or kept(state.history, len(self._val)) == epoch.number:
            state.best, state.weights = epoch, copy.deepcopy(model.state_dict())
        loss = val.log_loss if val.log_loss is not None else math.inf
        gained = val.accuracy > state.highest or loss < state.lowest or self._val is None
        state.stale = 0 if gained else state.stale + 1
        state.highest, state.lowest = max(state.highest, val.accuracy), min(state.lowest, loss)


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed dropout; whoever trains takes care that the caller's generators are put back."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def parameter_groups(
    stages: Sequence[Sequence[nn.Parameter]], head: nn.Linear, plan: FineTunePlan, lr: float
) -> list[Group]:
    """Return an optimiser's groups: each stage its rate, the head its own, no weight decay for vectors (norms, biases).

    Args:
        stages: the parameters that train, stage by stage, in forward order.
        head: the linear head.
        plan: its rate, and the factor from each stage to the one before.
        lr: the last stage's rate.
    """
    groups: list[Group] = []
    for depth, tensors in enumerate(reversed(stages)):
        rate = lr * plan.layer_decay**depth
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() > 1], "lr": rate})
        groups.append({"params": [tensor for tensor in tensors if tensor.dim() <= 1], "lr": rate, "weight_decay": 0.0})
    groups.append({"params": [head.weight], "lr": plan.head_lr})
    groups.append({"params": [head.bias], "lr": plan.head_lr, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def make_optimiser(groups: Sequence[Group], plan: FineTunePlan) -> torch.optim.Optimizer:
    """Return the plan's optimiser, which reads and writes each weight once a step."""
    # fused: otherwise every operation of the update is a pass over all weights
    if plan.optimiser == "sgd":
        return torch.optim.SGD(groups, momentum=_MOMENTUM, weight_decay=plan.weight_decay, fused=True)
    kind = torch.optim.AdamW if plan.optimiser == "adamw" else torch.optim.Adam
    return kind(groups, weight_decay=plan.weight_decay, fused=True)


def rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rates: a linear rise over a share of the steps, then a half cosine to zero."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))
