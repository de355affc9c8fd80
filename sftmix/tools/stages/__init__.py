"""`run`, `reference`, `confidence`, `split` and `train`: a run, or its stages up to one of them."""
