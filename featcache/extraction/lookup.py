"""The cache's decisions: where an entry lies, whether a request is answered by one, which images are left to compute."""

import json
import os
from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.backbones import origins
from featcache.backbones.origins import Origin
from featcache.datasets.base import Dataset, FileStat, location_hash
from featcache.errors import StorageError
from featcache.fingerprint import canonical, sha256_of_bytes
from featcache.progress import logger, progress
from featcache.specs import INPUT, POOLED, REVISED, BackboneSpec, FeatureSpec, StoredDtype, Views
from featcache.store.atomic import create_file, make_folder, replace_file, sweep
from featcache.store.entry import FeatureStore, now_ns
from featcache.store.hdf5 import SPLITS, Listing, Seen
from featcache.store.manifests import Quarantined, read_note, sealed, unsealed

_RACY_NS = 2_000_000_000  # a file changed this close to being hashed may change again unseen
_SIGNS = 4  # size, mtime, inode, ctime


def default_cache() -> Path:
    """Return where entries go: ``$FEATCACHE_CACHE``, ``cache/`` of a checkout, else the platform's cache folder."""
    if given := os.environ.get("FEATCACHE_CACHE"):
        return Path(given)
    if Path("pyproject.toml").is_file() and Path("cache/README.md").is_file() and Path("featcache").is_dir():
        return Path("cache")
    import platformdirs

    return Path(platformdirs.user_cache_dir("featcache", appauthor=False))


def dataset_folder(cache: Path, dataset: Dataset, *, rebind: bool = False) -> Path:
    """Return the folder of a data set's entries, made and bound to the source's location.

    Two sources of one name get two folders, unless ``rebind`` says that the source has moved here.

    Raises:
        StorageError: the cache cannot be written.
    """
    for name in (dataset.name, f"{dataset.name}-{location_hash(dataset.location)}"):
        folder = cache / name
        make_folder(folder)
        note = folder / "source.json"
        content = json.dumps(sealed({"location": dataset.location}, name)).encode()
        if not note.exists() and create_file(note, content):
            return folder
        try:
            bound = bound_location(note)
        except StorageError:
            if not rebind:
                raise
            bound = ""
        if bound == dataset.location:
            sweep(folder)
            return folder
        if rebind:
            replace_file(note, content)
            return folder
    return folder


def bound_location(note: Path) -> str:
    """Return the location that a data set's folder is bound to by its ``dataset.json``.

    Raises:
        StorageError: it is not what was written there.
    """
    try:
        location = unsealed(read_note(note), note.parent.name).get("location")
        if not isinstance(location, str):
            raise ValueError("no location")  # noqa: TRY004 - of the file's content, not of an argument
    except (OSError, ValueError) as error:
        raise StorageError(f"{note}: damaged ({error}). Delete it and run again, or bind the folder with `name`.") from error
    return location


def entry_path(folder: Path, label: str, spec: FeatureSpec) -> Path:
    """Return where an entry lies in its data set's folder."""
    stem = f"pixels.{INPUT}" if spec.cut == INPUT else f"{label}.{spec.cut}"
    return folder / f"{stem}-{spec.key[:8]}"


def entry_folders(cache: Path) -> list[Path]:
    """Return the folders of a cache's entries, whole or not, in order."""
    signs = ("spec.json", "manifest-*.json", "parts")
    return sorted({found.parent for sign in signs for found in cache.glob(f"*/*/{sign}")})


