"""A model of images and texts that is small, random but for one layer, and whose texts mean what its images show."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

CONFIG: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TEMPLATE = "a photo of a {}."


def write_clip(folder: Path, images: np.ndarray[Any, Any] | None = None, classes: Sequence[str] = (), y: Any = ()) -> Any:
    """Write a model's folder and return the model.

    Of images, uint8 (n, 32, 32, 3), its last layer is made to tell which of some classes' texts they go with: by least
    squares on the tokens of random layers.
    """
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(**CONFIG).eval()
    if images is not None:
        visual = model.visual
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
        with torch.no_grad():
            texts = open_clip.get_tokenizer("ViT-B-32")([TEMPLATE.replace("{}", name) for name in classes])
            rows = nn.functional.normalize(model.encode_text(texts[:, :16]), dim=1)
            pooled = visual._global_pool(visual.ln_post(visual.transformer(visual._embeds(pixels))))[0]
            gram = pooled.T @ pooled + 1e-3 * torch.eye(pooled.shape[1])
            visual.proj.copy_(torch.linalg.solve(gram, pooled.T @ (rows - rows.mean(0))[list(y)]))
    folder.mkdir(parents=True)
    facts = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return model
