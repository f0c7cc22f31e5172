"""How what is unfrozen trains: which parameters, what every option does, and that a killed training goes on exactly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import TINY, Outcome
from test_finetune import GAINS, PLAN, Prepared
from torch import Tensor, nn

from featcache.backbones.timm_models import load_backbone
from featcache.datasets import open_dataset
from featcache.errors import StorageError, UsageError
from featcache.evaluation.metrics import cka
from featcache.experiments import finetune as tuning
from featcache.experiments.bench import run_bench
from featcache.experiments.finetune import run_finetune, run_sweep
from featcache.experiments.finetune_inputs import FineTuneInputs
from featcache.experiments.grid import load_grid
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.finetuning.checkpoint import Checkpoint
from featcache.finetuning.finetuner import Finetuner, Start
from featcache.finetuning.loop import Trial
from featcache.finetuning.model import LinearHead, SuffixAndHead, flipped_and_shifted, mixed, set_training
from featcache.finetuning.network_edits import ConvolutionAndNorm, add_lora, fold_norms, merge_lora
from featcache.finetuning.plan import FineTunePlan, Unfreeze
from featcache.finetuning.unfreezing import depths, select_trainable
from featcache.heads.bundle import load as load_bundle
from featcache.reports.records import RunRecord, read_records
from featcache.specs import BackboneSpec, TransformOverrides

Run = Callable[..., Outcome]
VIT = BackboneSpec("test_vit", random_init=0)


@pytest.fixture
def prepared(folder: Path, tiny: BackboneSpec, settings: Settings) -> Prepared:
    """Everything that fine-tuning needs."""
    return Prepared(folder, tiny, settings)


def tuned(prepared: Prepared, plan: FineTunePlan, keeper: Checkpoint | None = None, take: Any = None) -> dict[str, Tensor]:
    """Fine-tune and return the whole backbone's weights and the head's."""
    own = prepared.backbone.separate()
    trainable = select_trainable(own.stages, plan.unfreeze, own.module)
    stored = prepared.bench.extracted(trainable.cut, "float32" if trainable.cut != "input" else None).store.reader()
    more = {"checkpoint": keeper} if keeper is not None else {}
    result = prepared.tune(own, trainable.cut, take or stored.take, plan, **more)
    return own.module.state_dict() | {f"head.{name}": value for name, value in result.model.head.state_dict().items()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of the weights that differ."""
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("wish", ["norm", "bias", "norm:last:2", "bias:layer3"])
def test_norms_or_biases_alone_train(prepared: Prepared, wish: str) -> None:
    """Of the thawed stages only the parameters of that kind move."""
    prepared.probe = replace(prepared.probe, weights=0 * prepared.probe.weights)  # there is something to learn then
    before = prepared.backbone.module.state_dict()
    plan = replace(PLAN, unfreeze=Unfreeze.parse(wish), epochs=4, label_smoothing=0.0)

    changed = moved(before, tuned(prepared, plan))

    stages = ("layer3", "layer4") if ":" in wish else ("",)
    assert changed
    assert all(name.startswith(stages) for name in changed)
    assert all("bn" in name or "downsample" in name or name.startswith("conv1.") for name in changed)
    if "bias" in wish:
        assert all(name.endswith("bias") for name in changed)


def test_low_rank_updates_are_merged(folder: Path, settings: Settings) -> None:
    """Weights of linear layers move by matrices of that rank; nothing else does, and no adapter stays."""
    prepared = Prepared(folder, VIT, settings)
    before = prepared.backbone.module.state_dict()
    plan = replace(PLAN, unfreeze=Unfreeze.parse("lora:2:last:1"), epochs=2, patience=2, lr=(3e-2,))

    after = tuned(prepared, plan)

    changed = moved(before, after)
    last = prepared.backbone.stages[-1].name
    assert changed
    assert all(name.startswith(last) and name.endswith("weight") for name in changed)
    assert set(before) == {name for name in after if not name.startswith("head.weight") and not name.startswith("head.bias")}
    for name in changed:
        rank = torch.linalg.matrix_rank((after[name] - before[name]).double(), atol=1e-5, rtol=0)
        assert 0 < int(rank) <= 2


