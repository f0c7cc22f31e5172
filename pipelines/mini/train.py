"""Step 2 of making ``mini``: train the student on the views and the teacher's embeddings.

    python pipelines/mini/train.py WORK --steps 7000 --out featcache/assets/mini.safetensors

The student's pooled features are mapped linearly to the teacher's standardised embedding (mean squared error)
and to the 200 TinyImageNet classes (cross-entropy). The learning rate warms up, stays, and falls linearly to zero over the
last part ("warm-up, stable, decay"; Hu et al. 2024, "MiniCPM", section 4), so that a run can be resumed with
another number of steps. Every 500 steps a checkpoint is written; the same command resumes it.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

ARCHITECTURE = "resnet26"
MODEL_ARGS: dict[str, Any] = {
    "layers": [1, 2, 2, 2],
    "channels": [32, 64, 88, 120],
    "stem_type": "deep",
    "stem_width": 16,
    "avg_down": True,
    "output_stride": 16,
}
EMBEDDING_WEIGHT = 1.0
LABEL_WEIGHT = 0.5
SAVE_EVERY = 500


@dataclass
class Corpus:
    """Views (n*v, 64, 64, 3) uint8, their targets (n*v, 1280) float16 and the images' labels (n,)."""

    views: NDArray[np.uint8]
    targets: NDArray[np.float16]
    labels: NDArray[np.int64]

    @classmethod
    def load(cls, work: Path) -> "Corpus":
        """Read what step 1 wrote into memory."""
        return cls(np.load(work / "views.npy"), np.load(work / "targets.npy"), np.load(work / "labels.npy"))

    def batch(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Return pixels, targets and labels of some views."""
        views_per_image = len(self.views) // len(self.labels)
        return (
            torch.from_numpy(self.views[rows]).permute(0, 3, 1, 2),
            torch.from_numpy(self.targets[rows]).float(),
            torch.from_numpy(self.labels[rows // views_per_image]),
        )


@dataclass(frozen=True)
class Stats:
    """Mean and spread of each dimension of the teacher's embedding."""

    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, targets: NDArray[np.float16], device: torch.device) -> "Stats":
        """Measure some 20,000 of the targets."""
        sample = targets[:: max(1, len(targets) // 20000)].astype(np.float32)
        return cls(torch.from_numpy(sample.mean(0)).to(device), torch.from_numpy(sample.std(0) + 1e-2).to(device))


class Seed(NamedTuple):
    """What decides a step's images."""

    run: int
    step: int
    batch: int


class Losses(NamedTuple):
    """The two parts of the loss."""

    distance: float
    surprise: float


class Student(nn.Module):
    """The backbone with one linear map to the teacher's embedding and one to the classes."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.backbone = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS)
        width = self.backbone.num_features
        self.to_teacher = nn.Linear(width, 1280)
        self.to_class = nn.Linear(width, classes)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the predicted embedding (b, 1280) and the logits (b, classes)."""
        features = self.backbone(pixels)
        return self.to_teacher(features), self.to_class(features)


def jitter(pixels: Tensor, rng: torch.Generator) -> Tensor:
    """Flip half of the images and vary brightness and contrast a little; uint8 in, float in [-1, 1] out."""
    count = len(pixels)
    draw = torch.rand(3, count, 1, 1, 1, generator=rng).to(pixels.device)
    images = torch.where(draw[0] < 0.5, pixels, pixels.flip(3)).float().div(127.5).sub(1)
    return images * (0.8 + 0.4 * draw[1]) + (draw[2] - 0.5) * 0.4


def rate(step: int, steps: int, *, peak: float, warmup: int, decay: float) -> float:
    """Return the learning rate of a step."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def evaluate(student: Student, data: Path, device: torch.device) -> float:
    """Return the accuracy on TinyImageNet's held-out images, plain transform."""
    from PIL import Image

    classes = sorted(folder.name for folder in (data / "test").iterdir())
    files = [(file, k) for k, name in enumerate(classes) for file in sorted((data / "test" / name).iterdir())]
    student.eval()
    right = 0
    with torch.inference_mode():
        for start in range(0, len(files), 500):
            part = files[start : start + 500]
            pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in part])
            images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float().div(127.5).sub(1)
            guess = student(images)[1].argmax(1).cpu()
            right += int((guess == torch.tensor([k for _, k in part])).sum())
    student.train()
    return right / len(files)


