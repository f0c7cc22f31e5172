"""What an image shows in small, without a backbone: tiles for a page, measures for baselines, altered copies."""

import base64
import io
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featcache.datasets.images import UnreadableImage, decode, encode_image, open_image, require_size, to_rgb
from featcache.specs import Transform

TILE = 72  # pixels a side
COLUMNS = 25
SIDE = 32  # pixels of the thumbnails that baselines look at
_SMALL_SIDE = 16
STATISTICS, SMALL = (
    "image statistics",
    f"{_SMALL_SIDE} x {_SMALL_SIDE} pixels",
)  # as tables and records call what is fitted on them
_QUALITIES = (72, 60, 48, 36, 24, 12)

_BLANK, _DARK, _BRIGHT = 3.0, 16.0, 239.0  # levels of 255: the spread of a blank image; means of dark and bright ones
_AT_ONCE = 4096  # images: 100 MB
_TINY = 0.25  # of the median image's shorter side
_LONG = 3.0  # times as long as it is high, or the reverse, where the median image is not


@dataclass(frozen=True)
class Sheet:
    """Tiles in rows of ``COLUMNS``, in the order of their numbers, as the bytes of one WebP file."""

    content: bytes
    count: int

    @property
    def style(self) -> str:
        """The declaration of a style that draws it: a page loads nothing, so that the sheet itself is in it."""
        return f'background-image:url("data:image/webp;base64,{base64.b64encode(self.content).decode()}")'

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


