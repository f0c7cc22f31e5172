"""The grid: missing cells only, failures do not stop the others, tables come from records."""

import resource
from pathlib import Path

import pytest

from featcache import reports
from featcache.datasets import open_dataset
from featcache.errors import StorageError, UsageError
from featcache.experiments import bench, experiment
from featcache.experiments.bench import load_grid, run_bench
from featcache.experiments.fit import FitPlan, run_fit
from featcache.extraction.feature_cache import FeatureCache, Settings
from featcache.reports import read_records
from featcache.reports.tables import COLUMNS, markdown, rows, to_csv

GRID = """
heads = ["ridge", "logistic"]
unfreeze = ["last:1"]
seeds = [0, 1]
[[dataset]]
data = "$HERE/images"
[[backbone]]
name = "test_resnet"
random_init = 0
input_size = 32
[finetune]
epochs = 1
batch_size = 8
"""


@pytest.fixture
def pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A grid of two heads and one fine-tuning, two seeds each."""
    monkeypatch.setenv("HERE", str(folder.parent))
    path = folder.parent / "grid.toml"
    path.write_text(GRID)
    return path


def test_only_missing_cells_run(
    pipeline: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A second run computes nothing; one more head costs only that head, and how far the grid has come is said."""
    caplog.set_level("INFO")
    first = run_bench(load_grid(pipeline), settings, tmp_path / "out")
    second = run_bench(load_grid(pipeline), settings, tmp_path / "out")
    pipeline.write_text(GRID.replace('"ridge", ', '"ridge", "knn", '))
    third = run_bench(load_grid(pipeline), settings, tmp_path / "out")

    assert (first.computed_cells, second.computed_cells, third.computed_cells) == (6, 0, 2)
    assert (first.computed_samples, second.computed_samples) == (72, 0)
    assert first.records == second.records
    assert len(third.records) == 8
    assert [result.failures for result in (first, second, third)] == [(), (), ()]
    assert [line for line in caplog.messages if " of 8: " in line] == [
        f"{n} of 8: images, test_resnet.random0, knn, seed {n - 3}" for n in (3, 4)
    ]


