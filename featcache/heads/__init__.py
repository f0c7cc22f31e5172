"""The heads: scikit-learn estimators on embeddings, each with the search space that validation chooses from."""

from featcache.heads.base import HeadFamily, Many, Params, answers, as_rows, some_of
from featcache.heads.linear import linear_estimator, linear_weights
from featcache.heads.multioutput import NUMBER_HEADS, sweep_labels, sweep_numbers, train_labels, train_number
from featcache.heads.search import (
    ENSEMBLE,
    HEADS,
    SearchResult,
    in_order,
    over_views,
    require_head,
    require_params,
    search_head,
    train,
)

__all__ = [
    "ENSEMBLE",
    "HEADS",
    "NUMBER_HEADS",
    "HeadFamily",
    "Many",
    "Params",
    "SearchResult",
    "answers",
    "as_rows",
    "in_order",
    "linear_estimator",
    "linear_weights",
    "over_views",
    "require_head",
    "require_params",
    "search_head",
    "some_of",
    "sweep_labels",
    "sweep_numbers",
    "train",
    "train_labels",
    "train_number",
]
