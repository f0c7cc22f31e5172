"""Step 1 of making ``mini``: seeded views of TinyImageNet and what the teacher sees in them.

    python pipelines/mini/teach.py DATA TEACHER.safetensors WORK

DATA is the unpacked ``tinyimagenet-40k`` folder. For each training image V views are drawn (a crop, a flip,
and for some a loss of resolution). The same view goes to the teacher (a pretrained mobilenetv2_100, enlarged to 128 px)
and, at 64 px, to the student: a student learns more from a teacher that looks at the very same crop
(Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent", section 3).

Writes WORK/views.npy (n*V, 64, 64, 3) uint8, WORK/targets.npy (n*V, 1280) float16, the teacher's pooled
embeddings, WORK/labels.npy (n,) int64.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

STUDENT_PX = 64
TEACHER_PX = 128
LOW_RESOLUTION_SHARE = 0.4  # of the views, so that thumbnails are not foreign to the student


def draw_view(image: Image.Image, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """Return one random view of an image, for the student and for the teacher."""
    width, height = image.size
    area = rng.uniform(0.4, 1.0)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_width = min(width, width * np.sqrt(area * ratio))
    crop_height = min(height, height * np.sqrt(area / ratio))
    left = rng.uniform(0, width - crop_width)
    top = rng.uniform(0, height - crop_height)
    box: tuple[float, float, float, float] | None = (left, top, left + crop_width, top + crop_height)
    if rng.random() < LOW_RESOLUTION_SHARE:
        px = int(rng.integers(24, 48))
        image, box = image.resize((px, px), Image.Resampling.BICUBIC, box=box), None
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if box is not None:
            box = (image.width - box[2], box[1], image.width - box[0], box[3])
    student = image.resize((STUDENT_PX, STUDENT_PX), Image.Resampling.BICUBIC, box=box)
    teacher = image.resize((TEACHER_PX, TEACHER_PX), Image.Resampling.BICUBIC, box=box)
    return student, teacher


def load_teacher(weights: Path, device: torch.device) -> torch.nn.Module:
    """Return the pretrained mobilenetv2_100 without its classifier."""
    teacher = timm.create_model("mobilenetv2_100", checkpoint_path=str(weights), pad_type="same")
    teacher.reset_classifier(0)
    return teacher.eval().to(device, memory_format=torch.channels_last)


def main() -> None:
    """Draw the views and run the teacher over them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = load_teacher(args.teacher, device)
    classes = sorted(folder.name for folder in (args.data / "train").iterdir())
    files = [(file, label) for label, name in enumerate(classes) for file in sorted((args.data / "train" / name).iterdir())]
    args.work.mkdir(parents=True, exist_ok=True)
    rows = len(files) * args.views
    views = np.lib.format.open_memmap(
        args.work / "views.npy", mode="w+", dtype=np.uint8, shape=(rows, STUDENT_PX, STUDENT_PX, 3)
    )
    targets = np.lib.format.open_memmap(args.work / "targets.npy", mode="w+", dtype=np.float16, shape=(rows, 1280))
    np.save(args.work / "labels.npy", np.array([label for _, label in files], dtype=np.int64))

    def draw(row: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        image = Image.open(files[row // args.views][0]).convert("RGB")
        student, teacher_view = draw_view(image, np.random.default_rng((args.seed, row)))
        return np.asarray(student), np.asarray(teacher_view)

    batch = 128
    with ThreadPoolExecutor(2) as pool, torch.inference_mode():
        for start in tqdm(range(0, rows, batch)):
            pairs = list(pool.map(draw, range(start, min(start + batch, rows))))
            views[start : start + len(pairs)] = np.stack([pair[0] for pair in pairs])
            pixels = torch.from_numpy(np.stack([pair[1] for pair in pairs])).to(device).permute(0, 3, 1, 2)
            embedding = teacher(pixels.float().div(127.5).sub(1))
            targets[start : start + len(pairs)] = embedding.half().cpu().numpy()
    views.flush()
    targets.flush()


if __name__ == "__main__":
    main()
