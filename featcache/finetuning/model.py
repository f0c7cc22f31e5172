"""What is trained: the part of a backbone behind a cut, opened, and a linear head; the files it is kept in."""

import copy
import io
import json
import mmap
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from featcache.backbones.base import OWN_HEAD, Backbone
from featcache.backbones.timm_models import trainable_copy
from featcache.display import logger
from featcache.errors import FeatcacheError
from featcache.evaluation.splits import Index
from featcache.finetuning.unfreezing import Trainable, add_lora, fold_norms
from featcache.specs import INPUT
from featcache.store.atomic import make_folder, remove_file, replace_file, replace_file_by
from featcache.store.checksums import is_signed, sign

_SHIFT = 1 / 8  # of a side: the 4 of 32 pixels of He et al. 2016
Take = Callable[[Index], NDArray[Any]]


@dataclass(frozen=True)
class LinearHead:
    """A linear map from embeddings to logits: weights (classes, d), bias (classes,)."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """A backbone's weights and a head; no weights where they are those that the backbone has anyway."""

    weights: dict[str, Tensor]
    head: LinearHead


class SuffixAndHead(nn.Module):
    """What follows the cut: stored activations (b, ...) -> logits (b, classes)."""

    def __init__(self, suffix: nn.Module, head: LinearHead) -> None:
        super().__init__()
        self.suffix = suffix
        self.head = nn.Linear(head.weights.shape[1], head.weights.shape[0])
        self.set_head(head)

    def set_head(self, head: LinearHead) -> None:
        """Make the head compute what a linear head computes."""
        with torch.no_grad():
            self.head.weight.copy_(torch.from_numpy(head.weights))
            self.head.bias.copy_(torch.from_numpy(head.bias))

    def linear_head(self) -> LinearHead:
        """Return the head as it is now."""
        weights, bias = (value.detach().double().cpu().numpy().copy() for value in (self.head.weight, self.head.bias))
        return LinearHead(weights, bias)

    def embed(self, stored: Tensor) -> Tensor:
        """Return the embeddings (b, d)."""
        if stored.is_floating_point():  # pixels and token ids are taken as they are stored
            stored = stored.float()
            if stored.dim() == 4 and stored.shape[-1] != 3:  # pixels, even as floats, have their channels last
                # rows are stored channels first, convolutions are faster on channels last: copied once, here
                stored = stored.contiguous(memory_format=torch.channels_last)
        return self.suffix(stored).flatten(1)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        return self.head(self.embed(stored))  # type: ignore[no-any-return]


@dataclass(frozen=True)
class OpenNetwork:
    """A copy of a backbone that is open for training.

    Attributes:
        backbone: the copy, whose parameters the model shares.
        trainable: which of them train.
        model: what follows the cut, and the head.
        stages: the parameters that train, stage by stage, in forward order; of low-rank updates, theirs.
    """

    backbone: Backbone
    trainable: Trainable
    model: SuffixAndHead
    stages: tuple[tuple[nn.Parameter, ...], ...]

    def copied(self) -> Network:
        """Return the weights and the head as they are; low-rank updates are no part of the weights yet."""
        weights = {} if self.trainable.spec.what == "lora" else copy.deepcopy(self.backbone.module.state_dict())
        return Network(weights, self.model.linear_head())


