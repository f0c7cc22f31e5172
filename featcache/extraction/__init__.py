"""From images to cached rows: where entries lie, which of them answers a request, and one pass over what is not there."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from featcache.backbones import Origin, is_by_name, origin_of, plain_name, sha256_of_weights
from featcache.datasets import Dataset, location_hash
from featcache.display import logger
from featcache.errors import StorageError
from featcache.fingerprint import canonical
from featcache.specs import INPUT, POOLED, REVISED, BackboneSpec, FeatureSpec, StoredDtype, Tokenisation, Views
from featcache.store.disk import create_file, make_folder, read_note, remove_abandoned, replace_file, sealed, unsealed
from featcache.store.entry import FeatureStore


def default_cache() -> Path:
    """Return where entries go: ``$FEATCACHE_CACHE``, ``cache/`` of a checkout, else the platform's cache folder."""
    if folder := os.environ.get("FEATCACHE_CACHE"):
        return Path(folder)
    if Path("pyproject.toml").is_file() and Path("cache/README.md").is_file() and Path("featcache").is_dir():
        return Path("cache")
    import platformdirs

    return Path(platformdirs.user_cache_dir("featcache", appauthor=False))


def dataset_folder(cache: Path, dataset: Dataset, *, rebind: bool = False) -> Path:
    """Return the folder of a data set's entries, made and bound to the data set's location.

    Two data sets of one name get two folders, unless ``rebind`` says that this one has moved here.

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
            remove_abandoned(folder)
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
    shared = "ids" if isinstance(spec.transform, Tokenisation) else "pixels"
    stem = f"{shared}.{INPUT}" if spec.cut == INPUT else f"{label}.{spec.cut}"
    return folder / f"{stem}-{spec.key[:8]}"


def entry_folders(cache: Path) -> list[Path]:
    """Return the folders of a cache's entries, whole or not, in order."""
    signs = ("spec.json", "manifest-*.json", "parts")
    return sorted({path.parent for sign in signs for path in cache.glob(f"*/*/{sign}")})


@dataclass(frozen=True)
class CacheRequest:
    """What was asked for, in terms that neither timm nor torch is needed for; ``identity`` is the backbone's."""

    backbone: BackboneSpec
    identity: dict[str, Any]
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
        return self.identity | versions | {"cut": self.cut, "dtype": self.dtype, **asdict(self.views)}


_USUAL = {"pool": "default", "precision": "float32"}


def backbone_identity(spec: BackboneSpec) -> dict[str, Any]:
    """Return a backbone's spec as plain data, a weights file by its content instead of its path.

    What lies behind a name of a folder, of the hub or of timm's published weights is not in it: see ``find_entry``.
    """
    weights = Path(spec.weights) if spec.weights is not None else None
    rare = {name: value for name, value in (("pool", spec.pool), ("precision", spec.precision)) if value != _USUAL[name]}
    content = f"sha256:{sha256_of_weights(weights)}" if weights is not None and weights.is_file() else spec.weights
    return rare | {
        "name": plain_name(spec),
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
    by_name = is_by_name(request.backbone)
    spelt = origin_of(request.backbone)
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
    logger.info("The weights of %s are not on this machine: taken is the entry that was computed before", described["name"])
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
    for note in sorted(folder.glob(f"*-{spec.key[:8]}/spec.json")):
        if FeatureStore.open(note.parent).key == spec.key:
            return note.parent
    return None


def why_miss(folder: Path, spec: FeatureSpec) -> str:
    """Return which fields differ from the nearest entry of the same architecture, or "" where there is none to compare."""
    asked = _flat(json.loads(canonical(spec)))
    nearest: list[str] | None = None
    for store in _readable(folder):
        stored = _flat(store.spec)
        # Of another architecture every field differs, and whoever named it knows that.
        if stored.get("cut") != spec.cut or stored.get("backbone.architecture") != asked.get("backbone.architecture"):
            continue
        differing = sorted(name for name in asked if asked[name] != stored.get(name))
        if differing and (nearest is None or len(differing) < len(nearest)):
            nearest = [f"{name} {stored.get(name)!r} -> {asked[name]!r}" for name in differing]
    return "; ".join(nearest or [])


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            flat |= _flat(part, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = part
    return flat
