"""Extraction's speed: featcache against a plain script, embetter, and the floor that the machine's cores allow.

    python benchmarks/speed/extract.py --cifar FOLDER --flowers FOLDER --small FOLDER [--only rows|again|store|gpu|table]

``--cifar`` is a folder of 32-pixel photographs (CIFAR-10), ``--flowers`` one of photographs, ``--small`` one of 64-pixel
ones (Tiny ImageNet), each CLASS/IMAGE or train|test/CLASS/IMAGE. Everything in a row is measured in one run, side by
side; only ratios count. The backbones have random weights: speed does not depend on them. Writes extract.jsonl and
extract.md beside this file.

The floor is the CPU work that cannot be avoided: seconds to read, hash and decode an image on one core, divided by the
cores, plus seconds of the fastest runtime's forward pass with all cores busy; both measured alone. The images of the rows
lie in memory (``/dev/shm``, where there is one), since all sides are to read them at the same speed; the cache is on disk.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from featcache.datasets import open_dataset
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.extraction.files import BatchReader, DatasetFiles
from featcache.specs import BackboneSpec, TransformOverrides, Views
from featcache.store.entry import FeatureStore

HERE = Path(__file__).parent
MEMORY = Path("/dev/shm")  # noqa: S108 - memory, not a folder for files that last
CORES = len(os.sched_getaffinity(0))

# name, backbone, input size, images, how many for the plain script
ROWS = (
    ("resnet18@32, CIFAR", "resnet18", 32, "cifar", 3000),
    ("mobilenetv3_small_100@224, flowers", "mobilenetv3_small_100", 224, "flowers", 600),
    ("test_resnet@160, flowers", "test_resnet", 160, "flowers", 700),
    ("resnet18@224, flowers", "resnet18", 224, "flowers", 200),
    ("vit_small_patch16_224, CIFAR", "vit_small_patch16_224", 224, "cifar", 120),
    ("mobilenetv3_small_100@224, 2000x1500", "mobilenetv3_small_100", 224, "large", 150),
)
SECONDS = 100.0  # that the floor would take for the images that featcache gets: what a start costs weighs little then
FLOOR_IMAGES = 3000
PLAIN = """
import sys, time, timm, torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
folder, name, size, workers = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model = timm.create_model(name, num_classes=0).eval()
config = timm.data.resolve_data_config({"input_size": (3, size, size)}, model=model)
images = ImageFolder(folder, timm.data.create_transform(**config, is_training=False))
start = time.perf_counter()
with torch.no_grad():
    rows = [model(batch) for batch, _ in DataLoader(images, batch_size=32, num_workers=workers)]
torch.save(torch.cat(rows), sys.argv[5])
print(len(images) / (time.perf_counter() - start))
"""
EMBETTER = """
import sys, time, timm
from pathlib import Path
make = timm.create_model
timm.create_model = lambda name, **more: make(name, **(more | {"pretrained": False}))
from embetter.vision import ImageLoader, TimmEncoder
paths = sorted(str(path) for path in Path(sys.argv[1]).rglob("*.jpg"))
encoder = TimmEncoder(sys.argv[2])
start = time.perf_counter()
encoder.transform(ImageLoader().transform(paths))
print(len(paths) / (time.perf_counter() - start))
"""


def photographs(folder: Path) -> list[Path]:
    """Return a folder's images in an order that mixes classes."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    return [paths[index] for index in np.random.default_rng(0).permutation(len(paths))]


def multiply(paths: list[Path], target: Path, count: int) -> Path:
    """Write a folder of two classes with ``count`` images: copies, each told apart by bytes behind the image's end."""
    contents = [path.read_bytes() for path in paths[:count]]
    for label in ("a", "b"):
        (target / label).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        content = contents[number % len(contents)] + number.to_bytes(8, "big")
        (target / "ab"[number % 2] / f"{number:06d}.jpg").write_bytes(content)
    os.sync()  # or the system writes gigabytes while it is measured
    return target


