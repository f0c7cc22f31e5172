"""Images in folders: CLASS/IMAGE, or train|val|test/CLASS/IMAGE."""

import os
from collections.abc import Iterator
from pathlib import Path

from featcache.sources.base import SPLIT_FOLDERS, Files, Item, Items, Source, natural, safe_name

_PHOTOGRAPHS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".avif", ".jp2")
_OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico")
IMAGE_SUFFIXES = frozenset(_PHOTOGRAPHS + _OTHERS)


def open_folder(root: Path) -> Source:
    """Open a folder of images; hidden files and links to folders are left out."""
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
    notes: list[str] = []

    def items() -> Iterator[Item]:
        for folder, label, split in places:
            files = sorted(image_files(root, folder))
            yield from (Item(path, label, split) for path in files)
            if not files:
                notes.append(f"{root / folder}: no image in it, the class is left out there")

    packed = Items(items())
    if unused:
        notes.append(f"{root}: beside train/ the folders {', '.join(unused)} are not read")
    return Source(safe_name(root.resolve().name), str(root.resolve()), packed, Files(root.resolve()), tuple(notes))


def _folders(root: Path) -> list[str]:
    """Return the names of the folders in a folder, hidden ones and symbolic links to folders left out."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
    return sorted(names, key=natural)


def image_files(root: Path, folder: str = "") -> Iterator[str]:
    """Yield the relative POSIX paths of the image files below a folder; links to folders are not followed."""
    for where, folders, files in os.walk(root / folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(where).relative_to(root).as_posix()  # of folders alone: pathlib remembers every name it has seen
        before = "" if inside == "." else f"{inside}/"
        for name in files:
            if not name.startswith(".") and name[name.rfind(".") :].lower() in IMAGE_SUFFIXES:
                yield before + name
