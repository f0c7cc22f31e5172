"""Everything in a cache compared with what was written: entries, what was trained from them, bindings and records."""

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from featcache.errors import FeatcacheError, StorageError
from featcache.extraction.lookup import bound_location, entry_folders
from featcache.fingerprint import sha256_of_file
from featcache.heads import bundle
from featcache.reports.records import broken_lines
from featcache.store.entry import FeatureStore

_HEADS = (".joblib", ".skops")


def verify(cache: Path, entries: Sequence[Path] = ()) -> tuple[int, list[str]]:
    """Return how many entries were looked at, and what is wrong, a line for each file; nothing in a file is run.

    Args:
        cache: all of it is read, where no entries are named.
        entries: only these, and what was trained from them.
    """
    folders = list(entries) or entry_folders(cache)
    problems = [problem for folder in folders for problem in (*_entry(folder), *_trained(folder))]
    if not entries:
        problems += _bindings(cache)
        problems += [line for path in sorted(cache.glob("records/*.jsonl")) for line in broken_lines(path)]
    return len(folders), problems


def _entry(folder: Path) -> Sequence[str]:
    try:
        return FeatureStore.open(folder).verify()
    except StorageError as error:
        return [str(error)]


def _trained(folder: Path) -> Iterator[str]:
    """Look at heads with their cards, tuned checkpoints, and states of trainings that have not ended."""
    for path in sorted((*folder.glob("heads/*"), *folder.glob("tuned/*"))):
        head = path.with_suffix("")
        if not path.is_file():
            yield f"{path}: is no file"
        elif path.suffix in _HEADS and (problem := bundle.problem_of(path)):
            yield problem
        elif path.suffix == ".json" and head.suffix in _HEADS and not head.exists():
            yield f"{path}: the head that it describes is missing"
        elif path.suffix == ".safetensors" and (problem := _of_checkpoint(path)):
            yield f"{path}: {problem}"
        elif path.suffix == ".unfinished" and not _is_whole_state(path):
            yield f"{path}: damaged; that training begins again"


def _of_checkpoint(path: Path) -> str:
    """Return what is wrong with a tuned checkpoint; the card of the head beside it names its hash."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            tensors = json.loads(file.read(min(size, path.stat().st_size)))
        ends = [facts["data_offsets"][1] for name, facts in tensors.items() if name != "__metadata__"]
        if path.stat().st_size != 8 + size + max(ends, default=0):
            return "its size is not what it says"
        named = bundle.recorded_weights(bundle.head_path(path.with_suffix("")))
    except FeatcacheError as error:
        return f"cannot be compared with its head's card: {error}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        return f"not a checkpoint ({error!r:.100})"
    return "" if named in {"", f"sha256:{sha256_of_file(path)}"} else "its bytes are not what its head was trained on"


def _is_whole_state(path: Path) -> bool:
    """Tell whether an unfinished training's state, a zip archive, fits its own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except Exception:  # noqa: BLE001 - a damaged archive fails in any way
        return False


def _bindings(cache: Path) -> Iterator[str]:
    for note in sorted(cache.glob("*/source.json")):
        try:
            bound_location(note)
        except StorageError as error:
            yield str(error)
