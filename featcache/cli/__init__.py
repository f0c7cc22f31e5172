"""The command line and its border: a command is imported when it is called; errors become a line and an exit code."""

import contextlib
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import click

from featcache import __version__
from featcache.display import printable, set_up_notes
from featcache.errors import INTERRUPTED, FeatcacheError, did_you_mean, interrupt

COMMANDS = {  # in the order of a user's way through them: the module, and what the list of commands says
    "quickstart": ("studies", "See it work: bundled images and backbone, from extraction to a table."),
    "extract": ("models", "Compute a frozen backbone's features once and keep them."),
    "fit": ("models", "Train scikit-learn heads on cached features."),
    "finetune": ("models", "Train part of the backbone from the cache; print the gap to the probe."),
    "gap": ("models", "Take the gap apart: what is pooling, other layers, attention, weights."),
    "advise": ("studies", "Find which backbone, whether to train its weights, what more images would bring."),
    "audit": ("studies", "Look for leaks, wrong labels and shortcuts, and what they do to test accuracy."),
    "next": ("studies", "Choose what to label next, and say what that was worth so far."),
    "predict": ("models", "Label images with a trained head."),
    "export": ("models", "Write backbone and head as one ONNX model."),
    "bench": ("studies", "Run the missing cells of a grid; write records and tables."),
    "report": ("studies", "Make one page to send, or tables, of what was run."),
    "store": ("store", "List, describe, verify and remove what the cache holds."),
    "backbones": ("store", "List the backbones that timm knows."),
    "doctor": ("store", "Check the environment and say the exact repair."),
    "completion": ("store", "Print a script that completes commands and options in your shell."),
}
_FAULT = (
    "This is a fault of featcache. What was computed is kept; with FEATCACHE_TRACEBACK=1 it says where it happened, for a "
    "report."
)
UNEXPECTED, DISK, SETUP = 1, 4, 5
_FIELD = re.compile(r"(?<!`)`((?:[A-Z]\w*\.)?([a-z]\w*))(?:=([^`]*))?`(?!`)")
_QUOTES = "'\""
# Options go by their own names; these are the fields that have another one, with their owner where two share a name.
_RENAMED = {
    "FineTunePlan.batch_size": "train_batch",
    "FineTunePlan.precision": "train_precision",
    "BackboneSpec.name": "backbone",
    "Views.count": "views",
    "Views.seed": "views_seed",
    "budget": "cache_budget",
    "decoder": "decode",
    "heads": "probes",
    "projection": "map",
}
_SPINS = "2000"  # how often PyTorch's waiting threads look before they sleep (libgomp's default: some 300,000 times)


