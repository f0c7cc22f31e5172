"""The command line of benchmarks over sets and one backbone: ``SCRIPT.py OUT [BACKBONE[=WEIGHTS][@A,B] DATA...]``.

A and B are layers whose pooled activations stand side by side, in place of the embedding.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import featcache
from featcache.extraction.feature_cache import Extracted, FeatureCache, Output, Settings
from featcache.specs import POOLED, TransformOverrides, cut_of_layers

Entry = tuple[FeatureCache, Extracted]


def run(measure: Callable[[str, Entry, Path], None], tables: Callable[[Path], str]) -> None:
    """Add the sets that are named to the file OUT, if any, and print the tables of all that it has."""
    out, *rest = sys.argv[1:]
    if rest:
        named, _, layers = rest[0].partition("@")
        name, _, weights = named.partition("=")
        backbone = featcache.BackboneSpec(name)
        if weights:  # of a checkpoint that came from TensorFlow: its padding, its mean and standard deviation
            half = TransformOverrides(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
            backbone = featcache.BackboneSpec(name, weights, model_args=(("pad_type", "same"),), overrides=half)
        for data in rest[1:]:
            cache = FeatureCache(featcache.open_dataset(data), backbone, Settings())
            (entry,) = cache.features([Output(cut_of_layers(layers.split(",")) if layers else POOLED)])
            measure(data, (cache, entry), Path(out))
    print(tables(Path(out)))
