"""The command line of benchmarks that measure sets through one backbone: ``SCRIPT.py OUT [BACKBONE[=WEIGHTS] DATA...]``."""

import sys
from collections.abc import Callable
from pathlib import Path

import featcache
from featcache.specs import TransformOverrides


def run(measure: Callable[[str, featcache.BackboneSpec, Path], None], tables: Callable[[Path], str]) -> None:
    """Add the sets that are named to the file OUT, if any, and print the tables of all that it has."""
    out, *rest = sys.argv[1:]
    if rest:
        name, _, weights = rest[0].partition("=")
        backbone = featcache.BackboneSpec(name)
        if weights:  # of a checkpoint that came from TensorFlow: its padding, its mean and standard deviation
            half = TransformOverrides(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
            backbone = featcache.BackboneSpec(name, weights, model_args=(("pad_type", "same"),), overrides=half)
        for data in rest[1:]:
            measure(data, backbone, Path(out))
    print(tables(Path(out)))
