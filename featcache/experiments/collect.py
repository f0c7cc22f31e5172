"""What a whole cache holds and may lose: what nothing needs, whole entries, and the heads that were trained from them."""

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featcache.errors import DataError, StorageError, UsageError
from featcache.extraction.lookup import entry_folders
from featcache.progress import logger
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


@dataclass(frozen=True)
class EntryContents:
    """An entry's files, their bytes, and how many of them are trained heads and checkpoints, which no cache brings back."""

    path: Path
    files: int
    bytes: int
    trained: int


def find_entries(cache: Path, names: Sequence[Path]) -> list[Path]:
    """Return the folders of entries by their paths, from here or from the cache on; a data set's name means all of its.

    Raises:
        UsageError: one is no entry of this cache. Nothing else is ever removed.
    """
    entries = entry_folders(cache)
    matching: list[Path] = []
    for name in names:
        places = {Path(name).resolve(), (cache / name).resolve()}
        chosen = [folder for folder in entries if {folder.resolve(), folder.parent.resolve()} & places]
        if not chosen:
            raise UsageError(f"{name}: no entry of {cache}: `featcache store ls` lists them.")
        matching += chosen
    return list(dict.fromkeys(matching))


def contents_of(folder: Path) -> EntryContents:
    """Count what an entry's folder holds."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    trained = sum(path.suffix != ".json" and path.parent.name in {"heads", "tuned"} for path in files)
    return EntryContents(folder, len(files), sum(path.stat().st_size for path in files), trained)


def remove_entry(folder: Path) -> None:
    """Remove an entry, its versions first: killed on the way it leaves rows that nothing lists, never a list without rows.

    Raises:
        StorageError: a file cannot be removed.
    """
    for manifest in sorted(folder.glob("manifest-*.json")):
        remove_file(manifest)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be removed ({error.strerror}).") from error


@dataclass(frozen=True)
class KeptHead:
    """A trained head in a cache, as its card describes it."""

    path: Path
    dataset: str
    backbone: str
    head: str
    test: dict[str, Any]
    made: str

    @property
    def score_text(self) -> str:
        """Its test score in words."""
        for name, text in (("accuracy", "accuracy {:.1%}"), ("mean_average_precision", "mAP {:.1%}"), ("r2", "R2 {:.3f}")):
            if isinstance(score := self.test.get(name), float):
                return text.format(score)
        return "-"


def kept_heads(cache: Path) -> list[KeptHead]:
    """Return the heads that a cache holds, the newest last; a card that cannot be read is left out with a warning."""
    from featcache.heads.cards import parse_card

    heads = []
    for card in [
        path for folder in entry_folders(cache) for kind in ("heads", "tuned") for path in folder.glob(f"{kind}/*.json")
    ]:
        head = card.with_name(card.name.removesuffix(".json"))
        if not head.is_file():  # a card that waits for its head, or one of a checkpoint
            continue
        try:
            facts = parse_card(card.read_bytes())
        except (DataError, OSError) as error:
            logger.warning("%s: left out, not a head's card (%s)", card, error)
            continue
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(head.stat().st_mtime))
        backbone = facts.get("backbone", {}).get("name", "")
        dataset = head.parent.parent.parent.name
        heads.append(KeptHead(head, dataset, backbone, facts.get("head", ""), facts.get("test", {}), made))
    return sorted(heads, key=lambda head: (head.made, str(head.path)))
