"""Fine-tuning from the cache: it starts as the probe, trains only what is thawed, and equals training without a cache."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from featcache import heads
from featcache.backbones.base import Backbone, Stage
from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.errors import UsageError
from featcache.evaluation.splits import make_split
from featcache.experiments import finetune as tuning
from featcache.experiments.finetune import run_finetune
from featcache.experiments.finetune_inputs import FineTuneInputs
from featcache.experiments.fit import PROBE
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning import optim as choosing
from featcache.finetuning.checkpoint import save_checkpoint
from featcache.finetuning.distributed import ProcessGroup
from featcache.finetuning.finetuner import FineTuned, Finetuner, Start, TrainingSet
from featcache.finetuning.model import LinearHead, SuffixAndHead, Take, predict, set_training
from featcache.finetuning.optim import rate
from featcache.finetuning.plan import FineTunePlan, Unfreeze
from featcache.finetuning.unfreezing import select_trainable
from featcache.specs import BackboneSpec
from featcache.store.rows import Features

PLAN = FineTunePlan(
    Unfreeze.parse("last:1"), epochs=3, batch_size=8, dtype="float32", lr=(1e-2,), head_lr=1e-2, precision="float32"
)

GAINS = replace(PLAN, epochs=5, lr=(1e-3,), label_smoothing=0.0)  # of the subtle images it learns more than the probe


class Prepared:
    """A tiny backbone with its features, its pixels and its probe."""

    def __init__(self, folder: Path, spec: BackboneSpec, settings: Settings) -> None:
        self.bench = FeatureCache(open_dataset(folder), spec, settings)
        self.backbone = load_backbone(spec)
        self.features: Features = self.bench.extracted().store.features()
        self.split = make_split(self.features.y, self.features.splits, self.features.classes)
        self.head = heads.train("logistic", {"C": 1e-3}, self.features.X, self.features.y, 0)
        self.probe = LinearHead(*heads.linear_weights(self.head, 3))
        self.pixels = self.bench.extracted("input").store.reader()

    def tune(self, backbone: Backbone, cut: str, take: Take, plan: FineTunePlan = PLAN, **more: Any) -> FineTuned:
        """Fine-tune what a plan unfreezes, from rows at a cut."""
        trainable = select_trainable(backbone.stages, plan.unfreeze, backbone.module)
        data = TrainingSet(cut, take, self.features.y, self.split)
        return Finetuner(backbone, trainable, plan, data, Start(self.probe, self.probe), **more).run()


@pytest.fixture
def prepared(folder: Path, tiny: BackboneSpec, settings: Settings) -> Prepared:
    """Everything that fine-tuning needs."""
    return Prepared(folder, tiny, settings)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_before_the_first_step_the_head_is_the_probe(folder: Path, settings: Settings, name: str) -> None:
    """On every image, the untrained suffix and head predict what the probe predicts."""
    size = load_backbone(BackboneSpec(name, random_init=0)).transform.input_size
    prepared = Prepared(folder, BackboneSpec(name, random_init=0), settings)
    assert size == prepared.backbone.transform.input_size
    cut = prepared.backbone.stages[-2].name
    stored = prepared.bench.extracted(cut, "float32").store.reader()
    model = SuffixAndHead(prepared.backbone.suffix(cut), prepared.probe)
    everything = np.arange(len(prepared.features.y))

    probabilities = predict(model, stored.take, everything, 8)

    np.testing.assert_array_equal(probabilities.argmax(1), prepared.head.predict(prepared.features.X))
    np.testing.assert_allclose(probabilities, prepared.head.predict_proba(prepared.features.X), atol=1e-3)


def test_the_cache_gives_the_same_losses_as_recomputing(prepared: Prepared) -> None:
    """Trained from float32 activations or with the frozen part run again each time: the same losses, the same weights."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    cached, recomputed = prepared.backbone.separate(), prepared.backbone.separate()
    run = recomputed.runner("layer3")

    one = prepared.tune(cached, "layer3", stored.take)
    two = prepared.tune(recomputed, "layer3", lambda index: run(prepared.pixels.take(index)))

    losses = [[epoch.train_loss for epoch in tuned.history[1:]] for tuned in (one, two)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    for first, second in zip(cached.module.parameters(), recomputed.module.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_a_step_from_the_cache_is_a_step_of_the_whole_model(prepared: Prepared) -> None:
    """The whole network from pixels, its frozen part without gradients, ends with the same weights."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    cached, whole = prepared.backbone.separate(), prepared.backbone.separate()

    prepared.tune(cached, "layer3", stored.take)
    prepared.tune(whole, "input", prepared.pixels.take)

    for first, second in zip(cached.module.parameters(), whole.module.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_half_precision_steps_go_almost_the_same_way(prepared: Prepared) -> None:
    """Weights stay float32, and what is tested is computed in float32."""
    stored = prepared.bench.extracted("layer3").store.reader()
    runs = []
    for precision in ("float32", "bfloat16"):
        own = prepared.backbone.separate()
        plan = replace(PLAN, lr=(1e-4,), head_lr=1e-4, precision=precision, refit=False)
        runs.append(prepared.tune(own, "layer3", stored.take, plan))
        assert {parameter.dtype for parameter in own.module.parameters()} == {torch.float32}
    exact, half = ([epoch.train_loss for epoch in run.history[1:]] for run in runs)
    assert half == pytest.approx(exact, rel=0.02)
    assert half != exact
    assert [run.precision for run in runs] == ["float32", "bfloat16"]


@pytest.mark.parametrize(
    ("has", "seconds", "expected"),
    [(True, (2.0, 1.0), "bfloat16"), (True, (1.1, 1.0), "float32"), (False, (2.0, 1.0), "float32")],
)
def test_if_asked_steps_are_in_bfloat16_where_that_pays(
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    has: bool,  # noqa: FBT001
    seconds: tuple[float, float],
    expected: str,
) -> None:
    """The machine must multiply it, and be clearly faster so; asking changes neither weights nor statistics."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has}, raising=False)
    own = prepared.backbone.separate()
    rows = torch.from_numpy(prepared.bench.extracted("layer3").store.reader().take(np.arange(8)))
    model = SuffixAndHead(own.suffix("layer3"), prepared.probe)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = choosing._step_seconds

    def timed(model: SuffixAndHead, rows: torch.Tensor, precision: str) -> float:
        assert run(model, rows, precision) > 0
        return dict(zip(("float32", "bfloat16"), seconds, strict=True))[precision]

    monkeypatch.setattr(choosing, "_step_seconds", timed)

    assert choosing.choose_precision(model, rows, ProcessGroup(), on_cpu=True) == expected
    assert choosing.choose_precision(model, rows, ProcessGroup(), on_cpu=False) == "float32"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_weights_and_batchnorm_statistics_stay(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Only the thawed stage's parameters move; no running statistic does, unless asked."""
    prepared = Prepared(subtle, tiny, settings)
    own = prepared.backbone.separate()
    prepared.tune(own, "input", prepared.pixels.take, GAINS)

    before, after = prepared.backbone.module.state_dict(), own.module.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("layer4") for name in moved)
    assert not any("running" in name for name in moved)


@pytest.mark.parametrize(("given", "solved"), [(True, 0), (False, 1)])
def test_the_head_of_train_alone_is_the_one_that_the_search_fitted(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch, *, given: bool, solved: int
) -> None:
    """Chosen on a given val split, the head that training starts from is not fitted again; folds of a draw have none."""
    for image in sorted(folder.glob("*/*.png")) if given else []:
        part = "val" if int(image.stem) % 4 == 0 else "test" if int(image.stem) % 4 == 1 else "train"
        (folder / part / image.parent.name).mkdir(parents=True, exist_ok=True)
        image.rename(folder / part / image.parent.name / image.name)
    for name in ("blue", "green", "red") if given else ():
        (folder / name).rmdir()
    inputs = FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings))
    probe = next(job.fitted for job in inputs.fitted if job.record.method == PROBE)
    train, fitted = heads.train, []
    monkeypatch.setattr(heads, "train", lambda *arguments: fitted.append(arguments) or train(*arguments))

    start, _ = inputs.linear_probes

    rows = inputs.split.train
    anew = train(PROBE, probe.params, inputs.features.X[rows], inputs.features.y[rows], 0)
    weights, bias = heads.linear_weights(anew, 3)
    assert len(fitted) == solved
    np.testing.assert_allclose(start.weights, weights, atol=1e-3 * np.abs(weights).max())
    np.testing.assert_allclose(start.bias, bias, atol=1e-3 * np.abs(bias).max())


