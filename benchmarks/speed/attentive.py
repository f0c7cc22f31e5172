"""An epoch of the attentive head from stored tokens against one from images.

    python benchmarks/speed/attentive.py FOLDER [--backbone lite0] [--images 256] [--rounds 3]

``FOLDER`` holds photographs, as fit takes them. The same network trains on the same batches of 32 on both sides, by turns.
From images each batch is decoded on all cores and computed by PyTorch in inference mode, as a loop without a cache does in
every epoch; the other side reads its tokens from the entry. The least of all rounds counts, and is printed as a row.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from featcache.backbones.attention import FORMS, scale_of
from featcache.datasets import open_dataset
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning.model import LinearHead, SuffixAndHead
from featcache.resources import cores
from featcache.specs import TOKENS, BackboneSpec, Views

BATCH, QUERIES = 32, 16


def epoch(model: SuffixAndHead, y: NDArray[np.int64], read: Callable[[NDArray[np.int64]], Tensor]) -> float:
    """Train one epoch, and return its seconds."""
    optimiser, order = torch.optim.AdamW(model.parameters(), fused=True), np.random.default_rng(0).permutation(len(y))
    started = time.perf_counter()
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        F.cross_entropy(model(read(part)), torch.from_numpy(y[part])).backward()
        optimiser.step()
        optimiser.zero_grad()
    return time.perf_counter() - started


def measure(cache: FeatureCache, form: str, images: int, rounds: int) -> tuple[float, float]:
    """Return the least seconds of an epoch from images and of one from tokens."""
    store, backbone = cache.extracted(TOKENS).store, cache.backbone
    features, reader = store.labelled(), store.reader()
    chosen = np.sort(np.random.default_rng(0).permutation(len(features.y))[:images])
    y, paths = features.y[chosen], [features.paths[index] for index in chosen]
    program, layout = backbone.program((TOKENS,)), backbone.token_layout
    scale = scale_of(layout, torch.from_numpy(reader.take(chosen)))
    width = len(scale) * (1 + layout.class_token)
    head = LinearHead(np.zeros((len(features.classes), width)), np.zeros(len(features.classes)))
    model = SuffixAndHead(FORMS[form](layout, len(scale), QUERIES, scale), head)

    def decoded(index: int) -> Any:
        return backbone.preprocess(cache.dataset.read(paths[index]), Views())[0]

    with ThreadPoolExecutor(cores()) as workers:

        def from_images(part: NDArray[np.int64]) -> Tensor:
            pixels = torch.from_numpy(np.stack(list(workers.map(decoded, part.tolist()))))
            with torch.inference_mode():
                (tokens,) = program(pixels)
            return tokens.clone()  # outside of inference mode, so that what follows may keep it for its gradients

        def from_tokens(part: NDArray[np.int64]) -> Tensor:
            return torch.from_numpy(reader.take(chosen[part]))

        pairs = [(epoch(model, y, from_images), epoch(model, y, from_tokens)) for _ in range(rounds)]
    slow, fast = np.min(pairs, axis=0)
    return float(slow), float(fast)


def main() -> None:
    """Measure both forms and print a row each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="lite0")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache(open_dataset(str(options.folder)), BackboneSpec(options.backbone), Settings(Path(folder)))
        for form in FORMS:
            slow, fast = measure(cache, form, options.images, options.rounds)
            print(f"| {options.backbone} | {form} | {options.images} | {slow:.2f} | {fast:.2f} | {slow / fast:.0f} |")


if __name__ == "__main__":
    main()
