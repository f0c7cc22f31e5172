"""Where images come from. A source lists labelled images and reads their bytes; after that all kinds are alike."""

from dataclasses import replace
from pathlib import Path

from featcache.errors import DataError, UsageError
from featcache.sources.arrays import open_digits, open_hdf5, open_npz
from featcache.sources.base import Blobs, Files, FileStat, Item, Source, location_hash, safe_name
from featcache.sources.folders import image_files, open_folder
from featcache.sources.shards import open_shards
from featcache.sources.tables import open_csv, open_parquet, read_column

__all__ = [
    "Blobs",
    "FileStat",
    "Files",
    "Item",
    "Source",
    "image_files",
    "location_hash",
    "open_source",
    "read_column",
    "safe_name",
]

_FILES = {".csv": open_csv, ".parquet": open_parquet, ".npz": open_npz, ".h5": open_hdf5, ".hdf5": open_hdf5}
_KINDS = "a folder, .csv, .parquet, .npz or .h5 file, torchvision:NAME, hf:ORG/NAME, wds:SHARDS.tar or sklearn:digits"


def open_source(
    data: str | Path, name: str | None = None, *, data_root: Path | None = None, download: bool = False
) -> Source:
    """Open a data set.

    Args:
        data: a folder; a ``.csv`` or ``.parquet`` manifest; ``.npz`` or ``.h5`` arrays; ``torchvision:NAME``;
            ``hf:org/name``; ``wds:shards-{000..009}.tar``; ``sklearn:digits``.
        name: what to call it, instead of its own name.
        data_root: where torchvision's sets lie.
        download: whether ``torchvision:`` and ``hf:`` may fetch what is not there.

    Raises:
        DataError: there is nothing there, or no labelled image in it.
        UsageError: the kind of source is unknown.
        SetupError: it needs a library that is not installed.
    """
    source = _open(str(data), data_root, download)
    if not source.items:
        raise DataError(f"{data}: no image found in it. A folder needs CLASS/IMAGE or train/CLASS/IMAGE files.")
    return source if name is None else replace(source, name=safe_name(name))


def _open(text: str, data_root: Path | None, download: bool) -> Source:  # noqa: FBT001
    kind, _, rest = text.partition(":")
    if kind == "sklearn":
        return open_digits(text)
    if kind == "wds":
        return open_shards(rest)
    if kind in {"torchvision", "hf"} and rest:
        from featcache.sources.named import open_hub, open_torchvision

        return (
            open_torchvision(rest, data_root, download=download)
            if kind == "torchvision"
            else open_hub(rest, download=download)
        )
    path = Path(text)
    if path.is_dir():
        return open_folder(path)
    if path.suffix.lower() in _FILES:
        return _FILES[path.suffix.lower()](path)
    if path.exists():
        raise UsageError(f"{text}: not {_KINDS}.")
    raise DataError(f"{text}: there is no such folder or file.")