@pytest.mark.parametrize(("name", "size"), [("swinv2_tiny_window8_256", 256), ("test_vit", 160), ("resnet10t", 32)])
def test_low_rank_updates_stand_beside_layers_that_are_called(name: str, size: int) -> None:
    """Every update gets a gradient and is merged; a weight that is read as a tensor is left out."""
    spec = BackboneSpec(name, random_init=0, overrides=TransformOverrides(input_size=size))
    backbone = load_backbone(spec)
    trainable = select_trainable(backbone.stages, Unfreeze.parse("lora:2:last:1"), backbone.module)
    suffix = backbone.suffix(trainable.cut)
    with torch.no_grad():
        stored = backbone.prefix(trainable.cut)(torch.rand(2, 3, size, size))
        before = suffix(stored)
    weights = {id(value) for key, value in backbone.module.named_parameters() if key in trainable.stages[-1].parameters}

    updates = add_lora(suffix, weights, 2, seed=0)
    suffix.requires_grad_(requires_grad=False)
    for _, parameters in updates:
        for parameter in parameters:
            parameter.requires_grad_(requires_grad=True)
            torch.nn.init.normal_(parameter, std=0.1)
    (suffix(stored) ** 2).sum().backward()

    assert updates
    plain = name == "test_vit"  # the last norms of the others' blocks start at zero, and nothing before them has a gradient
    if plain:
        assert all(parameter.grad is not None and parameter.grad.any() for _, some in updates for parameter in some)
    changed = suffix(stored).detach()
    merge_lora(suffix)
    with torch.no_grad():
        torch.testing.assert_close(suffix(stored), changed, rtol=1e-3, atol=1e-4 * float(changed.abs().max()))
    assert not plain or not torch.allclose(before, changed, rtol=1e-3)


def test_low_rank_updates_of_nothing_are_refused() -> None:
    """Where every weight is handed to a function, or no layer is plain, an error says so."""
    backbone = load_backbone(BackboneSpec("test_nfnet", random_init=0, overrides=TransformOverrides(input_size=32)))
    weights = {id(module.weight) for module in backbone.module.modules() if type(module).__name__ == "ScaledStdConv2d"}

    with pytest.raises(UsageError, match="no layer of these stages can take a low-rank update"):
        add_lora(backbone.suffix("stages.2"), weights, 2, seed=0)


def test_untraced_networks_are_asked_which_layers_they_call() -> None:
    """Without a graph a blank image tells: a layer whose weight alone is read is left out."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(self.called(given), self.read.weight)

    network = Read()

    updates = add_lora(network, {id(network.called.weight), id(network.read.weight)}, 2, 0, torch.zeros(1, 4))

    assert [weight for weight, _ in updates] == [id(network.called.base_layer.weight)]


def test_nothing_of_that_kind(folder: Path, settings: Settings) -> None:
    """A backbone without biases in the stage says so."""
    prepared = Prepared(folder, BackboneSpec("test_resnet", random_init=0), settings)
    stages = [replace(stage, parameters=("weight",)) for stage in prepared.backbone.stages]

    with pytest.raises(UsageError, match="nothing of that kind"):
        select_trainable(stages, Unfreeze.parse("bias:last:1"), nn.Linear(2, 2, bias=False))


@pytest.mark.parametrize("wish", ["norm:", "lora", "lora:0", "lora:4:", "norm:last:0", "lora:x"])
def test_wishes_that_mean_nothing(wish: str) -> None:
    """They are refused in words."""
    with pytest.raises(UsageError, match="unfreeze"):
        Unfreeze.parse(wish)


@pytest.mark.parametrize("optimiser", ["adamw", "adam", "sgd"])
def test_every_optimiser_steps_from_the_cache_as_on_the_whole_model(prepared: Prepared, optimiser: Any) -> None:
    """From stored activations or from pixels through the whole network: the same weights."""
    plan = replace(PLAN, optimiser=optimiser, epochs=2, clip=1.0)
    prepared.probe = LinearHead(np.zeros_like(prepared.probe.weights), np.zeros_like(prepared.probe.bias))  # any step gains
    own = prepared.backbone.separate()
    prepared.tune(own, "input", prepared.pixels.take, plan)

    cached = tuned(prepared, plan)

    assert moved(prepared.backbone.module.state_dict(), own.module.state_dict())
    for name, value in own.module.state_dict().items():
        torch.testing.assert_close(cached[name], value, rtol=1e-4, atol=1e-5)


class KilledError(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("reads", [1, 4, 9, 14])
@pytest.mark.parametrize("refit", [True, False])
def test_a_broken_training_goes_on_exactly(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: int, *, refit: bool
) -> None:
    """Killed after so many reads, then run again: the same weights, bit for bit, as without a break."""
    monkeypatch.setattr("featcache.finetuning.loop._SAVE_SECONDS", 0.0)
    plan = replace(PLAN, lr=(1e-3, 1e-2), refit=refit, mixup=0.2, ema=0.9, optimiser="adamw")
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    keeper = Checkpoint(tmp_path / "state")
    expected = tuned(prepared, plan)
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
            got = tuned(prepared, plan, keeper, take)
            break
        except KilledError:
            continue
    else:
        pytest.fail("it does not come to an end")

    assert not moved(expected, got)
    trained = epochs_of(monkeypatch)
    assert not moved(expected, tuned(prepared, plan, keeper))
    assert trained == []
    keeper.clear()
    assert not list(tmp_path.glob("state*"))


def epochs_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list that gets the rate of every epoch that is trained from now on."""
    trained: list[float] = []
    epoch = Trial._epoch

    def counted(trial: Trial, *arguments: Any) -> None:
        epoch(trial, *arguments)
        trained.append(trial._lr)

    monkeypatch.setattr(Trial, "_epoch", counted)
    return trained


