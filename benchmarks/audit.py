"""How much of what is planted in a data set ``featcache audit`` finds: copies across splits, and flipped labels.

python benchmarks/audit.py DATA OUT [BACKBONE]

DATA has train/CLASS/IMAGE and test/CLASS/IMAGE. Of 100 training images a copy is put into test, a third of them encoded
again (JPEG, quality 70), a third resized by 10 %, a third both; of 100 others a mirrored one. 5 % of all labels are flipped,
in three draws, which are doubted by heads on one backbone, and on two.
What the audit finds in DATA as it is does not count, neither for nor against it: it is listed, to be looked at.
"""

import csv
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import featcache
from featcache.experiments.audit import Suspect
from featcache.reports.wording import leak_lines

COPIES, MIRRORED, FLIPPED, DRAWS = 100, 100, 0.05, 3
BESIDE = ("mini",)
KINDS = ("encoded", "resized", "both")
MANIFEST = "planted.csv"  # one name for all: rows of images that were computed are taken again


def changed(path: Path, kind: str) -> bytes:
    """Return the bytes of an image's copy."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    if kind == "mirrored":
        image = ImageOps.mirror(image)
    if kind in {"resized", "both"}:
        image = image.resize((round(0.9 * image.width), round(0.9 * image.height)), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, "PNG" if kind == "resized" else "JPEG", **({} if kind == "resized" else {"quality": 70}))
    return out.getvalue()


def images_of(data: Path) -> list[tuple[str, str, str]]:
    """Return path, label and split of all images."""
    paths = sorted(path for path in data.resolve().glob("*/*/*") if path.is_file())
    return [(str(path), path.parent.name, path.parent.parent.name) for path in paths]


def plant_copies(data: Path, out: Path, seed: int) -> tuple[Path, dict[frozenset[str], str]]:
    """Write a manifest of all images with copies in test; return it and which pairs are planted."""
    rows = images_of(data)
    train = [row for row in rows if row[2] == "train"]
    chosen = np.random.default_rng(seed).choice(len(train), COPIES + MIRRORED, replace=False)
    pairs, folder = {}, out / "copies"
    folder.mkdir(parents=True, exist_ok=True)
    for number, index in enumerate(chosen.tolist()):
        path, label, _ = train[index]
        kind = KINDS[number % 3] if number < COPIES else "mirrored"
        copy = folder.resolve() / f"{number:03d}.{'png' if kind == 'resized' else 'jpg'}"
        copy.write_bytes(changed(Path(path), kind))
        rows.append((str(copy), label, "test"))
        pairs[frozenset((path, str(copy)))] = kind
    return written(out / MANIFEST, rows), pairs


def plant_labels(data: Path, out: Path, seed: int) -> tuple[Path, set[str]]:
    """Write a manifest with some labels flipped to another class; return it and whose they are."""
    rows = images_of(data)
    rng = np.random.default_rng(seed)
    classes = sorted({label for _, label, _ in rows})
    flipped = set(rng.choice(len(rows), round(FLIPPED * len(rows)), replace=False).tolist())
    changed_rows = [
        (path, str(rng.choice([name for name in classes if name != label])) if number in flipped else label, split)
        for number, (path, label, split) in enumerate(rows)
    ]
    return written(out / MANIFEST, changed_rows), {rows[number][0] for number in flipped}


def written(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Write a manifest."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split"), *rows])
    return path


def score_copies(data: Path, out: Path, backbone: str) -> None:
    """Print which of the planted copies are found, and which pairs beside them."""
    before = {frozenset((suspect.path, suspect.other)) for suspect in copies_in(data, out, backbone)}
    manifest, pairs = plant_copies(data, out, seed=0)
    started = time.perf_counter()
    result = featcache.audit(manifest, backbone)
    seconds = time.perf_counter() - started
    told = {frozenset((full(suspect.path), full(suspect.other))) for suspect in result.suspects if suspect.other}
    for kind in (*KINDS, "mirrored"):
        of_kind = [pair for pair, own in pairs.items() if own == kind]
        print(f"{kind}: {sum(pair in told for pair in of_kind)} of {len(of_kind)} found")
    beside = told - pairs.keys()
    print(f"pairs told: {len(told)}, planted {len(told & pairs.keys())}, in DATA before {len(beside & before)}, ", end="")
    print(f"neither {len(beside - before)}; {seconds:.1f} s")
    for pair in beside:
        print("  look at", *sorted(pair))
    print("\n".join(leak_lines(result)))


def copies_in(data: Path, out: Path, backbone: str) -> list[Suspect]:
    """Return the copies that a data set holds by itself, by full paths."""
    result = featcache.audit(written(out / MANIFEST, images_of(data)), backbone)
    copies = [suspect for suspect in result.suspects if suspect.other]
    return [replace(suspect, path=full(suspect.path), other=full(suspect.other)) for suspect in copies]


def full(path: str) -> str:
    """Return a path as the manifest has it."""
    return str(Path("/") / path)


def score_labels(data: Path, out: Path, backbone: str) -> None:
    """Print how many of the flipped labels are doubted, and the precision down to where 80 % are, by one backbone or two."""
    for beside in ((), BESIDE):
        reached = []
        for seed in range(DRAWS):
            manifest, flipped = plant_labels(data, out, seed)
            result = featcache.audit(manifest, backbone, beside=beside)
            doubted = [full(suspect.path) in flipped for suspect in result.suspects if suspect.kind == "label"]
            reached.append(precision_at(doubted, 0.8 * len(flipped)))
            print(f"{[backbone, *beside]}, draw {seed}: {len(flipped)} labels flipped, {len(doubted)} doubted, ", end="")
            print(f"{sum(doubted)} of them flipped; precision at recall .8: {reached[-1]:.3f}", dict(result.doubting))
        print(f"{[backbone, *beside]}: {np.mean(reached):.3f} on average, {min(reached):.3f} at worst", flush=True)


def precision_at(doubted: list[bool], needed: float) -> float:
    """Return the share that is flipped of what is told until so many flipped ones are; 0 where they never are."""
    hits = np.cumsum(doubted)
    if not len(hits) or hits[-1] < needed:
        return 0.0
    place = int(np.searchsorted(hits, needed)) + 1
    return float(hits[place - 1] / place)


def main(data: str, out: str, backbone: str = "lite0") -> None:
    """Plant, audit, count."""
    Path(out).mkdir(parents=True, exist_ok=True)
    score_labels(Path(data), Path(out), backbone)
    score_copies(Path(data), Path(out), backbone)


if __name__ == "__main__":
    main(*sys.argv[1:])
