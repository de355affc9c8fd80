"""`status`: how far runs are, from their files alone."""
