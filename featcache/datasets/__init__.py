"""What a data set is, and how one is opened: a source lists labelled samples and reads their bytes; then all are alike.

Of some data sets only a part is labelled: what is to be labelled next is chosen from the rest.
"""

import os
import re
import stat as modes
import time
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import eq
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from featcache.errors import DataError, FeatcacheError, UnreadableSample, UsageError
from featcache.fingerprint import fingerprint
from featcache.resources import FETCH, may_fetch

if TYPE_CHECKING:
    from featcache.evaluation.metrics import Kind
    from featcache.specs import SampleKind

MOST_IMAGE_BYTES = 256 << 20  # 50 megapixels without compression, and room
_MOST_SPLITS = 8
# A file changed this close to being hashed may change again unseen, within the grain of the file system's clock: two
# seconds on exFAT.
RACY_NS = 2_000_000_000
# Marks that other programs write for a missing value; here they are only warned of, since they may be names.
_OFTEN_MISSING = frozenset({"nan", "none", "null", "na", "n/a", "<na>", "-1"})
SPLIT_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}

MOST_TEXT_BYTES = 1 << 20  # a long novel; a larger file is a log or a dump, whose first words say nothing of it
TEXT_SUFFIXES = frozenset({".txt"})
_ARRAYS, _TABLES = (".npz", ".h5", ".hdf5"), (".csv", ".parquet")
_KINDS = (
    "a folder, .csv, .parquet, .npz or .h5 file, torchvision:NAME, hf:ORG/NAME, wds:SHARDS.tar, sklearn:digits or "
    "sklearn:docstrings"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """One image of a data set: its path as its reader knows it, its class and, where it is given, its split."""

    path: str
    label: str
    split: str = ""


class SampleTable(Sequence[Sample]):
    """Images of a data set, packed: millions of them are listed at a time, and looked at one by one."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._labels: dict[str, int] = {}
        self._splits: dict[str, int] = {}
        self._text, self._ends, self._kinds = bytearray(), array("q", [0]), array("q")
        for sample in samples:
            self._text += os.fsencode(sample.path)
            self._ends.append(len(self._text))
            label = self._labels.setdefault(sample.label, len(self._labels))
            self._kinds.append(label * _MOST_SPLITS + self._splits.setdefault(sample.split, len(self._splits)))
        self._label_names, self._split_names = tuple(self._labels), tuple(self._splits)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that occur, each once."""
        return self._label_names

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._kinds)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> "SampleTable": ...

    def __getitem__(self, index: int | slice) -> "Sample | SampleTable":
        """Return one image, or a slice's."""
        if isinstance(index, slice):
            return SampleTable(self[number] for number in range(*index.indices(len(self))))
        number = range(len(self))[index]
        label, split = divmod(self._kinds[number], _MOST_SPLITS)
        return Sample(self.path(number), self._label_names[label], self._split_names[split])

    def path(self, number: int) -> str:
        """Return one image's path."""
        return os.fsdecode(bytes(self._text[self._ends[number] : self._ends[number + 1]]))

    def kinds(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which of ``labels`` and which of ``splits`` some images have, each (n,)."""
        kinds = np.frombuffer(self._kinds, np.int64)[numbers] if len(self) else np.empty(0, np.int64)
        return kinds // _MOST_SPLITS, kinds % _MOST_SPLITS

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that occur, each once."""
        return self._split_names

    def __eq__(self, samples: object) -> bool:
        """Tell whether another sequence has the same images."""
        return isinstance(samples, Sequence) and len(self) == len(samples) and all(map(eq, self, samples))

    __hash__ = None  # type: ignore[assignment]


class FileStat(NamedTuple):  # a tuple: one is made for every image of a run, and goes into arrays as it is
    """What tells cheaply that an image has not changed since it was hashed: of a file, or of what holds it.

    ``ctime_ns`` changes where a file is written over and its mtime put back; -1 where it is not known.
    """

    size: int
    mtime_ns: int
    inode: int
    ctime_ns: int = -1

    def is_settled(self) -> bool:
        """Tell whether an image whose bytes are read next will be recognised by this: else it is too young."""
        return max(self.mtime_ns, self.ctime_ns) < time.time_ns() - RACY_NS


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of an image file.

    Raises:
        OSError: it cannot be read, is no regular file (a pipe or a device may never end), or is larger than 256 MiB.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait here for its other end
    with open(descriptor, "rb", buffering=0) as file:  # noqa: PTH123 - it is open
        _require_readable(os.fstat(descriptor))
        return file.readall() or b""


def stat_file(path: str | os.PathLike[str]) -> FileStat:
    """Return what tells that an image file has not changed.

    Raises:
        OSError: as of ``read_file``.
    """
    stat = os.stat(path)  # noqa: PTH116 - pathlib is slow
    _require_readable(stat)
    return FileStat(stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)


def _require_readable(stat: os.stat_result) -> None:
    if not modes.S_ISREG(stat.st_mode):
        raise OSError("a folder, not a file" if modes.S_ISDIR(stat.st_mode) else "a pipe, socket or device, not a file")
    if stat.st_size > MOST_IMAGE_BYTES:
        raise OSError(f"{stat.st_size / 1e6:.0f} MB, over the limit of {MOST_IMAGE_BYTES / 1e6:.0f} MB an image")


class Reader(Protocol):
    """Where the bytes of a data set's images are; many threads read at once."""

    def read(self, path: str) -> bytes:
        """Return an image's bytes, or raise OSError."""

    def stat(self, path: str) -> FileStat | None:
        """Return what tells that an image has not changed, ``None`` where nothing does, or raise OSError."""


@dataclass(frozen=True)
class FileReader:
    """Images that are files below a folder, or anywhere where their path is absolute."""

    root: Path

    def read(self, path: str) -> bytes:
        """Return a file's bytes."""
        return read_file(os.path.join(self.root, path))  # noqa: PTH118 - pathlib is slow

    def stat(self, path: str) -> FileStat:
        """Return a file's size, time and inode."""
        return stat_file(os.path.join(self.root, path))  # noqa: PTH118 - as above


@dataclass(frozen=True)
class MemoryReader:
    """Images in memory."""

    content: Mapping[str, bytes]

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        return self.content[path]

    def stat(self, path: str) -> None:
        """Return nothing: there is no file."""


@dataclass(frozen=True)
class ArrayReader:
    """Images that one file holds by number: ``read_at`` gives the bytes of the n-th, ``holder`` is that file."""

    numbers: Mapping[str, int]
    read_at: Callable[[int], bytes]
    holder: Path | None = None

    def read(self, path: str) -> bytes:
        """Return an image's bytes."""
        return self.read_at(self.numbers[path])

    def stat(self, path: str) -> FileStat | None:
        """Return the holder's size and time, with the image's number."""
        if self.holder is None:
            return None
        stat = self.holder.stat()
        return FileStat(stat.st_size, stat.st_mtime_ns, self.numbers[path], stat.st_ctime_ns)


@dataclass(frozen=True, repr=False)
class Dataset:
    """A named list of labelled images.

    ``notes`` are things about it that the user should hear: above all what lies there and is not read. ``label_lists`` says
    that labels are lists, joined with ``;``. ``reopens`` opens it again from anywhere, "" where nothing does. ``kind``: what
    a sample's bytes are.
    """

    name: str
    location: str
    samples: Sequence[Sample]
    reader: Reader = field(default_factory=lambda: MemoryReader({}))
    notes: tuple[str, ...] = ()
    label_lists: bool = False
    reopens: str = ""
    kind: "SampleKind" = "image"

    def __post_init__(self) -> None:
        """Pack the list."""
        if not isinstance(self.samples, SampleTable):
            object.__setattr__(self, "samples", SampleTable(self.samples))

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}: {len(self.samples)} {self.kind}s, {len(self.table.labels)} labels, in {self.location})"
        )

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names in order."""
        return tuple(sorted(self.table.labels, key=natural))

    @property
    def table(self) -> SampleTable:
        """The samples, as they are kept."""
        assert isinstance(self.samples, SampleTable)
        return self.samples

    def overview(self, target: str = "label") -> str:
        """Return what it holds, in a line."""
        counts = np.bincount(self.table.kinds(np.arange(len(self.table)))[1], minlength=len(self.table.splits)).tolist()
        sizes = {name: count for name, count in zip(self.table.splits, counts, strict=True) if name}
        splits = ", ".join(f"{sizes[name]} {name}" for name in ("train", "val", "test") if name in sizes)
        kind = "different numbers" if target == "number" else "labels" if self.label_lists else "classes"
        return f"{self.name}: {len(self.table)} {self.kind}s, {len(self.table.labels)} {kind}; {splits or 'no split'} given"

    def require_kind(self, kind: "Kind") -> None:
        """Refuse labels that are not what is to be told, before anything is computed.

        Raises:
            DataError: labels are lists where one an image is needed, a label is no number, or there is only one label.
        """
        if self.label_lists and kind != "labels":
            raise DataError(
                f"{self.location}: its labels are lists; only fit with `target='labels'` trains on several an image."
            )
        if kind != "label":
            from featcache.evaluation import read_labels

            read_labels(kind, self.table.labels)

    def require_thumbnails(self, stage: str) -> None:
        """Refuse samples that nothing can be seen of in small, for what looks at them so.

        Raises:
            UsageError: they are such.
        """
        if self.kind != "image":
            raise UsageError(f"{self.location}: {stage} looks at images, and these are {self.kind}s.")

    def read(self, path: str) -> bytes:
        """Return an image's bytes.

        Raises:
            OSError: it cannot be read.
        """
        try:
            return self.reader.read(path)
        except OSError:
            raise
        except Exception as error:  # the readers of other libraries raise anything; one image must not end a run
            raise OSError(f"{type(error).__name__}: {error}") from error

    def stat(self, path: str) -> FileStat | None:
        """Return what tells that an image has not changed, ``None`` where nothing does.

        Raises:
            OSError: it cannot be reached.
        """
        try:
            return self.reader.stat(path)
        except OSError:
            raise
        except Exception as error:  # as above; a NUL in a path is a ValueError
            raise OSError(f"{type(error).__name__}: {error}") from error


def require_file(path: Path) -> None:
    """Refuse what is there and no file: a pipe would be waited for.

    Raises:
        DataError: it is none.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: {'a folder' if path.is_dir() else 'a pipe, socket or device'}, not a file.")