class LazyGroup(click.Group):
    """Imports a command when it is called; ``--help`` imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        module, _ = COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"featcache.cli.{module}"), f"{cmd_name}_command")
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that is called; of a mistyped one say which was meant, as newer versions of click do."""
        if args[0] not in COMMANDS and not args[0].startswith("-") and not ctx.resilient_parsing:  # it completes a word
            ctx.fail(f"No such command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; a reader who has seen enough ends it without an error (click itself would end it with 1)."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, where a closed pipe is still caught, and not as Python ends
        except BrokenPipeError:
            discard_output()
            return 0
        except FeatcacheError as error:
            error.args = (spelling(ctx)(str(error)),)
            raise
        return result

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "FEATCACHE"})
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors on stderr.")
@click.option("-v", "--verbose", is_flag=True, help="Say more on stderr.")
@click.version_option(__version__, prog_name="featcache")
def cli(quiet: bool, verbose: bool) -> None:  # noqa: FBT001 - click calls it by name
    """Compute a frozen backbone's features once, keep them, train from them, and measure what fine-tuning adds.

    DATA is a folder of class folders, a table, arrays, or a data set by its name: `featcache fit --help` lists the kinds.
    """
    set_up_notes(quiet=quiet, verbose=verbose, wording=spelling(click.get_current_context()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0 ok, 2 usage, 3 data, 4 disk, 5 environment or 130 interrupted."""
    import signal

    signal.signal(signal.SIGTERM, interrupt)
    if "OMP_WAIT_POLICY" not in os.environ:  # no slower alone; beside another process no longer many times slower
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    take_any_name()
    try:
        code = cli.main(args=arguments, prog_name="featcache", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last border
        code = ended_by(error)
    sys.exit(code if isinstance(code, int) else 0)


def spelling(ctx: click.Context) -> Callable[[str], str]:
    """Return what spells the fields that a library's text names as flags of the running command.

    "`max_bad=0.1`" becomes "--max-bad 10.0%" where the command has that option. What it has no flag for, such as a key of a
    pipeline file, stays as the bare name.
    """
    root = ctx.find_root()
    name = root.invoked_subcommand
    command = root.command.get_command(root, name) if isinstance(root.command, click.Group) and name else None
    options = {field: option for option in (_options(command) if command else ()) for field in _fields(option)}
    if name == "bench":
        options.pop("group", None)  # a key of the pipeline file as well, and more often that

    def spelt(match: re.Match[str]) -> str:
        owned, field, value = match.groups()
        names = (_RENAMED[owned],) if owned in _RENAMED and owned != field else (field, _RENAMED.get(field, ""))
        option = next((options[name] for name in names if name in options), None)
        if option is None:
            return field if value is None else f"{field}={value}"
        return _spelt(option, value)

    return lambda text: _FIELD.sub(spelt, text)


def _options(command: click.Command) -> Iterator[click.Option]:
    """Yield a command's options, a group's with those of all of its commands."""
    yield from (parameter for parameter in command.params if isinstance(parameter, click.Option))
    for below in command.commands.values() if isinstance(command, click.Group) else ():
        yield from _options(below)


def _fields(option: click.Option) -> list[str]:
    """Return what a field may be called that an option sets: as the function's parameter, or as the flag."""
    return [option.name or "", *(flag.removeprefix("--").replace("-", "_") for flag in option.opts if flag.startswith("--"))]


def _spelt(option: click.Option, value: str | None) -> str:
    flag = next(flag for flag in option.opts if flag.startswith("--"))
    if value is None:
        return flag
    if option.is_flag:
        return flag if value == "True" else (option.secondary_opts or [flag])[0]
    return f"{flag} {getattr(option.type, 'spelt', str)(value.strip(_QUOTES))}"


def ended_by(error: BaseException) -> int:
    """Say on stderr what ended a command, and return the exit code."""
    if isinstance(error, click.Abort):  # click's name for an interrupt, and for any file that came to its end too soon
        error = error.__cause__ or KeyboardInterrupt()
    if isinstance(error, KeyboardInterrupt):
        click.echo("interrupted: what was computed is kept, the same command goes on from there.", err=True)
        return INTERRUPTED
    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(shown)
        for line in shown.getvalue().splitlines():
            click.echo(printable(line.replace("\t", "  ")), err=True)  # click indents choices so
        return error.exit_code
    return _failed(error)


def _failed(error: BaseException) -> int:
    if isinstance(error, FeatcacheError):
        text, code = str(error), error.exit_code
    elif isinstance(error, OSError):
        text, code = f"{error.filename or 'disk'}: {error.strerror or error}", DISK
    elif isinstance(error, MemoryError):
        text, code = f"not enough memory ({error or 'none left'}): a smaller --batch-size or fewer --workers help.", SETUP
    else:
        # a user gets a line; whoever looks for the cause gets the traceback too
        if os.environ.get("FEATCACHE_TRACEBACK") or logging.getLogger("featcache").isEnabledFor(logging.DEBUG):
            traceback.print_exception(error)
        text, code = f"unexpected {type(error).__name__}: {error}. {_FAULT}", UNEXPECTED
    click.echo(f"error: {printable(text)}", err=True)
    return code


def discard_output() -> None:
    """Let Python's last flush go nowhere, where whoever read our output has gone: no error of ours."""
    with contextlib.suppress(OSError, ValueError):  # where output is no file there is nothing to turn away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def take_any_name() -> None:
    """Let file names that are no UTF-8 go out as the bytes they came in, instead of ending a table in the middle."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
