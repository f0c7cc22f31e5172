"""Hostile data sets of every kind: functions that write one into an empty folder, and return what names it."""

import gzip
import io
import itertools
import os
import pickle
import socket
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from PIL import Image
from torchvision import datasets

NESTED = 200_000
CANARY = Path(tempfile.gettempdir()) / "featcache-canary"  # is there once a data set has run code

Case = Callable[[Path], str]
CASES: dict[str, Case] = {}


def case(name: str) -> Callable[[Case], Case]:
    """Enter a case: a function that writes a data set into an empty folder and returns what names it."""

    def enter(make: Case) -> Case:
        assert name not in CASES, name
        CASES[name] = make
        return make

    return enter


def pixels(count: int = 4) -> np.ndarray:
    """Return so many images, uint8 (count, 8, 9, 3)."""
    return np.random.default_rng(0).integers(0, 256, (count, 8, 9, 3), dtype=np.uint8)


def png(seed: int = 0) -> bytes:
    """Return an image file."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 9, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def bomb(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """Return a PNG file that declares a size, of zeros as far as 256 MiB go."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    rows = zlib.compress(bytes(min(256 << 20, (width * channels * depth // 8 + 1) * height)), 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# ---- HDF5 -----------------------------------------------------------------------------------------------------------


def hdf5(name: str, fill: Callable[[h5py.File], None], **how: Any) -> None:
    """Enter an HDF5 file."""

    def make(folder: Path) -> str:
        with h5py.File(folder / "x.h5", "w", **how) as file:
            fill(file)
        return str(folder / "x.h5")

    case(f"hdf5 {name}")(make)


def with_labels(**more: Any) -> Callable[[h5py.File], None]:
    """Fill a file with good images and labels, and what replaces or joins them."""

    def fill(file: h5py.File) -> None:
        for name, value in ({"images": pixels(), "labels": np.arange(4) % 2} | more).items():
            if callable(value):
                value(file, name)
            elif value is not None:
                file[name] = value

    return fill


def declared(shape: tuple[int, ...], dtype: Any = "u1", **how: Any) -> Callable[[h5py.File, str], None]:
    """Declare a dataset without writing it."""
    return lambda file, name: file.create_dataset(name, shape, dtype, **how)


hdf5("good", with_labels())
hdf5("empty dataspace of labels", with_labels(labels=h5py.Empty("i8")))
hdf5("empty dataspace of images", with_labels(images=h5py.Empty("u1")))
hdf5("scalar labels", with_labels(labels=7))
hdf5("scalar images", with_labels(images=np.uint8(7)))
hdf5("scalar names", with_labels(class_names=b"cat"))
hdf5("a terabyte of labels", with_labels(labels=declared((10**12,), chunks=(1024,))))
hdf5("a terabyte of another array", with_labels(other=declared((10**12,), chunks=(1024,))))
hdf5("a trillion images", with_labels(images=declared((10**12, 1, 1), chunks=(1024, 1, 1))))
hdf5("images of 28 GB", with_labels(images=declared((4, 100_000, 100_000, 3), chunks=(1, 1024, 1024, 3))))
hdf5("images of 0 pixels", with_labels(images=np.zeros((4, 0, 9, 3), "u1")))
hdf5("no image", with_labels(images=np.zeros((0, 8, 9, 3), "u1"), labels=np.zeros(0, "i8")))
hdf5("labels of another length", with_labels(labels=np.arange(5)))
hdf5("splits of another length", with_labels(splits=[b"train", b"test"]))
hdf5("splits of numbers", with_labels(splits=[1, 2, 3, 4]))
hdf5("NaN labels", with_labels(labels=[0.0, np.nan, 1.0, 0.0]))
hdf5("infinite labels", with_labels(labels=[0.0, np.inf, 1.0, 0.0]))
hdf5("complex labels", with_labels(labels=np.ones(4, "c16")))
hdf5("labels in rows", with_labels(labels=np.zeros((4, 3))))
hdf5("compound labels", with_labels(labels=np.zeros(4, [("a", "i4"), ("b", "f4")])))
hdf5("references", with_labels(labels=lambda file, name: file.create_dataset(name, (4,), h5py.ref_dtype)))
hdf5("regions", with_labels(labels=lambda file, name: file.create_dataset(name, (4,), h5py.regionref_dtype)))
hdf5("opaque labels", with_labels(labels=np.zeros(4, "V8")))
hdf5("enumerated labels", with_labels(labels=lambda f, n: f.create_dataset(n, (4,), h5py.enum_dtype({"A": 0, "B": 1}))))
hdf5("lists of numbers", with_labels(labels=lambda f, n: f.create_dataset(n, (4,), h5py.vlen_dtype("i4"))))
hdf5("names twice", with_labels(class_names=[b"cat", b"cat"]))
hdf5("too few names", with_labels(labels=[0, 1, 2, 3], class_names=[b"cat", b"dog"]))
hdf5("names that are no UTF-8", with_labels(class_names=[b"\xff\xfe", b"\x80"]))
hdf5("names of a megabyte", with_labels(class_names=[b"x" * 1_000_000, b"y"]))
hdf5("external link", with_labels(images=h5py.ExternalLink("/etc/passwd", "/x")))
hdf5("soft link to nothing", with_labels(images=h5py.SoftLink("/nothing")))
hdf5("soft link to itself", with_labels(images=h5py.SoftLink("/images")))
hdf5("external storage", with_labels(images=declared((4, 8, 9, 3), external=[("/etc/passwd", 0, 864)])))
hdf5("groups for arrays", lambda file: [file.create_group(name) for name in ("images", "labels")] and None)
ALL_IN_ONE = declared((2000, 1000, 1000), chunks=(2000, 1000, 1000), compression="gzip")
hdf5("a huge chunk of zeros", with_labels(images=ALL_IN_ONE))
hdf5("names of control characters", with_labels(labels=[b"\x1b[2J", b"\x1b]0;x\x07", b"a\nb", b"\r"]))
hdf5("floats for images", with_labels(images=np.zeros((4, 8, 9, 3), "f4")))
hdf5("text for images", with_labels(images=[b"a", b"b", b"c", b"d"]))
hdf5("a group of ten thousand", lambda file: [file.create_group(f"g{n}") for n in range(10_000)] and None, libver="latest")


