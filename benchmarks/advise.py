"""How good the advice of ``featcache advise`` is, against what fitting and tuning everything came to.

python benchmarks/advise.py DATA WEIGHTS CACHE OUT.jsonl [SEEDS]

DATA holds hymenoptera/, flowers5/, signdigits/, cifar10-5k/ and tinyimagenet-40k/ (train|test/CLASS/IMAGE); WEIGHTS is a
checkpoint of timm's mobilenetv2_100. CACHE keeps rows: run again, only what is missing is computed. What every backbone
comes to is measured by `featcache fit` (ridge, neighbours, logistic; the best on validation counts), what tuning comes to
is read from the committed records. A line of OUT.jsonl is one piece of advice.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from featcache.datasets import open_dataset
from featcache.datasets.base import Dataset
from featcache.experiments.advise import Study
from featcache.experiments.backbone_race import Judged, Pool, Race, Runner
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.reports.records import RunRecord, read_records
from featcache.specs import BackboneSpec, TransformOverrides, freeze_args

HEADS = ("ridge", "knn", "logistic")
RECORDS = ("lab", "lab-lite0", "depths-pretrained", "depths-pretrained-small", "advise-tuned")
HALF = (0.5, 0.5, 0.5)


def subset(dataset: Dataset, name: str, train: int, test: int, classes: set[str] | None = None) -> Dataset:
    """Return a data set of so many images a class, drawn by the hash of their paths."""
    seen, chosen = defaultdict[tuple[str, str], int](int), set()
    for sample in sorted(dataset.samples, key=lambda sample: hashlib.sha256(sample.path.encode()).digest()):
        if classes is None or sample.label in classes:
            seen[sample.label, sample.split] += 1
            if seen[sample.label, sample.split] <= (train if sample.split == "train" else test):
                chosen.add(sample.path)
    samples = [sample for sample in dataset.samples if sample.path in chosen]
    return Dataset(name, f"{dataset.location}#{name}", samples, dataset.reader)


def data_sets(root: Path) -> Iterator[Dataset]:
    """Yield the sets: photographs, hand signs, scanned digits, small images; few and many of each."""
    names = ("hymenoptera", "flowers5", "signdigits", "cifar10-5k", "tinyimagenet-40k")
    insects, flowers, signs, cifar, tiny = (open_dataset(str(root / name)) for name in names)
    yield insects
    yield flowers
    yield subset(signs, "signdigits-few", 30, 62)
    yield open_dataset("sklearn:digits")
    yield signs
    yield subset(cifar, "cifar10-few", 40, 100)
    yield subset(tiny, "tiny20", 100, 20, set(tiny.classes[:20]))
    yield subset(tiny, "tiny100", 30, 10, set(tiny.classes[20:120]))
    yield cifar


def backbones(weights: str) -> dict[str, BackboneSpec]:
    """Return the candidates: a toy, two networks at two sizes each, and one whose weights are random."""

    def mobile(size: int | None) -> BackboneSpec:
        overrides = TransformOverrides(input_size=size, mean=HALF, std=HALF)
        return BackboneSpec("mobilenetv2_100", weights, model_args=freeze_args({"pad_type": "same"}), overrides=overrides)

    small = TransformOverrides(input_size=128)
    return {
        "mini": BackboneSpec("mini"),
        "lite0": BackboneSpec("lite0"),
        "lite0@128": BackboneSpec("lite0", overrides=small),
        "mobilenetv2": mobile(None),
        "mobilenetv2@96": mobile(96),
        "resnet18 random": BackboneSpec("resnet18", random_init=0, overrides=TransformOverrides(input_size=64)),
    }


FIELDS = (  # of candidates: all, without the strongest ones, one network at three prices, one and its toy
    ("mini", "lite0", "lite0@128", "mobilenetv2", "mobilenetv2@96", "resnet18 random"),
    ("mini", "lite0@128", "mobilenetv2@96", "resnet18 random"),
    ("mini", "lite0", "lite0@128"),
    ("mini", "mobilenetv2", "mobilenetv2@96"),
    ("lite0", "mobilenetv2"),
)
TUNED = {  # data set and backbone with a record of tuning: backbone as records call it
    **{(name, "mini"): "mini" for name in ("hymenoptera", "flowers5", "signdigits", "cifar10-5k")},
    **{(name, "lite0"): "lite0" for name in ("hymenoptera", "flowers5", "signdigits")},
    **{(name, "mobilenetv2"): "mobilenetv2_100" for name in ("hymenoptera", "flowers5", "signdigits")},
    ("cifar10-5k", "mobilenetv2@96"): "mobilenetv2_100",
}


def remember_answers() -> None:
    """Let a head be asked once for the same rows, labels and folds: fields share backbones."""
    ask, told = Judged.answer, {}

    def answer(self: Judged, head: str, X: Any, seed: int) -> Any:
        key = (head, seed, hashlib.sha256(X.tobytes()).digest(), self.y.tobytes(), self.folds[0].val.tobytes())
        if key not in told:
            told[key] = ask(self, head, X, seed)
        return told[key]

    Judged.answer = answer  # type: ignore[method-assign]


def probes(dataset: Dataset, spec: BackboneSpec, settings: Settings) -> dict[str, Any]:
    """Return what a backbone's heads come to on test, the best on validation, and what all of them cost."""
    result = run_fit(FeatureCache(dataset, spec, settings), FitPlan(HEADS, baselines=False))
    best = result.best
    assert best is not None
    seconds = result.extracted.cost[0] + sum(head.record.seconds["fit"] for head in result.heads)
    return {"test": best.record.test["accuracy"], "seconds": seconds, "a_row": 1 / (result.extracted.cost[1] or 1)}


