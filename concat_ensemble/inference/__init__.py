"""Running an ensemble: folding, export and prediction."""