@case("hdf5 one long text for every label")
def _(folder: Path) -> str:
    with h5py.File(folder / "x.h5", "w") as file:
        file["images"] = np.zeros((20_000, 1, 1), np.uint8)
        labels = file.create_dataset("labels", (20_000,), h5py.string_dtype())
        labels[:20] = "x" * 3_000_000
    return str(folder / "x.h5")


@case("hdf5 virtual")
def _(folder: Path) -> str:
    layout = h5py.VirtualLayout((4, 8, 9, 3), "u1")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", (4, 8, 9, 3))
    with h5py.File(folder / "x.h5", "w") as file:
        file.create_virtual_dataset("images", layout)
        file["labels"] = np.arange(4)
    return str(folder / "x.h5")


def damaged(kind: str, name: str, make: Case, damage: Callable[[bytearray], bytes]) -> None:
    """Enter a good file that is damaged."""

    def write(folder: Path) -> str:
        path = make(folder)
        file = Path(path.partition(":")[2] if ":" in path else path)
        file.write_bytes(damage(bytearray(file.read_bytes())))
        return path

    case(f"{kind} {name}")(write)


def flipped(content: bytearray, seed: int, count: int = 40) -> bytes:
    """Return a content with some bytes changed."""
    rng = np.random.default_rng(seed)
    for place in rng.integers(8, max(9, len(content)), count):
        content[min(place, len(content) - 1)] ^= int(rng.integers(1, 256))
    return bytes(content)


for _cut in (0, 7, 96, 700, 2000):
    damaged("hdf5", f"cut after {_cut}", CASES["hdf5 good"], lambda content, cut=_cut: bytes(content[:cut]))
for _seed in range(6):
    damaged("hdf5", f"flipped {_seed}", CASES["hdf5 good"], lambda content, seed=_seed: flipped(content, seed))


# ---- npz ------------------------------------------------------------------------------------------------------------


def npz(name: str, **arrays: Any) -> None:
    """Enter a .npz; arrays that are bytes are written as they are."""

    def make(folder: Path) -> str:
        content = {"images": pixels(), "labels": np.arange(4) % 2} | arrays
        with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
            for key, value in content.items():
                buffer = io.BytesIO()
                if isinstance(value, bytes):
                    archive.writestr(f"{key}.npy", value)
                elif value is not None:
                    np.save(buffer, value, allow_pickle=True)
                    archive.writestr(f"{key}.npy", buffer.getvalue())
        return str(folder / "x.npz")

    case(f"npz {name}")(make)


