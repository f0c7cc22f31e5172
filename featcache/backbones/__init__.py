"""Networks whose features are cached: how one is opened by its name, and what lies behind that.

Each world has its loader, and a name says of which world it is. Behind a name lie the files that are read for it on this
machine, and their content.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from featcache.errors import UsageError
from featcache.fingerprint import fingerprint, sha256_of_file
from featcache.resources import may_fetch
from featcache.specs import CLIP, TEXT, BackboneSpec

if TYPE_CHECKING:
    import torch

    from featcache.backbones.base import Backbone

BUNDLED = ("mini", "lite0")  # weights come with the installation: these names alone say which
_FOLDER, _HUB = ("local-dir:",), ("hf-hub:", "hf_hub:")
_CONFIG = "config.json"
TOKENISER = "tokenizer"  # what an origin of texts reads beside
# What turns texts into ids, by whichever library it was written; and how a folder of sentence encoders pools.
_TOKENISER = ("tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "spiece", "sentencepiece",
              "sentence_bert_config")  # fmt: skip
POOLING = ("modules.json", "1_Pooling/config.json")
# what an origin of images and texts reads: its configuration has a name of its own, and texts have a tokeniser
_CLIP_CONFIG, _CLIP_TOKENISER = "open_clip_config.json", ("tokenizer", "vocab", "merges", "special_tokens_map")
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".tar", ".ckpt", ".npz")  # more than timm reads: one too many only misses
_RACY_NS = 2_000_000_000  # a file changed this close to being hashed may change again unseen
_hashed: dict[tuple[str | int, ...], str] = {}  # of this process: one command asks for the same weights many times


def open_backbone(spec: BackboneSpec, device: "torch.device | None" = None) -> "Backbone":
    """Load a backbone of any world.

    Raises:
        UsageError: there is no such network, or it does not take what is asked for.
        DataError: its weights are broken, or another network's.
        SetupError: a library is not installed, or weights cannot be downloaded.
    """
    # each world's libraries are imported for its own names alone
    if spec.samples == "text":
        from featcache.backbones.text import load_text

        return load_text(spec, device)
    if spec.name.startswith(CLIP):
        from featcache.backbones.clip import load_image_tower

        return load_image_tower(spec, device)
    from featcache.backbones.timm_models import load_backbone

    return load_backbone(spec, device)


@dataclass(frozen=True)
class Origin:
    """Where the files behind a name lie.

    Attributes:
        kind: a ``folder``; a repository of the ``hub``, of which local copies count; a ``file`` of PyTorch's downloads.
        place: the folder's path, the repository, or the file's name.
        revision: of a repository, as it was asked for; its main branch where empty.
        filename: of the weights in a repository, where it is not one of the usual.
        reads: what of it decides the network: ``config`` its architecture, ``weights``, ``tokenizer`` of texts.
    """

    kind: Literal["folder", "hub", "file"]
    place: str
    revision: str = ""
    filename: str = ""
    reads: tuple[str, ...] = ("config", "weights")

    @classmethod
    def of_json(cls, facts: dict[str, Any]) -> "Origin":
        """Return an origin from its fields as plain values."""
        return cls(**(facts | {"reads": tuple(facts["reads"])}))

    def folder(self) -> Path | None:
        """Return the folder that holds the files now, ``None`` where a download is not on this machine.

        Raises:
            UsageError: a folder of the user's own is not there, or no network.
        """
        if self.kind == "file":
            return _torch_downloads()
        if self.kind == "hub":
            return _snapshot(self.place, self.revision)
        path, is_clip, is_text = Path(self.place), CLIP in self.reads, TOKENISER in self.reads
        config = _CLIP_CONFIG if is_clip else _CONFIG
        name, writer = (f"{TEXT}{path}", "save_pretrained") if is_text else (f"local-dir:{path}", "timm.models.save_for_hf")
        if is_clip:
            name, writer = f"{CLIP}{path}", "open_clip.push_to_hf_hub.save_for_hf"
        if not path.is_dir():
            raise UsageError(f"`backbone` {name}: there is no such folder.")
        if not (path / config).is_file():
            raise UsageError(f"`backbone` {name}: no {config} in it. {writer} writes such a folder.")
        return path

    def content(self, folder: Path | None = None) -> str | None:
        """Return the SHA-256 over the names and bytes of the files, ``None`` where they are not on this machine.

        Args:
            folder: that holds the files, where it is known; else the one that does now.

        Raises:
            UsageError: a folder of the user's own is not there, or no network.
        """
        folder = folder or self.folder()
        files = list(self._files(folder)) if folder is not None else []
        if folder is None or not files:
            return None
        return fingerprint({file.relative_to(folder).as_posix(): sha256_of_weights(file) for file in files})

    def _files(self, folder: Path) -> Iterator[Path]:
        # The architecture's file counts too: the same weights under another configuration are another network.
        if "config" in self.reads and (folder / _CONFIG).is_file():
            yield folder / _CONFIG
        if TOKENISER in self.reads:
            yield from (*tokeniser_files(folder), *(path for name in POOLING if (path := folder / name).is_file()))
        if CLIP in self.reads:
            names = (_CLIP_CONFIG, *_CLIP_TOKENISER)
            yield from sorted(path for path in folder.iterdir() if path.name.startswith(names) and path.is_file())
        if "weights" not in self.reads:
            return
        if self.filename:
            yield from (path for path in [folder / self.filename] if path.is_file())
        else:
            yield from sorted(path for path in folder.iterdir() if path.name.endswith(_WEIGHTS) and path.is_file())


def tokeniser_files(folder: Path) -> list[Path]:
    """Return the files of a folder that decide how texts become ids, in order."""
    return sorted(path for path in folder.iterdir() if path.name.startswith(_TOKENISER) and path.is_file())


def origin_of(spec: BackboneSpec) -> Origin | None:
    """Return the origin that a name spells out; ``None`` where it spells none.

    Names are ``local-dir:PATH``, ``hf-hub:ORG/NAME[@REVISION]``, ``text:`` before either's place, and ``clip:PATH``.
    """
    kind, _, place = spec.name.partition(":")
    reads = ("config", "weights") if spec.weights is None and spec.random_init is None else ("config",)
    if spec.name.startswith(CLIP):
        if not (place.startswith((".", "/", "~")) or Path(place).is_dir()):
            return None  # MODEL/TAG: the library knows where that is
        return Origin("folder", str(Path(place).expanduser()), reads=(CLIP, *reads))
    if spec.samples == "text":
        reads = (*reads, TOKENISER)
        is_folder = place.startswith((".", "/", "~")) or Path(place).is_dir()  # the hub's names begin with letters
        kind = "local-dir" if is_folder else "hf-hub"
        place = str(Path(place).expanduser()) if is_folder else place
    if f"{kind}:" in _FOLDER:
        return Origin("folder", place, reads=reads)
    if f"{kind}:" in _HUB:
        repository, _, revision = place.partition("@")
        return Origin("hub", repository, revision, reads=reads)
    return None


def is_by_name(spec: BackboneSpec) -> bool:
    """Tell whether a name alone says which network is meant, so that another may lie behind it tomorrow."""
    return origin_of(spec) is not None or (spec.weights is None and spec.random_init is None and spec.name not in BUNDLED)


def plain_name(spec: BackboneSpec) -> str:
    """Return a name without what content decides: where a folder lies."""
    origin = origin_of(spec)
    return f"{_world_of(spec)}:" if origin is not None and origin.kind == "folder" else spec.name


def _world_of(spec: BackboneSpec) -> str:
    return spec.name.partition(":")[0]


def absolute_name(spec: BackboneSpec) -> str:
    """Return a name that means the same in every working folder."""
    origin = origin_of(spec)
    is_folder = origin is not None and origin.kind == "folder"
    return f"{_world_of(spec)}:{Path(origin.place).resolve()}" if origin is not None and is_folder else spec.name


def other_revisions(spec: BackboneSpec) -> list[str]:
    """Return names for all local copies of a repository of the hub, the newest first; none of another kind of name."""
    origin = origin_of(spec)
    if origin is None or origin.kind != "hub":
        return []
    copies = [path for path in (_repository(origin.place) / "snapshots").glob("*") if path.is_dir()]
    copies.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return [f"{_world_of(spec)}:{origin.place}@{path.name}" for path in copies]


def read_config(folder: Path) -> dict[str, Any]:
    """Return the arguments that a folder's ``config.json`` gives its architecture, but those of its classifier."""
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    arguments = dict(config.get("model_args") or {})
    published = config.get("pretrained_cfg") or config
    if published.get("fixed_input_size") and published.get("input_size"):
        arguments.setdefault("img_size", list(published["input_size"][-2:]))
    arguments.pop("num_classes", None)
    return arguments


