"""Fine-tuning's speed: epochs from the cache against a plain loop, and a sweep of depths against separate runs.

    python benchmarks/speed/finetune.py --flowers FOLDER --small FOLDER [--only epochs|pixels|sweep|table] [--row TEXT]

``--flowers`` is a folder of photographs, ``--small`` one of 64-pixel images (Tiny ImageNet), each CLASS/IMAGE or
train|test/CLASS/IMAGE. Everything in a row is measured in one run, side by side, the sides by turns; only ratios count.
The backbones have random weights: speed does not depend on them. Writes finetune.jsonl and finetune.md beside this file.

The plain loop is what people write: timm's model, all but the last stages without gradients, AdamW, batches of 32; the
frozen part runs in every epoch, on decoded tensors that lie in memory or on JPEG files through ImageFolder and DataLoader
(the better of 0 and 2 workers). Both sides are measured in float32 and under bfloat16 autocast.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from featcache.backbones.base import Backbone
from featcache.datasets import open_dataset
from featcache.display import set_up_notes
from featcache.experiments.finetune import FineTuneInputs, run_finetune, run_sweep
from featcache.extraction.extract import workers_here
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import FineTunePlan, Unfreeze, depths
from featcache.finetuning.loop import Epoch, ProcessGroup, TrainContext, Trial
from featcache.finetuning.model import LinearHead, Network, Take, open_up, select_trainable
from featcache.specs import BackboneSpec, Precision, TransformOverrides

HERE = Path(__file__).parent
BATCH, CLASSES, ROUNDS, EPOCHS = 32, 10, 2, 10
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
# the plain loop's precision, and featcache's
PAIRS = (("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"))
# backbone, what trains, images
ROWS = (("resnet18", "last:1", 192), ("vit_small_patch16_224", "last:2", 192))


class Silent:
    """Takes the place of a progress bar."""

    def update(self, _: int) -> None:
        """Show nothing."""

    def set_postfix_str(self, _: str) -> None:
        """Show nothing."""


def copies(folder: Path, target: Path, count: int) -> Path:
    """Write a folder of so many photographs in CLASSES classes, each told apart by bytes behind the image's end."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg"})
    for number in range(count):
        path = target / f"class{number % CLASSES}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(paths[(number * 7) % len(paths)].read_bytes() + number.to_bytes(8, "big"))
    return target


class Plain:
    """The plain loop over a folder."""

    def __init__(self, name: str, folder: Path, trains: Callable[[str], bool], precision: Precision) -> None:
        self._half = precision == "bfloat16"
        self.model = timm.create_model(name, num_classes=CLASSES)
        for parameter_name, parameter in self.model.named_parameters():
            parameter.requires_grad_(trains(parameter_name) or parameter_name.startswith(("fc.", "head.")))
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(trained, lr=1e-4)
        config = timm.data.resolve_model_data_config(self.model)
        self.images = ImageFolder(str(folder), timm.data.create_transform(**config, is_training=False))

    def decode(self) -> tuple[Tensor, Tensor]:
        """Return all images as tensors, and their classes."""
        batches = list(DataLoader(self.images, batch_size=BATCH, num_workers=2))
        return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])

    def from_tensors(self, images: Tensor, labels: Tensor) -> float:
        """Return the seconds of one epoch on decoded images."""
        order = torch.randperm(len(labels))
        return self._epoch((images[part], labels[part]) for part in order.split(BATCH))

    def from_files(self, workers: int) -> float:
        """Return the seconds of one epoch on files."""
        return self._epoch(DataLoader(self.images, batch_size=BATCH, shuffle=True, num_workers=workers))

    def _epoch(self, batches: Any) -> float:
        start = time.perf_counter()
        self.model.train()
        for images, labels in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._half):
                loss = F.cross_entropy(self.model(images), labels)
            loss.backward()
            self.optimiser.step()
            self.optimiser.zero_grad()
        return time.perf_counter() - start


class Ours:
    """featcache's training loop on stored rows."""

    def __init__(
        self, backbone: Backbone, wish: str, cut: str, take: Take, y: Any, epochs: int, precision: Precision
    ) -> None:
        plan = FineTunePlan(
            Unfreeze.parse(wish),
            epochs=epochs,
            batch_size=BATCH,
            lr=(1e-4,),
            patience=epochs,
            refit=False,
            precision=precision,
        )
        trainable = select_trainable(backbone.stages, plan.unfreeze, backbone.module)
        width = _width(backbone.suffix(cut), take)
        start = Network({}, LinearHead(np.zeros((CLASSES, width)), np.zeros(CLASSES)))
        network = open_up(backbone, trainable, cut, start)
        self.job = TrainContext(network.model, network.stages, take, y, plan, ProcessGroup(), 0, precision)
        self.index = np.arange(len(y))

    def epochs(self) -> list[float]:
        """Train, and return the seconds of each epoch, validation left out: the plain loop has none."""
        before = Epoch(0, None, self.job.validate(self.index[:BATCH])[0], 0.0)
        trained = Trial(self.job, 1e-4, self.index, None, before).run(Silent(), lambda _: None)
        return [epoch.seconds for epoch in trained.history[1:]]