def flipped(content: bytes, place: int) -> bytes:
    """Return bytes of which one is another."""
    place %= len(content)
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda _: b"not a state",
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: content[:-64],
        *(lambda content, place=place: flipped(content, place) for place in (0, 1000, 20_000, -65, -64, -1)),
        lambda content: content + b"0",
        lambda content: content[:-1] + b"\xff",
    ],
)
def test_a_damaged_state_is_left_aside(
    prepared: Prepared, tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    """Training begins again, and says so."""
    plan, keeper = replace(PLAN, epochs=1, refit=False), Checkpoint(tmp_path / "state")
    expected = tuned(prepared, plan, keeper)
    (tmp_path / "state").write_bytes(damage((tmp_path / "state").read_bytes()))

    assert not moved(expected, tuned(prepared, plan, keeper))
    assert f"{tmp_path / 'state'}: " in caplog.text
    assert "training begins again" in caplog.text


def test_a_state_that_another_process_clears_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Cleared between the look and the reading, it is as if it had never been there: nothing is said to be damaged."""
    monkeypatch.setattr(Path, "exists", lambda _: True)

    assert Checkpoint(tmp_path / "state").load() is None
    assert not caplog.messages


def test_another_users_state_is_left_aside(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole as it is, training does not go on from it."""
    plan, keeper = replace(PLAN, epochs=1, refit=False), Checkpoint(tmp_path / "state")
    tuned(prepared, plan, keeper)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "elsewhere"))

    trained = epochs_of(monkeypatch)
    tuned(prepared, plan, keeper)

    assert len(trained) == 1
    assert "was not written by you" in caplog.text