def draw_large(paths: list[Path], target: Path, count: int = 24) -> list[Path]:
    """Write photographs scaled up to 2000x1500 with some noise, as JPEG of quality 90."""
    target.mkdir(parents=True, exist_ok=True)
    drawn = []
    for number, path in enumerate(paths[:count]):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB").resize((2000, 1500), Image.Resampling.BICUBIC), np.float32)
        noisy = pixels + np.random.default_rng(number).normal(0, 4, pixels.shape)
        drawn.append(target / f"{number}.jpg")
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(drawn[-1], quality=90)
    return drawn


def spec_of(name: str, size: int) -> BackboneSpec:
    """Return a backbone with random weights at a size."""
    return BackboneSpec(name, random_init=0, overrides=TransformOverrides(input_size=size))


def extract(folder: Path, spec: BackboneSpec, runtime: Any) -> dict[str, Any]:
    """Extract into a new cache; the model is there before, as in the plain script. Durability's share is measured too."""
    with tempfile.TemporaryDirectory() as cache:
        bench = FeatureCache(open_dataset(folder), spec, Settings(Path(cache), runtime=runtime))
        _ = bench.backbone
        spent: list[float] = []
        with timed_calls(FeatureStore, ("add_part", "commit"), spent):
            start = time.perf_counter()
            done = bench.extracted()
            seconds = time.perf_counter() - start
        return {
            "rate": done.report.rows / seconds,
            "seconds": seconds,
            "runtime": done.report.runtime,
            "difference": done.report.difference,
            "durability": sum(spent) / seconds,
        }


class timed_calls:  # noqa: N801 - reads as a function
    """Adds up the processor time that some methods of a class take: what they wait for, workers compute meanwhile."""

    def __init__(self, owner: type, names: tuple[str, ...], spent: list[float]) -> None:
        self.owner, self.names, self.spent = owner, names, spent
        self.kept = {name: getattr(owner, name) for name in names}

    def __enter__(self) -> None:
        for name, real in self.kept.items():
            setattr(self.owner, name, self._wrapped(real))

    def __exit__(self, *_: object) -> None:
        for name, real in self.kept.items():
            setattr(self.owner, name, real)

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            start = time.thread_time()
            try:
                return real(*arguments, **more)
            finally:
                self.spent.append(time.thread_time() - start)

        return call


def floor(folder: Path, spec: BackboneSpec, seconds: float = 2.0, rounds: int = 3) -> dict[str, float]:
    """Measure decoding on one core and the fastest runtime's forward pass on all, each alone, by turns."""
    import torch

    from featcache.extraction.extract import Workers
    from featcache.extraction.runtimes import Machine, select_runtime, threads_per_worker
    from featcache.specs import RUNTIMES

    with tempfile.TemporaryDirectory() as cache:
        source = open_dataset(folder)
        bench = FeatureCache(source, spec, Settings(Path(cache)))
        backbone, workers = bench.backbone, Workers(CORES, 1)
        plan = bench.plan_for(backbone.preprocess, Views())
        positions = list(range(len(source.samples)))
        size = backbone.transform.input_size
        first = np.random.default_rng(0).integers(0, 255, (plan.batch_size, size, size, 3), dtype=np.uint8)
        runs: dict[str, Any] = {}
        with threads_per_worker(workers.threads):
            for name in RUNTIMES:
                if name in {"auto", "compile", "onnx"}:
                    continue
                try:
                    machine = Machine(torch.device("cpu"), "float32", workers)
                    runtime = select_runtime(backbone.program(("pooled",)), first, 10**9, name, machine)
                except Exception as error:  # noqa: BLE001 - a runtime that is not installed is not measured
                    print(f"  {name}: {error}")
                    continue
                runs[name] = runtime.run
            rounded = [
                (
                    decode_rate(
                        BatchReader(DatasetFiles(source), positions, plan.preprocess, plan.views), plan.batch_size, seconds
                    ),
                    {name: forward_rate(run, first, workers.count, seconds) for name, run in runs.items()},
                )
                for _ in range(rounds)
            ]
        decode = statistics.fmean(rate for rate, _ in rounded)
        rates = {name: statistics.fmean(forward[name] for _, forward in rounded) for name in runs}
        fastest = max(rates, key=rates.__getitem__)
        rate = 1 / (1 / decode / CORES + 1 / rates[fastest])
        return {
            "rate": rate,
            "decode": decode,
            "forward": rates[fastest],
            **{f"forward_{k}": v for k, v in rates.items()},
        }