@pytest.mark.parametrize("asked", [False, True])
def test_batchnorm_statistics_move_only_when_asked(prepared: Prepared, asked: bool) -> None:  # noqa: FBT001
    """In training mode the thawed part's BatchNorm stays in inference mode by default."""
    own = prepared.backbone.separate()
    model = SuffixAndHead(own.suffix("layer3"), prepared.probe)
    before = {name: value.clone() for name, value in own.module.state_dict().items()}

    model.requires_grad_(True)
    set_training(model, train_batchnorm=asked)
    model(torch.from_numpy(prepared.bench.extracted("layer3").store.reader().take(np.arange(8))))

    moved = {name for name, value in own.module.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in moved) == asked
    assert all(name.startswith("layer4") for name in moved)


def test_ruinous_training_ends_as_the_probe(prepared: Prepared) -> None:
    """Where no epoch is better than the probe, the probe is the result, on the untouched backbone."""
    own = prepared.backbone.separate()
    stored = prepared.bench.extracted("layer3").store.reader()
    tuned = prepared.tune(own, "layer3", stored.take, replace(PLAN, lr=(30.0,), head_lr=30.0, patience=1))

    if tuned.best == 0:
        for first, second in zip(own.module.parameters(), prepared.backbone.module.parameters(), strict=True):
            torch.testing.assert_close(first, second)
    assert tuned.history[tuned.best].val.accuracy == max(epoch.val.accuracy for epoch in tuned.history)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "mobilenetv3_small_050"])
