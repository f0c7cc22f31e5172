"""What a whole cache does not need any more."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import StorageError
from featcache.extraction.lookup import entry_folders
from featcache.store.atomic import remove_file
from featcache.store.entry import FeatureStore
from featcache.store.maintenance import Joining, Litter, join, joining_of, litter_in, litter_of


@dataclass
class Collected:
    """What is not needed: files, and parts to be joined in each entry; ``broken`` entries were left as they are."""

    litter: list[Litter] = field(default_factory=list)
    joined: dict[Path, Joining] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """A line for each file and each entry with parts to join."""
        joined = [
            f"{path}: {len(one.parts)} parts in one place, {one.dropped} rows of removed images left out"
            for path, one in self.joined.items()
        ]
        return [*joined, *(f"{one.path}: {one.why}, {one.bytes} bytes" for one in self.litter)]

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache store gc``."""
        return {
            "files": [{"path": str(one.path), "why": one.why, "bytes": one.bytes} for one in self.litter],
            "joined": {str(path): {"parts": len(one.parts), "dropped": one.dropped} for path, one in self.joined.items()},
            "broken": self.broken,
        }


def collect(cache: Path, entries: Sequence[Path] = (), *, act: bool) -> Collected:
    """Find what a cache, or only some entries, do not need, and remove it if ``act`` says so.

    Raises:
        StorageError: a file cannot be removed or written.
    """
    found = Collected()
    for folder in list(entries) or entry_folders(cache):
        try:
            store = FeatureStore.open(folder)
            joining = joining_of(store)
            if joining.parts and act:
                join(store, joining)
            several = list(litter_of(store))
        except StorageError as error:
            found.broken.append(str(error))
            continue
        if joining.parts:
            found.joined[folder] = joining
        found.litter += several
    if not entries:
        found.litter += litter_in([cache / "records", *sorted({folder.parent for folder in entry_folders(cache)})])
    for one in found.litter if act else ():
        remove_file(one.path)
    return found