def header(shape: tuple[int, ...], dtype: str = "|u1", more: bytes = b"") -> bytes:
    """Return a .npy file's header that declares a shape."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": dtype, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + more


class Evil:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


npz("good")
npz("four terabytes of images", images=header((4, 1_000_000, 1_000_000)))
npz("four terabytes of labels", labels=header((1 << 42,)))
npz("a negative shape", labels=header((-4,)))
npz("a shape beyond integers", labels=header((1 << 62, 1 << 62)))
npz("a shape of a million axes", labels=header((1,) * 900))
npz("a header of nonsense", labels=b"\x93NUMPY\x01\x00\x46\x00" + b"(" * 70)
npz("a deep header", labels=b"\x93NUMPY\x01\x00\xff\xff" + b"[" * 65535)
npz("objects", labels=np.array([Evil()] * 4, dtype=object))
npz("scalar images", images=np.uint8(1))
npz("scalar labels", labels=np.int64(1))
npz("scalar names", class_names=np.str_("cat"))
npz("no labels", labels=None)
npz("NaN labels", labels=np.array([0, 1, np.nan, 1.0]))
npz("dates for labels", labels=np.array(["2020-01-01"] * 4, "M8[D]"))
npz("records for labels", labels=np.zeros(4, [("a", "i4")]))
npz("-1 beside names", labels=np.array([0, -1, 1, 0]), class_names=np.array(["cat", "dog"]))
npz("names twice", class_names=np.array(["cat", "cat"]))
npz("splits of nonsense", splits=np.array(["train", "test", "x", "y"]))
npz("images of 60 megapixels", images=np.zeros((1, 8000, 8000), np.uint8), labels=np.zeros(1))
npz("float images", images=np.zeros((4, 8, 9, 3)))
npz("images on their side", images=np.zeros((4, 3, 8, 9), np.uint8))
npz("splits without labels", train_images=pixels(), train_labels=np.arange(4), test_images=pixels())
OTHERS = np.zeros((2, 5, 5), np.uint8)
npz("splits of two shapes", train_images=pixels(), train_labels=np.arange(4), test_images=OTHERS, test_labels=[0, 1])
npz("surrogates in names", labels=np.array(["\ud800", "a", "b", "c"]))
npz("NUL in names", labels=np.array(["a\0b", "a", "b", "c"]))
npz("a bomb", images=None, labels=np.zeros(4), other=np.zeros(100 << 20, np.uint8))


@case("npz of 0 bytes")
def _(folder: Path) -> str:
    (folder / "x.npz").write_bytes(b"")
    return str(folder / "x.npz")


@case("npz that is a npy")
def _(folder: Path) -> str:
    with (folder / "x.npz").open("wb") as file:
        np.save(file, pixels())
    return str(folder / "x.npz")


@case("npz that is a pickle")
def _(folder: Path) -> str:
    (folder / "x.npz").write_bytes(pickle.dumps(Evil()))
    return str(folder / "x.npz")


@case("npz of two gigabytes of zeros")
def _(folder: Path) -> str:
    with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("images.npy", "w", force_zip64=True) as file:
            file.write(header((64, 8, 1 << 20)))
            for _ in range(512):
                file.write(bytes(1 << 20))
        with archive.open("labels.npy", "w") as file:
            np.save(file, np.zeros(64))
    return str(folder / "x.npz")


for _cut in (4, 30, 300, 900):
    damaged("npz", f"cut after {_cut}", CASES["npz good"], lambda content, cut=_cut: bytes(content[:cut]))
for _seed in range(5):
    damaged("npz", f"flipped {_seed}", CASES["npz good"], lambda content, seed=_seed: flipped(content, seed))


# ---- tar ------------------------------------------------------------------------------------------------------------


def tar(name: str, members: list[tuple[Any, bytes]], how: str = "w", pattern: str = "x.tar") -> None:
    """Enter a tar file of members, each a name or a TarInfo."""

    def make(folder: Path) -> str:
        with tarfile.open(folder / "x.tar", how) as archive:
            for member, content in members:
                info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return f"wds:{folder}/{pattern}"

    case(f"tar {name}")(make)


def linked(name: str, kind: bytes, target: str = "/etc/passwd") -> tarfile.TarInfo:
    """Return a member that is no file."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


