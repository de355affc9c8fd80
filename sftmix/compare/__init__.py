"""A table: variants of one configuration x seeds, each a run directory, with the statistics that so many runs carry."""

from __future__ import annotations

from sftmix.compare.plan import Cell, Comparison, TableOptions
from sftmix.compare.run import compare

__all__ = ["Cell", "Comparison", "TableOptions", "compare"]
