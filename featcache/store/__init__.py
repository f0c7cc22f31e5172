"""The store: entries of immutable parts on disk (the only place that knows HDF5)."""

from featcache.store.entry import TABLE, Features, FeatureStore, RowReader, now_ns
from featcache.store.hdf5 import SPLITS, Listing, Part, Seen
from featcache.store.manifests import FileRecord, Manifest, Quarantined

__all__ = [
    "SPLITS",
    "TABLE",
    "FeatureStore",
    "Features",
    "FileRecord",
    "Listing",
    "Manifest",
    "Part",
    "Quarantined",
    "RowReader",
    "Seen",
    "now_ns",
]