SAMPLE: list[tuple[Any, bytes]] = [("0.png", png(0)), ("0.cls", b"cat"), ("1.png", png(1)), ("1.cls", b"dog")]
tar("good", SAMPLE)
tar("deep JSON", [("0.png", png()), ("0.json", b"[" * NESTED)])
tar("deep JSON for a label", [("0.png", png()), ("0.json", b'{"label": ' + b"[" * 900 + b"]" * 900 + b"}")])
tar("a surrogate for a label", [("0.png", png()), ("0.json", b'{"label": "\\ud800"}')])
tar("NUL in a label", [("0.png", png()), ("0.json", b'{"label": "a\\u0000b"}')])
tar("a number beyond floats", [("0.png", png()), ("0.json", b'{"label": 1e999}')])
tar("a number of a million digits", [("0.png", png()), ("0.json", b'{"label": ' + b"9" * 1_000_000 + b"}")])
tar("NaN for a label", [("0.png", png()), ("0.json", b'{"label": NaN}')])
tar("an object for a label", [("0.png", png()), ("0.json", b'{"label": {"a": [1]}}')])
tar("a list for a label", [("0.png", png()), ("0.json", b'{"label": ["a", "b"]}')])
tar("a label of a megabyte", [("0.png", png()), ("0.cls", b"x" * (1 << 20))])
tar("no label", [("0.png", png())])
tar("links", [*SAMPLE, (linked("2.png", tarfile.SYMTYPE), b""), (linked("2.cls", tarfile.LNKTYPE), b"")])
tar("devices", [*SAMPLE, (linked("2.png", tarfile.CHRTYPE), b""), (linked("3.png", tarfile.FIFOTYPE), b"")])
OUTSIDE: list[tuple[Any, bytes]] = [("/etc/0.png", png()), ("/etc/0.cls", b"a"), ("../../1.png", png(1))]
tar("absolute and upward names", [*OUTSIDE, ("../../1.cls", b"b")])
tar("control characters", [("\x1b[2J\n0.png", png()), ("\x1b[2J\n0.cls", b"\x1b]0;x\x07")])
tar("names that are no UTF-8", [("\udcff0.png", png()), ("\udcff0.cls", b"\xff\xfe")])
tar("one name twice", [*SAMPLE, ("0.png", png(7))])
tar("broken images", [*SAMPLE, ("2.png", b"x" * 100), ("2.cls", b"cat"), ("3.png", b""), ("3.cls", b"dog")])
tar("compressed", SAMPLE, "w:gz")
tar("nothing", [])
tar("billions in braces", SAMPLE, pattern="x{000000000..999999999}.tar")
tar("braces times braces", SAMPLE, pattern="{1..9}" * 30 + ".tar")
tar("braces in braces", SAMPLE, pattern="{" * 5000 + "a,b" + "}" * 5000)
tar("numbers of a thousand digits", SAMPLE, pattern="{" + "9" * 5000 + ".." + "9" * 5000 + "}.tar")
tar("braces downward", SAMPLE, pattern="x{9..0}.tar")


