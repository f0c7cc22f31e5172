"""Data sets by name: torchvision's and those of the Hugging Face hub. Nothing is downloaded unless that is asked for."""

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import DataError, SetupError, UsageError
from featcache.images import encode_image
from featcache.sources.arrays import from_array
from featcache.sources.base import Files, Item, Numbered, Source, safe_name, split_of

_FILE_LISTS = (("samples", None), ("_samples", None), ("imgs", None), ("_image_files", "_labels"), ("_images", "_labels"))
_HF_SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "dev": "val", "test": "test"}


def open_torchvision(name: str, root: Path | None, *, download: bool) -> Source:
    """Open one of torchvision's classification sets, its train and test parts where it has them.

    Raises:
        UsageError: there is no such set, or no root was given.
        DataError: it is not at the root.
    """
    from torchvision import datasets

    kind: Any = getattr(datasets, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, datasets.VisionDataset)) or name in {"VisionDataset", "FakeData"}:
        raise UsageError(f"torchvision:{name}: torchvision has no such data set.")
    if root is None:
        raise UsageError(f"torchvision:{name}: say where it lies, or is to be downloaded to, with --data-root.")
    parameters = inspect.signature(kind).parameters
    more: dict[str, Any] = {"download": download} if "download" in parameters else {}
    parts = []
    for split, arguments in _torchvision_splits(parameters):
        try:
            parts.append((split, kind(str(root), **arguments, **more)))  # type: ignore[call-arg]
        except ValueError:
            continue  # the set has no such split
        except (RuntimeError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"torchvision:{name}: not at {root} ({reason}). --download fetches it.") from error
    if not parts:
        raise DataError(f"torchvision:{name}: none of its splits can be opened at {root}.")
    location = f"torchvision:{name}@{root.resolve()}"
    several = [_torchvision_part(safe_name(name), location, part) for _, part in parts]
    return _joined(safe_name(name), location, [split for split, _ in parts], several)


def open_hub(name: str, *, download: bool) -> Source:
    """Open a set of the Hugging Face hub, or a folder that ``datasets`` can load; images are decoded by featcache.

    Raises:
        SetupError: ``datasets`` is not installed.
        DataError: it cannot be loaded, or has no column of images and labels.
    """
    try:
        import datasets
    except ImportError:
        raise SetupError(f"hf:{name} needs the datasets library: `pip install 'featcache[hf]'`.") from None
    try:
        with _no_requests_but(download=download):
            loaded = datasets.load_dataset(name)
    except Exception as error:  # the library's loaders raise anything
        lines = str(error).strip().splitlines()
        hint = "" if download else " --download lets it be fetched."
        raise DataError(f"hf:{name}: cannot be loaded ({lines[0] if lines else type(error).__name__}).{hint}") from error
    parts, splits = [], []
    for split, rows in loaded.items():
        if str(split) not in _HF_SPLITS:
            continue
        image = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
        label = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.ClassLabel)), None)
        label = label or next((key for key in ("label", "labels") if key in rows.features), None)
        if image is None or label is None:
            raise DataError(f"hf:{name}: a column of images and one of labels are needed, found {sorted(rows.features)}.")
        undecoded = rows.cast_column(image, datasets.Image(decode=False))
        kind = rows.features[label]
        values = [kind.int2str(value) if hasattr(kind, "int2str") else str(value) for value in rows[label]]
        items = tuple(Item(f"{row:08d}", value) for row, value in enumerate(values))
        numbers = {item.path: row for row, item in enumerate(items)}
        parts.append(Source(name, name, items, Numbered(numbers, partial(_hub_bytes, undecoded, image))))
        splits.append(_HF_SPLITS[str(split)])
    if not parts:
        raise DataError(f"hf:{name}: it has none of the splits train, validation, test.")
    stem = Path(name).name if os.path.isdir(name) else name  # noqa: PTH112 - a name of the hub is no path
    return _joined(safe_name(stem), f"hf:{name}", splits if len(splits) > 1 else [""], parts)


@contextmanager
def _no_requests_but(*, download: bool) -> Iterator[None]:
    """Let the hub's libraries fetch what was asked for, or nothing at all; they report no load in either case."""
    from datasets import config
    from huggingface_hub import constants

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


def _torchvision_splits(parameters: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if "train" in parameters:
        yield from (("train", {"train": True}), ("test", {"train": False}))
    elif "split" in parameters:
        yield from ((split_of(name, ""), {"split": name}) for name in ("train", "val", "valid", "test"))
        yield "train", {"split": "trainval"}
    else:
        yield "", {}


def _torchvision_part(name: str, location: str, part: Any) -> Source:
    """Return a set's images as files or rows of an array where it keeps them so, else one by one through the set."""
    classes = [str(one) for one in getattr(part, "classes", None) or []]

    def text(label: Any) -> str:
        return classes[int(label)] if classes and 0 <= int(label) < len(classes) else str(int(label))

    for files, labels in _FILE_LISTS:
        found = getattr(part, files, None)
        if isinstance(found, list) and found and (labels is None or hasattr(part, labels)):
            pairs = found if labels is None else list(zip(found, getattr(part, labels), strict=True))
            root = Path(os.path.commonpath([str(Path(str(path)).resolve().parent) for path, _ in pairs]))
            items = tuple(Item(Path(str(path)).resolve().relative_to(root).as_posix(), text(label)) for path, label in pairs)
            return Source(name, location, items, Files(root))
    labels_found = next((getattr(part, key) for key in ("targets", "labels", "_labels") if hasattr(part, key)), None)
    data = getattr(part, "data", None)
    if data is not None and labels_found is not None:
        pixels = np.asarray(data)
        if pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.shape[3] != 3:
            pixels = pixels.transpose(0, 2, 3, 1)
        return from_array(pixels, [text(label) for label in labels_found], name=name, location=location)
    labelled = (
        [text(part[row][1]) for row in range(len(part))] if labels_found is None else [text(one) for one in labels_found]
    )
    items = tuple(Item(f"{row:08d}", label) for row, label in enumerate(labelled))
    return Source(name, location, items, Numbered({item.path: row for row, item in enumerate(items)}, partial(_one, part)))


def _one(part: Any, row: int) -> bytes:
    return encode_image(part[row][0])


def _hub_bytes(rows: Any, column: str, row: int) -> bytes:
    value = rows[row][column]
    if value and value.get("bytes") is not None:
        return bytes(value["bytes"])
    return Path(value["path"]).read_bytes()


class _Parts:
    """Contents of several sources, told apart by the first part of the path."""

    def __init__(self, parts: dict[str, Source]) -> None:
        self._parts = parts

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        part, _, rest = path.partition("/")
        return self._parts[part].read(rest)

    def stat(self, path: str) -> Any:
        """Return what tells that an image has not changed."""
        part, _, rest = path.partition("/")
        return self._parts[part].stat(rest)


def _joined(name: str, location: str, splits: list[str], parts: list[Source]) -> Source:
    if len(parts) == 1:
        return Source(name, location, parts[0].items, parts[0].contents)
    named = {f"{number}-{split}": part for number, (split, part) in enumerate(zip(splits, parts, strict=True))}
    items = tuple(
        Item(f"{key}/{item.path}", item.label, key.partition("-")[2]) for key, part in named.items() for item in part.items
    )
    return Source(name, location, items, _Parts(named))
