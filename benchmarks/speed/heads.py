"""Heads' speed: our solvers against scikit-learn's, on real features.

    python benchmarks/speed/heads.py FEATURES.h5 ... [--features LARGE.h5] [--again] [--only search|race|fit|grid|...]

Each FEATURES.h5 is an entry's file, or a folder of one: the logistic search as ``fit`` runs it, with the refit, against
``LogisticRegressionCV`` with the same C, folds and refit in its fastest setting of BLAS threads and jobs; with
``--features`` on 8,000 and 44,000 of its rows too. What takes minutes, scikit-learn on those and solving every C, is kept
from the committed records unless ``--again`` asks for it. ``--only race``
draws random problems and asks whether the race chooses as the whole search. ``--features`` is an entry's ``features.h5`` of
some 44,000 images and 200 classes (Tiny ImageNet); its rows are projected to 512 or 768 columns by a seeded random rotation
of the leading components. Ratios are of one run, side by side; objectives are scikit-learn's own, in float64. Writes
heads.jsonl and heads.md beside this file.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.model_selection import StratifiedKFold
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_info, threadpool_limits

from featcache.evaluation.metrics import evaluate
from featcache.evaluation.splits import Fold, Split, make_split
from featcache.heads import search, solvers
from featcache.heads.linear import first_near, probabilities, race_logistic

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0))
ROUNDS = 3
MOST_EXACT = 30_000_000  # rows x columns x classes, up to which every C is solved to 1e-7, else to 1e-4
LONG = 12_000_000  # numbers, from which on scikit-learn takes minutes: its part is kept, in seconds of one thread
SLOW = 3.0  # seconds of scikit-learn with one BLAS thread, from which on two, which took longer, are not tried
SAME = 1e-5  # of our objective, that scikit-learn's may lie above it
TEN_CS = list(np.logspace(-4, 4, 10))


def load(path: Path, width: int, seed: int = 0) -> tuple[Any, Any]:
    """Return standardised features (n, width) float32 in a mixed order, and classes (n,)."""
    with h5py.File(path) as file:
        X, y = file["features"][:], file["labels"][:]
    order = np.random.default_rng(seed).permutation(len(y))
    X, y = X[order].astype(np.float32), y[order]
    if X.shape[1] > width:
        X = PCA(width, random_state=seed, svd_solver="randomized").fit_transform(X)
        X = X @ np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]
    elif X.shape[1] < width:
        more = np.random.default_rng(seed).normal(size=(X.shape[1], width - X.shape[1])) / np.sqrt(X.shape[1])
        X = np.concatenate([X, np.maximum(0, X @ more)], axis=1)
    return np.ascontiguousarray((X - X.mean(0)) / X.std(0), dtype=np.float32), y


def objective(X: Any, y: Any, C: float, coefficients: Any, intercept: Any) -> float:
    """Return C * (sum of log-losses) + |W|^2 / 2 in float64."""
    loss = 0.0
    for start in range(0, len(y), 4096):
        scores = X[start : start + 4096].astype(np.float64) @ np.asarray(coefficients, np.float64).T + intercept
        scores -= scores.max(axis=1, keepdims=True)
        truth = y[start : start + 4096]
        loss += float((np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(truth)), truth]).sum())
    return C * loss + float((np.asarray(coefficients, np.float64) ** 2).sum()) / 2


def kernels() -> list[str]:
    """Return which kernels of which BLAS compute here."""
    found = (one for one in threadpool_info() if one["user_api"] == "blas")
    return sorted({f"{one['internal_api']} {one.get('architecture', '')}".strip() for one in found})


def processor() -> str:
    """Return what the processor calls itself, and the widest vectors that it knows and NumPy may use.

    ``NPY_DISABLE_CPU_FEATURES="X86_V4 AVX512_ICL AVX512_SPR" OPENBLAS_CORETYPE=Haswell`` makes it one that knows AVX2 alone.
    """
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    flags = next((line for line in lines if line.startswith("flags")), "")
    widest = "AVX-512" if "avx512f" in flags else "AVX2" if "avx2" in flags else "no AVX2"
    is_off = widest == "AVX-512" and "X86_V4" in os.environ.get("NPY_DISABLE_CPU_FEATURES", "")
    return f"{name}, {'AVX2, its AVX-512 switched off' if is_off else widest}"


def seconds_of(act: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a call takes, and what it returns."""
    start = time.perf_counter()
    result = act()
    return time.perf_counter() - start, result


