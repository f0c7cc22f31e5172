"""Where images come from: folders, CSV manifests, scikit-learn's digits. A source lists items and reads their bytes."""

import csv
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from featcache.errors import DataError, UsageError
from featcache.fingerprint import fingerprint

_PHOTOGRAPHS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".avif", ".jp2")
_OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico")
IMAGE_SUFFIXES = frozenset(_PHOTOGRAPHS + _OTHERS)
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class Item:
    """One image of a source: its path relative to the source, its class and, where it is given, its split."""

    path: str
    label: str
    split: str = ""


@dataclass(frozen=True)
class FileStat:
    """What tells cheaply that a file has not changed since it was hashed."""

    size: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class Source:
    """A named list of labelled images. ``notes`` are things about it that the user should hear."""

    name: str
    location: str
    items: tuple[Item, ...]
    root: Path | None = None
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(sorted({item.label for item in self.items}, key=_natural))

    def read(self, path: str) -> bytes:
        """Return an image's bytes.

        Raises:
            OSError: the file cannot be read.
        """
        if self.root is None:
            return self.blobs[path]
        return (self.root / path).read_bytes()

    def stat(self, path: str) -> FileStat | None:
        """Return what tells that a file has not changed, ``None`` where nothing does.

        Raises:
            OSError: the file cannot be reached.
        """
        if self.root is None:
            return None
        found = (self.root / path).stat()
        return FileStat(found.st_size, found.st_mtime_ns, found.st_ino)


def open_source(data: str | Path, name: str | None = None) -> Source:
    """Open a data set: a folder, a ``.csv`` manifest or ``sklearn:digits``.

    Raises:
        DataError: there is nothing there, or no labelled image in it.
        UsageError: the kind of source is unknown.
    """
    text = str(data)
    if text.startswith("sklearn:"):
        source = _digits(text)
    elif Path(text).is_dir():
        source = _folder(Path(text))
    elif text.lower().endswith(".csv"):
        source = _manifest(Path(text))
    elif Path(text).exists():
        raise UsageError(f"{text}: not a folder, a .csv manifest or sklearn:digits.")
    else:
        raise DataError(f"{text}: there is no such folder or file.")
    if not source.items:
        raise DataError(f"{text}: no image found in it. A folder needs CLASS/IMAGE or train/CLASS/IMAGE files.")
    if name is None:
        return source
    return Source(_safe(name), source.location, source.items, source.root, source.blobs, source.notes)


def _folder(root: Path) -> Source:
    split_folders = {entry: SPLIT_FOLDERS[entry.lower()] for entry in _folders(root) if entry.lower() in SPLIT_FOLDERS}
    if any(split == "train" and _folders(root / entry) for entry, split in split_folders.items()):
        places = [
            (f"{folder}/{label}", label, split)
            for folder, split in split_folders.items()
            for label in _folders(root / folder)
        ]
        unused = [entry for entry in _folders(root) if entry not in split_folders]
    else:
        places, unused = [(label, label, "") for label in _folders(root)], []
    items: list[Item] = []
    notes: list[str] = []
    for folder, label, split in places:
        files = sorted(_images(root, folder))
        items.extend(Item(path, label, split) for path in files)
        if not files:
            notes.append(f"{root / folder}: no image in it, the class is left out there")
    if unused:
        notes.append(f"{root}: beside train/ the folders {', '.join(unused)} are not read")
    return Source(_safe(root.resolve().name), str(root.resolve()), tuple(items), root.resolve(), notes=tuple(notes))


def _folders(root: Path) -> list[str]:
    """Return the names of the folders in a folder, hidden ones and symbolic links to folders left out."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
    return sorted(names, key=_natural)


def _images(root: Path, folder: str) -> Iterator[str]:
    """Yield the relative POSIX paths of the image files below a folder; links to folders are not followed."""
    for where, folders, files in os.walk(root / folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(where, name).relative_to(root).as_posix()


def _manifest(path: Path) -> Source:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: not a CSV file in UTF-8 ({error}).") from error
    columns = set(rows[0]) if rows else set()
    if not {"path", "label"} <= columns:
        raise DataError(
            f"{path}: the columns path and label are needed (split is optional), found {sorted(map(str, columns))}."
        )
    items = []
    for line, row in enumerate(rows, start=2):
        split = (row.get("split") or "").strip().lower()
        if not row["path"] or not row["label"]:
            raise DataError(f"{path}, line {line}: path and label must not be empty.")
        if split and split not in SPLIT_FOLDERS:
            raise DataError(f"{path}, line {line}: split {split!r} is none of train, val, test.")
        items.append(Item(PurePosixPath(row["path"]).as_posix(), row["label"], SPLIT_FOLDERS.get(split, "")))
    twice = [name for name, count in Counter(item.path for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {twice[0]} is listed more than once ({len(twice)} such paths).")
    if 0 < sum(not item.split for item in items) < len(items):
        raise DataError(f"{path}: some rows have a split and some have none: fill in all of them, or none.")
    root = path.resolve().parent
    return Source(_safe(path.stem), str(path.resolve()), tuple(items), root)


def _digits(text: str) -> Source:
    if text != "sklearn:digits":
        raise UsageError(f"{text}: of scikit-learn's data sets only sklearn:digits holds images.")
    from sklearn.datasets import load_digits

    digits = load_digits()
    items, blobs = [], {}
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"{index:04d}.pgm"
        blobs[path] = b"P5 8 8 255\n" + (image * 255 / 16).round().astype("uint8").tobytes()
        items.append(Item(path, str(label)))
    return Source("digits", text, tuple(items), blobs=blobs)


def location_hash(location: str) -> str:
    """Return six digits that tell two sources of one name apart."""
    return fingerprint(location)[:6]


def _safe(name: str) -> str:
    kept = "".join(char if char.isalnum() or char in "._-" else "-" for char in name).strip(".-")
    return kept or "data"


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Order names so that ``class2`` comes before ``class10``."""
    parts: list[tuple[int, str]] = []
    digits = ""
    for char in f"{name}\0":
        if char.isascii() and char.isdigit():
            digits += char
            continue
        if digits:
            parts.append((int(digits), digits))
            digits = ""
        parts.append((-1, char))
    return tuple(parts)