@pytest.mark.parametrize(
    "step",
    [
        "featcache.finetuning.checkpoint.save_checkpoint",
        "featcache.heads.linear_estimator",  # of the head's file
        "featcache.experiments.finetune.append_record",
        "featcache.finetuning.checkpoint.Checkpoint.clear",
    ],
)
def test_a_training_that_has_ended_is_not_lost(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Killed at the checkpoint, the head, the record or after it: nothing is trained again, and one record stands."""
    records, bench = tmp_path / "runs.jsonl", FeatureCache(open_dataset(folder), tiny, settings)
    plan = replace(PLAN, lr=(1e-3, 1e-2))

    def killed(*_: object, **__: object) -> None:
        raise KilledError

    trained = epochs_of(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(step, killed)
        with pytest.raises(KilledError):
            run_finetune(FineTuneInputs(bench), plan, records=records)
    assert trained
    trained.clear()
    job = run_finetune(FineTuneInputs(bench), plan, records=records)

    assert trained == []
    assert read_cells(records) == [job.record.cell]
    assert {path.name.removeprefix(job.checkpoint.stem) for path in job.checkpoint.parent.iterdir()} == {
        ".safetensors",
        ".joblib",
        ".joblib.json",
    }


def test_a_sweep_that_is_killed_keeps_the_depths_it_has(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the second depth's record, the first two are not trained again, and each depth has one record."""
    records, bench = tmp_path / "runs.jsonl", FeatureCache(open_dataset(folder), tiny, settings)
    plan = replace(PLAN, epochs=1, lr=(1e-3,), refit=False)
    append = tuning.append_record

    def killed(path: Path, record: RunRecord) -> None:
        if read_cells(path):
            raise KilledError
        append(path, record)

    trained = epochs_of(monkeypatch)
    with monkeypatch.context() as patched:
        patched.setattr(tuning, "append_record", killed)
        with pytest.raises(KilledError):
            run_sweep(FineTuneInputs(bench), plan, records=records)
    assert len(trained) == 2
    jobs = run_sweep(FineTuneInputs(bench), plan, records=records).jobs

    assert len(trained) == len(jobs) > 2
    assert read_cells(records) == [job.record.cell for job in jobs]
    assert not list(settings.cache.rglob("*.unfinished"))


@pytest.mark.parametrize("sweep", [False, True])
def test_what_has_been_trained_is_not_trained_again(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, sweep: bool
) -> None:
    """The same command again reports the record of before; another seed, other heads or a lost file train anew."""
    records, plan = tmp_path / "runs.jsonl", replace(PLAN, epochs=1, lr=(1e-3,), refit=False)
    run: Any = run_sweep if sweep else run_finetune

    def again(**more: Any) -> Any:
        return run(FineTuneInputs(FeatureCache(open_dataset(folder), tiny, settings), **more), plan, records=records)

    first = again()
    trained, lines = epochs_of(monkeypatch), records.read_bytes()
    assert json.loads(json.dumps(again().summary)) == json.loads(json.dumps(first.summary))
    assert trained == []
    assert records.read_bytes() == lines

    again(probes=("centroid",))
    assert len(trained) == len(first.jobs)
    first.jobs[-1].checkpoint.unlink()
    again(seed=1)
    again(probes=("centroid",))
    assert len(trained) == 3 * len(first.jobs)


def test_a_grid_clears_what_a_killed_run_left(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a cell's record and the end of its state: the next run computes nothing, and the state is gone."""
    (tmp_path / "grid.toml").write_text(
        f'unfreeze = ["last:1"]\n[[dataset]]\ndata = "{folder}"\n[[backbone]]\nname = "test_resnet"\nrandom_init = 0\n'
        "input_size = 32\n[finetune]\nepochs = 1\nlr = 1e-3\n"
    )
    grid = load_grid(tmp_path / "grid.toml")

    def killed(_: Checkpoint) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "clear", killed)
        with pytest.raises(KeyboardInterrupt):
            run_bench(grid, settings, tmp_path / "out")
    assert list(settings.cache.rglob("*.unfinished"))

    assert run_bench(grid, settings, tmp_path / "out").computed_cells == 0
    assert not list(settings.cache.rglob("*.unfinished"))


def test_stages_with_dots_and_seeds_have_files_of_their_own(folder: Path, tiny: BackboneSpec, settings: Settings) -> None:
    """Every head answers with its own card and weights, however alike what was asked for is spelt."""
    bench = FeatureCache(open_dataset(folder), tiny, settings)
    plan = replace(PLAN, epochs=1, lr=(1e-3,), refit=False)
    asked = [("10.5%", 0), ("10.3%", 0), ("10.5%", 1), ("norm:last:1", 0)]
    jobs = [
        run_finetune(FineTuneInputs(bench, seed=seed), replace(plan, unfreeze=Unfreeze.parse(text))) for text, seed in asked
    ]

    assert len({job.bundle for job in jobs}) == len({job.checkpoint for job in jobs}) == len(asked)
    for (text, _), job in zip(asked, jobs, strict=True):
        loaded = load_bundle(job.bundle)
        assert loaded.card["head"] == text
        assert loaded.card["weights"] == str(job.checkpoint)
        assert loaded.card["test"]["accuracy"] == job.record.test["accuracy"]


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


def test_views_train_end_to_end(run: Run, folder: Path) -> None:
    """The option stores augmentations at the boundary and trains from them."""
    done = run("finetune", folder, *TINY, "--views", "2", "--epochs", "1", "--lr", "1e-3", "--json")

    assert done.code == 0, done.err
    assert "lower" not in done.err
    assert done.json["cut"] == "layer3"


def test_pixels_are_flipped_and_shifted() -> None:
    """Each image is a mirrored or shifted window of itself; the same generator gives the same."""
    pixels = torch.arange(6 * 16 * 16 * 3, dtype=torch.int32).remainder(251).to(torch.uint8).reshape(6, 16, 16, 3)

    one, two = (flipped_and_shifted(pixels, np.random.default_rng(3)) for _ in range(2))

    assert torch.equal(one, two)
    assert one.shape == pixels.shape
    for image, original in zip(one, pixels, strict=True):
        centre = image[4:12, 4:12]
        windows = [
            view[down : down + 8, across : across + 8]
            for view in (original, original.flip(1))
            for down in range(9)
            for across in range(9)
        ]
        assert any(torch.equal(centre, window) for window in windows)


def test_mixed_rows_lie_between_two() -> None:
    """Every row is a share of itself and the rest of another."""
    rows = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))

    out, others, share = mixed(rows, 0.5, np.random.default_rng(0))

    torch.testing.assert_close(out, share * rows + (1 - share) * rows[others])


