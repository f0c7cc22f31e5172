"""How good the advice of ``featcache advise`` is, against what fitting and tuning everything came to.

python benchmarks/advise.py DATA WEIGHTS CACHE OUT.jsonl [SEEDS]

DATA holds hymenoptera/, flowers5/, signdigits/, cifar10-5k/ and tinyimagenet-40k/ (train|test/CLASS/IMAGE); WEIGHTS is a
checkpoint of timm's mobilenetv2_100. CACHE keeps rows: run again, only what is missing is computed. What every backbone
comes to is measured by `featcache fit` (ridge, neighbours, logistic; the best on validation counts), what tuning comes to
is read from the committed records. A line of OUT.jsonl is one piece of advice; with OUT.jsonl alone its tables are printed.
"""

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from featcache.datasets import Dataset, open_dataset
from featcache.evaluation.metrics import Gap, decode_correct, paired_gap
from featcache.evaluation.splits import drawn_weights, more_samples
from featcache.experiments import backbone_race
from featcache.experiments.advise import Evidence, Study
from featcache.experiments.backbone_race import Judged, Pool, Race, Runner, judge_part
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.heads.search import ridge_shares
from featcache.reports import RunRecord, read_records
from featcache.specs import BackboneSpec, TransformOverrides, freeze_args

SURE, MISSED = 0.9, 0.5 + 1e-9  # points: what counts as wrong
DEPTHS = ("features", "last:1", "last:2", "all")
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


class Remembered:
    """Heads asked before for the same rows, labels and folds: fields share backbones, but each pays for its own."""

    def __init__(self) -> None:
        """Put itself between races and heads."""
        self.told: dict[Any, tuple[Any, float]] = {}
        self.saved = 0.0
        answer, shares = Judged.answer, ridge_shares

        def asked(judged: Judged, head: str, X: Any, seed: int) -> Any:
            return self.of((head, seed, *self.key(X, judged.y, judged.folds)), lambda: answer(judged, head, X, seed))

        def shared(X: Any, y: Any, folds: Any) -> Any:
            return self.of(self.key(X, y, folds), lambda: shares(X, y, folds))

        Judged.answer = asked  # type: ignore[method-assign]
        backbone_race.ridge_shares = shared

    def of(self, key: Any, ask: Callable[[], Any]) -> Any:
        """Return what is told, and count what it took where it was told before."""
        if key in self.told:
            self.saved += self.told[key][1]
        else:
            started = time.monotonic()
            self.told[key] = (ask(), time.monotonic() - started)
        return self.told[key][0]

    @staticmethod
    def key(X: Any, y: Any, folds: Any) -> tuple[bytes, ...]:
        """Return what rows, labels and folds are told apart by."""
        return hashlib.sha256(X.tobytes()).digest(), y.tobytes(), folds[0].val.tobytes()


def probes(dataset: Dataset, spec: BackboneSpec, settings: Settings) -> dict[str, Any]:
    """Return what a backbone's heads come to on test, the best on validation, and what all of them cost."""
    result = run_fit(FeatureCache(dataset, spec, settings), FitPlan(HEADS, baselines=False))
    best = result.best
    assert best is not None
    (default,) = (head.record for head in result.heads if head.record.method == "logistic")
    seconds = result.extracted.cost[0] + sum(head.record.seconds["fit"] for head in result.heads)
    return {
        "test": best.record.test["accuracy"],
        "default": default.test["accuracy"],
        "right": best.record.right,
        "seconds": seconds,
        "a_row": 1 / (result.extracted.cost[1] or 1),
    }


def committed() -> list[RunRecord]:
    """Return the records that say what tuning came to."""
    return read_records(Path(__file__).with_name(f"{name}.jsonl") for name in RECORDS)


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


def fair(field: tuple[str, ...], data: str) -> tuple[str, ...]:
    """Return the candidates that were not trained on the very images: ``mini`` was on those of TinyImageNet."""
    return tuple(name for name in field if name != "mini" or not data.startswith("tiny"))


