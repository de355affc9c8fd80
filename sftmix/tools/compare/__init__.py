"""A table: variants of one configuration x seeds, each cell a run directory, with statistics for so many seeds."""

from sftmix.tools.compare.plan import Comparison, TableOptions
from sftmix.tools.compare.table import compare

__all__ = ["Comparison", "TableOptions", "compare"]
