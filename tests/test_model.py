"""What is trained: the suffix with the probe as its head, which modules train, and what is drawn of stored rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_support import Prepared

from featcache.backbones.timm_models import load_backbone
from featcache.extraction.feature_cache import Settings
from featcache.finetuning.loop import flipped_and_shifted, mixed, predict, set_training, settle_batchnorm
from featcache.finetuning.model import SuffixAndHead
from featcache.specs import BackboneSpec

VIT = BackboneSpec("test_vit", random_init=0)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_before_the_first_step_the_head_is_the_probe(folder: Path, settings: Settings, name: str) -> None:
    """On every image, the untrained suffix and head predict what the probe predicts."""
    size = load_backbone(BackboneSpec(name, random_init=0)).transform.input_size
    prepared = Prepared(folder, BackboneSpec(name, random_init=0), settings)
    assert size == prepared.backbone.transform.input_size
    cut = prepared.backbone.stages[-2].name
    stored = prepared.bench.extracted(cut, "float32").store.reader()
    model = SuffixAndHead(prepared.backbone.suffix(cut), prepared.probe)
    everything = np.arange(len(prepared.features.y))

    probabilities = predict(model, stored.take, everything, 8)

    np.testing.assert_array_equal(probabilities.argmax(1), prepared.head.predict(prepared.features.X))
    np.testing.assert_allclose(probabilities, prepared.head.predict_proba(prepared.features.X), atol=1e-3)


@pytest.mark.parametrize("asked", [False, True])
def test_batchnorm_statistics_move_only_when_asked(prepared: Prepared, asked: bool) -> None:  # noqa: FBT001
    """In training mode the thawed part's BatchNorm stays in inference mode by default."""
    own = prepared.backbone.separate()
    model = SuffixAndHead(own.suffix("layer3"), prepared.probe)
    before = {name: value.clone() for name, value in own.module.state_dict().items()}

    model.requires_grad_(True)
    set_training(model, train_batchnorm=asked)
    model(torch.from_numpy(prepared.bench.extracted("layer3").store.reader().take(np.arange(8))))

    moved = {name for name, value in own.module.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved) == asked
    assert all(name.startswith("layer4") for name in moved)


def test_settled_statistics_are_those_of_the_rows(prepared: Prepared) -> None:
    """Whatever the size of batches: the mean over them, in the first norm behind the cut; frozen norms stay as they were."""
    own = prepared.backbone.separate()
    model = SuffixAndHead(own.suffix("layer3"), prepared.probe)
    stored, rows = prepared.bench.extracted("layer3", "float32").store.reader(), np.arange(24)
    before = {name: value.clone() for name, value in own.module.state_dict().items()}
    norm = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].detach()))

    assert not settle_batchnorm(model.requires_grad_(False), stored.take, rows, 8)
    assert settle_batchnorm(model.requires_grad_(True), stored.take, rows, 8)

    torch.testing.assert_close(norm.running_mean, torch.cat(seen[-3:]).mean(dim=(0, 2, 3)))
    assert norm.momentum == 0.1
    moved = {name for name, value in own.module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved
    assert all("running" in name or "num_batches" in name for name in moved)
    assert all(name.startswith("layer4") for name in moved)


def test_stochastic_depth_acts_in_the_trained_part(folder: Path, settings: Settings) -> None:
    """In training mode the suffix drops branches, in inference mode it does not."""
    spec = replace(VIT, model_args=(("drop_path_rate", 0.9),))
    backbone = load_backbone(spec)
    cut = backbone.stages[-2].name
    prepared = Prepared(folder, VIT, settings)
    stored = torch.from_numpy(prepared.bench.extracted(cut, "float32").store.reader().take(np.arange(4)))
    model = SuffixAndHead(backbone.suffix(cut), prepared.probe)
    model.requires_grad_(True)
    model.eval()
    plain = model(stored)

    set_training(model, train_batchnorm=False)

    torch.testing.assert_close(plain, SuffixAndHead(load_backbone(VIT).suffix(cut), prepared.probe).eval()(stored))
    assert any(not torch.allclose(model(stored), plain) for _ in range(8))


def test_pixels_are_flipped_and_shifted() -> None:
    """Each image is a mirrored or shifted window of itself; the same generator gives the same."""
    pixels = torch.arange(6 * 16 * 16 * 3, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(6, 16, 16, 3)

    one, two = (flipped_and_shifted(pixels, np.random.default_rng(3)) for _ in range(2))

    assert torch.equal(one, two)
    assert one.shape == pixels.shape
    for image, original in zip(one, pixels, strict=True):
        centre = image[4:12, 4:12]
        windows = [
            view[down : down + 8, across : across + 8]
            for view in (original, original.flip(1))
            for down in range(9)
            for across in range(9)
        ]
        assert any(torch.equal(centre, window) for window in windows)


def test_mixed_rows_lie_between_two() -> None:
    """Every row is a share of itself and the rest of another."""
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    out, others, share = mixed(rows, 0.5, np.random.default_rng(0))

    torch.testing.assert_close(out, share * rows + (1 - share) * rows[others])