def export(student: Student, out: Path) -> None:
    """Write the backbone in half precision."""
    state = {
        name: value.half().contiguous() if value.is_floating_point() else value.contiguous()
        for name, value in student.backbone.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, out, metadata={"architecture": ARCHITECTURE, "model_args": json.dumps(MODEL_ARGS), "card": "MINI.md"})


def step_once(student: Student, optimiser: torch.optim.Optimizer, corpus: Corpus, stats: Stats, seed: Seed) -> Losses:
    """Take one optimisation step; return the distance to the teacher and the cross-entropy."""
    rows = np.random.default_rng((seed.run, seed.step)).integers(0, len(corpus.views), seed.batch)
    pixels, target, label = (part.to(stats.mean.device) for part in corpus.batch(rows))
    images = jitter(pixels, torch.Generator().manual_seed(seed.run * 10**6 + seed.step))
    embedding, logits = student(images.contiguous(memory_format=torch.channels_last))
    distance = F.mse_loss(embedding, (target - stats.mean) / stats.std)
    surprise = F.cross_entropy(logits, label, label_smoothing=0.1)
    (EMBEDDING_WEIGHT * distance + LABEL_WEIGHT * surprise).backward()
    nn.utils.clip_grad_norm_(student.parameters(), 5.0)
    optimiser.step()
    optimiser.zero_grad()
    return Losses(distance.item(), surprise.item())


def main() -> None:
    """Train, logging one JSON line every 100 steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, help="the unpacked tinyimagenet-40k, for the held-out accuracy")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    corpus = Corpus.load(args.work)
    stats = Stats.of(corpus.targets, device)
    student = Student(int(corpus.labels.max()) + 1).to(device, memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(student.parameters(), lr=args.peak, weight_decay=0.05)
    first = resume(args.work / "checkpoint.pt", student, optimiser)
    started, seen = time.monotonic(), np.zeros(2)
    with (args.work / "log.jsonl").open("a") as log:
        for step in range(first, args.steps):
            lr = rate(step, args.steps, peak=args.peak, warmup=300, decay=args.decay)
            for group in optimiser.param_groups:
                group["lr"] = lr
            seen += step_once(student, optimiser, corpus, stats, Seed(args.seed, step, args.batch))
            if (step + 1) % 100 == 0:
                line: dict[str, Any] = {"step": step + 1, "lr": lr, "distance": seen[0] / 100, "surprise": seen[1] / 100}
                line["images_per_second"] = 100 * args.batch / (time.monotonic() - started)
                if args.data and (step + 1) % (2 * SAVE_EVERY) == 0:
                    line["held_out_accuracy"] = evaluate(student, args.data, device)
                started, seen = time.monotonic(), np.zeros(2)
                print(json.dumps(line), file=log, flush=True)
                print(json.dumps(line), flush=True)
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.steps:
                save(args.work / "checkpoint.pt", student, optimiser, step + 1)
    if args.out:
        export(student, args.out)


def resume(path: Path, student: Student, optimiser: torch.optim.Optimizer) -> int:
    """Load a checkpoint where there is one; return the step to go on from."""
    if not path.exists():
        return 0
    saved = torch.load(path, weights_only=True)
    student.load_state_dict(saved["student"])
    optimiser.load_state_dict(saved["optimiser"])
    return int(saved["step"])


def save(path: Path, student: Student, optimiser: torch.optim.Optimizer, step: int) -> None:
    """Write a checkpoint, whole or not at all."""
    state = {"student": student.state_dict(), "optimiser": optimiser.state_dict(), "step": step}
    torch.save(state, path.with_name(f"{path.name}.tmp"))
    path.with_name(f"{path.name}.tmp").replace(path)


if __name__ == "__main__":
    main()
