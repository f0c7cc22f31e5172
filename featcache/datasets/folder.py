"""Samples that lie as files, in folders or in tar shards of WebDataset; what lies there and is not read is said.

Folders are CLASS/IMAGE, or train|val|test/CLASS/IMAGE. Shards are indexed once and read in place, never extracted.
"""

import io
import json
import math
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from featcache.datasets import (
    MOST_IMAGE_BYTES,
    SPLIT_FOLDERS,
    TEXT_SUFFIXES,
    Dataset,
    FileReader,
    FileStat,
    Sample,
    SampleTable,
    looks_like_split,
    natural,
    require_file,
    require_whole,
    safe_name,
    split_within,
)
from featcache.datasets.tables import Labels, labelled
from featcache.errors import DataError
from featcache.specs import SampleKind

# In order of preference, where one sample has its image in several formats.
_PHOTOGRAPHS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".avif", ".jp2")
_OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico")
_RARE = (".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".apng", ".avifs", ".jpx", ".jpf", ".jpc", ".j2k", ".j2c",
         ".dib", ".icb", ".vda", ".vst")  # fmt: skip
IN_ORDER = _PHOTOGRAPHS + _OTHERS + _RARE
IMAGE_SUFFIXES = frozenset(IN_ORDER)
_OF_SYSTEMS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin",
                         "system volume information", "lost+found"})  # fmt: skip
_SUFFIXES: dict[SampleKind, frozenset[str]] = {"image": IMAGE_SUFFIXES, "text": TEXT_SUFFIXES}
_SHOWN = 3
_FOLDER_SPLITS = SPLIT_FOLDERS | {"testing": "test", "dev": "val"}
# A label is a word, a header some hundred bytes: what claims more is no shard, and is not read.
_MOST_LABEL_BYTES = 1 << 20
_MOST_HEADER_BYTES = 16 << 20
_MOST_SHARDS = 100_000  # braces multiply: {0..9999}{0..9999} would be a list of a hundred million names
_LABEL_SUFFIXES = (".cls", ".json", ".txt")  # the first that says a label counts: captions stand in .txt, and in .json


@dataclass
class Unread:
    """What was met and is not read; hidden files and what systems leave behind are not counted."""

    suffixes: Counter[str] = field(default_factory=Counter)
    dead: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many things there are."""
        return self.suffixes.total() + len(self.dead) + len(self.repeated) + len(self.closed)

    def said(self) -> list[str]:
        """Return what the user is told, each with its number."""
        unknown = f"{many(self.suffixes.total(), 'file')} with other suffixes ({tallied(self.suffixes)})"
        return [
            *([unknown] if self.suffixes else []),
            *_listed(self.dead, "link", "that {go} nowhere"),
            *_listed(self.repeated, "link", "to folders that are read already"),
            *_listed(self.closed, "folder", "that cannot be opened"),
        ]


def sample_files(root: Path, kind: SampleKind = "image") -> tuple[list[str], list[str]]:
    """Return the relative POSIX paths of the samples below a folder, sorted, and notes on what else lies there."""
    tree = Tree(root, kind=kind)
    paths = sorted(tree.files())
    unread = tree.unread.said()
    return paths, [f"{root}: left out: {', '.join(unread)}"] if unread else []


class Tree:
    """The files of images, or texts, below a folder; links to folders are followed, every folder is read once.

    Args:
        root: the folder that paths are relative to.
        tops: the folders below it that will be read: what lies there is not read through a link from elsewhere.
        kind: of the samples.
    """

    def __init__(self, root: Path, tops: Sequence[str] = ("",), kind: SampleKind = "image") -> None:
        self.unread, self.kind = Unread(), kind
        self._root, self._real = root, os.path.realpath(root)
        self._tops = tops
        self._seen: set[str] = set()
        self._lying: set[str] | None = None

    def files(self, folder: str = "") -> Iterator[str]:
        """Yield the relative POSIX paths of the samples below a folder, in no order."""
        # Folders are told by their real path: links may lead to one from several places.
        real = os.path.realpath(os.path.join(self._real, folder))  # noqa: PTH118 - as below
        # What is read under its own name is not read again under a link: the image would count for two classes.
        if folder and self._is_linked(folder) and self._is_read_elsewhere(real):
            self.unread.repeated.append(folder)
            return
        # A list, not recursion: a link to a folder above would end in a full stack.
        waiting = [(folder, real)]
        while waiting:
            where, real = waiting.pop()
            if real in self._seen:
                self.unread.repeated.append(where)
                continue
            self._seen.add(real)
            yield from self._files_in(where, real, waiting)

    def _files_in(self, where: str, real: str, waiting: list[tuple[str, str]]) -> Iterator[str]:
        before = f"{where}/" if where else ""
        try:
            with os.scandir(os.path.join(self._root, where)) as entries:  # noqa: PTH118 - pathlib remembers every name
                for entry in entries:
                    path = before + entry.name
                    if is_hidden(entry.name):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append((path, f"{real}/{entry.name}"))
                    elif entry.is_symlink() and leads(entry.is_dir):
                        target = os.path.realpath(entry.path)
                        if self._is_read_elsewhere(target):
                            self.unread.repeated.append(path)
                        else:
                            waiting.append((path, target))
                    elif suffix_of(entry.name) in _SUFFIXES[self.kind]:
                        yield path
                    elif entry.is_symlink() and not leads(entry.is_file):
                        self.unread.dead.append(path)
                    else:
                        self.unread.suffixes[suffix_of(entry.name)] += 1
        except OSError as error:
            self.unread.closed.append(f"{where or self._root}: {error.strerror or error}")

    def _is_read_elsewhere(self, target: str) -> bool:
        """Tell whether a link leads back up, or to where the same images are read under their own name."""
        if f"{self._real}/".startswith(f"{target.rstrip('/')}/"):
            return True
        if not target.startswith(f"{self._real}/"):
            return False
        if self._lying is None:
            tops = [top for top in self._tops if not self._is_linked(top)]
            self._lying = {where for top in tops for where in _folders_below(f"{self._real}/{top}")}
        return target in self._lying

    def _is_linked(self, folder: str) -> bool:
        place = f"{self._real}/{folder}".rstrip("/")
        return os.path.realpath(place) != place


def _folders_below(place: str) -> Iterator[str]:
    for where, folders, _ in os.walk(place.rstrip("/")):
        folders[:] = [name for name in folders if not is_hidden(name)]
        yield where


def leads(asks: Callable[[], bool]) -> bool:
    """Tell whether an entry is a folder, or a file; a link that leads round in a circle is neither."""
    try:
        return asks()
    except OSError:
        return False


def is_hidden(name: str) -> bool:
    """Tell whether a name is hidden, or of the files that systems leave behind."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS


