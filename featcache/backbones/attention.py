"""Attention that pools tokens, and starts as their average: what an attentive head trains on a frozen backbone's tokens."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from featcache.backbones.pooling import Layout

_LEAST_SCALE = 1e-3  # of the widest channel: one that hardly changes is not blown up to the size of the others


class AttentivePooling(nn.Module):
    """Tokens to vectors by learned queries: rows (b, ...) -> (b, c), beside a class token (b, 2 c).

    Queries score the tokens themselves, each pools its own share of the channels of one projection of values, and nothing
    else is learned: efficient probing (Psomas et al. 2025, arXiv 2506.10178). Tokens of class and register are not pooled; a
    class token is handed on.

    Args:
        layout: what the axes of rows are.
        width: c.
        queries: how many; they share the channels evenly.
        scale: (c,), channels are multiplied by it: one rate fits all of them then.

    Raises:
        ValueError: the channels cannot be shared evenly.
    """

    scale: Tensor

    def __init__(self, layout: Layout, width: int, queries: int, scale: Tensor) -> None:
        super().__init__()
        if width % queries:
            raise ValueError(f"{width} channels cannot be shared by {queries} queries")
        self.layout = layout
        # zero: every token weighs the same at first
        self.queries = nn.Parameter(torch.zeros(queries, width))
        # what is added to the identity: weight decay draws values to the tokens as they are, not to nothing
        self.values = nn.Parameter(torch.zeros(queries, width, width // queries))
        self.register_buffer("scale", scale.clone())

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors."""
        before, patches = (part * self.scale for part in self.layout.tokens(rows))
        patches, mask = _attended(patches, self.layout.mask(rows), is_halved=self.training)
        scores = patches @ self.queries.T / self.scale.numel() ** 0.5
        weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask[..., None], -torch.inf), dim=1)
        pooled = weights.transpose(1, 2) @ patches  # (b, queries, c), projected afterwards: tokens are many, queries few
        count, width = self.queries.shape
        values = self.values / width  # a step of the optimiser then changes a value by no more than its rate
        shares = torch.diagonal(pooled.reshape(-1, count, count, width // count), dim1=1, dim2=2).transpose(1, 2)
        vectors = (shares + torch.einsum("bqc,qcd->bqd", pooled, values)).flatten(1)
        return torch.cat([vectors, before[:, 0]], 1) if self.layout.class_token else vectors


class LatentPooling(nn.Module):
    """As ``AttentivePooling``, by timm's attention pool of one latent query: keys, values, a projection and an MLP.

    It starts as the average too: the latent query is zero, values and projection are the identity, the MLP adds nothing.
    """

    scale: Tensor

    def __init__(self, layout: Layout, width: int, queries: int, scale: Tensor) -> None:
        super().__init__()
        self.layout = layout
        self.pool = AttentionPoolLatent(width, num_heads=queries, norm_layer=nn.LayerNorm)
        with torch.no_grad():
            for bias in (self.pool.q.bias, self.pool.kv.bias, self.pool.proj.bias, self.pool.mlp.fc2.bias):
                bias.zero_()
            self.pool.latent.zero_()
            self.pool.kv.weight[width:] = torch.eye(width)
            self.pool.proj.weight.copy_(torch.eye(width))
            self.pool.mlp.fc2.weight.zero_()
        self.register_buffer("scale", scale.clone())

    def forward(self, rows: Tensor) -> Tensor:
        """Return the vectors."""
        before, patches = (part * self.scale for part in self.layout.tokens(rows))
        patches, mask = _attended(patches, self.layout.mask(rows), is_halved=self.training)
        vectors = self._pooled(patches, mask)
        return torch.cat([vectors, before[:, 0]], 1) if self.layout.class_token else vectors

    def _pooled(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """Return what timm's pool makes of tokens (b, n, c), by another order of its products: vectors (b, c)."""
        pool, count = self.pool, self.pool.num_heads
        keys, values = self.pool.kv.weight.unflatten(0, (2, count, -1)).unbind()  # (queries, c / queries, c) each
        queries = pool.q(pool.latent).view(count, -1) * pool.scale
        # one query asks all tokens and is asked of no other: it goes through the projection of keys, and averages through
        # that of values, instead of every token through both. The keys' bias is the same for all tokens: softmax drops it
        scores = tokens @ torch.einsum("qd,qdc->cq", queries, keys)
        weights = torch.softmax(scores if mask is None else scores.masked_fill(~mask[..., None], -torch.inf), dim=1)
        vectors = torch.einsum("bqc,qdc->bqd", weights.transpose(1, 2) @ tokens, values).flatten(1)
        projected = pool.proj(vectors + pool.kv.bias.chunk(2)[1])
        answer: Tensor = projected + pool.mlp(pool.norm(projected))
        return answer


Attention = AttentivePooling | LatentPooling
FORMS: Mapping[str, Callable[[Layout, int, int, Tensor], Attention]] = {
    "attentive": AttentivePooling,
    "attentive-latent": LatentPooling,
}


def half_of(tokens: Tensor) -> Tensor:
    """Return half of each image's tokens (b, n, c), drawn anew: no training image is known by a few of its own."""
    count, total = tokens.shape[:2]
    chosen = torch.rand(count, total, device=tokens.device).topk((total + 1) // 2, dim=1).indices
    return tokens[torch.arange(count, device=tokens.device)[:, None], chosen]


def _attended(tokens: Tensor, mask: Tensor | None, *, is_halved: bool) -> tuple[Tensor, Tensor | None]:
    """Return the tokens (b, n, c) that are attended to, and which of them (b, n), ``None`` for all; halved if asked.

    Samples of unlike lengths keep their tokens in place: half of each one's own is masked out, not taken out.
    """
    if not is_halved:
        return tokens, mask
    if mask is None:
        return half_of(tokens), None
    order = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2).argsort(dim=1).argsort(dim=1)
    return tokens, order < (mask.sum(dim=1, keepdim=True) + 1) // 2


def scale_of(layout: Layout, rows: Tensor) -> Tensor:
    """Return what brings the channels of tokens, rows (n, ...), to a standard deviation of 1: float32 (c,)."""
    tokens, mask = layout.tokens(rows.float())[1], layout.mask(rows)
    deviations = (tokens.flatten(0, 1) if mask is None else tokens[mask]).std(0)
    return 1 / deviations.clamp(min=_LEAST_SCALE * float(deviations.max()) or 1.0)


_AT_ONCE = 256  # images a step of predicting


class AttentiveHead:
    """A trained head on tokens, as scikit-learn's classifiers are: it answers rows (n, ...) as they are stored.

    Its file holds arrays, numbers and texts alone; the network is built from them when it is asked.

    Args:
        form: one of FORMS.
        layout: what the axes of rows are.
        queries: how many.
        state: the network's tensors by name, ``suffix.`` before those of the attention, ``head.`` before the linear map's.
    """

    def __init__(self, form: str, layout: Layout, queries: int, state: Mapping[str, NDArray[Any]]) -> None:
        self.form, self.layout, self.queries, self.state = form, asdict(layout), queries, dict(state)
        self.classes_ = np.arange(len(self.state["head.bias"]))

    def module(self) -> nn.Module:
        """Return the network, rows (b, ...) of any float type -> logits (b, classes), in inference mode."""
        parts = {
            part: {name.removeprefix(part): torch.from_numpy(value) for name, value in self.state.items() if part in name}
            for part in ("suffix.", "head.")
        }
        scale, weight = parts["suffix."]["scale"], parts["head."]["weight"]
        pool, head = FORMS[self.form](Layout(**self.layout), len(scale), self.queries, scale), nn.Linear(*weight.T.shape)
        pool.load_state_dict(parts["suffix."])
        head.load_state_dict(parts["head."])
        return nn.Sequential(pool, head).eval()

    def predict_proba(self, X: NDArray[Any]) -> NDArray[np.float64]:
        """Return the probabilities (n, classes) of rows (n, ...)."""
        model, answers = self.module(), np.zeros((len(X), len(self.classes_)))
        with torch.inference_mode():
            for start in range(0, len(X), _AT_ONCE):
                logits = model(torch.from_numpy(X[start : start + _AT_ONCE]).float())
                answers[start : start + _AT_ONCE] = torch.softmax(logits.double(), 1).numpy()
        return answers

    def predict(self, X: NDArray[Any]) -> NDArray[np.int64]:
        """Return the classes (n,) of rows (n, ...)."""
        classes: NDArray[np.int64] = self.classes_[self.predict_proba(X).argmax(axis=1)]
        return classes
