"""Where samples come from. A source lists labelled ones and reads their bytes; after that all kinds are alike."""

from dataclasses import replace
from pathlib import Path

from featcache.datasets.base import Dataset, odd_names, require_file, safe_name
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
    return replace(
        source,
        name=source.name if name is None else safe_name(name),
        notes=source.notes + odd,
        reopens=_from_anywhere(str(data), source.location),
    )


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
        if text == "sklearn:docstrings":
            from featcache.datasets.texts import open_docstrings

            return open_docstrings()
        from featcache.datasets.arrays import open_digits

        return open_digits(text)
    if kind == "wds":
        from featcache.datasets.webdataset import open_shards

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
        from featcache.datasets.webdataset import open_shards

        return open_shards(str(path))
    if path.exists():
        raise UsageError(f"{text}: not {_KINDS}.")
    raise DataError(f"{text}: there is no such folder or file.")
