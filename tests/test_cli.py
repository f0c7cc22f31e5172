"""The command line: every command runs, every mistake has one plain line and its exit code."""

import os
from collections.abc import Iterator
from pathlib import Path

import click
import h5py
import numpy as np
import pytest
from support import TINY, Outcome, Run, draw_image

from featcache.cli import COMMANDS, cli


def test_extract_json_has_the_documented_keys(run: Run, folder: Path) -> None:
    """Scripts rely on these names; a second run reuses everything."""
    first, second = (run("extract", folder, *TINY, "--json").json for _ in range(2))

    assert set(first) == {
        "schema_version", "entry", "dataset", "backbone", "cut", "rows", "computed", "reused", "quarantined", "seconds",
        "images_per_second", "left", "runtime", "runtime_difference", "key", "notes",
    }  # fmt: skip
    assert (first["computed"], second["computed"], second["reused"]) == (36, 0, 36)
    assert Path(first["entry"], "features.h5").is_file()


def test_fit_json_has_the_documented_keys(run: Run, folder: Path) -> None:
    """One element a head, each with its test scores and bundle."""
    found = run("fit", folder, *TINY, "--head", "ridge", "--head", "logistic", "--json").json

    assert [head["head"] for head in found["heads"]] == ["ridge", "logistic"]
    for head in found["heads"]:
        assert {"head", "best_params", "val", "test", "seconds", "bundle"} <= set(head)
        assert {"accuracy", "accuracy_ci", "balanced_accuracy", "macro_f1", "log_loss", "ece"} <= set(head["test"])
        assert sum(map(sum, head["confusion"])) == sum(one["support"] for one in head["per_class"]) == 6
        assert Path(head["bundle"]).is_file()


def test_finetune_prints_gap_and_costs(run: Run, subtle: Path) -> None:
    """People read the gap, its interval and p, and what both sides cost."""
    options = ("--epochs", "5", "--train-batch", "8", "--lr", "1e-3", "--head-lr", "1e-2", "--label-smoothing", "0")
    done = run("finetune", subtle, *TINY, "--dtype", "float32", *options)

    assert done.code == 0
    for word in ("gap", "95 % interval", "p =", "cost", "train", "safetensors"):
        assert word in done.out


def test_finetune_json_has_the_documented_keys(run: Run, folder: Path) -> None:
    """Scripts rely on these names."""
    found = run("finetune", folder, *TINY, "--epochs", "1", "--train-batch", "8", "--json").json

    assert {"unfreeze", "cut", "test", "probe", "gap", "seconds", "checkpoint"} <= set(found)
    assert {"extract", "train"} == set(found["seconds"])


def test_store_commands(run: Run, folder: Path) -> None:
    """ls, info and verify describe what is there; damage ends verify with 4."""
    entry = Path(run("extract", folder, *TINY, "--json").json["entry"])

    assert run("store", "ls", "--json").json["entries"][0]["rows"] == 36
    assert run("store", "info", entry, "--json").json["spec"]["transform"]["input_size"] == 32
    assert run("store", "verify").code == 0
    part = next((entry / "parts").glob("*[0-9a-f].h5"))
    part.write_bytes(part.read_bytes()[:-1])
    broken = run("store", "verify")
    assert broken.code == 4
    assert part.name in broken.out


def test_backbones_and_doctor(run: Run) -> None:
    """Both answer for people and as JSON."""
    assert [row["name"] for row in run("backbones", "mini", "--json").json["backbones"]] == ["mini"]
    assert "512" in run("backbones", "resnet18").out
    assert run("doctor").code == 0
    assert all(finding["ok"] for finding in run("doctor", "--json").json["findings"])


def test_entries_are_removed_only_when_that_is_meant(run: Run, folder: Path) -> None:
    """What would go is counted; without --yes, where nobody can be asked, nothing does; only entries ever do."""
    entry = Path(run("extract", folder, *TINY, "--json").json["entry"])
    run("fit", folder, *TINY, "--head", "ridge", "--no-baselines")
    (thumbnails,) = entry.parent.glob("pixels.*")
    size = sum(path.stat().st_size for part in (entry, thumbnails) for path in part.rglob("*") if path.is_file())

    asked = run("store", "rm", f"images/{entry.name}")
    assert "1 trained heads" in asked.out
    assert entry.is_dir()
    assert run("store", "rm", "images", "--json").json["bytes"] == size
    one_line(run("store", "rm", folder), 2, "images", "no entry")
    assert run("store", "rm", "images", "--yes").code == 0
    assert not entry.exists()
    assert len(list(folder.rglob("*.png"))) == 36
    assert "0 entries" in run("store", "ls").out


