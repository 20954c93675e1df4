"""Where the attention projections of a model are."""
