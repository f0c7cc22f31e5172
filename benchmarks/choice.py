"""By what a logistic head's C is chosen: what each rule comes to on test rows, of one path of solutions.

    python benchmarks/choice.py FEATURES.h5 ...

Each FEATURES.h5 is an entry's file, or a folder of one. Of each, rows are drawn again: some 200, 600 or 2,000 train and
choose (on five folds below a thousand, else on a fifth), the others are the test, four seeds each. Every C of ``fit`` is
solved to 1e-4 on every fold and on all that train. Writes choice.md beside this file.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from sklearn.model_selection import StratifiedKFold, StratifiedShuffleSplit

from featcache.evaluation.metrics import evaluate
from featcache.heads import search, solvers
from featcache.heads.linear import first_near, probabilities

SIZES, SEEDS, MOST_TEST, LEAST = (200, 600, 2000), 4, 1500, 8
RULES = ("accuracy", "lowest log-loss", "within 2 % of it", "within 5 % of it", "best on test")


def read(path: Path) -> tuple[str, Any, Any]:
    """Return a set's name, features (n, d) float32 and classes (n,)."""
    path = path / "features.h5" if path.is_dir() else path
    with h5py.File(path) as file:
        X, y = file["features"][:].astype(np.float32), file["labels"][:].astype(np.int64)
    return f"{path.parent.parent.name}, {path.parent.name.split('.')[0]}", X, y


def draws(X: Any, y: Any) -> Iterator[tuple[Any, Any, Any, Any, int]]:
    """Yield rows, classes, which train (n,), which test (n,), and a seed."""
    for size in SIZES:
        for seed in range(SEEDS):
            some = np.random.default_rng(seed).permutation(len(y))[: size + MOST_TEST]
            classes, counts = np.unique(y[some], return_counts=True)
            rows = some[np.isin(y[some], classes[counts >= LEAST])]
            labels = np.unique(y[rows], return_inverse=True)[1]
            if 5 * len(np.unique(labels)) <= size <= 0.8 * len(rows):
                train, test = next(StratifiedShuffleSplit(1, train_size=size, random_state=seed).split(rows, labels))
                yield X[rows], labels, train, test, seed


def by_rule(X: Any, y: Any, train: Any, test: Any, seed: int) -> Any:
    """Return the test accuracy and the test log-loss (rules, 2), in % and nats, of the C that each rule chooses."""
    if len(train) < 1000:
        parts = StratifiedKFold(5, shuffle=True, random_state=seed).split(train, y[train])
    else:
        parts = StratifiedShuffleSplit(1, test_size=0.2, random_state=seed).split(train, y[train])
    folds = [(train[fitted], train[held]) for fitted, held in parts]
    masks = [np.isin(np.arange(len(y)), rows) for rows in (*(fitted for fitted, _ in folds), train)]
    Cs, classes = [params["C"] for params in search.HEADS["logistic"].grid(0)], int(y.max()) + 1
    *by_fold, refitted = solvers.solve(X, y, Cs, masks, tolerance=1e-4)
    truth = np.concatenate([y[held] for _, held in folds])
    val, tested = [], []
    for number in range(len(Cs)):
        answers = [probabilities(path[number], X[held], classes) for path, (_, held) in zip(by_fold, folds, strict=True)]
        val.append(evaluate(truth, np.concatenate(answers)))
        tested.append(evaluate(y[test], probabilities(refitted[number], X[test], classes)))
    losses = np.array([scores.log_loss for scores in val])
    chosen = [
        min(range(len(Cs)), key=lambda number: (val[number].rank, number)), int(losses.argmin()), first_near(list(losses)),
        int(np.argmax(losses <= 1.05 * losses.min())), min(range(len(Cs)), key=lambda number: -tested[number].accuracy),
    ]  # fmt: skip
    return np.array([[100 * tested[number].accuracy, tested[number].log_loss] for number in chosen])


def main() -> None:
    """Measure and write the table."""
    lines = [
        "# By what C is chosen", "",
        "`python benchmarks/choice.py FEATURES.h5 ...`: test accuracy in %, and log-loss in nats, of the C that a rule",
        "chooses on what trains, in the mean over drawn sets of 200, 600 and 2,000 rows, four seeds each. `fit` takes the",
        "most regular C within 2 % of the lowest log-loss; by accuracy, ties went to the lower log-loss.", "",
        "| set | draws | " + " | ".join(RULES) + " |", "|---" * (len(RULES) + 2) + "|",
    ]  # fmt: skip
    means = []
    for path in sys.argv[1:]:
        name, X, y = read(Path(path))
        results = np.array([by_rule(*draw) for draw in draws(X, y)])
        means.append(results.mean(axis=0))
        cells = [f"{accuracy:.2f}, {log_loss:.3f}" for accuracy, log_loss in means[-1]]
        lines.append(f"| {name} | {len(results)} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    overall = [f"{accuracy:.2f}, {log_loss:.3f}" for accuracy, log_loss in np.mean(means, axis=0)]
    lines.append(f"| mean | {''} | " + " | ".join(overall) + " |")
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
