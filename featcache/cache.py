"""The cache's decisions: where an entry lies, whether a request is answered by one, which images are left to compute."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.errors import StorageError
from featcache.fingerprint import sha256_of_bytes, sha256_of_file
from featcache.progress import progress
from featcache.sources import FileStat, Item, Source, location_hash
from featcache.specs import INPUT, BackboneSpec, FeatureSpec, StoredDtype
from featcache.store import SPLITS, FeatureStore, Listing, Quarantined, Seen
from featcache.store.atomic import create_file, make_folder, replace_file

_RACY_NS = 2_000_000_000  # a file changed this close to being hashed may change again unseen


def default_cache() -> Path:
    """Return where entries go: ``$FEATCACHE_CACHE``, ``cache/`` of a checkout, else the platform's cache folder."""
    if given := os.environ.get("FEATCACHE_CACHE"):
        return Path(given)
    if Path("pyproject.toml").is_file() and Path("cache/README.md").is_file() and Path("featcache").is_dir():
        return Path("cache")
    import platformdirs

    return Path(platformdirs.user_cache_dir("featcache", appauthor=False))


def dataset_folder(cache: Path, source: Source, *, rebind: bool = False) -> Path:
    """Return the folder of a data set's entries, made and bound to the source's location.

    Two sources of one name get two folders, unless ``rebind`` says that the source has moved here.

    Raises:
        StorageError: the cache cannot be written.
    """
    import json

    for name in (source.name, f"{source.name}-{location_hash(source.location)}"):
        folder = cache / name
        make_folder(folder)
        note, content = folder / "source.json", json.dumps({"location": source.location}).encode()
        if not note.exists() and create_file(note, content):
            return folder
        try:
            bound = json.loads(note.read_text())["location"]
        except (OSError, ValueError, KeyError) as error:
            raise StorageError(f"{note}: damaged ({error}). Delete it and run again.") from error
        if bound == source.location:
            return folder
        if rebind:
            replace_file(note, content)
            return folder
    return folder


def entry_path(folder: Path, label: str, spec: FeatureSpec) -> Path:
    """Return where an entry lies in its data set's folder."""
    stem = f"pixels.{INPUT}" if spec.cut == INPUT else f"{label}.{spec.cut}"
    return folder / f"{stem}-{spec.key[:8]}"


def entries(cache: Path) -> Iterator[FeatureStore]:
    """Yield every entry of a cache, in order of path."""
    for path in sorted(cache.glob("*/*/spec.json")):
        yield FeatureStore.open(path.parent)


@dataclass(frozen=True)
class Request:
    """What was asked for, in terms that neither timm nor torch is needed for."""

    backbone: BackboneSpec
    cut: str
    dtype: StoredDtype

    def described(self) -> dict[str, Any]:
        """Return the request as plain data, with what identifies the weights."""
        from importlib.metadata import version

        import featcache

        versions = {"timm": version("timm"), "featcache": featcache.__version__}
        return identify(self.backbone) | versions | {"cut": self.cut, "dtype": self.dtype}


def identify(spec: BackboneSpec) -> dict[str, Any]:
    """Return a backbone's spec as plain data, a weights file by its content instead of its path."""
    weights = Path(spec.weights) if spec.weights is not None else None
    return {
        "name": spec.name,
        "weights": f"sha256:{sha256_of_file(weights)}" if weights is not None and weights.is_file() else spec.weights,
        "random_init": spec.random_init,
        "model_args": [[key, _plain(value)] for key, value in spec.model_args],
        "overrides": {name: _plain(value) for name, value in spec.overrides.given().items()},
    }


def _plain(value: object) -> Any:
    return list(value) if isinstance(value, tuple) else value


def recognise(folder: Path, request: Request) -> FeatureStore | None:
    """Return the entry that the same flags and weights led to before, if there is one."""
    described = request.described()
    for spec in sorted(folder.glob("*/spec.json")):
        store = FeatureStore.open(spec.parent)
        if any(remembered == described for remembered in store.requests()):
            return store
    return None


def why_miss(folder: Path, spec: FeatureSpec) -> str:
    """Return which fields differ from the nearest entry of the data set, or "" where there is none to compare."""
    wanted = _flat(asdict(spec))
    nearest: list[str] | None = None
    for found in sorted(folder.glob("*/spec.json")):
        have = _flat(FeatureStore.open(found.parent).spec)
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
            flat[f"{prefix}{name}"] = list(part) if isinstance(part, tuple) else part
    return flat


@dataclass(frozen=True)
class Known:
    """An item whose bytes are recognised: their SHA-256 and the file's sign."""

    item: Item
    sha256: bytes
    stat: FileStat | None


@dataclass(frozen=True)
class Stock:
    """A source compared with an entry.

    ``known`` have a row or a place in quarantine; ``to_read`` are new, changed, or not looked at; ``unreachable`` could
    not even be opened.
    """

    known: tuple[Known, ...]
    to_read: tuple[Item, ...]
    unreachable: tuple[Quarantined, ...]


@dataclass(frozen=True)
class Hit:
    """The entry answers as it is."""