@case("tar with a header of eight gigabytes")
def _(folder: Path) -> str:
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 8_000_000_000
    with (folder / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(8_000_001_024)
    return f"wds:{folder}/x.tar"


@case("tar with an image of eight gigabytes")
def _(folder: Path) -> str:
    info = tarfile.TarInfo("0.png")
    info.size = 8_000_000_000
    label = tarfile.TarInfo("0.cls")
    label.size = 3
    with (folder / "x.tar").open("wb") as file:
        file.write(label.tobuf() + b"cat".ljust(512, b"\0") + info.tobuf())
        file.truncate(8_000_003_072)
    return f"wds:{folder}/x.tar"


for _cut in (1, 600, 1100, 2600):
    damaged("tar", f"cut after {_cut}", CASES["tar good"], lambda content, cut=_cut: bytes(content[:cut]))
for _seed in range(5):
    damaged("tar", f"flipped {_seed}", CASES["tar good"], lambda content, seed=_seed: flipped(content, seed, 200))


# ---- CSV ------------------------------------------------------------------------------------------------------------


def manifest(name: str, content: bytes) -> None:
    """Enter a CSV file beside two images, a pipe and a folder."""

    def make(folder: Path) -> str:
        (folder / "a.png").write_bytes(png(0))
        (folder / "b.png").write_bytes(png(1))
        os.mkfifo(folder / "pipe.png")
        (folder / "folder.png").mkdir()
        (folder / "x.csv").write_bytes(content)
        return str(folder / "x.csv")

    case(f"csv {name}")(make)


manifest("good", b"path,label\na.png,cat\nb.png,dog\n")
manifest("nothing", b"")
manifest("a header alone", b"path,label\n")
manifest("NUL in a path", b"path,label\na\0.png,cat\nb.png,dog\n")
manifest("NUL everywhere", bytes(1000))
manifest("no UTF-8", b"path,label\n\xff\xfe.png,cat\n")
manifest("UTF-16", "path,label\na.png,cat\n".encode("utf-16"))
manifest("a quote that never ends", b'path,label\n"a.png,cat\n' + b"x" * 300_000)
manifest("a line of ten megabytes", b"path,label\n" + b"x" * 10_000_000)
manifest("a cell of a megabyte", b"path,label\na.png," + b"x" * 900_000 + b"\n")
manifest("a path of a megabyte", b"path,label\n" + b"x" * 100_000 + b",cat\n")
manifest("ten thousand columns", b"path,label" + b",x" * 10_000 + b"\na.png,cat\n")
manifest("columns twice", b"path,label,label\na.png,cat,dog\n")
manifest("more cells than columns", b"path,label\na.png,cat,dog\n")
manifest("fewer cells than columns", b"path,label\na.png\n")
manifest("empty labels", b"path,label\na.png,cat\nb.png,\n")
manifest("devices", b"path,label\n/dev/zero,cat\n/dev/stdin,dog\n/dev/tty,dog\na.png,cat\n")
manifest("a pipe and a folder", b"path,label\npipe.png,cat\nfolder.png,dog\na.png,dog\n")
manifest("files of the kernel", b"path,label\n/proc/self/mem,cat\n/proc/kmsg,dog\n/proc/kcore,dog\na.png,cat\n")
manifest("control characters", b'path,label\n"a\x1b[2J\n.png","\x1b]0;x\x07"\na.png,cat\n')
manifest("formulas", b"path,label\na.png,=cmd|' /C calc'!A0\nb.png,@x\n")
manifest("one file twice", b"path,label\na.png,cat\n./x/../a.png,dog\n")
manifest("splits of some", b"path,label,split\na.png,cat,train\nb.png,dog,\n")
manifest("an unknown split", b"path,label,split\na.png,cat,dev\n")
manifest("a thousand classes", b"path,label\n" + b"".join(b"%d.png,%d\n" % (n, n) for n in range(1000)))
manifest("all files gone", b"path,label\nx.png,cat\ny.png,dog\n")
manifest("carriage returns alone", b"path,label\ra.png,cat\rb.png,dog\r")


@case("csv that is a pipe")
def _(folder: Path) -> str:
    os.mkfifo(folder / "x.csv")
    return str(folder / "x.csv")


@case("csv of a terabyte of zeros")
def _(folder: Path) -> str:
    with (folder / "x.csv").open("wb") as file:
        file.truncate(1 << 40)
    return str(folder / "x.csv")


# ---- Parquet --------------------------------------------------------------------------------------------------------


def parquet(name: str, columns: Callable[[], Any], metadata: dict[bytes, bytes] | None = None, **how: Any) -> None:
    """Enter a Parquet file."""

    def make(folder: Path) -> str:
        import pyarrow as pa
        import pyarrow.parquet as pq

        given = columns()
        table = given if isinstance(given, pa.Table) else pa.table(given)
        pq.write_table(table.replace_schema_metadata(metadata), folder / "x.parquet", **how)
        return str(folder / "x.parquet")

    case(f"parquet {name}")(make)


def structs(inner: list[Any]) -> Any:
    """Return a column of structs."""
    import pyarrow as pa

    return pa.array(inner)


def typed(values: list[Any], kind: str, *arguments: Any) -> Any:
    """Return a column of a type of pyarrow."""
    import pyarrow as pa

    return pa.array(values, getattr(pa, kind)(*arguments))


LABELS = {"label": ["a", "b"]}
parquet("good", lambda: {"image": [png(0), png(1)]} | LABELS)
parquet("paths that are numbers", lambda: {"path": [1, 2]} | LABELS)
parquet("paths that are bytes", lambda: {"path": [b"a.png", b"b.png"]} | LABELS)
parquet("paths that are null", lambda: {"path": ["a.png", None]} | LABELS)
parquet("paths that are lists", lambda: {"path": [["a.png"], ["b.png"]]} | LABELS)
parquet("bytes that are a number", lambda: {"image": structs([{"bytes": 10**10}, {"bytes": 10**10}])} | LABELS)
parquet("bytes that are lists", lambda: {"image": structs([{"bytes": [1]}, {"bytes": [2]}])} | LABELS)
parquet("bytes that are text", lambda: {"image": structs([{"bytes": "x"}, {"bytes": "y"}])} | LABELS)
parquet("a path in a struct that is a number", lambda: {"image": structs([{"bytes": png(), "path": 7}] * 2)} | LABELS)
parquet("images that are null", lambda: {"image": [png(), None]} | LABELS)
parquet("structs that are null", lambda: {"image": structs([{"bytes": png(), "path": "a"}, None])} | LABELS)
parquet("labels that are null", lambda: {"image": [png(0), png(1)], "label": ["a", None]})
parquet("labels that are NaN", lambda: {"image": [png(0), png(1)], "label": [0.0, float("nan")]})
parquet("labels that are lists", lambda: {"image": [png(0), png(1)], "label": [["a"], ["a", "b"]]})
parquet("labels that are structs", lambda: {"image": [png(0), png(1)], "label": structs([{"x": 1}, {"x": 2}])})
parquet("labels that are dates", lambda: {"image": [png(0), png(1)], "label": typed([1, 2], "date32")})
parquet("labels that are decimals", lambda: {"image": [png(0), png(1)], "label": typed([1, 2], "decimal128", 20, 2)})
parquet("labels that are bytes", lambda: {"image": [png(0), png(1)], "label": [b"\xff", b"a\0b"]})
parquet("labels of control characters", lambda: {"image": [png(0), png(1)], "label": ["\x1b[2J", "a\nb"]})
parquet("no label", lambda: {"image": [png(0), png(1)]})
parquet("no row", lambda: {"image": typed([], "binary"), "label": typed([], "string")})
parquet("splits that are numbers", lambda: {"image": [png(0), png(1)], "split": [1, 2]} | LABELS)
parquet("deep metadata", lambda: {"image": [png(0), png(1)], "label": [0, 1]}, {b"huggingface": b"[" * NESTED})
parquet("metadata of nonsense", lambda: {"image": [png(0), png(1)], "label": [0, 1]}, {b"huggingface": b"\xff\xfe{"})
parquet(
    "names that are numbers",
    lambda: {"image": [png(0), png(1)], "label": [0, 1]},
    {b"huggingface": b'{"info": {"features": {"label": {"names": 7}}}}'},
)
parquet(
    "names twice",
    lambda: {"image": [png(0), png(1)], "label": [0, 1]},
    {b"huggingface": b'{"info": {"features": {"label": {"names": ["a", "a"]}}}}'},
)
parquet(
    "a label beyond the names",
    lambda: {"image": [png(0), png(1)], "label": [0, 5]},
    {b"huggingface": b'{"info": {"features": {"label": {"names": ["a", "b"]}}}}'},
)
parquet("a hundred million rows of one", lambda: {"image": typed([None] * 3_000_000, "binary"), "label": [0] * 3_000_000})
parquet("one long text for every label", lambda: {"image": [png()] * 100, "label": ["x" * 9_000_000] * 100})
parquet("one image a hundred thousand times", lambda: {"image": [png()] * 100_000, "label": ["a", "b"] * 50_000})
parquet("columns that are not read", lambda: {"image": [png(0), png(1)], "other": ["x" * 1000] * 2} | LABELS)
for _cut in (0, 3, 40, 400):
    damaged("parquet", f"cut after {_cut}", CASES["parquet good"], lambda content, cut=_cut: bytes(content[:cut]))
for _seed in range(8):
    damaged("parquet", f"flipped {_seed}", CASES["parquet good"], lambda content, seed=_seed: flipped(content, seed))


# ---- folders and files ----------------------------------------------------------------------------------------------


def files(name: str, fill: Callable[[Path], object], data: str = "") -> None:
    """Enter a folder with a good class, a bad one beside it."""

    def make(folder: Path) -> str:
        for kind in ("good", "bad"):
            (folder / "d" / kind).mkdir(parents=True)
            (folder / "d" / kind / "0.png").write_bytes(png(len(kind)))
        fill(folder / "d" / "bad")
        return str(folder / "d" / data)

    case(f"files {name}")(make)


def of_size(path: Path, size: int) -> None:
    """Write a file of a size without content."""
    with path.open("wb") as file:
        file.truncate(size)


def bound_socket(path: Path) -> None:
    """Leave a socket at a path."""
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))


