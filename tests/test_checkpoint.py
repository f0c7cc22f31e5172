"""Files of a training: its state is this user's own or none, the tuned network is timm's."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from finetune_support import PLAN, Prepared, epochs_of, moved, tuned

from featcache.backbones.timm_models import load_backbone
from featcache.finetuning.finetuner import Checkpoint
from featcache.finetuning.model import LinearHead, SuffixAndHead, save_checkpoint
from featcache.specs import BackboneSpec


def flipped(content: bytes, place: int) -> bytes:
    """Return bytes of which one is another."""
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"not a state",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-64],
        *(lambda content, place=place: flipped(content, place) for place in (0, 1000, 20_000, -65, -64, -1)),
        lambda content: content + b"0",
        lambda content: content[:-1] + b"\xff",
    ],
)
def test_a_damaged_state_is_left_aside(
    prepared: Prepared, tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Training begins again, and says so."""
    plan, checkpoint = replace(PLAN, epochs=1, refit=False), Checkpoint(tmp_path / "state")
    expected = tuned(prepared, plan, checkpoint)
    (tmp_path / "state").write_bytes(damage((tmp_path / "state").read_bytes()))

    assert not moved(expected, tuned(prepared, plan, checkpoint))
    assert f"{tmp_path / 'state'}: " in caplog.text
    assert "training begins again" in caplog.text


def test_a_state_that_another_process_clears_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Cleared between the look and the reading, it is as if it had never been there: nothing is said to be damaged."""
    monkeypatch.setattr(Path, "exists", lambda _: True)

    assert Checkpoint(tmp_path / "state").load() is None
    assert not caplog.messages


def test_another_users_state_is_left_aside(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole as it is, training does not go on from it."""
    plan, checkpoint = replace(PLAN, epochs=1, refit=False), Checkpoint(tmp_path / "state")
    tuned(prepared, plan, checkpoint)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))

    trained = epochs_of(monkeypatch)
    tuned(prepared, plan, checkpoint)

    assert len(trained) == 1
    assert "was not written by you" in caplog.text


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_checkpoints_are_timm_checkpoints(tmp_path: Path, name: str) -> None:
    """What timm loads from the file gives the logits that were tested."""
    backbone = load_backbone(BackboneSpec(name, random_init=0))
    size = backbone.transform.input_size
    width = backbone.module(torch.zeros(1, 3, size, size)).shape[1]
    rng = np.random.default_rng(0)
    model = SuffixAndHead(backbone.suffix("input"), LinearHead(rng.normal(size=(5, width)), rng.normal(size=5)))
    pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.transform.mean, backbone.transform.std))

    path = save_checkpoint(backbone.module, model, tmp_path / "tuned.safetensors", {"classes": list("abcde")})

    whole = timm.create_model(name, num_classes=5, checkpoint_path=str(path)).eval()
    with torch.inference_mode():
        expected = whole((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(model.eval()(torch.from_numpy(pixels)), expected, rtol=1e-3, atol=1e-3)
