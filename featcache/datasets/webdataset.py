"""WebDataset shards: tar files that are indexed once and read in place, never extracted."""

import io
import json
import math
import re
import tarfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from featcache.datasets.base import (
    MOST_IMAGE_BYTES,
    SPLIT_FOLDERS,
    Dataset,
    FileStat,
    Sample,
    require_file,
    require_whole,
    safe_name,
    split_within,
)
from featcache.datasets.folder import IMAGE_SUFFIXES, IN_ORDER, is_hidden, many, tallied
from featcache.datasets.tables import Labels, labelled
from featcache.errors import DataError

# A label is a word, a header some hundred bytes: what claims more is no shard, and is not read.
_MOST_LABEL_BYTES = 1 << 20
_MOST_HEADER_BYTES = 16 << 20
_MOST_SHARDS = 100_000  # braces multiply: {0..9999}{0..9999} would be a list of a hundred million names
_LABEL_SUFFIXES = (".cls", ".json", ".txt")  # the first that says a label counts: captions stand in .txt, and in .json


@dataclass(frozen=True)
class TarReader:
    """Images inside tar files: for each the archive, its offset and its size."""

    places: dict[str, tuple[Path, int, int]]

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        archive, offset, size = self.places[path]
        if size > MOST_IMAGE_BYTES:
            raise OSError(f"{size / 1e6:.0f} MB, over the limit of {MOST_IMAGE_BYTES / 1e6:.0f} MB an image")
        with archive.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise OSError(f"{archive} ends before it")
        return content

    def stat(self, path: str) -> FileStat:
        """Return the image's size and offset and the archive's time."""
        archive, offset, size = self.places[path]
        facts = archive.stat()
        return FileStat(size, facts.st_mtime_ns, offset, facts.st_ctime_ns)


@dataclass
class _Shard:
    """What one tar file holds: by sample and suffix the place of its image, and its labels; and what is not read."""

    images: dict[str, dict[str, tuple[str, int, int]]] = field(default_factory=lambda: defaultdict(dict))
    labels: dict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    unread: Counter[str] = field(default_factory=Counter)


class _Archive(io.FileIO):
    """A tar file whose headers are of a sane size: one of them may claim any number of bytes."""

    def read(self, size: int | None = -1, /) -> Any:
        """Read as a file does, or raise ReadError."""
        if size is None or size < 0 or size > _MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def open_shards(pattern: str) -> Dataset:
    """Open ``shards-{000..009}.tar``: samples of an image and a label: ``.cls``, else "label" in ``.json``, else ``.txt``.

    Nothing depends on the order of members. Of several images in one sample the first by format is read, ``.jpg`` before
    ``.png``. A split is taken from a shard's name where that begins with train, val or test, or, where no name does, from
    the one such word in it or in its folder's name, if the shards then have several splits.

    Raises:
        DataError: a shard is absent, compressed or no tar file, or a sample has no label.
    """
    paths = [Path(text).expanduser() for text in _braces(pattern)]
    read, unread, more = Labels(pattern), Counter[str](), 0
    rows: list[tuple[str, str | None, str]] = []
    places: dict[str, tuple[Path, int, int]] = {}
    for path, split in zip(paths, _splits(paths), strict=True):
        shard = _indexed(path, read)
        unread += shard.unread
        for key, formats in shard.images.items():
            # By format, not by order: a shard that was packed again keeps its images.
            name, offset, size = formats[min(formats, key=IN_ORDER.index)]
            more += len(formats) - 1
            says = shard.labels.get(key, {})
            label = next((says[suffix] for suffix in _LABEL_SUFFIXES if suffix in says), None)
            rows.append((f"{path.name}/{name}", label, split))
            places[rows[-1][0]] = (path.resolve(), offset, size)
        lone = sum(key not in shard.images for key in shard.labels)
        unread.update({"labels without an image": lone} if lone else {})
    labels, splits = [row[1] for row in rows], [row[2] for row in rows]
    usable, notes = labelled(labels, splits, pattern, lambda number: f"{rows[number][0]} (.cls, label in .json, or .txt)")
    if unread:
        notes.append(f"{pattern}: left out: {many(unread.total(), 'member')} of shards ({tallied(unread)})")
    if more:
        notes.append(
            f"{pattern}: left out: {many(more, 'image')} beside another of the same sample: .jpg counts before .png"
        )
    items = [Sample(path, label or "", split) for path, label, split in (rows[number] for number in usable)]
    require_whole(items, pattern)
    stem = re.sub(r"[-_.]*\{.*?\}[-_.]*", "", PurePosixPath(pattern).name).removesuffix(".tar") or "shards"
    location = str(Path(pattern).expanduser().absolute())
    return Dataset(safe_name(stem), location, tuple(items), TarReader(places), tuple(notes), read.lists)


