"""Whole commands' time, from the start of Python to its end, beside a plain scikit-learn script on the same features.

    python benchmarks/speed/commands.py DATA [--rounds 3] [--against CHECKOUT] [options of ``fit``, such as -b NAME]

DATA is a folder of images. Processor's seconds (user and system) of each command, the least of the rounds; of another
checkout too, by turns. One BLAS and OpenMP thread, so that they count no waiting; wall seconds on a quiet machine are fewer.
Writes commands.md beside this file.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
# what people write by hand: the same C and folds; no baselines, no intervals, no file of the head
PLAIN = """
import sys
import h5py, numpy as np
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

with h5py.File(sys.argv[1]) as file:
    X, y, split = file["features"][:], file["labels"][:], file["splits"].asstr()[:]
test = split == "test" if (split == "test").any() else np.arange(len(y)) % 5 == 0
search = LogisticRegressionCV(
    Cs=np.logspace(-6, 5, 45), cv=5, max_iter=1000, scoring="neg_log_loss", l1_ratios=(0,), use_legacy_attributes=False
)
print((make_pipeline(StandardScaler(), search).fit(X[~test], y[~test]).predict(X[test]) == y[test]).mean())
"""


def seconds_of(command: list[str], checkout: Path, cache: Path) -> float:
    """Return the processor's seconds of a command, which has to end well."""
    environment = os.environ | ONE_THREAD | {"PYTHONPATH": str(checkout), "FEATCACHE_CACHE": str(cache)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=cache)  # noqa: S603 - our own
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def forget(cache: Path, *patterns: str) -> None:
    """Remove what a command is to do again."""
    for pattern in patterns:
        for path in cache.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(data: str, backbone: list[str], checkout: Path, cache: Path) -> dict[str, float]:
    """Return the seconds of each command on one checkout, from an empty cache to a full one."""
    featcache = [sys.executable, "-m", "featcache"]
    fit = [*featcache, "fit", data, *backbone]
    forget(cache, "*")
    times = {"`fit --head all`, nothing cached": seconds_of([*fit, "--head", "all"], checkout, cache)}
    forget(cache, "*/*/heads")
    times["`fit --head all`, features cached"] = seconds_of([*fit, "--head", "all"], checkout, cache)
    times["`fit --head all`, again"] = seconds_of([*fit, "--head", "all"], checkout, cache)
    forget(cache, "*/*/heads", "*/pixels.*")
    times["`fit`, features cached (logistic)"] = seconds_of(fit, checkout, cache)
    forget(cache, "*/*/heads/logistic*")
    times["`fit`, features and baselines cached"] = seconds_of(fit, checkout, cache)
    times["`fit`, again"] = seconds_of(fit, checkout, cache)
    (features,) = cache.glob("*/*.pooled-*/features.h5")
    times["scikit-learn, features in a file (logistic)"] = seconds_of(
        [sys.executable, "-c", PLAIN, str(features)], checkout, cache
    )
    forget(cache, "*")
    times["`quickstart`"] = seconds_of([*featcache, "quickstart"], checkout, cache)
    times["`quickstart`, again"] = seconds_of([*featcache, "quickstart"], checkout, cache)
    return times


def main() -> None:
    """Measure all checkouts by turns, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=lambda text: str(Path(text).resolve()))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, action="append", default=[])
    asked, backbone = parser.parse_known_args()
    checkouts = [HERE.parents[1], *(path.resolve() for path in asked.against)]
    least: dict[tuple[str, Path], float] = {}
    for _ in range(asked.rounds):
        for checkout in checkouts:
            with tempfile.TemporaryDirectory() as folder:
                for command, seconds in measure(asked.data, backbone, checkout, Path(folder)).items():
                    least[command, checkout] = min(seconds, least.get((command, checkout), seconds))
    commands = list(dict.fromkeys(command for command, _ in least))
    titles = ["", *("this checkout" if checkout == checkouts[0] else checkout.name for checkout in checkouts)]
    rows = [titles, ["---"] * len(titles)]
    rows += [[command, *(f"{least[command, checkout]:.1f} s" for checkout in checkouts)] for command in commands]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (HERE / "commands.md").write_text(
        f"# Whole commands\n\nBy `benchmarks/speed/commands.py`, {' '.join([Path(asked.data).name, *backbone[:2]])}: "
        f"processor's seconds, the least of {asked.rounds}, beside whatever else ran.\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
