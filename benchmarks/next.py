"""What ``featcache next`` is worth: accuracy with chosen labels against as many drawn at random, on the test split.

python benchmarks/next.py OUT BACKBONE[=WEIGHTS] DATA...

All labels of training samples are hidden; the rule, and chance, take 5 labels a class on average (and 40, where the set
has twice as many), in 10 draws of four fifths of the training samples. One logistic probe a choice, C = 1, is trained on
what was taken and tested on the test split, which neither sees. Of a set without a test split a fifth is held out. Rows are
appended to OUT, a CSV; without BACKBONE and DATA the table of OUT is printed.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from over_sets import Entry, run

from featcache.evaluation.likeness import unit_rows
from featcache.evaluation.splits import units_of
from featcache.experiments.next_samples import USABLE, Samples, accuracy_with, choose
from featcache.store import Features

SHOTS = (5, 2 * USABLE)
DRAWS, RANDOM = 10, 5
COLUMNS = ("set", "backbone", "shots", "draw", "rule", "random")


def read(features: Features) -> tuple[Samples, np.ndarray]:
    """Return a data set's samples and which of them are tested (n,)."""
    X, contents = np.asarray(features.X, np.float32), np.array(features.sha256)
    is_test = np.array(features.splits) == "test"
    if not is_test.any():
        is_test[np.random.default_rng(0).permutation(len(X))[: len(X) // 5]] = True
    order = np.argsort(contents, kind="stable")
    X, contents = X[order], contents[order]
    samples = Samples(tuple(contents), X, unit_rows(X, X.mean(axis=0)), features.y[order], units_of(len(X), list(contents)))
    return samples, is_test[order]


def measure(data: str, told: Entry, out: Path) -> None:
    """Append the accuracies of all draws of a set."""
    cache, entry = told
    samples, is_test = read(entry.store.features())
    train, test = np.flatnonzero(~is_test), np.flatnonzero(is_test)
    with out.open("a", newline="") as file:
        writer = csv.writer(file)
        for shots in SHOTS:
            count = shots * samples.classes
            if 2 * count > 0.8 * len(train):
                continue
            for draw in range(DRAWS):
                rng = np.random.default_rng(draw)
                pool = np.sort(rng.permutation(train)[: 4 * len(train) // 5])
                rule = accuracy_with(samples, choose(samples, pool, count, draw), test, draw)
                drawn = [rng.permutation(pool)[:count] for _ in range(RANDOM)]
                random = np.mean([accuracy_with(samples, each, test, draw) for each in drawn])
                writer.writerow([Path(data).name, cache.spec.label, shots, draw, f"{rule:.4f}", f"{random:.4f}"])
            file.flush()


def table(out: Path) -> str:
    """Return the table of a file of accuracies: means over draws, and the spread of their difference."""
    rows = defaultdict(list)
    with out.open(newline="") as file:
        for name, backbone, shots, _, rule, random in csv.reader(file):
            rows[name, backbone, int(shots)].append((100 * float(rule), 100 * float(random)))
    lines = ["| set | backbone | labels a class | at random | chosen | points | draws in which it lost |", "|---" * 7 + "|"]
    for (name, backbone, shots), draws in rows.items():
        rule, random = np.array(draws).T
        gain = rule - random
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        cells = [name, backbone, str(shots), f"{random.mean():.1f} %", f"{rule.mean():.1f} %"]
        lines.append(f"| {' | '.join(cells)} | {gain.mean():+.1f} ± {error:.1f} | {(gain < 0).sum()} of {len(gain)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(measure, table)
