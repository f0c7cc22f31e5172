"""Images that are rows of an array, NumPy's .npz or HDF5; and what comes with scikit-learn: digits, and texts."""

import ast
import math
import re
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from featcache.datasets import (
    ArrayReader,
    Dataset,
    MemoryReader,
    Sample,
    SampleTable,
    looks_like_split,
    safe_name,
    split_of,
)
from featcache.datasets.decoding import MAX_MEGAPIXELS, UnreadableImage, encode
from featcache.datasets.folder import many
from featcache.datasets.tables import Labels, labelled
from featcache.errors import DataError, UsageError
from featcache.resources import free_memory, libraries_load

# Names under which such files keep images (MedMNIST: train_images), the likeliest first.
_IMAGES = ("images", "image", "x", "X", "data", "arr_0")
_LABELS = ("labels", "label", "y", "targets", "target", "arr_1")
_SPLITS = ("splits", "split")
_CLASSES = ("class_names", "classes")
_PARTS = ("train", "val", "test")
_KNOWN = frozenset(
    {*_SPLITS, *_CLASSES}
    | {f"{part}{name}" for part in ("", *(f"{part}_" for part in _PARTS)) for name in (*_IMAGES, *_LABELS)}
)
_MOST_RATIO = 1100  # what deflate can make of zeros
_DENSE_BYTES, _DENSE_RATIO = 256 << 20, 100  # photographs never shrink so far
_MOST_CHUNK = 1 << 30  # bytes; HDF5 unpacks a chunk whole to read one row of it
_MOST_SHOWN = 10  # names in a message
_TEXTS_AT_ONCE = 64  # texts of variable length may all be one and the same very long one
DOCSTRINGS = "sklearn:docstrings"
# packages of scikit-learn that say enough of themselves to be told apart; what the others say is nobody's test
_TOPICS = ("cluster", "datasets", "decomposition", "ensemble", "linear_model", "metrics", "model_selection", "preprocessing")
_OTHERS = ("feature_extraction", "feature_selection", "gaussian_process", "neighbors", "svm", "tree", "utils")
_FEWEST_WORDS = 6


def open_npz(path: Path) -> Dataset:
    """Open a .npz of images uint8 (n, h, w) or (n, h, w, 3) and labels (n,), or one pair a split: ``train_images``, ...

    Raises:
        DataError: it is no such file, or its arrays do not fit into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            members = [name for name, info in infos.items() if name in _KNOWN and info.filename.endswith(".npy")]
            # Half of it: what is computed from them needs room too.
            if sum(_declared(path, archive, infos[name]) for name in members) > free_memory() / 2:
                raise DataError(f"{path}: its arrays do not fit into memory; as HDF5 they may stay on disk.")
            arrays: dict[str, Any] = {}
            for name in members:
                with archive.open(f"{name}.npy") as member:
                    # No pickles: an array of objects can run any code as it is loaded.
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a .npz of plain arrays ({error}).") from error
    return _from_arrays(path, arrays, sorted(infos.keys() - arrays.keys()))


def _declared(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return an array's bytes, as its header declares them.

    Raises:
        DataError: the file cannot hold as many.
    """
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(member)
    size = math.prod(shape) * dtype.itemsize
    if size > info.file_size:
        raise DataError(f"{path}: {info.filename} declares {size} bytes and holds {info.file_size}.")
    packed = min(info.compress_size, path.stat().st_size)
    if info.file_size > max(_DENSE_BYTES, _DENSE_RATIO * packed):
        raise DataError(f"{path}: {info.filename} is {packed} bytes that become {info.file_size}: no photographs do.")
    return size


def open_hdf5(path: Path) -> Dataset:
    """Open an HDF5 file with the datasets that ``open_npz`` takes; images stay on disk.

    Raises:
        DataError: it is no such file, its datasets point outside it, or declare more than it can hold.
    """
    import h5py

    try:
        file = h5py.File(path, "r", locking=False)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: not an HDF5 file ({error}).") from error
    arrays: dict[str, Any] = {}
    for name in file:
        # An external link would read any HDF5 file of the user's as if it were this data set.
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise DataError(f"{path}: {name} is a link; only datasets in the file itself are read.")
        dataset = file[name] if name in _KNOWN else None
        if isinstance(dataset, h5py.Dataset):
            _require_held(path, name, dataset)
            arrays[name] = dataset
    return _from_arrays(path, arrays, sorted(set(file) - arrays.keys()))


def _require_held(path: Path, name: str, dataset: Any) -> None:
    """Refuse a dataset that keeps its values elsewhere, or declares more than its file can hold.

    Raises:
        DataError: as said.
    """
    if dataset.external or dataset.is_virtual:
        raise DataError(f"{path}: {name} keeps its values in another file; only datasets in the file are read.")
    if dataset.shape is None or not dataset.ndim:
        raise DataError(f"{path}: {name} is no array.")
    size = path.stat().st_size
    if len(dataset) > size or math.prod(dataset.shape) * dataset.dtype.itemsize > _MOST_RATIO * size:
        raise DataError(f"{path}: {name} declares {dataset.shape} values, more than a file of {size} bytes can hold.")
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > _MOST_CHUNK:
        raise DataError(f"{path}: {name} has chunks of {dataset.chunks}, over 1 GiB; write it in smaller ones.")


