"""What is pooled is stored once: poolings and attention train from it, with no further pass over the images."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from featcache.backbones.pooling import Layout
from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.errors import UsageError
from featcache.extraction.feature_cache import FeatureCache, Output, Settings
from featcache.specs import POOLED, TOKENS, BackboneSpec, Pool, TransformOverrides

VIT = {"img_size": 32, "patch_size": 8, "depth": 2}
REGISTERS = VIT | {"reg_tokens": 4, "global_pool": "avg"}
# the number of tokens that precede the patches, whether the first is a class token, and the shape of a row
NETWORKS: list[tuple[str, dict[str, Any], int, Layout, tuple[int, ...]]] = [
    ("resnet10t", {}, 64, Layout(4, 1), (512, 2, 2)),
    ("convnext_atto", {}, 64, Layout(4, 1), (320, 2, 2)),
    ("vit_tiny_patch16_224", VIT, 32, Layout(3, 2, 1, class_token=True), (17, 192)),
    (
        "vit_tiny_patch16_224",
        VIT | {"reg_tokens": 4, "global_pool": "avg"},
        32,
        Layout(3, 2, 5, class_token=True),
        (21, 192),
    ),
    ("deit_tiny_distilled_patch16_224", VIT, 32, Layout(3, 2, 2, class_token=True), (18, 192)),
]


def spec_of(name: str, args: dict[str, Any], size: int, pool: Pool = "default") -> BackboneSpec:
    """Return a backbone of random weights."""
    return BackboneSpec(name, None, 0, tuple(args.items()), TransformOverrides(input_size=size), pool)


@pytest.mark.parametrize(("name", "args", "size", "layout", "shape"), NETWORKS, ids=lambda value: str(value)[:24])
def test_tokens_are_what_the_backbone_pools(
    name: str, args: dict[str, Any], size: int, layout: Layout, shape: tuple[int, ...]
) -> None:
    """Alone or beside other cuts, they are timm's own activations, and it is known which of them are no patches."""
    backbone = load_backbone(spec_of(name, args, size))
    pixels = torch.randint(0, 256, (3, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        (alone,) = backbone.program((TOKENS,))(pixels)
        pooled, beside = backbone.program((POOLED, TOKENS))(pixels)
        expected = backbone.module.forward_features(backbone.program((TOKENS,)).normalise(pixels))  # type: ignore[operator,union-attr]

    assert (backbone.token_layout, alone.shape[1:]) == (layout, shape)
    torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(beside, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone.poolings()["default"](alone).flatten(1), pooled, rtol=1e-4, atol=1e-5)


def test_the_default_backbone_has_tokens() -> None:
    """Its last activations are cut off at 0 and at 6: which axis holds the channels is proved all the same."""
    assert load_backbone(BackboneSpec()).token_layout == Layout(4, 1)


@pytest.mark.parametrize(("name", "args", "size", "pool"), [("resnet10t", {}, 64, "max"), (*NETWORKS[3][:3], "avg+cls")])
def test_rows_pooled_from_stored_tokens_are_those_of_the_pooled_cut(
    name: str, args: dict[str, Any], size: int, pool: Pool, folder: Path, settings: Settings
) -> None:
    """To what float16 keeps of a number, its eleven binary digits; the entry serves every pooling."""
    dataset = open_dataset(str(folder))
    direct = FeatureCache(dataset, spec_of(name, args, size, pool), settings).extracted().store.features().X
    cache = FeatureCache(dataset, spec_of(name, args, size), settings)
    own, tokens = (entry.store.features().X for entry in cache.features([Output(POOLED), Output(TOKENS)]))

    again = FeatureCache(dataset, spec_of(name, args, size, pool), settings).extracted(TOKENS)
    poolings = cache.backbone.poolings()

    assert (tokens.dtype, again.report.computed) == (np.float16, 0)
    for rows, kind in ((direct, pool), (own, "default")):
        pooled = poolings[kind](torch.from_numpy(tokens).float()).flatten(1).numpy()
        np.testing.assert_allclose(pooled, rows, rtol=2**-10, atol=2**-10 * float(np.abs(tokens).max()))


def test_a_backbone_of_several_last_activations_has_no_tokens() -> None:
    """It is refused before anything is computed."""
    with pytest.raises(UsageError, match="list of 2 comes out"):
        load_backbone(spec_of("crossvit_tiny_240", {}, 240)).program((TOKENS,))
