"""A name is never taken for a content: new weights behind it are another entry, another head, another experiment."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from support import TINY, Run, draw_folder, draw_image
from timm.models import save_for_hf

from featcache import FeatureExtractor, api, backbones
from featcache.backbones import Origin
from featcache.backbones import timm_models as backbone
from featcache.datasets import open_dataset
from featcache.errors import DataError, SetupError, UsageError
from featcache.experiments import predict as predicting
from featcache.experiments.bench import load_grid, run_bench
from featcache.experiments.finetune import FineTuneInputs, run_finetune
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction import backbone_identity
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output, Settings
from featcache.finetuning import FineTunePlan, Unfreeze
from featcache.heads import bundle
from featcache.specs import BackboneSpec, TransformOverrides, Views

SMALL = TransformOverrides(input_size=32)
PUBLISHED = "test_resnet.r160_in1k"
COMMITS = ("a" * 40, "b" * 40)


def write_network(seed: int, folder: Path, **config: Any) -> None:
    """Write a network of random weights as timm's own folders are; ``config`` replaces values of its config.json."""
    torch.manual_seed(seed)
    save_for_hf(
        timm.create_model("test_resnet", num_classes=7),
        folder,
        model_config={"architecture": "test_resnet"},
        safe_serialization=True,
    )
    path = folder / "config.json"
    facts = json.loads(path.read_text())
    for name, value in config.items():
        facts[name] = facts[name] | value if isinstance(value, dict) and name in facts else value
    path.write_text(json.dumps(facts))


class Hub:
    """A local copy of the hub with revisions of one repository."""

    def __init__(self, root: Path, name: str) -> None:
        self.place = root / f"models--{name.replace('/', '--')}"

    def publish(self, seed: int, commit: str, **config: Any) -> None:
        """Let the main branch stand for a commit of some weights."""
        write_network(seed, self.place / "snapshots" / commit, **config)
        (self.place / "refs").mkdir(exist_ok=True)
        (self.place / "refs" / "main").write_text(commit)


@pytest.fixture
def hub_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local copy of the hub, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


class Named:
    """A backbone known by its name alone, whose weights can be replaced behind it."""

    def __init__(self, kind: str, tmp_path: Path) -> None:
        self.kind, self._folder = kind, tmp_path / "model"
        self._hub = Hub(tmp_path / "hub", "me/net" if kind == "hub" else f"timm/{PUBLISHED}")
        name = {"folder": f"local-dir:{self._folder}", "hub": "hf-hub:me/net", "published": PUBLISHED}[kind]
        self.spec = BackboneSpec(name, overrides=SMALL)

    def put(self, seed: int) -> None:
        """Put other weights behind the name."""
        if self.kind == "folder":
            write_network(seed, self._folder)
        else:
            self._hub.publish(seed, COMMITS[seed])

    def fresh_rows(self, folder: Path, cache: Path, cut: str = "pooled") -> dict[str, np.ndarray]:
        """Return the rows of the network that is there now, from an empty cache."""
        shutil.rmtree(cache, ignore_errors=True)
        return rows(extract(folder, self.spec, Settings(cache, 8, runtime="torch"), cut))


@pytest.fixture(params=["folder", "hub", "published"])
def named(request: pytest.FixtureRequest, tmp_path: Path, hub_root: Path) -> Named:  # noqa: ARG001 - it is used
    """Each kind of name, with a first network behind it."""
    one = Named(request.param, tmp_path)
    one.put(0)
    return one


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """An empty cache."""
    return Settings(tmp_path / "cache", 8, runtime="torch")


def extract(folder: Path, spec: BackboneSpec, settings: Settings, cut: str = "pooled", **more: Any) -> Extracted:
    """Extract a folder."""
    return FeatureCache(open_dataset(folder), spec, settings).extracted(cut, **more)


def rows(done: Extracted) -> dict[str, np.ndarray]:
    """Return an entry's rows by the images' paths."""
    features = done.store.features()
    return dict(zip(features.paths, features.X, strict=True))