def split_of(text: object, where: str) -> str:
    """Return a split's name as featcache writes it, "" for none.

    Raises:
        DataError: it is none of train, val, test.
    """
    name = str(text if text is not None else "").strip().lower()
    if name and name not in SPLIT_FOLDERS:
        raise DataError(f"{where}: split {name!r} is none of train, val, test.")
    return SPLIT_FOLDERS.get(name, "")


_SPLIT_NAME = re.compile(
    r"(?:(?P<train>train(?:ing|[\W_]*val(?:id|idation)?)?)|(?P<val>val(?:id|idation)?|dev)"
    r"|(?P<test>test(?:ing)?|eval(?:uation)?|holdout))"
    r"(?:[\W_]*(?:\d+|set|data|split|images?|imgs?|photos|final|new|old|all|full|public|private|[ab]))*[\W_]*"
)


def looks_like_split(name: str) -> str:
    """Return which split a name such as ``test1`` or ``val_images`` seems to mean, "" where it seems to mean none."""
    match = _SPLIT_NAME.fullmatch(name.strip().lower())
    return next((split for split in ("train", "val", "test") if match[split]), "") if match else ""


def split_within(name: str) -> str:
    """Return which split one of a name's words is, as in ``seg_train``, "" where none or several are."""
    splits = {SPLIT_FOLDERS[word] for word in re.split(r"[\W_]+", name.lower()) if word in SPLIT_FOLDERS}
    return splits.pop() if len(splits) == 1 else ""