def test_trained_heads_are_listed(run: Run, folder: Path) -> None:
    """With data set, backbone, head, test score, date, and the file that predict takes."""
    assert "No head" in run("store", "heads").out
    kept = run("fit", folder, *TINY, "--head", "ridge", "--no-baselines", "--json").json["heads"][0]
    (head,) = run("store", "heads", "--json").json["heads"]

    assert (head["dataset"], head["backbone"], head["head"]) == ("images", "test_resnet.random0", "ridge")
    assert (head["path"], head["seed"]) == (kept["bundle"], "0")
    assert f"featcache predict {head['path']} FOLDER" in run("fit", folder, *TINY, "--head", "ridge", "--no-baselines").out
    assert head["test"] == kept["test"]
    assert f"accuracy {kept['test']['accuracy']:.1%}" in run("store", "heads").out


def test_what_is_nearly_right_is_named(run: Run, folder: Path) -> None:
    """A mistyped command, option, head or backbone ends with what was meant."""
    one_line(run("finetuen", folder), 2, "finetuen", "Did you mean finetune?")
    one_line(run("store", "lss"), 2, "lss")
    one_line(run("fit", folder, "--hed", "knn"), 2, "--head")
    one_line(run("fit", folder, *TINY, "--head", "logistik"), 2, "--head logistik", "Did you mean logistic?")
    one_line(run("fit", folder, "--head", "knn,logistic"), 2, "--head knn --head logistic")
    one_line(run("fit", folder, "--head", "knn", "logistic"), 2, "--head knn --head logistic")
    one_line(run("predict"), 2, "HEAD", "featcache store heads")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands_options_and_heads(run: Run, monkeypatch: pytest.MonkeyPatch, shell: str) -> None:
    """The script asks featcache itself, which answers without a data set, a backbone or a network."""
    script = run("completion", shell)
    assert script.code == 0
    assert f"_FEATCACHE_COMPLETE={shell}_complete" in script.out

    for words, expected in (("fi", "fit"), ("fit x --hea", "--head"), ("fit x --head logi", "logistic"), ("store r", "rm")):
        monkeypatch.setenv("_FEATCACHE_COMPLETE", f"{shell}_complete")
        monkeypatch.setenv("COMP_WORDS", f"featcache {words}")
        last = words.split()[-1] if shell == "fish" else str(len(words.split()))
        monkeypatch.setenv("COMP_CWORD", last)
        assert expected in run().out.replace(",", "\n").split()


def commands_below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield a command, or those of a group, by what is typed for them."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    with click.Context(command) as ctx:
        for below in command.list_commands(ctx):
            inner = command.get_command(ctx, below)
            assert inner is not None
            yield from commands_below(f"{name} {below}".strip(), inner)


