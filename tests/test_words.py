"""How the code reads: names say the thing, functions do one thing, modules stand in short chains without circles."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

import featcache

ROOT = Path(featcache.__file__).parent
TREES = {
    ".".join(("featcache", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): ast.parse(
        path.read_text()
    )
    for path in sorted(ROOT.rglob("*.py"))
}

# Words of grammar: as a variable each could be anything.
EMPTY = {
    "found", "several", "some", "one", "other", "others", "done", "left", "mine", "own", "whole", "both", "many",
    "everything", "there", "known", "wanted", "given", "kept", "said", "have", "wish", "what", "ready",
}  # fmt: skip
# Rooms in which no name is empty. Elsewhere the share of all names may only fall.
CLEAN = (
    *("api", "cli", "display", "estimator", "reports", "backbones", "store", "datasets", "heads.solvers", "specs"),
    *("errors", "fingerprint", "resources"),
)
MOST_EMPTY = 0.011

# What may be longer than forty lines, or take more than six parameters, and why.
LONG = {
    "evaluation.splits.draw": "one draw in five steps that share their groups, counts and generator",
    "experiments.export.export": "one model from loading to comparing, each step on what the last one made",
    "extraction.extract.run_batches": "a pool of threads and its end: whatever is raised, no thread is left",
    "heads.search.search_head": "coarse grid, fine grid, winner: one state",
}
MANY_PARAMETERS = {
    "api.finetune": "what Python users set, each by its name",
    "api.gap": "as finetune",
    "api.sweep": "as finetune",
    "estimator.__init__": "scikit-learn wants a parameter for every setting",
    "evaluation.splits.make_split": "what may decide a split, given or drawn",
    "extraction.feature_cache.__init__": "what a command asks for, once",
    "heads.search.search_head": "data, folds and where to look",
    "heads.solvers.solve": "scikit-learn's objective as scikit-learn spells it, and a tolerance",
}
MOST_LINES, MOST_PARAMETERS = 40, 6
MOST_LONG, MOST_WIDE = 4, 8

MOST_MODULES = 85
LONGEST_CHAIN = 9
MOST_TWICE = 8


def functions() -> dict[str, ast.FunctionDef]:
    """Return every function by its module, name and line."""
    return {
        f"{module.removeprefix('featcache.')}.{node.name}": node
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }


def bound_names(tree: ast.Module) -> list[tuple[str, int]]:
    """Return the names that a module binds as variables or parameters, each with its line."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            names.append((node.arg, node.lineno))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.id, node.lineno))
    return names


@cache
def imported(module: str) -> frozenset[str]:
    """Return the modules of this package that are loaded with a module: what only functions import is not."""
    names: set[str] = set()
    for statement in TREES[module].body:
        for node in ast.walk(statement) if isinstance(statement, ast.Try) else [statement]:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(name for name in names & TREES.keys() if name != module and not module.startswith(f"{name}."))


def chain(module: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the longest chain of imports below a module, itself first; fails where it leads back to itself."""
    assert module not in above, f"imports go round: {' > '.join((*above, module))}"
    return _chain(module, above)


_CHAINS: dict[str, tuple[str, ...]] = {}


def _chain(module: str, above: tuple[str, ...]) -> tuple[str, ...]:
    if module not in _CHAINS:
        below = (chain(name, (*above, module)) for name in sorted(imported(module)))
        _CHAINS[module] = (module, *max(below, key=len, default=()))
    return _CHAINS[module]


@pytest.mark.parametrize("room", CLEAN)
def test_names_say_the_thing(room: str) -> None:
    """No variable of a finished room is called by a word of grammar."""
    inside = [name for name in TREES if f"{name}.".startswith(f"featcache.{room}.")]
    empty = [f"{module}:{line} {name}" for module in inside for name, line in bound_names(TREES[module]) if name in EMPTY]

    assert inside
    assert not empty


def test_empty_names_only_get_fewer() -> None:
    """Of all names that are bound a small share may be words of grammar, and no more than today."""
    names = [name for tree in TREES.values() for name, _ in bound_names(tree)]

    assert sum(name in EMPTY for name in names) <= MOST_EMPTY * len(names)


def test_functions_do_one_thing() -> None:
    """A function has at most forty lines and six parameters; what has more is listed with its reason."""
    long, wide = set(), set()
    for name, node in functions().items():
        arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
        if node.end_lineno is not None and node.end_lineno - node.lineno >= MOST_LINES:
            long.add(name)
        if sum(argument.arg not in {"self", "cls"} for argument in arguments) > MOST_PARAMETERS:
            wide.add(name)

    assert long <= LONG.keys(), long - LONG.keys()
    assert wide <= MANY_PARAMETERS.keys(), wide - MANY_PARAMETERS.keys()
    assert len(LONG) <= MOST_LONG
    assert len(MANY_PARAMETERS) <= MOST_WIDE


def test_imports_go_down_in_short_chains() -> None:
    """No module is loaded by what it loads, and a reader meets few modules below one."""
    assert len(TREES) <= MOST_MODULES

    longest = max(map(chain, TREES), key=len)

    assert len(longest) <= LONGEST_CHAIN, " > ".join(longest)


def test_a_name_means_one_thing() -> None:
    """Few functions and classes share their name with one of another module: a search finds what was meant."""
    homes: dict[str, set[str]] = defaultdict(set)
    for module, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                homes[node.name].add(module)
    twice = sorted(name for name, modules in homes.items() if len(modules) > 1 and name != "main")

    assert len(twice) <= MOST_TWICE, twice
