"""One trial: every option of a step, which epoch is kept, and that a killed training goes on exactly."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import PLAN, KilledError, Prepared, epochs_of, moved, tuned
from torch import Tensor

from featcache.display import Progress
from featcache.evaluation.metrics import Scores
from featcache.extraction.feature_cache import Settings
from featcache.finetuning.finetuner import Checkpoint
from featcache.finetuning.loop import Epoch, ProcessGroup, TrainContext, Trial, kept, noise
from featcache.finetuning.model import SuffixAndHead
from featcache.specs import BackboneSpec

UNBROKEN: dict[bool, dict[str, Tensor]] = {}  # weights, by whether there is a refit


@pytest.mark.parametrize("reads", [1, 4, 9, 14])
@pytest.mark.parametrize("refit", [True, False])
def test_a_broken_training_goes_on_exactly(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int, *, refit: bool
) -> None:
    """Killed after so many reads, then run again: the same weights, bit for bit, as without a break."""
    monkeypatch.setattr("featcache.finetuning.loop._SAVE_SECONDS", 0.0)
    plan = replace(PLAN, lr=(1e-3, 1e-2), refit=refit, mixup=0.2, ema=0.9, optimiser="adamw")
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    checkpoint = Checkpoint(tmp_path / "state")
    if refit not in UNBROKEN:
        UNBROKEN[refit] = tuned(prepared, plan)
    expected = UNBROKEN[refit]
    left = reads

    def take(index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return stored.take(index)

    for _ in range(40):
        left = reads + 8
        try:
            got = tuned(prepared, plan, checkpoint, take)
            break
        except KilledError:
            continue
    else:
        pytest.fail("it does not come to an end")

    assert not moved(expected, got)
    trained = epochs_of(monkeypatch)
    assert not moved(expected, tuned(prepared, plan, checkpoint))
    assert trained == []
    checkpoint.clear()
    assert not list(tmp_path.glob("state*"))


def test_accumulated_batches_are_one_step(prepared: Prepared) -> None:
    """Two batches of four move the weights as one of eight."""
    whole = tuned(prepared, replace(PLAN, epochs=2))
    halves = tuned(prepared, replace(PLAN, epochs=2, batch_size=4, accumulate=2))

    for name, value in whole.items():
        torch.testing.assert_close(halves[name], value, rtol=1e-4, atol=1e-5)


def test_averaged_weights_lag_behind(prepared: Prepared) -> None:
    """With a slow average the result stays nearer to the start than without."""
    before = prepared.backbone.module.state_dict()
    plan = replace(PLAN, epochs=2, patience=2, refit=False)

    def way(after: dict[str, Tensor]) -> float:
        names = [name for name in before if name.startswith("layer4.") and "conv" in name]
        return sum(float((after[name] - before[name]).norm()) for name in names)

    slow, plain = way(tuned(prepared, replace(plan, ema=0.99))), way(tuned(prepared, plan))

    assert slow < 0.5 * plain or plain == 0


def test_clipping_bounds_the_step(prepared: Prepared) -> None:
    """One epoch of plain descent at rate 1 moves at most the clip times its steps."""
    before = prepared.backbone.module.state_dict() | {"head.weight": torch.from_numpy(prepared.probe.weights).float()}
    plan = replace(PLAN, epochs=1, optimiser="sgd", lr=(1.0,), head_lr=1.0, layer_decay=1.0, weight_decay=0.0, warmup=0.0)

    after = tuned(prepared, replace(plan, clip=1e-4, refit=False))

    steps = -(-len(prepared.split.train) // plan.batch_size)
    way = float(sum((after[name] - before[name]).double().square().sum() for name in moved(before, after)) ** 0.5)
    assert way <= 1e-4 * sum(0.9**power for power in range(steps)) * steps * 1.01


def test_every_epoch_draws_views_and_validation_looks_at_the_plain_one(folder: Path, tiny: BackboneSpec) -> None:
    """Training reads any view, validation and test only the first."""
    prepared = Prepared(folder, tiny, Settings(folder.parent / "cache", batch_size=8))
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    plan = replace(PLAN, views=3, epochs=2, patience=2, refit=False)
    seen: list[np.ndarray[Any, Any]] = []

    def take(index: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen.append(index)
        return stored.take(index // 3)

    tuned(prepared, plan, take=take)

    train = set(prepared.split.train)
    rows = np.concatenate([index for index in seen if set(index // 3) <= train])
    rest = np.concatenate([index for index in seen if not set(index // 3) & train])
    assert set(rows % 3) == {0, 1, 2}
    assert set(rest % 3) == {0}


def epochs(*judged: tuple[float, float]) -> list[Epoch]:
    """Return a history of accuracies and scaled losses, the start first."""
    return [
        Epoch(number, 0.0, Scores(accuracy, None, accuracy, accuracy, loss, None), 0.0, scaled_loss=loss)
        for number, (accuracy, loss) in enumerate(judged)
    ]


@pytest.mark.parametrize(
    ("judged", "expected"),
    [
        ([(0.965, 0.2), (0.972, 0.3), (0.972, 0.3), (0.969, 0.3)], 3),  # one of 287 images does not decide
        ([(0.965, 0.2), (0.969, 0.3), (0.969, 0.3), (0.972, 0.3)], 3),
        ([(0.965, 0.2), (0.990, 0.3), (0.970, 0.3)], 1),  # two standard errors do
        ([(0.965, 0.2), (0.972, 0.1), (0.962, 0.1)], 1),  # not below the start
        ([(0.965, 0.2), (0.965, 0.1), (0.965, 0.3)], 1),  # as accurate: the loss decides against the start
        ([(0.965, 0.2), (0.965, 0.2), (0.960, 0.1)], 0),
        ([(1.0, 0.0), (1.0, 0.0)], 0),
        ([(0.965, 0.2)], 0),
    ],
)
def test_the_latest_epoch_that_cannot_be_told_from_the_best(judged: list[tuple[float, float]], expected: int) -> None:
    """The one-standard-error rule; an epoch that is not better than the start is none."""
    assert kept(epochs(*judged), 287) == expected


def test_what_is_kept_on_the_way_is_what_is_kept_at_the_end() -> None:
    """Weights are kept of one epoch at a time: the last one that was to keep when it came is the one to keep in the end."""
    rng = np.random.default_rng(0)
    for _ in range(500):
        images = int(rng.integers(3, 60))
        accuracies = rng.integers(images // 2, images + 1, 9) / images
        history = epochs(*zip(accuracies.tolist(), rng.random(9).tolist(), strict=True))
        on_the_way = 0
        for count in range(2, 10):
            if kept(history[:count], images) == count - 1:
                on_the_way = count - 1
        assert on_the_way == kept(history, images)


def test_noise_is_a_standard_error_of_at_least_one_image() -> None:
    """Also where every answer is right, and of few images."""
    assert noise(0.5, 100) == pytest.approx(0.05)
    assert noise(1.0, 287) == pytest.approx(1 / 287, rel=0.01)
    assert noise(1.0, 5) == pytest.approx(0.2)


def test_a_shorter_training_has_a_schedule_of_its_own(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Two of five epochs end as a training of two epochs does: with a rate of zero, and the same weights."""
    prepared = Prepared(folder, tiny, settings)
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    ends = []
    for plan, count in ((replace(PLAN, epochs=5), 2), (replace(PLAN, epochs=2), None)):
        own = prepared.backbone.separate()
        model = SuffixAndHead(own.suffix("layer3"), prepared.probe)
        stages = (tuple(model.suffix.parameters()),)
        job = TrainContext(model, stages, stored.take, prepared.features.y, plan, ProcessGroup(), 0, "float32")
        val, loss = job.validate(prepared.split.val)
        start = Epoch(0, None, val, 0.0, scaled_loss=loss)
        trial = Trial(job, 1e-3, prepared.split.train_val, None, start, epochs=count)
        trained = trial.run(Progress(1, "", ""), lambda _: None)
        assert trained.best.number == 2
        assert max(group["lr"] for group in trial.state()["optimiser"]["param_groups"]) < 1e-8
        ends.append(trained.state)

    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=0, atol=0)
