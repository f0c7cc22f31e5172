"""Search, refit and test: it equals training without a cache, and what validation cannot tell apart decides nothing."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from finetune_support import GAINS, PLAN, Prepared, tuned
from numpy.typing import NDArray
from test_loop import epochs
from torch.nn import Parameter

from featcache.evaluation.metrics import score
from featcache.extraction.feature_cache import Settings
from featcache.finetuning.finetuner import FineTuned, between, is_gain, not_worse
from featcache.finetuning.loop import Trained, noise, predict
from featcache.specs import BackboneSpec


def parameters_of(tuned: FineTuned) -> Iterator[Parameter]:
    """Return the weights of the whole network, the frozen ones too."""
    return tuned.network.backbone.module.parameters()


def test_the_cache_gives_the_same_losses_as_recomputing(prepared: Prepared) -> None:
    """Trained from float32 activations or with the frozen part run again each time: the same losses, the same weights."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    run = prepared.backbone.runner("layer3")

    cached = prepared.tune("layer3", stored.take)
    recomputed = prepared.tune("layer3", lambda index: run(prepared.pixels.take(index)))

    losses = [[epoch.train_loss for epoch in tuned.history[1:]] for tuned in (cached, recomputed)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for first, second in zip(parameters_of(cached), parameters_of(recomputed), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_a_step_from_the_cache_is_a_step_of_the_whole_model(prepared: Prepared) -> None:
    """The whole network from pixels, its frozen part without gradients, ends with the same weights."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()

    cached = prepared.tune("layer3", stored.take)
    whole = prepared.tune("input", prepared.pixels.take)

    for first, second in zip(parameters_of(cached), parameters_of(whole), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_frozen_weights_and_batchnorm_statistics_stay(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Only the thawed stage's parameters move; no running statistic does, unless asked."""
    prepared = Prepared(subtle, tiny, settings)
    tuned = prepared.tune("input", prepared.pixels.take, GAINS)

    before, after = prepared.backbone.module.state_dict(), tuned.network.backbone.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("layer4") for name in moved)
    assert not any("running" in name for name in moved)


def test_ruinous_training_ends_as_the_probe(prepared: Prepared) -> None:
    """Where no epoch is better than the probe, the probe is the result, on the untouched backbone."""
    stored = prepared.bench.extracted("layer3").store.reader()
    tuned = prepared.tune("layer3", stored.take, replace(PLAN, lr=(30.0,), head_lr=30.0, patience=1))

    if tuned.best == 0:
        for first, second in zip(parameters_of(tuned), prepared.backbone.module.parameters(), strict=True):
            torch.testing.assert_close(first, second)
    assert tuned.history[tuned.best].val.accuracy == max(epoch.val.accuracy for epoch in tuned.history)


def test_the_rate_is_chosen_on_validation(prepared: Prepared) -> None:
    """Of several rates the one with the best epoch on validation is kept, and tried from the same start."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()

    def tune(*rates: float) -> FineTuned:
        return prepared.tune("layer3", stored.take, replace(PLAN, lr=rates))

    both, first, second = tune(1e-6, 1e-2), tune(1e-6), tune(1e-2)

    assert both.rates == first.rates | second.rates
    kept = {1e-6: first, 1e-2: second}[both.lr]
    assert [epoch.val for epoch in both.history] == [epoch.val for epoch in kept.history]
    assert both.history[both.best].val.accuracy == max(both.rates.values())


def test_a_rate_that_diverges_is_left(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    """Its losses are no numbers: the other rates go on, and where none is left, the probe is the answer."""
    plan = replace(PLAN, epochs=3, label_smoothing=0.0)
    alone, both, none = (tuned(prepared, replace(plan, lr=lr)) for lr in ((1e-2,), (1e20, 1e-2), (1e20,)))

    assert "At rate 1e+20 training diverged in epoch 1" in caplog.text
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=0)
    torch.testing.assert_close(none["head.weight"], torch.from_numpy(prepared.probe.weights).float())


def test_weights_go_as_far_as_validation_says(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Of four places on the way the best is kept, told by its share and scores; never worse than the start."""
    prepared = Prepared(subtle, tiny, settings)
    result = prepared.tune("input", prepared.pixels.take, replace(GAINS, refit=False))

    start, val = result.history[0], prepared.split.val
    now = score(prepared.features.y[val], predict(result.network.model, prepared.pixels.take, val, 8))
    assert result.best > 0
    assert 0 < result.share <= 1
    assert now.accuracy == result.val.accuracy >= start.val.accuracy
    assert now.log_loss == pytest.approx(result.val.log_loss, rel=1e-4)


def test_what_is_between_two_states() -> None:
    """Numbers are in between, what is counted is as at the end; the end itself is taken as it is."""
    start = {"weight": torch.zeros(2), "count": torch.tensor(0)}
    end = {"weight": torch.tensor([1.0, 4.0]), "count": torch.tensor(7)}

    halfway = between(start, end, 0.5)

    assert halfway["weight"].tolist() == [0.5, 2.0]
    assert halfway["count"] == 7
    assert between(start, end, 1.0) == end


@pytest.mark.parametrize(
    ("accuracy", "loss", "expected"), [(0.93, 0.9, True), (0.91, 0.4, False), (0.90, 0.2, True), (0.89, 0.1, False)]
)
def test_a_gain_is_more_than_an_image(accuracy: float, loss: float, *, expected: bool) -> None:
    """By more than a standard error of 200 images, or as accurate and surer."""
    (start,) = epochs((0.90, 0.3))

    assert is_gain(accuracy, loss, start, 200) is expected


def test_batchnorm_is_tried_live_at_the_best_rate(prepared: Prepared) -> None:
    """One trial more, which is told apart from the others; it is kept where it does better, and a kill costs no trial."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    plan = replace(GAINS, lr=(1e-6, 1e-3))

    usual, result = (prepared.tune("layer3", stored.take, plan, tries_live=live) for live in (False, True))

    (extra,) = set(result.rates) - set(usual.rates)
    assert extra in {"1e-06 with live BatchNorm", "0.001 with live BatchNorm"}
    assert {name: result.rates[name] for name in usual.rates} == usual.rates
    assert result.val.accuracy >= usual.val.accuracy - noise(usual.val.accuracy, len(prepared.split.val))
    moved = [
        name
        for name, value in prepared.backbone.module.state_dict().items()
        if "running" in name and not torch.equal(value, result.network.backbone.module.state_dict()[name])
    ]
    assert bool(moved) is result.live


def test_live_batchnorm_starts_from_settled_statistics(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another scale than the old statistics know are told apart after one epoch as well as before."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    plan = replace(GAINS, epochs=1, lr=(1e-6,), head_lr=1e-6, train_batchnorm=True)

    def take(index: NDArray[np.int64]) -> NDArray[np.float32]:
        return np.asarray(stored.take(index) * 8 + 1, np.float32)

    settled = prepared.tune("layer3", take, plan).history[1]
    monkeypatch.setattr("featcache.finetuning.finetuner.settle_batchnorm", lambda *_: False)
    unsettled = prepared.tune("layer3", take, plan).history[1]

    assert settled.val.accuracy > unsettled.val.accuracy
    assert settled.scaled_loss < 0.5 * unsettled.scaled_loss


@pytest.mark.parametrize("lr", [1e-2, 0.3])
def test_a_refit_is_never_worse_on_what_it_has_seen(prepared: Prepared, lr: float) -> None:
    """The last training has no judge but the validation images: it is kept where it knows them as well, but for noise."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    plan = replace(PLAN, lr=(lr,), epochs=4, patience=4)
    result = prepared.tune("layer3", stored.take, plan)

    val = prepared.split.val
    now = score(prepared.features.y[val], predict(result.network.model, stored.take, val, 8))
    chosen = result.history[result.best].val.accuracy
    assert result.best == 0 or now.accuracy >= chosen - noise(chosen, len(val))
    assert result.best > 0 or not result.refitted


@pytest.mark.parametrize(
    ("bests", "expected"),
    [
        ([(1, 0.960, 0.3), (1, 0.965, 0.2), (1, 0.962, 0.1)], 2),  # none can be told apart: the loss
        ([(1, 0.900, 0.0), (1, 0.965, 0.2), (1, 0.962, 0.3)], 1),  # the first can
        ([(0, 0.965, 0.0), (1, 0.965, 0.2), (0, 0.965, 0.0)], 1),  # only one gained
        ([(0, 0.965, 0.1), (0, 0.965, 0.1)], 0),
        ([(1, 0.960, 0.2), (1, 0.960, 0.2)], 0),
    ],
)
def test_the_rate_of_lowest_loss_among_those_that_cannot_be_told_apart(
    bests: list[tuple[int, float, float]], expected: int
) -> None:
    """Whatever order the rates come in, and though only those that may still win are kept on the way."""
    trials = []
    for number, accuracy, loss in bests:
        best = replace(epochs((accuracy, loss))[0], number=number)
        trials.append(Trained(float(len(trials)), (best,), best, {}, 0.0))

    left: list[Trained] = []
    for trial in trials:
        left = not_worse([*left, trial], 287)

    assert min(left, key=lambda trial: trial.best.scaled_loss).lr == expected
    assert min(not_worse(trials, 287), key=lambda trial: trial.best.scaled_loss).lr == expected
