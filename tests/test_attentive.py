"""Attention trained on stored tokens: it finds what averages hide, starts as the probe, and goes on where it was killed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetune_support import KilledError
from numpy.typing import NDArray

import featcache
from featcache.backbones.attention import FORMS, LatentPooling, scale_of
from featcache.backbones.pooling import Layout, Pooling
from featcache.evaluation.metrics import score
from featcache.evaluation.splits import Fold, Split
from featcache.experiments.fit import FitPlan
from featcache.extraction.feature_cache import Settings
from featcache.finetuning import attentive
from featcache.finetuning.attentive import AttentionSpec, AttentiveTraining, Probe
from featcache.finetuning.finetuner import Checkpoint
from featcache.finetuning.model import LinearHead
from featcache.heads import ATTENTIVE
from featcache.heads.linear import linear_weights
from featcache.heads.search import search_head, train
from featcache.specs import BackboneSpec, Pool, TransformOverrides

MAP = Layout(4, 1)
DISTILLED = Layout(3, 2, 2, class_token=True)
VIT = BackboneSpec(
    "vit_tiny_patch16_224",
    random_init=0,
    model_args=(("depth", 2), ("img_size", 32), ("patch_size", 8)),
    overrides=TransformOverrides(input_size=32),
)


pytestmark = pytest.mark.usefixtures("one_thread")


def planted(count: int, side: int = 24, channels: int = 8, seed: int = 0) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
    """Return maps of noise (n, c, side, side), each with one patch somewhere that stands out and tells the class."""
    rng = np.random.default_rng(seed)
    y, where = rng.integers(0, 2, count), rng.integers(0, side * side, count)
    X = rng.normal(size=(count, channels, side * side))
    X[np.arange(count), 0, where] += 6
    X[np.arange(count), 1, where] += np.where(y, 6, -6)
    return X.reshape(count, channels, side, side).astype(np.float16), y.astype(np.int64)


def training_of(
    form: str,
    X: NDArray[Any],
    y: NDArray[np.int64],
    *,
    layout: Layout = MAP,
    pool: Pool = "avg",
    checkpoint: Callable[[str], Checkpoint] = lambda _: Checkpoint(None),
    folds: int = 0,
) -> tuple[AttentiveTraining, Any]:
    """Return a training on half of the images, chosen on a fifth, and the probe that was refitted on both."""
    ends = [len(y) // 2, len(y) * 7 // 10, len(y)]
    parts = np.split(np.arange(len(y)), ends[:2])
    both = np.arange(ends[1])
    cross = tuple(Fold(both[both % folds != fold], both[both % folds == fold]) for fold in range(folds))
    split = Split(*parts, cross=cross)
    pooled = Pooling(pool, layout)(torch.from_numpy(X).float()).numpy()
    params = search_head("logistic", pooled, y, split.folds, 0).params

    def fitted(images: NDArray[np.int64]) -> Any:
        return train("logistic", params, pooled[images], y[images], 0)

    heads = [fitted(images) for images in (parts[0], both, *(fold.train for fold in cross))]
    on_train, refitted, *on_folds = (LinearHead(*linear_weights(head, int(y.max()) + 1)) for head in heads)
    probe = Probe(pool, on_train, refitted, tuple(on_folds))
    return AttentiveTraining(
        form, layout, lambda index: X[index], y, split, probe, 0, torch.device("cpu"), checkpoint
    ), heads


@pytest.mark.parametrize("form", ATTENTIVE)
@pytest.mark.parametrize("is_training", [False, True])
def test_what_is_masked_is_not_attended_to(form: str, is_training: bool) -> None:  # noqa: FBT001
    """Whatever fills rows up changes neither answers nor gradients, in training too; an unmasked token changes both."""
    layout, rng = Layout(3, 2, class_token=True, masked=True), np.random.default_rng(0)
    rows = torch.from_numpy(rng.normal(size=(6, 9, 9)).astype(np.float32))
    rows[..., -1] = torch.arange(9) < torch.tensor([1, 2, 4, 5, 8, 9])[:, None]
    filled, changed = rows.clone(), rows.clone()
    filled[..., :-1] += 1000 * (rows[..., -1:] == 0)
    changed[:, 0, :-1] += 1
    pool = FORMS[form](layout, 8, 4, torch.ones(8)).train(is_training)
    with torch.no_grad():
        next(iter(pool.parameters())).normal_(generator=torch.Generator().manual_seed(0))

    def answered(these: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        pool.zero_grad()
        vectors = pool(these)
        vectors.square().sum().backward()
        return vectors.detach(), torch.cat([each.grad.flatten() for each in pool.parameters() if each.grad is not None])

    for plain, same in zip(answered(rows), answered(filled), strict=True):
        torch.testing.assert_close(same, plain)
    assert not torch.allclose(answered(changed)[0], answered(rows)[0])
    torch.testing.assert_close(scale_of(layout, filled), scale_of(layout, rows))


@pytest.mark.parametrize("masked", [False, True])
def test_the_latent_query_pools_as_timm_does(masked: bool) -> None:  # noqa: FBT001
    """The order of products changes neither vectors nor gradients, with a mask or without."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 9, 12 + masked, generator=generator, dtype=torch.float64)
    if masked:
        rows[..., -1] = torch.arange(9) < torch.tensor([1, 2, 4, 5, 8, 9])[:, None]
    layout = Layout(3, 2, masked=masked)
    pooling = FORMS["attentive-latent"](layout, 12, 4, torch.ones(12)).double().eval()
    with torch.no_grad():
        for parameter in pooling.parameters():
            parameter.normal_(generator=generator)
    mask = layout.mask(rows)
    assert isinstance(pooling, LatentPooling)

    def answered(vectors: torch.Tensor) -> list[torch.Tensor]:
        pooling.zero_grad()
        vectors.square().sum().backward()
        return [vectors, *(parameter.grad for parameter in pooling.parameters() if parameter.grad is not None)]

    own = answered(pooling(rows))
    timm = answered(pooling.pool(layout.tokens(rows)[1], None if mask is None else mask[:, None, None]))
    for ours, theirs in zip(own, timm, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize(("form", "seed"), [(ATTENTIVE[0], 0), (ATTENTIVE[1], 1), (ATTENTIVE[0], 2)])
def test_attention_finds_the_patch_that_an_average_hides(form: str, seed: int) -> None:
    """One token of 576 decides the class: a linear probe hardly knows more than chance, attention nearly everything.

    In their average its mark of 6 is a quarter of the noise's deviation, so that no linear probe is right more often than in
    60 of 100.
    """
    X, y = planted(600, seed=seed)
    training, (_, linear) = training_of(form, X, y)
    unseen, truth = planted(1000, seed=seed + 100)

    attended = training.run()

    assert np.mean(linear.predict(unseen.astype(np.float32).mean((2, 3))) == truth) <= 0.6
    assert np.mean(attended.head.predict(unseen) == truth) >= 0.95


@pytest.mark.parametrize("form", ATTENTIVE)
@pytest.mark.parametrize(("layout", "pool"), [(MAP, "avg"), (DISTILLED, "avg"), (DISTILLED, "cls"), (DISTILLED, "avg+cls")])
def test_training_starts_as_the_probe(form: str, layout: Layout, pool: Pool) -> None:
    """Before the first step every image's probabilities are those of the logistic probe on what is pooled."""
    rng = np.random.default_rng(0)
    X = (rng.normal(size=(60, 9, 18)) * rng.uniform(0.1, 9, 18) + 1).astype(np.float16)  # channels of many sizes
    X = X if layout.axes == 3 else np.ascontiguousarray(X.reshape(60, 9, 3, 6).transpose(0, 3, 1, 2)[:, :, :3])
    pooled = Pooling(pool, layout)(torch.from_numpy(X).float()).numpy()
    y = (pooled @ rng.normal(size=(pooled.shape[1], 3))).argmax(1)
    training, (linear, _) = training_of(form, X, y, layout=layout, pool=pool)

    network = training.network(AttentionSpec(3, 0.05), training.probe.on_train)
    with torch.inference_mode():
        probabilities = torch.softmax(network.model.eval()(torch.from_numpy(X)), 1).numpy()

    assert probabilities.max() > 0.7  # the probe has something to say
    np.testing.assert_allclose(probabilities, linear.predict_proba(pooled), atol=1e-5)


@pytest.mark.parametrize("reads", [9, 14, 31])
def test_a_killed_training_ends_with_the_same_bits(reads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed again and again, after so many reads of rows, it ends with the same head as without a break."""
    monkeypatch.setattr("featcache.finetuning.loop._SAVE_SECONDS", 0.0)
    monkeypatch.setattr(attentive, "_EPOCHS", 3)
    monkeypatch.setattr(attentive, "QUERIES", (4, 2))
    X, y = planted(120, side=6)
    undisturbed = training_of("attentive", X, y)[0].run()
    training, _ = training_of("attentive", X, y, checkpoint=lambda name: Checkpoint(tmp_path / name))
    kills = left = 0

    def take(index: NDArray[np.int64]) -> NDArray[Any]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KilledError
        return X[index]

    while True:
        left = reads
        try:
            resumed = replace(training, take=take).run()
            break
        except KilledError:
            kills += 1
            reads += 2  # what has ended is read again to be judged: each process has more of that before it goes on

    assert kills > 0
    assert (resumed.params, sorted(resumed.head.state)) == (undisturbed.params, sorted(undisturbed.head.state))
    assert all(np.array_equal(value, undisturbed.head.state[name]) for name, value in resumed.head.state.items())


@pytest.mark.parametrize("seed", range(2))
def test_what_one_split_chose_is_judged_on_all_folds(seed: int) -> None:
    """Where validation is by folds, the answers are those of all of them; where they are no better, the probe answers."""
    rng = np.random.default_rng(seed)
    X, y = rng.normal(size=(90, 4, 3, 3)).astype(np.float16), rng.integers(0, 2, 90)  # what is learned here is luck
    training, (_, refitted, *_) = training_of("attentive", X, y, folds=3)

    attended = training.run()
    start = training._on_folds(AttentionSpec(4, 0.05), 1e-3, 0)

    assert len(attended.answers) == len(attended.truth) == 63
    if attended.params["epoch"]:
        assert score(attended.truth, attended.answers).rank < score(attended.truth, start).rank
    else:
        pooled = X.astype(np.float32).mean((2, 3))
        np.testing.assert_allclose(attended.head.predict_proba(X), refitted.predict_proba(pooled), atol=1e-5)
        np.testing.assert_array_equal(attended.answers, start)


@pytest.mark.parametrize("how", ["joblib", "skops"])
def test_an_attentive_head_is_fitted_kept_and_asked(how: Any, subtle: Path, settings: Settings, tmp_path: Path) -> None:
    """Beside other heads: never below linear on validation; ``predict`` and ``export`` answer as it was tested."""
    plan = FitPlan(heads=("logistic", "attentive"), format=how, baselines=False)
    result = featcache.fit(str(subtle), VIT, plan=plan, settings=settings)
    again = featcache.fit(str(subtle), VIT, plan=plan, settings=settings)
    beside = featcache.fit(str(subtle), VIT, plan=replace(plan, best_pool=True), settings=settings)
    linear, head = result.heads

    bundle, predictions = featcache.predict(head.bundle, [subtle], settings=settings)
    written = featcache.export(head.bundle, tmp_path / "model.onnx", settings=settings)
    by_path = {Path(image.path).relative_to(subtle).as_posix(): image.label for image in predictions}

    assert head.fitted.val.primary[0] >= linear.fitted.val.primary[0]
    assert (head.record.cut, bundle.card["cut"], bundle.card["head"]) == ("tokens", "tokens", "attentive")
    answers = [by_path[head.task.features.paths[index]] for index in head.split.test]
    assert answers == [head.classes[number] for number in head.fitted.tested.predicted]
    assert written.difference < 1e-4
    assert [each.record.time for each in again.heads] == [each.record.time for each in result.heads]
    assert beside.heads[1].record.time == head.record.time  # what others are trained on makes it no other experiment
    assert not list(settings.cache.rglob("*.unfinished"))


def test_what_attention_cannot_be_given_is_refused() -> None:
    """Several views, layers and curves are of what is pooled; ``all`` is every head on that."""
    for options in ({"views": 2}, {"layers": ("layer3",)}, {"shots": (1,)}, {"curve": True}):
        with pytest.raises(featcache.UsageError, match="attentive trains on tokens"):
            FitPlan(heads=("attentive",), **options).names()  # type: ignore[arg-type]
    assert not {*FitPlan(heads=("all",)).names()} & {*ATTENTIVE}