def _repository(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _snapshot(name: str, revision: str) -> Path | None:
    """Return the local copy of a revision: a branch's or a tag's newest, or a commit's."""
    repository = _repository(name)
    reference = repository / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    copy = repository / "snapshots" / commit
    return copy if commit and copy.is_dir() else None


def _torch_downloads() -> Path | None:
    """Return where PyTorch keeps what it downloads, found without importing it."""
    if (torch := sys.modules.get("torch")) is not None:
        place = Path(torch.hub.get_dir())
    else:
        caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
        place = Path(os.environ.get("TORCH_HOME", f"{caches}/torch")).expanduser() / "hub"
    return place / "checkpoints" if (place / "checkpoints").is_dir() else None


def sha256_of_weights(path: Path) -> str:
    """Return the SHA-256 of a file; it is read once a process, as long as its size, times and inode stay."""
    signs, now = _file_facts(path), time.time_ns()
    if (digest := _hashed.get(signs)) is not None:
        return digest
    digest = sha256_of_file(path)
    if now - max(signs[-2:]) > _RACY_NS and _file_facts(path) == signs:
        _hashed[signs] = digest
    return digest


def _file_facts(path: Path) -> tuple[Any, ...]:
    facts = path.stat()
    # Device and inode too: a path can lead to another file of the same size and time.
    return (os.path.abspath(path), facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns)  # noqa: PTH100 - links stay


def pinned(name: str, origin: Origin) -> tuple[str, Path | None]:
    """Return a name that means one network, and the folder of its files.

    A branch of the hub's becomes the commit that it stands for now, so that what is loaded and what is noted are the same.

    Raises:
        UsageError: a folder is not there, or no network.
    """
    if origin.kind == "folder":
        return name, origin.folder()
    from huggingface_hub import hf_hub_download

    try:
        with nullcontext() if hub_has_an_address() else local_files_only():
            config = Path(hf_hub_download(origin.place, "config.json", revision=origin.revision or None))
    except Exception:  # noqa: BLE001 - timm asks for the same file, and its error is told
        return name, None
    return f"hf-hub:{origin.place}@{config.parent.name}", config.parent


def published_origin(pretrained_cfg: dict[str, Any]) -> Origin | None:
    """Return where timm has a name's published weights from; ``None`` where it does not say: they are then never trusted."""
    from timm.models import _builder

    try:
        kind, place = _builder._resolve_pretrained_source(pretrained_cfg)  # noqa: SLF001 - the one place that decides it
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None
    if kind == "hf-hub":
        identifier, filename = place if isinstance(place, tuple) else (place, "")
        repository, _, revision = identifier.partition("@")
        return Origin("hub", repository, revision, filename, ("weights",))
    if kind == "url":
        url = place if isinstance(place, str) else place[0]
        name = Path(urlsplit(url).path).name if isinstance(place, str) else place[1]
        return Origin("file", name, filename=name, reads=("weights",))
    return None


def copies_here() -> list[str]:
    """Return what has been downloaded on this machine: repositories of the hub, files of PyTorch's."""
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    repositories = (path.parent.name for path in hub.glob("models--*/snapshots") if any(path.glob("*/*")))
    downloads = _torch_downloads()
    files = (path.name for path in downloads.iterdir() if path.name.endswith(_WEIGHTS)) if downloads is not None else ()
    names = (name.removeprefix("models--").replace("--", "/", 1) for name in sorted(repositories))
    return [*(f"hf-hub:{name}" for name in names), *sorted(files)]


def hub_has_an_address() -> bool:
    """Tell whether it is worth asking the hub; a proxy may know its address where this machine does not."""
    from urllib.request import getproxies

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or not may_fetch():
        return False
    if getproxies().keys() & {"https", "all"}:
        return True
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


@contextmanager
def local_files_only() -> Iterator[None]:
    """Let the hub's client look at what was downloaded before, and spare a minute of retries."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    # The client reads this switch at every call, not at import: no variable of the environment would reach it now.
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def sha256_of_given_weights(spec: BackboneSpec) -> str | None:
    """Return the SHA-256 of the weights file that a user names, ``None`` where there is none."""
    path = Path(spec.weights) if spec.weights is not None else None
    return sha256_of_weights(path) if path is not None and path.is_file() else None
