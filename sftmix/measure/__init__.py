"""What is said of a model and of a split once they are there."""

from __future__ import annotations
