"""From requests and pipeline files to records: the only place where the stages meet."""
