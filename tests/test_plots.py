"""Pictures of fine-tuning: real files in the format of their name, whatever the curves hold."""

import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import TINY, Run

from featcache.errors import SetupError, StorageError, UsageError
from featcache.reports import RunRecord
from featcache.reports.tables import draw_records, require_picture

pytest.importorskip("matplotlib")

PROBE = {"head": "knn", "seconds": {"extract": 1.0, "fit": 0.2}, "test": {"accuracy": 0.75, "accuracy_ci": [0.6, 0.9]}}
RECORD = RunRecord(
    kind="finetune",
    cell="0",
    dataset="photos & more",
    backbone="mini",
    method="last:1",
    cut="layer3",
    seed=0,
    feature_key="key",
    request={"backbone": "mini", "plan": {"label_smoothing": 0.1}},
    params={"curve": [[0.9, 0.5, 1.0, 0.4], [0.6, 0.7, 0.8, 0.6], [0.5, 0.8, 0.7, 0.7]], "best_epoch": 2},
    split={"train": 3, "val": 1, "test": 1},
    test_items="items",
    val={"accuracy": 0.7},
    test={"accuracy": 0.8, "accuracy_ci": [0.6, 0.9]},
    right="1",
    seconds={"extract": 1.0, "train": 90.0},
    probe=PROBE,
)


def shown(path: Path) -> str:
    """Return an SVG picture's text: matplotlib writes each label as a comment beside its strokes."""
    return path.read_text()


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_of_its_name_s_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    """Written whole into a folder that is made for it."""
    path = draw_records([RECORD], tmp_path / "new" / f"curve.{suffix}")

    assert path.read_bytes().startswith(magic)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_picture_has_three_panels(tmp_path: Path) -> None:
    """Side by side, 5 x 4 inches each at 120 dots: losses, accuracies, prices."""
    content = draw_records([RECORD], tmp_path / "curve.png").read_bytes()

    assert struct.unpack(">II", content[16:24]) == (3 * 5 * 120, 4 * 120)


def test_a_picture_names_what_it_shows(tmp_path: Path) -> None:
    """Data set, backbone, each depth and the probe; that the training loss is of smoothed labels."""
    text = shown(draw_records([RECORD, replace(RECORD, method="all", cell="1")], tmp_path / "curve.svg"))

    for label in ("photos &amp; more, mini", "last:1", "all", "probe (knn)", "labels smoothed by 0.1"):
        assert f"<!-- {label}" in text or label in text
    plain = replace(RECORD, params=RECORD.params | {"curve_smoothing": 0.0})
    assert "smoothed" not in shown(draw_records([plain], tmp_path / "plain.svg"))


@pytest.mark.parametrize(
    "change",
    [
        {"params": {"curve": [[None, None, 1.0, 0.4]], "best_epoch": 0}},
        {"params": {"curve": [[None, None, 1.0, 0.4], [None, None, None, None]], "best_epoch": 0}},
        {"params": {"curve": [[0.9, 0.5, 1.0, 0.4]], "best_epoch": 7}},
        {"test": {"accuracy": 0.8, "accuracy_ci": None}},
        {"probe": None},
        {"seconds": {"extract": 0.0, "train": 0.0}},
    ],
    ids=["start alone", "diverged", "a kept epoch that is not there", "no interval", "no probe", "no time at all"],
)
def test_a_picture_is_drawn_of_any_curve(tmp_path: Path, change: dict[str, Any]) -> None:
    """What a training did not come to leaves a hole, no error and no warning."""
    assert draw_records([replace(RECORD, **change)], tmp_path / "curve.png").stat().st_size > 10_000


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown format, a folder that is a file, a missing library: each by its own error, and nothing is written."""
    (tmp_path / "file").write_text("")

    with pytest.raises(UsageError, match=r"curve.gif: pictures end in .png, .svg, .pdf"):
        require_picture(tmp_path / "curve.gif")
    with pytest.raises(StorageError, match="file"):
        draw_records([RECORD], tmp_path / "file" / "curve.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SetupError, match="pip install 'featcache"):
        draw_records([RECORD], tmp_path / "curve.png")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_picture_is_drawn_where_every_rate_diverged(run: Run, folder: Path, tmp_path: Path) -> None:
    """There is one epoch then, the start."""
    done = run("finetune", folder, *TINY, "--epochs", "1", "--lr", "1e20", "--plot", tmp_path / "curve.png")

    assert done.code == 0, done.err
    assert "training diverged" in done.err
    assert (tmp_path / "curve.png").exists()


def test_a_picture_of_the_curves(run: Run, folder: Path, tmp_path: Path) -> None:
    """Drawn where it was asked for; a format that cannot be drawn is refused before anything is computed."""
    refused = run("finetune", folder, *TINY, "--plot", tmp_path / "curve.gif")
    done = run("finetune", folder, *TINY, "--epochs", "1", "--lr", "1e-3", "--plot", tmp_path / "curve.png", "--price", "3")

    assert refused.code == 2
    assert not (tmp_path / "cache").exists() or ".gif" in refused.err
    assert done.code == 0, done.err
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "price" in done.out
