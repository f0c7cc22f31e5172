"""Decode image files into the pixels that a backbone sees: uint8 (views, size, size, 3)."""

import hashlib
import io
import math
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from featcache.errors import UnreadableSample
from featcache.specs import Transform, Views

MAX_MEGAPIXELS = 50.0
_MAX_SHRUNK_MEGAPIXELS = 250.0  # of a JPEG that libjpeg shrinks as it decodes, a few lines at a time
_MAX_SIDE = 1 << 17  # Pillow keeps a pointer for each line: 49 million lines of one pixel take a gigabyte
_PNG, _ICON = b"\x89PNG\r\n\x1a\n", b"\0\0\1\0"
# Formats that Pillow reads by itself: others, such as EPS, would start another program on a file's content.
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "BMP", "DIB", "GIF", "TIFF", "PPM", "TGA", "ICO")
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class _Box:
    """The part of an image that a view shows, in pixels."""

    x_from: float
    y_from: float
    x_to: float
    y_to: float
    flip: bool = False


@dataclass(frozen=True)
class ImagePreprocess:
    """Image files to pixels, uint8 (views, size, size, 3), by a transform."""

    spec: Transform
    dtype = np.dtype(np.uint8)
    input_name = "pixels"

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one view."""
        return (self.spec.input_size, self.spec.input_size, 3)

    def __call__(self, content: bytes, views: Views) -> NDArray[np.uint8]:
        """Return an image's views; see ``decode``."""
        return decode(content, self.spec, views)


class UnreadableImage(UnreadableSample):
    """An image cannot be used; the text says why."""


def decode(content: bytes, transform: Transform, views: Views | None = None) -> NDArray[np.uint8]:
    """Return one image's pixels, uint8 (views, input_size, input_size, 3), RGB.

    The first frame of an animation; EXIF orientation ignored and alpha dropped, as timm and torchvision do; 16-bit
    grey by its high byte.

    Raises:
        UnreadableImage: the bytes are no image, a truncated one, one of more than 50 megapixels (250 where a JPEG can be
            shrunk as it is decoded) or with a side of more than 131,072 pixels.
        MemoryError: there is no room to decode it.
    """
    return _decoded(content, transform, views or Views())[0]