def _indexed(path: Path, read: Labels) -> _Shard:
    shard = _Shard()
    try:
        require_file(path)
        # mode r: (with a colon) is an uncompressed tar only: members are read in place, at their offset.
        with _Archive(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if member.isdir() or any(is_hidden(part) for part in name.parts if part not in {".", ".."}):
                    continue
                _sort_in(archive, member, name, shard, path, read)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such shard.") from None
    except tarfile.TarError as error:
        raise DataError(
            f"{path}: not an uncompressed tar file ({error}); compressed shards cannot be read in place."
        ) from error
    return shard


def _sort_in(
    archive: tarfile.TarFile, member: tarfile.TarInfo, name: PurePosixPath, shard: _Shard, path: Path, read: Labels
) -> None:
    stem, _, suffix = name.name.partition(".")
    key, suffix = (name.parent / stem).as_posix(), f".{suffix.lower()}" if suffix else ""
    if not member.isreg():
        shard.unread["links and devices"] += 1
    elif suffix in IMAGE_SUFFIXES and member.sparse is None:
        if suffix in shard.images[key]:
            raise DataError(f"{path}: {member.name} is there twice.")
        shard.images[key][suffix] = (member.name, member.offset_data, member.size)
    elif suffix in _LABEL_SUFFIXES and member.size <= _MOST_LABEL_BYTES:
        file = archive.extractfile(member)
        label = _label(file.read() if file else b"", suffix, read, member.name)
        # Two labels for one sample: any choice would be a guess.
        if label is not None and shard.labels[key].setdefault(suffix, label) != label:
            raise DataError(f"{path}: {member.name} is there twice, with different labels.")
    else:
        shard.unread[suffix] += 1


def _label(content: bytes, suffix: str, read: Labels, name: str) -> str | None:
    text = content.decode("utf-8", "replace").strip()
    if suffix != ".json":
        return read.read(text, name)
    try:
        content_read = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return read.read(content_read.get("label"), name) if isinstance(content_read, dict) else None


def _splits(paths: list[Path]) -> list[str]:
    words = [re.findall(r"[a-z]+", path.name.lower()) for path in paths]
    first = [SPLIT_FOLDERS.get(parts[0], "") if parts and path.name[0].isalpha() else "" for parts, path in
             zip(words, paths, strict=True)]  # fmt: skip
    if any(first):
        return first
    for names in ([path.name for path in paths], [path.parent.name for path in paths]):
        inside = [split_within(name) for name in names]
        if all(inside) and len(set(inside)) > 1:
            return inside
    return first


def _braces(pattern: str) -> list[str]:
    """Expand ``{000..009}`` and ``{a,b}``.

    Raises:
        DataError: that would be more than 100,000 shards.
    """
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[list[str] | range] = []
    zeros = []
    for index, part in enumerate(parts):
        span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", part) if index % 2 else None
        zeros.append(len(span[1]) if span else 0)
        if span:
            choices.append(range(int(span[1]), int(span[2]) + 1))
        else:
            choices.append(part.split(",") if index % 2 else [part])
    count = math.prod(len(choice) for choice in choices)
    if count > _MOST_SHARDS:
        raise DataError(f"{pattern}: names {count} shards; {_MOST_SHARDS} are the most.")
    texts = [[str(option).zfill(width) for option in choice] for choice, width in zip(choices, zeros, strict=True)]
    return ["".join(choice) for choice in product(*texts)]
