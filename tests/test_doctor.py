"""What the doctor finds: a whole installation is well, each broken part comes with the command that repairs it."""

import sys
from pathlib import Path

import pytest
from support import Run

from featcache.experiments import upkeep
from featcache.experiments.upkeep import Finding, examine


def finding(what: str) -> Finding:
    """Return what is found of one part."""
    (of_it,) = (each for each in examine() if each.what == what)
    return of_it


def test_a_whole_installation_is_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is named once, with a version or what it is; nothing is left in the cache."""
    monkeypatch.setenv("FEATCACHE_CACHE", str(tmp_path / "cache"))

    findings = examine()

    assert [each for each in findings if not each.ok or each.repair] == []
    assert len({each.what for each in findings}) == len(findings)
    assert {"torch", "timm", "scikit-learn", "pillow", "device", "backbone mini", "backbone lite0", "cache"} <= {
        e.what for e in findings
    }
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("module", ["h5py", "timm"])
def test_a_part_that_does_not_load_has_its_repair(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version is there, but its import fails: the repair is one line for a shell that names it."""
    monkeypatch.setitem(sys.modules, module, None)

    broken = finding(module)

    assert not broken.ok
    assert "does not load" in broken.found
    assert broken.repair.startswith("pip ")
    assert module in broken.repair.split()


def test_any_failure_of_a_part_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that raises what it likes as it is loaded, as a broken build does."""
    (tmp_path / "brokenpart").mkdir()
    (tmp_path / "brokenpart" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    (tmp_path / "brokenpart-1.5.dist-info").mkdir()
    (tmp_path / "brokenpart-1.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: brokenpart\nVersion: 1.5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    broken, absent = (upkeep._loads(name, "pip install it") for name in ("brokenpart", "absentpart"))

    assert broken == Finding(
        "brokenpart", ok=False, found="1.5 does not load (operator nms does not exist)", repair="pip install it"
    )
    assert (absent.ok, absent.found) == (False, "not installed")


def test_a_cache_that_takes_no_files(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be: the command ends as a broken setup, and says which variable to set."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEATCACHE_CACHE", str(tmp_path / "file"))

    told = run("doctor")

    assert told.code == 5
    assert f"BAD  cache: {tmp_path / 'file'}" in told.out
    assert "repair: set FEATCACHE_CACHE to a folder that can be written" in told.out
    assert told.out.count("BAD") == 1