def same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Tell whether two entries hold the same rows."""
    return got.keys() == expected.keys() and all(np.array_equal(got[path], expected[path]) for path in expected)


@pytest.mark.parametrize(("cut", "views"), [("pooled", 1), ("layer3", 1), ("layer2+layer4", 1), ("pooled", 2)])
def test_new_weights_behind_a_name_are_another_entry(
    cut: str, views: int, named: Named, folder: Path, settings: Settings, tmp_path: Path
) -> None:
    """Every row is computed again under another key, an image that comes later too; back again, nothing is computed."""
    first = extract(folder, named.spec, settings, cut, views=Views(views))
    assert extract(folder, named.spec, settings, cut, views=Views(views)).report.computed == 0
    named.put(1)

    second = extract(folder, named.spec, settings, cut, views=Views(views))
    draw_image(folder / "red" / "new.png", (200, 50, 40), 5)
    third = extract(folder, named.spec, settings, cut, views=Views(views))

    assert second.report.computed == len(second.report.positions) == 36
    assert second.store.key != first.store.key
    assert (third.store.key, third.report.computed, third.report.reused) == (second.store.key, 1, 36)
    if views == 1:
        assert same(rows(third), named.fresh_rows(folder, tmp_path / "fresh", cut))
    named.put(0)
    back = extract(folder, named.spec, settings, cut, views=Views(views))
    assert (back.store.key, back.report.computed) == (first.store.key, 1)
    if views == 1:
        assert same(rows(back), named.fresh_rows(folder, tmp_path / "fresh", cut))


def test_several_cuts_are_of_one_network(named: Named, folder: Path, settings: Settings, tmp_path: Path) -> None:
    """Where one cut is there of the weights of before, and another is not, both come from those of now."""
    extract(folder, named.spec, settings)
    named.put(1)

    pooled, stage = FeatureCache(open_dataset(folder), named.spec, settings).features(
        [Output(), Output("layer3", "float32")]
    )

    assert pooled.store.spec["backbone"] == stage.store.spec["backbone"]
    assert same(rows(pooled), named.fresh_rows(folder, tmp_path / "fresh"))


def test_a_download_while_a_cut_is_there(
    folder: Path, settings: Settings, hub_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit before the download of a newer revision is no company for what the newer one computes."""
    hub, spec = Hub(hub_root, "me/net"), BackboneSpec("hf-hub:me/net", overrides=SMALL)
    hub.publish(0, COMMITS[0])
    old = extract(folder, spec, settings)
    real = backbone.load_backbone

    def downloading(*given: Any) -> Any:
        hub.publish(1, COMMITS[1])  # as a reachable hub would
        return real(*given)

    monkeypatch.setattr(backbone, "load_backbone", downloading)
    pooled, stage = FeatureCache(open_dataset(folder), spec, settings).features([Output(), Output("layer3")])

    assert pooled.store.key != old.store.key
    assert pooled.store.spec["backbone"] == stage.store.spec["backbone"]
    assert extract(folder, spec, settings).store.key == pooled.store.key


def test_parts_of_two_networks_do_not_meet(named: Named, folder: Path, settings: Settings) -> None:
    """Half of the images by one network and half by another are two entries, neither of them complete."""
    first = extract(folder, named.spec, replace(settings, part=(1, 2)))
    named.put(1)

    second = extract(folder, named.spec, replace(settings, part=(2, 2)))

    assert first.store.key != second.store.key
    assert first.report.left > 0
    assert second.report.left > 0


def test_a_loaded_network_keeps_its_entry(named: Named, folder: Path, settings: Settings) -> None:
    """Weights replaced after a backbone was loaded change neither what it computes nor where that belongs."""
    bench = FeatureCache(open_dataset(folder), named.spec, settings)
    sha256 = bench.backbone.loaded.weights_sha256
    named.put(1)

    done = bench.extracted()
    later = extract(folder, named.spec, settings)

    assert done.store.spec["backbone"]["weights_sha256"] == sha256
    assert later.store.spec["backbone"]["weights_sha256"] != sha256
    assert later.report.computed == 36