@dataclass(frozen=True)
class CacheRequest:
    """What was asked for, in terms that neither timm nor torch is needed for."""

    backbone: BackboneSpec
    cut: str
    dtype: StoredDtype
    views: Views = field(default_factory=Views)

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain data, with what identifies the weights."""
        from importlib.metadata import version

        import featcache

        versions: dict[str, Any] = {"timm": version("timm"), "featcache": featcache.__version__}
        if self.cut not in {POOLED, INPUT} or self.backbone.pool != "default":
            versions["format"] = REVISED  # what version 1 remembered may lead to rows of another tensor
        return backbone_identity(self.backbone) | versions | {"cut": self.cut, "dtype": self.dtype, **asdict(self.views)}


_USUAL = {"pool": "default", "precision": "float32"}


def backbone_identity(spec: BackboneSpec) -> dict[str, Any]:
    """Return a backbone's spec as plain data, a weights file by its content instead of its path.

    What lies behind a name of a folder, of the hub or of timm's published weights is not in it: see ``find_entry``.
    """
    weights = Path(spec.weights) if spec.weights is not None else None
    rare = {name: value for name, value in (("pool", spec.pool), ("precision", spec.precision)) if value != _USUAL[name]}
    content = f"sha256:{origins.sha256_of_weights(weights)}" if weights is not None and weights.is_file() else spec.weights
    return rare | {
        "name": origins.plain_name(spec),
        "weights": content,
        "random_init": spec.random_init,
        "model_args": [[key, _plain(value)] for key, value in spec.model_args],
        "overrides": {name: _plain(value) for name, value in spec.overrides.given().items()},
    }


def _plain(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def find_entry(folder: Path, request: CacheRequest) -> FeatureStore | None:
    """Return the entry that the same flags and the same weights led to before, if there is one.

    A name is believed only as long as the files behind it are those that the entry's rows came from. Where they are not on
    this machine (features computed elsewhere), nothing speaks against the only entry of that name, and a note says so.

    Raises:
        UsageError: a folder that the name spells out is not there.
    """
    described = request.to_json()
    by_name = origins.by_name(request.backbone)
    spelt = origins.named(request.backbone)
    if request.cut == INPUT and spelt is None:
        by_name = False  # pixels come from no weights, and their transform from timm, whose version is in the request
    absent: list[FeatureStore] = []
    for store, remembered in _remembered(folder):
        noted = remembered.pop("origin", None)
        if remembered != described:
            continue
        if not by_name:
            return store
        if noted is None:
            continue  # of a version that took the name's word
        now, then = _contents(noted, spelt)
        if now == then:
            return store
        if now is None:
            absent.append(store)
    if spelt is not None:
        spelt.folder()
    if len({store.path for store in absent}) != 1:
        return None
    logger.info("the weights of %s are not on this machine: taken is the entry that was computed before", described["name"])
    return absent[0]


def _contents(noted: Any, spelt: Origin | None) -> tuple[str | None, str]:
    """Return the hash of the files behind a name now (``None`` where they are elsewhere), and as they were noted."""
    try:
        return (spelt or Origin.of_json(noted["place"])).content(), noted["content"]
    except (AttributeError, KeyError, TypeError, ValueError):
        return "", "a note of no origin"


def _remembered(folder: Path) -> Iterator[tuple[FeatureStore, dict[str, Any]]]:
    for store in _readable(folder):
        for remembered in store.requests():
            yield store, remembered


def _readable(folder: Path) -> Iterator[FeatureStore]:
    """Yield a data set's entries; a damaged one answers no request, and stops none that others answer."""
    for spec in sorted(folder.glob("*/spec.json")):
        try:
            yield FeatureStore.open(spec.parent)
        except StorageError as error:
            logger.warning("left aside: %s", error)


def find_key(folder: Path, spec: FeatureSpec) -> Path | None:
    """Return the data set's entry of a key, whatever the backbone was called when it was made."""
    for found in sorted(folder.glob(f"*-{spec.key[:8]}/spec.json")):
        if FeatureStore.open(found.parent).key == spec.key:
            return found.parent
    return None


def why_miss(folder: Path, spec: FeatureSpec) -> str:
    """Return which fields differ from the nearest entry of the data set, or "" where there is none to compare."""
    wanted = _flat(json.loads(canonical(spec)))
    nearest: list[str] | None = None
    for store in _readable(folder):
        have = _flat(store.spec)
        if have.get("cut") != spec.cut:
            continue
        differing = sorted(name for name in wanted if wanted[name] != have.get(name))
        if differing and (nearest is None or len(differing) < len(nearest)):
            nearest = [f"{name} {have.get(name)!r} -> {wanted[name]!r}" for name in differing]
    return "; ".join(nearest or [])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            flat |= _flat(part, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = part
    return flat


@dataclass(frozen=True)
class FileIndex:
    """Items of a source whose bytes are known, as columns of n rows.

    ``index`` int64 (n,) are positions in ``dataset.samples``, ``sha256`` is uint8 (n, 32), ``stat`` int64 (n, 4) is the
    file's size in bytes, mtime in ns, inode and ctime in ns, -1 where there is no file or its times say nothing yet.
    """

    index: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    stat: NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[tuple[int, bytes, FileStat | None]]) -> "FileIndex":
        """Gather single items."""
        stats = [(stat.size, stat.mtime_ns, stat.inode, stat.ctime_ns) if stat else (-1,) * _SIGNS for _, _, stat in rows]
        return cls(
            np.array([index for index, _, _ in rows], dtype=np.int64),
            np.frombuffer(b"".join(digest for _, digest, _ in rows), dtype=np.uint8).reshape(-1, 32),
            np.array(stats, dtype=np.int64).reshape(-1, _SIGNS),
        )

    @classmethod
    def joined(cls, several: "Sequence[FileIndex]") -> "FileIndex":
        """Put several one after the other."""
        several = [cls.of([]), *several]
        columns = ([getattr(one, name) for one in several] for name in ("index", "sha256", "stat"))
        return cls(*(np.concatenate(column) for column in columns))

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.index)

    def take(self, which: NDArray[Any] | slice) -> "FileIndex":
        """Return some of them, by positions, a mask or a slice."""
        return FileIndex(self.index[which], self.sha256[which], self.stat[which])

    def digests(self) -> list[bytes]:
        """Return the SHA-256 of each item."""
        return [row.tobytes() for row in self.sha256]

    def seen(self, dataset: Dataset, checked_ns: int) -> Seen:
        """Return what the store is to remember of the files."""
        return Seen(tuple(map(dataset.table.path, self.index.tolist())), self.sha256, self.stat, checked_ns)


