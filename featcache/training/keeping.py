"""Files of a training: where it stands while it runs, and the tuned network at its end."""

import copy
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from featcache.backbone import OWN_HEAD
from featcache.progress import logger
from featcache.store.atomic import make_folder, replace_file
from featcache.training.model import SuffixAndHead


class Keeper:
    """Keeps an unfinished training's state in one file, or nowhere; of several processes only one ``writes``."""

    def __init__(self, path: Path | None, *, writes: bool = True) -> None:
        self._path = path
        self._writes = writes

    def load(self) -> dict[str, Any] | None:
        """Return the state that was kept last, ``None`` where there is none or it cannot be read."""
        if self._path is None or not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 - a damaged file fails in any way
            logger.warning("%s: cannot be read (%s): training begins again", self._path, type(error).__name__)
            return None
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace what was kept.

        Raises:
            StorageError: the disk failed.
        """
        if self._path is None or not self._writes:
            return
        content = io.BytesIO()
        torch.save(state, content)
        make_folder(self._path.parent)
        replace_file(self._path, content.getbuffer())

    def clear(self) -> None:
        """Forget what was kept."""
        if self._path is not None and self._writes:
            self._path.unlink(missing_ok=True)


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
    reset = getattr(module, "reset_classifier", None)
    if reset is None:
        return None
    trial = copy.deepcopy(module)
    trial.reset_classifier(classes)  # type: ignore[operator]
    found = trial.get_classifier()  # type: ignore[operator]
    if not isinstance(found, nn.Linear) or found.in_features != width:
        return None
    reset(classes)
    own = module.get_classifier()  # type: ignore[operator]
    return own if isinstance(own, nn.Linear) else None