@pytest.mark.parametrize(
    "config",
    [{"model_args": {"global_pool": "max"}}, {"pretrained_cfg": {"mean": [0.1, 0.1, 0.1]}}],
    ids=["architecture", "transform"],
)
def test_what_a_config_says_counts(config: dict[str, Any], folder: Path, settings: Settings, tmp_path: Path) -> None:
    """The same weights in a network of other arguments, or behind another transform, are another entry; labels are not."""
    write_network(0, tmp_path / "model")
    spec = BackboneSpec(f"local-dir:{tmp_path / 'model'}", overrides=TransformOverrides(input_size=64))  # maps of 2 x 2
    first = extract(folder, spec, settings)

    write_network(0, tmp_path / "model", label_names=["a", "b", "c", "d", "e", "f", "g"])
    labelled = extract(folder, spec, settings)
    write_network(0, tmp_path / "model", **config)
    changed = extract(folder, spec, settings)

    assert (labelled.store.key, labelled.report.computed) == (first.store.key, 0)
    assert (changed.store.key != first.store.key, changed.report.computed) == (True, 36)
    assert not same(rows(changed), rows(first))


def test_where_a_folder_lies_does_not_count(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moved, copied to the hub, or called from elsewhere, the same weights compute nothing; their pixels neither."""
    write_network(0, tmp_path / "model")
    first = extract(folder, BackboneSpec(f"local-dir:{tmp_path / 'model'}", overrides=SMALL), settings)
    (tmp_path / "model").rename(tmp_path / "moved.net")
    monkeypatch.chdir(tmp_path)

    again = [
        extract(folder, BackboneSpec(name, overrides=SMALL), settings)
        for name in ("local-dir:moved.net", "local-dir:./moved.net")
    ]

    assert [(done.store.path, done.report.computed) for done in again] == [(first.store.path, 0)] * 2


def test_another_folder_of_that_name(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``local-dir:model`` in another working folder is another network."""
    keys = []
    for seed, place in enumerate(("here", "there")):
        write_network(seed, tmp_path / place / "model")
        monkeypatch.chdir(tmp_path / place)
        keys.append(extract(folder, BackboneSpec("local-dir:model", overrides=SMALL), settings).store.key)

    assert keys[0] != keys[1]


def test_a_revision_is_what_it_stands_for(folder: Path, settings: Settings, hub_root: Path) -> None:
    """A branch, a tag and a commit of the same weights share the rows; an older commit keeps its own."""
    hub = Hub(hub_root, "me/net")
    hub.publish(0, COMMITS[0])
    hub.publish(1, COMMITS[1])
    (hub.place / "refs" / "v1").write_text(COMMITS[0])
    done = [
        extract(folder, BackboneSpec(f"hf-hub:me/net{revision}", overrides=SMALL), settings)
        for revision in ("", f"@{COMMITS[1]}", "@v1", f"@{COMMITS[0]}")
    ]

    assert [one.report.computed for one in done] == [36, 0, 36, 0]
    assert done[0].store.key == done[1].store.key != done[2].store.key == done[3].store.key


def test_weights_that_are_not_here(
    folder: Path, settings: Settings, hub_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Features computed elsewhere are read where nothing contradicts them; not where two networks had the name."""
    hub, spec = Hub(hub_root, "me/net"), BackboneSpec("hf-hub:me/net", overrides=SMALL)
    hub.publish(0, COMMITS[0])
    first = extract(folder, spec, settings)
    hub.place.rename(hub_root / "away")

    with caplog.at_level("INFO", "featcache"):
        assert extract(folder, spec, settings).store.key == first.store.key
    assert "not on this machine" in caplog.text
    (hub_root / "away").rename(hub.place)
    hub.publish(1, COMMITS[1])
    extract(folder, spec, settings)
    shutil.rmtree(hub.place)
    with pytest.raises(SetupError, match="cannot be had"):
        extract(folder, spec, settings)


def test_a_request_of_a_version_that_took_names(named: Named, folder: Path, settings: Settings) -> None:
    """A note without the files' content answers nothing; the entry is found by its key, and noted anew."""
    done = extract(folder, named.spec, settings)
    (note,) = (done.store.path / "requests").glob("*.json")
    facts = json.loads(note.read_text())
    del facts["origin"]
    note.unlink()
    done.store.remember_request(facts)

    again = extract(folder, named.spec, settings)

    assert (again.store.key, again.report.computed) == (done.store.key, 0)
    assert any("origin" in request for request in again.store.requests())
    assert FeatureCache(open_dataset(folder), named.spec, settings).estimate([Output()]).to_compute == 0


def test_pytorchs_downloads_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that timm has by their address are told by the downloaded file's bytes."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "net-1234.pth"
    config = {"url": "https://example.org/models/net-1234.pth"}
    origin = backbones.published_origin(config)
    assert origin == Origin("file", "net-1234.pth", filename="net-1234.pth", reads=("weights",))

    found = [origin.content()]
    for content in (b"one", b"two", b"one"):
        file.write_bytes(content)
        found.append(origin.content())

    assert found[0] is None
    assert found[1] == found[3] != found[2]


def test_a_file_is_hashed_again_while_it_may_change(tmp_path: Path) -> None:
    """A hash is believed for a file that rested two seconds, and that still has its times."""
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"one")
    first = backbones.sha256_of_weights(file)
    stat = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    assert backbones.sha256_of_weights(file) != first


# heads


def head_of(named: Named, folder: Path, settings: Settings) -> Path:
    """Fit a head and return its file."""
    return run_fit(FeatureCache(open_dataset(folder), named.spec, settings), FitPlan(baselines=False)).heads[0].bundle


def answers(head: Path, folder: Path, settings: Settings, **more: Any) -> list[str | None]:
    """Return the labels that a head gives to the images of a folder."""
    return [one.label for one in api.predict(head, [folder], settings=settings, **more)[1]]


def test_a_head_refuses_other_weights(named: Named, folder: Path, settings: Settings, tmp_path: Path) -> None:
    """Predicting and exporting say that the weights changed, and answer again once the old ones are back, or are given."""
    head = head_of(named, folder, settings)
    before = answers(head, folder, settings)
    old = tmp_path / "old.safetensors"
    save_file(timm_state(named.spec), old)
    named.put(1)

    if named.kind == "hub":
        assert answers(head, folder, settings) == before  # the copy of then is found
        shutil.rmtree(tmp_path / "hub" / "models--me--net" / "snapshots" / COMMITS[0])
    with pytest.raises(DataError, match=r"weights of .* have changed since it was trained"):
        answers(head, folder, settings)
    with pytest.raises(DataError, match=r"weights of .* have changed since it was trained"):
        api.export(head, tmp_path / "model.onnx", settings=settings)
    assert answers(head, folder, settings, weights=str(old)) == before
    named.put(0)
    assert answers(head, folder, settings) == before


def timm_state(spec: BackboneSpec) -> dict[str, torch.Tensor]:
    """Return the weights behind a name."""
    loaded = backbone.load_backbone(spec, torch.device("cpu"))
    return {name: value.contiguous() for name, value in loaded.module.state_dict().items()}


def test_a_head_works_in_every_working_folder(
    folder: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder is remembered by its whole path, and another one of that name is not taken for it."""
    write_network(0, tmp_path / "here" / "model")
    write_network(1, tmp_path / "there" / "model")
    monkeypatch.chdir(tmp_path / "here")
    bench = FeatureCache(open_dataset(folder), BackboneSpec("local-dir:model", overrides=SMALL), settings)
    head = run_fit(bench, FitPlan(baselines=False)).heads[0].bundle
    before = answers(head, folder, settings)

    monkeypatch.chdir(tmp_path / "there")

    assert answers(head, folder, settings) == before
    shutil.rmtree(tmp_path / "here" / "model")
    with pytest.raises(UsageError, match="no such folder"):
        answers(head, folder, settings)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_args": {"global_pool": "max"}}, "built otherwise"),
        ({"pretrained_cfg": {"std": [0.1, 0.1, 0.1]}}, "prepares samples"),
    ],
)
def test_a_head_refuses_another_config(
    config: dict[str, Any], words: str, folder: Path, settings: Settings, tmp_path: Path
) -> None:
    """The same weights under other arguments, or behind another transform, are not what a head was trained on."""
    named = Named("folder", tmp_path)
    named.put(0)
    head = head_of(named, folder, settings)
    write_network(0, tmp_path / "model", **config)

    with pytest.raises(DataError, match=words):
        answers(head, folder, settings)


def test_a_tuned_head_refuses_another_config(folder: Path, settings: Settings, tmp_path: Path) -> None:
    """Its weights are its own; of the folder it takes the architecture and the transform, which must be the old ones."""
    named = Named("folder", tmp_path)
    named.put(0)
    plan = FineTunePlan(Unfreeze.parse("last:1"), epochs=1, lr=(1e-3,))
    job = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), named.spec, settings)), plan)
    before = answers(job.bundle, folder, settings)

    named.put(1)
    assert answers(job.bundle, folder, settings) == before
    write_network(0, tmp_path / "model", model_args={"global_pool": "max"})
    with pytest.raises(DataError, match="built otherwise"):
        answers(job.bundle, folder, settings)


def test_heads_of_an_older_version(named: Named, folder: Path, settings: Settings, tmp_path: Path) -> None:
    """A card without the weights' hash is held against its entry's spec, or against the key that the network gives."""
    head = head_of(named, folder, settings)
    loaded = bundle.load(head)
    card = {name: value for name, value in loaded.card.items() if name not in {"loaded", "transform"}}
    beside, alone = (bundle.Bundle(loaded.estimator, card, path) for path in (head, tmp_path / "head.joblib"))

    for old in (beside, alone):
        assert predicting.cache_of(old, open_dataset(folder), settings).backbone.spec.name
    named.put(1)
    if named.kind == "hub":
        shutil.rmtree(tmp_path / "hub" / "models--me--net" / "snapshots" / COMMITS[0])
    with pytest.raises(DataError, match="weights"):
        predicting.cache_of(beside, open_dataset(folder), settings)
    if named.kind == "published":
        with pytest.raises(DataError, match="other weights"):
            predicting.cache_of(alone, open_dataset(folder), settings)


def test_an_extractor_refuses_other_weights(named: Named, folder: Path, tmp_path: Path) -> None:
    """Fitted on one network it does not answer with another, the copy that it holds or the one it would load."""
    paths = sorted(map(str, folder.rglob("*.png")))
    extractor = FeatureExtractor(named.spec.name, input_size=32, cache=tmp_path / "cache", batch_size=8, runtime="torch")
    first = extractor.fit(paths).transform(paths[:4])
    named.put(1)

    with pytest.raises(DataError, match="Fit it"):
        extractor.transform(paths[:4])
    with pytest.raises(DataError, match="Fit it"):
        extractor.transform(paths)
    assert not np.array_equal(extractor.fit(paths).transform(paths[:4]), first)
    named.put(0)
    np.testing.assert_array_equal(extractor.fit(paths).transform(paths[:4]), first)


def test_new_weights_are_another_experiment(named: Named, folder: Path, settings: Settings, tmp_path: Path) -> None:
    """A grid's cells are run again for a network that has changed, and are not for one that has not."""
    grid = tmp_path / "grid.toml"
    grid.write_text(
        f'name = "g"\nheads = ["ridge"]\n[[dataset]]\ndata = "{folder}"\n'
        f'[[backbone]]\nname = "{named.spec.name}"\ninput_size = 32\n'
    )

    counts = []
    for seed in (0, 0, 1, 0):
        named.put(seed)
        counts.append(run_bench(load_grid(grid), settings, tmp_path / "out").computed_cells)

    assert counts == [1, 0, 1, 0]


def test_training_goes_on_with_its_own_weights(named: Named, folder: Path, settings: Settings) -> None:
    """A tuned network of other weights is another experiment, under another name."""
    plan = FineTunePlan(Unfreeze.parse("last:1"), epochs=1, lr=(1e-3,))
    first = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), named.spec, settings)), plan)
    named.put(1)

    second = run_finetune(FineTuneInputs(FeatureCache(open_dataset(folder), named.spec, settings)), plan)

    assert first.record.cell != second.record.cell
    assert first.checkpoint != second.checkpoint
    assert first.record.request["backbone"] != second.record.request["backbone"]