@pytest.mark.parametrize(
    ("name", "command"), list(commands_below("", cli)), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_option_is_explained_by_a_sentence(name: str, command: click.Command) -> None:
    """With a capital first and a full stop last, under a heading; DATA is described where it is taken."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    shown = command.get_help(click.Context(command, info_name=name))

    assert [
        option.opts for option in options if not (option.help or "")[:1].isupper() or not (option.help or "").endswith(".")
    ] == []
    assert [option.opts for option in options if not hasattr(option, "heading")] == []
    assert ("DATA is one of" in shown) == any(param.name == "data" for param in command.params)


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_explains_itself(run: Run, command: str) -> None:
    """--help ends with 0 and shows the usage."""
    shown = run(command, "--help")

    assert shown.code == 0
    assert f"Usage: featcache {command}" in shown.out


def one_line(outcome: Outcome, code: int, *words: str) -> None:
    """An error is one line on stderr that says what is needed, with its exit code."""
    lines = [line for line in outcome.err.splitlines() if line.startswith(("error:", "Error:"))]
    assert outcome.code == code, outcome.err
    assert len(lines) == 1
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0]


def test_wrong_arguments(run: Run, folder: Path, tmp_path: Path) -> None:
    """Usage errors end with 2, data errors with 3."""
    one_line(run("fit", tmp_path / "absent"), 3, "absent", "no such folder")
    one_line(run("fit", folder, "-b", "resnet18x"), 2, "resnet18x", "Did you mean")
    one_line(run("fit", folder, *TINY, "--head", "forest"), 2, "--head forest", "logistic")
    one_line(run("fit", folder, *TINY, "--grid", "alpha=1"), 2, "--grid alpha", "logistic takes C")
    one_line(run("fit", folder, *TINY, "--grid", "C=0,1"), 2, "--grid C=0")
    one_line(run("fit", folder, *TINY, "--head", "all", "--grid", "C=1"), 2, "--grid")
    one_line(run("extract", folder, *TINY, "--cut", "layer9"), 2, "layer9", "layer1")
    one_line(run("finetune", folder, *TINY, "--unfreeze", "half"), 2, "half", "layer1")
    one_line(run("finetune", folder, *TINY, "--unfreeze", "last:0"), 2, "last:K")
    one_line(run("fit", folder, *TINY, "--mean", "a,b"), 2, "0.5,0.5,0.5")
    one_line(run("fit", folder, "-b", "test_resnet", "--weights", tmp_path / "no.pth"), 3, "no.pth", "no such file")
    one_line(run("bench", tmp_path / "no.toml"), 2, "no.toml")
    one_line(run("fit", folder, "-b", "mini", "--device", "cuda:99"), 2, "cuda:99")


def test_one_class_and_one_image(run: Run, folder: Path, tmp_path: Path) -> None:
    """What cannot be learned from ends with 3 and names the class."""
    draw_image(tmp_path / "single" / "only" / "1.png", (1, 1, 1), 1)
    draw_image(tmp_path / "single" / "only" / "2.png", (1, 1, 1), 2)
    one_line(run("fit", tmp_path / "single", *TINY), 3, "two classes", "only")
    draw_image(folder / "rare" / "1.png", (1, 1, 1), 1)
    one_line(run("fit", folder, *TINY), 3, "'rare' has 1 sample")


def test_unwritable_cache(run: Run, folder: Path, tmp_path: Path) -> None:
    """A cache that is a file cannot be written: 4, with its path."""
    (tmp_path / "file").write_text("")
    one_line(run("extract", folder, *TINY, "--cache", tmp_path / "file" / "cache"), 4, "file", "--cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_cache(run: Run, folder: Path, tmp_path: Path) -> None:
    """A folder without write permission: 4, with its path."""
    (tmp_path / "locked").mkdir(mode=0o500)
    one_line(run("extract", folder, *TINY, "--cache", tmp_path / "locked"), 4, "locked")


def test_foreign_files_in_the_cache(run: Run, folder: Path) -> None:
    """Another's HDF5 is neither read nor overwritten: 4, with its path."""
    entry = Path(run("extract", folder, *TINY, "--json").json["entry"])
    (entry / "features.h5").unlink()
    with h5py.File(entry / "features.h5", "w") as file:
        file["mine"] = np.arange(3)
    draw_image(folder / "red" / "more.png", (1, 1, 1), 1)
    one_line(run("extract", folder, *TINY), 4, "features.h5", "not written by featcache")
    part = next((entry / "parts").glob("*[0-9a-f].h5"))
    part.write_bytes((entry / "features.h5").read_bytes())
    one_line(run("fit", folder, *TINY), 4, part.name)


def test_interrupted(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends with 130 and says that nothing is lost."""
    from featcache import api

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "extract_cuts", interrupt)
    ended = run("extract", folder)

    assert ended.code == 130
    assert "goes on from there" in ended.err


@pytest.mark.parametrize(
    ("asked", "spins"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)]
)
def test_waiting_threads_sleep_soon(
    run: Run, monkeypatch: pytest.MonkeyPatch, asked: dict[str, str], spins: str | None
) -> None:
    """So that another process gets their cores; what a user has set stays."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in asked.items():
        monkeypatch.setenv(name, value)

    run("backbones", "resnet10t")

    assert os.environ.get("GOMP_SPINCOUNT") == spins


def test_quiet_says_nothing(run: Run, folder: Path) -> None:
    """With --quiet stderr stays empty."""
    (folder / "yellow").mkdir()

    assert run("-q", "extract", folder, *TINY).err == ""
    assert run("extract", folder, *TINY, "--quiet").err == ""
    assert "yellow" in run("extract", folder, *TINY).err