@dataclass(frozen=True)
class Resume:
    """Some rows are there; ``to_read`` are left. With none left only the listing is out of date."""

    to_read: tuple[Item, ...]


@dataclass(frozen=True)
class Miss:
    """Nothing is there yet."""

    to_read: tuple[Item, ...]


def take_stock(source: Source, store: FeatureStore | None) -> Stock:
    """Find out which of a source's items an entry knows: by path, size, time and inode, else by their content."""
    index: dict[str, tuple[FileStat, bytes, int]] = {}
    recognised: set[bytes] = set()
    bad = {item.sha256 for item in store.manifest.quarantined if item.sha256} if store else set()
    for seen in store.seen() if store else ():
        for path, digest, stat in zip(seen.paths, seen.sha256, seen.stat.tolist(), strict=True):
            index[path] = (FileStat(*stat), bytes(digest), seen.checked_ns)
            recognised.add(bytes(digest))
    recognised |= {bytes.fromhex(digest) for digest in bad}

    known: list[Known] = []
    unsure: list[tuple[Item, FileStat | None]] = []
    unreachable: list[Quarantined] = []
    for item in source.items:
        try:
            stat = source.stat(item.path)
        except OSError as error:
            unreachable.append(unreadable(item, error))
            continue
        remembered = index.get(item.path)
        if remembered and stat and remembered[0] == stat and stat.mtime_ns < remembered[2] - _RACY_NS:
            known.append(Known(item, remembered[1], stat))
        else:
            unsure.append((item, stat))
    if not recognised:
        return Stock(tuple(known), tuple(item for item, _ in unsure), tuple(unreachable))
    return _hash_unsure(source, recognised, known, unsure, unreachable)


def _hash_unsure(
    source: Source,
    recognised: set[bytes],
    known: list[Known],
    unsure: list[tuple[Item, FileStat | None]],
    unreachable: list[Quarantined],
) -> Stock:
    to_read: list[Item] = []
    with progress(len(unsure), "looking at changed files") as bar:
        for item, stat in unsure:
            try:
                digest = bytes.fromhex(sha256_of_bytes(source.read(item.path)))
            except OSError as error:
                unreachable.append(unreadable(item, error))
                continue
            finally:
                bar.update(1)
            if digest in recognised:
                known.append(Known(item, digest, stat))
            else:
                to_read.append(item)
    return Stock(tuple(known), tuple(to_read), tuple(unreachable))


def plan(source: Source, store: FeatureStore | None, stock: Stock) -> Hit | Resume | Miss:
    """Decide what an extraction has to do; touches nothing."""
    if store is None or not store.manifest.parts:
        return Miss(stock.to_read)
    if stock.to_read or store.manifest.listing is None:
        return Resume(stock.to_read)
    quarantined = {(item.path, item.sha256) for item in store.manifest.quarantined if item.sha256}
    reasons = {digest for _, digest in quarantined}
    bad = {(known.item.path, known.sha256.hex()) for known in stock.known if known.sha256.hex() in reasons}
    good = [known for known in in_source_order(source, stock.known) if known.sha256.hex() not in reasons]
    same = bad == quarantined and _same_items([(known.item, known.sha256) for known in good], store.listing())
    return Hit() if same else Resume(())


def in_source_order(source: Source, known: tuple[Known, ...] | list[Known]) -> list[Known]:
    """Return known items in the source's order."""
    position = {item.path: index for index, item in enumerate(source.items)}
    return sorted(known, key=lambda one: position[one.item.path])


def _same_items(wanted: list[tuple[Item, bytes]], listing: Listing) -> bool:
    have = [
        (Item(path, listing.classes[label], SPLITS[split]), bytes(digest))
        for path, label, split, digest in zip(
            listing.seen.paths, listing.labels, listing.splits, listing.seen.sha256, strict=True
        )
    ]
    return have == wanted


def make_listing(source: Source, known: list[Known], checked_ns: int) -> Listing:
    """Return the listing of a source's items that have a row, in the source's order."""
    ordered = in_source_order(source, known)
    classes = source.classes
    label_of = {name: index for index, name in enumerate(classes)}
    seen = make_seen(ordered, checked_ns)
    labels = np.array([label_of[one.item.label] for one in ordered], dtype=np.int64)
    splits = np.array([SPLITS.index(one.item.split) for one in ordered], dtype=np.uint8)
    return Listing(seen, labels, splits, classes)


def make_seen(known: list[Known], checked_ns: int) -> Seen:
    """Return what to remember of some files."""
    unknown = FileStat(-1, -1, -1)
    stats = [one.stat or unknown for one in known]
    return Seen(
        paths=tuple(one.item.path for one in known),
        sha256=np.frombuffer(b"".join(one.sha256 for one in known), dtype=np.uint8).reshape(-1, 32),
        stat=np.array([(stat.size, stat.mtime_ns, stat.inode) for stat in stats], dtype=np.int64).reshape(-1, 3),
        checked_ns=checked_ns,
    )


def unreadable(item: Item, error: OSError) -> Quarantined:
    """Return the place in quarantine of a file that could not be read."""
    return Quarantined(item.path, "", f"cannot be read ({error.strerror or error})")
