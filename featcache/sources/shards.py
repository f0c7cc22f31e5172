"""WebDataset shards: tar files that are indexed once and read in place, never extracted."""

import json
import re
import tarfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PurePosixPath

from featcache.errors import DataError
from featcache.sources.base import SPLIT_FOLDERS, FileStat, Item, Source, require_whole, safe_name
from featcache.sources.folders import IMAGE_SUFFIXES

_MOST_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Members:
    """Images inside tar files: for each the archive, its offset and its size."""

    places: dict[str, tuple[Path, int, int]]

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        archive, offset, size = self.places[path]
        with archive.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{archive} ends before it")
        return content

    def stat(self, path: str) -> FileStat:
        """Return the image's size and offset and the archive's time."""
        archive, offset, size = self.places[path]
        found = archive.stat()
        return FileStat(size, found.st_mtime_ns, offset, found.st_ctime_ns)


def open_shards(pattern: str) -> Source:
    """Open ``shards-{000..009}.tar``: samples of an image and a label, ``.cls`` or ``.txt`` or "label" in ``.json``.

    A split is taken from a shard's name where that begins with train, val or test.

    Raises:
        DataError: a shard is absent, compressed or no tar file, or a sample has no label.
    """
    paths = [Path(text).expanduser() for text in _braces(pattern)]
    items: list[Item] = []
    places: dict[str, tuple[Path, int, int]] = {}
    for path in paths:
        for key, (image, offset, size, label) in _samples(path).items():
            if label is None:
                raise DataError(f"{path}: {key} has an image and no label (.cls, .txt, or label in .json).")
            item = Item(f"{path.name}/{image}", label, _split(path))
            items.append(item)
            places[item.path] = (path.resolve(), offset, size)
    require_whole(items, pattern)
    stem = re.sub(r"[-_.]*\{.*?\}[-_.]*", "", PurePosixPath(pattern).name).removesuffix(".tar") or "shards"
    location = str(Path(pattern).expanduser().absolute())
    return Source(safe_name(stem), location, tuple(items), Members(places))


def _samples(path: Path) -> dict[str, tuple[str, int, int, str | None]]:
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg() or name.name.startswith("."):
                    continue
                stem, _, suffix = name.name.partition(".")
                key, suffix = (name.parent / stem).as_posix(), f".{suffix.lower()}"
                if suffix in IMAGE_SUFFIXES and member.sparse is None:
                    images[key] = (member.name, member.offset_data, member.size)
                elif suffix in {".cls", ".txt", ".json"} and member.size <= _MOST_LABEL_BYTES:
                    file = archive.extractfile(member)
                    label = _label(file.read() if file else b"", suffix)
                    if label is not None:
                        labels[key] = label
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such shard.") from None
    except tarfile.TarError as error:
        raise DataError(
            f"{path}: not an uncompressed tar file ({error}); compressed shards cannot be read in place."
        ) from error
    return {key: (*place, labels.get(key)) for key, place in images.items()}


def _label(content: bytes, suffix: str) -> str | None:
    text = content.decode("utf-8", "replace").strip()
    if suffix != ".json":
        return text or None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    label = found.get("label") if isinstance(found, dict) else None
    return str(label) if label is not None else None


def _split(path: Path) -> str:
    word = re.match(r"[a-z]+", path.name.lower())
    return SPLIT_FOLDERS.get(word[0], "") if word else ""


def _braces(pattern: str) -> list[str]:
    """Expand ``{000..009}`` and ``{a,b}``."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices = []
    for index, part in enumerate(parts):
        if index % 2 == 0:
            choices.append([part])
        elif span := re.fullmatch(r"(\d+)\.\.(\d+)", part):
            first, last = int(span[1]), int(span[2])
            choices.append([str(number).zfill(len(span[1])) for number in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    return ["".join(choice) for choice in product(*choices)]
