"""Probes on an encoder's embeddings beside counted words, in one table, with their paired gap.

    python benchmarks/text.py ENCODER_FOLDER TABLE.csv... > benchmarks/text.md

Each table has the columns text, label and split. Heads are chosen on validation, and so is the penalty of TF-IDF's logistic
regression; the gap is that of the best head on validation to the best baseline there, on the same test texts. Embeddings are
compared with those of a loop of transformers, a text at a time, pooled as the folder says: by the mean, to length 1.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

import featcache
from featcache.datasets import Dataset
from featcache.display import Table
from featcache.experiments.fit import FitPlan, FitResult
from featcache.reports.wording import fit_table

HEADS = ("logistic", "ridge", "knn", "svm", "lda")
COMPARED, LENGTH = 500, 256


def difference(folder: str, dataset: Dataset, result: FitResult) -> float:
    """Return the greatest difference of an element of the embeddings of some test texts, of length 1."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    features = result.extracted.store.features()
    greatest, chosen = 0.0, np.random.default_rng(0).permutation(len(features.paths))[:COMPARED]
    with torch.inference_mode():
        for place in chosen.tolist():
            text = dataset.read(features.paths[place]).decode()
            inputs = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
            row = torch.nn.functional.normalize(model(**inputs).last_hidden_state.mean(1))[0].numpy()
            greatest = max(greatest, float(np.abs(row - np.asarray(features.X[place])).max()))
    return greatest


def main(folder: str, tables: list[str]) -> None:
    """Print the page."""
    print("# Probes on texts\n\nBy `benchmarks/text.py`, which says what is compared. What needs no backbone is a baseline.")
    for path in tables:
        dataset = featcache.open_dataset(path)
        result = featcache.fit(dataset, f"text:{folder}", plan=FitPlan(HEADS))
        table: Table = fit_table(result)
        print(f"\n## {Path(path).name}: {dataset.overview()}\n")
        print("\n".join(f"| {' | '.join(row)} |" for row in (table.headers, ["---"] * len(table.headers), *table.rows)))
        ahead = result.ahead
        assert ahead is not None
        low, high = ahead["ci"]
        gap = f"{ahead['points']:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f}, p = {ahead['p_value']:.2g}"
        print(f"\n{ahead['head']} less {ahead['baseline']}: {gap}.")
        apart = difference(folder, dataset, result)
        print(f"Greatest difference of {COMPARED} embeddings to a loop of transformers: {apart:.1g}.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
