"""How often the intervals that are printed hold the truth, by simulation: images and answers are drawn from known chances.

    python benchmarks/coverage.py [--draws N] [--only NAME...]

Every setting draws so many test sets; a setting's seed is its number. Writes coverage.md beside this file with the coverage
in % of the intervals that were given, and in how many draws there was none. Where images are drawn, the number of images of
a class is random too.
"""

import argparse
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm

from featcache.evaluation import intervals
from featcache.evaluation.intervals import Interval
from featcache.evaluation.metrics import paired_gap

HERE = Path(__file__).parent
WANTED = 93.0
DRAWS, DRAWS_OF_LONG_ONES = 2000, 500
LONG = ("classes with groups", "numbers", "labels")
GROUPS = {
    "30 x 20": [20] * 30,
    "10 x 50": [50] * 10,
    "100 x 5": [5] * 100,
    "15 of 3 to 70": [3, 5, 5, 8, 10, 10, 12, 15, 20, 25, 30, 40, 50, 60, 70],
}
CLASSES = {
    "two": [0.5, 0.5],
    "two, 9 to 1": [0.9, 0.1],
    "five, uneven": [0.4, 0.3, 0.15, 0.1, 0.05],
    "ten": [0.1] * 10,
}
Rng = np.random.Generator
Draw = Callable[[Rng], list[tuple[Interval | None, float]]]


@dataclass(frozen=True)
class Setting:
    """What is drawn, and how: ``draw`` gives an interval and the truth for each of the study's scores."""

    name: tuple[Any, ...]
    draw: Draw


def accuracies() -> Iterator[Setting]:
    """Yield independent images (Wilson's interval, as it is known)."""
    for p, n in itertools.product((0.5, 0.8, 0.95, 0.99), (30, 100, 500)):

        def draw(rng: Rng, p: float = p, n: int = n) -> Any:
            return [(intervals.of_accuracy(rng.random(n) < p), p)]

        yield Setting((p, n), draw)


def gaps() -> Iterator[Setting]:
    """Yield paired models of accuracies p and p + gap whose right answers have a correlation."""
    for p, n, moves, rho in itertools.product((0.5, 0.8, 0.95, 0.99), (30, 100, 500), (False, True), (0.5, 0.9)):
        difference = (0.005 if p == 0.99 else 0.02) * moves
        other = p + difference
        both = p * other + rho * np.sqrt(p * (1 - p) * other * (1 - other))
        chances = np.maximum(0, np.array([other - both, p - both, 0, 0]))
        chances[0] = chances[1] + difference  # where such a correlation cannot be, the highest that can
        chances[2] = 1 - chances.sum()

        def draw(rng: Rng, chances: Any = chances, n: int = n, truth: float = 100 * difference) -> Any:
            kind = rng.choice(4, n, p=chances)
            return [(paired_gap(kind == 0, kind == 1).ci, truth)]

        yield Setting((p, n, 100 * difference, rho), draw)


def classes() -> Iterator[Setting]:
    """Yield classifiers whose recall is p in every class and whose errors go to all other classes alike."""
    for (name, shares), p, n in itertools.product(CLASSES.items(), (0.5, 0.8, 0.95, 0.99), (30, 100, 500)):
        count = len(shares)
        matrix = np.where(np.eye(count, dtype=bool), p, (1 - p) / (count - 1))
        f1 = _true_f1(np.array(shares), matrix)

        def draw(rng: Rng, shares: Any = shares, n: int = n, p: float = p, f1: float = f1) -> Any:
            truth = rng.choice(len(shares), n, p=shares)
            predicted = _answers(rng, truth, rng.random(n) < p, len(shares))
            every = np.arange(len(shares))
            return [
                (intervals.of_recalls(truth, predicted, every), p),
                (intervals.of_f1s(truth, predicted, every), f1),
            ]

        yield Setting((name, p, n), draw)


def grouped_accuracy() -> Iterator[Setting]:
    """Yield patients whose skill has a Beta distribution with an intraclass correlation."""
    for (name, sizes), p, icc in itertools.product(GROUPS.items(), (0.7, 0.9, 0.95, 0.98), (0.0, 0.1, 0.3, 0.5)):

        def draw(rng: Rng, sizes: Any = sizes, p: float = p, icc: float = icc) -> Any:
            groups = np.repeat(np.arange(len(sizes)), sizes)
            skill = rng.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1), len(sizes)) if icc else np.full(len(sizes), p)
            return [(intervals.of_accuracy(rng.random(len(groups)) < skill[groups], groups), p)]

        yield Setting((name, p, icc), draw)


