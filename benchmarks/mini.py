"""What the bundled backbone is worth: its linear probe beside random weights, raw pixels, and its cost.

    python benchmarks/mini.py FOLDER CHECKPOINT

FOLDER holds cifar10-5k/, signdigits/ and flowers5/ (train|test/CLASS/*.jpg), CHECKPOINT is timm's mobilenetv2_100.
Writes benchmarks/mini.md. Every accuracy is a logistic head's on the test split, C chosen on validation.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate

from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.evaluation import Task
from featcache.evaluation.splits import make_split
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.heads.search import fit
from featcache.reports import environment
from featcache.specs import INPUT, BackboneSpec, TransformOverrides

DATA = ("cifar10-5k", "signdigits", "flowers5")
RAW_PX = 32


def probe(folder: Path, spec: BackboneSpec, settings: Settings) -> str:
    """Return a backbone's linear-probe accuracy with its interval."""
    jobs = run_fit(FeatureCache(open_dataset(folder), spec, settings), FitPlan(baselines=False)).heads
    return cell(jobs[0].fitted.tested.scores.accuracy, jobs[0].fitted.tested.scores.accuracy_ci)


def raw_pixels(folder: Path, settings: Settings) -> str:
    """Return the accuracy of the same head on 32 x 32 pixels."""
    spec = BackboneSpec("mini", overrides=TransformOverrides(input_size=RAW_PX))
    store = FeatureCache(open_dataset(folder), spec, settings).extracted(INPUT).store
    features = store.features()
    flat = type(features)(
        features.X.reshape(len(features.y), -1).astype(np.float32) / 255,
        features.y,
        features.classes,
        features.paths,
        features.splits,
        features.sha256,
    )
    tested = fit(Task(flat), make_split(flat.y, flat.splits, flat.classes, contents=flat.sha256), "logistic").tested
    return cell(tested.scores.accuracy, tested.scores.accuracy_ci)


def forward_seconds(spec: BackboneSpec, batch: int = 32) -> float:
    """Return the best of five times of one batch through a backbone, in seconds an image."""
    backbone = load_backbone(spec)
    run = backbone.runner("pooled")
    pixels = np.zeros((batch, backbone.transform.input_size, backbone.transform.input_size, 3), np.uint8)
    run(pixels)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        run(pixels)
        times.append(time.perf_counter() - started)
    return min(times) / batch


def cell(accuracy: float, interval: tuple[float, float]) -> str:
    """Return an accuracy with its 95 % interval."""
    return f"{100 * accuracy:.1f} ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})"


def main() -> None:
    """Run everything and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("checkpoint", type=Path)
    args = parser.parse_args()
    mini, random = BackboneSpec("mini"), BackboneSpec("mini", random_init=0)
    half = (0.5, 0.5, 0.5)
    mobilenet = BackboneSpec(
        "mobilenetv2_100",
        weights=str(args.checkpoint),
        model_args=(("pad_type", "same"),),
        overrides=TransformOverrides(mean=half, std=half),
    )
    times = {name: forward_seconds(spec) for name, spec in (("mini", mini), ("mobilenetv2_100", mobilenet))}
    with tempfile.TemporaryDirectory() as cache:
        settings = Settings(Path(cache))
        rows = [
            [
                name,
                probe(args.folder / name, mini, settings),
                probe(args.folder / name, random, settings),
                raw_pixels(args.folder / name, settings),
            ]
            for name in DATA
        ]
    headers = ["test accuracy %, (95 % interval)", "mini", "same, random weights", f"pixels at {RAW_PX} px"]
    table = tabulate(rows, headers=headers, tablefmt="pipe")
    facts = environment()
    text = (
        "# The bundled backbone\n\n"
        "`python benchmarks/mini.py FOLDER CHECKPOINT`: a logistic head, C chosen on validation, test read once.\n\n"
        f"{table}\n\n"
        f"Forward pass, eager, batch 32, {torch.get_num_threads()} threads: "
        f"mini (64 px) {1e3 * times['mini']:.2f} ms an image, "
        f"mobilenetv2_100 (224 px) {1e3 * times['mobilenetv2_100']:.2f} ms: "
        f"a ratio of {times['mobilenetv2_100'] / times['mini']:.1f}.\n\n"
        f"Python {facts['python']}, torch {facts['versions']['torch']}, timm {facts['versions']['timm']}, "
        f"scikit-learn {facts['versions']['scikit-learn']}, {facts['processors']} processors, {facts['device']}.\n"
    )
    (Path(__file__).parent / "mini.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