def open_digits(text: str) -> Dataset:
    """Open scikit-learn's 1,797 scanned digits."""
    if text != "sklearn:digits":
        raise UsageError(f"{text}: sklearn:digits holds images and sklearn:docstrings texts, others neither.")
    with libraries_load():
        from sklearn.datasets import load_digits

    digits = load_digits()
    items, blobs = [], {}
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"{index:04d}.pgm"
        blobs[path] = b"P5 8 8 255\n" + (image * 255 / 16).round().astype("uint8").tobytes()
        items.append(Sample(path, str(label)))
    return Dataset("digits", text, tuple(items), MemoryReader(blobs))


def from_array(
    images: Any,
    labels: Sequence[str | None],
    splits: Sequence[str] | None = None,
    *,
    name: str,
    location: str,
    holder: Path | None = None,
) -> Dataset:
    """Return a source over an array of images, uint8 (n, h, w[, 3]), with labels (n,) and optionally splits (n,).

    Raises:
        DataError: shapes or dtypes do not fit, or a label is missing.
    """
    dtype, shape = getattr(images, "dtype", None), tuple(images.shape)
    if dtype != np.uint8 or len(shape) not in {3, 4} or (len(shape) == 4 and shape[3] not in {1, 3}):
        raise DataError(f"{location}: images must be uint8 (n, h, w) or (n, h, w, 3), not {dtype} {shape}.")
    if not 0 < shape[1] * shape[2] <= MAX_MEGAPIXELS * 1e6:
        raise DataError(f"{location}: images of {shape[1]} x {shape[2]} pixels; 1 to {MAX_MEGAPIXELS:.0f} million are read.")
    split_names = [""] * len(labels) if splits is None else list(splits)
    if not len(labels) == len(split_names) == shape[0]:
        raise DataError(
            f"{location}: {shape[0]} images need one label each, found {len(labels)}; splits {len(split_names)}."
        )
    usable, notes = labelled(labels, split_names, location, lambda row: f"row {row}")
    # Rows without a split would be drawn into any part, the test part included.
    if 0 < sum(not split_names[row] for row in usable) < len(usable):
        raise DataError(f"{location}: some rows have a split and some have none: fill in all of them, or none.")
    items = (Sample(f"{row:08d}", labels[row] or "", split_names[row]) for row in usable)
    packed = SampleTable(items)
    return Dataset(name, location, packed, ArrayReader(_RowNumbers(shape[0]), _ArrayRows(images), holder), tuple(notes))


