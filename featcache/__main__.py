"""``python -m featcache`` and the installed command: signals are caught before anything that takes time is imported."""

import gc
import inspect
import signal
import sys

from featcache.errors import INTERRUPTED, interrupt


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, interrupt)
    # No command shows what libraries say of themselves. While it loads, SciPy reads its docstrings and writes 600 of them
    # anew, a quarter of what scikit-learn takes to load; without any, as under python -OO, it goes on all the same.
    inspect.getdoc = lambda _: None  # type: ignore[assignment]
    try:
        from featcache.cli import main as run

        run()
    except KeyboardInterrupt:  # while modules were imported: the command line itself answers later ones
        sys.stderr.write("interrupted: nothing had begun.\n")
        sys.exit(INTERRUPTED)
    finally:
        gc.freeze()  # else Python, as it ends, looks twice for cycles among all objects: a second where PyTorch is in


if __name__ == "__main__":
    main()
