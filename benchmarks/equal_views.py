"""Training from cached activations against training that runs the frozen part in every step: do they end alike?

    python benchmarks/equal_views.py FOLDER... [-b NAME] [--weights FILE]

For each folder of images and each of three seeds ``last:2`` is trained twice, in float32, from the same probe, in the same
order, on the same views: from half-precision activations at the boundary, and from stored pixels through the whole
network. Writes equal_views.md beside this file, with the test accuracies of both.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from featcache.datasets import open_dataset
from featcache.display import set_up_notes
from featcache.experiments import finetune as tuning
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.specs import INPUT, BackboneSpec

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)


def train(bench: FeatureCache, seed: int, *, cached: bool) -> tuple[float, str]:
    """Return the test accuracy in points and where training started from."""
    plan = FineTunePlan(Unfreeze.parse("last:2"), epochs=6, lr=(5e-4,), precision="float32")
    usual = tuning.FineTuneInputs._where  # noqa: SLF001 - no command trains from pixels what could be cached
    if not cached:
        tuning.FineTuneInputs._where = lambda *_: (INPUT, ())  # type: ignore[method-assign] # noqa: SLF001
    try:
        job = tuning.run_finetune(tuning.FineTuneInputs(bench, seed=seed), plan)
    finally:
        tuning.FineTuneInputs._where = usual  # type: ignore[method-assign] # noqa: SLF001
    return 100 * job.record.test["accuracy"], job.record.cut


def main() -> None:
    """Train, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("-b", "--backbone", default="mini")
    parser.add_argument("--weights")
    options = parser.parse_args()
    set_up_notes(quiet=True, verbose=False)
    lines = [
        "# From the cache, and from pixels",
        "",
        f"`python benchmarks/equal_views.py FOLDER...`; {options.backbone}, last:2, test accuracy in % of three seeds with",
        "mean and standard deviation: from half-precision activations at the boundary, and from pixels through the whole",
        "network.",
        "",
        "| data set | from the cache | mean | from pixels | mean |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as cache:
        for folder in options.folders:
            spec = BackboneSpec(options.backbone, weights=options.weights)
            bench = FeatureCache(open_dataset(folder), spec, Settings(Path(cache)))
            cells = [folder.name]
            for cached in (True, False):
                found = [train(bench, seed, cached=cached)[0] for seed in SEEDS]
                mean, spread = statistics.mean(found), statistics.stdev(found)
                cells += [", ".join(f"{one:.1f}" for one in found), f"{mean:.1f} +- {spread:.1f}"]
                print(cells, flush=True)
            lines.append(f"| {' | '.join(cells)} |")
    (HERE / "equal_views.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
