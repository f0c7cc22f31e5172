"""Images: files decoded into pixels, uint8 (views, size, size, 3), and what those show in small, without a backbone."""

import base64
import hashlib
import io
import math
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
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
_MAKE, _MODEL, _ORIENTATION, _CHANGED, _DETAILS, _TAKEN, _PLACE = 0x10F, 0x110, 0x112, 0x132, 0x8769, 0x9003, 0x8825
_CAMERAS = 30  # the commonest are told apart: one that a few images have tells nothing of a class
ALTERATIONS = ("encoded", "resized", "encoded and resized", "mirrored")
_QUALITY, _SHRUNK = 70, 0.9


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
    """Return an image's middle as a tile, uint8 (TILE, TILE, 3); the limits of ``decode`` hold.

    Raises:
        UnreadableImage: as of ``decode``.
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
    # NumPy sorts bytes by counting, where a stable order is asked for; of what is sorted, quantiles take a third of the time
    ordered = np.sort(np.ascontiguousarray(thumbnails.reshape(*flat.shape).swapaxes(1, 2)), axis=2, kind="stable")
    quantiles = np.quantile(ordered.astype(np.float32) / 255, (0.05, 0.25, 0.5, 0.75, 0.95), axis=2)
    # NumPy sums three neighbours at a time slowly: the same sums in the same order, along images, take a tenth of that
    by_place = np.ascontiguousarray(flat.swapaxes(0, 1))
    grey = (pixels[..., 0] + pixels[..., 1] + pixels[..., 2]) / np.float32(3)
    edges = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    columns = [by_place.mean(axis=0), by_place.std(axis=0), *quantiles, np.stack(edges, axis=1)]
    return np.concatenate(columns, axis=1).astype(np.float32)


def small_rows(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return images averaged to 16 x 16 pixels, as one row each (n, 768)."""
    step = SIDE // _SMALL_SIDE
    squares = thumbnails.astype(np.uint16).reshape(-1, _SMALL_SIDE, step, _SMALL_SIDE, step, 3)
    # sums of whole numbers are exact in any order: added as whole pictures they take a fifth of a mean over two axes
    total = np.sum([squares[:, :, row, :, column] for row in range(step) for column in range(step)], axis=0, dtype=np.uint16)
    rows: NDArray[np.float32] = total.reshape(len(thumbnails), -1).astype(np.float32) / np.float32(step**2) / np.float32(255)
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
