"""Low-rank updates and folded norms: put into a network, they change nothing but what trains."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import PLAN, Prepared, moved, tuned
from torch import nn

from featcache.backbones.timm_models import load_backbone
from featcache.errors import UsageError
from featcache.extraction.feature_cache import Settings
from featcache.finetuning import Unfreeze
from featcache.finetuning.loop import set_training
from featcache.finetuning.model import ConvolutionAndNorm, add_lora, fold_norms, merge_lora, select_trainable
from featcache.specs import BackboneSpec, TransformOverrides

VIT = BackboneSpec("test_vit", random_init=0)


def test_low_rank_updates_are_merged(folder: Path, settings: Settings) -> None:
    """Weights of linear layers move by matrices of that rank; nothing else does, and no adapter stays."""
    prepared = Prepared(folder, VIT, settings)
    before = prepared.backbone.module.state_dict()
    plan = replace(PLAN, unfreeze=Unfreeze.parse("lora:2:last:1"), epochs=2, patience=2, lr=(3e-2,))

    after = tuned(prepared, plan)

    changed = moved(before, after)
    last = prepared.backbone.stages[-1].name
    assert changed
    assert all(name.startswith(last) and name.endswith("weight") for name in changed)
    assert set(before) == {name for name in after if not name.startswith("head.weight") and not name.startswith("head.bias")}
    for name in changed:
        rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-5, rtol=0)
        assert 0 < int(rank) <= 2


# the smallest network of its kind: what matters is that queries, keys and values are read as one tensor
SWIN = (("img_size", 64), ("embed_dim", 24), ("depths", (1, 1, 2, 1)), ("num_heads", (1, 2, 3, 6)))


@pytest.mark.parametrize(("name", "size"), [("swinv2_tiny_window8_256", 64), ("test_vit", 160), ("resnet10t", 32)])
def test_low_rank_updates_stand_beside_layers_that_are_called(name: str, size: int) -> None:
    """Every update gets a gradient and is merged; a weight that is read as a tensor is left out."""
    arguments = SWIN if name.startswith("swin") else ()
    spec = BackboneSpec(name, random_init=0, model_args=arguments, overrides=TransformOverrides(input_size=size))
    backbone = load_backbone(spec)
    trainable = select_trainable(backbone.stages, Unfreeze.parse("lora:2:last:1"), backbone.module)
    suffix = backbone.suffix(trainable.cut)
    with torch.no_grad():
        stored = backbone.prefix(trainable.cut)(torch.rand(2, 3, size, size))
        before = suffix(stored)
    weights = {id(value) for key, value in backbone.module.named_parameters() if key in trainable.stages[-1].parameters}

    updates = add_lora(suffix, weights, 2, seed=0)
    suffix.requires_grad_(requires_grad=False)
    for _, parameters in updates:
        for parameter in parameters:
            parameter.requires_grad_(requires_grad=True)
            torch.nn.init.normal_(parameter, std=0.1)
    (suffix(stored) ** 2).sum().backward()

    assert updates
    plain = name == "test_vit"  # the last norms of the others' blocks start at zero, and nothing before them has a gradient
    if plain:
        assert all(parameter.grad is not None and parameter.grad.any() for _, some in updates for parameter in some)
    changed = suffix(stored).detach()
    merge_lora(suffix)
    with torch.no_grad():
        torch.testing.assert_close(suffix(stored), changed, rtol=1e-3, atol=1e-4 * float(changed.abs().max()))
    assert not plain or not torch.allclose(before, changed, rtol=1e-3)


def test_low_rank_updates_of_nothing_are_refused() -> None:
    """Where every weight is handed to a function, or no layer is plain, an error says so."""
    backbone = load_backbone(BackboneSpec("test_nfnet", random_init=0, overrides=TransformOverrides(input_size=32)))
    weights = {id(module.weight) for module in backbone.module.modules() if type(module).__name__ == "ScaledStdConv2d"}

    with pytest.raises(UsageError, match="no layer of these stages can take a low-rank update"):
        add_lora(backbone.suffix("stages.2"), weights, 2, seed=0)


@pytest.mark.parametrize(
    ("convolution", "is_updated"),
    [
        ({"dilation": 2, "padding": 2}, True),
        ({"dilation": (1, 3), "padding": "same"}, True),
        ({"stride": 2}, True),
        ({"groups": 2}, False),
        ({"padding": 1, "padding_mode": "circular"}, False),
    ],
)
def test_an_update_beside_a_convolution_is_one_in_its_weight(convolution: dict[str, Any], is_updated: bool) -> None:  # noqa: FBT001
    """Whatever its positions are; where that cannot be, the convolution gets none."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 6, 3, **convolution)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(images))

    network, images = Both(), torch.rand(2, 4, 9, 9)
    updates = add_lora(network, {id(network.first.weight), id(network.second.weight)}, 2, 0, images[:1])
    for _, parameters in updates:
        for parameter in parameters:
            torch.nn.init.normal_(parameter)
    beside = network(images)
    merge_lora(network)

    assert len(updates) == 1 + is_updated
    torch.testing.assert_close(network(images), beside, rtol=1e-4, atol=1e-4)


def test_untraced_networks_are_asked_which_layers_they_call() -> None:
    """Without a graph a blank image tells: a layer whose weight alone is read is left out."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.called(given), self.read.weight)

    network = Read()

    updates = add_lora(network, {id(network.called.weight), id(network.read.weight)}, 2, 0, torch.zeros(1, 4))

    assert [weight for weight, _ in updates] == [id(network.called.base_layer.weight)]


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_resnet"])
@pytest.mark.parametrize("train_batchnorm", [False, True])
def test_folded_norms_change_nothing(name: str, train_batchnorm: bool) -> None:  # noqa: FBT001
    """Joined with the convolution before it, BatchNorm gives the same embeddings, gradients and statistics.

    In float64, since a ReLU that rounding moves over its kink changes gradients by far more than rounding.
    """
    backbone = load_backbone(BackboneSpec(name, random_init=0, overrides=TransformOverrides(input_size=64)))
    for module in backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    found = []
    for folds in (False, True):
        own = backbone.separate()
        suffix = own.suffix("input").double()
        if folds:
            fold_norms(suffix)
        assert any(isinstance(module, ConvolutionAndNorm) for module in suffix.modules()) is folds
        suffix.requires_grad_(requires_grad=True)
        set_training(suffix, train_batchnorm=train_batchnorm)
        embeddings = suffix(pixels)
        embeddings.square().sum().backward()
        state = dict(own.module.state_dict())
        state |= {f"gradient of {tensor}": weight.grad for tensor, weight in own.module.named_parameters()}
        found.append(state | {"embeddings": embeddings.detach()})

    for what, value in found[0].items():
        torch.testing.assert_close(found[1][what], value, rtol=1e-9, atol=1e-9 * max(1.0, float(value.abs().max())))