def questions(root: Path, weights: str, cache: Path, seeds: int) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield what is asked, and what answers it: races first, then curves, then whether to tune, the dearest."""
    settings, specs = Settings(cache), backbones(weights)
    records = committed()
    heads = Remembered()
    sets = list(data_sets(root))
    truths = {data.name: {name: probes(data, spec, settings) for name, spec in specs.items()} for data in sets}
    # one split for all: what is drawn anew are samples
    pools = {data.name: Pool.of(data, None, 0) for data in sets}
    for data, pool in pools.items():
        for seed in range(seeds):
            for field in (fair(field, data) for field in FIELDS):
                asked = {"what": "race", "data": data, "seed": seed, "field": field}
                yield asked, partial(race, replace(pool, seed=seed), field, specs, settings, truths[data], heads)
    for data, pool in pools.items():
        for name, spec in specs.items():
            asked = {"what": "more", "data": data, "backbone": name}
            yield asked, partial(more, pool, Runner(spec, settings))
    for seed in range(seeds):
        for (data, name), recorded in TUNED.items():
            outcome = tuning(records, data, recorded, specs[name].overrides.input_size)
            asked = {"what": "depth", "data": data, "backbone": name, "seed": seed, "outcome": outcome}
            drawn = replace(pools[data], seed=seed)
            yield asked, partial(study, drawn, Runner(specs[name], settings), truths[data][name]["a_row"])


def more(pool: Pool, runner: Runner) -> dict[str, Any]:
    """Return what the curve without its last point says of that point, and what it is."""
    judged = judge_part(pool, [runner], pool.drawn(pool.most))
    sizes, hits = Study(pool, runner, None, []).curve(judged)
    weights, (now, then) = drawn_weights(judged.units.numbers, 0), sizes[-2:].tolist()
    told = more_samples(sizes[:-1], hits[:-1], weights, now, then - now) if len(sizes) > 1 else None
    came = 100 * float(hits[-1].mean() - hits[-2].mean())
    return {"told": None if told is None else asdict(told), "came": came}


def race(
    pool: Pool, field: tuple[str, ...], specs: Any, settings: Settings, truth: Any, heads: Remembered
) -> dict[str, Any]:
    """Return what a race comes to, and what it would have cost without rows of before."""
    started, saved = time.monotonic(), heads.saved
    runners = [Runner(specs[name], settings) for name in field]
    contest = Race(pool, runners)
    winner, chance = contest.run()
    extracted = sum(contest.standings[number].samples * truth[name]["a_row"] for number, name in enumerate(field))
    chosen = field[runners.index(winner)]
    best = max(field, key=lambda name: truth[name]["test"])
    gap = paired_gap(*(decode_correct(truth[name]["right"]) for name in (best, chosen)))
    return {
        "chosen": chosen,
        "chance": chance,
        "truth": {name: truth[name]["test"] for name in field},
        "default": {name: truth[name]["default"] for name in field},
        "beyond": best != chosen and gap.ci is not None and gap.ci[0] > 0,
        "samples": [contest.standings[number].samples for number in range(len(field))],
        "seconds": extracted + time.monotonic() - started + heads.saved - saved,
        "everything": sum(truth[name]["seconds"] for name in field),
    }


def study(pool: Pool, runner: Runner, a_row: float) -> dict[str, Any]:
    """Return the evidence about one backbone, and what it would have cost without rows of before."""
    started = time.monotonic()
    evidence, more = Study(pool, runner, None, []).evidence()
    extracted = 2 * evidence.seen * a_row  # embeddings, and later layers with what is before the last stage
    return {
        "evidence": asdict(evidence),
        "more": None if more is None else asdict(more),
        "seconds": extracted + time.monotonic() - started,
    }


def regret(line: dict[str, Any], heads: str = "truth") -> float:
    """Return how many points of test accuracy a race lost, of the best heads on validation or of the default one."""
    return float(100 * (max(line[heads].values()) - line[heads][line["chosen"]]))


def lost(line: dict[str, Any], depth: str) -> float:
    """Return how many points of test accuracy a depth loses; of depths that were not trained the nearest stands for it."""
    outcome = {name: 100 * scores["test"] for name, scores in line["outcome"].items()}
    nearest = {"features": ("features",), "last": ("last:2", "last:1"), "all": ("all", "last:2", "last:1")}[depth]
    return max(outcome.values()) - next(outcome[name] for name in nearest if name in outcome)


def evidence_of(line: dict[str, Any]) -> Evidence:
    """Return the evidence of a line, as what it was."""
    told = line["evidence"]
    gaps = {name: None if told[name] is None else Gap(**told[name]) for name in ("layers", "tuned")}
    return Evidence(**(told | gaps))


def tables(path: Path) -> Iterator[str]:
    """Yield what the lines of a file come to, in Markdown."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    races, depths, curves = ([line for line in lines if line["what"] == what] for what in ("race", "depth", "more"))
    records, specs = committed(), backbones("")
    for line in depths:  # what was trained anew since is what counts, whenever advice was asked for
        data, name = line["data"], line["backbone"]
        line["outcome"] = tuning(records, data, TUNED[data, name], specs[name].overrides.input_size)
    yield from race_table(races)
    yield ""
    yield from depth_table(depths)
    yield ""
    yield from sums(depths, curves)
    yield whole_cost(races, depths)