def open_up(
    backbone: Backbone, trainable: Trainable, cut: str, start: Network, *, drop_path: float = 0.0, seed: int = 0
) -> OpenNetwork:
    """Return a copy of a backbone, as a network at its start, in which the trainable parameters train and no others.

    Args:
        backbone: is left as it is.
        trainable: what trains.
        cut: what is before it is left out of the model.
        start: weights and head.
        drop_path: stochastic depth.
        seed: of the random half of low-rank updates.

    Raises:
        SetupError: low-rank updates need peft.
        UsageError: no layer can take one.
    """
    separate = trainable_copy(backbone, drop_path)
    if start.weights:
        separate.module.load_state_dict(start.weights)
    model = SuffixAndHead(separate.suffix(cut), start.head).to(separate.device)
    named = dict(separate.module.named_parameters())
    for parameter in (*model.parameters(), *named.values()):
        parameter.requires_grad_(False)
    if trainable.spec.what == "lora":
        weights = {id(named[name]): stage.name for stage in trainable.stages for name in stage.parameters}
        blank = torch.from_numpy(separate.example_inputs(1)).to(separate.device)  # untraced, it takes prepared samples
        if separate.spec.samples == "text" and cut != INPUT:  # never traced, it takes what is stored
            (blank,) = separate.program((cut,))(blank)
        by_stage: dict[str, list[nn.Parameter]] = {stage.name: [] for stage in trainable.stages}
        for weight, parameters in add_lora(model.suffix, weights, trainable.spec.rank, seed, blank):
            by_stage[weights[weight]] += parameters
        stages = tuple(tuple(parameters) for parameters in by_stage.values())
    else:
        stages = tuple(tuple(named[name] for name in stage.parameters) for stage in trainable.stages)
        fold_norms(model.suffix)
    for parameter in (*model.head.parameters(), *(parameter for stage in stages for parameter in stage)):
        parameter.requires_grad_(True)
    return OpenNetwork(separate, trainable, model, stages)


def has_batchnorm(network: OpenNetwork) -> bool:
    """Tell whether statistics of batches could move in what trains."""
    return bool(_moving_norms(network.model))


def _moving_norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001 - no public name
        and any(parameter.requires_grad for parameter in module.parameters())
    ]


def settle_batchnorm(model: SuffixAndHead, take: Take, index: Index, batch_size: int) -> bool:
    """Let BatchNorm statistics of what trains be those of some rows (k,) alone; tell whether there are any such.

    AdaBN (Li et al. 2016, arXiv 1603.04779, section 3.2): where statistics are to move anyway, the first batches would throw
    out a head that was fitted on features under the old ones.
    """
    norms = _moving_norms(model)
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


def chunks(index: Index, size: int) -> Iterator[Index]:
    """Yield the positions in consecutive chunks of ``size``, the last one shorter."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


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


_STATE = b"featcache: state of a training\n"  # what a signature is for
_SIGNATURE = 64  # hexadecimal digits
_LAYOUT = 4  # of a training's state: one of an older version is begun again


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


def save_checkpoint(module: nn.Module, model: SuffixAndHead, path: Path, facts: dict[str, Any]) -> Path:
    """Write the whole tuned network as safetensors, under timm's own names where its classifier is one linear layer.

    Args:
        module: the backbone, whose parameters the model has trained.
        model: its head is written.
        path: of the file.
        facts: kept in its metadata.

    Raises:
        StorageError: the disk failed.
    """
    module = copy.deepcopy(module)
    classes = model.head.out_features
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()}
    classifier = _timm_classifier(module, classes, model.head.in_features)
    if classifier is None:
        state = module.state_dict() | {f"{OWN_HEAD}{name}": value for name, value in head.items()}
    else:
        classifier.load_state_dict(head)
        state = module.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    make_folder(path.parent)
    replace_file(path, save_safetensors(tensors, metadata={"featcache": json.dumps(facts)}))
    return path


def _timm_classifier(module: nn.Module, classes: int, width: int) -> nn.Linear | None:
    """Return a module's classifier, set to so many classes; ``None`` where it is no one linear layer of that width."""
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        return None
    trial = copy.deepcopy(module)  # some architectures' classifiers have layers before the last: those are left as they are
    trial.reset_classifier(classes)  # type: ignore[operator]
    classifier = trial.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear) or classifier.in_features != width:
        return None
    reset(classes)
    classifier = module.get_classifier()  # type: ignore[operator]
    return classifier if isinstance(classifier, nn.Linear) else None