class FileIndexBuilder:
    """Items that a run comes to know, ``most`` of them at most.

    Their room is taken before the run begins: what lasts, put down between arrays that come and go with every batch, would
    keep their places from being used again.
    """

    def __init__(self, most: int) -> None:
        self._room = FileIndex(np.empty(most, np.int64), np.empty((most, 32), np.uint8), np.empty((most, _SIGNS), np.int64))
        self._count = 0

    def clear(self) -> None:
        """Forget them; their room is used again."""
        self._count = 0

    def add(self, sighted: FileIndex) -> None:
        """Put down some more."""
        place = slice(self._count, self._count + len(sighted))
        self._room.index[place] = sighted.index
        self._room.sha256[place] = sighted.sha256
        self._room.stat[place] = sighted.stat
        self._count = place.stop

    @property
    def sighted(self) -> FileIndex:
        """All of them, not copied."""
        return self._room.take(slice(self._count))


@dataclass(frozen=True)
class Scan:
    """A source compared with an entry.

    ``cached`` have a row or a place in quarantine; ``pending`` int64 (m,) are the positions of those that are new, changed,
    or not looked at; ``unreadable`` could not even be opened. ``renewed`` are known by their bytes alone, and have signs
    now that a listing can remember them by.
    """

    cached: FileIndex
    pending: NDArray[np.int64]
    unreadable: tuple[Quarantined, ...]
    renewed: int = 0


@dataclass(frozen=True)
class Hit:
    """The entry answers as it is."""


@dataclass(frozen=True)
class Resume:
    """Some rows are there; ``pending`` are left. With none left only the listing is out of date."""

    pending: NDArray[np.int64]


@dataclass(frozen=True)
class Miss:
    """Nothing is there yet."""

    pending: NDArray[np.int64]


def scan(
    dataset: Dataset,
    store: FeatureStore | None,
    *,
    among: Callable[[int], bool] = lambda _: True,
    hashes_new: bool = True,
) -> Scan:
    """Find out which of a source's items an entry knows: by path, size, time and inode, else by their content.

    Only items at positions that ``among`` accepts are looked at. Without ``hashes_new`` a path that was never seen is to
    be read, whatever its content: who computes one share of many must not read the others'.
    """
    where: dict[str, tuple[int, int]] = {}
    remembered: list[Seen] = []
    recognised = {bytes.fromhex(item.sha256) for item in store.manifest.quarantined if item.sha256} if store else set()
    for number, (seen, have_rows) in enumerate(store.seen() if store else ()):
        remembered.append(seen)
        where.update((path, (number, row)) for row, path in enumerate(seen.paths))
        if have_rows:  # a copy's or a listing's word is none: the row may have been lost before it was written
            recognised.update(row.tobytes() for row in seen.sha256)

    if not remembered and not recognised:
        return Scan(
            FileIndex.of([]), np.array([index for index in range(len(dataset.samples)) if among(index)], np.int64), ()
        )
    cached: list[tuple[int, bytes, FileStat | None]] = []
    unsure: list[tuple[int, FileStat | None]] = []
    unreadable: list[Quarantined] = []
    pending = array("q")
    paths = set(where) | {item.path for item in store.manifest.quarantined} if store else set()
    for index, item in enumerate(dataset.samples):
        if not among(index):
            continue
        try:
            stat = dataset.stat(item.path)
        except OSError as error:
            unreadable.append(quarantine_unread(item.path, error))
            continue
        if (place := where.get(item.path)) is not None and stat:
            seen, row = remembered[place[0]], place[1]
            digest = seen.sha256[row].tobytes()
            if digest in recognised and _is_as_seen(seen, row, stat):
                cached.append((index, digest, stat))
                continue
        if recognised and (hashes_new or item.path in paths):
            unsure.append((index, stat))
        else:
            pending.append(index)
    believed = len(cached)
    pending.extend(_hash_unsure(dataset, recognised, cached, unsure, unreadable))
    renewed = sum(stat is not None for _, _, stat in cached[believed:])
    return Scan(FileIndex.of(cached), np.sort(np.array(pending, dtype=np.int64)), tuple(unreadable), renewed)


