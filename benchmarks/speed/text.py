"""Texts a second through an encoder: featcache beside a plain loop of transformers.

    python benchmarks/speed/text.py ENCODER_FOLDER TEXTS.csv > benchmarks/speed/text.md

The plain loop takes 32 texts at a time in their order, fills each batch up to its longest text, and pools by the mean.
Seconds are the processor's, of one thread of PyTorch each, so that other work on the machine does not count. Lengths are
mixed: texts are joined, one to twelve of them, as many as a seeded draw says.
"""

import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from featcache.datasets import Dataset, MemoryReader, Sample
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.specs import BackboneSpec

TEXTS, BATCH, TURNS, LENGTH = 320, 32, 2, 256


def mixed(path: Path) -> list[str]:
    """Return texts of mixed lengths."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = [row["text"] for row in csv.DictReader(file)]
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(lines, min(12, int(rng.geometric(0.35))))) for _ in range(TEXTS)]


def plain(folder: str, texts: list[str]) -> tuple[float, np.ndarray]:
    """Return the seconds and embeddings of a plain loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    rows, started = [], time.process_time()
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            batch = texts[start : start + BATCH]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
            states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None].float()
            rows.append((states * mask).sum(1) / mask.sum(1))
    return time.process_time() - started, torch.nn.functional.normalize(torch.cat(rows)).numpy()


def cached(folder: str, texts: list[str]) -> tuple[float, np.ndarray]:
    """Return the seconds and embeddings of featcache, from texts to a committed entry."""
    content = {f"{number:06d}": text.encode() for number, text in enumerate(texts)}
    dataset = Dataset("mixed", "drawn", [Sample(path, "x") for path in content], MemoryReader(content), kind="text")
    with tempfile.TemporaryDirectory() as place:
        cache = FeatureCache(dataset, BackboneSpec(f"text:{folder}"), Settings(Path(place), workers=1))
        _ = cache.backbone
        started = time.process_time()
        extracted = cache.extracted()
        rows = extracted.store.rows_of(cache.files.sha256)
        seconds = time.process_time() - started
        return seconds, np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def main(folder: str, path: str) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    texts = mixed(Path(path))
    ways = {"plain loop": plain, "featcache": cached}
    seconds = {name: float("inf") for name in ways}
    rows = {}
    for _ in range(TURNS):
        for name, way in ways.items():
            took, rows[name] = way(folder, texts)
            seconds[name] = min(seconds[name], took)
    difference = float(np.abs(rows["plain loop"] - rows["featcache"]).max())
    words = [len(text.split()) for text in texts]
    print("# Texts a second\n\nBy `benchmarks/speed/text.py`, which says what is compared.\n")
    print("| | texts a second of one core | times |\n|---|---|---|")
    for name, took in seconds.items():
        print(f"| {name} | {len(texts) / took:.0f} | {seconds['plain loop'] / took:.2f} |")
    print(
        f"\n{len(texts)} texts of {min(words)} to {max(words)} words, {np.mean(words):.0f} on average; "
        f"the greatest difference of two embeddings of length 1 is {difference:.1g}."
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
