"""The heads: scikit-learn estimators on embeddings, each with the search space that validation chooses from."""
