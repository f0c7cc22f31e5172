"""The architecture's promises about imports, checked on the source and on running processes."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import featcache

ROOT = Path(featcache.__file__).parent

LAYERS = (
    ("__main__",),
    ("cli",),
    ("api", "estimator"),
    ("experiments",),
    ("extraction", "finetuning", "heads", "reports"),
    ("backbones", "store"),
    ("datasets",),
    ("evaluation",),
    ("specs",),
    ("display", "fingerprint", "resources"),
    ("errors",),
)
RANK = {name: rank for rank, names in enumerate(reversed(LAYERS)) for name in names}
HOMES = {
    "h5py": {"store", "datasets.arrays"},
    "timm": {"backbones"},
    "PIL": {"datasets.decoding", "estimator"},
    "open_clip": {"backbones.clip"},
    "click": {"cli"},
    "torch": {"backbones", "extraction", "finetuning", "experiments.export", "experiments.upkeep"},
    "openvino": {"extraction.runtimes"},
    "onnxruntime": {"extraction.runtimes", "experiments.export"},
    "sklearn": {"estimator", "heads", "evaluation", "experiments.export", "datasets.arrays"},
    "skops": {"heads.bundle"},
    "pyarrow": {"datasets.tables"},
    "ray": {"extraction.runtimes"},
    "datasets": {"datasets.hubs"},
    "peft": {"finetuning.model"},
    "matplotlib": {"reports.tables"},
    "cleanlab": {"heads.checks"},
    "wandb": {"reports.trackers"},
    "trackio": {"reports.trackers"},
    "tensorboard": {"reports.trackers"},
    "mlflow": {"reports.trackers"},
    "openTSNE": {"experiments.report"},
    "jinja2": {"reports.page"},
    "torchvision": {"datasets.hubs"},
    "transformers": {"backbones.text", "backbones.encoders"},
}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield every module as ``part.part`` with its file."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, path


def imports(path: Path, *, top_level_only: bool = False) -> Iterator[str]:
    """Yield the dotted names that a module imports, those under TYPE_CHECKING left out."""
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    for node in nodes:
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_imports_run_downward(name: str, path: Path) -> None:
    """A module imports only lower layers, or its own package."""
    own = name.split(".", maxsplit=1)[0]
    above = {
        imported
        for imported in imports(path)
        if imported.startswith("featcache.")
        and (layer := imported.split(".")[1]) in RANK
        and layer != own
        and RANK[layer] >= RANK[own]
    }

    assert not above


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_each_third_party_world_has_its_home(name: str, path: Path) -> None:
    """A library is imported only where the architecture says."""
    strays = {
        imported
        for imported in imports(path)
        for library, homes in HOMES.items()
        if imported.split(".")[0] == library and not any(name == home or name.startswith(f"{home}.") for home in homes)
    }

    assert not strays


@pytest.mark.parametrize(("name", "path"), list(modules()), ids=lambda value: str(value) if isinstance(value, str) else "")
def test_only_the_command_line_spells_flags(name: str, path: Path) -> None:
    """Neither code nor comment of the library writes a ``--flag``: whoever called it from Python has fields."""
    assert name.split(".", maxsplit=1)[0] == "cli" or not re.findall(r"--[a-z][a-z-]*", path.read_text())


@pytest.mark.parametrize("room", ["experiments", "heads", "reports", "store"])
def test_what_works_on_samples_names_no_world(room: str) -> None:
    """Above the backbones and data sets a sample is bytes: neither code nor comment there speaks of images or pixels."""
    strays = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sorted((ROOT / room).rglob("*.py"))
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if re.search(r"image|pixel", line, re.IGNORECASE)
    ]

    assert not strays


def loaded_after(*arguments: str, cwd: Path) -> set[str]:
    """Run a command in a new process and return the top-level modules that it has loaded at its end."""
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print('LOADED', *sorted({m.split('.')[0] for m in sys.modules})))\n"
        "from featcache.cli import main\n"
        f"main({list(arguments)!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("LOADED")
    return set(last.split()[1:])


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    """``--help`` imports no numerical library."""
    heavy = {"torch", "numpy", "sklearn", "h5py", "timm", "PIL", "scipy", "tqdm"}

    assert not loaded_after("--help", cwd=tmp_path) & heavy
    assert not loaded_after("fit", "--help", cwd=tmp_path) & heavy


def test_fit_on_a_cached_entry_loads_no_torch(folder: Path, tmp_path: Path) -> None:
    """A second ``fit`` needs neither torch nor timm."""
    command = ("fit", str(folder), "--cache", str(tmp_path / "cache"), "--head", "ridge", "--json")

    assert "torch" in loaded_after(*command, cwd=tmp_path)
    assert not loaded_after(*command, cwd=tmp_path) & {"torch", "timm", "torchvision"}
    assert not loaded_after("store", "ls", "--cache", str(tmp_path / "cache"), cwd=tmp_path) & {"torch", "sklearn"}