def grouped_gaps() -> Iterator[Setting]:
    """Yield paired models on patients: hard ones are hard for both, and a part of the skill is a model's with a patient."""
    for (name, sizes), p, difference, own in itertools.product(
        GROUPS.items(), (0.7, 0.9, 0.95), (0.0, 0.03), (0.0, 0.1, 0.3)
    ):
        thresholds = (float(norm.ppf(p + difference)), float(norm.ppf(p)))

        def draw(
            rng: Rng, sizes: Any = sizes, thresholds: Any = thresholds, difference: float = difference, own: float = own
        ) -> Any:
            groups = np.repeat(np.arange(len(sizes)), sizes)
            shared = np.sqrt(0.3) * rng.normal(size=len(sizes))[groups] + np.sqrt(0.3) * rng.normal(size=len(groups))
            right = []
            for threshold in thresholds:
                skill = np.sqrt(own) * rng.normal(size=len(sizes))[groups]
                rest = np.sqrt(0.4 - own) * rng.normal(size=len(groups))
                right.append(threshold + shared + skill + rest > 0)
            return [(paired_gap(right[0], right[1], groups=groups).ci, 100 * difference)]

        yield Setting((name, p, 100 * difference, own), draw)


def grouped_classes() -> Iterator[Setting]:
    """Yield classes on patients, who have one class each or images of all, with skill as for accuracy."""
    for (name, sizes), count, mixed, p, icc in itertools.product(
        GROUPS.items(), (2, 3), (False, True), (0.7, 0.9, 0.95), (0.1, 0.3)
    ):
        matrix = np.where(np.eye(count, dtype=bool), p, (1 - p) / (count - 1))
        f1 = _true_f1(np.full(count, 1 / count), matrix)

        def draw(
            rng: Rng,
            sizes: Any = sizes,
            count: int = count,
            mixed: bool = mixed,  # noqa: FBT001
            p: float = p,
            icc: float = icc,
            f1: float = f1,
        ) -> Any:
            groups = np.repeat(np.arange(len(sizes)), sizes)
            skill = rng.beta(p * (1 / icc - 1), (1 - p) * (1 / icc - 1), len(sizes))[groups]
            truth = rng.integers(0, count, len(groups)) if mixed else rng.integers(0, count, len(sizes))[groups]
            predicted = _answers(rng, truth, rng.random(len(groups)) < skill, count)
            every = np.arange(count)
            return [
                (intervals.of_recalls(truth, predicted, every, groups), p),
                (intervals.of_f1s(truth, predicted, every, groups), f1),
            ]

        yield Setting((name, count, "all classes a patient" if mixed else "one class a patient", p, icc), draw)


def numbers() -> Iterator[Setting]:
    """Yield numbers that are told with independent errors: normal, with heavy tails (Student's t of 6), or skewed."""
    for kind, n, spread in itertools.product(("normal", "heavy tails", "skewed"), (30, 100, 500), (0.3, 0.7, 1.5)):
        absolute = math.sqrt(2 / math.pi)
        if kind == "heavy tails":
            absolute *= math.sqrt(12) * math.gamma(3.5) / (5 * math.gamma(3))

        def draw(rng: Rng, kind: str = kind, n: int = n, spread: float = spread, absolute: float = absolute) -> Any:
            heavy = kind == "heavy tails"
            truth = rng.standard_t(6, n) if heavy else rng.exponential(size=n) if kind == "skewed" else rng.normal(size=n)
            wrong = spread * (rng.standard_t(6, n) if heavy else rng.normal(size=n))
            r2, mae = intervals.of_errors(truth, wrong) or (None, None)
            return [(r2, 1 - spread**2), (mae, spread * absolute)]

        yield Setting((kind, n, spread), draw)


def labels() -> Iterator[Setting]:
    """Yield labels whose scores are normal, moved where the label is there; the truth is that of a million images."""
    for count, n, share, moved in itertools.product((1, 5, 20), (200, 1000), (0.1, 0.3), (0.5, 1.5, 3.0)):
        rng = np.random.default_rng(0)
        there = rng.random(1_000_000) < share
        true = intervals.average_precision(there, rng.normal(size=len(there)) + moved * there)

        def draw(
            rng: Rng, count: int = count, n: int = n, share: float = share, moved: float = moved, true: float = true
        ) -> Any:
            truth = rng.random((n, count)) < share
            return [(intervals.of_precisions(truth, rng.normal(size=(n, count)) + moved * truth), true)]

        yield Setting((count, n, share, moved), draw)


