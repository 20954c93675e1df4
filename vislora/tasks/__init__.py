"""What a run trains on what: one module for each objective, each with a function `prepare`."""
