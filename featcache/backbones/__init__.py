"""Networks whose features are cached: each world has its loader, and a name says of which world it is."""

from typing import TYPE_CHECKING

from featcache.specs import CLIP, BackboneSpec

if TYPE_CHECKING:
    import torch

    from featcache.backbones.base import Backbone


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
