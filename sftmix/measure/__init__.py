"""Measurements of a finished model and of a finished split."""

from __future__ import annotations
