"""Images or texts in folders: CLASS/IMAGE, or train|val|test/CLASS/IMAGE. What lies there and is not read is said."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featcache.datasets.base import (
    SPLIT_FOLDERS,
    TEXT_SUFFIXES,
    Dataset,
    FileReader,
    Sample,
    SampleTable,
    looks_like_split,
    natural,
    safe_name,
    split_within,
)
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


_FOLDER_SPLITS = SPLIT_FOLDERS | {"testing": "test", "dev": "val"}


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
