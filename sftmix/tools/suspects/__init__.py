"""`suspects`: the rows to read first."""
