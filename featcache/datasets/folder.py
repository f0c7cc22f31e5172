"""Images in folders: CLASS/IMAGE, or train|val|test/CLASS/IMAGE. What lies there and is not read is said."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from featcache.datasets.base import (
    SPLIT_FOLDERS,
    Dataset,
    FileReader,
    Sample,
    SampleTable,
    looks_like_split,
    natural,
    safe_name,
    split_within,
)
from featcache.datasets.tree import IMAGE_SUFFIXES, Tree, Unread, is_hidden, leads, many, suffix_of, tallied
from featcache.errors import DataError

_FOLDER_SPLITS = SPLIT_FOLDERS | {"testing": "test", "dev": "val"}


def open_folder(root: Path) -> Dataset:
    """Open a folder of images.

    Links to folders are followed. Hidden files, and what systems leave behind, are left out; what else is not read is noted
    with its number.

    Raises:
        DataError: splits would be taken for classes, a split would be lost, or images lie outside class folders only.
    """
    folders = folders_in(root)
    splits = {name: _FOLDER_SPLITS[name.lower()] for name in folders if name.lower() in _FOLDER_SPLITS}
    if not any(split == "train" and folders_in(root / name) for name, split in splits.items()):
        splits = {}
    places = [(f"{top}/{label}", label, split) for top, split in splits.items() for label in folders_in(root / top)]
    places = places if splits else [(label, label, "") for label in folders]
    tree = Tree(root, [folder for folder, _, _ in places])
    empty: list[str] = []
    images: Counter[str] = Counter()
    nested: Counter[str] = Counter()  # by the folder that lies in a class folder

    def items() -> Iterator[Sample]:
        for folder, label, split in places:
            files = sorted(tree.files(folder))
            yield from (Sample(path, label, split) for path in files)
            images[folder] = len(files)
            nested.update(inner for path in files if (inner := _inner(path, len(folder) + 1)))
            if not files:
                empty.append(f"{root / folder}: no image in it, the class is left out there")

    packed = SampleTable(items())
    outside = _outside(root, list(splits), tree.unread)
    if splits:
        beside = _beside(root, folders, splits)
        for top in splits:
            _require_split(root, top, images, outside)
    else:
        beside = Counter()
        _require_classes(root, [folder for folder in folders if images[folder]], nested)
    if not packed and outside:
        raise DataError(
            f"{root}: {many(outside.total(), 'image')} lie outside class folders: put them into one folder a class "
            "(CLASS/IMAGE), or list them with their labels in a CSV file."
        )
    unread = [
        *tree.unread.said(),
        *([f"{many(outside.total(), 'image')} outside class folders ({tallied(outside)})"] if outside else []),
        *([f"what lies beside train/ (images: {tallied(beside)})"] if beside else []),
    ]
    notes = [*([f"{root}: left out: {', '.join(unread)}"] if unread else []), *empty]
    if nested:
        notes.append(
            f"{root}: {many(nested.total(), 'image')} in folders inside class folders are of the class of the outer one "
            f"({tallied(nested)})"
        )
    return Dataset(safe_name(root.resolve().name), str(root.resolve()), packed, FileReader(root.resolve()), tuple(notes))


def folders_in(root: Path) -> list[str]:
    """Return the names of the folders in a folder, links to folders among them, hidden ones not."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if not is_hidden(entry.name) and leads(entry.is_dir)]
    except OSError as error:
        raise DataError(f"{root}: cannot be opened ({error.strerror or error}).") from error
    return sorted(names, key=natural)


def _outside(root: Path, tops: Collection[str], unread: Unread) -> Counter[str]:
    """Return how many images lie directly in the folder or its splits; what else lies there is added to the rest."""
    found: Counter[str] = Counter()
    for top in ("", *tops):
        with os.scandir(root / top) as entries:
            for entry in entries:
                path = f"{top}/{entry.name}" if top else entry.name
                if is_hidden(entry.name) or leads(entry.is_dir):
                    continue
                if suffix_of(entry.name) in IMAGE_SUFFIXES:
                    found[f"{top or '.'}/"] += 1
                elif entry.is_symlink() and not leads(entry.is_file):
                    unread.dead.append(path)
                else:
                    unread.suffixes[suffix_of(entry.name)] += 1
    lost = next((path for path in unread.dead if "/" not in path and _FOLDER_SPLITS.get(path.lower())), None)
    if lost:
        raise DataError(f"{root / lost}: a link that goes nowhere, where a split should be. Repair it or take it away.")
    return found


def _beside(root: Path, folders: Sequence[str], splits: dict[str, str]) -> Counter[str]:
    """Return how many images lie in the folders beside the splits.

    Raises:
        DataError: one of them looks like a split that is not there by its usual name.
    """
    found: Counter[str] = Counter()
    for name in folders:
        if name in splits:
            continue
        tree = Tree(root, [name])
        found[name] = sum(1 for _ in tree.files(name))
        split = looks_like_split(name)
        if split and split not in splits.values() and (found[name] or tree.unread):
            raise DataError(
                f"{root / name}: looks like the {split} split, which is read from a folder {split}/ only. Rename it, "
                "or move it away if it is none."
            )
    return found


def _require_split(root: Path, top: str, images: Counter[str], outside: Counter[str]) -> None:
    """Refuse a split of which nothing is read, though there is something.

    Raises:
        DataError: as said.
    """
    if any(number for folder, number in images.items() if folder.startswith(f"{top}/")):
        return
    tree = Tree(root, [top])
    there = sum(1 for _ in tree.files(top))
    if there or tree.unread:
        why = f"{many(outside[f'{top}/'], 'image')} lie outside class folders" if outside[f"{top}/"] else ""
        what = why or ", ".join(tree.unread.said()) or "what lies there is read under another name already"
        raise DataError(
            f"{root / top}: this split would be lost: {what}. A split is {top}/CLASS/IMAGE; move it away if it has no "
            "labels."
        )


def _require_classes(root: Path, folders: Sequence[str], nested: Counter[str]) -> None:
    """Refuse splits in the place of classes, or in classes.

    Raises:
        DataError: all folders, or two of them, are called as splits are; or classes hold splits.
    """
    named = [name for name in folders if looks_like_split(name)]
    within = [split_within(name) for name in folders]  # seg_train and seg_test; two sorts of trains may be classes
    exact = {_FOLDER_SPLITS[name.lower()] for name in folders if name.lower() in _FOLDER_SPLITS}
    if folders and (len(named) == len(folders) or len(exact) > 1 or (all(within) and len(set(within)) > 1)):
        raise DataError(
            f"{root}: {', '.join(named or folders)}: names of splits, not of classes. What is read is "
            "train|val|test/CLASS/IMAGE, with class folders in train/; or list the images with labels in a CSV file."
        )
    inside: dict[str, set[str]] = {}
    for place in nested:
        outer, _, inner = place.rpartition("/")
        if inner.lower() in _FOLDER_SPLITS:
            inside.setdefault(outer, set()).add(inner)
    for folder, several in inside.items():
        if len({_FOLDER_SPLITS[name.lower()] for name in several}) > 1:
            raise DataError(
                f"{root / folder}: holds the splits {', '.join(sorted(several))}, and would be one class. What is read is "
                f"train|val|test/CLASS/IMAGE; if these are in {folder}, name that folder instead."
            )


def _inner(path: str, start: int) -> str:
    """Return the folder inside the class folder that an image lies in, "" where it lies in the class folder itself."""
    end = path.find("/", start)
    return path[:end] if end >= 0 else ""
