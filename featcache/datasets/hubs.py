"""Data sets by name: torchvision's and those of the Hugging Face hub. Nothing is downloaded unless that is asked for."""

import inspect
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featcache.datasets import (
    ArrayReader,
    Dataset,
    FileReader,
    Sample,
    looks_like_split,
    read_file,
    safe_name,
    split_of,
)
from featcache.datasets.arrays import from_array
from featcache.datasets.decoding import encode_image
from featcache.datasets.folder import many
from featcache.datasets.tables import Labels, labelled
from featcache.errors import DataError, SetupError, UsageError
from featcache.specs import SampleKind

# Where torchvision's classes keep paths; read from there, no image is decoded by torchvision.
_FILE_LISTS = (("samples", None), ("_samples", None), ("imgs", None), ("_image_files", "_labels"), ("_images", "_labels"))
# The hub's sets name the part that chooses in four ways.
_HF_SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "dev": "val", "test": "test"}
_LABELS = ("label", "labels")
_MOST_LOOKED_AT = 100_000  # files; a whole disk that is named by mistake ends here


def open_torchvision(name: str, root: Path | None, *, download: bool) -> Dataset:
    """Open one of torchvision's classification sets, its train and test parts where it has them.

    Raises:
        UsageError: there is no such set, it needs other arguments, or no root was given.
        DataError: it is not at the root, or damaged.
        SetupError: it needs a library that is not installed.
    """
    kind = _torchvision_kind(name)
    if root is None:
        raise UsageError(f"torchvision:{name}: say where it lies, or is to be downloaded to, with `data_root`.")
    parameters = inspect.signature(kind).parameters
    needed = {
        parameter.name
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }
    if more := sorted(needed - {"root", "split"}):
        raise UsageError(f"torchvision:{name}: needs {', '.join(more)}, and is no set of images with one label each.")
    _require_files_below(root, f"torchvision:{name}")
    options = {"download": download} if "download" in parameters else {}
    parts: dict[str, Any] = {}
    other_splits: set[str] = set()
    for split, arguments in _torchvision_splits(parameters):
        if split in parts or (arguments.get("split") == "trainval" and "val" in parts):
            continue  # trainval is train and val together: it would train on what chooses; valid is val
        opened = _torchvision_open(kind, name, root, arguments | options)
        if isinstance(opened, _NoSuchSplit):
            other_splits |= opened.others_there
        else:
            parts[split] = opened
    if not parts:
        names = ", ".join(sorted(other_splits))
        reason = f"its splits are {names}: none is train, val or test" if names else f"no split can be opened at {root}"
        raise DataError(f"torchvision:{name}: {reason}.")
    location = f"torchvision:{name}@{root.resolve()}"
    unread = sorted(other_splits - {"train", "val", "valid", "test", "trainval"})
    notes = [f"torchvision:{name}: left out: {many(len(unread), 'other split')} ({', '.join(unread)})"] if unread else []
    by_split = [_torchvision_part(safe_name(name), location, part) for part in parts.values()]
    return _with_splits(safe_name(name), location, list(parts), by_split, notes)


def _torchvision_kind(name: str) -> Any:
    from torchvision import datasets

    kind: Any = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)) or name in {"VisionDataset", "FakeData"}:
        raise UsageError(f"torchvision:{name}: torchvision has no such data set.")
    return kind