def require_whole(items: Iterable[Sample], where: str) -> None:
    """Refuse a list that names an image twice, by whatever spelling, or gives a split to some only.

    Raises:
        DataError: it does.
    """
    seen: set[str] = set()
    items = list(items)
    plain = (os.path.normpath(item.path) for item in items)  # a/../b.png is b.png
    twice = [path for path in plain if path in seen or seen.add(path)]  # type: ignore[func-returns-value]
    if twice:
        raise DataError(f"{where}: {twice[0]} is listed more than once ({len(twice)} such paths).")
    if 0 < sum(not item.split for item in items) < len(items):
        raise DataError(f"{where}: some rows have a split and some have none: fill in all of them, or none.")


def odd_names(names: Iterable[str]) -> list[str]:
    """Return notes on class names that look alike, or like marks for a missing label."""
    alike: dict[str, list[str]] = defaultdict(list)
    doubtful = []
    for name in names:
        alike[_looks(name)].append(name)
        if name.strip().lower() in _OFTEN_MISSING:
            doubtful.append(name)
    pairs = [sorted(group) for group in alike.values() if len(group) > 1]
    notes = []
    if pairs:
        shown = "; ".join(" and ".join(map(ascii, group)) for group in pairs[:3])
        notes.append(f"{len(pairs)} times several classes have names that look alike: {shown}")
    if doubtful:
        shown = ", ".join(map(ascii, doubtful))
        notes.append(f"{shown}: a class like any other here, though often a mark for a missing label")
    return notes


