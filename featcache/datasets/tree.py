"""A folder's image files, and what else lies there."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# In order of preference, where one sample has its image in several formats.
_PHOTOGRAPHS = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".avif", ".jp2")
_OTHERS = (".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".ico")
_RARE = (".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".mpo", ".apng", ".avifs", ".jpx", ".jpf", ".jpc", ".j2k", ".j2c",
         ".dib", ".icb", ".vda", ".vst")  # fmt: skip
IN_ORDER = _PHOTOGRAPHS + _OTHERS + _RARE
IMAGE_SUFFIXES = frozenset(IN_ORDER)
_OF_SYSTEMS = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__macosx", "@eadir", "$recycle.bin",
                         "system volume information", "lost+found"})  # fmt: skip
_SHOWN = 3


@dataclass
class Unread:
    """What was met and is not read; hidden files and what systems leave behind are not counted."""

    suffixes: Counter[str] = field(default_factory=Counter)
    dead: list[str] = field(default_factory=list)
    known: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        """Return how many things there are."""
        return self.suffixes.total() + len(self.dead) + len(self.known) + len(self.closed)

    def said(self) -> list[str]:
        """Return what the user is told, each with its number."""
        others = f"{many(self.suffixes.total(), 'file')} with other suffixes ({tallied(self.suffixes)})"
        return [
            *([others] if self.suffixes else []),
            *_listed(self.dead, "link", "that {go} nowhere"),
            *_listed(self.known, "link", "to folders that are read already"),
            *_listed(self.closed, "folder", "that cannot be opened"),
        ]


def image_files(root: Path) -> tuple[list[str], list[str]]:
    """Return the relative POSIX paths of the image files below a folder, sorted, and notes on what else lies there."""
    tree = Tree(root)
    paths = sorted(tree.files())
    unread = tree.unread.said()
    return paths, [f"{root}: left out: {', '.join(unread)}"] if unread else []


class Tree:
    """The image files below a folder; links to folders are followed, every folder is read once.

    Args:
        root: the folder that paths are relative to.
        tops: the folders below it that will be read: what lies there is not read through a link from elsewhere.
    """

    def __init__(self, root: Path, tops: Sequence[str] = ("",)) -> None:
        self.unread = Unread()
        self._root, self._real = root, os.path.realpath(root)
        self._tops = tops
        self._seen: set[str] = set()
        self._lying: set[str] | None = None

    def files(self, folder: str = "") -> Iterator[str]:
        """Yield the relative POSIX paths of the image files below a folder, in no order."""
        real = os.path.realpath(os.path.join(self._real, folder))  # noqa: PTH118 - as below
        if folder and self._is_linked(folder) and self._is_read_elsewhere(real):
            self.unread.known.append(folder)
            return
        waiting = [(folder, real)]
        while waiting:
            where, real = waiting.pop()
            if real in self._seen:
                self.unread.known.append(where)
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
                            self.unread.known.append(path)
                        else:
                            waiting.append((path, target))
                    elif suffix_of(entry.name) in IMAGE_SUFFIXES:
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


def _listed(names: Sequence[str], word: str, what: str) -> list[str]:
    if not names:
        return []
    shown = ", ".join([*sorted(names)[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])
    return [f"{many(len(names), word)} {what.format(go='goes' if len(names) == 1 else 'go')} ({shown})"]