def until(X: Any, y: Any, C: float, goal: float) -> tuple[float, float]:
    """Return the seconds of the loosest scikit-learn fit whose objective is at most ``goal``, and that objective."""
    for tolerance in (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6):
        spent, model = seconds_of(lambda: LogisticRegression(C=C, tol=tolerance, max_iter=5000).fit(X, y))  # noqa: B023
        reached = objective(X, y, C, model.coef_, model.intercept_)
        if reached <= goal:
            break
    return spent, reached


def peak_gemm(seconds: float = 1.0) -> float:
    """Return the multiplications and additions a second of large float32 products on all cores."""
    one, other = np.ones((2048, 2048), np.float32), np.ones((2048, 2048), np.float32)
    one @ other
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        one @ other
        count += 1
    return count * 2 * 2048**3 / (time.perf_counter() - start)


def read(path: Path) -> tuple[str, Any, Any, Split]:
    """Return a set's name, its features (n, d) float32, classes (n,) and the split that ``fit`` makes of it."""
    path = path / "features.h5" if path.is_dir() else path
    with h5py.File(path) as file:
        X, y = file["features"][:].astype(np.float32), file["labels"][:].astype(np.int64)
        given, names = list(file["splits"].asstr()[:]), list(file["class_names"].asstr()[:])
        contents = [str(each) for each in file["item_sha256"].asstr()[:]]
    name = f"{path.parent.parent.name}, {path.parent.name.split('.')[0]}"
    return name, X, y, make_split(y, given, names, 0, contents=contents)


def large(X: Any, y: Any, rows: int) -> tuple[str, Any, Any, Split]:
    """Return so many rows of ten classes as a set: its name, features (n, d), classes (n,) and the split of ``fit``."""
    return "Tiny ImageNet, projected", X[:rows], y[:rows], make_split(y[:rows], [""] * rows, [*map(str, range(10))], 0)


def by_scikit_learn(
    X: Any, y: Any, split: Split, threads: int, jobs: int, tolerance: float = 1e-4
) -> tuple[float, float, int, float]:
    """Return what LogisticRegressionCV takes with the same C and folds: seconds; the C it chose and its right test answers.

    The last number is seconds of the processor: of one thread they are the same on a busy machine.
    """
    scaler = StandardScaler().fit(X[split.train_val])
    place = np.zeros(len(y), np.int64)
    place[split.train_val] = np.arange(len(split.train_val))
    folds = [(place[fold.train], place[fold.val]) for fold in split.folds]
    Cs = [params["C"] for params in search.HEADS["logistic"].grid(0)]
    model = LogisticRegressionCV(
        Cs=Cs, cv=folds, scoring="accuracy", tol=tolerance, max_iter=1000, n_jobs=jobs, l1_ratios=(0,),
        use_legacy_attributes=False,
    )  # fmt: skip
    rows = scaler.transform(X[split.train_val])
    with warnings.catch_warnings(), threadpool_limits(threads):
        warnings.simplefilter("ignore")
        start = time.process_time()
        spent, model = seconds_of(lambda: model.fit(rows, y[split.train_val]))
        of_processor = time.process_time() - start
    right = int((model.predict(scaler.transform(X[split.test])) == y[split.test]).sum())
    return spent, float(np.ravel(model.C_)[0]), right, of_processor