def _looks(name: str) -> str:
    """Return what two names share that look alike: to the eye, or as a number."""
    visible = "".join(char for char in unicodedata.normalize("NFKC", name) if unicodedata.category(char) != "Cf")
    folded = " ".join(visible.split()).casefold()
    if len(folded) < 2:  # a and A are two letters
        return f"text {' '.join(visible.split())}" if not folded.isdecimal() else f"number {float(folded)!r}"
    try:
        return f"number {float(folded)!r}"
    except ValueError:
        return f"text {folded}"


def location_hash(location: str) -> str:
    """Return six digits that tell two data sets of one name apart."""
    return fingerprint(location)[:6]


def safe_name(name: str) -> str:
    """Return a data set's name as a folder can bear it."""
    safe = "".join(char if char.isalnum() or char in "._-" else "-" for char in name).strip(".-")
    return safe or "data"


def natural(name: str) -> tuple[tuple[int, str], ...]:
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


def decode_text(content: bytes) -> str:
    """Return a sample's text, without a byte order mark.

    Raises:
        UnreadableSample: it is empty, no UTF-8, or longer than 1 MiB.
    """
    if len(content) > MOST_TEXT_BYTES:
        raise UnreadableSample(f"a text of {len(content) / 1e6:.1f} MB, over the limit of {MOST_TEXT_BYTES / 1e6:.1f} MB")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableSample(f"no text in UTF-8 ({error.reason} at byte {error.start})") from None
    if not text.strip():
        raise UnreadableSample("an empty text")
    return text


