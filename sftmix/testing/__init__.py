"""Checks for your own components, and Hypothesis strategies for their inputs.

    from sftmix.testing import check_splitter
    from my_lab import ByLength

    def test_by_length():
        check_splitter(ByLength(threshold=20))

Each check runs the component on generated inputs, the same ones every time. It raises AssertionError with the smallest
input that breaks the contract of its base class. All need hypothesis (`pip install sftmix[test]`), no data and no GPU.
"""

from sftmix.testing.checks import (
    check_callback,
    check_confidence_estimator,
    check_objective,
    check_optimizer,
    check_pair_sampler,
    check_perturbation,
    check_reference,
    check_schedule,
    check_selector,
    check_splitter,
)
from sftmix.testing.strategies import RowsInMemory, equal_groups, rows_in_memory, score_tables, training_dynamics

__all__ = [
    "RowsInMemory",
    "check_callback",
    "check_confidence_estimator",
    "check_objective",
    "check_optimizer",
    "check_pair_sampler",
    "check_perturbation",
    "check_reference",
    "check_schedule",
    "check_selector",
    "check_splitter",
    "equal_groups",
    "rows_in_memory",
    "score_tables",
    "training_dynamics",
]
