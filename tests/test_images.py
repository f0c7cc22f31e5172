"""Decoding: equal to timm's transform where it can be, a reason where it cannot."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from featcache.datasets.decoding import SIDE, UnreadableImage, decode, encode, encode_image, small_rows, statistics
from featcache.specs import Transform, Views


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


@pytest.mark.parametrize(("largest", "scale"), [(65535, 1), (4095, 65535 / 4095), (256, 65535 / 256)])
def test_a_pgm_of_16_bits_is_read_by_its_own_range(largest: int, scale: float) -> None:
    """A PGM states its range: its greatest value is white, and it keeps its high byte like any 16-bit grey."""
    ramp = np.linspace(0, largest, 32 * 32).round().reshape(32, 32)
    content = b"P5 32 32 %d\n" % largest + ramp.astype(">u2").tobytes()

    got = decode(content, Transform(input_size=32))[0, :, :, 0]

    np.testing.assert_allclose(got, np.floor(ramp * scale / 256), atol=1)
    assert (got[0, 0], got[-1, -1]) == (0, 255)


def declared_png(width: int, height: int) -> bytes:
    """Return a grey PNG of zeros that is whole, whatever its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes((width + 1) * height), 1)
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def icon(*images: bytes) -> bytes:
    """Return an ICO file whose directory says 16 pixels of every image."""
    head, body = struct.pack("<HHH", 0, 1, len(images)), b""
    for image in images:
        head += struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), 6 + 16 * len(images) + len(body))
        body += image
    return head + body


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (icon(declared_png(13_000, 5_000)), "65 megapixels, over the limit of 50"),
        (icon(encoded(Image.new("RGBA", (16, 16)), "PNG"), declared_png(13_000, 5_000)), "65 megapixels"),
        (icon(struct.pack("<Iii", 40, 10_000, -20_000) + bytes(60)), "200 megapixels"),
        (declared_png(1, 200_000), "1 x 200000 pixels, over the limit of 131072 a side"),
        (declared_png(200_000, 1), "200000 x 1 pixels, over the limit"),
    ],
    ids=["icon", "icon's second", "icon's bitmap", "column", "row"],
)
def test_sizes_are_looked_at_before_anything_is_decoded(
    content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would take the memory is refused by what its header says; no pixel is decoded."""
    monkeypatch.setattr(Image.Image, "load", lambda _: pytest.fail("it was decoded"))

    with pytest.raises(UnreadableImage, match=reason):
        decode(content, Transform(input_size=16))


def test_an_icon_is_read() -> None:
    """An icon of a usual size is an image like others."""
    content = icon(encoded(Image.new("RGBA", (16, 16), (200, 10, 30, 255)), "PNG"))

    assert tuple(decode(content, Transform(input_size=8))[0, 0, 0]) == (200, 10, 30)


def test_a_photograph_over_the_limit_is_read_where_it_is_shrunk() -> None:
    """A JPEG of 64 megapixels is decoded at an eighth; exactly, or in several scans, it is refused. Nothing warns."""
    photograph = Image.new("L", (9248, 6936), 77)
    plain, progressive = (encoded(photograph, "JPEG", progressive=how) for how in (False, True))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decode(plain, Transform(input_size=64)) == 77).all()
        for content, transform in (
            (plain, Transform(64, decoder="pillow")),
            (progressive, Transform(64)),
            (plain, Transform(4096)),
        ):
            with pytest.raises(UnreadableImage, match="64 megapixels, over the limit of 50"):
                decode(content, transform)


def test_whatever_a_decoder_raises_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that no list names still is a reason; that memory ran out is left to who knows what else takes it."""
    for raised, expected in (
        (KeyError("tag"), UnreadableImage),
        (ZeroDivisionError(), UnreadableImage),
        (MemoryError(), MemoryError),
    ):
        monkeypatch.setattr(Image.Image, "convert", lambda *_, raised=raised: (_ for _ in ()).throw(raised))
        with pytest.raises(expected):
            decode(encoded(Image.new("L", (9, 9)), "PNG"), Transform(input_size=8))


@pytest.mark.parametrize("shape", [(9, 14, 3), (9, 14), (9, 14, 1)])
def test_pixels_in_memory_are_kept_exactly(shape: tuple[int, ...]) -> None:
    """Arrays become files that hold every pixel, grey ones as grey."""
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)

    with Image.open(io.BytesIO(encode(pixels))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels.reshape(shape[:2] if shape[-1] == 1 else shape))
    np.testing.assert_array_equal(encode_image(Image.fromarray(np.squeeze(pixels))), encode(pixels))


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)],
    ids=["floats", "four channels", "two channels", "one axis"],
)
def test_pixels_of_another_kind_are_refused(pixels: np.ndarray) -> None:
    """Floats have no known range, a fourth channel no known meaning: the reason says what there is."""
    with pytest.raises(UnreadableImage, match=rf"{pixels.dtype} of shape .*uint8 \(h, w\) or \(h, w, 3\) is needed"):
        encode(pixels)