def open_dataset(
    data: str | Path, name: str | None = None, *, data_root: Path | None = None, download: bool = False
) -> Dataset:
    """Open a data set; its ``notes`` say what lies there and is not read.

    Args:
        data: a folder of images or texts; a ``.csv`` or ``.parquet`` table of paths or of texts; ``.npz`` or ``.h5`` arrays;
            ``torchvision:NAME``; ``hf:org/name``; ``wds:shards-{000..009}.tar``; ``sklearn:digits``, or texts,
            ``sklearn:docstrings``.
        name: what to call it, instead of its own name.
        data_root: where torchvision's sets lie.
        download: whether ``torchvision:`` and ``hf:`` may fetch what is not there.

    Raises:
        DataError: there is nothing there, no labelled image in it, or what is there cannot be read.
        UsageError: the kind of source is unknown, or nothing may be fetched.
        SetupError: it needs a library that is not installed.
    """
    if download and not may_fetch():
        raise UsageError(f"`download`: nothing may be fetched, since {FETCH}=never.")
    try:
        source = _open(str(data), data_root, download)
    except FeatcacheError:
        raise
    except Exception as error:  # the readers of other libraries raise anything: what they cannot read is the data's fault
        reason = next(iter(str(error).strip().splitlines()), "")
        raise DataError(f"{data}: cannot be read ({type(error).__name__}{f': {reason}' if reason else ''}).") from error
    if not source.samples:
        also = f" {'; '.join(source.notes)}." if source.notes else ""
        raise DataError(
            f"{data}: no image found in it, and no text. A folder needs CLASS/IMAGE or train/CLASS/IMAGE files, "
            f"texts as .txt.{also}"
        )
    odd = tuple(f"{data}: {note}" for note in odd_names(source.classes))
    return replace(_renamed(source, name), notes=source.notes + odd, reopens=_from_anywhere(str(data), source.location))


def _from_anywhere(text: str, location: str) -> str:
    """Return what opens a source again from any working folder: its location, with the kind where that is not told by it."""
    kind, _, rest = text.partition(":")
    if kind == "wds":
        return f"wds:{location}"
    if kind == "hf" and Path(rest).is_dir():
        return f"hf:{Path(rest).resolve()}"
    return location


def _open(text: str, data_root: Path | None, download: bool) -> Dataset:  # noqa: FBT001
    # Each kind's reader is imported where it is needed: what reads a cache knows only what a data set is.
    kind, _, rest = text.partition(":")
    if kind == "sklearn":
        from featcache.datasets.arrays import DOCSTRINGS, open_digits, open_docstrings

        return open_docstrings() if text == DOCSTRINGS else open_digits(text)
    if kind == "wds":
        from featcache.datasets.folder import open_shards

        return open_shards(rest)
    if kind in {"torchvision", "hf"} and rest:
        from featcache.datasets.hubs import open_hub, open_torchvision

        if kind == "hf":
            return open_hub(rest, download=download)
        name, _, place = rest.partition("@")  # as a head's card writes where its images were
        return open_torchvision(name, Path(place) if place else data_root, download=download)
    return _open_path(text)


def _open_path(text: str) -> Dataset:
    path = Path(text)
    suffix = path.suffix.lower()
    if path.is_dir():
        from featcache.datasets.folder import open_folder

        return open_folder(path)
    if suffix in (*_ARRAYS, *_TABLES, ".tar"):
        require_file(path)
    if suffix in _TABLES:
        from featcache.datasets.tables import open_csv, open_parquet

        return open_csv(path) if suffix == ".csv" else open_parquet(path)
    if suffix in _ARRAYS:
        from featcache.datasets.arrays import open_hdf5, open_npz

        return open_npz(path) if suffix == ".npz" else open_hdf5(path)
    if suffix == ".tar":
        from featcache.datasets.folder import open_shards

        return open_shards(str(path))
    if path.exists():
        raise UsageError(f"{text}: not {_KINDS}.")
    raise DataError(f"{text}: there is no such folder or file.")


@dataclass(frozen=True)
class PartlyLabelled:
    """A data set whose samples have the label "" where they have none; ``groups`` by their paths, if asked for."""

    dataset: Dataset
    groups: Mapping[str, str] | None = None

    def beside(self, places: Sequence[str | Path]) -> "PartlyLabelled":
        """Return these samples and unlabelled ones: files, those in folders, and those that tables list.

        They keep the data set's name, so that their rows are found again once they are labelled and moved into it.

        Raises:
            DataError: a place is not there, or holds no such sample.
        """
        base = self.dataset
        added: dict[str, tuple[Reader, str]] = {}
        for place in map(Path, places):
            listed = dict(_samples_at(place, base))
            if not listed:
                raise DataError(f"`unlabelled` {place}: there is no {base.kind} in it.")
            added.update(listed)
        listed_already = {sample.path for sample in base.samples}
        samples = [*base.samples, *(Sample(path, "") for path in added if path not in listed_already)]
        return replace(self, dataset=replace(base, samples=samples, reader=_Routed(base.reader, added)))