def open_hub(name: str, *, download: bool) -> Dataset:
    """Open a set of the Hugging Face hub, or a folder that ``datasets`` can load; images are decoded by featcache.

    Of several columns of labels the one called ``label`` is read, else ``labels``, else the first of class labels.

    Raises:
        SetupError: ``datasets`` is not installed.
        DataError: it cannot be loaded, has no column of images and labels, or a label is missing.
    """
    try:
        import datasets
    except ImportError:
        raise SetupError(f"hf:{name} needs the datasets library: `pip install 'featcache[hf]'`.") from None
    is_folder = os.path.isdir(name)  # noqa: PTH112 - a name of the hub is no path
    if is_folder:
        _require_files_below(Path(name), f"hf:{name}")
    loaded = _load_hub(datasets, name, download=download)
    parts, notes = _hub_splits(name, {str(split): rows for split, rows in loaded.items()})
    read = [_hub_part(name, split, rows, datasets) for split, rows in parts.items()]
    rows = [(split, row, label) for split, part in zip(parts, read, strict=True) for row, label in enumerate(part.labels)]
    splits = [_HF_SPLITS[split] for split, _, _ in rows]
    usable, missing = labelled(
        [label for _, _, label in rows], splits, f"hf:{name}", lambda number: "{}, row {}".format(*rows[number])
    )
    items: dict[str, list[Sample]] = {}
    for split, row, label in (rows[number] for number in usable):
        items.setdefault(split, []).append(Sample(f"{row:08d}", label or ""))
    by_split = [
        Dataset(name, name, items[split], part.reader, (), part.lists, kind=part.kind)
        for split, part in zip(parts, read, strict=True)
        if split in items
    ]
    stem = Path(name).name if is_folder else name
    notes += [*missing, *dict.fromkeys(note for part in read for note in part.notes)]
    split_names = [_HF_SPLITS[split] for split in parts if split in items] if len(parts) > 1 else [""]
    return _with_splits(safe_name(stem), f"hf:{name}", split_names, by_split, notes)


def _load_hub(datasets: Any, name: str, *, download: bool) -> Any:
    try:
        with _no_requests_but(download=download):
            return datasets.load_dataset(name)
    except Exception as error:  # the library's loaders raise anything
        hint = "" if download else " `download=True` lets it be fetched."
        raise DataError(f"hf:{name}: cannot be loaded ({_error_in_words(error)}).{hint}") from error


@dataclass(frozen=True)
class _HubPart:
    """One split: what reads its samples, its labels, notes on other columns, whether labels are lists, and of what kind."""

    reader: ArrayReader
    labels: list[str | None]
    notes: list[str]
    lists: bool
    kind: SampleKind


