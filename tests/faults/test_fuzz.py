"""No field of a file of a model or of a run ends a command in a traceback, or makes it hang."""

import subprocess
import sys

import pytest

from tests.faults.fuzz import VALUES, cases
from tests.tiny import ROOT


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("every", "only"), [(40, "config"), (20, "json")])
def test_a_sample_of_all_cases(every, only):
    """In a process that has run nothing before: its forks would wait for threads that they do not have."""
    words = [sys.executable, "-m", "tests.faults.fuzz", str(every), only]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_each_field_has_each_value_once():
    found = cases({"a": 1, "b": [{"c": "x"}]})
    assert len(found) == 4 * len(VALUES)
    kept = [case.content for case in found if case.field == "b.0.c"]
    assert [content["b"] for content in kept] == [[{"c": value}] for value in VALUES.values()]
    assert {content["a"] for content in kept} == {1}
