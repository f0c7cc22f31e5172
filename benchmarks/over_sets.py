"""The command line of benchmarks that measure sets through one backbone: ``SCRIPT.py OUT [BACKBONE[=WEIGHTS] DATA...]``."""

import sys
from collections.abc import Callable
from pathlib import Path

import featcache


def run(measure: Callable[[str, featcache.BackboneSpec, Path], None], tables: Callable[[Path], str]) -> None:
    """Add the sets that are named to the file OUT, if any, and print the tables of all that it has."""
    out, *rest = sys.argv[1:]
    if rest:
        name, _, weights = rest[0].partition("=")
        extra = {"weights": weights, "model_args": (("pad_type", "same"),)} if weights else {}
        backbone = featcache.BackboneSpec(name, **extra)
        for data in rest[1:]:
            measure(data, backbone, Path(out))
    print(tables(Path(out)))