def statistics(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return each image's mean, spread and quantiles by channel, and how strong its edges are (n, 23)."""
    pixels = thumbnails.astype(np.float32) / 255
    flat = pixels.reshape(len(pixels), -1, 3)
    quantiles = np.quantile(flat, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)
    grey = pixels.mean(axis=3)
    edges = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    columns = [flat.mean(axis=1), flat.std(axis=1), *quantiles, np.stack(edges, axis=1)]
    return np.concatenate(columns, axis=1).astype(np.float32)


def small_rows(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images averaged to 16 x 16 pixels, as one row each (n, 768)."""
    step = SIDE // _SMALL_SIDE
    small = thumbnails.reshape(len(thumbnails), _SMALL_SIDE, step, _SMALL_SIDE, step, 3).mean(axis=(2, 4)).astype(np.float32)
    rows: NDArray[np.float32] = small.reshape(len(small), -1) / np.float32(255)
    return rows


def measures(thumbnails: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return what can be measured of images without looking at what they show, columns (n, m) by name.

    Args:
        thumbnails: uint8 (n, side, side, 3).
        sizes: width, height and bytes of each one's file (n, 3), 0 where they are not known.
    """
    wide, high, weight = np.log(np.maximum(sizes, 1)).T
    edges = [thumbnails[:, 0], thumbnails[:, -1], thumbnails[:, :, 0], thumbnails[:, :, -1]]
    return {
        "image size": np.stack([wide, high], axis=1),
        "aspect ratio": (wide - high)[:, None],
        "file size": weight[:, None],
        "brightness": levels(thumbnails),
        "border colour": np.concatenate([edge.mean(axis=1) for edge in edges], axis=1),
    }


@dataclass(frozen=True)
class Exif:
    """What a camera noted in an image's file, of what could give a class away; the defaults are of images without notes.

    Attributes:
        camera: its make and model.
        orientation: 1 to 8, as EXIF numbers them.
        day: when it was taken, in days of the proleptic Gregorian calendar.
        has_place: whether it says where.
    """

    camera: str = ""
    orientation: int = 0
    day: float = 0.0
    has_place: bool = False


_MAKE, _MODEL, _ORIENTATION, _CHANGED, _DETAILS, _TAKEN, _PLACE = 0x10F, 0x110, 0x112, 0x132, 0x8769, 0x9003, 0x8825
_CAMERAS = 30  # the commonest are told apart: one that a few images have tells nothing of a class


def exif_of(content: bytes) -> Exif:
    """Return what a camera noted in an image's file; nothing where that cannot be read."""
    try:
        with open_image(content) as image:
            # not image.getexif(): that decodes a whole PNG to look for notes behind its pixels
            raw = image.info.get("exif")
        if not raw:
            return Exif()
        notes = Image.Exif()
        notes.load(raw)
        taken = notes.get_ifd(_DETAILS).get(_TAKEN) or notes.get(_CHANGED) or ""
        camera = " ".join(str(notes.get(tag, "")).strip("\0 ") for tag in (_MAKE, _MODEL)).strip()
        orientation = notes.get(_ORIENTATION, 0)
        return Exif(camera, orientation if orientation in range(1, 9) else 0, _day_of(str(taken)), bool(notes.get(_PLACE)))
    except Exception:  # noqa: BLE001 - as of ``size_of``: notes of any kind come from strangers' files
        return Exif()


def _day_of(text: str) -> float:
    with suppress(ValueError):
        taken = datetime.strptime(text.strip("\0 "), "%Y:%m:%d %H:%M:%S")  # noqa: DTZ007 - EXIF knows no zone
        return taken.toordinal() + taken.hour / 24
    return 0.0


def exif_measures(notes: Sequence[Exif]) -> dict[str, NDArray[np.float64]]:
    """Return what cameras noted as columns (n, 1) by name."""
    common = [camera for camera, _ in Counter(note.camera for note in notes).most_common(_CAMERAS)]
    number = {camera: place for place, camera in enumerate(common)}
    columns = {
        "EXIF camera": [number.get(note.camera, _CAMERAS) for note in notes],
        "EXIF orientation": [note.orientation for note in notes],
        "EXIF date": [note.day for note in notes],
        "EXIF place given": [note.has_place for note in notes],
    }
    return {name: np.array(values, np.float64)[:, None] for name, values in columns.items()}


ALTERATIONS = ("encoded", "resized", "encoded and resized", "mirrored")
_QUALITY, _SHRUNK = 70, 0.9


def altered(content: bytes, how: str) -> bytes:
    """Return an image as a copy of it has come to look: encoded again, resized by 10 %, both, or mirrored and encoded.

    Raises:
        UnreadableImage: as of ``decode``.
    """
    try:
        with open_image(content) as opened:
            require_size(*opened.size)
            image = to_rgb(opened)
            if how == "mirrored":
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if "resized" in how:
                size = (max(1, round(_SHRUNK * image.width)), max(1, round(_SHRUNK * image.height)))
                image = image.resize(size, Image.Resampling.BICUBIC)
            if how == "resized":
                return encode_image(image)
            out = io.BytesIO()
            image.save(out, "JPEG", quality=_QUALITY)
            return out.getvalue()
    except (UnreadableImage, MemoryError):
        raise
    except Exception as error:  # as of ``decode``
        raise UnreadableImage(f"broken image ({str(error) or type(error).__name__})") from error


def size_of(content: bytes) -> tuple[int, int]:
    """Return an image's width and height from its header, (0, 0) where that cannot be read."""
    try:
        with open_image(content) as image:
            return image.size
    except Exception:  # noqa: BLE001 - as of ``decode``: what is broken is in quarantine, and has its reason there
        return 0, 0


def oddities(thumbnails: NDArray[np.uint8], sizes: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Return which images are of which oddity (n,): blank, dark, bright, tiny, long.

    Args:
        thumbnails: uint8 (n, 32, 32, 3).
        sizes: width and height (n, 2), 0 where they are not known.
    """
    level, spread = levels(thumbnails).T
    is_blank = spread < _BLANK
    wide, high = np.maximum(sizes.T.astype(np.float64), 1e-9)
    shorter, stretch = np.minimum(wide, high), np.abs(np.log(wide / high))
    is_sized = (sizes > 0).all(axis=1)
    usual_side, usual_stretch = (
        float(np.median(values[is_sized])) if is_sized.any() else 0.0 for values in (shorter, stretch)
    )
    return {
        "blank": is_blank,
        "dark": ~is_blank & (level < _DARK),
        "bright": ~is_blank & (level > _BRIGHT),
        "tiny": is_sized & (shorter < _TINY * usual_side),
        "long": is_sized & (stretch > np.log(_LONG)) & (usual_stretch < np.log(_LONG)),
    }


def levels(thumbnails: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the mean and the spread of each image's levels (n, 2)."""
    flat = thumbnails.reshape(len(thumbnails), -1)
    # some at a time: numbers of floating point take eight times the memory of pixels
    blocks = [flat[start : start + _AT_ONCE] for start in range(0, len(flat), _AT_ONCE)]
    parts = [np.stack([block.mean(axis=1), block.std(axis=1)], axis=1) for block in blocks]
    return np.concatenate(parts) if parts else np.empty((0, 2))
