"""The store: entries of immutable parts on disk (the only place that knows HDF5)."""
