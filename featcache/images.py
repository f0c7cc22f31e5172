"""Decode image files into the pixels that a backbone sees: uint8 (size, size, 3)."""

import io
import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featcache.specs import Transform

MAX_MEGAPIXELS = 50.0
# Formats that Pillow reads by itself: others, such as EPS, would start another program on a file's content.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "ICO")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class UnreadableImage(Exception):  # noqa: N818 - it names what was met, and becomes a reason in the quarantine list
    """An image cannot be used; the text says why."""


def decode(content: bytes, transform: Transform) -> NDArray[np.uint8]:
    """Return one image's pixels, uint8 (input_size, input_size, 3), RGB.

    The first frame of an animation; EXIF orientation ignored and alpha dropped, as timm and torchvision do; 16-bit
    grey by its high byte.

    Raises:
        UnreadableImage: the bytes are no image, a truncated one, or one of more than 50 megapixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_known_formats()) as image:
            megapixels = image.width * image.height / 1e6
            if megapixels > MAX_MEGAPIXELS:
                raise UnreadableImage(f"{megapixels:.0f} megapixels, over the limit of {MAX_MEGAPIXELS:.0f}")
            rgb = _to_rgb(image)
            return np.asarray(_crop_and_resize(rgb, transform))
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("empty file" if not content else "not an image file") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {MAX_MEGAPIXELS:.0f} megapixels") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(f"broken image ({error})") from error


@cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise UnreadableImage(f"{image.mode}: 32 bits a pixel have no known range, convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _crop_and_resize(image: Image.Image, transform: Transform) -> Image.Image:
    """Scale and crop in one resampling step; the box is where torchvision's resize-then-crop would look."""
    size = transform.input_size
    resampling = _RESAMPLING[transform.interpolation]
    scaled = math.floor(size / transform.crop_pct)
    if transform.crop_mode == "squash":
        wide = high = scaled
    else:
        short = min(image.size)
        wide, high = (int(scaled * side / short) for side in image.size)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    box: Any = (
        left * image.width / wide,
        top * image.height / high,
        min((left + size) * image.width / wide, image.width),
        min((top + size) * image.height / high, image.height),
    )
    if box == (0, 0, image.width, image.height) and image.size == (size, size):
        return image
    return image.resize((size, size), resampling, box=box)
