"""Small pictures of images for a page: one sheet of square tiles, as one file."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.datasets.images import decode
from featcache.specs import Transform

TILE = 72  # pixels a side
COLUMNS = 25
_QUALITIES = (72, 60, 48, 36, 24, 12)


@dataclass(frozen=True)
class Sheet:
    """Tiles in rows of ``COLUMNS``, in the order of their numbers, as the bytes of one WebP file."""

    content: bytes
    count: int

    @property
    def rows(self) -> int:
        """How many rows of tiles it has."""
        return -(-self.count // COLUMNS)

    def place(self, tile: int) -> tuple[int, int]:
        """Return where a tile's left upper corner lies, in pixels."""
        return tile % COLUMNS * TILE, tile // COLUMNS * TILE


def thumbnail(content: bytes) -> NDArray[np.uint8]:
    """Return an image's middle as a tile, uint8 (TILE, TILE, 3); the limits of ``images.decode`` hold.

    Raises:
        UnreadableImage: as of ``images.decode``.
    """
    (tile,) = decode(content, Transform(input_size=TILE, crop_pct=1.0, interpolation="bilinear"))
    return np.asarray(tile)


def sheet_of(tiles: Sequence[NDArray[np.uint8]], most_bytes: int) -> Sheet:
    """Return tiles (TILE, TILE, 3) as one sheet, in the best quality that keeps it small enough, else in the least."""
    rows = -(-len(tiles) // COLUMNS)
    pixels = np.zeros((max(rows, 1), COLUMNS, TILE, TILE, 3), np.uint8)
    for number, tile in enumerate(tiles):
        pixels[divmod(number, COLUMNS)] = tile
    # tile by tile to line by line
    image = Image.fromarray(pixels.transpose(0, 2, 1, 3, 4).reshape(-1, COLUMNS * TILE, 3))
    content = b""
    for quality in _QUALITIES:
        out = io.BytesIO()
        image.save(out, "WEBP", quality=quality, method=2)
        content = out.getvalue()
        if len(content) <= most_bytes:
            break
    return Sheet(content, len(tiles))