class _RowNumbers(Mapping[str, int]):
    """The rows that paths such as ``00000007`` stand for: computed, since there may be millions."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __getitem__(self, path: str) -> int:
        return int(path)

    def __iter__(self) -> Iterator[str]:
        return (f"{row:08d}" for row in range(self._count))

    def __len__(self) -> int:
        """Return the number of rows."""
        return self._count


class _ArrayRows:
    """Reads single rows of an array, one thread at a time: HDF5 allows no more."""

    def __init__(self, images: Any) -> None:
        self._images = images
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _ArrayRows, (self._images,)

    def __call__(self, row: int) -> bytes:
        """Return a row as the bytes of an image file."""
        # h5py has one lock for the whole library: threads that wait here do not hold it meanwhile.
        with self._lock:
            pixels = np.asarray(self._images[row])
        try:
            return encode(np.ascontiguousarray(pixels))
        except UnreadableImage as error:
            raise OSError(str(error)) from error


class _Joined:
    """Several arrays of images as one, without a copy."""

    def __init__(self, arrays: list[Any]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.dtype, self.ndim = arrays[0].dtype, arrays[0].ndim
        if any(array.shape[1:] != arrays[0].shape[1:] or array.dtype != self.dtype for array in arrays):
            raise DataError(f"images of all splits need one shape and dtype, not {[array.shape for array in arrays]}.")
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, row: int) -> Any:
        which = int(np.searchsorted(self._ends, row, side="right"))
        return self._arrays[which][row - (self._ends[which - 1] if which else 0)]


def _from_arrays(path: Path, arrays: dict[str, Any], unread: Sequence[str]) -> Dataset:
    name, location = safe_name(path.stem), str(path.resolve())
    called = _find(arrays, _CLASSES, "")
    read = Labels(str(path), [_decoded_text(value) for value in _values(path, called, arrays[called])] if called else ())
    parts = [part for part in _PARTS if _find(arrays, _IMAGES, f"{part}_")]
    _require_all_splits(path, [*arrays, *unread], parts)
    if parts:
        pairs = [(_find(arrays, _IMAGES, f"{part}_"), _find(arrays, _LABELS, f"{part}_")) for part in parts]
        if not all(labels for _, labels in pairs):
            raise DataError(f"{path}: every split needs its labels, such as train_labels.")
        images: Any = _Joined([arrays[image] for image, _ in pairs])
        labels = [text for image, label in pairs for text in _labels(path, label, arrays[label], len(arrays[image]), read)]
        splits: list[str] | None = [
            part for part, (image, _) in zip(parts, pairs, strict=True) for _ in range(len(arrays[image]))
        ]
        used = {called, *(name for pair in pairs for name in pair)}
    else:
        image, label, split = (_find(arrays, names, "") for names in (_IMAGES, _LABELS, _SPLITS))
        if not image or not label:
            raise DataError(
                f"{path}: arrays named images and labels are needed, found {_some(sorted([*arrays, *unread])) or 'none'}."
            )
        images, labels = arrays[image], _labels(path, label, arrays[label], len(arrays[image]), read)
        values = _values(path, split, arrays[split]) if split else []
        splits = (
            [split_of(_decoded_text(value), f"{path}, row {row}") for row, value in enumerate(values)] if split else None
        )
        used = {called, image, label, split}
    source = from_array(images, labels, splits, name=name, location=location, holder=path.resolve())
    unused = sorted([*unread, *(arrays.keys() - used)])
    notes = [f"{path}: left out: {many(len(unused), 'array')} of other names ({_some(unused)})"] if unused else []
    return replace(source, notes=(*source.notes, *notes), label_lists=read.lists)


def _require_all_splits(path: Path, names: Sequence[str], parts: Sequence[str]) -> None:
    """Refuse images of a split that would not be read.

    Raises:
        DataError: there are some; or images of no split beside those of one.
    """
    for name in names:
        prefix, _, kind = name.rpartition("_")
        split = looks_like_split(prefix) if kind in _IMAGES else ""
        if (split and split not in parts) or (parts and name in _IMAGES[:3]):
            raise DataError(
                f"{path}: {name} would be lost beside {', '.join(parts) or 'images'}: the images of splits are called "
                "train_images, val_images and test_images."
            )


def _some(names: Sequence[str]) -> str:
    return ", ".join([*names[:_MOST_SHOWN], *(["..."] if len(names) > _MOST_SHOWN else [])])


def _find(arrays: dict[str, Any], names: tuple[str, ...], prefix: str) -> str:
    return next((f"{prefix}{name}" for name in names if f"{prefix}{name}" in arrays), "")


def _labels(path: Path, name: str, column: Any, count: int, read: Labels) -> list[str | None]:
    if column.ndim == 2 and column.shape[1] == 1:
        shape: tuple[int, ...] = column.shape[:1]
    else:
        shape = tuple(column.shape)
    if shape != (count,):
        raise DataError(f"{path}: {count} images need one label each, found {name} of shape {tuple(column.shape)}.")
    return [read.read(value, f"row {row}") for row, value in enumerate(_values(path, name, column))]


def _values(path: Path, name: str, column: Any) -> Iterator[Any]:
    """Yield the values of an array of one column, a few at a time.

    Raises:
        DataError: it has another shape.
    """
    if column.ndim != 1 and not (column.ndim == 2 and column.shape[1] == 1):
        raise DataError(f"{path}: {name} must be one column, not {tuple(column.shape)}.")
    step = _TEXTS_AT_ONCE if column.dtype.kind == "O" else 1 << 16
    for start in range(0, len(column), step):
        values = np.asarray(column[start : start + step])
        yield from values.reshape(-1)


def _decoded_text(value: Any) -> str:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def open_docstrings() -> Dataset:
    """Open the paragraphs of scikit-learn's docstrings, by package, as the installed version has them.

    Raises:
        DataError: its source is not installed.
    """
    paragraphs = _paragraphs(_TOPICS)
    count, content, samples = dict.fromkeys(_TOPICS, 0), {}, []
    for text, package in paragraphs.items():
        path = f"{package}/{count[package]:04d}.txt"
        count[package] += 1
        content[path] = text.encode()
        samples.append(Sample(path, package))
    return Dataset("docstrings", DOCSTRINGS, samples, MemoryReader(content), kind="text")


def other_docstrings() -> list[str]:
    """Return paragraphs of the packages that ``open_docstrings`` leaves out.

    Raises:
        DataError: as of ``open_docstrings``.
    """
    inside = _paragraphs(_TOPICS)
    return [text for text in _paragraphs(_OTHERS) if text not in inside]


def _paragraphs(packages: tuple[str, ...]) -> dict[str, str]:
    """Return each paragraph once, with the package that says it first."""
    spec = find_spec("sklearn")
    root = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    paragraphs: dict[str, str] = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            if "tests" not in path.relative_to(root).parts:
                for text in _said_in(path):
                    paragraphs.setdefault(text, package)
    if not paragraphs:
        raise DataError(f"{DOCSTRINGS}: this installation of scikit-learn has no source to read them from.")
    return paragraphs


def _said_in(path: Path) -> Iterator[str]:
    """Yield the paragraphs of a module's docstrings, on one line each, without lists of parameters."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        text = ast.get_docstring(node) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) else None
        prose = re.split(r"\n[A-Z][A-Za-z ]+\n-{3,}", text or "")[0]
        for paragraph in re.split(r"\n\s*\n", prose):
            line = " ".join(paragraph.split())
            if len(line.split()) >= _FEWEST_WORDS and not line.startswith(".."):
                yield line
