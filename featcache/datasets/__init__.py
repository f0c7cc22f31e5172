"""Where samples come from. A source lists labelled ones and reads their bytes; after that all kinds are alike.

Of some data sets only a part is labelled: what is to be labelled next is chosen from the rest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from featcache.datasets.base import Dataset, FileReader, FileStat, Reader, Sample, odd_names, require_file, safe_name
from featcache.errors import DataError, FeatcacheError, UsageError
from featcache.resources import FETCH, may_fetch

_ARRAYS, _TABLES = (".npz", ".h5", ".hdf5"), (".csv", ".parquet")
_KINDS = (
    "a folder, .csv, .parquet, .npz or .h5 file, torchvision:NAME, hf:ORG/NAME, wds:SHARDS.tar, sklearn:digits or "
    "sklearn:docstrings"
)


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
    odd = tuple(f"{data}: {note}" for note in odd_names(source.table.labels))
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