# what is said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-b", "local-dir:NOTHERE"), "no such folder"),
        (("-b", "local-dir:"), "no such folder|no config.json"),
        ((*TINY, "--device", "mps"), "no such device here; it has cpu"),
        ((*TINY, "--device", "meta"), "no such device here; it has cpu"),
        ((*TINY, "--device", "hpu"), "no such device here; it has cpu"),
        ((*TINY, "--device", "gpu"), "no such device here; it has cpu"),
        ((*TINY, "--device", "cuda:99"), "no such device here; it has cpu"),
    ],
)
def test_names_of_nothing(arguments: tuple[str, ...], words: str, run: Run, folder: Path) -> None:
    """Folders and devices that are not there are said so in one line."""
    done = run("extract", folder, *arguments)

    assert done.code == 2
    assert done.err.count("\n") <= 2
    assert any(word in done.err for word in words.split("|"))


def test_folders_that_hold_no_network(run: Run, folder: Path, tmp_path: Path) -> None:
    """A folder without config.json, or without weights, is said to be so."""
    write_network(0, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()

    assert "config.json" in run("extract", folder, "-b", f"local-dir:{folder}").err
    done = run("extract", folder, "-b", f"local-dir:{tmp_path / 'model'}")
    assert done.code == 3
    assert "hub" not in done.err


# the promise to old caches


@pytest.mark.parametrize(
    ("spec", "cut", "key"),
    [
        (BackboneSpec("mini"), "pooled", "f84b6cb6cc279a5b8be037bb44cfe9fd0aa1470fd8a621ed8bb2f4420e84da17"),
        (
            BackboneSpec("test_resnet", random_init=0, overrides=SMALL),
            "layer3",
            "8d85c4579adcb7e5df607ad9cd6daafb8ddfc574db7ab8e3aa2d7e99f8a526b9",
        ),
        (BackboneSpec("mini"), "input", "c17d72e2b5bbadce7d59f893addb4d0a3425af2f45e20d4d7fc96ecfe9519ece"),
    ],
)
def test_keys_stay(spec: BackboneSpec, cut: str, key: str, tmp_path: Path, settings: Settings) -> None:
    """Entries of before are found again."""
    assert extract(draw_folder(tmp_path / "few", per_class=1), spec, settings, cut).store.key == key


def test_identities_of_files_stay(tmp_path: Path) -> None:
    """What records call a backbone that its flags alone decide has not changed either."""
    file = tmp_path / "net.safetensors"
    file.write_bytes(b"weights")

    assert backbone_identity(BackboneSpec("mini")) == {
        "name": "mini",
        "weights": None,
        "random_init": None,
        "model_args": [],
        "overrides": {},
    }
    found = backbone_identity(BackboneSpec("resnet18", weights=str(file), pool="avg"))
    assert found == {
        "name": "resnet18",
        "weights": f"sha256:{hashlib.sha256(b'weights').hexdigest()}",
        "random_init": None,
        "model_args": [],
        "overrides": {},
        "pool": "avg",
    }