def test_checkpoints_are_timm_checkpoints(tmp_path: Path, name: str) -> None:
    """What timm loads from the file gives the logits that were tested."""
    backbone = load_backbone(BackboneSpec(name, random_init=0))
    size = backbone.transform.input_size
    width = backbone.module(torch.zeros(1, 3, size, size)).shape[1]
    rng = np.random.default_rng(0)
    model = SuffixAndHead(backbone.suffix("input"), LinearHead(rng.normal(size=(5, width)), rng.normal(size=5)))
    pixels = rng.integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.transform.mean, backbone.transform.std))

    path = save_checkpoint(backbone.module, model, tmp_path / "tuned.safetensors", {"classes": list("abcde")})

    whole = timm.create_model(name, num_classes=5, checkpoint_path=str(path)).eval()
    with torch.inference_mode():
        expected = whole((torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std)
        torch.testing.assert_close(model.eval()(torch.from_numpy(pixels)), expected, rtol=1e-3, atol=1e-3)


def test_the_job_reports_gap_costs_and_checkpoint(subtle: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """From a folder to a record: gap with interval and p, seconds of every phase, a file that can be loaded again."""
    bench = FeatureCache(open_dataset(subtle), tiny, settings)

    job = run_finetune(
        FineTuneInputs(bench, probes=("centroid",)), replace(GAINS, unfreeze=Unfreeze.parse("last:2"), lr=(1e-4,))
    )

    summary = job.summary
    assert summary["cut"] == "layer2"
    assert summary["gained"]
    assert summary["probe"]["of"] == ["centroid", "ridge", "knn", "logistic"]
    assert summary["probe"]["head"] in summary["probe"]["of"]
    assert set(summary["gap"]) == {"points", "ci", "p_value"}
    assert summary["gap"]["points"] == pytest.approx(
        100 * (summary["test"]["accuracy"] - summary["probe"]["test"]["accuracy"])
    )
    assert summary["seconds"]["train"] > 0
    assert load_backbone(replace(tiny, random_init=None, weights=summary["checkpoint"])).loaded.tag == "file"


def test_what_cannot_be_cut_is_trained_whole(
    folder: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no cut is found, training runs from pixels and says so."""
    from featcache.backbones import base as module
    from featcache.errors import CutError

    def refuse(*_: object) -> None:
        raise CutError("this backbone cannot be traced.")

    monkeypatch.setattr(module, "Cutter", refuse)

    job = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings)), PLAN)

    assert job.record.cut == "input"
    assert "runs again in every epoch" in job.record.notes[0]


def test_the_rate_is_chosen_on_validation(prepared: Prepared) -> None:
    """Of several rates the one with the best epoch on validation is kept, and tried from the same start."""
    stored = prepared.bench.extracted("layer3", "float32").store.reader()

    def tune(*rates: float) -> FineTuned:
        own = prepared.backbone.separate()
        return prepared.tune(own, "layer3", stored.take, replace(PLAN, lr=rates))

    both, first, second = tune(1e-6, 1e-2), tune(1e-6), tune(1e-2)

    assert both.rates == first.rates | second.rates
    kept = {1e-6: first, 1e-2: second}[both.lr]
    assert [epoch.val for epoch in both.history] == [epoch.val for epoch in kept.history]
    assert both.history[both.best].val.accuracy == max(both.rates.values())


STAGES = tuple(Stage(name, (name,), size) for name, size in (("stem", 10), ("one", 20), ("two", 30), ("three", 40)))


@pytest.mark.parametrize(
    ("wish", "first", "cut"),
    [
        ("last:1", "three", "two"),
        ("last:4", "stem", "input"),
        ("all", "stem", "input"),
        ("one", "one", "stem"),
        ("40%", "three", "two"),
        ("41%", "two", "one"),
        ("1%", "three", "two"),
        ("100%", "stem", "input"),
    ],
)
def test_wishes_become_stages(wish: str, first: str, cut: str) -> None:
    """Whole stages train, from the end of the network."""
    trainable = select_trainable(STAGES, Unfreeze.parse(wish))

    assert (trainable.stages[0].name, trainable.stages[-1].name, trainable.cut) == (first, "three", cut)


@pytest.mark.parametrize("wish", ["last:5", "layer9"])
def test_stages_that_are_not_there(wish: str) -> None:
    """The error lists the stages."""
    with pytest.raises(UsageError, match="stem, one, two, three"):
        select_trainable(STAGES, Unfreeze.parse(wish))


def test_the_rate_rises_then_falls_to_nothing() -> None:
    """Linear warm-up, half cosine."""
    factors = [rate(step, 100, 0.1) for step in range(101)]

    assert factors[0] == pytest.approx(0.1)
    assert factors[10] == pytest.approx(1.0)
    assert max(factors) == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_no_stochastic_depth_means_none(folder: Path, settings: Settings) -> None:
    """A model that brings a rate of its own trains without it where the plan says none, as its record does."""
    own = BackboneSpec("test_vit", random_init=0, model_args=(("drop_path_rate", 0.5),))
    bench = FeatureCache(open_dataset(folder), own, settings)
    rates = [module.drop_prob for module in bench.backbone.module.modules() if type(module).__name__ == "DropPath"]

    backbone = tuning._trainable_copy(bench, PLAN)

    assert max(rates) == 0.5
    assert not any(module.drop_prob for module in backbone.module.modules() if type(module).__name__ == "DropPath")
    assert max(module.drop_prob for module in bench.backbone.module.modules() if type(module).__name__ == "DropPath") == 0.5