STUDIES: dict[str, tuple[Callable[[], Iterator[Setting]], tuple[str, ...], tuple[str, ...]]] = {
    "accuracy": (accuracies, ("accuracy", "images"), ("accuracy",)),
    "gap": (gaps, ("accuracy", "images", "gap", "correlation"), ("gap",)),
    "classes": (classes, ("classes", "recall", "images"), ("balanced accuracy", "macro F1")),
    "accuracy with groups": (grouped_accuracy, ("groups", "accuracy", "intraclass correlation"), ("accuracy",)),
    "gap with groups": (grouped_gaps, ("groups", "accuracy", "gap", "share of a model's own skill"), ("gap",)),
    "classes with groups": (
        grouped_classes,
        ("groups", "classes", "patients", "recall", "intraclass correlation"),
        ("balanced accuracy", "macro F1"),
    ),
    "numbers": (numbers, ("numbers", "images", "error's spread"), ("R2", "mean absolute error")),
    "labels": (labels, ("labels", "images", "share", "moved by"), ("mean average precision",)),
}


def _true_f1(shares: Any, matrix: Any) -> float:
    joint = shares[:, None] * matrix
    return float((2 * np.diag(joint) / (joint.sum(axis=0) + joint.sum(axis=1))).mean())


def _answers(rng: Rng, truth: Any, right: Any, count: int) -> Any:
    return np.where(right, truth, (truth + rng.integers(1, count, len(truth))) % count)


def study(name: str, draws: int) -> tuple[list[str], list[str]]:
    """Return a study's table, and a line on each of its scores for the summary."""
    settings, columns, scores = STUDIES[name]
    caption = (settings.__doc__ or "").removeprefix("Yield ")
    caption = caption[:1].upper() + caption[1:]
    lines = ["", f"## {name.capitalize()}", "", caption, f"{draws} draws a setting.", ""]
    heads = [f"{what}{more}" for what in scores for more in ("", ", none")]
    lines += [f"| {' | '.join((*columns, *heads))} |", "|" + "---|" * len((*columns, *heads))]
    worst: list[list[tuple[float, float]]] = [[] for _ in scores]
    for number, setting in enumerate(settings()):
        rng = np.random.default_rng(number)
        drawn = [setting.draw(rng) for _ in range(draws)]
        cells = [f"{one:g}" if isinstance(one, float) else str(one) for one in setting.name]
        for which, several in enumerate(worst):
            given = [(ci, truth) for ci, truth in (one[which] for one in drawn) if ci is not None]
            held = 100 * float(np.mean([ci[0] <= truth <= ci[1] for ci, truth in given])) if given else math.nan
            withheld = 100 * (1 - len(given) / draws)
            several.append((held, withheld))
            cells += [f"{held:.1f}" if given else "-", f"{withheld:.0f} %" if withheld else ""]
        lines.append(f"| {' | '.join(cells)} |")
        print(name, *cells, sep=" | ", flush=True)
    summary = []
    for what, several in zip(scores, worst, strict=True):
        below, never = (sum(some) for some in zip(*((held < WANTED, math.isnan(held)) for held, _ in several), strict=True))
        least, withheld = np.nanmin(several, axis=0)[0], np.mean(several, axis=0)[1]
        summary.append(f"| {name} | {what} | {len(several)} | {least:.1f} | {below} | {withheld:.1f} % ({never}) |")
    return lines, summary


def main() -> None:
    """Simulate, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, help=f"A setting; by default {DRAWS}, of long studies {DRAWS_OF_LONG_ONES}.")
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), default=list(STUDIES))
    options = parser.parse_args()
    write({name: study(name, options.draws or draws_of(name)) for name in options.only})


def draws_of(name: str) -> int:
    """Return how many test sets are drawn for each setting of a study."""
    return DRAWS_OF_LONG_ONES if name in LONG else DRAWS


def write(studies: dict[str, tuple[list[str], list[str]]]) -> None:
    """Write the tables of some studies."""
    head = [
        "# Do the intervals hold the truth?",
        "",
        "`python benchmarks/coverage.py`. A setting's seed is its number in the table, from 0. Coverage of the 95 %",
        "intervals in %, and in how many draws none was given since the data were too few (and in how many settings none",
        "ever was).",
        "",
        "| study | interval of | settings | least coverage | below 93 % | none given |",
        "|---|---|---|---|---|---|",
        *(line for _, summary in studies.values() for line in summary),
    ]
    tables = [line for table, _ in studies.values() for line in table]
    (HERE / "coverage.md").write_text("\n".join([*head, *tables]) + "\n")


if __name__ == "__main__":
    main()