def race_table(races: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what backbones were chosen and how sure that was, by data set."""
    of_head = "`fit`'s head: mean regret, worst | sure of 90 %, right"
    titles = (of_head, "best of three: mean regret, worst", "sure, right", "beyond test noise", "seconds, of fitting all")
    yield f"| set | races | {' | '.join(titles)} |"
    yield "|---|" + "---|" * 7
    for data in [*dict.fromkeys(line["data"] for line in races), "all"]:
        of_set = [line for line in races if data in {line["data"], "all"}]
        share = sum(line["seconds"] for line in of_set) / sum(line["everything"] for line in of_set)
        by_heads = " | ".join(_told_of(of_set, heads) for heads in ("default", "truth"))
        yield f"| {data} | {len(of_set)} | {by_heads} | {sum(line['beyond'] for line in of_set)} | {100 * share:.0f} % |"


def _told_of(races: list[dict[str, Any]], heads: str) -> str:
    """Return the cells of races as some heads judge them: mean and worst regret, and how often what was sure was right."""
    regrets = [regret(line, heads) for line in races]
    right = [regret(line, heads) <= MISSED for line in races if line["chance"] >= SURE]
    share = f"{100 * mean(right):.0f} %" if right else "-"
    return f"{mean(regrets):.2f}, {max(regrets):.1f} | {len(right)}, {share}"


def whole_cost(races: list[dict[str, Any]], depths: list[dict[str, Any]]) -> str:
    """Return what both answers cost, of fitting every candidate and of the trainings of those that have a record."""
    studies = {(line["data"], line["backbone"], line["seed"]): line for line in depths}
    paid = spent = 0.0
    for line in races:
        study = studies.get((line["data"], line["chosen"], line["seed"]))
        tuned = [studies.get((line["data"], name, line["seed"])) for name in line["field"]]
        if study is not None:
            paid += line["seconds"] + study["seconds"]
            spent += line["everything"] + sum(
                scores["seconds"] for own in tuned if own for depth, scores in own["outcome"].items() if depth != "features"
            )
    share = 100 * paid / spent
    return f"- seconds of a race and what is measured of its winner: {share:.0f} % of all fits and recorded trainings"


def depth_table(depths: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what was said of tuning beside what tuning came to."""
    yield "| set, backbone | short last:1, points | says, sure | textbook | features, last:1, last:2, all | lost |"
    yield "|---|" + "---|" * 5
    for line in depths:
        told, outcome = evidence_of(line), line["outcome"]
        depth, sure = told.depth
        came = ", ".join(f"{100 * outcome[name]['test']:.1f}" if name in outcome else "-" for name in DEPTHS)
        gain = f"{told.tuned.points:+.1f}" if told.tuned else "-"
        says = f"{depth}, {100 * (sure or 0):.0f} % | {told.textbook}"
        yield f"| {line['data']}, {line['backbone']} | {gain} | {says} | {came} | {lost(line, depth):.1f} |"


def sums(depths: list[dict[str, Any]], curves: list[dict[str, Any]]) -> Iterator[str]:
    """Yield what the ways to decide lose, how often what was sure was right, and how far curves were off."""
    ways = {
        "advice": lambda line: evidence_of(line).depth[0],
        "the textbook rule, with likeness as it was measured here": lambda line: evidence_of(line).textbook,
        "always the last stages": lambda _: "last",
        "always all": lambda _: "all",
        "never": lambda _: "features",
    }
    for name, way in ways.items():
        losses = [lost(line, way(line)) for line in depths]
        yield f"- {name}: {mean(losses):.2f} points lost on average, {max(losses):.1f} at worst"
    sure = [line for line in depths if (evidence_of(line).depth[1] or 0) >= SURE]
    right = [(lost(line, "features") > MISSED) == (evidence_of(line).depth[0] != "features") for line in sure]
    yield f"- sure of 90 % whether tuning pays: {len(sure)} of {len(depths)}, right in {sum(right)}"
    trained = sum(scores["seconds"] for line in depths for scores in line["outcome"].values())
    share = sum(line["seconds"] for line in depths) / trained
    yield f"- seconds: {100 * share:.0f} % of the fits and trainings that this is held against"
    told = [line for line in curves if line["told"]]
    held = [line["told"]["interval"][0] <= line["came"] <= line["told"]["interval"][1] for line in told]
    off = mean(abs(line["told"]["points"] - line["came"]) for line in told)
    yield f"- twice the images: the interval held what came in {sum(held)} of {len(held)}; {off:.1f} points off on average"


def main(root: str, weights: str, cache: str, out: str, seeds: str = "3") -> None:
    """Answer all questions that OUT has no line of."""
    path = Path(out)
    answered = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    names = ("what", "data", "backbone", "field", "seed")
    seen = {json.dumps([line.get(name) for name in names]) for line in answered}
    for asked, answer in questions(Path(root), weights, Path(cache), int(seeds)):
        if json.dumps([asked.get(name) for name in names]) not in seen:
            line = json.dumps(asked | answer()) + "\n"
            with path.open("a") as file:
                file.write(line)
    print("\n".join(tables(path)))


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print("\n".join(tables(Path(sys.argv[1]))))
    else:
        main(*sys.argv[1:])
