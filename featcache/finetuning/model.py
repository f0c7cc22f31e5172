"""What is trained: the part of a backbone behind a cut, and a linear head; and what is drawn of its stored rows."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.evaluation.splits import Index

_SHIFT = 1 / 8  # of a side: the 4 of 32 pixels of He et al. 2016
Take = Callable[[Index], NDArray[Any]]


@dataclass(frozen=True)
class LinearHead:
    """A linear map from embeddings to logits: weights (classes, d), bias (classes,)."""

    weights: NDArray[np.float64]
    bias: NDArray[np.float64]


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
        if stored.dtype != torch.uint8:
            stored = stored.float()
            if stored.dim() == 4 and stored.shape[-1] != 3:  # pixels, even as floats, have their channels last
                # rows are stored channels first, convolutions are faster on channels last: copied once, here
                stored = stored.contiguous(memory_format=torch.channels_last)
        return self.suffix(stored).flatten(1)  # type: ignore[no-any-return]

    def forward(self, stored: Tensor) -> Tensor:
        """Return the logits (b, classes)."""
        return self.head(self.embed(stored))  # type: ignore[no-any-return]


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
