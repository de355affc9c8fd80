"""Schedules against values worked out by hand."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sftmix.components import AfterFraction, Constant, Cosine, Linear

ENDS = st.floats(-10, 10)


def values(schedule, total):
    return [schedule.value(step, total) for step in range(total)]


@given(ENDS, ENDS, st.integers(2, 200))
def test_a_ramp_goes_from_start_to_end_and_never_leaves_them(start, end, total):
    for schedule in (Linear(start=start, end=end), Cosine(start=start, end=end)):
        found = values(schedule, total)
        assert (found[0], found[-1]) == (start, end)
        assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in found)
        rising = [(b - a) * (1 if end >= start else -1) for a, b in itertools.pairwise(found)]
        assert min(rising) >= -1e-12


def test_values_by_hand():
    assert values(Constant(value=0.3), 3) == [0.3] * 3
    assert values(Linear(start=0, end=0.4), 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=1e-15)
    root = math.sqrt(0.5)
    assert values(Cosine(start=1, end=0), 5) == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2, 0], abs=1e-15)
    assert values(AfterFraction(fraction=0.5, value=0.2), 4) == [0, 0, 0.2, 0.2]
    assert values(AfterFraction(fraction=0.5, value=0.2, before=1.0), 5) == [1, 1, 1, 0.2, 0.2]
    assert values(AfterFraction(fraction=0, value=0.2), 2) == [0.2, 0.2]
    assert values(AfterFraction(fraction=0.07, value=0.2), 100).index(0.2) == 7  # 0.07 * 100 is 7.000000000000001
    assert values(AfterFraction(fraction=1, value=0.2), 2) == [0, 0]


def test_a_single_step_is_the_first():
    assert values(Linear(start=0.1, end=0.9), 1) == values(Cosine(start=0.1, end=0.9), 1) == [0.1]