def decode_rate(reader: BatchReader, size: int, seconds: float) -> float:
    """Return images a second that one thread reads, hashes and decodes."""
    images, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds and (count := len(reader.fill(size))):
        images += count
    return images / spent


def forward_rate(run: Callable[[Any], Any], batch: Any, workers: int, seconds: float) -> float:
    """Return images a second of a runtime that all workers call at once."""
    counts = [0] * workers
    run(batch)
    start = time.perf_counter()

    def loop(number: int) -> None:
        while time.perf_counter() - start < seconds:
            run(batch)
            counts[number] += len(batch)

    threads = [threading.Thread(target=loop, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - start)


def script(code: str, *arguments: object) -> float:
    """Run a script in a process of its own and return the number that it prints last."""
    done = subprocess.run(  # noqa: S603 - this file's own scripts
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return float(done.stdout.strip().splitlines()[-1])


def alone(act: Callable[..., Any], *arguments: object) -> Any:
    """Call a function in a process of its own, as the scripts have one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(act, *arguments).result()


def measure_rows(data: dict[str, list[Path]], work: Path, only: str) -> Iterator[dict[str, Any]]:
    """Yield one record a row."""
    for name, backbone, size, images, plain_count in ROWS:
        if only not in name:
            continue
        spec = spec_of(backbone, size)
        some = multiply(data[images], work / "some", FLOOR_IMAGES)
        before = floor(some, spec)
        count = math.ceil(SECONDS * before["rate"])
        many = multiply(data[images], work / "many", count)
        few = multiply(data[images], work / "few", plain_count)
        medium = multiply(data[images], work / "medium", max(plain_count, count // 12))
        record: dict[str, Any] = {"kind": "row", "row": name, "images": count}
        record["plain"] = {workers: script(PLAIN, few, backbone, size, workers, work / "rows.pt") for workers in (0, 1, 2)}
        record["torch"] = alone(extract, medium, spec, "torch")
        record["featcache"] = alone(extract, many, spec, "auto")
        after = floor(some, spec)
        record["floor"] = {key: (value + after[key]) / 2 for key, value in before.items()}
        if backbone.startswith("mobilenetv3") and images == "flowers":
            try:
                record["embetter"] = script(EMBETTER, multiply(data[images], work / "embetter", 64), backbone)
            except RuntimeError as error:
                record["embetter_failed"] = str(error)
        for folder in ("some", "many", "few", "medium", "embetter"):
            shutil.rmtree(work / folder, ignore_errors=True)
        yield record


def measure_again(data: dict[str, list[Path]], work: Path) -> dict[str, Any]:
    """Measure a second run over unchanged images, and one with 1 % new ones, against the first."""
    folder, spec = multiply(data["flowers"], work / "again", 3000), spec_of("resnet18", 224)
    settings = Settings(work / "cache")
    seconds = []
    for run in range(3):
        if run == 2:
            for number in range(30):
                content = data["flowers"][number].read_bytes() + b"new" + number.to_bytes(8, "big")
                (folder / "a" / f"new{number}.jpg").write_bytes(content)
        bench = FeatureCache(open_dataset(folder), spec, settings)
        if run != 1:
            _ = bench.backbone  # the second run needs none
        start = time.perf_counter()
        done = bench.extracted()
        seconds.append(time.perf_counter() - start)
        if run == 2 and done.report.computed != 30:
            raise RuntimeError(f"{done.report.computed} computed instead of 30")
    shutil.rmtree(folder)
    shutil.rmtree(settings.cache)
    return {"kind": "again", "first": seconds[0], "unchanged": seconds[1], "one_percent": seconds[2]}


def measure_store(data: dict[str, list[Path]], work: Path) -> Iterator[dict[str, Any]]:
    """Yield peak memory at 5,000 and 100,000 images, each the median of three runs, and reading speeds of the latter."""
    peaks = {}
    code = (
        "import sys; from featcache.cli import main\n"
        "try: main(['extract', sys.argv[1], '--cache', sys.argv[2], '--runtime', 'torch', '-q'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "status = open('/proc/self/status').read()\n"
        "print(int(status.split('VmHWM:')[1].split()[0]) / 1024)"
    )
    for count in (5000, 100_000):
        folder = multiply(data["small"], work / f"small{count}", count)
        found = []
        for _ in range(3):
            shutil.rmtree(work / f"cache{count}", ignore_errors=True)
            found.append(script(code, folder, work / f"cache{count}"))
        peaks[count] = statistics.median(found)
        shutil.rmtree(folder)
    yield {"kind": "memory", "peaks": peaks}
    entry = next((work / "cache100000").glob("*/*/spec.json")).parent
    time.sleep(3)  # hashes of files younger than two seconds are not trusted
    rows = FeatureStore.open(entry).features().X
    np.save(work / "rows.npy", rows)
    index = np.random.default_rng(0).integers(0, len(rows), 4096)
    ours, numpys, our_rows, numpy_rows = [], [], [], []
    reader, mapped = FeatureStore.open(entry).reader(), np.load(work / "rows.npy", mmap_mode="r")
    for _ in range(9):
        ours.append(seconds_of(lambda: FeatureStore.open(entry).features()))
        numpys.append(seconds_of(lambda: np.load(work / "rows.npy")))
        our_rows.append(seconds_of(lambda: reader.take(index)))
        numpy_rows.append(seconds_of(lambda: mapped[index]))
    yield {
        "kind": "reading",
        "megabytes": rows.nbytes / 1e6,
        "features": statistics.median(ours),
        "np_load": statistics.median(numpys),
        "random_rows": statistics.median(our_rows),
        "memmap_rows": statistics.median(numpy_rows),
    }


def seconds_of(act: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def _fill(reader: BatchReader, size: int, _: Any) -> None:
    reader.fill(size)


def measure_gpu(data: dict[str, list[Path]], work: Path) -> Iterator[dict[str, Any]]:
    """Yield images a second on a GPU in bfloat16 against the slower of decoding alone and the forward pass alone."""
    import torch

    if not torch.cuda.is_available():
        return
    folder = multiply(data["flowers"], work / "gpu", 20000)
    for name in ("resnet50", "vit_base_patch16_224"):
        spec = BackboneSpec(name, random_init=0, precision="bfloat16")
        bench = FeatureCache(open_dataset(folder), spec, Settings(work / "cache"))
        plan, workers = bench.plan_for(bench.backbone.preprocess, Views()), bench._workers.count  # noqa: SLF001 - as it would run
        run = bench._eager(["pooled"])  # noqa: SLF001 - as above
        size = bench.backbone.transform.input_size
        batch = np.random.default_rng(0).integers(0, 255, (plan.batch_size, size, size, 3), dtype=np.uint8)
        forward = forward_rate(run, batch, workers, 10.0)
        reader = BatchReader(bench.files, range(len(bench.files)), plan.preprocess, plan.views)
        decode = forward_rate(partial(_fill, reader, plan.batch_size), batch, workers, 10.0)
        start = time.perf_counter()
        done = bench.extracted()
        rate = done.report.rows / (time.perf_counter() - start)
        yield {
            "kind": "gpu", "row": name, "device": torch.cuda.get_device_name(), "rate": rate,
            "decode": decode, "forward": forward,
        }  # fmt: skip


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as Markdown."""
    heads = ("backbone, images", "plain script", "embetter", "floor", "PyTorch alone", "featcache", "of the floor")
    heads += ("over plain", "PyTorch alone over plain", "durability")
    lines = [
        "# Extraction's speed",
        "",
        "`python benchmarks/speed/extract.py`; images a second, all from the call to the committed entry, a runtime's",
        f"compilation too. Ratios are of one run, side by side; absolute figures are those of {CORES} shared cores.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    rows = [record for record in records if record["kind"] == "row"]
    for record in rows:
        plain, got = max(record["plain"].values()), record["featcache"]
        cells = (
            record["row"],
            f"{plain:.1f}",
            f"{record['embetter']:.1f}" if "embetter" in record else "-",
            f"{record['floor']['rate']:.1f}",
            f"{record['torch']['rate']:.1f}",
            f"{got['rate']:.1f} ({got['runtime']})",
            f"{got['rate'] / record['floor']['rate']:.2f}",
            f"{got['rate'] / plain:.2f}",
            f"{record['torch']['rate'] / plain:.2f}",
            f"{100 * got['durability']:.1f} %",
        )
        lines.append(f"| {' | '.join(cells)} |")
    if rows:
        for name, key in (("featcache", "featcache"), ("PyTorch alone", "torch")):
            ratios = [record[key]["rate"] / max(record["plain"].values()) for record in rows]
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio in ratios))
            lines += ["", f"{name} over the plain script, geometric mean: {mean:.2f}."]
    for record in records:
        lines += ["", *sentences(record)] if sentences(record) else []
    return "\n".join(lines) + "\n"


def sentences(record: dict[str, Any]) -> list[str]:
    """Return what a record says beside the table."""
    kind = record["kind"]
    if "embetter" in record:
        over, most = (record[name]["rate"] / record["embetter"] for name in ("featcache", "floor"))
        return [
            f"Over embetter on {record['row']}: {over:.1f}; the floor is {most:.1f} times its speed, and the most possible."
        ]
    if kind == "again":
        first, unchanged, more = record["first"], record["unchanged"], record["one_percent"]
        return [
            f"First run {first:.1f} s; over unchanged images {unchanged:.2f} s ({100 * unchanged / first:.1f} %);",
            f"with 1 % new ones {more:.2f} s ({100 * more / first:.1f} %).",
        ]
    if kind == "memory":
        few, many = record["peaks"].values()
        return [f"Peak memory: {few:.0f} MB at 5,000 images, {many:.0f} MB at 100,000 ({100 * (many / few - 1):+.1f} %)."]
    if kind == "reading":
        whole, some = record["np_load"] / record["features"], record["memmap_rows"] / record["random_rows"]
        first = f"Reading an entry of {record['megabytes']:.0f} MB: {whole:.2f} of np.load's speed;"
        return [first, f"4,096 random rows: {some:.2f} of a NumPy memory map's."]
    if kind == "gpu":
        best = min(record["decode"], record["forward"])
        first = f"{record['row']} on {record['device']}, bfloat16: {record['rate']:.0f} images/s; decoding alone"
        return [
            first,
            f"{record['decode']:.0f}, forward alone {record['forward']:.0f}: {record['rate'] / best:.2f} of the slower.",
        ]
    return []


def main() -> None:
    """Measure, and write records and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cifar", "flowers", "small"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", choices=["rows", "again", "store", "gpu", "table"], action="append")
    parser.add_argument("--row", default="", help="Only rows whose name holds this text.")
    options = parser.parse_args()
    wanted = options.only or ["rows", "again", "store", "gpu"]
    path = HERE / "extract.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as memory,
    ):
        work = Path(folder)
        data = {name: photographs(getattr(options, name)) for name in ("cifar", "flowers", "small")}
        data["large"] = draw_large(data["flowers"], work / "large")
        steps = {
            "rows": lambda: measure_rows(data, Path(memory), options.row),
            "again": lambda: iter([measure_again(data, work)]),
            "store": lambda: measure_store(data, work),
            "gpu": lambda: measure_gpu(data, work),
            "table": lambda: iter(()),
        }
        for step in wanted:
            for record in steps[step]():
                kept = [old for old in kept if (old["kind"], old.get("row")) != (record["kind"], record.get("row"))]
                kept.append(record)
                print(json.dumps(record), flush=True)
                order = [row[0] for row in ROWS]
                kept.sort(key=lambda one: order.index(one["row"]) if one.get("row") in order else len(order))
                path.write_text("".join(f"{json.dumps(one)}\n" for one in kept))
    (HERE / "extract.md").write_text(table([json.loads(line) for line in path.read_text().splitlines()]))
    print((HERE / "extract.md").read_text())


if __name__ == "__main__":
    main()
