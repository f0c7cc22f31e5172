"""A cache of an earlier version (commit 4c5d89d) is today's: its rows, its heads, its records and its keys.

``old_cache`` was written by that version: twelve images of three colours, two heads, one fine-tuning of the last stage,
whose checkpoint of 1.5 MB is left out.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import sklearn
from support import TINY, Run

from featcache.reports import read_records, tables
from featcache.specs import BackboneSpec, FeatureSpec, LoadedBackbone, Transform
from featcache.store.entry import FeatureStore

HERE = Path(__file__).parent / "old_cache"
KEYS = {
    "pooled": "1305e61d39557cae11f5170b1abd785a128141e8dd16e30dcc8a2200c8409181",
    "layer3": "8d85c4579adcb7e5df607ad9cd6daafb8ddfc574db7ab8e3aa2d7e99f8a526b9",
    "input": "1b6aded2adc99b57de915544582baaff2e9ea81a210872d38b6fb61361e000b7",
}
ENTRIES = {
    "pooled": "test_resnet.random0.pooled-1305e61d",
    "layer3": "test_resnet.random0.layer3-8d85c457",
    "input": "pixels.input-1b6aded2",
}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """The images in another place than they were in, and the cache that the command line looks into."""
    shutil.copytree(HERE / "cache", tmp_path / "cache")
    return Path(shutil.copytree(HERE / "photos", tmp_path / "photos"))


def test_cache_keys_are_those_of_before() -> None:
    """The three kinds of key are what the earlier version made of the same request."""
    transform = Transform(32, 0.95, interpolation="bilinear", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    thumbnail = Transform(32, crop_mode="squash", interpolation="bilinear", mean=None, std=None)
    weights = "e94c2685360dabb4477f3d8c6075cb5e8cab77a38da593f6d108ac770245cbf0"
    backbone = LoadedBackbone("test_resnet", "random:0", weights)
    keys = {
        "pooled": FeatureSpec(transform, backbone).key,
        "layer3": FeatureSpec(transform, backbone, "layer3", dtype="float16").key,
        "input": FeatureSpec(thumbnail, None, "input", dtype="uint8").key,
    }

    assert keys == KEYS
    assert BackboneSpec("test_resnet", random_init=0).label == "test_resnet.random0"


@pytest.mark.parametrize("cut", KEYS)
def test_entries_are_whole_and_open(cut: str, tmp_path: Path) -> None:
    """Every byte of an entry of before is what today's verification expects, and its rows are read."""
    store = FeatureStore.open(shutil.copytree(HERE / "cache" / "photos" / ENTRIES[cut], tmp_path / ENTRIES[cut]))
    features = store.features()

    assert store.verify() == []
    assert store.key == KEYS[cut]
    assert features.classes == ("blue", "green", "red")
    assert len(features.X) == 12
    assert np.isfinite(features.X).all()


@pytest.mark.parametrize("cut", ["pooled", "layer3"])
def test_extract_computes_no_row_again(cut: str, run: Run, photos: Path) -> None:
    """The images have moved and their times are new: their bytes find their rows."""
    found = run("extract", photos, "--name", "photos", *TINY, "--cut", cut, "--json").json

    assert (found["key"], found["computed"], found["reused"]) == (KEYS[cut], 0, 12)
    assert Path(found["entry"]).name == ENTRIES[cut]


def test_fit_is_the_experiment_that_it_was(run: Run, photos: Path, tmp_path: Path) -> None:
    """Heads of before are the same experiments today: same rows, same split, same key, same outcome."""
    before = read_records([HERE / "cache" / "records" / "runs.jsonl"])[:2]
    found = run("fit", photos, "--name", "photos", *TINY, "--head", "ridge", "--head", "logistic", "--json").json
    after = read_records([tmp_path / "cache" / "records" / "runs.jsonl"])

    assert found["extract"]["computed"] == 0
    parts = (tmp_path / "cache" / "photos" / ENTRIES["input"] / "parts").glob("*.h5")
    assert len([path for path in parts if ".items" not in path.name]) == 1  # no thumbnail was made again
    for record in before:
        latest = next(each for each in reversed(after) if each.method == record.method)
        assert (latest.cell, latest.split, latest.test_items) == (record.cell, record.split, record.test_items)
        assert latest.right == record.right
        # Three images choose: of all C below a loss of a thousandth of a nat the smallest is taken now.
        assert latest.params == record.params or record.method == "logistic"


@pytest.mark.parametrize("name", ["heads/ridge-seed0-5c6e26c2.joblib", "heads/logistic-seed0-e5118ec5.joblib"])
def test_a_head_of_another_machine_needs_trust_and_predicts(name: str, run: Run, photos: Path, tmp_path: Path) -> None:
    """Its signature is another user's: it is refused unless it is trusted, and then answers as it did."""
    head, images = tmp_path / "cache" / "photos" / ENTRIES["pooled"] / name, sorted((photos / "test").rglob("*.png"))
    refused = run("predict", head, *images)
    trusted = run("predict", head, *images, "--trust", "--json")

    if refused.code == 3:  # joblib's files are read by the scikit-learn that wrote them alone
        assert f"this is {sklearn.__version__}" in refused.err
        return
    assert refused.code == 2
    assert "--trust" in refused.err
    assert [json.loads(line)["label"] for line in trusted.out.splitlines()] == ["blue", "green", "red"]


def test_records_become_a_table() -> None:
    """Two probes and the fine-tuned last stage stand in it with their test accuracy and the gap."""
    text = tables.markdown(read_records([HERE / "cache" / "records" / "runs.jsonl"]))

    for method in ("ridge", "logistic", "last:1"):
        assert f"| {method} " in text
    assert text.count("100.0") >= 3