def test_alpha_is_dropped_not_blended() -> None:
    """A pixel that is transparent keeps the colour that it has."""
    image = Image.new("RGBA", (20, 20), (200, 100, 50, 0))

    assert (decode(encoded(image, "PNG"), Transform(input_size=8)) == (200, 100, 50)).all()


def test_a_view_is_drawn_from_the_bytes_the_seed_and_its_number() -> None:
    """View 0 is the plain one; more views leave the first as they are; another seed or image gives others."""
    content, other = encoded(noise(60, 50), "PNG"), encoded(noise(60, 50, seed=1), "PNG")
    transform = Transform(input_size=24)

    three, five = (decode(content, transform, Views(count)) for count in (3, 5))

    np.testing.assert_array_equal(three[:1], decode(content, transform))
    np.testing.assert_array_equal(five[:3], three)
    assert all((five[i] != five[k]).any() for i in range(5) for k in range(i))
    assert (decode(content, transform, Views(3, seed=1))[1:] != three[1:]).any(axis=(1, 2, 3)).all()
    assert (decode(other, transform, Views(3)) != three).any(axis=(1, 2, 3)).all()


def test_views_show_a_quarter_to_all_of_the_image() -> None:
    """Of 200 views of a slope each shows a range of it that fits its share of the area, half of them mirrored."""
    ramp = np.tile(np.linspace(0, 255, 256).astype(np.uint8), (256, 1))
    views = decode(encode(ramp), Transform(input_size=32), Views(201))[1:, 16, :, 0].astype(int)

    width = np.abs(views[:, -1] - views[:, 0]) / 255
    mirrored = views[:, -1] < views[:, 0]

    assert width.min() > 0.9 * np.sqrt(0.25 * 3 / 4)  # the narrowest: a quarter of the area, three quarters as wide as high
    assert width.max() <= 1
    assert 0.35 < mirrored.mean() < 0.65


@pytest.mark.parametrize("size", [(1600, 1200), (900, 2000)])
def test_a_photograph_decoded_smaller_looks_the_same(size: tuple[int, int]) -> None:
    """Shrinking by libjpeg moves pixels by one or two of 255 levels on average; small photographs are not shrunk."""
    photograph = encoded(noise(*size), "JPEG", quality=95)
    small = encoded(noise(size[0] // 8, size[1] // 8), "JPEG", quality=95)
    scaled, exact = Transform(input_size=96), Transform(input_size=96, decoder="pillow")

    difference = np.abs(decode(photograph, scaled).astype(int) - decode(photograph, exact))

    assert difference.max() <= 12
    assert difference.mean() <= 2
    np.testing.assert_array_equal(decode(small, scaled), decode(small, exact))


@pytest.mark.parametrize("n", [1, 2, 50])
def test_measures_of_thumbnails_are_their_plain_formulas(n: int) -> None:
    """However they are summed and sorted, statistics are means, deviations, quantiles and edges; small rows are means."""
    thumbnails = np.stack([np.asarray(noise(SIDE, SIDE, seed)) for seed in range(n)])
    pixels = thumbnails.reshape(n, -1, 3) / 255
    grey = thumbnails.mean(axis=3) / 255
    edges = [np.abs(np.diff(grey, axis=axis)).mean(axis=(1, 2)) for axis in (1, 2)]
    quantiles = np.quantile(pixels, (0.05, 0.25, 0.5, 0.75, 0.95), axis=1)

    expected = np.concatenate([pixels.mean(axis=1), pixels.std(axis=1), *quantiles, np.stack(edges, axis=1)], axis=1)
    np.testing.assert_allclose(statistics(thumbnails), expected, rtol=1e-5)
    small = thumbnails.reshape(n, 16, 2, 16, 2, 3).mean(axis=(2, 4)).reshape(n, -1) / 255
    np.testing.assert_allclose(small_rows(thumbnails), small, rtol=1e-6)