def icon(*images: bytes) -> bytes:
    """Return an ICO file of images that claim 16 pixels a side."""
    start, head, body = 6 + 16 * len(images), struct.pack("<HHH", 0, 1, len(images)), b""
    for image in images:
        head += struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(image), start + len(body))
        body += image
    return head + body


def big_jpeg(side: int, says: int = 0, **how: Any) -> bytes:
    """Return a grey JPEG of a side, and of another by what it says."""
    buffer = io.BytesIO()
    Image.new("L", (side, side), 77).save(buffer, "JPEG", **how)
    said = says or side
    return buffer.getvalue().replace(struct.pack(">HH", side, side), struct.pack(">HH", said, said))


BITMAP = struct.pack("<IiiHHIIiiII", 40, 30_000, 60_000, 1, 32, 0, 0, 0, 0, 0, 0)
files("a pipe", lambda d: os.mkfifo(d / "x.jpg"))
files("a socket", lambda d: bound_socket(d / "s.png"))
files("a device", lambda d: (d / "x.png").symlink_to("/dev/zero"))
files("a terminal", lambda d: (d / "x.png").symlink_to("/dev/tty"))
files("a folder called like an image", lambda d: (d / "x.jpg").mkdir())
files("a terabyte", lambda d: of_size(d / "x.png", 1 << 40))
files("two gigabytes", lambda d: of_size(d / "x.png", 2 << 30))
files("200 MB of nothing", lambda d: of_size(d / "x.tif", 200 << 20))
files("a link to nothing", lambda d: (d / "x.png").symlink_to("nothing"))
files("a link to itself", lambda d: (d / "x.png").symlink_to("x.png"))
files("a link to the root", lambda d: (d / "x").symlink_to("/"))
files("a link to the kernel's files", lambda d: (d / "x").symlink_to("/proc/self"))
files("links in circles", lambda d: [(d / name).symlink_to(target) for name, target in (("x", "y"), ("y", "x"), ("z", "."))])
files("names of control characters", lambda d: (d / "\x1b[2J\x1b]0;x\x07\n.png").write_bytes(b"x"))
files("names that are no UTF-8", lambda d: (d / os.fsdecode(b"\xff\xfe.png")).write_bytes(png(3)))
files("long names", lambda d: (d / ("x" * 250 + ".png")).write_bytes(png(4)))
files("a hundred folders deep", lambda d: (d / "/".join(["x"] * 100)).mkdir(parents=True))
files("a bomb", lambda d: (d / "x.png").write_bytes(bomb(30_000, 30_000)))
files("a bomb in an icon", lambda d: (d / "x.ico").write_bytes(icon(bomb(13_000, 13_000))))
files("a second bomb in an icon", lambda d: (d / "x.ico").write_bytes(icon(png(), bomb(13_000, 13_000))))
files("a bitmap bomb in an icon", lambda d: (d / "x.ico").write_bytes(icon(BITMAP + bytes(100))))
files("49 megapixels of one column", lambda d: (d / "x.png").write_bytes(bomb(1, 49_000_000)))
files("49 megapixels of one row", lambda d: (d / "x.png").write_bytes(bomb(49_000_000, 1)))
files("49 megapixels in colour with alpha", lambda d: (d / "x.png").write_bytes(bomb(7000, 7000, 8, 6)))
files("49 megapixels of 16 bits", lambda d: (d / "x.png").write_bytes(bomb(7000, 7000, 16, 0)))
files("60 megapixels of JPEG", lambda d: (d / "x.jpg").write_bytes(big_jpeg(7800)))
files("60 progressive megapixels", lambda d: (d / "x.jpg").write_bytes(big_jpeg(7800, progressive=True)))
files("400 megapixels of JPEG", lambda d: (d / "x.jpg").write_bytes(big_jpeg(7800, says=20_000)))
files("a JPEG that says 15,000 pixels", lambda d: (d / "x.jpg").write_bytes(big_jpeg(64, says=15_000)))
files("a JPEG that says 65,500 pixels", lambda d: (d / "x.jpg").write_bytes(big_jpeg(64, says=65_500)))
files("a PGM of a trillion pixels", lambda d: (d / "x.pgm").write_bytes(b"P5 1000000 1000000 255\n"))
files("a PGM of endless digits", lambda d: (d / "x.pgm").write_bytes(b"P5 " + b"9" * 100_000))
files("a PGM of 16 bits", lambda d: (d / "x.pgm").write_bytes(b"P5 8 8 65535\n" + bytes(range(128))))
files("a plain PPM that ends", lambda d: (d / "x.ppm").write_bytes(b"P3 100 100 255\n1 2 3"))
WIDE_FRAME = b"GIF89a\x01\0\x01\0\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"
files("a GIF of frames beyond it", lambda d: (d / "x.gif").write_bytes(WIDE_FRAME))
files("a TIFF in circles", lambda d: (d / "x.tif").write_bytes(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"))
files("a TIFF of endless tags", lambda d: (d / "x.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 1000))
files("text called JPEG", lambda d: (d / "x.jpg").write_text("<html>"))
files("PostScript called PNG", lambda d: (d / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"))
files("nothing", lambda d: [entry.unlink() for entry in d.iterdir()])
files("ten thousand other files", lambda d: [(d / f"{n}.x{n % 2000}").touch() for n in range(10_000)])
files("a folder that is a npz", lambda d: (d / "x.npz").mkdir(), "bad/x.npz")
files("a pipe that is a tar", lambda d: os.mkfifo(d / "x.tar"), "bad/x.tar")
files("a pipe that is a Parquet file", lambda d: os.mkfifo(d / "x.parquet"), "bad/x.parquet")
files("a pipe that is a npz", lambda d: os.mkfifo(d / "x.npz"), "bad/x.npz")
files("a pipe that is an HDF5 file", lambda d: os.mkfifo(d / "x.h5"), "bad/x.h5")
files("a name with a NUL", os.listdir, "bad\0x")
files("a name of a megabyte", os.listdir, "x" * 1_000_000)
for _kind, _seed in itertools.product(("JPEG", "PNG", "GIF", "TIFF", "WEBP", "ICO", "TGA", "JPEG2000", "PPM"), range(2)):

    def _mutant(folder: Path, kind: str = _kind, seed: int = _seed) -> None:
        for number in range(20):
            buffer = io.BytesIO()
            Image.fromarray(pixels()[0].repeat(6, 0).repeat(6, 1)).save(buffer, kind)
            suffix = {"JPEG": "jpg", "JPEG2000": "jp2"}.get(kind, kind.lower())
            (folder / f"{number}.{suffix}").write_bytes(flipped(bytearray(buffer.getvalue()), 100 * seed + number, 6))

    files(f"20 mutants of {_kind} {_seed}", _mutant)


# ---- sets by name ---------------------------------------------------------------------------------------------------


@case("hf folder with a pipe")
def _(folder: Path) -> str:
    os.mkfifo(folder / "train.parquet")
    return f"hf:{folder}"


@case("hf folder of nonsense")
def _(folder: Path) -> str:
    (folder / "train-0.parquet").write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    return f"hf:{folder}"


@case("hf folder of a script")
def _(folder: Path) -> str:
    (folder / f"{folder.name}.py").write_text(f"open({str(CANARY)!r}, 'w')")
    return f"hf:{folder}"


@case("hf folder of images in classes, one broken")
def _(folder: Path) -> str:
    for kind in ("a", "b"):
        (folder / "train" / kind).mkdir(parents=True)
        (folder / "train" / kind / "0.png").write_bytes(png(ord(kind)))
        (folder / "train" / kind / "1.png").write_bytes(b"broken")
    return f"hf:{folder}"


@case("hf folder of nothing")
def _(folder: Path) -> str:
    return f"hf:{folder}"


def of_torchvision(name: str, kind: str, fill: Callable[[Path], object]) -> None:
    """Enter a folder for one of torchvision's sets."""

    def make(folder: Path) -> str:
        fill(folder)
        return f"torchvision:{kind}"

    case(f"torchvision {kind} {name}")(make)


def mnist_of_nonsense(folder: Path) -> None:
    """Write MNIST's files with impossible shapes."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"\0\0\x08\x03" + b"\xff" * 40)


def within(folder: Path, *files: tuple[str, bytes]) -> None:
    """Write some files."""
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def class_of_a_pipe(folder: Path) -> None:
    """Write a class folder of a pipe."""
    (folder / "a").mkdir()
    os.mkfifo(folder / "a" / "0.png")


for _name in sorted(datasets.__all__):
    of_torchvision("in an empty folder", _name, os.listdir)
of_torchvision("of nonsense", "MNIST", mnist_of_nonsense)
PICKLES = [(f"cifar-10-batches-py/data_batch_{number}", pickle.dumps(Evil())) for number in range(1, 6)]
of_torchvision("of a pickle", "CIFAR10", lambda d: within(d, *PICKLES))
of_torchvision(
    "of nothing", "STL10", lambda d: within(d, ("stl10_binary/train_X.bin", b""), ("stl10_binary/train_y.bin", b""))
)
of_torchvision("of nonsense", "USPS", lambda d: within(d, ("usps.bz2", b"BZh" + bytes(100))))
of_torchvision("with a pipe", "ImageFolder", class_of_a_pipe)
of_torchvision("of nonsense", "SEMEION", lambda d: within(d, ("semeion.data", gzip.compress(b"x"))))
of_torchvision("of broken images", "EuroSAT", lambda d: within(d, *((f"eurosat/2750/{c}/0.jpg", b"x") for c in "ab")))
of_torchvision("of broken images", "ImageFolder", lambda d: within(d, *((f"{c}/0.jpg", b"x") for c in "ab")))