def at_our_c(estimator: Any, C: float, X: Any, y: Any, split: Split) -> dict[str, Any]:
    """Compare with scikit-learn's own fits with our C.

    Returns:
        How many test images its fit to 1e-6 has right; by what share the objective of its fit as it comes is above ours;
        its loosest tolerance of which that is at most ``SAME``, the tightest if none is so.
    """
    scaler = StandardScaler().fit(X[split.train_val])
    rows, classes = scaler.transform(X[split.train_val]), y[split.train_val]

    def reached(weights: Any, intercept: Any) -> float:
        if len(weights) == 1:  # of two classes; scikit-learn keeps the second's row
            return objective(rows, classes, C, np.concatenate([0 * weights, weights]), np.append(0, intercept))
        return objective(rows, classes, C, weights, intercept)

    head = estimator[-1]
    ours = reached(head.coef_ * scaler.scale_, head.intercept_ + head.coef_ @ scaler.mean_)
    above: dict[float, float] = {}
    while len(above) < 3 and min(above.values(), default=1.0) > SAME:
        tolerance = float(f"1e-{4 + len(above)}")
        model = LogisticRegression(C=C, tol=tolerance, max_iter=5000).fit(rows, classes)
        above[tolerance] = reached(model.coef_, model.intercept_) / ours - 1
    exact = LogisticRegression(C=C, tol=1e-6, max_iter=5000).fit(rows, classes)
    right = int((exact.predict(scaler.transform(X[split.test])) == y[split.test]).sum())
    return {"sklearn_right_at_C": right, "above": above[1e-4], "same_tolerance": tolerance}


def whole_search(X: Any, y: Any, folds: Any) -> Any:
    """Return what is chosen when every C is solved, to 1e-7 where that is not too much."""
    Cs = [params["C"] for params in search.HEADS["logistic"].grid(0)]
    truth = np.concatenate([y[fold.val] for fold in folds])
    classes = int(y.max()) + 1
    masks = [np.isin(np.arange(len(y)), fold.train) for fold in folds]
    by_fold = solvers.solve(X, y, Cs, masks, tolerance=1e-7 if X.size * classes < MOST_EXACT else None)
    losses = []
    for number in range(len(Cs)):
        pairs = zip(by_fold, folds, strict=True)
        answers = [probabilities(solutions[number], X[fold.val], classes) for solutions, fold in pairs]
        losses.append(evaluate(truth, np.concatenate(answers)).log_loss)
    return Cs[first_near(losses)]


def measure_search(task: tuple[str, Any, Any, Split], kept: dict[str, Any] | None) -> dict[str, Any]:
    """Measure the logistic search as ``fit`` runs it, and the refit, by turns with scikit-learn's.

    ``kept`` is an earlier record: the C of the whole search is taken from it, and scikit-learn's part where that takes long.
    """
    name, X, y, split = task

    def ours() -> tuple[Any, Any]:
        chosen = search.search_head("logistic", X, y, split.folds, 0)
        return chosen, search.refit("logistic", chosen, X, y, split.train_val, 0)

    ours()  # the first call pays for threads and libraries
    settings = [(threads, jobs) for threads in (1, 2) for jobs in ((1, 2) if len(split.folds) > 1 else (1,))]
    is_slow = X.size > LONG
    spent, theirs = [seconds_of(ours)], {}
    for setting in settings[:1] if is_slow else settings:
        spent += [seconds_of(ours) for _ in range(ROUNDS)]
        if not (is_slow and kept) and (setting[0] == 1 or min(theirs.values())[0] < SLOW):
            theirs[setting] = by_scikit_learn(X, y, split, *setting)
    seconds, (chosen, estimator) = min(spent, key=lambda pair: pair[0])
    if theirs:
        fastest = min(theirs, key=lambda setting: theirs[setting][0])
        compared = at_our_c(estimator, chosen.params["C"], X, y, split)
        of_wall_or_processor = [0, 3][is_slow]
        runs = [theirs[fastest]]
        if not is_slow:  # it too has the least of some, since other work is on the machine
            runs += [by_scikit_learn(X, y, split, *fastest) for _ in range(ROUNDS - 1)]
        compared |= {
            "sklearn": min(run[of_wall_or_processor] for run in runs), "sklearn_C": runs[0][1], "sklearn_right": runs[0][2],
            "setting": f"{fastest[0]} BLAS threads, {fastest[1]} jobs", "sklearn_kept": is_slow,
        }  # fmt: skip
        tolerance = compared["same_tolerance"]
        if tolerance == 1e-4:  # scikit-learn's own
            compared["same"] = compared["sklearn"]
        else:
            runs = [by_scikit_learn(X, y, split, *fastest, tolerance) for _ in range(1 if is_slow else ROUNDS)]
            compared["same"] = min(run[of_wall_or_processor] for run in runs)
    else:
        compared = {key: kept[key] for key in COMPARED}
    return compared | {
        "kind": "search", "name": name, "rows": len(split.train_val), "width": X.shape[1], "classes": int(y.max()) + 1,
        "folds": len(split.folds), "seconds": seconds, "load": os.getloadavg()[0], "C": chosen.params["C"],
        "full_C": kept["full_C"] if kept else whole_search(X, y, split.folds),
        "right": int((estimator.predict(X[split.test]) == y[split.test]).sum()), "test": len(split.test),
    }  # fmt: skip