def open_partly(
    data: str | Path,
    name: str | None = None,
    *,
    group: str | None = None,
    data_root: Path | None = None,
    download: bool = False,
) -> PartlyLabelled:
    """Open a data set that may lack labels: rows of a table without one, or a folder of samples without class folders.

    Args:
        data: as of ``open_dataset``.
        name: as of ``open_dataset``.
        group: a column of a table that says what each sample belongs to.
        data_root: as of ``open_dataset``.
        download: as of ``open_dataset``.

    Raises:
        FeatcacheError: as of ``open_dataset``; or ``group`` is no column of a table.
    """
    from featcache.datasets.folder import sample_files
    from featcache.datasets.tables import open_partly_labelled

    path = Path(data)
    if path.suffix.lower() in _TABLES:
        dataset, values = open_partly_labelled(path, () if group is None else (group,))
        paths = [sample.path for sample in dataset.samples]
        groups = None if group is None else {path: value for path, (value,) in zip(paths, values, strict=True)}
        return PartlyLabelled(_renamed(dataset, name), groups)
    if group is not None:
        raise DataError(f"`group` {group}: {data} is no manifest: list its images in a CSV or Parquet file.")
    for kind in ("image", "text") if path.is_dir() else ():
        files, notes = sample_files(path, kind)
        # files in folders are classes or splits, which another reader knows
        if files and not any("/" in inside for inside in files):
            place = path.resolve()
            samples = [Sample(inside, "") for inside in files]
            plain = Dataset(place.name, str(place), samples, FileReader(place), tuple(notes), kind=kind)
            return PartlyLabelled(_renamed(plain, place.name if name is None else name))
    return PartlyLabelled(open_dataset(data, name, data_root=data_root, download=download))


def _renamed(dataset: Dataset, name: str | None) -> Dataset:
    return dataset if name is None else replace(dataset, name=safe_name(name))


def _samples_at(place: Path, base: Dataset) -> Iterator[tuple[str, tuple[Reader, str]]]:
    """Yield what each sample of a file, folder or table is called, and who reads it under which path."""
    from featcache.datasets.folder import sample_files
    from featcache.datasets.tables import open_unlabelled

    if place.suffix.lower() in _TABLES:
        listed, _ = open_unlabelled(place, ())
        if listed.kind != base.kind:
            raise DataError(f"`unlabelled` {place}: holds {listed.kind}s, {base.location} {base.kind}s.")
        is_of_files = isinstance(listed.reader, FileReader)
        for sample in listed.samples:
            yield str(place.parent / sample.path) if is_of_files else f"{place}#{sample.path}", (listed.reader, sample.path)
    elif place.is_dir():
        reader = FileReader(place)
        for inside in sample_files(place, base.kind)[0]:
            yield str(place / inside), (reader, inside)
    elif place.exists():
        yield str(place), (FileReader(place.parent), place.name)
    else:
        raise DataError(f"`unlabelled` {place}: there is no such file or folder.")


@dataclass(frozen=True)
class _Routed:
    """Reads some paths by readers of their own."""

    base: Reader
    routes: Mapping[str, tuple[Reader, str]] = field(repr=False)

    def read(self, path: str) -> bytes:
        """Return a sample's bytes."""
        reader, inner = self.routes.get(path, (self.base, path))
        return reader.read(inner)

    def stat(self, path: str) -> FileStat | None:
        """Return what tells that a sample has not changed."""
        reader, inner = self.routes.get(path, (self.base, path))
        return reader.stat(inner)
