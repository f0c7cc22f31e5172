"""The frozen part of a backbone as runtimes execute it, and PyTorch, the runtime that is always there."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from featcache.errors import SetupError
from featcache.progress import logger
from featcache.specs import Precision, Transform

Pixels = NDArray[np.uint8]
Outputs = tuple[NDArray[Any], ...]


class FrozenPrefix(nn.Module):
    """The frozen part as runtimes execute it: pixels uint8 (b, h, w, 3) -> a tuple of activations, one a cut.

    ``body`` gives one tensor a layer, ``finish`` turns each into what is stored, ``spans`` says how many layers are
    concatenated into each cut's row.
    """

    def __init__(self, normalise: "Normalise", body: nn.Module, finish: Sequence[nn.Module], spans: Sequence[int]) -> None:
        super().__init__()
        self.normalise = normalise
        self.body = body
        self.finish = nn.ModuleList(finish)
        self.spans = tuple(spans)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the activations of each cut."""
        tensors = self.body(self.normalise(pixels).contiguous(memory_format=torch.channels_last))
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        finished = [step(tensor) for step, tensor in zip(self.finish, tensors, strict=True)]
        rows, start = [], 0
        for span in self.spans:
            rows.append(finished[start] if span == 1 else torch.cat(finished[start : start + span], 1))
            start += span
        return tuple(rows)


class Normalise(nn.Module):
    """Pixels, uint8 (b, h, w, 3), to what the backbone expects, float32 (b, 3, h, w), on the pixels' device."""

    scale: Tensor
    shift: Tensor

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (transform.mean, transform.std))
        self.register_buffer("scale", 1 / (255 * std), persistent=False)
        self.register_buffer("shift", -mean / std, persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the normalised images."""
        images = pixels.permute(0, 3, 1, 2).float()
        return images * self.scale + self.shift


class TorchRuntime:
    """PyTorch as it is. Out of memory on the device it halves the batch, for good."""

    def __init__(self, program: nn.Module, device: torch.device, precision: Precision) -> None:
        self._program = program
        self._device = device
        self._dtype = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
        self._turn = threading.Lock()
        self._piece = 0

    def __call__(self, pixels: Pixels) -> Outputs:
        """Return the activations of a batch, uint8 (b, h, w, 3)."""
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=self._dtype is not None):
            if self._device.type == "cpu":
                return tuple(to_array(output) for output in self._whole(torch.from_numpy(pixels)))
            images = torch.from_numpy(pixels).pin_memory()
            with self._turn:
                outputs = self._whole(images.to(self._device, non_blocking=True))
                copies = [output.float().to("cpu", non_blocking=True) for output in outputs]
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
            done.synchronize()
            return tuple(to_array(copy) for copy in copies)

    def _whole(self, images: Tensor) -> tuple[Tensor, ...]:
        while True:
            size = self._piece or len(images)
            try:
                pieces = [as_tuple(self._program(piece)) for piece in torch.split(images, size)]
                return tuple(torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces, strict=True))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise SetupError(f"`device` {self._device}: its memory does not hold one image's activations.") from None
                self._piece = size // 2
                logger.warning("out of memory on %s: going on with %d images at a time", self._device, self._piece)
                if self._device.type == "cuda":
                    torch.cuda.empty_cache()


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return one tensor, or several, as a tuple."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


def to_array(output: Tensor) -> NDArray[Any]:
    """Return a tensor on the CPU as a float32 array, its memory in order."""
    return output.float().contiguous().numpy()
