"""Augmentation that is valid at a cut: mixed rows anywhere, flips and shifts of pixels at the input."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SHIFT = 1 / 8


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
    return pixels[images, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns.copy())[:, None, :]]


def mixed(rows: Tensor, alpha: float, rng: np.random.Generator) -> tuple[Tensor, Tensor, float]:
    """Return rows (b, ...) each mixed with another, the others' positions (b,), and the share of the first.

    Zhang et al. 2018 (mixup) on pixels, Verma et al. 2019 (manifold mixup) on activations.
    """
    share = float(rng.beta(alpha, alpha))
    others = torch.from_numpy(rng.permutation(len(rows))).to(rows.device)
    rows = rows.float()
    return share * rows + (1 - share) * rows[others], others, share


def _reflected(positions: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    positions = np.abs(positions)
    return np.where(positions >= size, 2 * (size - 1) - positions, positions)