def decode_both(
    content: bytes, transform: Transform, views: Views, thumbnail: Transform
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return what ``decode`` returns, and one view by another transform, ``None`` where that cannot be made.

    The image is decoded once, unless libjpeg would shrink it differently for the two: rows are those of passes apart.

    Raises:
        UnreadableImage: as of ``decode``, of the first transform.
        MemoryError: there is no room to decode it.
    """
    pixels, beside = _decoded(content, transform, views, thumbnail)
    if beside is None:
        with suppress(UnreadableImage):  # its own pass says why
            beside = decode(content, thumbnail)
    return pixels, beside


def _decoded(
    content: bytes, transform: Transform, views: Views, thumbnail: Transform | None = None
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return the views by a transform, and one by the other where the same decoded image serves both."""
    try:
        with open_image(content) as image:
            full, beside, scaled = image.size, None, transform.decoder == "pillow-scaled"
            if is_large := image.width * image.height > MAX_MEGAPIXELS * 1e6 or max(full) > _MAX_SIDE:
                shrinks = scaled and image.format in {"JPEG", "MPO"} and _is_decoded_in_one_scan(content)
                require_size(*full, most=_MAX_SHRUNK_MEGAPIXELS if shrinks else MAX_MEGAPIXELS)
            boxes = [_evaluation_box(*full, transform)]
            if views.count > 1:
                boxes += _random_boxes(*full, content, views)
            is_shared = (
                thumbnail is not None
                and not is_large  # whether it may be decoded at all is then each transform's own question
                and _shrinkage(image, transform, boxes) == _shrinkage(image, thumbnail, [_evaluation_box(*full, thumbnail)])
            )
            if scaled:
                _decode_smaller(image, transform.input_size, boxes)
                require_size(*image.size)
            rgb = to_rgb(image)
            pixels = [_resized(rgb, full, box, transform) for box in boxes]
            if thumbnail is not None and is_shared:
                beside = _resized(rgb, full, _evaluation_box(*full, thumbnail), thumbnail)[None]
            return np.stack(pixels) if len(pixels) > 1 else pixels[0][None], beside
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError:
        raise UnreadableImage("empty file" if not content else "not an image file") from None
    except Image.DecompressionBombError:
        raise UnreadableImage(f"more than {MAX_MEGAPIXELS:.0f} megapixels") from None
    except Exception as error:  # Pillow's plug-ins raise anything on damaged files
        raise UnreadableImage(f"broken image ({str(error) or type(error).__name__})") from error


def encode(pixels: NDArray[np.uint8]) -> bytes:
    """Return pixels, uint8 (h, w), (h, w, 1) or (h, w, 3), as the bytes of an image file that holds them exactly.

    Raises:
        UnreadableImage: they have another shape or dtype.
    """
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise UnreadableImage(f"{pixels.dtype} of shape {pixels.shape}: uint8 (h, w) or (h, w, 3) is needed")
    kind = b"P5" if pixels.ndim == 2 else b"P6"
    return b"%s %d %d 255\n" % (kind, pixels.shape[1], pixels.shape[0]) + pixels.tobytes()


def encode_image(image: Image.Image) -> bytes:
    """Return an image in memory as the bytes of a file that holds its pixels exactly."""
    return encode(np.asarray(image if image.mode == "L" else to_rgb(image)))


@cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def open_image(content: bytes) -> Image.Image:
    """Open an image as ``Image.open`` does, but for its own limit on size, of which it also warns on stderr."""
    if content.startswith(_ICON):
        for width, height in _sizes_in_icon(content):
            require_size(width, height)
    for name in _known_formats():
        factory, accepts = Image.OPEN[name]
        try:
            if accepts is None or accepts(content[:16]) is True:
                return factory(io.BytesIO(content), "")
        except (SyntaxError, IndexError, TypeError, struct.error):
            continue  # it is of another format
    raise UnidentifiedImageError


def require_size(width: int, height: int, most: float = MAX_MEGAPIXELS) -> None:
    """Refuse an image that is too large to be decoded.

    Raises:
        UnreadableImage: so it is.
    """
    megapixels = width * height / 1e6
    if megapixels > most:
        raise UnreadableImage(f"{megapixels:.0f} megapixels, over the limit of {MAX_MEGAPIXELS:.0f}")
    if max(width, height) > _MAX_SIDE:
        raise UnreadableImage(f"{width} x {height} pixels, over the limit of {_MAX_SIDE} a side")


def _sizes_in_icon(content: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes that the images in an ICO file declare: Pillow decodes one as it opens the file."""
    for entry in range(6, 6 + 16 * int.from_bytes(content[4:6], "little"), 16):
        offset = int.from_bytes(content[entry + 12 : entry + 16], "little")
        head = content[offset : offset + 24]
        if head.startswith(_PNG) and len(head) == 24:
            yield struct.unpack(">II", head[16:24])
        elif len(head) >= 12:
            width, height = struct.unpack("<ii", head[4:12])
            yield abs(width), abs(height)


def _is_decoded_in_one_scan(content: bytes) -> bool:
    """Tell whether a JPEG has all its colours in one scan: else libjpeg keeps all of it in memory as it decodes."""
    place, colours = 2, -1
    while place + 4 < len(content) and content[place] == 0xFF:
        marker, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if marker in {0xC0, 0xC1}:
            colours = content[place + 9] if place + 9 < len(content) else -1
        if marker == 0xDA:
            return content[place + 4] == colours
        place += 1 if marker == 0xFF else 2 + length
    return False


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image with three channels of 8 bits.

    Raises:
        UnreadableImage: its levels have no known range.
    """
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "I" and image.format in {"PPM", "PNG"}:  # both have 16 bits at most, scaled to all of them
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise UnreadableImage(f"{image.mode}: 32 bits a pixel have no known range, convert it to 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _evaluation_box(width: int, height: int, transform: Transform) -> _Box:
    """Return the box that torchvision's resize-then-crop would look at: left, top, right, bottom, and no flip."""
    size = transform.input_size
    scaled = math.floor(size / transform.crop_pct)
    if transform.crop_mode == "squash":
        wide = high = scaled
    else:
        short = min(width, height)
        wide, high = int(scaled * width / short), int(scaled * height / short)
    x_from, y_from = round((wide - size) / 2), round((high - size) / 2)
    return _Box(
        x_from * width / wide,
        y_from * height / high,
        min((x_from + size) * width / wide, width),
        min((y_from + size) * height / high, height),
    )


def _random_boxes(width: int, height: int, content: bytes, views: Views) -> list[_Box]:
    digest = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    boxes = []
    for view in range(1, views.count):
        rng = np.random.default_rng([digest, views.seed, view])
        area, ratio = rng.uniform(0.25, 1.0) * width * height, math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        wide, high = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
        x_from, y_from = rng.uniform(0, width - wide), rng.uniform(0, height - high)
        boxes.append(
            _Box(x_from, y_from, min(x_from + wide, width), min(y_from + high, height), flip=bool(rng.random() < 0.5))
        )
    return boxes


def _decode_smaller(image: Image.Image, size: int, boxes: list[_Box]) -> None:
    """Let libjpeg scale a large JPEG down as it decodes, as far as no box falls below the size it is scaled to."""
    if (least := _least_size(image, size, boxes)) is not None:
        image.draft(None, least)


def _least_size(image: Image.Image, size: int, boxes: list[_Box]) -> tuple[int, int] | None:
    """Return the least size that a JPEG may be decoded at, ``None`` where it is to be decoded as it is."""
    if image.format not in {"JPEG", "MPO"} or image.mode not in {"RGB", "L", "CMYK"}:
        return None
    shrink = min(min(box.x_to - box.x_from, box.y_to - box.y_from) / size for box in boxes)
    return (math.ceil(image.width / shrink), math.ceil(image.height / shrink)) if shrink >= 2 else None


def _shrinkage(image: Image.Image, transform: Transform, boxes: list[_Box]) -> int:
    """Return by how much a transform lets libjpeg shrink an image as it decodes, by Pillow's rule: 1, 2, 4 or 8."""
    least = _least_size(image, transform.input_size, boxes) if transform.decoder == "pillow-scaled" else None
    if least is None:
        return 1
    scale = min(image.width // least[0], image.height // least[1])
    return next(step for step in (8, 4, 2, 1) if scale >= step)


def _resized(image: Image.Image, full: tuple[int, int], box: _Box, transform: Transform) -> NDArray[np.uint8]:
    """Crop and scale in one resampling step; the box is given in the undecoded image's pixels, ``full``."""
    size = transform.input_size
    across, down = image.width / full[0], image.height / full[1]
    edges = (box.x_from * across, box.y_from * down, min(box.x_to * across, image.width), min(box.y_to * down, image.height))
    if image.size != (size, size) or any(
        edge != full_edge for edge, full_edge in zip(edges, (0, 0, size, size), strict=True)
    ):
        image = image.resize((size, size), _RESAMPLING[transform.interpolation], box=edges)
    pixels = np.asarray(image)
    return pixels[:, ::-1] if box.flip else pixels