def _width(suffix: nn.Module, take: Take) -> int:
    with torch.inference_mode():
        return int(suffix(_float(torch.from_numpy(take(np.arange(2)))))[0].numel())


def _float(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.uint8 else rows.float()


def measure_epochs(flowers: Path, work: Path, only: str) -> Iterator[dict[str, Any]]:
    """Yield seconds an epoch, the last stages unfrozen, and of a job of ten epochs with the extraction."""
    for name, wish, count in ROWS:
        if only not in name:
            continue
        folder = copies(flowers, work / name, count)
        bench = FeatureCache(open_dataset(folder), BackboneSpec(name, random_init=0), Settings(work / f"{name}.cache"))
        backbone = bench.backbone
        trainable = select_trainable(backbone.stages, Unfreeze.parse(wish), backbone.module)
        start = time.perf_counter()
        entry = bench.extracted(trainable.cut)
        extraction = time.perf_counter() - start
        features, reader = entry.store.labelled(), entry.store.reader()
        in_memory = reader.take(np.arange(len(features.y)))
        sides: dict[str, Callable[[], float]] = {}
        for precision in PRECISIONS:
            trained = {name for stage in trainable.stages for name in stage.parameters}
            plain = Plain(name, folder, trained.__contains__, precision)
            start = time.perf_counter()
            images, labels = plain.decode()
            decoding = time.perf_counter() - start
            sides |= {
                f"tensors {precision}": partial(plain.from_tensors, images, labels),
                f"files0 {precision}": partial(plain.from_files, 0),
                f"files2 {precision}": partial(plain.from_files, 2),
            }
            for side, take in (("cached", reader.take), ("memory", in_memory.__getitem__)):
                ours = Ours(backbone, wish, trainable.cut, take, features.y, 1, precision)
                sides[f"{side} {precision}"] = lambda ours=ours: ours.epochs()[0]
        seconds = by_turns(sides)
        ten = {}
        for precision in PRECISIONS:
            start = time.perf_counter()
            Ours(backbone, wish, trainable.cut, reader.take, features.y, EPOCHS, precision).epochs()
            ten[precision] = extraction + time.perf_counter() - start
        yield {
            "kind": "epochs",
            "row": f"{name}, {wish}",
            "images": count,
            "seconds": seconds,
            "extraction": extraction,
            "decoding": decoding,
            "ten_epochs": ten,
        }
        shutil.rmtree(folder)


def measure_pixels(flowers: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Yield seconds an epoch with everything unfrozen, from stored pixels and from files."""
    name, count = "resnet18", 160
    folder = copies(flowers, work / "pixels", count)
    bench = FeatureCache(open_dataset(folder), BackboneSpec(name, random_init=0), Settings(work / "pixels.cache"))
    entry = bench.extracted("input")
    features, reader = entry.store.labelled(), entry.store.reader()
    sides: dict[str, Callable[[], float]] = {}
    for precision in PRECISIONS:
        plain = Plain(name, folder, lambda _: True, precision)
        ours = Ours(bench.backbone, "all", "input", reader.take, features.y, 1, precision)
        sides |= {
            f"files0 {precision}": partial(plain.from_files, 0),
            f"files2 {precision}": partial(plain.from_files, 2),
            f"cached {precision}": lambda ours=ours: ours.epochs()[0],
        }
    yield {"kind": "pixels", "row": f"{name}, all", "images": count, "seconds": by_turns(sides)}


def measure_sweep(small: Path, work: Path) -> Iterator[dict[str, Any]]:
    """Yield the seconds of a sweep of all depths, and of one run for each of them with a cache of its own."""
    folder = copies(small, work / "sweep", 600)
    spec = BackboneSpec("resnet18", random_init=0, overrides=TransformOverrides(input_size=64))
    plan = FineTunePlan(Unfreeze.parse("all"), epochs=3, patience=3)

    def bench(name: str) -> FeatureCache:
        ready = FeatureCache(open_dataset(folder), spec, Settings(work / name))
        _ = ready.backbone
        return ready

    start = time.perf_counter()
    jobs = run_sweep(FineTuneInputs(bench("together")), plan).jobs
    together = time.perf_counter() - start
    apart = []
    for wish in depths(len(bench("none").backbone.stages)):
        start = time.perf_counter()
        run_finetune(FineTuneInputs(bench(f"apart-{wish.text.replace(':', '')}")), replace(plan, unfreeze=wish))
        apart.append(time.perf_counter() - start)
    methods = [job.record.method for job in jobs]
    yield {
        "kind": "sweep",
        "row": "resnet18 at 64 px",
        "images": 600,
        "together": together,
        "apart": apart,
        "depths": methods,
    }


def by_turns(sides: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Return each side's median seconds over some rounds, after one that warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, act in sides.items():
            seconds = act()
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(several) for name, several in found.items()}


def best_files(seconds: dict[str, float], precision: str) -> float:
    """Return the plain loop's seconds from files, with or without worker processes."""
    return min(seconds[f"files0 {precision}"], seconds[f"files2 {precision}"])


def table(records: list[dict[str, Any]]) -> str:
    """Return the records as Markdown."""
    heads = (
        "backbone, trained",
        "plain loop in",
        "featcache in",
        "plain, tensors",
        "plain, files",
        "featcache",
        "from memory",
        "tensors over featcache",
        "files over featcache",
        "ten epochs with extraction, over tensors",
        "over files",
    )
    cores = workers_here().count
    lines = [
        "# Fine-tuning's speed",
        "",
        "`python benchmarks/speed/finetune.py`; seconds an epoch at 224 px, batches of 32; the plain loop runs the frozen",
        f"part in every epoch. Ratios are of one run, side by side; absolute figures are those of {cores} shared cores.",
        "featcache trains in float32 on CPUs unless `--train-precision` says otherwise.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
    ]
    for record in (one for one in records if one["kind"] == "epochs"):
        seconds = record["seconds"]
        for theirs, own in PAIRS:
            tensors, files = seconds[f"tensors {theirs}"], best_files(seconds, theirs)
            cached, ten = seconds[f"cached {own}"], record["ten_epochs"][own]
            cells = (
                record["row"],
                theirs,
                own,
                f"{tensors:.2f}",
                f"{files:.2f}",
                f"{cached:.2f}",
                f"{seconds[f'memory {own}']:.2f}",
                f"{tensors / cached:.2f}",
                f"{files / cached:.2f}",
                f"{(record['decoding'] + EPOCHS * tensors) / ten:.2f}",
                f"{EPOCHS * files / ten:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    for record in records:
        if record["kind"] == "pixels":
            lines += [
                "",
                "| backbone, trained | plain loop in | featcache in | plain, files | featcache, pixels | files over it |",
                "|---|---|---|---|---|---|",
            ]
            for theirs, own in PAIRS:
                files, cached = best_files(record["seconds"], theirs), record["seconds"][f"cached {own}"]
                numbers = f"{files:.2f} | {cached:.2f} | {files / cached:.2f}"
                lines.append(f"| {record['row']} | {theirs} | {own} | {numbers} |")
        if record["kind"] == "sweep":
            apart = sum(record["apart"])
            lines += [
                "",
                (
                    f"Sweep of {len(record['apart'])} depths, {record['row']}, {record['images']} images: "
                    f"{record['together']:.0f} s; separate runs {apart:.0f} s: {record['together'] / apart:.2f} of them."
                ),
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write records and table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("flowers", "small"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", choices=["epochs", "pixels", "sweep", "table"], action="append")
    parser.add_argument("--row", default="", help="Only backbones whose name holds this text.")
    options = parser.parse_args()
    set_up_notes(quiet=True, verbose=False)
    path = HERE / "finetune.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        steps = {
            "epochs": lambda: measure_epochs(options.flowers, work, options.row),
            "pixels": lambda: measure_pixels(options.flowers, work),
            "sweep": lambda: measure_sweep(options.small, work),
            "table": lambda: iter(()),
        }
        for step in options.only or ["epochs", "pixels", "sweep"]:
            for record in steps[step]():
                kept = [old for old in kept if (old["kind"], old["row"]) != (record["kind"], record["row"])]
                kept.append(record)
                print(json.dumps(record), flush=True)
                path.write_text("".join(f"{json.dumps(one)}\n" for one in kept))
    (HERE / "finetune.md").write_text(table(kept))
    print((HERE / "finetune.md").read_text())


if __name__ == "__main__":
    main()
