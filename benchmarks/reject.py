"""How true sets of classes are, and how well unknown classes are told: ``predict --reject``, measured.

python benchmarks/reject.py OUT BACKBONE[=WEIGHTS][@LAYER,LAYER] DATA...

Coverage: all samples of a set are split anew 20 times, a logistic head is fitted and calibrated as ``fit`` does, and sets of
90 % are made of the test samples. Familiarity: each class (of more than ten, a drawn quarter of the classes, five times) is
left out of training, and the area under the ROC curve says how well test samples of the others are told from it. Beside the
score that ``predict`` gives stand others, each on the same at most 1,500 training samples. Rows are appended to OUT, a CSV;
without BACKBONE and DATA the tables of OUT are printed. Means and medians are of sets of more than two classes.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from over_sets import Entry, run
from scipy.special import logsumexp

from featcache.evaluation import Task
from featcache.evaluation.likeness import unit_rows
from featcache.evaluation.metrics import at_temperature
from featcache.heads.checks import auc
from featcache.heads.rejection import MOST_ROWS, Calibration, Neighbours, TrainingRows, all_scores, draws_of
from featcache.heads.search import Embeddings, fit, predict_with, train
from featcache.store import Features

SPLITS, COVERAGE, MOST = 20, 0.9, 600


def covered(features: Features, seed: int) -> Iterator[tuple[str, float, float]]:
    """Yield how often sets of each kind hold the true class of test samples, and how many classes they hold."""
    task = Task(replace(features, splits=[""] * len(features.y)))
    split, embeddings = task.split(seed), Embeddings.of(task, 1)
    head = fit(task, split, "logistic", seed=seed)
    seen = head.unseen
    contents = np.array(features.sha256)
    told = at_temperature(seen.answers, head.temperature)
    calibration = Calibration.of(features.y[seen.samples], told, contents[seen.samples].tolist(), split.units[seen.samples])
    answers = predict_with(head.estimator, embeddings.X[split.test], "label", len(features.classes))
    answers, y = at_temperature(answers, head.temperature), features.y[split.test]
    for kind in ("lac", "aps"):
        scores = all_scores(answers, kind, draws_of(contents[split.test].tolist()))
        sets = scores <= calibration.threshold(kind, COVERAGE)
        yield kind, float(sets[np.arange(len(y)), y].mean()), float(sets.sum(axis=1).mean())


def scores(X: np.ndarray, y: np.ndarray, new: np.ndarray, widths: Sequence[int]) -> dict[str, np.ndarray]:
    """Return how strange new embeddings (n, d) look beside training ones with their classes, by each score (n,)."""
    mean, y = X.mean(axis=0), np.unique(y, return_inverse=True)[1]
    kept = TrainingRows.of(X, y, np.arange(len(X)), widths)
    strange = {"predict --reject": -kept.familiar.familiarity(new), "votes": -Neighbours.fitted(kept).familiarity(new)}
    cosines = unit_rows(new, mean) @ unit_rows(X, mean).T
    for k in (1, 10):
        strange[f"distance to neighbour {k}"] = -np.partition(cosines, -k, axis=1)[:, -k]
    if len(np.unique(y)) < 2:  # the other scores are of several classes
        return strange
    probe = train("logistic", {"C": 0.1}, X, y, 0)
    logits = np.asarray(probe.decision_function(new))
    logits = np.stack([-logits, logits], axis=1) / 2 if logits.ndim == 1 else logits
    strange["largest probability"] = -predict_with(probe, new, "label", int(y.max()) + 1).max(axis=1)
    strange["largest logit"] = -logits.max(axis=1)
    strange["energy"] = -logsumexp(logits, axis=1)
    centres = np.stack([X[y == label].mean(axis=0) for label in range(int(y.max()) + 1)])
    residuals, wide = X - centres[y], new - mean
    scatter = residuals.T @ residuals / len(X)
    # shrunk by as much as the mean variance: there are fewer samples than dimensions
    inverse = np.linalg.inv(scatter + np.trace(scatter) / len(scatter) * np.eye(len(scatter)))
    root = np.linalg.cholesky(inverse)
    whitened, at = wide @ root, (centres - mean) @ root
    squared = (whitened**2).sum(axis=1)
    distances = squared[:, None] - 2 * whitened @ at.T + (at**2).sum(axis=1)
    strange["Mahalanobis"] = distances.min(axis=1)
    strange["relative Mahalanobis"] = distances.min(axis=1) - squared
    strange["Mahalanobis, by ratio"] = distances.min(axis=1) / squared
    axes = np.linalg.svd(X - mean, full_matrices=False)[2][:32]
    outside = np.sqrt(np.maximum((wide**2).sum(axis=1) - ((wide @ axes.T) ** 2).sum(axis=1), 0))
    within = np.sqrt(np.maximum(((X - mean) ** 2).sum(axis=1) - (((X - mean) @ axes.T) ** 2).sum(axis=1), 0))
    of_train = np.asarray(probe.decision_function(X))
    scale = (of_train.max(axis=1) if of_train.ndim == 2 else np.abs(of_train) / 2).mean() / within.mean()
    strange["ViM"] = scale * outside + strange["energy"]
    ranks = [np.argsort(np.argsort(strange[name])) for name in ("votes", "Mahalanobis, by ratio")]
    strange["mean rank of votes and that"] = np.sum(ranks, axis=0)
    return strange


def left_out(features: Features, widths: Sequence[int] = ()) -> Iterator[tuple[str, float]]:
    """Yield the area under the curve of each score for each class, or set of classes, that is left out."""
    classes, X, y = len(features.classes), np.asarray(features.X, np.float32), features.y
    task = Task(features)
    sets: Sequence[Sequence[int]] = [[label] for label in range(classes)]
    if classes > 10:
        sets = [np.random.default_rng(seed).choice(classes, classes // 4, replace=False) for seed in range(5)]
    for number, unknown in enumerate(sets):
        split = task.split(number)
        is_new = np.isin(y, unknown)
        ordered = sorted(split.train_val[~is_new[split.train_val]].tolist(), key=features.sha256.__getitem__)
        bank = np.array(ordered[:MOST_ROWS])
        usual, new = split.test[~is_new[split.test]][:MOST], np.flatnonzero(is_new)[:MOST]
        asked = np.concatenate([usual, new])
        for name, values in scores(X[bank], y[bank], X[asked], widths).items():
            yield name, auc(is_new[asked], values)[0]


def measure(data: str, told: Entry, out: Path) -> None:
    """Append what a set comes to."""
    cache, entry = told
    features, widths = entry.store.features(), cache.layer_widths(entry)
    label = [Path(data).name, cache.spec.label + (", layers" if widths else "")]
    with out.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([*label, "unknown", name, f"{area:.4f}", ""] for name, area in left_out(features, widths))
        file.flush()
        for seed in range(SPLITS):
            writer.writerows(
                [*label, "coverage", kind, f"{hit:.4f}", f"{size:.3f}"] for kind, hit, size in covered(features, seed)
            )
            file.flush()


def tables(out: Path) -> str:
    """Return the tables of a file of measurements."""
    sets, areas = defaultdict(list), defaultdict(lambda: defaultdict(list))
    with out.open(newline="") as file:
        for data, backbone, what, name, value, size in csv.reader(file):
            if what == "coverage":
                sets[data, backbone, name].append((100 * float(value), float(size)))
            else:
                areas[name][data, backbone].append(float(value))
    lines = [
        "| set | backbone | sets | coverage, mean of 20 splits | spread of a split | classes in a set |",
        "|---" * 6 + "|",
    ]
    for key, values in sets.items():
        hits, sizes = np.array(values).T
        lines.append(f"| {' | '.join(key)} | {hits.mean():.1f} % | {hits.std(ddof=1):.1f} | {sizes.mean():.2f} |")
    keys = list(areas["predict --reject"])
    common = [key for key in keys if all(key in by_set for by_set in areas.values())]
    head = ["score", *(f"{data}, {backbone}" for data, backbone in keys), "mean of medians", "median of all"]
    lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, by_set in sorted(areas.items(), key=lambda item: -np.mean([np.median(item[1][key]) for key in common])):
        cells = [f"{np.median(by_set[key]):.2f}" if key in by_set else "" for key in keys]
        medians = [np.median(by_set[key]) for key in common]
        median = np.median([area for key in common for area in by_set[key]])
        lines.append(f"| {name} | {' | '.join(cells)} | {np.mean(medians):.3f} | {median:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    run(measure, tables)
