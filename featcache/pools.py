"""Turn an activation map or a sequence of tokens into one vector."""

import torch
from torch import Tensor, nn

from featcache.errors import UsageError
from featcache.specs import Pool


class Pooling(nn.Module):
    """Activations (b, c, h, w), (b, h, w, c) or (b, tokens, c) to vectors (b, c), twice as long for ``avg+cls``.

    ``gem`` is the generalised mean with p = 3 (Radenović et al. 2018, section 3.2). Averages and maxima leave class and
    register tokens out.

    Args:
        kind: one of POOLS; ``default`` averages.
        prefix_tokens: how many tokens before the patches are none.
        class_token: whether the first of them is a class token.
        channels_last: whether 4-D activations come as (b, h, w, c).
    """

    def __init__(self, kind: Pool, *, prefix_tokens: int, class_token: bool, channels_last: bool) -> None:
        super().__init__()
        if "cls" in kind and not class_token:
            raise UsageError(f"--pool {kind}: this backbone has no class token.")
        self.kind = kind
        self.prefix_tokens = prefix_tokens
        self.channels_last = channels_last

    def forward(self, activations: Tensor) -> Tensor:
        """Return the vectors."""
        if activations.dim() == 2:
            return activations
        if activations.dim() == 4:
            tokens = activations.flatten(1, 2) if self.channels_last else activations.flatten(2).transpose(1, 2)
            patches = tokens
        else:
            tokens, patches = activations, activations[:, self.prefix_tokens :]
        if self.kind == "max":
            return patches.amax(1)
        if self.kind == "cls":
            return tokens[:, 0]
        if self.kind == "gem":
            return patches.clamp(min=1e-6).pow(3).mean(1).pow(1 / 3)
        average = patches.mean(1)
        return torch.cat([average, tokens[:, 0]], 1) if self.kind == "avg+cls" else average


class PooledFeatures(nn.Module):
    """A backbone whose last activations go through another pooling than its own: images -> vectors."""

    def __init__(self, backbone: nn.Module, pooling: Pooling) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling

    def forward(self, images: Tensor) -> Tensor:
        """Return the vectors (b, d)."""
        return self.pooling(self.backbone.forward_features(images))  # type: ignore[no-any-return, operator]
