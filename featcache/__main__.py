"""``python -m featcache`` and the installed command: signals are caught before anything that takes time is imported."""

import gc
import signal
import sys

from featcache.errors import INTERRUPTED, interrupt


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, interrupt)
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
