"""Data sets of which only a part is labelled: what is to be labelled next is chosen from the rest."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset, FileReader, FileStat, Reader, Sample, safe_name
from featcache.datasets.folder import sample_files
from featcache.datasets.tables import open_partly_labelled, open_unlabelled
from featcache.errors import DataError

_TABLES = (".csv", ".parquet")


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
    path = Path(data)
    if path.suffix.lower() in _TABLES:
        dataset, values = open_partly_labelled(path, () if group is None else (group,))
        named = dataset if name is None else replace(dataset, name=safe_name(name))
        if group is None:
            return PartlyLabelled(named)
        return PartlyLabelled(named, {sample.path: value for sample, (value,) in zip(named.samples, values, strict=True)})
    if group is not None:
        raise DataError(f"`group` {group}: {data} is no manifest: list its images in a CSV or Parquet file.")
    if path.is_dir():
        for kind in ("image", "text"):
            files, notes = sample_files(path, kind)
            # files in folders are classes or splits, which another reader knows
            if files and not any("/" in inside for inside in files):
                place = path.resolve()
                samples = [Sample(inside, "") for inside in files]
                plain = Dataset(safe_name(place.name), str(place), samples, FileReader(place), tuple(notes), kind=kind)
                return PartlyLabelled(plain if name is None else replace(plain, name=safe_name(name)))
    return PartlyLabelled(open_dataset(data, name, data_root=data_root, download=download))


def _samples_at(place: Path, base: Dataset) -> Iterator[tuple[str, tuple[Reader, str]]]:
    """Yield what each sample of a file, folder or table is called, and who reads it under which path."""
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