def _hub_splits(name: str, loaded: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the splits that are read, and a note on the others.

    Raises:
        DataError: there is none, or one by another name would be lost.
    """
    splits = {split: rows for split, rows in loaded.items() if split in _HF_SPLITS}
    unread = {split: len(rows) for split, rows in loaded.items() if split not in splits}
    if not splits:
        raise DataError(
            f"hf:{name}: it has none of the splits train, validation, test, but {', '.join(unread) or 'nothing'}."
        )
    covered = {_HF_SPLITS[split] for split in splits}
    lost = next((split for split in unread if looks_like_split(split) and looks_like_split(split) not in covered), None)
    if lost is not None:
        raise DataError(
            f"hf:{name}: the split {lost} would be lost: only {', '.join(_HF_SPLITS)} are read. Save the set with one of "
            "these names."
        )
    counts = ", ".join(f"{split} {number}" for split, number in unread.items())
    return splits, [
        f"hf:{name}: left out: {many(sum(unread.values()), 'image')} of other splits ({counts})"
    ] if unread else []


def _hub_part(name: str, split: str, rows: Any, datasets: Any) -> _HubPart:
    images = [key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)]
    # without images it is a set of texts: of several columns the one that is called so, as in tables
    texts_in = [] if images else _text_columns(rows.features)
    classes = [key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)]
    labels = [key for key in _LABELS if key in rows.features] + classes
    samples = images or texts_in
    image = next((key for key in ("image", "text") if key in samples), next(iter(samples), None))
    if image is None or not labels:
        raise DataError(
            f"hf:{name}: a column of images or texts and one of labels are needed, found {sorted(rows.features)}."
        )
    label, kind = labels[0], rows.features[labels[0]]
    # A list of labels keeps the class names in its inner feature.
    names = getattr(kind, "names", None) or getattr(getattr(kind, "feature", None), "names", None) or ()
    read = Labels(f"hf:{name}, {split}", [str(class_name) for class_name in names])
    texts = [read.read(value, f"row {row}") for row, value in enumerate(rows[label])]
    numbers = {f"{row:08d}": row for row in range(len(texts))}
    # The file's own bytes: decoded by `datasets` and encoded again they would be another image.
    undecoded = rows.cast_column(image, datasets.Image(decode=False)) if images else rows
    notes = []
    for chosen, all_of in ((label, list(dict.fromkeys(labels))), (image, samples)):
        unread = [key for key in all_of if key != chosen]
        if unread:
            notes.append(f"hf:{name}: the column {chosen} is read, not {', '.join(unread)}")
    reader = ArrayReader(numbers, partial(_hub_bytes if images else _hub_text, undecoded, image))
    return _HubPart(reader, texts, notes, read.lists, "image" if images else "text")


def _text_columns(features: Any) -> list[str]:
    """Return the columns of text, but for those that are labels."""
    return [
        key
        for key, kind in features.items()
        if getattr(kind, "dtype", "") in {"string", "large_string"} and key not in _LABELS
    ]


def _hub_text(rows: Any, column: str, row: int) -> bytes:
    value = rows[row][column]
    if not isinstance(value, str):
        raise OSError(f"row {row} holds no text")
    return value.encode("utf-8", "surrogatepass")


def _error_in_words(error: Exception) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return (
        line
        if line and isinstance(error, RuntimeError | OSError)
        else f"{type(error).__name__}{f': {line}' if line else ''}"
    )


def _require_files_below(root: Path, subject: str) -> None:
    """Refuse pipes and devices among the first files of a folder: a library that reads them would wait for ever.

    Raises:
        DataError: there is one.
    """
    count = 0
    for where, _, files in os.walk(root):
        for file in files:
            count += 1
            if count > _MOST_LOOKED_AT:
                return
            path = Path(where, file)
            if path.exists() and not path.is_file():
                raise DataError(f"{subject}: {path}: a pipe, socket or device, not a file.")


@contextmanager
def _no_requests_but(*, download: bool) -> Iterator[None]:
    """Let the hub's libraries fetch what was asked for, or nothing at all; they report no load in either case."""
    from datasets import config
    from huggingface_hub import constants

    # Both libraries read their switches when they are imported, so that the values are set, not the environment.
    switches = {(config, "HF_UPDATE_DOWNLOAD_COUNTS"): False}
    if not download:
        switches |= {(config, "HF_HUB_OFFLINE"): True, (constants, "HF_HUB_OFFLINE"): True}
    before = {place: getattr(*place) for place in switches}
    try:
        for place, value in switches.items():
            setattr(*place, value)
        yield
    finally:
        for place, value in before.items():
            setattr(*place, value)


@dataclass(frozen=True)
class _NoSuchSplit:
    """A set has no split of a name; it has others."""

    others_there: frozenset[str]


def _torchvision_open(kind: Any, name: str, root: Path, arguments: dict[str, Any]) -> Any:
    try:
        return kind(str(root), **arguments)
    except ImportError as error:
        raise SetupError(f"torchvision:{name}: needs a library that is not installed ({_error_in_words(error)}).") from error
    except (RuntimeError, OSError) as error:
        hint = " `download=True` fetches it." if "download" in arguments else ""
        raise DataError(f"torchvision:{name}: not at {root}, or damaged ({_error_in_words(error)}).{hint}") from error
    except Exception as error:  # damaged pickles, archives and tables raise anything
        if "split" in arguments and isinstance(error, ValueError) and "Unknown value" in str(error):
            return _NoSuchSplit(frozenset(re.findall(r"'([^']+)'", str(error).partition("Valid values")[2])))
        raise DataError(f"torchvision:{name}: cannot be read at {root} ({_error_in_words(error)}).") from error


def _torchvision_splits(parameters: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if "train" in parameters:
        yield from (("train", {"train": True}), ("test", {"train": False}))
    elif "split" in parameters:
        yield from ((split_of(name, ""), {"split": name}) for name in ("train", "val", "valid", "test"))
        yield "train", {"split": "trainval"}
    else:
        yield "", {}


def _torchvision_part(name: str, location: str, part: Any) -> Dataset:
    """Return a set's images as files or rows of an array where it keeps them so, else one by one through the set."""
    read = Labels(location, _told_apart([str(class_name) for class_name in getattr(part, "classes", None) or []]))

    def texts(values: Any) -> list[str]:
        files_or_labels = [read.read(value, f"row {row}") for row, value in enumerate(values)]
        labelled(files_or_labels, [""] * len(files_or_labels), location, "row {}".format)
        return [text or "" for text in files_or_labels]

    for files, labels in _FILE_LISTS:
        files_or_labels = getattr(part, files, None)
        if isinstance(files_or_labels, list) and files_or_labels and (labels is None or hasattr(part, labels)):
            pairs = files_or_labels if labels is None else list(zip(files_or_labels, getattr(part, labels), strict=True))
            places = [Path(str(path)).resolve() for path, _ in pairs]
            root = Path(os.path.commonpath([str(place.parent) for place in places]))
            named = zip(places, texts(label for _, label in pairs), strict=True)
            items = tuple(Sample(place.relative_to(root).as_posix(), label) for place, label in named)
            return Dataset(name, location, items, FileReader(root), (), read.lists)
    targets = next((getattr(part, key) for key in ("targets", "labels", "_labels") if hasattr(part, key)), None)
    data = getattr(part, "data", None)
    if data is not None and targets is not None:
        pixels = np.asarray(data)
        # SVHN and STL10 keep channels first.
        if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
            pixels = pixels.transpose(0, 2, 3, 1)
        return replace(from_array(pixels, texts(targets), name=name, location=location), label_lists=read.lists)
    found_labels = texts(part[row][1] for row in range(len(part))) if targets is None else texts(targets)
    items = tuple(Sample(f"{row:08d}", label) for row, label in enumerate(found_labels))
    numbers = {item.path: row for row, item in enumerate(items)}
    return Dataset(name, location, items, ArrayReader(numbers, partial(_one, part)), (), read.lists)


def _told_apart(names: list[str]) -> list[str]:
    """Return class names with the class's number behind those that several have, as ImageNet's cranes do."""
    return [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]


def _one(part: Any, row: int) -> bytes:
    return encode_image(part[row][0])


def _hub_bytes(rows: Any, column: str, row: int) -> bytes:
    value = rows[row][column]
    if not value or (value.get("bytes") is None and not value.get("path")):
        raise OSError(f"row {row} holds no image")
    return bytes(value["bytes"]) if value.get("bytes") is not None else read_file(value["path"])


class _Parts:
    """Contents of several sources, told apart by the first part of the path."""

    def __init__(self, parts: dict[str, Dataset]) -> None:
        self._parts = parts

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        part, _, rest = path.partition("/")
        return self._parts[part].read(rest)

    def stat(self, path: str) -> Any:
        """Return what tells that an image has not changed."""
        part, _, rest = path.partition("/")
        return self._parts[part].stat(rest)


def _with_splits(name: str, location: str, splits: list[str], parts: list[Dataset], notes: list[str]) -> Dataset:
    all_notes, lists = tuple(notes), any(part.label_lists for part in parts)
    if len(parts) == 1:
        return replace(parts[0], name=name, location=location, notes=all_notes, label_lists=lists)
    named = {f"{number}-{split}": part for number, (split, part) in enumerate(zip(splits, parts, strict=True))}
    items = tuple(
        Sample(f"{key}/{item.path}", item.label, key.partition("-")[2])
        for key, part in named.items()
        for item in part.samples
    )
    return Dataset(name, location, items, _Parts(named), all_notes, lists, kind=parts[0].kind)
