"""Measurements of a finished model and of a finished split."""
