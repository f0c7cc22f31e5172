"""A TOML file into a grid of cells: data sets x backbones x (heads and unfreezes) x seeds."""

import os
import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from featcache.errors import UsageError, did_you_mean
from featcache.finetuning.plan import FineTunePlan, Unfreeze
from featcache.heads.catalog import HEAD_NAMES
from featcache.specs import BackboneSpec, TransformOverrides, check_fields, check_seed, check_value, freeze_args

_SPEC, _READ = ("pool", "precision"), ("layers", "views")
_OVERRIDES = tuple(field.name for field in fields(TransformOverrides))
_MOST_BYTES = 10_000_000
_KINDS: dict[type, str] = {dict: "table", str: "text"}
_PLAN_KEYS = tuple(field.name for field in fields(FineTunePlan) if field.name != "unfreeze")


@dataclass(frozen=True)
class DataEntry:
    """A data set of a grid, as commands take it, and how heads are chosen and split on it."""

    data: str
    name: str | None = None
    group: str | None = None
    data_root: Path | None = None
    download: bool = False
    folds: int | None = None

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        check_fields(self)


@dataclass(frozen=True)
class BackboneEntry:
    """A backbone of a grid, and what of it heads are trained on: layers side by side, several views of an image."""

    spec: BackboneSpec
    layers: tuple[str, ...] = ()
    views: int = 1

    def __post_init__(self) -> None:
        """Refuse values of the wrong kind."""
        check_fields(self)


@dataclass(frozen=True)
class Grid:
    """What a pipeline file asks for; seeds vary the drawn splits, the heads and the order of training."""

    name: str
    data: tuple[DataEntry, ...]
    backbones: tuple[BackboneEntry, ...]
    heads: tuple[str, ...]
    plans: tuple[FineTunePlan, ...]
    seeds: tuple[int, ...]


def load_grid(path: Path) -> Grid:
    """Read a pipeline file; environment variables in paths are filled in.

    Raises:
        UsageError: the file is absent, not TOML, has an unknown key, or names an unset variable.
    """
    try:
        table = tomllib.loads(_text(path))
    except FileNotFoundError:
        raise UsageError(f"{path}: there is no such pipeline file.") from None
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # TOML's and UTF-8's own errors are ValueErrors
        raise UsageError(f"{path}: not TOML ({error}).") from error
    try:
        return _grid(table, path)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def _text(path: Path) -> str:
    """Return a small regular file's text: a pipe would be waited for, a device read for ever."""
    size = path.stat().st_size
    if not path.is_file() or size > _MOST_BYTES:
        raise UsageError(f"{path}: a TOML file of at most {_MOST_BYTES} bytes is needed.")
    return path.read_text(encoding="utf-8")


def _grid(table: dict[str, Any], path: Path) -> Grid:
    _only(table, {"name", "seeds", "heads", "unfreeze", "group", "dataset", "backbone", "finetune"}, "the file")
    settings = _typed(table, "finetune", dict, {})
    _only(settings, set(_PLAN_KEYS), "[finetune]")
    if "lr" in settings and not isinstance(settings["lr"], list):
        settings = settings | {"lr": [settings["lr"]]}
    base = FineTunePlan(Unfreeze.parse("all"), **settings)
    plans = tuple(replace(base, unfreeze=Unfreeze.parse(text)) for text in _strings(table, "unfreeze"))
    group = check_value(table.get("group"), str | None, "group")
    data = tuple(_data(entry, group) for entry in _tables(table, "dataset", []))
    backbones = tuple(_backbone(entry) for entry in _tables(table, "backbone", [{"name": "mini"}]))
    heads = _strings(table, "heads")
    if unknown := [head for head in heads if head not in HEAD_NAMES]:
        raise UsageError(
            f"heads: {unknown[0]!r}: choose from {', '.join(HEAD_NAMES)}.{did_you_mean(unknown[0], HEAD_NAMES)}"
        )
    if not data:
        raise UsageError("at least one [[dataset]] is needed.")
    if not heads and not plans:
        raise UsageError('nothing to run: give heads = ["logistic"] or unfreeze = ["last:1"].')
    seeds = _typed(table, "seeds", list, [0])
    if not seeds:
        raise UsageError("seeds: at least one whole number from 0 is needed.")
    name = _file_name(_typed(table, "name", str, path.stem))
    return Grid(name, data, backbones, heads, plans, tuple(dict.fromkeys(check_seed(seed, "seeds") for seed in seeds)))


def _file_name(name: str) -> str:
    """Return a name that stands for a file in the output folder and nowhere else: a pipeline may come from a stranger.

    Raises:
        UsageError: it holds a separator or what no file's name should.
    """
    if not re.fullmatch(r"\w[\w .+-]{0,99}", name):
        raise UsageError(f"name: {name[:60]!r}: letters, digits, spaces and . _ + - are possible, up to 100 of them.")
    return name


def _tables(table: dict[str, Any], key: str, default: list[dict[str, Any]]) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = _typed(table, key, list, default)
    if not all(isinstance(entry, dict) for entry in entries):
        raise UsageError(f"{key}: write [[{key}]] and its keys below.")
    return entries


def _data(entry: dict[str, Any], group: str | None) -> DataEntry:
    """Return a data set; ``group`` is the file's own, for those that name none."""
    _only(entry, {field.name for field in fields(DataEntry)}, "[[dataset]]")
    if "data" not in entry:
        raise UsageError("[[dataset]]: data = PATH is needed.")
    data = _expand(_typed(entry, "data", str, ""))
    root = check_value(entry.get("data_root"), str | None, "[[dataset]] data_root")
    roots = {} if root is None else {"data_root": Path(_expand(root))}
    return DataEntry(**({"group": group} | entry | roots | {"data": data}))


def _backbone(entry: dict[str, Any]) -> BackboneEntry:
    _only(entry, {"name", "weights", "random_init", "model_args", *_SPEC, *_READ, *_OVERRIDES}, "[[backbone]]")
    overrides: dict[str, Any] = {
        key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in _OVERRIDES if key in entry
    }
    weights = check_value(entry.get("weights"), str | None, "[[backbone]] weights")
    spec = BackboneSpec(
        name=_typed(entry, "name", str, "mini"),
        weights=_expand(weights) if weights is not None else None,
        random_init=entry.get("random_init"),
        model_args=freeze_args(_typed(entry, "model_args", dict, {})),
        overrides=TransformOverrides(**overrides),
        **{key: entry[key] for key in _SPEC if key in entry},
    )
    return BackboneEntry(spec, **{key: entry[key] for key in _READ if key in entry})


def _expand(text: str) -> str:
    expanded = str(Path(os.path.expandvars(text)).expanduser()) if not text.startswith("sklearn:") else text
    if unset := re.search(r"\$\{?(\w+)", expanded):
        raise UsageError(f"{text}: set the environment variable {unset[1]} first.")
    return expanded


def _strings(table: dict[str, Any], key: str) -> tuple[str, ...]:
    values = _typed(table, key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise UsageError(f"{key}: a list of strings is needed.")
    return tuple(dict.fromkeys(values))


def _typed(table: dict[str, Any], key: str, kind: type, default: Any) -> Any:
    value = table.get(key, default)
    if not isinstance(value, kind):
        raise UsageError(f"{key}: a {_KINDS.get(kind, kind.__name__)} is needed, not {value!r:.60}.")
    return value


def _only(table: dict[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(table) - allowed)
    if unknown:
        raise UsageError(
            f"{where} has no key {unknown[0]!r}; it takes {', '.join(sorted(allowed))}.{did_you_mean(unknown[0], allowed)}"
        )
