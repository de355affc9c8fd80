"""`components`: what can be swapped, by the option that chooses it."""
