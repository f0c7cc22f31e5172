"""``featcache store``, ``featcache backbones``, ``featcache doctor`` and ``featcache completion``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from featcache.cli import options

BROKEN, DAMAGED = 5, 4
_MEASURED = 20  # backbones at most that are built unasked to be measured: some tenths of a second each
_entries = click.argument("entries", nargs=-1, type=click.Path(path_type=Path))


@click.group("store")
def store_command() -> None:
    """List, describe, verify and clean up what the cache holds."""


@store_command.command("ls", cls=options.Command, short_help="List the entries with rows and sizes.")
@options.cache_option
@options.json_option
def list_entries(cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the entries with their rows and sizes, and what they come to."""
    from featcache.display import printable
    from featcache.errors import StorageError
    from featcache.extraction import default_cache, entry_folders
    from featcache.store.entry import FeatureStore

    where = cache or default_cache()
    entries, broken, unlisted = [], [], set[str]()
    for folder in entry_folders(where):
        try:
            store = FeatureStore.open(folder)
            entries.append(_facts(store))
        except StorageError as error:
            broken.append(str(error))
            continue
        # what a FeatureExtractor is given is no data set, and thumbnails are listed by the fit that asks for them
        if folder.parent.name == "extractor" or _are_thumbnails(store.spec):
            unlisted.add(str(folder))
    if as_json:
        options.emit({"cache": str(where), "entries": entries, "broken": broken})
    else:
        for facts in entries:
            state = "" if facts["complete"] or facts["entry"] in unlisted else "  not complete"
            click.echo(f"{facts['rows']:>9} rows {facts['bytes'] / 1e6:>9.1f} MB  {printable(facts['entry'])}{state}")
        for problem in broken:
            click.echo(f"   broken: {printable(problem)}")
        size, count = sum(facts["bytes"] for facts in entries), len(entries)
        click.echo(f"{count} entr{'y' if count == 1 else 'ies'}, {size / 1e6:.1f} MB in {printable(str(where))}")
    if broken:
        click.get_current_context().exit(DAMAGED)