def test_augment_needs_pixels(run: Run, folder: Path) -> None:
    """At a later cut nothing can be flipped, and it is not done silently."""
    done = run("finetune", folder, *TINY, "--augment")

    assert done.code == 2
    assert "--unfreeze all" in done.err


def test_stochastic_depth_acts_in_the_trained_part(folder: Path, settings: Settings) -> None:
    """In training mode the suffix drops branches, in inference mode it does not."""
    spec = replace(VIT, model_args=(("drop_path_rate", 0.9),))
    backbone = load_backbone(spec)
    cut = backbone.stages[-2].name
    prepared = Prepared(folder, VIT, settings)
    stored = torch.from_numpy(prepared.bench.extracted(cut, "float32").store.reader().take(np.arange(4)))
    model = SuffixAndHead(backbone.suffix(cut), prepared.probe)
    model.requires_grad_(True)
    model.eval()
    plain = model(stored)

    set_training(model, train_batchnorm=False)

    torch.testing.assert_close(plain, SuffixAndHead(load_backbone(VIT).suffix(cut), prepared.probe).eval()(stored))
    assert any(not torch.allclose(model(stored), plain) for _ in range(8))


def test_a_budget_that_holds_nothing(folder: Path, tiny: BackboneSpec, tmp_path: Path) -> None:
    """Where not even the pixels fit, it is said before anything is computed."""
    with pytest.raises(StorageError, match="a larger `budget`"):
        run_finetune(
            FineTuneInputs(FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "cache", budget=1000))), PLAN
        )


def test_budget_between_activations_and_pixels(folder: Path, tiny: BackboneSpec, tmp_path: Path) -> None:
    """Where pixels fit and activations do not, the frozen part runs again: the same result within rounding."""
    plan = replace(PLAN, unfreeze=Unfreeze.parse("last:4"), epochs=1)
    wide = run_finetune(
        FineTuneInputs(FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "one", batch_size=8))), plan
    )
    stored = sum(path.stat().st_size for path in (tmp_path / "one").glob(f"*/*.{wide.record.cut}-*/parts/*.h5"))
    pixels = 36 * 32 * 32 * 3
    assert pixels < stored

    narrow = FeatureCache(open_dataset(folder), tiny, Settings(tmp_path / "two", batch_size=8, budget=pixels + 1))
    again = run_finetune(FineTuneInputs(narrow), plan)

    assert again.record.cut == "input"
    assert any("again in every epoch" in note for note in again.record.notes)
    assert again.record.val["log_loss"] == pytest.approx(wide.record.val["log_loss"], rel=1e-2)