def suffix_of(name: str) -> str:
    """Return a name's suffix in lower case, "" where it has none."""
    dot = name.rfind(".")
    return name[dot:].lower() if dot >= 0 else ""


def many(number: int, word: str) -> str:
    """Return a number of things in words."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def tallied(counts: Counter[str]) -> str:
    """Return the most frequent of some kinds with their numbers."""
    first = [f"{kind or 'none'} {number}" for kind, number in counts.most_common(2 * _SHOWN)]
    more = len(counts) - len(first)
    return ", ".join([*first, *([f"{more} more"] if more else [])])


def _listed(names: Sequence[str], word: str, ending: str) -> list[str]:
    if not names:
        return []
    shown = ", ".join([*sorted(names)[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
    return [f"{many(len(names), word)} {ending.format(go='goes' if len(names) == 1 else 'go')} ({shown})"]


def open_folder(root: Path) -> Dataset:
    """Open a folder of images; of texts, where no image lies below it.

    Links to folders are followed. Hidden files, and what systems leave behind, are left out; what else is not read is noted
    with its number.

    Raises:
        DataError: splits would be taken for classes, a split would be lost, or images lie outside class folders only.
    """
    kind, folders = _kind_below(root), folders_in(root)
    splits = _splits_in(root, folders)
    places = [(f"{top}/{label}", label, split) for top, split in splits.items() for label in folders_in(root / top)]
    places = places if splits else [(label, label, "") for label in folders]
    tree = Tree(root, [folder for folder, _, _ in places], kind)
    images: Counter[str] = Counter()
    nested: Counter[str] = Counter()  # by the folder that lies in a class folder

    def samples() -> Iterator[Sample]:
        for folder, label, split in places:
            files = sorted(tree.files(folder))
            yield from (Sample(path, label, split) for path in files)
            images[folder] = len(files)
            nested.update(inner for path in files if (inner := _inner(path, len(folder) + 1)))

    # Packed as they come: millions of Sample values at once would take gigabytes.
    table = SampleTable(samples())
    outside, beside = _outside(root, list(splits), tree), Counter[str]()
    if splits:
        beside = _beside(root, folders, splits, kind)
        for top in splits:
            _require_split(Tree(root, [top], kind), root, top, images, outside)
    else:
        _require_no_splits(root, [folder for folder in folders if images[folder]], nested)
    if not table and outside:
        raise DataError(
            f"{root}: {many(outside.total(), kind)} lie outside class folders: put them into one folder a class "
            f"(CLASS/{kind.upper()}), or list them with their labels in a CSV file."
        )
    notes = _folder_notes(root, [*tree.unread.said(), *_strays(outside, beside, kind)], images, nested, kind)
    return Dataset(safe_name(root.resolve().name), str(root.resolve()), table, FileReader(root.resolve()), notes, kind=kind)


def _kind_below(root: Path) -> SampleKind:
    """Return what lies below a folder: images, unless there is none and there are texts."""
    has_texts = False
    for _, folders, files in os.walk(root, followlinks=False):
        folders[:] = [name for name in folders if not is_hidden(name)]
        suffixes = {suffix_of(name) for name in files if not is_hidden(name)}
        if suffixes & IMAGE_SUFFIXES:
            return "image"
        has_texts = has_texts or bool(suffixes & TEXT_SUFFIXES)
    return "text" if has_texts else "image"


def _splits_in(root: Path, folders: Sequence[str]) -> dict[str, str]:
    """Return the folders that are splits, and which; none but beside a ``train`` that holds classes: ``val`` may be one."""
    splits = {name: _FOLDER_SPLITS[name.lower()] for name in folders if name.lower() in _FOLDER_SPLITS}
    return splits if any(split == "train" and folders_in(root / name) for name, split in splits.items()) else {}


def _strays(outside: Counter[str], beside: Counter[str], kind: SampleKind) -> list[str]:
    return [
        *([f"{many(outside.total(), kind)} outside class folders ({tallied(outside)})"] if outside else []),
        *([f"what lies beside train/ ({kind}s: {tallied(beside)})"] if beside else []),
    ]


def _folder_notes(
    root: Path, unread: Sequence[str], images: Counter[str], nested: Counter[str], kind: SampleKind
) -> tuple[str, ...]:
    """Return what the user should hear: what is not read, classes without images, images deeper than a class."""
    notes = [f"{root}: left out: {', '.join(unread)}"] if unread else []
    notes += [
        f"{root / folder}: no {kind} in it, the class is left out there" for folder, count in images.items() if not count
    ]
    if nested:
        notes.append(
            f"{root}: {many(nested.total(), kind)} in folders inside class folders are of the class of the outer one "
            f"({tallied(nested)})"
        )
    return tuple(notes)


def folders_in(root: Path) -> list[str]:
    """Return the names of the folders in a folder, links to folders among them, hidden ones not."""
    try:
        with os.scandir(root) as entries:
            names = [entry.name for entry in entries if not is_hidden(entry.name) and leads(entry.is_dir)]
    except OSError as error:
        raise DataError(f"{root}: cannot be opened ({error.strerror or error}).") from error
    return sorted(names, key=natural)


def _outside(root: Path, tops: Collection[str], tree: Tree) -> Counter[str]:
    """Return how many images lie directly in the folder or its splits; what else lies there is added to the rest."""
    counts, unread = Counter[str](), tree.unread
    for top in ("", *tops):
        with os.scandir(root / top) as entries:
            for entry in entries:
                path = f"{top}/{entry.name}" if top else entry.name
                if is_hidden(entry.name) or leads(entry.is_dir):
                    continue
                if suffix_of(entry.name) in _SUFFIXES[tree.kind]:
                    counts[f"{top or '.'}/"] += 1
                elif entry.is_symlink() and not leads(entry.is_file):
                    unread.dead.append(path)
                else:
                    unread.suffixes[suffix_of(entry.name)] += 1
    lost = next((path for path in unread.dead if "/" not in path and _FOLDER_SPLITS.get(path.lower())), None)
    if lost:
        raise DataError(f"{root / lost}: a link that goes nowhere, where a split should be. Repair it or take it away.")
    return counts


def _beside(root: Path, folders: Sequence[str], splits: dict[str, str], kind: SampleKind) -> Counter[str]:
    """Return how many images lie in the folders beside the splits.

    Raises:
        DataError: one of them looks like a split that is not there by its usual name.
    """
    counts: Counter[str] = Counter()
    for name in folders:
        if name in splits:
            continue
        tree = Tree(root, [name], kind)
        counts[name] = sum(1 for _ in tree.files(name))
        split = looks_like_split(name)
        # test1/ beside train/: left out without a word, the test images would be drawn from train.
        if split and split not in splits.values() and (counts[name] or tree.unread):
            raise DataError(
                f"{root / name}: looks like the {split} split, which is read from a folder {split}/ only. Rename it, "
                "or move it away if it is none."
            )
    return counts


def _require_split(tree: Tree, root: Path, top: str, images: Counter[str], outside: Counter[str]) -> None:
    """Refuse a split of which nothing is read, though there is something.

    Raises:
        DataError: as said.
    """
    if any(number for folder, number in images.items() if folder.startswith(f"{top}/")):
        return
    count = sum(1 for _ in tree.files(top))
    if count or tree.unread:
        why = f"{many(outside[f'{top}/'], tree.kind)} lie outside class folders" if outside[f"{top}/"] else ""
        reason = why or ", ".join(tree.unread.said()) or "what lies there is read under another name already"
        raise DataError(
            f"{root / top}: this split would be lost: {reason}. A split is {top}/CLASS/{tree.kind.upper()}; move it away "
            "if it has no labels."
        )


def _require_no_splits(root: Path, folders: Sequence[str], nested: Counter[str]) -> None:
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
    for folder, names in inside.items():
        if len({_FOLDER_SPLITS[name.lower()] for name in names}) > 1:
            raise DataError(
                f"{root / folder}: holds the splits {', '.join(sorted(names))}, and would be one class. What is read is "
                f"train|val|test/CLASS/IMAGE; if these are in {folder}, name that folder instead."
            )


def _inner(path: str, start: int) -> str:
    """Return the folder inside the class folder that an image lies in, "" where it lies in the class folder itself."""
    end = path.find("/", start)
    return path[:end] if end >= 0 else ""


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
