"""The runs that all fault tests compare with, made once."""

from pathlib import Path

import pytest

from tests.faults.runs import words_of
from tests.forked import done


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory) -> Path:
    """The uninterrupted run of one process."""
    place = tmp_path_factory.mktemp("whole")
    done(words_of(small), cwd=place)
    return place / "run"


@pytest.fixture(scope="session")
def whole_of_two(small, tmp_path_factory) -> Path:
    """The uninterrupted run of two ranks that share the weights."""
    place = tmp_path_factory.mktemp("whole_of_two")
    done([*words_of(small), "--training.parallel", "fsdp"], cwd=place, ranks=2)
    return place / "run"