def settled(stat: FileStat | None) -> FileStat | None:
    """Return what a file that is about to be hashed will be recognised by, ``None`` where it is too young for that.

    A second write within the grain of the file system's clock would leave the same times: exFAT's is two seconds.
    """
    if stat is None or max(stat.mtime_ns, stat.ctime_ns) >= now_ns() - _RACY_NS:
        return None
    return stat


def _is_as_seen(seen: Seen, row: int, stat: FileStat) -> bool:
    """Tell whether a file has the signs that it had when it was hashed; listings from before ctime was kept have three."""
    then = FileStat(*seen.stat[row].tolist())
    if then.ctime_ns < 0:
        stat = replace(stat, ctime_ns=-1)
    return then == stat and max(stat.mtime_ns, stat.ctime_ns) < seen.checked_ns - _RACY_NS


def _hash_unsure(
    dataset: Dataset,
    recognised: set[bytes],
    cached: list[tuple[int, bytes, FileStat | None]],
    unsure: list[tuple[int, FileStat | None]],
    unreadable: list[Quarantined],
) -> list[int]:
    pending: list[int] = []
    with progress(len(unsure), "looking at changed files") as bar:
        for index, stat in unsure:
            item, stat = dataset.samples[index], settled(stat)  # noqa: PLW2901 - what is kept of it
            try:
                digest = bytes.fromhex(sha256_of_bytes(dataset.read(item.path)))
            except OSError as error:
                unreadable.append(quarantine_unread(item.path, error))
                continue
            finally:
                bar.update(1)
            if digest in recognised:
                cached.append((index, digest, stat))
            else:
                pending.append(index)
    return pending


def plan(dataset: Dataset, store: FeatureStore | None, stock: Scan) -> Hit | Resume | Miss:
    """Decide what an extraction has to do; touches nothing."""
    if store is None or not store.manifest.parts:
        return Miss(stock.pending)
    if len(stock.pending) or store.manifest.listing is None:
        return Resume(stock.pending)
    quarantined = {(item.path, item.sha256) for item in store.manifest.quarantined if item.sha256}
    cached = stock.cached.take(np.argsort(stock.cached.index, kind="stable"))
    is_bad = with_content(cached, {bytes.fromhex(digest) for _, digest in quarantined})
    bad = cached.take(is_bad)
    found = {(dataset.samples[index].path, digest.hex()) for index, digest in zip(bad.index, bad.digests(), strict=True)}
    same = found == quarantined and _same_items(dataset, cached.take(~is_bad), store.listing())
    return Hit() if same else Resume(stock.pending)


def with_content(sighted: FileIndex, digests: Collection[bytes]) -> NDArray[np.bool_]:
    """Return which items have one of some contents."""
    if not digests:
        return np.zeros(len(sighted), dtype=bool)
    return np.array([digest in digests for digest in sighted.digests()], dtype=bool)


def _same_items(dataset: Dataset, wanted: FileIndex, listing: Listing) -> bool:
    if len(wanted) != len(listing.labels) or not np.array_equal(wanted.sha256, listing.seen.sha256):
        return False
    have = zip(listing.seen.paths, listing.labels.tolist(), listing.splits.tolist(), strict=True)
    items = (dataset.samples[index] for index in wanted.index)
    return all(
        (item.path, item.label, item.split) == (path, listing.classes[label], SPLITS[split])
        for item, (path, label, split) in zip(items, have, strict=True)
    )


def make_listing(dataset: Dataset, cached: FileIndex, checked_ns: int) -> Listing:
    """Return the listing of a source's items that have a row, in the source's order."""
    ordered = cached.take(np.argsort(cached.index, kind="stable"))
    classes = dataset.classes
    label_of = {name: index for index, name in enumerate(classes)}
    of_label, of_split = dataset.table.kinds(ordered.index)
    labels = np.array([label_of[name] for name in dataset.table.labels], np.int64)[of_label]
    splits = np.array([SPLITS.index(name) for name in dataset.table.splits], np.uint8)[of_split]
    return Listing(ordered.seen(dataset, checked_ns), labels, splits, classes)


def renew(dataset: Dataset, store: FeatureStore, stock: Scan) -> None:
    """Let an entry that answers as it is remember files by their present signs, where it had to hash them again.

    Else every later run would hash them too. A cache that cannot be written is only slower.
    """
    if not stock.renewed:
        return
    before = store.manifest
    store.refresh()
    if store.manifest.number == before.number:  # what another process has listed meanwhile is newer than this
        bad = {bytes.fromhex(item.sha256) for item in before.quarantined if item.sha256}
        cached = stock.cached.take(~with_content(stock.cached, bad))
        with suppress(StorageError):
            store.commit(quarantined=before.quarantined, listing=make_listing(dataset, cached, now_ns()))


def quarantine_unread(path: str, error: OSError) -> Quarantined:
    """Return the place in quarantine of a file that could not be read."""
    return Quarantined(path, "", f"cannot be read ({error.strerror or error})")
