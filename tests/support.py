"""What tests draw and read."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TINY = ("-b", "test_resnet", "--random-init", "0", "--input-size", "32", "--batch-size", "8")
COLOURS = {"blue": (30, 40, 200), "green": (40, 180, 60), "red": (200, 50, 40)}


def draw_image(path: Path, colour: tuple[int, int, int], seed: int, size: tuple[int, int] = (40, 32)) -> None:
    """Write a noisy image of one colour; every seed gives other bytes."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(colour) + rng.normal(0, 60, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def draw_folder(root: Path, per_class: int = 12, first_seed: int = 0) -> Path:
    """Write a folder of three classes, ``per_class`` PNG images each."""
    for number, (name, colour) in enumerate(COLOURS.items()):
        for index in range(per_class):
            draw_image(root / name / f"{index:02d}.png", colour, first_seed + 1000 * number + index)
    return root


def draw_subtle(root: Path, per_class: int = 20) -> Path:
    """Write a folder of three classes of greys whose tints differ by a quarter of the noise: no probe is perfect."""
    for number, name in enumerate("abc"):
        tint = tuple(124 if channel == number else 110 for channel in range(3))
        for index in range(per_class):
            draw_image(root / name / f"{index:02d}.png", (tint[0], tint[1], tint[2]), 1000 * number + index)
    return root


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its standard output as one JSON object."""
        loaded: dict[str, Any] = json.loads(self.out)
        return loaded


Run = Callable[..., Outcome]  # what the fixture ``run`` is: a command's words to how it ended
