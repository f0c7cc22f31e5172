"""Decoding: equal to timm's transform where it can be, a reason where it cannot."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.images import UnreadableImage, decode
from featcache.specs import Transform


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return an image that is smooth enough to compare resampling on."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (199, 301), (224, 224), (64, 48), (33, 500)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.95])
def test_one_resampling_step_equals_timms_two(size: tuple[int, int], crop_pct: float) -> None:
    """Pixels are timm's resize and centre crop but for rounding: two of 255 at most, a fifth of one on average."""
    from timm.data import create_transform

    image = noise(*size)
    reference = create_transform((3, 96, 96), crop_pct=crop_pct, interpolation="bicubic", mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = reference(image).permute(1, 2, 0).numpy() * 255

    got = decode(encoded(image, "PNG"), Transform(input_size=96, crop_pct=crop_pct))[0]

    difference = np.abs(got - expected)
    assert got.shape == (96, 96, 3)
    assert difference.max() <= 2.01
    assert difference.mean() <= 0.3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    """Grey, palette, alpha and print colours are all read."""
    kind = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"

    assert decode(encoded(noise(40, 30).convert(mode), kind), Transform(input_size=16)).shape == (1, 16, 16, 3)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    """A 16-bit grey ramp keeps its range."""
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)

    got = decode(encoded(Image.fromarray(ramp), "PNG"), Transform(input_size=32))[0]

    np.testing.assert_array_equal(got[:, :, 0], ramp >> 8)


def test_animation_gives_its_first_frame() -> None:
    """Of several frames the first is read."""
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]

    got = decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), Transform(input_size=8))[0]

    assert tuple(got[0, 0]) == (255, 0, 0)


def test_orientation_is_ignored_as_in_timm() -> None:
    """EXIF orientation does not turn the image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = noise(60, 40)

    plain, turned = (decode(encoded(image, "JPEG", **more), Transform(input_size=16)) for more in ({}, {"exif": exif}))

    np.testing.assert_array_equal(plain, turned)


def test_squash_keeps_the_whole_image() -> None:
    """In squash mode nothing is cropped."""
    image = Image.new("RGB", (100, 20), "black")
    image.paste("white", (0, 0, 10, 20))

    assert decode(encoded(image, "PNG"), Transform(input_size=20, crop_mode="squash"))[0, 10, 0].min() > 200
    assert decode(encoded(image, "PNG"), Transform(input_size=20))[0, 10, 0].max() == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image"),
        (encoded(noise(200, 200), "JPEG")[:-900], "broken image"),
        (encoded(noise(200, 200), "PNG")[:2000], "broken image"),
        (encoded(noise(20, 20), "EPS"), "not an image"),
        (encoded(Image.new("1", (9000, 9000)), "PNG"), "81 megapixels"),
        (encoded(Image.new("F", (9, 9)), "TIFF"), "32 bits"),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "400 megapixels, over the limit of 50"),
    ],
    ids=["empty", "html", "cut jpeg", "cut png", "program", "huge", "float", "bomb"],
)
def test_a_bad_file_gives_its_reason(content: bytes, reason: str) -> None:
    """What cannot be used is refused with a reason, never read half."""
    with pytest.raises(UnreadableImage, match=reason):
        decode(content, Transform(input_size=16))