def test_a_sweep_goes_from_the_last_stage_to_all(
    folder: Path, tiny: BackboneSpec, settings: Settings, tmp_path: Path
) -> None:
    """Every depth once, from one pass over the images; rates are searched until one depth has gained."""
    bench = FeatureCache(open_dataset(folder), tiny, settings)
    done = run_sweep(FineTuneInputs(bench), replace(PLAN, epochs=1, lr=(1e-3, 1e-2)), records=tmp_path / "records.jsonl")

    stages = [stage.name for stage in bench.backbone.stages]
    assert [job.record.cut for job in done.jobs] == [*reversed(stages[:-1]), "input"]
    assert [job.record.method.split()[0] for job in done.jobs] == [*(f"last:{n}" for n in range(1, len(stages))), "all"]
    best = [job.record.val["accuracy"] for job in done.jobs]
    for before, after in zip(done.jobs, done.jobs[1:], strict=False):
        if before.tuned.best > 0:
            assert "after" in after.record.method
            assert after.tuned.rates.keys() == {before.tuned.lr}
            assert after.record.val["accuracy"] >= before.record.val["accuracy"]
    assert len(read_records([tmp_path / "records.jsonl"])) == len(best) == len(set(read_cells(tmp_path / "records.jsonl")))


def test_a_depth_that_gains_nothing_answers_as_the_shallower_one(
    subtle: Path, tiny: BackboneSpec, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model is the one that was finished before it, trained on train and validation, image by image."""
    wreck = replace(PLAN, epochs=1, lr=(1e20,))

    def wrecked(backbone: Any, trainable: Any, plan: FineTunePlan, data: Any, start: Start, **more: Any) -> Finetuner:
        return Finetuner(backbone, trainable, plan if start.shallower is None else wreck, data, start, **more)

    monkeypatch.setattr("featcache.finetuning.finetuner.Finetuner", wrecked)
    first, *deeper = run_sweep(FineTuneInputs(FeatureCache(open_dataset(subtle), tiny, settings)), GAINS).jobs

    assert first.tuned.best > 0
    assert first.tuned.refitted
    for job in deeper:
        assert job.tuned.best == 0
        assert not job.tuned.refitted
        assert job.record.right == first.record.right
        assert job.record.test["log_loss"] == pytest.approx(first.record.test["log_loss"], rel=1e-2)


def test_a_rate_that_diverges_is_left(prepared: Prepared, caplog: pytest.LogCaptureFixture) -> None:
    """Its losses are no numbers: the other rates go on, and where none is left, the probe is the answer."""
    plan = replace(PLAN, epochs=3, label_smoothing=0.0)
    alone, both, none = (tuned(prepared, replace(plan, lr=lr)) for lr in ((1e-2,), (1e20, 1e-2), (1e20,)))

    assert "at rate 1e+20 training diverged in epoch 1" in caplog.text
    for name, value in alone.items():
        torch.testing.assert_close(both[name], value, rtol=0, atol=0)
    torch.testing.assert_close(none["head.weight"], torch.from_numpy(prepared.probe.weights).float())


def read_cells(path: Path) -> list[str]:
    """Return the names of the experiments in a file of records."""
    return [record.cell for record in read_records([path])]


def test_depths_of_long_backbones_double() -> None:
    """Each depth of a short one, powers of two of a long one, and all of it."""
    stages = load_backbone(VIT).stages

    assert [wish.text for wish in depths(stages)][-1] == "all"
    assert [wish.text for wish in depths(stages * 3)][:3] == ["last:1", "last:2", "last:4"]


def test_the_tuned_network_predicts_and_exports(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head's file is as any other's, its checkpoint a backbone to extract from."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    tune = run("finetune", folder, *TINY, "--epochs", "2", "--lr", "1e-2", "--json").json

    labels = run("predict", tune["bundle"], folder, "--json")
    exported = run("export", tune["bundle"], tmp_path / "model.onnx", "--json")
    probed = run("fit", folder, "-b", "test_resnet", "--weights", tune["checkpoint"], "--input-size", "32", "--json")

    assert labels.code == exported.code == probed.code == 0, labels.err + exported.err + probed.err
    assert (tmp_path / "model.onnx").exists()


def test_two_processes_train_as_one(subtle: Path, tmp_path: Path) -> None:
    """Started by torchrun, each takes half of every batch; the weights are those of one process, and one alone writes."""
    import subprocess
    import sys

    script = tmp_path / "noted.py"  # the command line, each process noting which files it opens to write, renames, links
    script.write_text(
        "import os, sys\n"
        "note = open(sys.argv.pop(1) + '.' + os.environ.get('RANK', '0'), 'w', buffering=1)\n"
        "def look(event, found):\n"
        "    if event == 'open' and isinstance(found[0], str) and found[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):\n"
        "        note.write(f'{found[0]}\\n')\n"
        "    elif event in {'os.rename', 'os.link', 'os.remove'}:\n"
        "        note.write(f'{found[0]}\\n')\n"
        "sys.addaudithook(look)\n"
        "from featcache.cli import main\n"
        "main()\n"
    )

    def train(cache: Path, *launcher: str) -> Path:
        command = (*launcher, str(script), str(cache), "finetune", str(subtle), *TINY, "--epochs", "2", "--lr", "1e-3")
        options = ("--dtype", "float32", "--runtime", "torch", "--cache", str(cache), "--json")
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return next(cache.glob("*/*/tuned/*.safetensors"))

    from safetensors.torch import load_file

    one = load_file(train(tmp_path / "one", sys.executable))
    two = load_file(train(tmp_path / "two", sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"))
    first, second = (
        {Path(line).parent.name for line in Path(f"{tmp_path / 'two'}.{rank}").read_text().splitlines()} for rank in (0, 1)
    )

    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-4)
    assert {"tuned", "heads", "records"} <= first
    assert not {"tuned", "heads", "records"} & second


def test_similarity_of_embeddings() -> None:
    """CKA is 1 for rotated and scaled embeddings, small for unrelated ones."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 8))
    rotation, _ = np.linalg.qr(rng.normal(size=(8, 8)))

    assert cka(X, 3 * X @ rotation) == pytest.approx(1)
    assert cka(X, rng.normal(size=(200, 8))) < 0.2


@pytest.mark.parametrize("lr", [1e-2, 0.3])
def test_a_refit_is_never_worse_on_what_it_has_seen(prepared: Prepared, lr: float) -> None:
    """The last training has no judge but the validation images: it is kept where it knows them as well, but for noise."""
    from featcache.evaluation.metrics import score
    from featcache.finetuning.loop import noise
    from featcache.finetuning.model import predict

    own = prepared.backbone.separate()
    stored = prepared.bench.extracted("layer3", "float32").store.reader()
    plan = replace(PLAN, lr=(lr,), epochs=4, patience=4)
    result = prepared.tune(own, "layer3", stored.take, plan)

    val = prepared.split.val
    now = score(prepared.features.y[val], predict(result.model, stored.take, val, 8))
    chosen = result.history[result.best].val.accuracy
    assert result.best == 0 or now.accuracy >= chosen - noise(chosen, len(val))
    assert result.best > 0 or not result.refitted


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "test_resnet"])
@pytest.mark.parametrize("train_batchnorm", [False, True])
def test_folded_norms_change_nothing(name: str, train_batchnorm: bool) -> None:  # noqa: FBT001
    """Joined with the convolution before it, BatchNorm gives the same embeddings, gradients and statistics.

    In float64, since a ReLU that rounding moves over its kink changes gradients by far more than rounding.
    """
    backbone = load_backbone(BackboneSpec(name, random_init=0, overrides=TransformOverrides(input_size=64)))
    for module in backbone.module.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8))
    found = []
    for folds in (False, True):
        own = backbone.separate()
        suffix = own.suffix("input").double()
        if folds:
            fold_norms(suffix)
        assert any(isinstance(module, ConvolutionAndNorm) for module in suffix.modules()) is folds
        suffix.requires_grad_(requires_grad=True)
        set_training(suffix, train_batchnorm=train_batchnorm)
        embeddings = suffix(pixels)
        embeddings.square().sum().backward()
        state = dict(own.module.state_dict())
        state |= {f"gradient of {tensor}": weight.grad for tensor, weight in own.module.named_parameters()}
        found.append(state | {"embeddings": embeddings.detach()})

    for what, value in found[0].items():
        torch.testing.assert_close(found[1][what], value, rtol=1e-9, atol=1e-9 * max(1.0, float(value.abs().max())))
