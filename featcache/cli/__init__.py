"""The command line: one module a command, imported when it is called; errors become one line and an exit code."""

import os
import sys
from typing import Any

import click

from featcache import __version__
from featcache.errors import FeatcacheError, did_you_mean

COMMANDS = {  # in the order of a user's way through them: the module, and what the list of commands says
    "quickstart": ("bench", "See it work: bundled images and backbone, from extraction to a table."),
    "extract": ("extract", "Compute a frozen backbone's features once and keep them."),
    "fit": ("fit", "Train scikit-learn heads on cached features."),
    "finetune": ("finetune", "Train part of the backbone from the cache; print the gap to the probe."),
    "predict": ("predict", "Label images with a trained head."),
    "export": ("predict", "Write backbone and head as one ONNX model."),
    "bench": ("bench", "Run the missing cells of a grid; write records and tables."),
    "store": ("store", "List, describe, verify and remove what the cache holds."),
    "backbones": ("store", "List the backbones that timm knows."),
    "doctor": ("store", "Check the environment and say the exact repair."),
    "completion": ("store", "Print a script that completes commands and options in your shell."),
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
            from featcache.cli.border import discard_output

            discard_output()
            return 0
        except FeatcacheError as error:
            from featcache.cli.border import spelling

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
    from featcache.cli.border import spelling
    from featcache.progress import set_up_notes

    set_up_notes(quiet=quiet, verbose=verbose, wording=spelling(click.get_current_context()))


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0 ok, 2 usage, 3 data, 4 disk, 5 environment or 130 interrupted."""
    import signal

    from featcache.cli.border import ended_by, take_any_name
    from featcache.errors import interrupt

    signal.signal(signal.SIGTERM, interrupt)
    if "OMP_WAIT_POLICY" not in os.environ:  # no slower alone; beside another process no longer many times slower
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    take_any_name()
    try:
        code = cli.main(args=arguments, prog_name="featcache", standalone_mode=False)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last border
        code = ended_by(error)
    sys.exit(code if isinstance(code, int) else 0)
