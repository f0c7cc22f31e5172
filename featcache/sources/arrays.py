"""Images that are rows of an array: NumPy's .npz, HDF5, scikit-learn's digits."""

import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError, UsageError
from featcache.images import UnreadableImage, encode
from featcache.sources.base import Blobs, Item, Numbered, Source, require_whole, safe_name, split_of

_IMAGES = ("images", "image", "x", "X", "data", "arr_0")
_LABELS = ("labels", "label", "y", "targets", "target", "arr_1")
_SPLITS = ("splits", "split")
_CLASSES = ("class_names", "classes")


def open_npz(path: Path) -> Source:
    """Open a .npz of images uint8 (n, h, w) or (n, h, w, 3) and labels (n,), or one pair a split: ``train_images``, ...

    Raises:
        DataError: it is no such file.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not a .npz of plain arrays ({error}).") from error
    return _from_arrays(path, arrays)


def open_hdf5(path: Path) -> Source:
    """Open an HDF5 file with the datasets that ``open_npz`` takes; images stay on disk.

    Raises:
        DataError: it is no such file, or its datasets point outside it.
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
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise DataError(f"{path}: {name} is a link; only datasets in the file itself are read.")
        found = file[name]
        if isinstance(found, h5py.Dataset):
            if found.external or found.is_virtual:
                raise DataError(f"{path}: {name} keeps its values in another file; only datasets in the file are read.")
            arrays[name] = found if found.ndim > 2 else found[()]
    return _from_arrays(path, arrays)


def open_digits(text: str) -> Source:
    """Open scikit-learn's 1,797 scanned digits."""
    if text != "sklearn:digits":
        raise UsageError(f"{text}: of scikit-learn's data sets only sklearn:digits holds images.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    items, blobs = [], {}
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"{index:04d}.pgm"
        blobs[path] = b"P5 8 8 255\n" + (image * 255 / 16).round().astype("uint8").tobytes()
        items.append(Item(path, str(label)))
    return Source("digits", text, tuple(items), Blobs(blobs))


def from_array(
    images: Any, labels: Any, splits: Any = None, *, name: str, location: str, holder: Path | None = None
) -> Source:
    """Return a source over an array of images, uint8 (n, h, w[, 3]), with labels (n,) and optionally splits (n,).

    Raises:
        DataError: shapes or dtypes do not fit.
    """
    if (
        getattr(images, "dtype", None) != np.uint8
        or images.ndim not in {3, 4}
        or (images.ndim == 4 and images.shape[3] not in {1, 3})
    ):
        raise DataError(
            f"{location}: images must be uint8 (n, h, w) or (n, h, w, 3), not {images.dtype} {tuple(images.shape)}."
        )
    labels = np.asarray(labels)
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.shape != (len(images),):
        raise DataError(f"{location}: {len(images)} images need one label each, found labels of shape {labels.shape}.")
    given = [""] * len(images) if splits is None else [_text(split) for split in np.asarray(splits)]
    items = [
        Item(f"{row:08d}", _text(label), split_of(split, location))
        for row, (label, split) in enumerate(zip(labels.tolist(), given, strict=True))
    ]
    require_whole(items, location)
    numbers = {item.path: row for row, item in enumerate(items)}
    return Source(name, location, tuple(items), Numbered(numbers, _Rows(images), holder))


class _Rows:
    """Reads single rows of an array, one thread at a time: HDF5 allows no more."""

    def __init__(self, images: Any) -> None:
        self._images = images
        self._lock = threading.Lock()

    def __reduce__(self) -> Any:
        return _Rows, (self._images,)

    def __call__(self, row: int) -> bytes:
        """Return a row as the bytes of an image file."""
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
        self.shape = (int(self._ends[-1]), *arrays[0].shape[1:])

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, row: int) -> Any:
        which = int(np.searchsorted(self._ends, row, side="right"))
        return self._arrays[which][row - (self._ends[which - 1] if which else 0)]


def _from_arrays(path: Path, arrays: dict[str, Any]) -> Source:
    name, location = safe_name(path.stem), str(path.resolve())
    prefixed = [split for split in ("train", "val", "test") if _find(arrays, _IMAGES, f"{split}_")]
    if prefixed:
        pairs = [(_find(arrays, _IMAGES, f"{split}_"), _find(arrays, _LABELS, f"{split}_")) for split in prefixed]
        if not all(labels for _, labels in pairs):
            raise DataError(f"{path}: every split needs its labels, such as train_labels.")
        images: Any = _Joined([arrays[image] for image, _ in pairs])
        labels: Any = np.concatenate([np.asarray(arrays[label]).reshape(len(arrays[image]), -1) for image, label in pairs])
        splits: Any = np.repeat(prefixed, [len(arrays[image]) for image, _ in pairs])
    else:
        image, label, split = (_find(arrays, names, "") for names in (_IMAGES, _LABELS, _SPLITS))
        if not image or not label:
            raise DataError(
                f"{path}: arrays named images and labels are needed, found {', '.join(sorted(arrays)) or 'none'}."
            )
        images, labels, splits = arrays[image], arrays[label], arrays[split] if split else None
    names = _find(arrays, _CLASSES, "")
    labels = np.asarray(labels)
    if (
        names
        and np.issubdtype(labels.dtype, np.integer)
        and labels.size
        and labels.max() < len(arrays[names])
        and labels.min() >= 0
    ):
        labels = np.array([_text(one) for one in arrays[names]])[labels]
    return from_array(images, labels, splits, name=name, location=location, holder=path.resolve())


def _find(arrays: dict[str, Any], names: tuple[str, ...], prefix: str) -> str:
    return next((f"{prefix}{name}" for name in names if f"{prefix}{name}" in arrays), "")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
