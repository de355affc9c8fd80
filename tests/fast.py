"""Which cases of a test with many belong to the fast suite."""

from collections.abc import Iterable
from typing import Any

import pytest


def some_fast(cases: Iterable[Any], *, every: int) -> list[Any]:
    """Return all cases, of which every n-th is fast, beginning with the first; the others are marked slow.

    cases  of one parameter, or tuples of several
    """
    return [
        case if at % every == 0 else pytest.param(*case if type(case) is tuple else [case], marks=pytest.mark.slow)
        for at, case in enumerate(cases)
    ]
