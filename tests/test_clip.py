"""Models of images and texts: the image tower is a backbone like any other."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_support import CONFIG, TEMPLATE, write_clip
from PIL import Image
from safetensors.torch import load_file, save_file
from support import Run, draw_subtle

open_clip = pytest.importorskip("open_clip")

from featcache.backbones import open_backbone  # noqa: E402
from featcache.backbones.clip import embed_classes  # noqa: E402
from featcache.datasets.decoding import ImagePreprocess  # noqa: E402
from featcache.errors import DataError, SetupError, UsageError  # noqa: E402
from featcache.specs import BackboneSpec, TransformOverrides, Views  # noqa: E402


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random model's folder, and the model as open_clip made it."""
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    return folder, write_clip(folder)


def test_both_towers_rows_are_open_clip_s(tiny_clip: tuple[Path, Any], tmp_path: Path) -> None:
    """From a file's bytes to the embedding, and from class names to their averaged row, both are the library's own."""
    folder, model = tiny_clip
    rng = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    files = sorted(tmp_path.glob("*.png"))
    backbone = open_backbone(BackboneSpec(f"clip:{folder}"))
    assert isinstance(backbone.preprocess, ImagePreprocess)

    pixels = np.concatenate([backbone.preprocess(path.read_bytes(), Views()) for path in files])
    with torch.no_grad():
        rows = backbone.program(("pooled",))(torch.from_numpy(pixels))[0].numpy()
        transform = open_clip.image_transform(32, is_train=False, mean=(0.5,) * 3, std=(0.5,) * 3)
        expected = model.encode_image(torch.stack([transform(Image.open(path)) for path in files])).numpy()
    np.testing.assert_allclose(rows, expected, atol=2e-6)

    names, templates = ["red circle", "blue square", "{0.__class__}"], [TEMPLATE, "art of the {}."]
    texts = embed_classes(BackboneSpec(f"clip:{folder}"), names, templates)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    calls = [lambda name, template=template: template.replace("{}", name) for template in templates]
    theirs = open_clip.build_zero_shot_classifier(model, tokenizer, names, calls)
    np.testing.assert_allclose(texts.rows, theirs.T.numpy(), atol=1e-6)
    assert texts.scale == pytest.approx(float(model.logit_scale.detach().exp()))


def test_the_image_tower_is_cut_between_its_blocks(tiny_clip: tuple[Path, Any]) -> None:
    """Prefix, then suffix, is the whole tower at every stage; its tokens have a class token."""
    folder, model = tiny_clip
    backbone = open_backbone(BackboneSpec(f"clip:{folder}"))
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8))
    images = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1

    assert [stage.name for stage in backbone.stages] == ["stem", *(f"visual.transformer.resblocks.{n}" for n in range(3))]
    assert sum(stage.size for stage in backbone.stages) == sum(value.numel() for value in model.visual.parameters())
    with torch.no_grad():
        for stage in backbone.stages[:-1]:
            embeddings = backbone.suffix(stage.name)(backbone.prefix(stage.name)(images))
            torch.testing.assert_close(embeddings, model.encode_image(images), atol=1e-5, rtol=1e-5)
    assert (backbone.token_layout.prefix_tokens, backbone.token_layout.class_token) == (1, True)


@pytest.mark.parametrize(
    "vision",
    [
        {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 32},
        {"image_size": 32, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"},
        CONFIG["vision_cfg"] | {"pool_type": "avg", "final_ln_after_pool": True},
    ],
    ids=["resnet", "timm", "average"],
)
def test_other_towers_are_backbones_too(vision: dict[str, Any], tmp_path: Path) -> None:
    """Convolutional towers, timm's, and those that pool otherwise: stages in order, and rows as the library's."""
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG | {"vision_cfg": vision}}))
    overrides = TransformOverrides(input_size=160) if "timm_model_name" in vision else TransformOverrides()
    backbone = open_backbone(BackboneSpec(f"clip:{tmp_path}", random_init=0, overrides=overrides))
    size = backbone.preprocess.shape[0]
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))

    assert len(backbone.stages) >= 4
    last = backbone.stages[-2].name
    with torch.no_grad():
        expected = backbone.module.visual(images)
        torch.testing.assert_close(backbone.suffix(last)(backbone.prefix(last)(images)), expected, atol=1e-4, rtol=1e-4)


def test_a_tower_goes_through_every_command(tiny_clip: tuple[Path, Any], tmp_path: Path, run: Run) -> None:
    """Fit, fine-tune, and the tuned file as weights; a hit needs no open_clip, another text tower is no other image."""
    folder, data = shutil.copytree(tiny_clip[0], tmp_path / "model"), draw_subtle(tmp_path / "data", 12)
    name = ("-b", f"clip:{folder}")

    fitted = run("fit", data, *name, "--no-baselines", "--json")
    assert fitted.code == 0, fitted.err
    assert run("fit", data, *name, "--no-baselines", "--json").json["extract"]["computed"] == 0
    tuned = run("finetune", data, *name, "--unfreeze", "last:1", "--epochs", "1", "--json")
    assert tuned.code == 0, tuned.err
    weights = next((tmp_path / "cache").rglob("last1*.safetensors"))
    again = run("extract", data, "-b", f"clip:{folder}", "--weights", weights, "--json")
    assert (again.code, again.json["computed"]) == (0, 36), again.err

    state = load_file(folder / "open_clip_model.safetensors")
    state["ln_final.bias"] += 1
    save_file(state, folder / "open_clip_model.safetensors")
    same = run("extract", data, *name, "--json").json
    assert (same["computed"], same["key"]) == (0, fitted.json["extract"]["key"])
    state["visual.ln_post.bias"] += 1
    save_file(state, folder / "open_clip_model.safetensors")
    assert run("extract", data, *name, "--json").json["computed"] == 36


def test_what_is_no_model_is_told(tiny_clip: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown models, tags and folders, other weights, pickles and a missing network are errors with a remedy."""
    monkeypatch.setenv("FEATCACHE_FETCH", "never")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    state = {"visual.proj": torch.zeros(1)}
    save_file(state, tmp_path / "other.safetensors")
    torch.save({"visual": torch.nn.Linear(1, 1)}, tmp_path / "code.pth")
    for spec, kind, message in (
        (BackboneSpec("clip:ViT-B-3"), UsageError, "no such model. Did you mean ViT-B-32"),
        (BackboneSpec("clip:ViT-B-32"), UsageError, "write clip:ViT-B-32/TAG, of the tags openai"),
        (BackboneSpec("clip:ViT-B-32/nothing"), UsageError, "of the tags openai"),
        (BackboneSpec("clip:ViT-B-32/openai"), SetupError, "are not on this machine, and FEATCACHE_FETCH=never"),
        (BackboneSpec(f"clip:{tmp_path}"), UsageError, "no open_clip_config.json in it"),
        (BackboneSpec("clip:./nowhere"), UsageError, "there is no such folder"),
        (BackboneSpec(f"clip:{tiny_clip[0]}", str(tmp_path / "other.safetensors")), DataError, "not for clip:"),
        (BackboneSpec(f"clip:{tiny_clip[0]}", str(tmp_path / "code.pth")), DataError, "not a safetensors file or a plain"),
        (BackboneSpec(f"clip:{tiny_clip[0]}", model_args=(("a", 1),)), UsageError, "are of timm's models"),
    ):
        with pytest.raises(kind) as raised:
            open_backbone(spec)
        assert message in str(raised.value)