@store_command.command("heads", cls=options.Command, short_help="List the trained heads and their scores.")
@options.cache_option
@options.json_option
def list_heads(cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the trained heads: data set, backbone, head, test score, date, and the file that predict and export take."""
    from dataclasses import asdict

    from featcache.display import Table
    from featcache.experiments.upkeep import kept_heads
    from featcache.extraction import default_cache

    where = cache or default_cache()
    heads = kept_heads(where)
    if as_json:
        options.emit({"cache": str(where), "heads": [asdict(head) | {"path": str(head.path)} for head in heads]})
        return
    headers = ("data set", "backbone", "head", "seed", "test", "made", "file")
    rows = [
        (head.dataset, head.backbone, head.head, head.seed, head.score_text, head.made, str(head.path)) for head in heads
    ]
    click.echo(Table(headers, rows).plain() if rows else f"No head in {where}: `featcache fit` trains them")


@store_command.command("info", cls=options.Command, short_help="Describe one entry.")
@click.argument("entry", type=click.Path(path_type=Path))
@options.json_option
@options.cache_option
def info(entry: Path, cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Describe one ENTRY: what its numbers depend on, its images, what was left out and why."""
    import json
    from dataclasses import asdict

    from featcache.experiments.upkeep import find_entries
    from featcache.extraction import default_cache
    from featcache.store.entry import FeatureStore

    folder = entry if (entry / "spec.json").is_file() else find_entries(cache or default_cache(), [entry])[0]
    store = FeatureStore.open(folder)
    facts = _facts(store) | {
        "spec": store.spec,
        "manifest": store.manifest.number,
        "quarantined": [asdict(item) for item in store.manifest.quarantined],
    }
    if as_json:
        options.emit(facts)
    else:
        click.echo(json.dumps(facts, indent=1))


@store_command.command("verify", cls=options.Command, short_help="Check every byte against its hash.")
@_entries
@options.cache_option
@options.json_option
def verify(entries: tuple[Path, ...], cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Check every byte of ENTRIES (default: the whole cache) against its hash; ends with 4 where one is damaged."""
    from featcache.display import printable
    from featcache.experiments.upkeep import verify as look
    from featcache.extraction import default_cache

    where = cache or default_cache()
    checked, problems = look(where, _folders_named(where, entries))
    if as_json:
        options.emit({"checked": checked, "problems": problems})
    else:
        options.show(map(printable, problems))
        ends = ("y" if checked == 1 else "ies", "" if len(problems) == 1 else "s")
        click.echo(f"{checked} entr{ends[0]} checked, {len(problems)} problem{ends[1]}")
    if problems:
        click.get_current_context().exit(DAMAGED)


@store_command.command("gc", cls=options.Command, short_help="Remove what entries do not need.")
@_entries
@options.cache_option
@options.grouped(
    "Action", click.option("--yes", is_flag=True, help="Do it: without this it is only said what would be done.")
)
@options.grouped("Output", click.option("-v", "--verbose", is_flag=True, help="Name entries and files, not only counts."))
@options.json_option
def gc(entries: tuple[Path, ...], cache: Path | None, *, yes: bool, verbose: bool, as_json: bool) -> None:
    """Remove what ENTRIES (default: all) do not need.

    That is files of killed runs, manifests and lists of samples of an entry before its last change, and rows of removed
    samples; small files of rows are joined. Other rows and what was trained stay. Let nothing else use the cache meanwhile.
    """
    from featcache.display import printable
    from featcache.experiments.upkeep import collect
    from featcache.extraction import default_cache

    where = cache or default_cache()
    collected = collect(where, _folders_named(where, entries), act=yes)
    if as_json:
        options.emit(collected.summary | {"done": yes})
    else:
        options.show(map(printable, (*(collected.lines if verbose else collected.totals), *collected.broken)))
        size, count = sum(file.bytes for file in collected.litter), len(collected.litter)
        total = f"{count} file{'' if count == 1 else 's'}, {size / 1e6:.1f} MB"
        if not collected.litter and not collected.joined:
            click.echo("Nothing to remove or join.")
        elif yes:
            click.echo(f"In all {total}: removed.")
        else:
            click.echo(f"In all {total}: nothing was changed, --yes does it; other rows and what was trained stay.")
    if collected.broken:
        click.get_current_context().exit(DAMAGED)


@store_command.command("rm", cls=options.Command, short_help="Remove entries, and what was trained from them.")
@click.argument("entries", nargs=-1, required=True, type=click.Path(path_type=Path))
@options.cache_option
@options.grouped("Action", click.option("--yes", is_flag=True, help="Remove without asking, and where nobody can be asked."))
@options.json_option
def remove_entries(entries: tuple[Path, ...], cache: Path | None, yes: bool, as_json: bool) -> None:  # noqa: FBT001
    """Remove ENTRIES, or all of a data set's, with their rows and the heads and checkpoints that were trained from them.

    An entry is named as `store ls` does, or from the cache's folder on, such as digits/mini.pooled-f84b6cb6. Nothing else
    may use it meanwhile.
    """
    import sys

    from featcache.display import printable
    from featcache.experiments.upkeep import contents_of, find_entries, remove_entry
    from featcache.extraction import default_cache

    contents = [contents_of(folder) for folder in find_entries(cache or default_cache(), entries)]
    size = sum(content.bytes for content in contents)
    for content in () if as_json else contents:
        lost = f", {content.trained} trained heads and checkpoints among them" if content.trained else ""
        click.echo(f"{printable(str(content.path))}: {content.files} files, {content.bytes / 1e6:.1f} MB{lost}")
    if not yes and not as_json and sys.stdin.isatty():
        yes = click.confirm(f"Remove {len(contents)} entr{'y' if len(contents) == 1 else 'ies'}, {size / 1e6:.1f} MB?")
    for content in contents if yes else ():
        remove_entry(content.path)
    if as_json:
        removed = [{"entry": str(content.path), "files": content.files, "bytes": content.bytes} for content in contents]
        options.emit({"entries": removed, "bytes": size, "done": yes})
    else:
        unchanged = "nothing was changed" + ("" if sys.stdin.isatty() else ", --yes does it")
        click.echo(f"{size / 1e6:.1f} MB removed" if yes else f"{size / 1e6:.1f} MB: {unchanged}")


def _folders_named(cache: Path, entries: tuple[Path, ...]) -> list[Path]:
    """Return the folders that are named, by their paths or as ``store rm`` takes them; broken ones too."""
    from featcache.experiments.upkeep import find_entries

    is_here = {entry: any((entry / sign).exists() for sign in ("spec.json", "parts")) for entry in entries}
    return [folder for entry in entries for folder in ([entry] if is_here[entry] else find_entries(cache, [entry]))]


def _are_thumbnails(spec: Mapping[str, Any]) -> bool:
    from featcache.datasets.decoding import SIDE

    transform = spec["transform"]
    shape = transform.get("crop_mode"), transform.get("input_size")
    return spec["cut"] == "input" and shape == ("squash", SIDE)


def _facts(store: Any) -> dict[str, Any]:
    manifest = store.manifest
    return {
        "entry": str(store.path),
        "key": store.key,
        "rows": manifest.listing.rows if manifest.listing else manifest.rows,
        "stored_rows": manifest.rows,
        "bytes": sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file()),
        "complete": manifest.listing is not None,
    }


@click.command("backbones", cls=options.Command)
@click.argument("pattern", default="*")
@options.cache_option
@options.grouped(
    "Output", click.option("--sizes", is_flag=True, help="Show parameters and embedding width too: slow for many.")
)
@options.json_option
def backbones_command(pattern: str, sizes: bool, cache: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """List the backbones whose name matches PATTERN (a shell pattern such as 'resnet*').

    Up to 20 matches, sizes are shown as well.
    """
    from dataclasses import asdict

    from featcache.backbones.timm_models import list_backbones, model_size
    from featcache.extraction import default_cache, entry_folders

    cached = {folder.name.split(".")[0] for folder in entry_folders(cache or default_cache())}
    names = list(list_backbones(pattern))
    rows = []
    for facts in names:
        row: dict[str, Any] = {
            "name": facts.name,
            "input_size": facts.input_size,
            "pretrained": facts.pretrained,
            "cached": facts.name.split(".")[0] in cached,
        }
        if sizes or len(names) <= _MEASURED:
            size = model_size(facts.name)
            row |= asdict(size) if size else {}
        rows.append(row)
    if as_json:
        options.emit({"backbones": rows})
        return
    for row in rows:
        measured = ""
        if "width" in row:
            measured = f"{row['parameters'] / 1e6:7.1f} M parameters {row['gmacs']:7.2f} GMACs  width {row['width']:5}"
        marks = ("pretrained" if row["pretrained"] else "no weights") + (", features in the cache" if row["cached"] else "")
        click.echo(f"{row['name']:45} {row['input_size']:4} px {measured}  {marks}")
    if not rows:
        click.echo(f"No backbone matches {pattern!r}")


@click.command("doctor", cls=options.Command)
@options.grouped("Computing", options.offline_option)
@options.json_option
def doctor_command(as_json: bool) -> None:  # noqa: FBT001
    """Check that the installation works, and say the exact repair where it does not.

    With --offline nothing is asked of a network, as the other commands do with it.
    """
    from dataclasses import asdict

    from featcache.experiments.upkeep import examine

    findings = examine()
    if as_json:
        options.emit({"findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'BAD '} {finding.what}: {finding.found}")
            if not finding.ok:
                click.echo(f"     repair: {finding.repair}")
    if not all(finding.ok for finding in findings):
        click.get_current_context().exit(BROKEN)


@click.command("completion", cls=options.Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion_command(shell: str) -> None:
    """Print a script that completes commands, options, heads and files of featcache in SHELL.

    bash: write eval "$(featcache completion bash)" into ~/.bashrc.

    zsh: write eval "$(featcache completion zsh)" into ~/.zshrc, behind compinit.

    fish: featcache completion fish > ~/.config/fish/completions/featcache.fish
    """
    from click.shell_completion import get_completion_class

    writer = get_completion_class(shell)
    assert writer is not None
    root = click.get_current_context().find_root().command
    click.echo(writer(root, {}, "featcache", "_FEATCACHE_COMPLETE").source())