def tuning(records: list[RunRecord], data: str, backbone: str, size: int | None) -> dict[str, Any]:
    """Return mean test accuracy and seconds of features alone and of each depth that was trained."""
    mine = [
        record
        for record in records
        if record.dataset == data
        and record.backbone == backbone
        and record.request["backbone"]["overrides"].get("input_size") == size
    ]
    by_seed = defaultdict[int, list[RunRecord]](list)
    for record in mine:
        if record.kind == "fit":
            by_seed[record.seed].append(record)
    features = [max(of_seed, key=lambda record: record.val["accuracy"]) for of_seed in by_seed.values()]
    results = {"features": features} | {
        depth: [record for record in mine if record.kind == "finetune" and record.method == depth]
        for depth in ("last:1", "last:2", "all")
    }
    return {
        depth: {
            "test": mean(record.test["accuracy"] for record in of_depth),
            "seconds": mean(sum(record.seconds.values()) for record in of_depth),
        }
        for depth, of_depth in results.items()
        if of_depth
    }


def advise_all(root: Path, weights: str, cache: Path, seeds: int) -> Iterator[dict[str, Any]]:
    """Yield a line for every race, and for every question whether to tune that has an answer."""
    settings, specs = Settings(cache), backbones(weights)
    records = read_records(Path(__file__).with_name(f"{name}.jsonl") for name in RECORDS)
    remember_answers()
    for dataset in data_sets(root):
        truth = {name: probes(dataset, spec, settings) for name, spec in specs.items()}
        pool = Pool.of(dataset, None, 0)  # one split for all: what is drawn anew are samples
        for seed in range(seeds):
            drawn = replace(pool, seed=seed)
            for field in FIELDS:
                yield {"what": "race", "data": dataset.name, "seed": seed} | race(drawn, field, specs, settings, truth)
        for name in specs:
            if (dataset.name, name) in TUNED:
                size = specs[name].overrides.input_size
                outcome = tuning(records, dataset.name, TUNED[dataset.name, name], size)
                for seed in range(seeds):
                    runner = Runner(specs[name], settings)
                    line = {"what": "depth", "data": dataset.name, "backbone": name, "seed": seed, "outcome": outcome}
                    yield line | study(replace(pool, seed=seed), runner, truth[name]["a_row"])


def race(pool: Pool, field: tuple[str, ...], specs: Any, settings: Settings, truth: Any) -> dict[str, Any]:
    """Return what a race comes to, and what it would have cost without rows of before."""
    started = time.monotonic()
    runners = [Runner(specs[name], settings) for name in field]
    contest = Race(pool, runners)
    winner, chance = contest.run()
    extracted = sum(contest.standings[number].images * truth[name]["a_row"] for number, name in enumerate(field))
    return {
        "field": field,
        "chosen": field[runners.index(winner)],
        "chance": chance,
        "truth": {name: truth[name]["test"] for name in field},
        "images": [contest.standings[number].images for number in range(len(field))],
        "seconds": extracted + time.monotonic() - started,
        "everything": sum(truth[name]["seconds"] for name in field),
    }


def study(pool: Pool, runner: Runner, a_row: float) -> dict[str, Any]:
    """Return the evidence about one backbone, and what it would have cost without rows of before."""
    started = time.monotonic()
    evidence, more = Study(pool, runner, None, []).evidence()
    extracted = runner.computed * 0.0 + 2 * evidence.seen * a_row
    return {
        "evidence": asdict(evidence),
        "more": None if more is None else asdict(more),
        "seconds": extracted + time.monotonic() - started,
    }


def main(root: str, weights: str, cache: str, out: str, seeds: str = "3") -> None:
    """Give all advice, write it line by line, and print the tables."""
    path = Path(out)
    with path.open("w") as file:
        for line in advise_all(Path(root), weights, Path(cache), int(seeds)):
            file.write(json.dumps(line) + "\n")
            file.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
