"""Exact solvers of linear heads that share each pass over the features among all penalties and folds."""
