"""Write docs/commands.md, the reference of the command line, from the options of the commands themselves.

python docs/generate.py
"""

from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path

import click

from featcache.cli import COMMANDS, cli
from featcache.cli.options import DATA_KINDS, Glossary

PAGE = Path(__file__).parent / "commands.md"
INTRODUCTION = """# Commands

What `featcache COMMAND --help` says, on one page. It is written by `python docs/generate.py`; a test compares the two.

Results go to stdout, notes and progress to stderr; `--json` prints one object with a `schema_version`. Exit codes: 0 ok,
1 a fault of featcache, 2 usage, 3 data, 4 disk or cache, 5 environment (such as weights that cannot be downloaded), 130
interrupted: the same command goes on from there.
"""


def reference() -> str:
    """Return the page."""
    parts = [INTRODUCTION, f"## DATA\n\n{_glossary(DATA_KINDS)}"]
    with click.Context(cli, info_name="featcache") as context:
        for name in COMMANDS:
            command = cli.get_command(context, name)
            assert command is not None
            parts += _sections(command, click.Context(command, info_name=name, parent=context))
    return "\n".join(parts)


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """Yield a command's section, of a group those of its commands below its own."""
    arguments = " ".join(_argument(param) for param in command.params if isinstance(param, click.Argument))
    depth = "#" * (context.command_path.count(" ") + 1)
    yield f"{depth} {context.command_path} {arguments}".rstrip() + f"\n\n{cleandoc(command.help or '')}\n"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            yield from _sections(below, click.Context(below, info_name=name, parent=context))
        return
    glossary = getattr(command, "glossary", None)
    if glossary and glossary is not DATA_KINDS:
        yield _glossary(glossary)
    rows: dict[str, list[str]] = {}
    for param in command.params:
        if isinstance(param, click.Option):
            rows.setdefault(getattr(param, "heading", "Output"), []).append(_row(param))
    for heading, lines in rows.items():
        yield f"| {heading} | what it does |\n|---|---|\n" + "\n".join(lines) + "\n"


def _glossary(glossary: Glossary) -> str:
    heading, meanings = glossary
    rows = "".join(f"| `{_cell(name)}` | {_cell(meaning)} |\n" for name, meaning in meanings)
    return f"| {heading} | what it is |\n|---|---|\n{rows}"


def _argument(param: click.Argument) -> str:
    name = "|".join(map(str, param.type.choices)) if isinstance(param.type, click.Choice) else (param.name or "").upper()
    return f"{name}..." if param.nargs == -1 else f"[{name}]" if not param.required else name


# not the lines of the help itself: each version of click wraps and marks them otherwise
def _row(option: click.Option) -> str:
    flags = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
    default = option.default if option.show_default and not option.is_flag else None
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
    return f"| {flags}{_value(option)} | {_cell(option.help or '')}{f' Default: `{shown}`.' if shown is not None else ''} |"


def _value(option: click.Option) -> str:
    """Return what is written behind a flag: one of some words, or a placeholder."""
    if option.is_flag:
        return ""
    if isinstance(option.type, click.Choice):
        return f" `{_cell('|'.join(option.type.choices))}`"
    kinds = {"text": "TEXT", "directory": "FOLDER", "path": "FILE", "file": "FILE"}
    return f" `{option.metavar or kinds.get(option.type.name, option.type.name)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
