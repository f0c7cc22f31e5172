"""Files of a training: where it stands while it runs, and the tuned network at its end."""

import copy
import io
import json
import mmap
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from featcache.backbones.timm_models import OWN_HEAD
from featcache.errors import FeatcacheError
from featcache.finetuning.model import SuffixAndHead
from featcache.progress import logger
from featcache.store.atomic import make_folder, remove_file, replace_file, replace_file_by
from featcache.store.checksums import is_signed, sign

_STATE = b"featcache: state of a training\n"  # what a signature is for
_SIGNATURE = 64  # hexadecimal digits


class Checkpoint:
    """Keeps an unfinished training's state in one file, or nowhere; of several processes only one ``writes``."""

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self._path = path
        self._writes = writes

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept last, ``None`` where there is none or it is not whole and this user's own.

        Raises:
            SetupError: the secret that states are signed with is not the user's own.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            why = "" if _is_own(self._path) else "was changed, or was not written by you on this machine"
            state = None if why else torch.load(self._path, map_location="cpu", weights_only=True)
        except FeatcacheError:
            raise
        except FileNotFoundError:  # another process has trained the same to its end meanwhile
            return None
        except Exception as error:  # noqa: BLE001 - a damaged file fails in any way
            why = f"cannot be read ({type(error).__name__})"
        if why:
            logger.warning("%s: %s: training begins again", self._path, why)
            return None
        return state if isinstance(state, dict) else None

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was kept.

        Raises:
            StorageError: the disk failed.
        """
        if self._path is None or not self._writes:
            return
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        # behind the content, where PyTorch looks past it: a state of wrong kinds or shapes would fail anywhere in training
        signature = sign(_STATE, content).encode()
        make_folder(self._path.parent)
        replace_file_by(self._path, lambda file: file.writelines((content, signature)))

    def clear(self) -> None:
        """Forget what was kept: once checkpoint, head and record are on the disk, and not before.

        Raises:
            StorageError: the disk failed.
        """
        if self._path is not None and self._writes:
            remove_file(self._path)


def _is_own(path: Path) -> bool:
    """Tell whether a state's file ends in this user's signature of what stands before it."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        signature = content[-_SIGNATURE:].decode("ascii")
        with memoryview(content) as view, view[:-_SIGNATURE] as signed:
            return is_signed(signature, _STATE, signed)


def save_checkpoint(module: nn.Module, model: SuffixAndHead, path: Path, facts: dict[str, Any]) -> Path:
    """Write the whole tuned network as safetensors, under timm's own names where its classifier is one linear layer.

    Args:
        module: the backbone, whose parameters the model has trained.
        model: its head is written.
        path: of the file.
        facts: kept in its metadata.

    Raises:
        StorageError: the disk failed.
    """
    module = copy.deepcopy(module)
    classes = model.head.out_features
    head = {"weight": model.head.weight.detach(), "bias": model.head.bias.detach()}
    classifier = _timm_classifier(module, classes, model.head.in_features)
    if classifier is None:
        state = module.state_dict() | {f"{OWN_HEAD}{name}": value for name, value in head.items()}
    else:
        classifier.load_state_dict(head)
        state = module.state_dict()
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
    make_folder(path.parent)
    replace_file(path, save_safetensors(tensors, metadata={"featcache": json.dumps(facts)}))
    return path


def _timm_classifier(module: nn.Module, classes: int, width: int) -> nn.Linear | None:
    """Return a module's classifier, set to so many classes; ``None`` where it is no one linear layer of that width."""
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        return None
    trial = copy.deepcopy(module)  # some architectures' classifiers have layers before the last: those are left as they are
    trial.reset_classifier(classes)  # type: ignore[operator]
    classifier = trial.get_classifier()  # type: ignore[operator]
    if not isinstance(classifier, nn.Linear) or classifier.in_features != width:
        return None
    reset(classes)
    classifier = module.get_classifier()  # type: ignore[operator]
    return classifier if isinstance(classifier, nn.Linear) else None