def random_problem(seed: int) -> tuple[Any, Any, list[Fold]]:
    """Return a problem (n, d), its classes, some of them wrong, and one fold or three."""
    rng = np.random.default_rng(seed)
    n, d, k = int(rng.integers(60, 260)), int(rng.integers(4, 120)), int(rng.integers(2, 7))
    y = np.arange(n) % k
    noise = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / np.sqrt(d)
    X = rng.normal(size=(k, d))[y] * rng.uniform(0.1, 1) + noise * rng.uniform(0.5, 2)
    X = np.maximum(0, X) if seed % 3 == 0 else X
    wrong = rng.random(n) < rng.uniform(0, 0.3)
    y[wrong] = rng.integers(0, k, wrong.sum())
    part, count = rng.permutation(n), 3 if seed % 2 else 1
    held = [part % max(count, 4 // count) == number for number in range(count)]
    return X.astype(np.float32), y, [Fold(np.flatnonzero(~rows), np.flatnonzero(rows)) for rows in held]


def measure_race(draws: int = 200) -> dict[str, Any]:
    """Measure how often the race chooses as when every C of the same is solved."""
    family = search.HEADS["logistic"]
    alike, unlike, raced_s, whole_s = 0, [], 0.0, 0.0
    for seed in range(draws):
        X, y, folds = random_problem(seed)
        spent, raced = seconds_of(lambda: race_logistic(family.grid(0), family.coarse, X, y, folds))  # noqa: B023
        longer, full_C = seconds_of(lambda: whole_search(X, y, folds))  # noqa: B023
        raced_s, whole_s = raced_s + spent, whole_s + longer
        alike += raced.candidate.params["C"] == full_C
        if raced.candidate.params["C"] != full_C:
            unlike.append([seed, raced.candidate.params["C"], full_C])
    return {
        "kind": "race", "rows": 0, "draws": draws, "alike": alike, "unlike": unlike, "seconds": raced_s, "whole": whole_s,
    }  # fmt: skip


def measure_fit(X: Any, y: Any, rows: int) -> dict[str, Any]:
    """Measure one fit, C = 1, to within 1e-4 of the optimum."""
    X, y = X[:rows], y[:rows]
    ((best,),) = solvers.solve(X, y, [1.0], standardise=False, tolerance=1e-9)
    goal = best.objective * (1 + 1e-4)
    ((found,),) = solvers.solve(X, y, [1.0], standardise=False)
    spent, default, single = [], [], []
    for _ in range(ROUNDS):
        spent += [seconds_of(lambda: solvers.solve(X, y, [1.0], standardise=False))[0] for _ in range(5)]
        default.append(until(X, y, 1.0, goal))
        with threadpool_limits(1):
            single.append(until(X, y, 1.0, goal))
    double, double_reached = until(X.astype(np.float64), y, 1.0, goal)
    return {
        "kind": "fit", "rows": rows, "width": X.shape[1], "classes": int(y.max()) + 1, "seconds": statistics.median(spent),
        "excess": objective(X, y, 1.0, found.coefficients, found.intercept) / best.objective - 1,
        "iterations": found.iterations, "sklearn": statistics.median(spent for spent, _ in default),
        "sklearn_excess": default[0][1] / best.objective - 1,
        "sklearn_one_thread": statistics.median(spent for spent, _ in single),
        "sklearn_one_thread_excess": single[0][1] / best.objective - 1,
        "sklearn_float64": double, "sklearn_float64_excess": double_reached / best.objective - 1,
    }  # fmt: skip


def measure_grid(X: Any, y: Any, rows: int) -> dict[str, Any]:
    """Measure ten C on five folds and the refit, against LogisticRegressionCV as it comes and tuned."""
    X, y = X[:rows], y[:rows]
    folds = list(StratifiedKFold(5).split(X, y))
    masks = [np.isin(np.arange(rows), train) for train, _ in folds]

    def ours() -> tuple[Any, float, Any]:
        found = solvers.solve(X, y, TEN_CS, masks, standardise=False)
        right = np.zeros(len(TEN_CS))
        for several, (_, val) in zip(found, folds, strict=True):
            for number, one in enumerate(several):
                right[number] += ((X[val] @ one.coefficients.T + one.intercept).argmax(1) == y[val]).mean()
        C = TEN_CS[int(right.argmax())]
        return found, C, solvers.solve(X, y, [C], standardise=False)

    spent, (found, C, _) = seconds_of(ours)
    again, _ = seconds_of(ours)
    model = {"Cs": TEN_CS, "cv": folds, "use_legacy_attributes": False, "scoring": "accuracy", "l1_ratios": (0,)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default, fitted = seconds_of(lambda: LogisticRegressionCV(**model).fit(X, y))
        with threadpool_limits(1):
            tuned, _ = seconds_of(lambda: LogisticRegressionCV(**model, n_jobs=CORES).fit(X, y))
    worst = -1.0
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore")
        for several, (train, _) in zip(found, folds, strict=True):
            start = None
            for one in several:
                other = LogisticRegression(C=one.C, max_iter=100, warm_start=True)
                if start is not None:
                    other.coef_, other.intercept_ = start
                other.fit(X[train], y[train])
                start = other.coef_.copy(), other.intercept_.copy()
                mine = objective(X[train], y[train], one.C, one.coefficients, one.intercept)
                worst = max(worst, mine / objective(X[train], y[train], one.C, *start) - 1)
    passes = sum(one.iterations + 1 for several in found for one in several)
    flops = passes * 4 * 0.8 * rows * X.shape[1] * (int(y.max()) + 1)
    return {
        "kind": "grid", "rows": rows, "width": X.shape[1], "classes": int(y.max()) + 1, "seconds": min(spent, again),
        "sklearn": default, "sklearn_tuned": tuned, "C": C, "sklearn_C": float(np.ravel(fitted.C_)[0]), "worst_loss": worst,
        "iterations": passes - 50, "share_of_peak": flops / min(spent, again) / peak_gemm(),
    }  # fmt: skip


def measure_sweep(X: Any, y: Any) -> dict[str, Any]:
    """Measure 45 C on one validation split."""
    mask = np.arange(len(y)) % 5 != 0
    Cs = list(np.logspace(-6, 5, 45))
    spent, (found,) = seconds_of(lambda: solvers.solve(X, y, Cs, [mask], standardise=False))
    return {
        "kind": "sweep", "rows": len(y), "width": X.shape[1], "classes": int(y.max()) + 1, "seconds": spent,
        "converged": int(sum(one.converged for one in found)), "iterations": sum(one.iterations for one in found),
    }  # fmt: skip


def measure_all(X: Any, y: Any) -> dict[str, Any]:
    """Measure every head by default, choosing, refitting and answering, each by itself."""
    order = np.arange(len(y))
    fold = Fold(order[order % 5 != 0], order[order % 5 == 0])
    spent = {}
    for name in search.HEADS:
        start = time.perf_counter()
        chosen = search.search_head(name, X, y, [fold], 0)
        search.train(name, chosen.params, X, y, 0)
        spent[name] = time.perf_counter() - start
    return {"kind": "all", "rows": len(y), "width": X.shape[1], "classes": int(y.max()) + 1, "seconds": spent}


# rows, columns, classes: scores and vectors of many classes are much beside few columns
MEMORY = [
    (10_000, 1_280, 10),
    (10_000, 1_280, 50),
    (10_000, 1_280, 100),
    (10_000, 2_048, 10),
    (10_000, 2_048, 100),
    (44_000, 512, 10),
]


def measure_memory(rows: int, width: int, classes: int) -> dict[str, Any]:
    """Measure the peak memory of a search and its refit in a process of its own, over the feature matrix."""
    code = (
        "import sys, time, numpy as np; from featcache.heads import search; from featcache.evaluation.splits import Fold\n"
        "rows, width, classes = map(int, sys.argv[1:])\n"
        "X, rng = np.empty((rows, width), np.float32), np.random.default_rng(0)\n"
        "y, means = rng.integers(0, classes, rows), 0.3 * rng.normal(size=(classes, width))\n"
        "for row, label in zip(X, y): row[:] = rng.normal(size=width) + means[label]\n"
        "fit = lambda X, y, folds: search.refit('logistic', search.search_head('logistic', X, y, folds, 0), X, y, "
        "np.arange(len(y)), 0)\n"
        "few, many = np.arange(500), np.arange(rows)\n"
        "fit(X[:500], y[:500] % 2, [Fold(few[100:], few[:100])])\n"
        "status = lambda key: int(open('/proc/self/status').read().split(key)[1].split()[0]) / 1024\n"
        "before = status('VmRSS:') - X.nbytes / 2**20\n"
        "start = time.perf_counter(); fit(X, y, [Fold(many[rows // 5 :], many[: rows // 5])])\n"
        "print(time.perf_counter() - start, (status('VmHWM:') - before) / (X.nbytes / 2**20))"
    )
    done = subprocess.run(  # noqa: S603 - this file's own code
        [sys.executable, "-c", code, str(rows), str(width), str(classes)], capture_output=True, text=True, check=True
    )
    seconds, times = map(float, done.stdout.split())
    shape = {"rows": rows, "width": width, "classes": classes}
    return {"kind": "memory", **shape, "seconds": seconds, "times_the_matrix": times}


def measure_classes(rows: int = 100_000, width: int = 768, classes: int = 1000) -> dict[str, Any]:
    """Measure a sweep over many classes, on synthetic features: no set at hand has a thousand."""
    rng = np.random.default_rng(0)
    y = np.arange(rows) % classes
    X = rng.normal(size=(rows, width)).astype(np.float32)
    X += rng.normal(size=(classes, width)).astype(np.float32)[y] * 0.3
    Cs = [1e-4, 1e-3, 1e-2]
    spent, (found,) = seconds_of(lambda: solvers.solve(X, y, Cs, standardise=False))
    passes = sum(one.iterations + 1 for one in found)
    flops = passes * 4 * rows * width * classes
    return {
        "kind": "classes", "rows": rows, "width": width, "classes": classes, "Cs": len(Cs), "seconds": spent,
        "passes": passes, "seconds_a_pass": spent / passes, "share_of_peak": flops / spent / peak_gemm(),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def main() -> None:
    """Measure, and write records and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", type=Path, nargs="*")
    parser.add_argument("--features", type=Path)
    parser.add_argument("--again", action="store_true", help="measure what takes minutes too")
    kinds = ["search", "race", "fit", "grid", "sweep", "all", "classes", "memory", "table"]
    parser.add_argument("--only", choices=kinds, action="append")
    options = parser.parse_args()
    chosen = options.only or [
        "search",
        "race",
        "memory",
        "classes",
        *(["fit", "grid", "sweep", "all"] if options.features else []),
    ]
    X, y = load(options.features, 512) if options.features else (np.zeros((0, 1)), np.zeros(0, int))
    ten = y % 10
    steps: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "search": lambda: (measure_search(task, None if options.again else earlier(task)) for task in tasks()),
        "race": lambda: [measure_race()],
        "fit": lambda: [measure_fit(X, ten, 8000), measure_fit(X, ten, len(y))],
        "grid": lambda: [measure_grid(X, ten, 8000)],
        "sweep": lambda: [measure_sweep(X, ten)],
        "all": lambda: [measure_all(load(options.features, 768)[0][:10_000], ten[:10_000])],
        "memory": lambda: (measure_memory(*shape) for shape in MEMORY),
        "classes": lambda: [measure_classes()],
        "table": list,
    }
    path = HERE / "heads.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def tasks() -> Iterable[tuple[str, Any, Any, Split]]:
        yield from map(read, options.sets)
        if options.features:
            yield from (large(X, ten, rows) for rows in (8_000, 44_000))

    def earlier(task: tuple[str, Any, Any, Split]) -> dict[str, Any] | None:
        same = ["search", task[0], len(task[3].train_val), kernels()]
        return next((old for old in kept if identity(old) == same), None)

    for step in chosen:
        for record in steps[step]():
            noted = record | {"kernels": kernels(), "processor": processor()}
            kept = [*(old for old in kept if identity(old) != identity(noted)), noted]
            print(json.dumps(record, default=float), flush=True)
            path.write_text("".join(f"{json.dumps(one, default=float)}\n" for one in kept))
    (HERE / "heads.md").write_text(table(kept))
    print((HERE / "heads.md").read_text())


COMPARED = (
    "sklearn", "setting", "sklearn_C", "sklearn_right", "sklearn_kept", "sklearn_right_at_C", "above", "same",
    "same_tolerance",
)  # fmt: skip


def geometric(records: list[dict[str, Any]], key: str) -> float:
    """Return the geometric mean of how many times as long scikit-learn takes."""
    return float(np.exp(np.mean([np.log(record[key] / record["seconds"]) for record in records])))


def identity(record: dict[str, Any]) -> list[Any]:
    """Return what a later record takes the place of; searches are measured with several kernels."""
    more = {"search": ["kernels"], "memory": ["width", "classes"]}.get(record["kind"], [])
    return [record["kind"], record.get("name"), record["rows"], *(record.get(key) for key in more)]


def searches(records: list[dict[str, Any]]) -> list[str]:
    """Return the tables of searches, one for each BLAS, what their columns are, and the geometric means of the ratios."""
    if not records:
        return []
    note = (
        "scikit-learn: `LogisticRegressionCV` with the same 45 C, folds and refit, its fastest setting of BLAS threads and "
        "jobs (1,000 iterations at most; the least of three; * measured once, one thread, in seconds of the processor). "
        f"First with its own tolerance, 1e-4, with which its objective is up to {max(one['above'] for one in records):.0e} "
        f"above ours (all rows, our C); then with the loosest that brings it to within {SAME:g}. C: ours, and that "
        "of solving all 45, to 1e-7 (of many numbers: to 1e-4). Right: test images, ours; those of scikit-learn's fit with "
        "our C; those with the C that it chose itself, by accuracy where `fit` goes by log-loss (see choice.md)."
    )
    columns = [
        "set", "rows x columns, classes, folds", "s", "scikit-learn s (setting)", "ratio",
        "same objective s (tolerance)", "ratio", "C, all", "right",
    ]  # fmt: skip
    head = f"| {' | '.join(columns)} |"
    lines = ["## The logistic search as `fit` runs it, and the refit", "", note, ""]
    for kind in sorted({tuple(one["kernels"]) for one in records}):
        alike = [one for one in records if tuple(one["kernels"]) == kind]
        rows = [
            f"| {one['name']} | {one['rows']:,} x {one['width']:,}, {one['classes']}, {one['folds']} | {one['seconds']:.2f} "
            f"| {one['sklearn']:.2f}{'*' * one.get('sklearn_kept', False)} ({one['setting']}) "
            f"| {one['sklearn'] / one['seconds']:.1f} "
            f"| {one['same']:.2f} ({one['same_tolerance']:g}) | {one['same'] / one['seconds']:.1f} "
            f"| {one['C']:g}, {one['full_C']:g} "
            f"| {one['right']}, {one['sklearn_right_at_C']}, {one['sklearn_right']} of {one['test']} |"
            for one in alike
        ]
        means = f"Geometric mean {geometric(alike, 'sklearn'):.1f}, at the same objective {geometric(alike, 'same'):.1f}."
        machines = "; ".join(sorted({one["processor"] for one in alike}))
        load = max(one["load"] for one in alike)
        ending = f"{means} {machines}, BLAS kernels {' and '.join(kind)}; load on the machine up to {load:.1f}."
        lines += [head, "|---" * len(columns) + "|", *rows, "", ending, ""]
    return lines


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as Markdown."""
    older = [record for record in records if record["kind"] != "search"]
    used = sorted({kernel for record in older for kernel in record.get("kernels", ["not noted"])})
    lines = [
        "# Heads' speed",
        "",
        f"`python benchmarks/speed/heads.py FEATURES.h5 ...`; {CORES} shared cores, ratios of one run.",
        "",
        *searches([record for record in records if record["kind"] == "search"]),
        "## Other shapes",
        "",
        f"BLAS kernels: {', '.join(used)}.",
        "",
    ]
    for record in older:
        shape = f"{record['rows']:,} x {record.get('width')}"  # random problems are of many widths
        if record["kind"] == "fit":
            lines.append(
                f"- One logistic fit, C = 1, {shape}, {record['classes']} classes: {record['seconds']:.2f} s, "
                f"{record['excess']:.1g} above the optimum; {record['sklearn'] / record['seconds']:.0f} times "
                f"scikit-learn's speed ({record['sklearn']:.1f} s), "
                f"{record['sklearn_one_thread'] / record['seconds']:.0f} times it with one BLAS thread "
                f"({record['sklearn_one_thread']:.1f} s), "
                f"{record['sklearn_float64'] / record['seconds']:.0f} times it in float64 "
                f"({record['sklearn_float64']:.1f} s)."
            )
        elif record["kind"] == "grid":
            lines.append(
                f"- 10 C x 5 folds + refit, {shape}: {record['seconds']:.2f} s; "
                f"{record['sklearn'] / record['seconds']:.0f} times LogisticRegressionCV ({record['sklearn']:.0f} s), "
                f"{record['sklearn_tuned'] / record['seconds']:.0f} times it tuned ({record['sklearn_tuned']:.0f} s); "
                f"largest loss over scikit-learn's {record['worst_loss']:+.1g}; C = {record['C']:.3g}, its "
                f"{record['sklearn_C']:.3g}; {100 * record['share_of_peak']:.0f} % of peak products."
            )
        elif record["kind"] == "race":
            lines.append(
                f"- {record['alike']} of {record['draws']} random problems (60 to 260 rows, 4 to 120 columns, 2 to 7 "
                "classes, up to 30 % of the labels wrong) are chosen as when every C is solved, in "
                f"{record['seconds']:.0f} s instead of {record['whole']:.0f}; the others (ours, then): "
                f"{', '.join(f'{ours:g}, {whole:g}' for _, ours, whole in record['unlike']) or 'none'}."
            )
        elif record["kind"] == "sweep":
            lines.append(f"- 45 C on a validation split, {shape}, {record['classes']} classes: {record['seconds']:.1f} s.")
        elif record["kind"] == "all":
            spent = ", ".join(f"{name} {seconds:.1f}" for name, seconds in record["seconds"].items())
            lines.append(f"- All heads, {shape}: {sum(record['seconds'].values()):.1f} s ({spent}).")
        elif record["kind"] == "memory":
            lines.append(
                f"- Search and refit of drawn features, {shape}, {record['classes']} classes: {record['seconds']:.1f} s, "
                f"{record['times_the_matrix']:.2f} times the features' memory at most, these included."
            )
        elif record["kind"] == "classes":
            lines.append(
                f"- {record['classes']:,} classes, {shape}, {record['Cs']} C: {record['seconds']:.0f} s, "
                f"{record['passes']} passes of {record['seconds_a_pass']:.1f} s at {100 * record['share_of_peak']:.0f} % of "
                "peak products. A pass costs 4 x rows x columns x classes operations: multiply by the problems still open."
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
