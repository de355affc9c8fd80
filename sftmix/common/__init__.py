"""Basic tools for every part of the package; they know nothing of the other parts."""