def test_the_table_has_a_row_an_experiment(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """Seeds are joined as mean and std; gaps are to the best probe; the files hold the same cells."""
    result = run_bench(load_grid(pipeline), settings, tmp_path / "out")

    table = rows(result.records)

    assert [row[2] for row in table] == ["ridge", "logistic", "last:1"]
    assert all("2 seeds" in row[4] for row in table)
    assert (tmp_path / "out" / "grid.md").read_text() == markdown(result.records) + "\n"
    assert (tmp_path / "out" / "grid.csv").read_text() == to_csv(result.records)
    assert (tmp_path / "out" / "grid.csv").read_text().count("\n") == 4
    assert len(table[0]) == len(COLUMNS)


def test_an_interrupt_leaves_a_table(
    pipeline: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C during fine-tuning: the heads' records and a table of them are there."""

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_finetune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_bench(load_grid(pipeline), settings, tmp_path / "out")

    assert (tmp_path / "out" / "grid.csv").read_text().count("\n") == 3


def test_a_failing_cell_does_not_stop_the_others(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """What fails is named at the end; the rest is there."""
    pipeline.write_text(
        GRID.replace('["last:1"]', '["last:9"]') + '[[dataset]]\ndata = "$HERE/absent"\n'.replace("[[", "\n[[")
    )

    result = run_bench(load_grid(pipeline), settings, tmp_path / "out")

    assert len(result.records) == 4
    assert len(result.failures) == 3
    assert any("absent" in failure for failure in result.failures)
    assert any("last:9" in failure for failure in result.failures)
    assert (tmp_path / "out" / "grid.md").read_text().count("Not run: ") == 3


def test_what_cannot_be_reached_any_more_stays_in_the_table(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """Recorded rows of a data set or weights on a disk that is not mounted today are not lost, and the table says so."""
    whole = run_bench(load_grid(pipeline), settings, tmp_path / "out")
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    again = run_bench(load_grid(pipeline), settings, tmp_path / "out")

    assert {record.cell for record in again.records} == {record.cell for record in whole.records}
    assert again.computed_cells == 0
    assert again.failures
    assert f"Not run: {again.failures[0]}" in (tmp_path / "out" / "grid.md").read_text()


def test_a_disk_that_fails_ends_the_run(
    pipeline: Path, settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing can be kept, no further cell is computed, and the error is the disk's; then the run goes on."""
    caplog.set_level("INFO")
    run_bench(load_grid(pipeline), settings, tmp_path / "out")
    caplog.clear()
    pipeline.write_text(GRID.replace('"ridge", ', '"ridge", "knn", "centroid", '))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(StorageError, match="File too large"):
            run_bench(load_grid(pipeline), settings, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert len([line for line in caplog.messages if " of 10: " in line]) == 1
    assert run_bench(load_grid(pipeline), settings, tmp_path / "out").computed_cells == 4


def test_a_broken_record_costs_its_cell_only(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """A half line, and bytes that are no text: the grid goes on, and runs what they stood for again."""
    result = run_bench(load_grid(pipeline), settings, tmp_path / "out")
    path = Path(result.paths["records"])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:1], lines[1][:300], b"\xff\n", *lines[2:], lines[0][:300]]))

    again = [run_bench(load_grid(pipeline), settings, tmp_path / "out") for _ in range(2)]

    assert [one.computed_cells for one in again] == [1, 0]
    assert [len(one.records) for one in again] == [6, 6]


def test_changed_data_runs_again(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """A removed image is another experiment."""
    run_bench(load_grid(pipeline), settings, tmp_path / "out")
    next((pipeline.parent / "images" / "red").iterdir()).unlink()

    assert run_bench(load_grid(pipeline), settings, tmp_path / "out").computed_cells == 6


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("heads = [", "not TOML"),
        ('heads = ["ridge"]', r"at least one \[\[dataset\]\]"),
        ('[[dataset]]\ndata = "x"', "nothing to run"),
        ('heads = ["ridge"]\nhedas = []\n[[dataset]]\ndata = "x"', "no key 'hedas'"),
        ('heads = "ridge"\n[[dataset]]\ndata = "x"', "heads: a list is needed"),
        ('heads = ["ridge"]\n[[dataset]]\ndata = "$NOT_SET_ANYWHERE/x"', "NOT_SET_ANYWHERE"),
        ('unfreeze = ["last"]\nseeds = [-1]\n[[dataset]]\ndata = "x"', "seeds"),
        ('unfreeze = ["last:1"]\n[[dataset]]\ndata = "x"\n[finetune]\nspeed = 1', "no key 'speed'"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name(tmp_path: Path, text: str, match: str) -> None:
    """The error names the file and what is wrong in it."""
    (tmp_path / "grid.toml").write_text(text)

    with pytest.raises(UsageError, match=rf"grid\.toml.*{match}"):
        load_grid(tmp_path / "grid.toml")


@pytest.mark.parametrize("name", ["quickstart.toml", "lab.toml"])
def test_the_shipped_pipelines_parse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pipeline file of the repository is read without error."""
    for variable in ("FEATCACHE_LAB", "FEATCACHE_LAB_WEIGHTS"):
        monkeypatch.setenv(variable, "somewhere")
    path = Path(__file__).parent.parent / "pipelines" / name

    assert load_grid(path).name == name.removesuffix(".toml")


def test_what_another_protocol_gave_is_made_again(
    pipeline: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads, trainings and records of other rules are not mixed with today's: every cell runs once more, and then rests."""
    first = run_bench(load_grid(pipeline), settings, tmp_path / "out")
    number = reports.PROTOCOL + 1
    for module in (reports, experiment):
        monkeypatch.setattr(module, "PROTOCOL", number)

    again, rests = (run_bench(load_grid(pipeline), settings, tmp_path / "out") for _ in range(2))

    assert (again.computed_cells, rests.computed_cells) == (first.computed_cells, 0)
    assert {record.protocol for record in again.records} == {number}


def test_a_torn_last_record_is_left_out(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """A record cut off by a crash costs that cell only."""
    result = run_bench(load_grid(pipeline), settings, tmp_path / "out")
    path = Path(result.paths["records"])
    path.write_text(path.read_text()[:-50])

    assert len(read_records([path])) == 5


def test_a_grid_takes_what_commands_take(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """Layers, views, pooling and precision of a backbone, folds of a data set; each is another experiment, as in ``fit``."""
    text = GRID.replace('unfreeze = ["last:1"]\n', "").replace("seeds = [0, 1]\n", "")
    own = 'folds = 3\ndownload = false\ndata_root = "$HERE"\n[[backbone]]'
    more = 'input_size = 32\nlayers = ["layer1", "layer2"]\nviews = 2\npool = "avg"\nprecision = "float32"\n'
    pipeline.write_text(text.replace("[[backbone]]", own).replace("input_size = 32\n", more))

    result = run_bench(load_grid(pipeline), settings, tmp_path / "out")

    assert not result.failures
    assert [record.method for record in result.records] == [
        f"{head} on layer1+layer2 2 views" for head in ("ridge", "logistic")
    ]
    assert {record.request["folds"] for record in result.records} == {3}
    assert {record.request["backbone"]["pool"] for record in result.records} == {"avg"}
    assert run_bench(load_grid(pipeline), settings, tmp_path / "out").computed_cells == 0


def test_a_grid_trains_on_the_pooling_that_validation_chooses(pipeline: Path, settings: Settings, tmp_path: Path) -> None:
    """The very experiment that ``fit`` runs; what trains weights or reads layers takes no choice of poolings."""
    text = GRID.replace("seeds = [0, 1]\n", "").replace("input_size = 32\n", 'input_size = 32\npool = "auto"\n')
    pipeline.write_text(text.replace('unfreeze = ["last:1"]\n', ""))
    grid = load_grid(pipeline)

    result = run_bench(grid, settings, tmp_path / "out")

    assert not result.failures
    assert [record.method for record in result.records] == ["ridge best pool", "logistic best pool"]
    assert len({record.params["pool"] for record in result.records}) == 1
    assert run_bench(grid, settings, tmp_path / "out").computed_cells == 0
    cache = FeatureCache(open_dataset(grid.data[0].data), grid.backbones[0].spec, settings)
    (alone,) = run_fit(cache, FitPlan(("ridge",), best_pool=True, baselines=False)).heads
    assert alone.record.cell == result.records[0].cell
    for more, match in (("", "beside `unfreeze`"), ('layers = ["layer1"]\n', "`best_pool`")):
        pipeline.write_text(text.replace('pool = "auto"\n', f'pool = "auto"\n{more}'))
        with pytest.raises(UsageError, match=match):
            load_grid(pipeline)


def test_a_key_that_was_nearly_right_is_told(pipeline: Path) -> None:
    """Of a data set and of a backbone as of the file."""
    for wrong, meant in (("downlaod = true", "download"), ("layer = []", "layers")):
        place = "[[backbone]]" if meant == "download" else "[finetune]"
        pipeline.write_text(GRID.replace(place, f"{wrong}\n{place}"))
        with pytest.raises(UsageError, match=f"no key '{wrong.split()[0]}'.*{meant}"):
            load_grid(pipeline)
